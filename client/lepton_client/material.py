"""The owner's data, read, checked and made ready for a task. Imports numpy: never import it while idle."""

import json
from dataclasses import dataclass

from pydantic import ValidationError

from lepton_client.config import TaskSection
from lepton_client.fingerprint import fingerprint
from lepton_fl.errors import ConfigError
from lepton_fl.tasks import Dataset, Task, load_task, resolve
from lepton_fl.tasks.sources import DataSourceSpec, open_source


@dataclass(frozen=True, eq=False)
class Material:
    """What one task trains on and is evaluated with; prepared rows."""

    train: Dataset
    evaluate: Dataset  # may be empty
    fingerprint: tuple[object, ...]  # of the files it was read from


def name_of(section: TaskSection) -> str:
    """``package.module:attribute`` of a section's task; raises TaskError."""
    return resolve(section.reference)


def load_section_task(section: TaskSection) -> Task:
    """The section's task, imported; raises TaskError."""
    return load_task(section.reference, allowed={section.reference})


def load_material(task: Task, section: TaskSection) -> Material:
    """Read, check, split and prepare the section's data.

    Raises:
        ConfigError: the data source is described wrongly.
        DataError: it cannot be read.
        DataContractError: the rows break the task's contract.
    """
    seen = fingerprint(section)  # before reading: a change in between is noticed later
    data = open_source(source_of(section), task)
    return Material(data.train, data.held_out, seen)


def source_of(section: TaskSection) -> DataSourceSpec:
    """The section's data source; without one, the task's published data.

    Raises:
        ConfigError: a key is unknown or a value is not accepted.
    """
    try:
        return DataSourceSpec.model_validate_json(json.dumps(section.data or {"kind": "task"}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"The data source of the task {section.reference} is not usable: {where}: {first['msg']}.",
            hint=f"It takes {', '.join(DataSourceSpec.model_fields)}.",
        ) from None
