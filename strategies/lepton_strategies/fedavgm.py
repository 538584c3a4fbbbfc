"""Federated averaging with momentum on the server.

For rounds whose cohorts differ much from one another: the momentum averages over rounds.

Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class FedAvgM(LeptonStrategy):
    """Federated averaging with server momentum (Hsu et al. 2019)."""

    @staticmethod
    def settings(
        *,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``learning_rate`` is the server's, ``momentum`` is beta of the paper."""
        server = {"name": "fedavgm", "learning_rate": learning_rate, "momentum": momentum}
        return {**run, "server": server}
