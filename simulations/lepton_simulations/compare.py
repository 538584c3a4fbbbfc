"""Recorded runs side by side: one table, one plot.

    runs = [read_run(Path("runs/fedavg")), read_run(Path("runs/fedadam"))]
    comparison = compare(runs, metric="accuracy")
    comparison.lines[0].rounds_to_target

Reading a run checks its journal from the first event to the commit point, and the figures of its rows against
the journal; only wall seconds are in no journal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from lepton_fl.errors import ConfigError, NotFound, StateCorrupt
from lepton_simulations.book import SIMULATED, read_json, read_rows, read_scenario
from lepton_simulations.config import SimulationConfig
from lepton_simulations.journal import EMPTY, Event, Head, checked, require
from lepton_simulations.plot import figure_of, plot_runs, score_of
from lepton_simulations.rows import Row

# Of these a higher value is better; of everything else (losses, errors) a lower one.
HIGHER = frozenset({"accuracy", "balanced_accuracy", "precision", "recall", "f1", "r2"})


@dataclass(frozen=True, eq=False)
class Run:
    """One run as its folder has it."""

    name: str
    folder: Path
    scenario: SimulationConfig
    simulated: tuple[str, ...]
    rows: list[Row]
    journal_sha256: str  # of the last event before the commit point
    weights_sha256: str  # of the model after the last committed round; '' before the first


@dataclass(frozen=True)
class Line:
    """One run in a comparison."""

    run: str
    rounds: int
    final: float | None  # the metric at the last evaluation
    best: float | None
    best_round: int | None
    rounds_to_target: int | None  # None: not reached
    time_s_to_target: float | None  # virtual seconds; None also where no time passes
    bytes_to_target: int | None  # of the whole fleet, both ways
    time_s: float  # virtual seconds, of the whole run
    seconds: float  # wall seconds, of the whole run
    epsilon: float | None
    weights_sha256: str
    journal_sha256: str


@dataclass(frozen=True)
class Comparison:
    """Several runs by one metric."""

    metric: str
    mode: str  # max or min
    target: float | None
    same_weights: bool  # all runs ended with the same bits
    same_journal: bool  # the same happened in all of them
    lines: tuple[Line, ...]


def read_run(folder: Path) -> Run:
    """Read a run, check its journal, and hold its rows against it.

    Args:
        folder: as ``lepton simulate`` has written it; the run may still be going on.

    Raises:
        NotFound: the folder holds no run.
        StateCorrupt: a file was damaged or altered.
    """
    if not (folder / "state.json").is_file():
        raise NotFound(f"{folder} holds no run with a committed round.", hint="Name a run's folder.")
    saved = read_json(folder / "state.json")
    try:
        noted, length = saved["journal"], int(saved["journal"]["bytes"])
        head, rounds = Head(noted["seq"], noted["hash"]), int(saved["state"]["round"])
        written = int(saved["metrics_bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateCorrupt(f"{folder / 'state.json'} is not a saved state ({error}).") from error
    last, told = EMPTY, Told()
    for event, now in checked(folder / "journal.jsonl", length):
        last = now
        told.hear(event)
    require(folder / "journal.jsonl", last, head)
    labels = read_json(folder / "scenario.json").get(SIMULATED, [])
    rows = [row for row in read_rows(folder, written) if row.round <= rounds]
    if [row.round for row in rows] != list(range(1, rounds + 1)):
        raise StateCorrupt(
            f"{folder / 'metrics.jsonl'} does not hold each of the {rounds} rounds once.",
            hint="Restore it from a copy.",
        )
    for row in rows:
        _hold_against(folder, row, told.figures.get(row.round, {}))
    scenario = read_scenario(folder)
    return Run(folder.name, folder, scenario, tuple(map(str, labels)), rows, last.sha256, told.weights)


@dataclass
class Told:
    """What a journal says of each round, by the names of ``Row``."""

    weights: str = ""  # after the last committed round
    figures: dict[int, dict[str, Any]] = field(default_factory=dict)
    _up: int = 0  # bytes of attempts that were abandoned since the last committed round
    _down: int = 0

    def hear(self, event: Event) -> None:
        """Take the next event; raises StateCorrupt where it does not say what it must."""
        try:
            self._take(event, event.body)
        except (KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                f"Event {event.seq} ({event.kind}) is not as a simulation writes it."
            ) from error

    def _take(self, event: Event, body: Mapping[str, Any]) -> None:
        if event.kind == "round.abandoned":
            self._up += sum(entry["bytes_up"] for entry in body["participation"])
            self._down += sum(entry["bytes_down"] for entry in body["participation"])
        elif event.kind == "round.committed":
            self.weights = body["model_sha256"]
            self.figures[body["round"]] = {
                "train_loss": body["metrics"].get("loss"),
                "epsilon": body["metrics"].get("epsilon"),
                "time_s": event.time,
                "bytes_up": self._up + body["bytes_up"],
                "bytes_down": self._down + body["bytes_down"],
                "metrics": {},
            }
            self._up = self._down = 0
        elif event.kind == "round.evaluated":
            self.figures[body["round"]]["metrics"] = body["metrics"]


def _hold_against(folder: Path, row: Row, figures: Mapping[str, Any]) -> None:
    """Refuse a row of which the journal says something else."""
    differing = [name for name, value in figures.items() if getattr(row, name) != value]
    if differing or not figures:
        raise StateCorrupt(
            f"{folder / 'metrics.jsonl'} and the journal differ in round {row.round}: "
            f"{', '.join(differing) or 'it is not in the journal'}.",
            hint="The journal is as it was written; restore metrics.jsonl from a copy.",
        )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; those whose folders have one name are told apart by the whole path."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        Run(**{**vars(run), "name": str(run.folder)}) if names.count(run.name) > 1 else run for run in runs
    ]


def compare(runs: Sequence[Run], metric: str = "", target: float | None = None) -> Comparison:
    """Hold runs against each other.

    Args:
        runs: at least one.
        metric: of the evaluations, or ``train_loss``; '' = the first run's score, else its loss.
        target: a value of it; None = the scenarios' own if they agree, else the best that all runs reach.

    Raises:
        ConfigError: no run has the metric.
    """
    metric = metric or score_of(runs[0].rows)[0] or "loss"
    if not any(figure_of(row, metric) is not None for run in runs for row in run.rows):
        known = sorted(
            {name.removeprefix("central_") for run in runs for r in run.rows for name in r.metrics}
        )
        raise ConfigError(
            f"No run has the metric {metric!r}.", hint=f"Choose one of train_loss, {', '.join(known)}."
        )
    mode = _mode(runs, metric)
    if target is None:
        target = _common_target(runs, metric, mode)
    lines = tuple(_line(run, metric, mode, target) for run in runs)
    return Comparison(
        metric,
        mode,
        target,
        len({line.weights_sha256 for line in lines}) == 1,
        len({line.journal_sha256 for line in lines}) == 1,
        lines,
    )


def draw(runs: Sequence[Run], comparison: Comparison, path: Path) -> Path:
    """Overlay the runs in one PNG, PDF or SVG file.

    Raises:
        ConfigError: the suffix is unknown.
        StateError: the file cannot be written.
    """
    shared = [label for label in runs[0].simulated if all(label in run.simulated for run in runs)]
    rows = {run.name: run.rows for run in runs}
    return plot_runs(rows, path, metric=comparison.metric, footer="; ".join(shared))


def _mode(runs: Sequence[Run], metric: str) -> str:
    for run in runs:
        if run.scenario.run.early_stop.metric == metric:
            return run.scenario.run.early_stop.mode
    return "max" if metric.removeprefix("central_") in HIGHER else "min"


def _common_target(runs: Sequence[Run], metric: str, mode: str) -> float | None:
    watches = [run.scenario.run.early_stop for run in runs]
    targets = {watch.target for watch in watches if watch.metric == metric}
    if len(targets) == 1 and len(runs) == sum(watch.metric == metric for watch in watches):
        (target,) = targets
        if target is not None:
            return target
    bests = [_best(run, metric, mode) for run in runs]
    values = [best[0] for best in bests if best]
    return (min(values) if mode == "max" else max(values)) if len(values) == len(runs) else None


def _best(run: Run, metric: str, mode: str) -> tuple[float, int] | None:
    values = [(value, row.round) for row in run.rows if (value := figure_of(row, metric)) is not None]
    if not values:
        return None
    sign = 1.0 if mode == "max" else -1.0
    return max(values, key=lambda pair: (sign * pair[0], -pair[1]))


def _line(run: Run, metric: str, mode: str, target: float | None) -> Line:
    values = [value for row in run.rows if (value := figure_of(row, metric)) is not None]
    best = _best(run, metric, mode)
    there = _first_at(run.rows, metric, mode, target)
    reached = run.rows[there] if there is not None else None
    last = run.rows[-1] if run.rows else None
    return Line(
        run=run.name,
        rounds=last.round if last else 0,
        final=values[-1] if values else None,
        best=best[0] if best else None,
        best_round=best[1] if best else None,
        rounds_to_target=reached.round if reached else None,
        time_s_to_target=reached.time_s if reached and reached.time_s else None,
        bytes_to_target=None if there is None else sum(row.traffic for row in run.rows[: there + 1]),
        time_s=last.time_s if last else 0.0,
        seconds=sum(row.seconds for row in run.rows),
        epsilon=last.epsilon if last else None,
        weights_sha256=run.weights_sha256,
        journal_sha256=run.journal_sha256,
    )


def _first_at(rows: Sequence[Row], metric: str, mode: str, target: float | None) -> int | None:
    if target is None:
        return None
    sign = 1.0 if mode == "max" else -1.0
    for place, row in enumerate(rows):
        value = figure_of(row, metric)
        if sign * (-sign * inf if value is None else value) >= sign * target:
            return place
    return None
