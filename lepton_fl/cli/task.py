"""``lepton task list|check``: which tasks are installed, and does one of them work here, on this data?"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lepton_fl.tasks import Dataset, Task
    from lepton_fl.tasks.sources import DataSourceSpec
    from lepton_fl.training.trainer import Trainer

app = typer.Typer(help="Look at the tasks that are installed.", no_args_is_help=True)

GROUP = "lepton.tasks"
TRIAL_ROWS = 64  # of the one mini-batch
KINDS = {".npz": "npz", ".csv": "csv", ".parquet": "parquet"}  # by suffix


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
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            envvar="LEPTON_DATA",
            help="A .npz, .csv or .parquet file, a folder of images, the folder of the task's published data "
            "set, or a JSON object with the keys of a data source.",
        ),
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
    if (rows := _rows(task, data)) is not None:
        report = task.check(rows)
        record |= {"rows": report.rows, "missing": report.missing, "low": report.low, "high": report.high}
        record |= {"class_counts": report.class_counts, "first_loss": _trial(trainer, rows)}
    print_data(record, format=format)


def _rows(task: "Task", data: str | None) -> "Dataset | None":
    """The raw rows to check; None if none were named and the task brings none along."""
    from lepton_fl.tasks.sources import DataSourceSpec, read_source

    if data is not None:
        return read_source(_source(data), task)
    try:
        return read_source(DataSourceSpec(kind="task"), task)
    except DataError as error:
        say(f"without data: {error} {error.hint}")
        return None


def _source(data: str) -> "DataSourceSpec":
    """What one option says of a data source."""
    from pydantic import ValidationError

    from lepton_fl.tasks.sources import DataSourceSpec

    path = Path(data).expanduser()
    kind = KINDS.get(path.suffix.lower())
    if kind is None:  # published data sets are archives
        kind = "task" if not path.is_dir() or any(path.glob("*.npz")) else "images"
    try:
        if data.lstrip().startswith("{"):
            return DataSourceSpec.model_validate_json(data)
        return DataSourceSpec.model_validate({"kind": kind, "path": path})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"--data {data!r}: {key} {first['msg']}",
            hint='for example --data \'{"kind": "npz", "path": "my.npz"}\'',
        ) from None


def _trial(trainer: "Trainer", data: "Dataset") -> float:
    """The mean loss of one mini-batch, trained on for real."""
    import numpy as np

    from lepton_fl.plan import LocalPlan

    rows = trainer.task.transform(data.take(np.arange(min(TRIAL_ROWS, len(data)))))
    plan = LocalPlan(batch_size=TRIAL_ROWS, max_steps=1)
    result = trainer.train(trainer.initial(0), rows, plan, seed=0)
    return float(result.sums["loss_sum"][0] / result.sums["examples"][0])
