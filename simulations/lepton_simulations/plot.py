"""Draw a run: what was learnt, against rounds and against bytes sent."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_fl.errors import ConfigError, StateError
from lepton_simulations.book import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SCORE, HELD_OUT, TRAINING = "#0b7285", "#e8590c", "#adb5bd"
# The first of these that a task reports is its score.
SCORES = (("accuracy", "accuracy"), ("r2", "R²"), ("rmse", "RMSE"))


def plot_rows(rows: Sequence[Row], path: Path, *, title: str = "") -> Path:
    """Draw the score and the losses into a PNG, PDF or SVG file.

    Args:
        rows: of one run.
        path: of the file; its suffix gives the format.
        title: above the plot.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    if not rows:
        raise ConfigError("There is nothing to draw: no round was committed.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10.5, 4.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    rounds = [float(row.round) for row in rows]
    _draw(by_round, rows, rounds, "Round")
    _draw(by_bytes, rows, _cumulative_megabytes(rows), "Traffic of the fleet, both ways (MB)", legend=False)
    by_bytes.set_ylabel("")
    figure.suptitle(_headline(rows, title), fontsize=12.5, color=INK, x=0.012, ha="left", weight="bold")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:  # noqa: ANN401 - matplotlib is imported late
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise StateError(f"Cannot write {path}: {error.strerror}.", hint="Name another file.") from error
    except ValueError as error:
        raise ConfigError(f"Cannot draw into {path}: {error}.", hint="Use .png, .pdf or .svg.") from error
    return path


def _draw(axes: "Axes", rows: Sequence[Row], x: Sequence[float], label: str, *, legend: bool = True) -> None:
    from matplotlib.ticker import PercentFormatter

    name, title = _score(rows)
    losses = axes.twinx()
    lines = [
        *_line(losses, x, [row.train_loss for row in rows], TRAINING, "Training loss", dashes=True),
        *_line(losses, x, [row.metric("loss") for row in rows], HELD_OUT, "Held-out loss"),
    ]
    if name:
        values = [row.metric(name) for row in rows]
        lines = _line(axes, x, values, SCORE, f"Held-out {title}", wide=True) + lines
        _mark_last(axes, x, values, percent=name == "accuracy")
        axes.set_ylabel(title[0].upper() + title[1:], color=SCORE)
        if name == "accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(label, color=INK)
    losses.set_ylim(bottom=0)
    if legend:
        losses.set_yticklabels([])
        losses.legend(handles=lines, loc="center right", frameon=False, fontsize=9, labelcolor=INK)
    else:
        losses.set_ylabel("Loss", color=HELD_OUT)
    _style(axes, losses)


def _line(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float | None],
    color: str,
    label: str,
    *,
    wide: bool = False,
    dashes: bool = False,
) -> list[Any]:
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if not points:
        return []
    look: dict[str, Any] = {"lw": 2.4 if wide else 1.6, "ls": (0, (4, 2)) if dashes else "-"}
    look |= {"color": color, "label": label}
    if len(points) <= 40:
        look |= {"marker": "o", "ms": 5 if wide else 3.5, "mec": "white", "mew": 0.8}
    return list(axes.plot(*zip(*points, strict=True), **look, solid_capstyle="round", zorder=3))


def _mark_last(axes: "Axes", x: Sequence[float], values: Sequence[float | None], *, percent: bool) -> None:
    points = [(value, place) for place, value in zip(x, values, strict=True) if value is not None]
    if points:
        value, place = points[-1]
        axes.annotate(
            f"{value:.1%}" if percent else f"{value:.3g}",
            (place, value),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            weight="bold",
            color=SCORE,
        )


def _style(axes: "Axes", losses: "Axes") -> None:
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for each in (axes, losses):
        each.tick_params(length=0, colors=FAINT, labelsize=9)
        for side in ("top", "right", "left"):
            each.spines[side].set_visible(False)
        each.spines["bottom"].set_color(FAINT)


def _score(rows: Sequence[Row]) -> tuple[str, str]:
    for name, title in SCORES:
        if any(row.metric(name) is not None for row in rows):
            return name, title
    return "", ""


def _cumulative_megabytes(rows: Sequence[Row]) -> list[float]:
    total, sums = 0.0, []
    for row in rows:
        total += (row.bytes_up + row.bytes_down) / 1e6
        sums.append(total)
    return sums


def _headline(rows: Sequence[Row], title: str) -> str:
    seconds = sum(row.seconds for row in rows)
    return f"{title}: {len(rows)} rounds of {rows[-1].asked} devices in {seconds:.1f} s".removeprefix(": ")
