"""Strategies and a client app for any Flower deployment, public Flower API only.

from lepton_strategies import FedAvg, client_app, initial_arrays, run_campaign
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_strategies.app import client_app
    from lepton_strategies.fedadagrad import FedAdagrad
    from lepton_strategies.fedadam import FedAdam
    from lepton_strategies.fedavg import FedAvg
    from lepton_strategies.fedavgm import FedAvgM
    from lepton_strategies.fedbuff import FedBuff
    from lepton_strategies.fedprox import FedProx
    from lepton_strategies.fedyogi import FedYogi
    from lepton_strategies.geometric_median import GeometricMedian
    from lepton_strategies.grid import GridExchange, run_campaign
    from lepton_strategies.krum import Krum, MultiKrum
    from lepton_strategies.local_grid import AppNodes, EngineNodes, LocalGrid
    from lepton_strategies.masking import secure_mod
    from lepton_strategies.median import Median
    from lepton_strategies.model import initial_arrays, to_state_dict
    from lepton_strategies.norm_bounding import NormBounding
    from lepton_strategies.personal import FedPer
    from lepton_strategies.scaffold import Scaffold
    from lepton_strategies.secure_aggregation import SecureAggregation
    from lepton_strategies.trimmed_mean import TrimmedMean

__all__ = [
    "AppNodes",
    "EngineNodes",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedPer",
    "FedProx",
    "FedYogi",
    "GeometricMedian",
    "GridExchange",
    "Krum",
    "LocalGrid",
    "Median",
    "MultiKrum",
    "NormBounding",
    "Scaffold",
    "SecureAggregation",
    "TrimmedMean",
    "client_app",
    "initial_arrays",
    "run_campaign",
    "secure_mod",
    "to_state_dict",
]

_HOMES = {
    "AppNodes": "local_grid",
    "EngineNodes": "local_grid",
    "FedPer": "personal",
    "GeometricMedian": "geometric_median",
    "GridExchange": "grid",
    "LocalGrid": "local_grid",
    "MultiKrum": "krum",
    "NormBounding": "norm_bounding",
    "SecureAggregation": "secure_aggregation",
    "TrimmedMean": "trimmed_mean",
    "client_app": "app",
    "initial_arrays": "model",
    "run_campaign": "grid",
    "secure_mod": "masking",
    "to_state_dict": "model",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    """Load a part at first use: a device that only needs the codec must not load flwr's server side."""
    if name in __all__:
        return getattr(import_module(f"lepton_strategies.{_HOMES.get(name, name.lower())}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
