"""What a build has left in its folder: every variant's card, those that failed, and which are worth having.

    folder/
        report.json            what follows, canonical JSON
        NAME/                  model.onnx, card.json, parity.safetensors; see ``card``
        work/                  what trainings gave, so that a build goes on where it was killed

Needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from lepton_fl.compression.card import PROGRAM, Card, Finite, Name, Sha256, Share, Transfer, read_variant
from lepton_fl.compression.profiles import drop, score_of
from lepton_fl.errors import NotFound, StateCorrupt
from lepton_fl.files import sha256_hex
from lepton_fl.plan import Frozen

REPORT: Final = "report.json"


class Failure(Frozen):
    """A candidate that could not be made; it has no files and is never offered."""

    name: Name
    reason: str


class Report(Frozen):
    """One build."""

    format: Literal["lepton-variants/1"] = "lepton-variants/1"
    task: str
    run: str
    global_sha256: Sha256
    global_metrics: dict[str, Finite]
    global_recall: tuple[Share, ...] = ()
    transfer: Transfer | None = None
    names: tuple[Name, ...]  # of the variants, in the recipe's order
    pareto: tuple[Name, ...]  # no other one is at least as good, as small and as fast
    failures: tuple[Failure, ...] = Field(default=())


def read_report(folder: Path) -> tuple[Report, tuple[Card, ...]]:
    """What a build has left, every file checked.

    Raises:
        NotFound: nothing was built there, or a variant's file is missing.
        StateCorrupt: a file is damaged.
    """
    path = folder / REPORT
    try:
        report = Report.model_validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError as error:
        raise NotFound(
            f"There is no {path}.", hint="`lepton variants build` writes it when it is done; run it again."
        ) from error
    except (OSError, ValidationError) as error:
        raise StateCorrupt(
            f"{path} cannot be read: {error}.", hint="Run `lepton variants build` again."
        ) from error
    cards = tuple(read_variant(folder / name) for name in report.names)
    for card in cards:
        check_program(folder / card.name, card)
    return report, cards


def check_program(folder: Path, card: Card) -> None:
    """Refuse an ExecuTorch program that is not the one the card names.

    Raises:
        NotFound: it is missing.
        StateCorrupt: it is another one.
    """
    if card.executorch is None:
        return
    try:
        found = sha256_hex((folder / PROGRAM).read_bytes())
    except OSError as error:
        raise NotFound(
            f"There is no {folder / PROGRAM}.", hint="`lepton variants build` makes it."
        ) from error
    if found != card.executorch.sha256:
        raise StateCorrupt(f"{folder / PROGRAM} has SHA-256 {found}, the card says {card.executorch.sha256}.")


def pareto(cards: Sequence[Card]) -> tuple[str, ...]:
    """The names of those that no other one beats or equals in score, bytes and median latency together."""
    if not cards:
        return ()
    metric = score_of(cards[0].measured.metrics)
    points = {
        card.name: (
            drop(metric, 0.0, card.measured.metrics[metric]),
            float(card.model_bytes),
            card.measured.p50_ms,
        )
        for card in cards
    }

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )

    return tuple(name for name, point in points.items() if not beaten(point))
