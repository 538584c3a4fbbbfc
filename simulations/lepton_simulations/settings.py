"""From a few words to a checked scenario: what ``simulate`` accepts.

    run_settings("digits", "fedadam", clients=20, rounds=10, cohort=5, seed=0, more={"local": {"epochs": 2}})

A strategy is a name or an object of ``lepton_strategies``; whatever else is given wins over it, key by key.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from lepton_fl.errors import ConfigError
from lepton_fl.plan import RunSpec
from lepton_fl.tasks.task import Task, resolve
from lepton_strategies.registry import STRATEGIES, settings_of


@runtime_checkable
class HasSpec(Protocol):
    """A strategy of ``lepton_strategies``."""

    @property
    def spec(self) -> RunSpec:
        """The settings of its run."""
        ...


Strategy = str | HasSpec


def names() -> tuple[str, ...]:
    """The strategies that have a name."""
    return tuple(STRATEGIES)


def run_settings(
    task: Task | str,
    strategy: Strategy,
    *,
    clients: int,
    rounds: int,
    cohort: int | Mapping[str, Any],
    seed: int,
    more: Mapping[str, Any],
) -> RunSpec:
    """The checked settings of a run.

    Args:
        task: the task or its name.
        strategy: a name (see ``names``), or an object with a ``spec``; '' = FedAvg.
        clients: how many there are; 0 = not known yet.
        rounds: of training.
        cohort: devices per round; 0 = the strategy's, else everybody. Or the fields of ``CohortSpec``.
        seed: of the initial model.
        more: further fields of ``RunSpec``; tables are merged key by key.

    Raises:
        ConfigError: the strategy is unknown, or made for another task.
        ValidationError: a setting is wrong.
    """
    name = task.name if isinstance(task, Task) else task
    given = _of_strategy(strategy, name)
    if clients and "size" not in given.get("cohort", {}):
        given = _merged(given, {"cohort": {"size": clients}})
    if cohort:
        given = _merged(given, {"cohort": cohort if isinstance(cohort, Mapping) else {"size": cohort}})
    return RunSpec.model_validate({**_merged(given, more), "task": name, "rounds": rounds, "seed": seed})


def refused(error: ValidationError) -> ConfigError:
    """The first setting that is wrong, its value and the bound; or what is wrong with several, in words."""
    first = error.errors()[0]
    where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], Mapping | list | tuple):
        return ConfigError(f"{where}: {message}." if where else f"{message}.")
    return ConfigError(f"{where} = {first['input']!r}: {message}.")


def _of_strategy(strategy: Strategy, task: str) -> dict[str, Any]:
    if isinstance(strategy, str):
        return _of_name(strategy)
    spec = strategy.spec if isinstance(strategy, HasSpec) else None
    if not isinstance(spec, RunSpec):
        raise ConfigError(
            f"{type(strategy).__name__} is not a strategy of lepton_strategies.",
            hint="Give one of these or a name; any Flower strategy runs over lepton_simulations' Grid.",
        )
    if resolve(spec.task) != resolve(task):
        raise ConfigError(
            f"The strategy was made for {spec.task}, the simulation is of {task}.",
            hint="Make the strategy for the same task.",
        )
    return explicit(spec)


def _of_name(name: str) -> dict[str, Any]:
    return settings_of(name) if name else {}


def explicit(model: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The fields that somebody has set, so that defaults do not win over what is said elsewhere."""
    if isinstance(model, Mapping):
        return dict(model)
    values = {name: getattr(model, name) for name in model.model_fields_set}
    return {k: explicit(v) if isinstance(v, BaseModel) else v for k, v in values.items()}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and ``second`` where they differ; tables key by key."""
    result = dict(first)
    for key, value in second.items():
        value = explicit(value) if isinstance(value, BaseModel) else value
        before = result.get(key)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        result[key] = _merged(before, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return result
