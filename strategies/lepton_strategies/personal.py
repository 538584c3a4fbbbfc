"""Federated averaging of a part of the model; the rest is each device's own.

For devices whose tasks differ, not only their data: the same words mean other things, the same sensor other
classes. The named tensors, usually the last layers, are trained and kept on the device and never sent; the
others are trained together. Devices are evaluated with their own part.

Arivazhagan et al. 2019, "Federated Learning with Personalization Layers" (FedPer).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings
from lepton_strategies.fedavg import FedAvg


class FedPer(LeptonStrategy):
    """Federated averaging with personal layers (Arivazhagan et al. 2019)."""

    @staticmethod
    def settings(
        *,
        personal: Sequence[str] = ("head.*",),
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``personal`` names the tensors that stay on the device, by patterns such as ``head.*``."""
        local = run.pop("local", {})
        fields = local if isinstance(local, Mapping) else local.model_dump()
        return FedAvg.settings(**run, local={**fields, "personal": tuple(personal)})
