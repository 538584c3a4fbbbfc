"""The mean of every coordinate without its largest and smallest values.

For a known bound on the share of bad devices: nearer to the mean than the median is, as robust up to that
share.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class TrimmedMean(LeptonStrategy):
    """Coordinate-wise trimmed mean (Yin et al. 2018); every report counts the same."""

    @staticmethod
    def settings(
        *,
        trim: float = 0.2,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``trim`` is the share cut off at either end: no smaller than the share of bad devices."""
        return {"weighting": "equal", **run, "aggregation": {"name": "trimmed_mean", "trim": trim}}
