"""The point with the smallest sum of distances to all updates.

For fewer than half bad devices that send whole bad updates (wrong labels, broken sensors): it keeps the
direction that most devices agree on, needs no bound on their share, and where all are honest it is close to
the mean.

Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class GeometricMedian(LeptonStrategy):
    """Geometric median by the smoothed Weiszfeld iteration (Pillutla et al. 2022)."""

    @staticmethod
    def settings(
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """No parameters of its own; ``server`` may name any server optimiser."""
        return {"weighting": "equal", **run, "aggregation": {"name": "geometric_median"}}
