"""Strategies and a client app for any Flower deployment, public Flower API only.

from lepton_strategies import FedAvg, client_app, initial_arrays, run_campaign
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_strategies.app import client_app
    from lepton_strategies.grid import GridExchange, run_campaign
    from lepton_strategies.model import initial_arrays, to_state_dict
    from lepton_strategies.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

__all__ = [
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "GridExchange",
    "client_app",
    "initial_arrays",
    "run_campaign",
    "to_state_dict",
]

_HOMES = {
    "client_app": "app",
    "GridExchange": "grid",
    "run_campaign": "grid",
    "initial_arrays": "model",
    "to_state_dict": "model",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    """Load a part at first use: a device that only needs the codec must not load flwr's server side."""
    if name in __all__:
        return getattr(import_module(f"lepton_strategies.{_HOMES.get(name, 'strategies')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
