"""The median of every coordinate instead of the mean.

For fleets in which fewer than half of the devices may send anything at all. Without attackers it converges
more slowly than the mean where the devices' data differ: a coordinate that few devices move stays where it
is.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class Median(LeptonStrategy):
    """Coordinate-wise median (Yin et al. 2018); every report counts the same."""

    @staticmethod
    def settings(
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """No parameters of its own; ``server`` may name any server optimiser."""
        return {"weighting": "equal", **run, "aggregation": {"name": "median"}}
