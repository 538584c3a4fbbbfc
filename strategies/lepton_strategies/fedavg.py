"""Federated averaging: the mean of the devices' updates, weighted by their examples.

The baseline, and the right choice where devices are honest and their data alike.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class FedAvg(LeptonStrategy):
    """Federated averaging (McMahan et al. 2017)."""

    @staticmethod
    def settings(
        *,
        learning_rate: float = 1.0,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``learning_rate`` is the server's: the part of the mean update that is taken."""
        return {**run, "server": {"name": "fedavg", "learning_rate": learning_rate}}
