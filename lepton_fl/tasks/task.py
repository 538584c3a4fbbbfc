"""What is trained: a task is Python code that a device's owner installed, called by name.

A task is named ``package.module:attribute``. Installed packages can list theirs in the entry-point group
``lepton.tasks``, which also gives them a short name. Nothing is imported but the module asked for, and
torch only once a model is made.

    task = load_task("digits")
    task = load_task("hospital.tasks:triage", allowed={"hospital.tasks:triage"})
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lepton_fl.errors import TaskError
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.contract import ContractReport, DataContract, check
from lepton_fl.tasks.data import Corpus, Dataset
from lepton_fl.tasks.metrics import Metrics

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

GROUP = "lepton.tasks"
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

# The mean loss of a batch: (outputs, targets) -> scalar.
Loss = Literal["cross_entropy", "squared_error", "huber"] | Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Task:
    """What is trained and what it is measured by.

    ``transform`` turns raw rows, once, into what the model takes: float32 or int64 inputs, int64 or float32
    targets. It sees the rows of one device only and should use constants written in the task, so that a
    row means the same everywhere. ``augment`` changes a training batch at every step. ``local`` is how a
    device trains when a run does not say it. ``students`` are smaller models for the same rows and targets,
    into which the trained one may be distilled (docs/variants.md). ``teacher`` is whose model a distillation
    task carries, frozen: what its ``answers(x)`` says, and not the targets, is what the loss is given.
    """

    name: str
    version: str
    model: Callable[[], "nn.Module"]
    contract: DataContract
    loss: Loss
    metrics: Metrics
    transform: Callable[[Dataset], Dataset] = lambda data: data
    augment: "Callable[[Tensor, np.random.Generator], Tensor] | None" = None
    data: Callable[[Path | None], Corpus] | None = None  # reads the published data set from a folder
    local: LocalPlan = field(default_factory=LocalPlan)
    students: Mapping[str, Callable[[], "nn.Module"]] = field(default_factory=dict)
    teacher: "Task | None" = None

    def check(self, raw: Dataset) -> ContractReport:
        """Check raw rows against the contract; DataContractError says what is wrong."""
        return check(self.contract, raw)

    def prepare(self, raw: Dataset) -> Dataset:
        """Check raw rows, then transform them into what the trainer takes."""
        self.check(raw)
        return self.transform(raw)


@cache
def installed_tasks() -> dict[str, str]:
    """Short name -> ``package.module:attribute`` of every task that an installed package lists.

    Reads package metadata only; no task is imported.
    """
    return {entry.name: entry.value for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def resolve(name: str) -> str:
    """The ``package.module:attribute`` behind a name, short or full. Nothing is imported.

    Raises:
        TaskError: no installed task has this short name, or the name is not of that form.
    """
    reference = installed_tasks().get(name, name)
    if _REFERENCE.fullmatch(reference):
        return reference
    close = get_close_matches(name, [*installed_tasks(), *installed_tasks().values()], n=1)
    known = ", ".join(installed_tasks()) or "none"
    raise TaskError(
        f"There is no task {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""),
        hint=f"Give package.module:attribute, or one of the installed tasks: {known}.",
    )


def load_task(name: str, *, allowed: Collection[str] | None = None) -> Task:
    """Import one task.

    Args:
        name: a short name among the installed tasks, or ``package.module:attribute``.
        allowed: the only tasks that may be imported, by either kind of name; None = any.

    Raises:
        TaskError: unknown, not allowed, or not importable; nothing but the named module was imported.
    """
    reference = resolve(name)
    if allowed is not None and reference not in {resolve(a) for a in allowed}:
        raise TaskError(
            f"The task {name!r} is not among those allowed here: {', '.join(sorted(allowed)) or 'none'}.",
            hint="The owner of this machine decides which tasks it runs; add it to the configuration.",
        )
    module_name, _, attribute = reference.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise _missing_module(reference, module_name, error) from error
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise TaskError(
            f"Importing the task {reference!r} failed: {type(error).__name__}: {error}."
        ) from error
    task = getattr(module, attribute, None)
    if isinstance(task, Task):
        return task
    raise _no_such_task(reference, vars(module), attribute)


def _missing_module(reference: str, module_name: str, error: ModuleNotFoundError) -> TaskError:
    missing = error.name or ""
    if missing and (module_name == missing or module_name.startswith(missing + ".")):
        close = get_close_matches(reference, installed_tasks().values(), n=1)
        did_you_mean = f" Did you mean {close[0]!r}?" if close else ""
        return TaskError(
            f"The task {reference!r} is not installed: there is no module {missing!r}.{did_you_mean}",
            hint="Install the package that holds the task in this Python environment.",
        )
    return TaskError(
        f"The task {reference!r} needs the module {missing!r}, which is not installed.",
        hint=f"Install {missing!r}; what the built-in tasks need comes with 'lepton-fl[train]'.",
    )


def _no_such_task(reference: str, names: dict[str, object], attribute: str) -> TaskError:
    tasks = [name for name, value in names.items() if isinstance(value, Task)]
    if attribute in names:
        return TaskError(
            f"{reference!r} is a {type(names[attribute]).__name__}, not a Task.",
            hint=f"Tasks in this module: {', '.join(tasks) or 'none'}.",
        )
    close = get_close_matches(attribute, tasks, n=1)
    did_you_mean = f" Did you mean {close[0]!r}?" if close else ""
    return TaskError(
        f"The module of {reference!r} has no {attribute!r}.{did_you_mean}",
        hint=f"Tasks in this module: {', '.join(tasks) or 'none'}.",
    )
