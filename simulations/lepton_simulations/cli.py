"""``lepton simulate`` and ``lepton demo``. Light to import: the engine is loaded when a command runs."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import INTERRUPTED, Format, FormatOption, console, is_terminal, print_data, say

if TYPE_CHECKING:
    from lepton_simulations.api import Result
    from lepton_simulations.config import SimulationConfig
    from lepton_simulations.rows import Row

app = typer.Typer()

# The figures a task may report, as columns; the others are in the JSON output and in metrics.csv.
FIGURES = ("accuracy", "r2", "rmse", "perplexity", "loss")
WIDTH = 100  # of the table where the terminal does not say


@app.command()
def simulate(
    scenario: Annotated[
        Path, typer.Argument(help="A scenario file (TOML), or the folder of a run to resume.")
    ],
    data: Annotated[Path | None, typer.Option(help="The folder that holds the data set's file.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Train for so many rounds.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/SCENARIO.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue at the last committed round.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; 0 = none besides this one.")] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Train on virtual devices, on this machine, with the code of a real fleet."""
    config = _load(scenario, data, rounds, output, workers)
    folder = Path(config.output.folder)
    result = _run(config, format, resume=resume)
    plot = result.plot(folder / "plot.png") if result.rows else None
    if format == Format.TEXT:
        say(f"Recorded in {folder}: metrics.csv, plot.png, model.safetensors, journal.jsonl.")
    _finish(result, format, plot=plot, hint=f"`lepton simulate --resume {folder}` continues the run.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the plot is saved.")] = Path("lepton-demo"),
    workers: Annotated[int | None, typer.Option(help="Processes; 0 = none besides this one.")] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Twenty virtual devices learn to read digits, in a few seconds and without a network."""
    from lepton_simulations.demo import demo_config

    if format == Format.TEXT:
        say("20 devices hold handwritten digits, each a different mix of them. Ten train in each round;")
        say("their updates are added as exact integers, and the sum moves the global model.")
    result = _run(demo_config(workers), format)
    plot = result.plot(output / "demo.png") if result.rows else None
    if format == Format.TEXT and result.rows:
        last = result.rows[-1]
        total = sum(row.bytes_up + row.bytes_down for row in result.rows)
        say(
            f"Accuracy on held-out digits: {last.metric('accuracy') or 0:.1%} after {last.round} rounds; "
            f"{total / 1e6:.1f} MB sent, no image among them."
        )
        say(f"Plot: {plot}")
    _finish(result, format, plot=plot)


def _load(
    scenario: Path, data: Path | None, rounds: int | None, output: Path | None, workers: int | None
) -> "SimulationConfig":
    from lepton_fl.config import load
    from lepton_simulations.config import SimulationConfig

    overrides = {
        "data.folder": data,
        "run.rounds": rounds,
        "engine.workers": workers,
        "output.folder": output,
    }
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    if scenario.is_dir():
        return _recorded(scenario, texts)
    config = load(SimulationConfig, scenario, overrides=texts).value
    if config.output.folder:
        return config
    place = Path("runs") / (config.run.name or scenario.stem)
    return config.model_copy(update={"output": config.output.model_copy(update={"folder": str(place)})})


def _recorded(folder: Path, overrides: dict[str, Any]) -> "SimulationConfig":
    """The scenario of a run that is to be continued where it lies."""
    from lepton_simulations.book import read_scenario

    config = read_scenario(folder)
    body = config.to_json()
    body["output"]["folder"] = str(folder)
    for key, value in overrides.items():
        if value is not None:
            section, name = key.split(".")
            body[section][name] = value
    return type(config).model_validate_json(json.dumps(body))


def _run(config: "SimulationConfig", format: Format, *, resume: bool = False) -> "Result":
    from lepton_simulations.api import run_scenario

    with _table(format) as show, _stop_on_interrupt() as asked:
        return run_scenario(config, resume=resume, on_round=show, should_stop=lambda: bool(asked))


def _finish(result: "Result", format: Format, *, hint: str = "", plot: Path | None = None) -> None:
    from lepton_fl.errors import RunError

    if format == Format.JSON:
        rows = [{**vars(row), "traffic_bytes": row.bytes_up + row.bytes_down} for row in result.rows]
        verdict = {"outcome": result.verdict.outcome, "reason": result.verdict.reason}
        places = {"folder": result.folder, "plot": plot}
        print_data(
            {"task": result.task, **verdict, **places, "best": result.best, "rounds": rows}, format=format
        )
    if result.verdict.outcome == "failed":
        raise RunError(result.verdict.reason)
    if format == Format.TEXT:
        say(result.verdict.reason)
    if result.verdict.outcome == "stopped":
        if hint:
            say(hint)
        raise typer.Exit(INTERRUPTED)


@contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """The first Ctrl-C asks to stop after the round, the second interrupts; the list is empty until asked."""
    asked: list[bool] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("Stopping after this round; press Ctrl-C again to stop at once.")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _table(format: Format) -> Iterator[Any]:
    """A function that shows a round: in a table that grows on a terminal, line by line elsewhere."""
    if format == Format.JSON:
        yield lambda row: None
    elif is_terminal(stderr=False):
        yield from _live_table()
    else:
        yield from _plain_table()


def _live_table() -> "Iterator[Any]":
    from rich.live import Live

    rows: dict[int, Row] = {}
    with Live(console=console(), auto_refresh=False) as live:  # no thread: the workers are forked

        def show(row: "Row") -> None:
            rows[row.round] = row
            live.update(_render(list(rows.values()), live.console.height - 6), refresh=True)

        yield show
        live.update(_render(list(rows.values()), len(rows)), refresh=True)


def _plain_table() -> "Iterator[Any]":
    rows: dict[int, Row] = {}
    yield lambda row: rows.__setitem__(row.round, row)
    if rows:
        out = console()
        out.width = max(out.width, WIDTH)
        out.print(_render(list(rows.values()), len(rows)), soft_wrap=False, crop=False)


def _render(rows: "list[Row]", height: int) -> Any:  # noqa: ANN401 - rich is imported late
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    shown = [name for name in FIGURES if any(row.metric(name) is not None for row in rows)]
    names = ["round", "devices", *shown, "train loss", "MB", "seconds"]
    if any(_refused(row) for row in rows):
        names.append("not counted")
    for name in names:
        last = name == "not counted"
        table.add_column(name.replace("_", " "), justify="left" if last else "right", no_wrap=not last)
    for row in rows[-max(1, height) :]:
        cells = [str(row.round), f"{row.reports}/{row.asked}", *(_figure(row, n) for n in shown)]
        cells += [
            f"{row.train_loss:.4f}",
            f"{(row.bytes_up + row.bytes_down) / 1e6:.2f}",
            f"{row.seconds:.2f}",
        ]
        table.add_row(*cells, *([_refused(row)] if names[-1] == "not counted" else []))
    return table


def _figure(row: "Row", name: str) -> str:
    value = row.metric(name)
    if value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4f}"


def _refused(row: "Row") -> str:
    counts = {k: n for k, n in row.outcomes.items() if k not in ("accepted", "surplus")}
    return ", ".join(f"{n} {name.replace('-', ' ')}" for name, n in counts.items())
