"""``lepton simulate``, ``lepton compare``, ``lepton demo``. Light: the engine is loaded when it is needed."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import INTERRUPTED, Format, FormatOption, console, is_terminal, print_data, say

if TYPE_CHECKING:
    from lepton_simulations.api import Result
    from lepton_simulations.compare import Comparison
    from lepton_simulations.config import SimulationConfig
    from lepton_simulations.rows import Row

app = typer.Typer()

# The figures a task may report, as columns; the others are in the JSON output and in metrics.csv.
FIGURES = ("accuracy", "r2", "rmse", "perplexity", "loss")
Shown = Callable[[Mapping[str, Any]], None]
REDRAW_S = 0.1  # a bar moves not more often than this
MARGIN = 9  # lines of a terminal that are not rows of the table
TABLE = (  # of a comparison
    *("run", "rounds", "final", "best", "best_round"),
    *("rounds_to_target", "time_s_to_target", "MB_to_target", "seconds", "weights", "journal"),
)


@app.command()
def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario file (TOML), or the folder of a run to resume.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds the data set's file.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Train for so many rounds.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/SCENARIO.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue at the last committed round.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; 0 = none besides this one.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, lean, vectorised, compiled, fused or native; see engine.tier.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the model, the split, cohorts and faults.")] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="A journal: its devices, times and outcomes again; SCENARIO may be left out."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key: run.local.epochs=2. May be repeated."),
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Train on virtual devices, on this machine, with the code of a real fleet.

    Ctrl-C stops after the client step in hand, and --resume goes on to the same bits.
    """
    seeds = dict.fromkeys(("run.seed", "data.seed", "engine.seed"), seed)
    options: dict[str, Any] = {
        "data.folder": data,
        "run.rounds": rounds,
        "engine.workers": workers,
        "output.folder": output,
    }
    options |= {"engine.workers": workers, "engine.tier": engine, "replay.file": replay}
    config = _load(scenario, replay, {**options, **seeds, **_settings(set_ or [])})
    folder = Path(config.output.folder)
    result = _run(config, format, resume=resume)
    if format == Format.TEXT:
        _say_what(result)
        plots = ", plots/" if config.output.plots and result.rows else ""
        say(f"Recorded in {folder}: metrics.csv, model.safetensors, journal.jsonl{plots}.")
    _finish(result, format, hint=f"`lepton simulate --resume {folder}` continues the run.")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of recorded runs.")],
    metric: Annotated[str, typer.Option(help="Of the evaluations, or train_loss; default: the score.")] = "",
    target: Annotated[
        float | None, typer.Option(help="Default: the scenarios' own, or what all runs reach.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The plot: .png, .pdf or .svg.")] = Path("compare.png"),
    format: FormatOption = Format.TEXT,
) -> None:
    """Hold recorded runs against each other, in one table and one plot. Their journals are checked."""
    from lepton_simulations import compare as comparing

    found = comparing.read_runs(runs)
    comparison = comparing.compare(found, metric, target)
    plot = comparing.draw(found, comparison, output)
    if format == Format.JSON:
        print_data({**vars(comparison), "plot": plot}, format=format)
    else:
        _print_comparison(comparison, plot)


demo_app = typer.Typer(invoke_without_command=True)
app.add_typer(demo_app, name="demo")


@demo_app.callback()
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Where the plot is saved.")] = Path("lepton-demo"),
    workers: Annotated[int | None, typer.Option(help="Processes; 0 = none besides this one.")] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Twenty virtual devices learn to read digits, in a few seconds and without a network."""
    if context.invoked_subcommand is not None:
        return
    from lepton_simulations.demo import demo_config

    if format == Format.TEXT:
        say("20 devices hold handwritten digits, each a different mix of them. Ten train in each round;")
        say("their updates are added as exact integers, and the sum moves the global model.")
    result = _run(demo_config(workers), format)
    plot = result.plot(output / "demo.png") if result.rows else None
    if format == Format.TEXT and result.rows:
        last = result.rows[-1]
        total = sum(row.traffic for row in result.rows)
        say(
            f"Accuracy on held-out digits: {last.metric('accuracy') or 0:.1%} after {last.round} rounds; "
            f"{total / 1e6:.1f} MB sent, no image among them."
        )
        _say_what(result)
        say(f"Plot: {plot}")
    _finish(result, format, plot=plot)


@demo_app.command("delivery")
def demo_delivery(
    task: Annotated[
        str, typer.Option(help="digits (comes with the package), mnist_by_writer or fashion_mnist.")
    ] = "digits",
    data: Annotated[
        Path | None, typer.Option(envvar="LEPTON_DATA", help="Folder of the task's published data.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A trained run's folder (`lepton simulate`); default: train one.")
    ] = None,
    devices: Annotated[int, typer.Option(min=6, max=200, help="Two processes each.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="What stays; default: lepton-demo/delivery-TASK.")
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Variants of a model reach a fleet of real processes in stages, and a bad one is taken back.

    Train, compress, gate, sign, roll out to devices of three profiles, catch a planted bad variant, and ask
    every device what it serves. Exit code 8 if one serves anything but the right file. A few minutes.
    """
    from lepton_simulations.demo_delivery import Wanted, tell

    place = output or Path("lepton-demo") / f"delivery-{task.rpartition(':')[2]}"
    with _story(format) as (say_, step, show):
        story = tell(
            Wanted(task, data, run, devices, place), lambda config: _train(config, format), say_, step, show
        )
    if format == Format.JSON:
        print_data(story, format=format)
        return
    rows = [asdict(row) | {"sha256": row.sha256[:12]} for row in story.devices]
    columns = ["device", "profile", "variant", "sha256", "serving", "accuracy"]
    print_data(rows, title="What every device serves", columns=columns)
    sizes = ", ".join(f"{kind} {size:.0f} MB" for kind, size in story.memory.items())
    say(
        f"{story.requests} predictions all the while, {len(story.failed)} failed. The bad variant reached "
        f"{story.reached_by_bad} of {len(story.devices)} devices. Memory (median): {sizes}."
    )
    say(f"{story.seconds:.0f} s. Plot: {story.plot}, everything else: {place / 'report.json'}")


# --- the scenario -----------------------------------------------------------------------------------


def _settings(pairs: list[str]) -> dict[str, str]:
    from lepton_fl.errors import ConfigError

    found = dict[str, str]()
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair}: expected KEY=VALUE.", hint="For example --set run.rounds=20.")
        found[key.strip()] = value.strip()
    return found


def _load(scenario: Path | None, replay: Path | None, overrides: dict[str, Any]) -> "SimulationConfig":
    from lepton_fl.config import load
    from lepton_fl.errors import ConfigError
    from lepton_simulations.config import SimulationConfig

    texts = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    if scenario is None:
        if replay is None:
            hint = "usage is: lepton simulate SCENARIO, or lepton simulate --replay FILE"
            raise ConfigError("There is nothing to simulate.", hint=hint)
        from lepton_simulations.replaying import scenario_of

        config = _changed(scenario_of(replay), texts)
    elif scenario.is_dir():
        return _changed(_recorded(scenario), texts)
    else:
        config = load(SimulationConfig, scenario, overrides=texts).value
    if config.output.folder:
        return config
    name = config.run.name or (f"{replay.stem}-replay" if replay else scenario.stem if scenario else "")
    place = Path("runs") / name
    return config.model_copy(update={"output": config.output.model_copy(update={"folder": str(place)})})


def _recorded(folder: Path) -> "SimulationConfig":
    """The scenario of a run that is to be continued where it lies."""
    from lepton_simulations.book import read_scenario

    config = read_scenario(folder)
    return config.model_copy(update={"output": config.output.model_copy(update={"folder": str(folder)})})


def _changed(config: "SimulationConfig", overrides: dict[str, Any]) -> "SimulationConfig":
    """A configuration with what the command line says, checked anew."""
    from lepton_fl.config import load

    sections = config.to_json()
    before = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    given = {key: value for key, value in overrides.items() if value is not None}
    return load(type(config), None, overrides={**before, **given}).value


def _run(config: "SimulationConfig", format: Format, *, resume: bool = False) -> "Result":
    from lepton_simulations.api import run_scenario

    with _screen(config, format) as screen, _stop_on_interrupt() as asked:
        return run_scenario(
            config,
            resume=resume,
            on_round=screen.show,
            on_progress=screen.move,
            should_stop=lambda: bool(asked),
        )


def _train(config: "SimulationConfig", format: Format) -> None:
    """One run into its folder; raises unless it ends well."""
    _finish(_run(config, Format.JSON if format == Format.JSON else format), Format.TEXT)


@contextmanager
def _story(format: Format) -> Iterator[tuple[Callable[[str], None], Callable[[str], None], Shown]]:
    """How a demonstration is told: sentences, what is made just now, and the rollout in hand."""
    quiet = format == Format.JSON
    seen: list[str] = []

    def say_(text: str) -> None:
        if not quiet:
            say(text)

    def step(text: str) -> None:
        if is_terminal() and not quiet:
            say(f"  {text}")

    def show(found: Mapping[str, Any]) -> None:
        told = ", ".join(f"{row['stage']}: {row['told']} of {row['devices']}" for row in found["stages"])
        served = ", ".join(f"{name} on {count}" for name, count in sorted(found["served"].items()))
        line = f"  {found['phase']}; told: {told}; in service: {served or 'nothing'}"
        if line not in seen[-1:]:
            seen.append(line)
            say_(line)

    yield say_, step, show


# --- the end ----------------------------------------------------------------------------------------


def _say_what(result: "Result") -> None:
    say(f"Simulated: {'; '.join(result.simulated)}.")
    if result.engine_note:
        say(result.engine_note)
    say(f"Weights {result.weights_sha256[:16]}, journal {result.journal_sha256[:16]} (SHA-256).")


def _finish(result: "Result", format: Format, *, hint: str = "", plot: Path | None = None) -> None:
    from lepton_fl.errors import BudgetRefused, RunError, StateError

    if format == Format.JSON:
        rows = [{**vars(row), "traffic_bytes": row.traffic} for row in result.rows]
        verdict = {"outcome": result.verdict.outcome, "reason": result.verdict.reason}
        hashes = {"weights_sha256": result.weights_sha256, "journal_sha256": result.journal_sha256}
        words = {"simulated": result.simulated, "engine_note": result.engine_note}
        coverage = {"coverage": result.coverage.to_json(), "flags": result.flags}
        places = {"folder": result.folder, "plot": plot, **words, **coverage}
        body = {"task": result.task, **verdict, **places, **hashes, "best": result.best, "rounds": rows}
        print_data(body, format=format)
    if isinstance(result.verdict.error, StateError):  # the disk is full, and the like
        raise result.verdict.error
    if result.verdict.outcome == "failed":
        raise RunError(result.verdict.reason)
    if result.verdict.outcome == "exhausted":
        raise BudgetRefused(result.verdict.reason)
    if format == Format.TEXT:
        say(f"{result.verdict.reason} {result.coverage.sentence()}.")
        _say_who(result)
    if result.verdict.outcome == "stopped":
        if hint:
            say(hint)
        raise typer.Exit(INTERRUPTED)


def _say_who(result: "Result") -> None:
    """Shares of classes and of tenths of speed, where they differ; then what is below the floor."""
    found = result.coverage
    if found.groups:
        say("By class: " + ", ".join(f"{name} {share}" for name, share in found.groups.items()) + ".")
    if len({share.value for share in found.deciles}) > 1:
        say("By tenths, the fastest first: " + ", ".join(map(str, found.deciles)) + ".")
    for flag in result.flags:
        say(f"FLAGGED: {flag}")


def _print_comparison(comparison: "Comparison", plot: Path) -> None:
    lines = [
        {
            **vars(line),
            "MB_to_target": None if line.bytes_to_target is None else line.bytes_to_target / 1e6,
            "weights": line.weights_sha256[:8],
            "journal": line.journal_sha256[:8],
        }
        for line in comparison.lines
    ]
    shown = [key for key in TABLE if any(line.get(key) not in (None, "", 0.0) for line in lines)]
    target = "" if comparison.target is None else f", target {comparison.target:.4g}"
    best = "highest" if comparison.mode == "max" else "lowest"
    print_data(lines, title=f"{comparison.metric} (best = {best}{target})", columns=shown)
    if len(lines) > 1:
        weights = "the same weights" if comparison.same_weights else "different weights"
        journal = "the same journal" if comparison.same_journal else "different journals"
        say(f"The runs have {weights} and {journal}, bit for bit.")
    say(f"Plot: {plot}")


@contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """The first Ctrl-C asks to stop after the client step, the second interrupts; empty until asked."""
    asked: list[bool] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("Stopping after this client step; press Ctrl-C again to stop at once.")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# --- while it runs ----------------------------------------------------------------------------------


@dataclass
class Screen:
    """What is shown while a run goes on; this one shows nothing."""

    rounds: int = 0  # that the run may take

    def show(self, row: "Row") -> None:
        """A round was committed, or evaluated."""

    def move(self, done: int, total: int) -> None:
        """So many devices of the round have been dealt with."""


@contextmanager
def _screen(config: "SimulationConfig", format: Format) -> Iterator[Screen]:
    """A table that grows and two bars on a terminal, a line for each round elsewhere, nothing for JSON."""
    rounds = config.run.rounds
    if format == Format.JSON:
        yield Screen(rounds)
    elif is_terminal(stderr=False):
        yield from _live(rounds)
    else:
        lines = Lines(rounds)
        yield lines
        lines.flush()


@dataclass
class Lines(Screen):
    """One plain line for each round, as soon as it is known to be whole."""

    _last: "Row | None" = None

    def show(self, row: "Row") -> None:
        """Print the round before, if this is another one."""
        if self._last and self._last.round != row.round:
            self.flush()
        self._last = row

    def flush(self) -> None:
        """Print what is held back."""
        if self._last:
            print_data(_sentence(self._last, self.rounds))
        self._last = None


def _sentence(row: "Row", rounds: int) -> str:
    digits = len(str(rounds))
    parts = [f"round {row.round:>{digits}}/{rounds}", f"devices {row.reports}/{row.asked}"]
    parts += [f"{name} {_figure(row, name)}" for name in FIGURES if row.metric(name) is not None]
    if row.train_loss is not None:
        parts.append(f"train loss {row.train_loss:.4f}")
    parts.append(f"{row.traffic / 1e6:.2f} MB")
    if row.time_s:
        parts.append(f"at {_duration(row.time_s)}")
    if row.epsilon is not None:
        parts.append(f"epsilon {row.epsilon:.3g}")
    parts.append(f"{row.seconds:.2f} s")
    if refused := _refused(row):
        parts.append(f"not counted: {refused}")
    return "  ".join(parts)


@dataclass
class Table(Screen):
    """A table that grows, and bars below it, drawn by ``draw``."""

    draw: Callable[[Any], None] = lambda what: None
    height: int = 24  # lines of the terminal
    rows: "dict[int, Row]" = field(default_factory=dict)
    _bars: tuple[Any, ...] = ()  # rich.progress.Progress, never started: that would start a thread
    _drawn: float = 0.0

    def show(self, row: "Row") -> None:
        """Add a row, or replace the last one."""
        self.rows[row.round] = row
        self._redraw(row.round, row.reports, row.asked)

    def move(self, done: int, total: int) -> None:
        """Move the bar of the devices."""
        from time import monotonic

        if monotonic() - self._drawn >= REDRAW_S:
            self._redraw(max(self.rows, default=0), done, total)

    def _redraw(self, rounds: int, done: int, total: int) -> None:
        from time import monotonic

        from rich.console import Group

        self._bars = self._bars or (_make_bar("rounds", timed=True), _make_bar("devices"))
        self._bars[0].update(0, completed=rounds, total=self.rounds)
        self._bars[1].update(0, completed=done, total=total)
        table = _render(list(self.rows.values()), self.height - MARGIN)
        self.draw(Group(table, *(bar.get_renderable() for bar in self._bars)))
        self._drawn = monotonic()


def _live(rounds: int) -> Iterator[Screen]:
    from rich.live import Live

    with Live(console=console(), auto_refresh=False) as live:  # no thread: the workers are forked
        table = Table(rounds, lambda what: live.update(what, refresh=True), live.console.height)
        yield table
        if table.rows:  # what stays on the screen is the whole table
            live.update(_render(list(table.rows.values()), len(table.rows)), refresh=True)


def _make_bar(name: str, *, timed: bool = False) -> Any:  # noqa: ANN401 - rich is imported late
    from rich import progress

    columns = [progress.TextColumn(f"{name:>8}"), progress.BarColumn(40), progress.MofNCompleteColumn()]
    times = [progress.TimeElapsedColumn(), progress.TimeRemainingColumn()] if timed else []
    bar = progress.Progress(*columns, *times, auto_refresh=False)
    bar.add_task(name, total=None)
    return bar


def _render(rows: "list[Row]", height: int) -> Any:  # noqa: ANN401 - rich is imported late
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    columns = _columns(rows)
    for name, _ in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    refusing = any(_refused(row) for row in rows)
    if refusing:
        table.add_column("not counted", overflow="fold")
    for row in rows[-max(1, height) :]:
        table.add_row(*(text(row) for _, text in columns), *([_refused(row)] if refusing else []))
    return table


def _columns(rows: "list[Row]") -> "list[tuple[str, Callable[[Row], str]]]":
    def figure(name: str) -> "tuple[str, Callable[[Row], str]]":
        return name, lambda row: _figure(row, name)

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("round", lambda row: str(row.round)),
        ("devices", lambda row: f"{row.reports}/{row.asked}"),
        *(figure(name) for name in FIGURES if any(row.metric(name) is not None for row in rows)),
        ("train loss", lambda row: "" if row.train_loss is None else f"{row.train_loss:.4f}"),
        ("MB", lambda row: f"{row.traffic / 1e6:.2f}"),
        ("seconds", lambda row: f"{row.seconds:.2f}"),
    ]
    if any(row.time_s for row in rows):
        columns.insert(-1, ("virtual", lambda row: _duration(row.time_s)))
    if any(row.epsilon is not None for row in rows):
        columns.insert(-1, ("epsilon", lambda row: "" if row.epsilon is None else f"{row.epsilon:.3g}"))
    return columns


def _duration(seconds: float) -> str:
    """Virtual time, in the largest unit of which it has two."""
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _figure(row: "Row", name: str) -> str:
    value = row.metric(name)
    if value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4f}"


def _refused(row: "Row") -> str:
    counts = {k: n for k, n in row.outcomes.items() if k not in ("accepted", "surplus")}
    return ", ".join(f"{n} {name.replace('-', ' ')}" for name, n in counts.items())
