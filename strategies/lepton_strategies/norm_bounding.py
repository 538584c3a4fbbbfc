"""The mean of updates that are all of bounded length.

The cheapest defence: a device scales its update to the bound, the coordinator refuses a longer one by name,
and nobody moves the model by more than ``clip_norm`` / n. It works with sums alone, so memory does not grow
with the cohort. It bounds an attack and does not remove it.

Sun et al. 2019, "Can You Really Backdoor Federated Learning?".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class NormBounding(LeptonStrategy):
    """Mean of updates of bounded L2 norm (Sun et al. 2019); every report counts the same."""

    @staticmethod
    def settings(
        *,
        clip_norm: float = 1.0,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``clip_norm`` is the bound, in model units: about the median norm of honest updates."""
        return {"weighting": "equal", **run, "clip_norm": clip_norm}
