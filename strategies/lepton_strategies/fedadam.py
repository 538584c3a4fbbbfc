"""Adam on the server, without bias correction: a step size per coordinate, from a running mean of squares.

For models whose coordinates move at different scales (text, mixtures of layers); the devices' learning rate
needs less tuning.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
"""

from typing import Any

from lepton_strategies.base import LeptonStrategy, Settings


class FedAdam(LeptonStrategy):
    """Adam on the server, without bias correction (Reddi et al. 2021)."""

    @staticmethod
    def settings(
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> Settings:
        """``learning_rate`` is the server's, ``momentum`` is beta_1 of the paper, ``tau`` its adaptivity."""
        moments = {"momentum": momentum, "beta_2": beta_2}
        return {**run, "server": {"name": "fedadam", "learning_rate": learning_rate, "tau": tau, **moments}}
