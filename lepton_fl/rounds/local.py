"""The server's side of what is special about local training: SCAFFOLD's control, personal tensors.

SCAFFOLD (Karimireddy et al. 2020): c <- c + |S| / N * mean of the devices' c_i+ - c_i, if |S| of N reported.
With ``weighting = "examples"`` the mean is weighted as the model's is: c is then the mean of the c_i weighted
by examples, exactly so when all take part.
"""

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, RunError
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import Layout, Vector

CONTROL = "control"  # the slot of c, (P,) float32


def control_of(local: LocalPlan, state: ServerState, size: int) -> Vector | None:
    """The server's control; None in a run without control variates."""
    if not local.control_variates:
        return None
    control = state.slots.get(CONTROL)
    return np.zeros(size, np.float32) if control is None else control


def next_control(plan: RoundPlan, control: Vector, mean: NDArray[np.float64], reports: int) -> Vector:
    """The control after a round.

    Args:
        plan: of the round; ``plan.population`` is N.
        control: (P,) float32.
        mean: (P,) the mean of the devices' changes.
        reports: how many came, |S|.

    Raises:
        RunError: the new control is not finite.
    """
    share = min(1.0, reports / max(plan.population, reports))
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves float32 is refused below
        new: Vector = (control + share * mean).astype(np.float32)
    if not np.isfinite(new).all():
        raise RunError(
            "The round produced a control with non-finite numbers; it is not kept.",
            hint="Lower local.learning_rate.",
        )
    return new


def personal_of(local: LocalPlan, layout: Layout | None) -> NDArray[np.bool_] | None:
    """Which coordinates stay on the devices, (P,) bool; None = none.

    Raises:
        ConfigError: a pattern matches no tensor, or together they match all.
    """
    if not local.personal:
        return None
    if layout is None:
        raise ConfigError(
            "local.personal names tensors of a model whose layout is not known here.",
            hint="Give the campaign's Work a layout.",
        )
    return layout.select(local.personal)
