"""Federated averaging whose devices correct their own drift.

For devices whose data differ: many local steps pull each device towards its own optimum, and the average of
these is not the optimum of all. Each device, and the server, keeps an estimate of its gradient (a control
variate); their difference is added to every step. Costs twice the bytes, and devices that remember something
between rounds; pays off when devices take part again and again.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", option II.
"""

from collections.abc import Mapping
from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings
from lepton_strategies.fedavg import FedAvg


class Scaffold(LeptonStrategy):
    """Federated averaging with control variates (Karimireddy et al. 2020)."""

    @staticmethod
    def settings(
        *,
        learning_rate: float = 1.0,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``learning_rate`` is the server's; the devices' optimiser must be plain SGD."""
        local = run.pop("local", {})
        fields = local if isinstance(local, Mapping) else local.model_dump()
        fields = {**fields, "control_variates": True}
        return FedAvg.settings(**{"weighting": "equal", **run}, learning_rate=learning_rate, local=fields)
