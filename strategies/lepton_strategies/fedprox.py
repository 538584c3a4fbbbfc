"""Federated averaging with a proximal term on the device, which keeps local models near the global one.

For devices whose data differ, or that do different amounts of work: their models drift apart less.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks".
"""

from collections.abc import Mapping
from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings
from lepton_strategies.fedavg import FedAvg


class FedProx(LeptonStrategy):
    """Federated averaging with a proximal term (Li et al. 2020)."""

    @staticmethod
    def settings(
        *,
        proximal_mu: float = 0.01,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``proximal_mu`` / 2 times the squared distance to the global model is added to a device's loss."""
        local = run.pop("local", {})
        fields = local if isinstance(local, Mapping) else local.model_dump()
        return FedAvg.settings(**run, local={**fields, "proximal_mu": proximal_mu})
