"""``lepton task list|check``: which tasks are installed, and does one of them work here, on this data?"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import DataError

if TYPE_CHECKING:
    from lepton_fl.tasks import Dataset, Task
    from lepton_fl.training.trainer import Trainer

app = typer.Typer(help="Look at the tasks that are installed.", no_args_is_help=True)

GROUP = "lepton.tasks"
TRIAL_ROWS = 64  # of the one mini-batch


@app.command("list")
def list_(format: FormatOption = Format.TEXT) -> None:
    """List the tasks that installed packages announce; other package.module:attribute names work as well."""
    rows = [
        {"name": entry.name, "reference": entry.value, "package": entry.dist.name if entry.dist else None}
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    ]
    print_data(rows, format=format, title="Tasks", columns=["name", "reference", "package"])


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(metavar="TASK", help="A name from the list, or package.module:attribute.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--data", envvar="LEPTON_DATA", help="Folder where the task's published data set lies."),
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Load a task, build its model, check its data against the contract and try one mini-batch."""
    import torch

    from lepton_fl.tasks import load_task, resolve
    from lepton_fl.training.trainer import Trainer

    torch.set_num_threads(1)
    task = load_task(name)
    trainer = Trainer(task)
    record: dict[str, Any] = {
        "task": task.name,
        "reference": resolve(name),
        "version": task.version,
        "coordinates": trainer.layout.size,
        "model_bytes": 4 * trainer.layout.size,
        "rows": None,
    }
    if (data := _data(task, folder)) is not None:
        report = task.check(data)
        record |= {"rows": report.rows, "missing": report.missing, "low": report.low, "high": report.high}
        record |= {"class_counts": report.class_counts, "first_loss": _trial(trainer, data)}
    print_data(record, format=format)


def _data(task: "Task", folder: Path | None) -> "Dataset | None":
    """The task's training rows; None if it has no data here and none were asked for."""
    from lepton_fl.tasks.federated import read

    try:
        return read(task, folder).train
    except DataError as error:
        if folder is not None:
            raise
        say(f"without data: {error} {error.hint}")
        return None


def _trial(trainer: "Trainer", data: "Dataset") -> float:
    """The mean loss of one mini-batch, trained on for real."""
    import numpy as np

    from lepton_fl.plan import LocalPlan

    rows = trainer.task.transform(data.take(np.arange(min(TRIAL_ROWS, len(data)))))
    plan = LocalPlan(batch_size=TRIAL_ROWS, max_steps=1)
    result = trainer.train(trainer.initial(0), rows, plan, seed=0)
    return float(result.sums["loss_sum"][0] / result.sums["examples"][0])
