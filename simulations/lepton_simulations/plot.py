"""Draw runs: what was learnt against rounds, virtual time and bytes; who took part; what privacy cost.

    plot_rows(result.rows, Path("digits.png"), title="digits")
    plot_runs({"fedavg": a.rows, "fedadam": b.rows}, Path("compare.png"), metric="accuracy")

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart; lines differ
in their dashes as well. Nothing here needs a display.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.errors import ConfigError, StateError
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS
from lepton_simulations.rows import Row, Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
Rows = Sequence[Row]

INK, FAINT, GRID = "#1f2933", "#66727f", "#e4e7eb"
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW, BLACK = "#cc79a7", "#56b4e9", "#f0e442", "#000000"
GREY = "#9aa5b1"
CYCLE: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
# An outcome's colour is the same in every plot.
OUTCOMES: Final = {ACCEPTED: GREEN, SURPLUS: SKY, "offline": GREY, "late": ORANGE, "failed": VERMILLION}
OTHERS: Final = (PURPLE, YELLOW, BLUE, BLACK)
# The first of these that a task reports is its score.
SCORES: Final = (("accuracy", "accuracy"), ("r2", "R²"), ("rmse", "RMSE"))
DPI: Final = 150
BARS: Final = 120  # rounds that are drawn as bars of their own; more become an area


def plot_rows(rows: Rows, path: Path, *, title: str = "", footer: str = "") -> Path:
    """Draw the score and the losses into a PNG, PDF or SVG file.

    Args:
        rows: of one run.
        path: of the file; its suffix gives the format.
        title: above the plot.
        footer: below it: what is simulated.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    _require(rows)
    score, name = score_of(rows)
    sides = _sides([rows])
    figure = _figure(4.1 * len(sides) + 0.6, 6.2 if score else 3.7)
    grid = figure.subplots(2 if score else 1, len(sides), sharex="col", sharey="row", squeeze=False)
    for column, (label, x_of) in enumerate(sides):
        x = x_of(rows)
        if score:
            _draw_score(grid[0][column], rows, x, score, name, first=column == 0)
        _draw_losses(grid[-1][column], rows, x, first=column == 0)
        grid[-1][column].set_xlabel(label, color=INK)
    return _save(figure, path, _headline(rows, title), footer)


def plot_runs(runs: Mapping[str, Rows], path: Path, *, metric: str, footer: str = "") -> Path:
    """Draw one metric of several runs into one file.

    Args:
        runs: rows by the run's name.
        path: of the file; its suffix gives the format.
        metric: of the evaluations, or ``train_loss``.
        footer: below the plot.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    sides = _sides(list(runs.values()))
    figure = _figure(4.1 * len(sides) + 0.6, 4.4)
    grid = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for number, (name, rows) in enumerate(runs.items()):
        look = {"color": CYCLE[number % len(CYCLE)], "ls": DASHES[number % len(DASHES)], "label": name}
        for axes, (_, x_of) in zip(grid, sides, strict=True):
            if any(x := x_of(rows)):  # a run without virtual time has no place against it
                _line(axes, _points(x, [figure_of(row, metric) for row in rows]), **look)
    for axes, (label, _) in zip(grid, sides, strict=True):
        axes.set_xlabel(label, color=INK)
        _style(axes)
    _percent(grid[0], metric)
    grid[0].set_ylabel(metric.replace("_", " "), color=INK)
    grid[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    return _save(figure, path, f"{metric.replace('_', ' ')} of {len(runs)} runs", footer)


def plot_participation(
    rows: Rows, tallies: Mapping[str, Tally], path: Path, *, title: str = "", footer: str = ""
) -> Path:
    """Draw what became of the devices asked in each round, and how often each device's update counted.

    Args:
        rows: of one run.
        tallies: by device; those that were never asked are not in it.
        path: of the file; its suffix gives the format.
        title: above the plot.
        footer: below it.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    _require(rows)
    figure = _figure(11.0, 4.6)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.35, 1))[0]
    _draw_outcomes(left.subplots(), rows)
    counts = sorted((tally.accepted for tally in tallies.values()), reverse=True) or [0]
    histogram, strip = right.subplots(2, 1, height_ratios=(5, 1))
    _draw_histogram(histogram, counts)
    _draw_strip(strip, counts)
    accepted = sum(counts)
    asked = sum(tally.asked for tally in tallies.values())
    words = f"{len(tallies)} devices, asked {asked:,} times; {accepted:,} updates counted"
    return _save(figure, path, f"{title}: {words}".removeprefix(": "), footer)


def plot_privacy(rows: Rows, path: Path, *, title: str = "", footer: str = "") -> Path:
    """Draw epsilon, and the clipping bound if there is one, against rounds.

    Raises:
        ConfigError: no round has an epsilon, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    spent = [(float(row.round), row.epsilon) for row in rows if row.epsilon is not None]
    if not spent:
        raise ConfigError("There is nothing to draw: no round spent any epsilon.")
    norms = [(float(row.round), row.clip_norm) for row in rows if row.clip_norm is not None]
    figure = _figure(9.0 if norms else 5.4, 3.9)
    grid = figure.subplots(1, 2 if norms else 1, squeeze=False)[0]
    for axes, points, label, color in zip(
        grid, (spent, norms), ("ε spent", "L2 bound of an update"), (PURPLE, BLUE), strict=False
    ):
        _line(axes, points, color=color, lw=2.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Round", color=INK)
        axes.set_ylabel(label, color=INK)
        _style(axes)
    return _save(figure, path, f"{title}: ε = {spent[-1][1]:.3g}".removeprefix(": "), footer)


def plot_all(
    rows: Rows, tallies: Mapping[str, Tally], folder: Path, *, title: str = "", footer: str = ""
) -> list[Path]:
    """Draw everything there is to draw of a run.

    Raises:
        ConfigError: no round was committed.
        StateError: a file cannot be written.
    """
    words = {"title": title, "footer": footer}
    paths = [
        plot_rows(rows, folder / "learning.png", **words),
        plot_participation(rows, tallies, folder / "participation.png", **words),
    ]
    if any(row.epsilon is not None for row in rows):
        paths.append(plot_privacy(rows, folder / "privacy.png", **words))
    return paths


def plot_rollouts(
    counts: Mapping[str, Points],
    marks: Sequence[tuple[float, str]],
    devices: int,
    path: Path,
    *,
    title: str = "",
) -> Path:
    """Draw how many devices serve which release over time, and the stages of the rollouts.

    Args:
        counts: by release: (seconds, devices that serve it), at the same moments for all.
        marks: (seconds, words) of what happened.
        devices: in the fleet.
        path: of the file; its suffix gives the format.
        title: above the plot.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    times = [at for at, _ in next(iter(counts.values()), ())]
    if not times:
        raise ConfigError("There is nothing to draw: no moment was noted.")
    figure = _figure(11.0, 4.8)
    axes = figure.subplots()
    heights = [[count for _, count in points] for points in counts.values()]
    good = (BLUE, GREEN, SKY, PURPLE, ORANGE, YELLOW)
    colors = [*good[: len(heights) - 1], VERMILLION]
    axes.stackplot(times, heights, labels=list(counts), colors=colors, step="post", alpha=0.9)
    for at, words in marks:
        axes.axvline(at, color=INK, lw=0.8, ls=DASHES[2])
        look: dict[str, Any] = {"rotation": 90, "fontsize": 8, "color": INK, "va": "top", "ha": "right"}
        axes.annotate(words, (at, devices * 1.28), **look)
    axes.set_ylim(0, devices * 1.3)
    axes.set_xlim(0, max(times[-1], *(at for at, _ in marks)) if marks else times[-1])
    axes.set_xlabel("Seconds", color=INK)
    axes.set_ylabel("Devices that serve it", color=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False, fontsize=9, labelcolor=INK)
    _whole(axes)
    _style(axes)
    return _save(figure, path, title, "")


# --- what is drawn ----------------------------------------------------------------------------------


def score_of(rows: Rows) -> tuple[str, str]:
    """The name of the task's score and how it is written; two empty texts if it has none."""
    for name, title in SCORES:
        if any(row.metric(name) is not None for row in rows):
            return name, title
    return "", ""


def figure_of(row: Row, name: str) -> float | None:
    """A metric by name, or a field of the row such as ``train_loss``."""
    value = row.metric(name)
    return getattr(row, name, None) if value is None else value


def _sides(runs: Sequence[Rows]) -> list[tuple[str, Callable[[Rows], list[float]]]]:
    """What a figure is drawn against: virtual time only where time passed."""
    sides: list[tuple[str, Callable[[Rows], list[float]]]] = [
        ("Round", lambda rows: [float(row.round) for row in rows])
    ]
    longest = max((row.time_s for rows in runs for row in rows), default=0.0)
    if longest:
        unit, size = next(((u, s) for u, s in _UNITS if longest >= 2 * s), ("s", 1.0))
        sides.append((f"Virtual time ({unit})", lambda rows: [row.time_s / size for row in rows]))
    sides.append(
        (
            "Traffic of the fleet, both ways (MB)",
            lambda rows: [total / 1e6 for total in accumulate(row.traffic for row in rows)],
        )
    )
    return sides


_UNITS = (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0))


def _draw_score(axes: "Axes", rows: Rows, x: Sequence[float], name: str, title: str, *, first: bool) -> None:
    points = _points(x, [row.metric(name) for row in rows])
    _line(axes, points, color=BLUE, lw=2.4)
    if points:
        place, value = points[-1]
        text = f"{value:.1%}" if name == "accuracy" else f"{value:.3g}"
        look: dict[str, Any] = {"fontsize": 9.5, "weight": "bold", "color": BLUE, "ha": "right"}
        axes.annotate(text, (place, value), xytext=(0, -16), textcoords="offset points", **look)
    if first:
        axes.set_ylabel(f"Held-out {title}", color=INK)
        _percent(axes, name)
    _style(axes)


def _draw_losses(axes: "Axes", rows: Rows, x: Sequence[float], *, first: bool) -> None:
    _line(axes, _points(x, [row.train_loss for row in rows]), color=GREY, ls=DASHES[1], label="Training")
    _line(axes, _points(x, [row.metric("loss") for row in rows]), color=VERMILLION, label="Held-out")
    axes.set_ylim(bottom=0)
    if first:
        axes.set_ylabel("Loss", color=INK)
    if first and axes.get_lines():  # a private run tells no losses
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    _style(axes)


def _draw_outcomes(axes: "Axes", rows: Rows) -> None:
    present = {name for row in rows for name in row.outcomes}
    names = [n for n in OUTCOMES if n in present] + sorted(present - OUTCOMES.keys())
    spare = iter(OTHERS * (1 + len(names)))
    colors = [OUTCOMES.get(name) or next(spare) for name in names]
    x = [row.round for row in rows]
    heights = [[row.outcomes.get(name, 0) for row in rows] for name in names]
    labels = [name.replace("-", " ") for name in names]
    if len(rows) > BARS:
        axes.stackplot(x, heights, colors=colors, labels=labels, step="mid")
    else:
        below = [0] * len(rows)
        for label, color, height in zip(labels, colors, heights, strict=True):
            axes.bar(x, height, bottom=below, color=color, label=label, width=0.86)
            below = [a + b for a, b in zip(below, height, strict=True)]
    axes.set_xlabel("Round", color=INK)
    axes.set_ylabel("Devices asked, all attempts", color=INK)
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "borderpad": 0}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, **look)
    _whole(axes)
    _style(axes)


def _draw_histogram(axes: "Axes", counts: Sequence[int]) -> None:
    most = max(counts)
    width = max(1, -(-(most + 1) // 30))  # whole numbers to a bar, at most 30 bars
    edges = [edge - 0.5 for edge in range(0, most + width + 1, width)]
    axes.hist(counts, bins=edges, color=GREEN, rwidth=0.9)
    axes.set_ylabel("Devices", color=INK)
    axes.set_xlabel("Rounds in which a device's update counted", color=INK)
    _whole(axes)
    _style(axes)


def _draw_strip(axes: "Axes", counts: Sequence[int]) -> None:
    """Every device as one stripe, the most heard ones first: is anybody left out?"""
    axes.imshow([counts], aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    silent = sum(count == 0 for count in counts)
    words = (
        f"{silent} of {len(counts)} devices never counted" if silent else f"all {len(counts)} devices counted"
    )
    axes.set_xlabel(f"One stripe a device: {words}", color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


# --- how it looks -----------------------------------------------------------------------------------


def _require(rows: Rows) -> None:
    if not rows:
        raise ConfigError("There is nothing to draw: no round was committed.")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path, headline: str, footer: str) -> Path:
    width = figure.get_figwidth()
    lines = textwrap.wrap(headline, int(width * 10.5))
    figure.suptitle("\n".join(lines), fontsize=12.5, color=INK, x=0.012, ha="left", weight="bold")
    if footer:
        text = "\n".join(textwrap.wrap(f"Simulated: {footer}", int(width * 17)))
        figure.supxlabel(text, fontsize=7.5, color=FAINT, x=0.012, ha="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise StateError(f"Cannot write {path}: {error.strerror}.", hint="Name another file.") from error
    except ValueError as error:
        raise ConfigError(f"Cannot draw into {path}: {error}.", hint="Use .png, .pdf or .svg.") from error
    return path


def _points(x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if b is not None]


def _line(axes: "Axes", points: Points, **look: Any) -> None:  # noqa: ANN401 - as matplotlib takes it
    if not points:
        return
    look = {"lw": 1.9, **look}
    if len(points) <= 40:
        look |= {"marker": "o", "ms": look["lw"] * 2.1, "mec": "white", "mew": 0.8}
    axes.plot(*zip(*points, strict=True), **look, solid_capstyle="round", zorder=3)


def _percent(axes: "Axes", name: str) -> None:
    if name.endswith("accuracy"):
        from matplotlib.ticker import PercentFormatter

        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _whole(axes: "Axes") -> None:
    """Only whole numbers at both axes: rounds and devices."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _style(axes: "Axes") -> None:
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _headline(rows: Rows, title: str) -> str:
    seconds = sum(row.seconds for row in rows)
    return f"{title}: {len(rows)} rounds of {rows[-1].asked} devices in {seconds:.1f} s".removeprefix(": ")
