"""What is special about one device's training: a personal part, and SCAFFOLD's control.

Personal heads (FedPer, Arivazhagan et al. 2019, "Federated Learning with Personalization Layers"): the
coordinates that a pattern names stay on the device. They are neither taken from the global model, but for the
first time, nor sent: the update holds zeros there.

SCAFFOLD (Karimireddy et al. 2020, "Stochastic Controlled Averaging for Federated Learning", option II): each
step goes along g_i(y) + c - c_i, and the mean gradient of the device becomes its new control,

    c_i+ = c_i - c + (x - y) / (K * rate)    after K steps from x to y.

What is sent is [y - x | c_i+ - c_i], both on the grid of the plan; what the device adds to its control is
exactly what was sent, after clipping and truncation, so that the server's control stays the mean of theirs.
Both control parts are zero on coordinates that are not trained or are personal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.training.memory import CONTROL, PERSONAL, remembered
from lepton_fl.vector import Layout, Vector


def control_moves(
    deltas: Vector,
    control: Vector,
    steps: NDArray[np.int64],
    learning_rate: float,
    personal: NDArray[np.bool_] | None,
) -> Vector:
    """How devices' controls change: c_i+ - c_i.

    Args:
        deltas: (K, P) float32, y - x of each device.
        control: (P',) float32, c of the server, over the trained coordinates, which come first.
        steps: (K,) mini-batches of each.
        learning_rate: of the devices.
        personal: (P,) which coordinates stay on the device; None = none.

    Returns:
        (K, P) float32.
    """
    trained = len(control)
    moves = np.zeros_like(deltas)
    scale = (1 / (steps * learning_rate)).astype(np.float32)
    np.multiply(deltas[:, :trained], -scale[:, None], out=moves[:, :trained])
    moves[:, :trained] -= control
    if personal is not None:
        moves[:, personal] = 0
    return moves


@dataclass(frozen=True)
class LocalState:
    """What one device brings to one training, or evaluation, besides its data."""

    start: Vector  # (P,) the global model, with the device's personal part
    moving: int  # its first coordinates, that are not frozen (P - F)
    personal: NDArray[np.bool_] | None = None  # (P,)
    control: Vector | None = None  # (P',) c of the server
    own: Vector | None = None  # (P,) c_i

    @classmethod
    def of(
        cls,
        local: LocalPlan,
        layout: Layout,
        num_trained: int,
        model: Vector,
        auxiliary: Vector | None,
        held: Mapping[str, Vector],
    ) -> Self:
        """Combine what was sent with what is remembered.

        Args:
            local: how to train.
            layout: of the model.
            num_trained: its first coordinates, that are trained (P').
            model: (P,) the global one.
            auxiliary: (P,) c of the server; None in an evaluation.
            held: what the device remembers of the run.

        Raises:
            ConfigError: a pattern matches no tensor, or together they match all.
            StateCorrupt: the device's memory does not fit the model.
        """
        personal, start = layout.select(local.personal) if local.personal else None, model
        if personal is not None:
            head = remembered(held, PERSONAL, int(personal.sum()))
            if head is not None:
                start = model.copy()
                start[personal] = head
        if not local.control_variates or auxiliary is None:
            return cls(start, layout.moving, personal)
        own = remembered(held, CONTROL, layout.size)
        own = np.zeros(layout.size, np.float32) if own is None else own
        return cls(start, layout.moving, personal, auxiliary[:num_trained], own)

    @property
    def correction(self) -> Vector | None:
        """(P',) c - c_i, to be added to every gradient."""
        if self.control is None or self.own is None:
            return None
        shift: Vector = self.control - self.own[: len(self.control)]
        return shift

    def outgoing(self, delta: Vector, steps: int, learning_rate: float) -> Vector:
        """What is to be sent of a training: (P - F,) or (P + P,) float32.

        Args:
            delta: (P,) trained minus start; stays as it is.
            steps: mini-batches.
            learning_rate: of the training.
        """
        shared = delta
        if self.personal is not None:
            shared = np.where(self.personal, np.float32(0), delta)
        if self.control is None:
            return shared[: self.moving]
        counts = np.array([steps], np.int64)
        moves = control_moves(delta[None, :], self.control, counts, learning_rate, self.personal)
        return np.concatenate([shared, moves[0]])

    def leaves(self, delta: Vector, update: NDArray[np.int32], grid_step: float) -> dict[str, Vector]:
        """What the device is to remember once this training has counted.

        Args:
            delta: (P,) trained minus start.
            update: what is sent, in grid steps.
            grid_step: the size of one.

        Raises:
            UpdateRejected: NON_FINITE, the personal part; it is not sent, so nobody else would notice.
        """
        left: dict[str, Vector] = {}
        if self.personal is not None:
            left[PERSONAL] = (self.start + delta)[self.personal]
            if not np.isfinite(left[PERSONAL]).all():
                raise UpdateRejected(
                    Rejection.NON_FINITE,
                    "The personal part of the model is not finite after training.",
                    hint="Training diverged; lower the learning rate or look at the data of this device.",
                )
        if self.own is not None:
            left[CONTROL] = (self.own + update[len(delta) :] * grid_step).astype(np.float32)
        return left
