"""One of the updates, or the mean of those, that lie closest to the others.

For attackers whose updates lie apart from the honest ones: whole updates are taken or left. Krum takes a
single device's update, which is noisy where data differ; multi-Krum averages all but the worst. Both need
more than 2 f + 2 reports for f bad ones.

Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class Krum(LeptonStrategy):
    """The update that is closest to its n - f - 2 nearest others (Blanchard et al. 2017)."""

    @staticmethod
    def settings(
        *,
        malicious: float = 0.2,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``malicious`` is the share of the reports that is to be withstood."""
        return {"weighting": "equal", **run, "aggregation": {"name": "krum", "malicious": malicious}}


class MultiKrum(LeptonStrategy):
    """The mean of the n - f updates with the best scores of Krum (Blanchard et al. 2017)."""

    @staticmethod
    def settings(
        *,
        malicious: float = 0.2,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``malicious`` is the share of the reports that is to be withstood."""
        return {"weighting": "equal", **run, "aggregation": {"name": "multi_krum", "malicious": malicious}}
