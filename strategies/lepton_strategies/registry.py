"""Strategies by name, for scenario files and ``simulate(strategy="fedadam")``.

settings_of("trimmed_mean", trim=0.3)   # fields of RunSpec
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, cast

from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from lepton_strategies.base import LeptonStrategy, Settings

# Name -> (module, class).
STRATEGIES: Final = {
    "fedavg": ("fedavg", "FedAvg"),
    "fedprox": ("fedprox", "FedProx"),
    "fedavgm": ("fedavgm", "FedAvgM"),
    "fedadagrad": ("fedadagrad", "FedAdagrad"),
    "fedadam": ("fedadam", "FedAdam"),
    "fedyogi": ("fedyogi", "FedYogi"),
    "median": ("median", "Median"),
    "trimmed_mean": ("trimmed_mean", "TrimmedMean"),
    "krum": ("krum", "Krum"),
    "multi_krum": ("krum", "MultiKrum"),
    "geometric_median": ("geometric_median", "GeometricMedian"),
    "scaffold": ("scaffold", "Scaffold"),
    "personal": ("personal", "FedPer"),
    "fedbuff": ("fedbuff", "FedBuff"),
    "norm_bounding": ("norm_bounding", "NormBounding"),
}


def strategy_class(name: str) -> "type[LeptonStrategy]":
    """The class of a strategy.

    Raises:
        ConfigError: there is no strategy of that name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"There is no strategy {name!r}.", hint=f"Choose one of {', '.join(STRATEGIES)}.")
    module, attribute = STRATEGIES[name]
    return cast("type[LeptonStrategy]", getattr(import_module(f"lepton_strategies.{module}"), attribute))


def settings_of(name: str, **settings: Any) -> "Settings":  # noqa: ANN401 - the strategy checks them
    """The fields of ``RunSpec`` that make a strategy.

    Raises:
        ConfigError: there is no strategy of that name, or it has no such parameter.
    """
    strategy = strategy_class(name)
    try:
        return strategy.settings(**settings)
    except TypeError as error:
        raise ConfigError(f"Strategy {name!r}: {error}.") from error
