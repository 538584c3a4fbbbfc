"""Draw variants: accuracy against bytes, the area of a point its latency, beside what was predicted.

Colours are those of Okabe and Ito. Nothing here needs a display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.compression.card import Card
from lepton_fl.compression.catalogue import Report
from lepton_fl.compression.profiles import score_of
from lepton_fl.errors import ConfigError, StateError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".png", ".pdf", ".svg")
_BLUE, _VERMILLION, _GREY, _INK = "#0072b2", "#d55e00", "#9aa5b1", "#1f2933"


def draw(report: Report, cards: Sequence[Card], path: Path) -> Path:
    """Draw all variants of a build into one file.

    Args:
        report: of the build.
        cards: its variants.
        path: .png, .pdf or .svg.

    Raises:
        ConfigError: there is nothing to draw, or the suffix is unknown.
        StateError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path} ends in none of {', '.join(SUFFIXES)}.", hint="Name a file such as variants.png."
        )
    if not cards:
        raise ConfigError("There is no variant to draw: every candidate failed.")
    from matplotlib.figure import Figure

    metric = score_of(cards[0].measured.metrics)
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    quality, sizes = figure.subplots(1, 2, width_ratios=(3, 2))
    _quality(quality, report, cards, metric)
    _sizes(sizes, cards)
    figure.suptitle(f"{report.task.rpartition(':')[2]}: {len(cards)} variants of {report.run}", color=_INK)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StateError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def _quality(axes: "Axes", report: Report, cards: Sequence[Card], metric: str) -> None:
    slowest = max(card.measured.p50_ms for card in cards)
    for card in cards:
        on_front, ours = card.name in report.pareto, card.measured
        style: dict[str, Any] = {
            "color": _BLUE if card.offered else _VERMILLION,
            "alpha": 0.85 if on_front else 0.35,
        }
        axes.scatter(card.model_bytes, ours.metrics[metric], s=40 + 360 * ours.p50_ms / slowest, **style)
        place = (card.model_bytes, ours.metrics[metric])
        axes.annotate(card.name, place, (2, 10), textcoords="offset points", fontsize=8, rotation=50)
    axes.axhline(report.global_metrics[metric], color=_GREY, linewidth=1, linestyle=(0, (5, 2)))
    axes.set(ylabel=metric)
    _bytes_along(axes)
    axes.set_title(
        "area: latency; blue: offered, red: refused; pale: beaten by another", fontsize=8, color=_INK
    )
    axes.margins(0.15, 0.35)
    axes.grid(color="#e4e7eb", linewidth=0.6)


def _sizes(axes: "Axes", cards: Sequence[Card]) -> None:
    order = sorted(cards, key=lambda card: card.model_bytes, reverse=True)
    places = range(len(order))
    axes.barh([p + 0.2 for p in places], [c.model_bytes for c in order], 0.4, color=_BLUE, label="real")
    axes.barh(
        [p - 0.2 for p in places],
        [c.predicted_bytes for c in order],
        0.4,
        color=_GREY,
        label="N/k, or N/k² distilled",
    )
    axes.set_yticks(list(places), [card.name for card in order], fontsize=8)
    _bytes_along(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)


def _bytes_along(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", xlabel="bytes on disk")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
