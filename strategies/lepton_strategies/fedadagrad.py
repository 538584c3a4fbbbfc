"""Adagrad on the server: a step size per coordinate that only shrinks.

For sparse problems, where some coordinates are seldom moved.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class FedAdagrad(LeptonStrategy):
    """Adagrad on the server (Reddi et al. 2021)."""

    @staticmethod
    def settings(
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        tau: float = 1e-3,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``learning_rate`` is the server's, ``momentum`` is beta_1 of the paper, ``tau`` its adaptivity."""
        server = {"name": "fedadagrad", "learning_rate": learning_rate, "momentum": momentum, "tau": tau}
        return {**run, "server": server}
