"""Buffered asynchronous averaging: the server steps whenever so many updates have come, whoever sent them.

For fleets with stragglers: nobody waits for the slowest device of a cohort. An update that was trained from
an older model counts less. It runs where answers come one by one (``run_campaign``, a simulation); Flower's
own loop waits for all replies of a round and cannot run it.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff).
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings
from lepton_strategies.fedavg import FedAvg


class FedBuff(LeptonStrategy):
    """Buffered asynchronous averaging (Nguyen et al. 2022)."""

    @staticmethod
    def settings(
        *,
        size: int = 10,
        concurrency: int = 20,
        staleness: float = 0.5,
        learning_rate: float = 1.0,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``size`` updates make a step, ``concurrency`` devices work at a time; see ``BufferSpec``."""
        buffer = {"size": size, "concurrency": concurrency, "staleness": staleness}
        given = {"weighting": "equal", **run, "mode": "buffered", "buffer": buffer}
        return FedAvg.settings(**given, learning_rate=learning_rate)
