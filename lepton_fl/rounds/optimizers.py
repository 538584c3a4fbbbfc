"""Server optimisers: the mean update of a round is taken as a negative gradient.

FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al. 2019), and FedAdagrad, FedAdam, FedYogi as in Algorithm 2 of
Reddi et al. 2021, "Adaptive Federated Optimization": no bias correction, v_0 = tau^2.

    state = ServerState.initial(spec, size)
    model, state = step(spec, model, mean_update, state)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import RunError
from lepton_fl.plan import ServerOptimizerSpec
from lepton_fl.rounds.accumulator import BLOCK
from lepton_fl.vector import Vector

ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")
SLOTS = ("momentum", "variance")  # of the optimisers


@dataclass(frozen=True)
class ServerState:
    """What the optimiser remembers between rounds: (P,) float32 vectors by name."""

    slots: Mapping[str, Vector] = field(default_factory=dict)

    @classmethod
    def initial(cls, spec: ServerOptimizerSpec, size: int) -> "ServerState":
        """Before the first round."""
        if spec.name == "fedavg":
            return cls()
        slots = {"momentum": np.zeros(size, np.float32)}
        if spec.name in ADAPTIVE:
            slots["variance"] = np.full(size, spec.tau**2, np.float32)
        return cls(slots)


def step(
    spec: ServerOptimizerSpec, model: Vector, mean: NDArray[np.float64], state: ServerState
) -> tuple[Vector, ServerState]:
    """One server step; the arguments stay as they are.

    Args:
        spec: the optimiser and its hyper-parameters.
        model: (P,) float32, the global model of the round.
        mean: (P,) float64, the weighted mean of the devices' updates.
        state: what the last step returned; slots that are not this optimiser's are handed on.

    Returns:
        The new model and state.

    Raises:
        RunError: the new model is not finite.
    """
    new = np.empty_like(model)
    own = {name: slot for name, slot in state.slots.items() if name in SLOTS}
    slots = {name: np.empty_like(old) for name, old in own.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves float32 is refused below
        for start in range(0, len(model), BLOCK):
            part = slice(start, start + BLOCK)
            move, kept = _move(spec, mean[part], {k: v[part].astype(np.float64) for k, v in own.items()})
            new[part] = model[part] + (move if spec.learning_rate == 1 else spec.learning_rate * move)
            for name, value in kept.items():
                slots[name][part] = value
    if not np.isfinite(new).all():
        raise RunError(
            "The server step produced a model with non-finite weights; it is not kept.",
            hint=f"Lower server.learning_rate (now {spec.learning_rate}) or local.learning_rate.",
        )
    return new, ServerState({**state.slots, **slots})


Block = NDArray[np.float64]


def _move(spec: ServerOptimizerSpec, mean: Block, old: dict[str, Block]) -> tuple[Block, dict[str, Block]]:
    if spec.name == "fedavg":
        return mean, {}
    if spec.name == "fedavgm":
        momentum = spec.momentum * old["momentum"] + mean
        return momentum, {"momentum": momentum}
    momentum = spec.momentum * old["momentum"] + (1 - spec.momentum) * mean
    variance = _variance(spec, mean * mean, old["variance"])
    return momentum / (np.sqrt(variance) + spec.tau), {"momentum": momentum, "variance": variance}


def _variance(spec: ServerOptimizerSpec, square: Block, variance: Block) -> Block:
    if spec.name == "fedadagrad":
        return variance + square
    if spec.name == "fedadam":
        return spec.beta_2 * variance + (1 - spec.beta_2) * square
    return variance - (1 - spec.beta_2) * square * np.sign(variance - square)  # fedyogi
