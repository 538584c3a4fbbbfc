"""``lepton variants build|list|show|compare``: compressed variants of a model, made in their own process."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, progress, say
from lepton_fl.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from lepton_fl.compression.card import Card
    from lepton_fl.compression.catalogue import Report
    from lepton_fl.compression.profiles import Profile
    from lepton_fl.compression.recipe import Recipe

app = typer.Typer(help="Make, measure and gate compressed variants of a trained model.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="The folder of a build.")]
PLOT: Final = "variants.png"
COLUMNS: Final = (
    *("name", "score", "agreement", "bytes", "predicted", "wire", "p50_ms", "p95_ms", "peak_MB", "pareto"),
    "offered_to",
)


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(help="A simulated run's folder, or a model written by `lepton run export`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the variants.")] = Path(
        "variants"
    ),
    recipe: Annotated[
        Path | None, typer.Option(help="What to try (TOML); default: what the model suggests.")
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="The classes of devices (TOML); default: one, wide.")
    ] = None,
    task: Annotated[str, typer.Option(help="Whose model it is, where the source does not say.")] = "",
    data: Annotated[
        Path | None, typer.Option(envvar="LEPTON_DATA", help="Folder of the task's published data.")
    ] = None,
    proxy: Annotated[
        Path | None, typer.Option(help="Unlabelled rows of yours (.npz with x) that students learn from.")
    ] = None,
    generator: Annotated[
        bool, typer.Option("--generator", help="No rows at all: students learn from a generator's.")
    ] = False,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="A further global model for the ensemble. May be repeated.")
    ] = None,
    in_service: Annotated[
        Path | None,
        typer.Option(help="Folder of the variant that devices run now; the gate compares with it."),
    ] = None,
    device: Annotated[str, typer.Option(help="Of the training: auto, cpu or cuda.")] = "auto",
    format: FormatOption = Format.TEXT,
) -> None:
    """Make every candidate, measure it as a device would run it, and hold it against every profile.

    Killed or stopped, the same command goes on where it was. A variant that fails is kept, marked and offered
    to nobody.
    """
    from lepton_fl.files import sha256_hex

    wanted, classes = _recipe(recipe, proxy, generator=generator), _profiles(profiles)
    import torch

    from lepton_fl.compression.build import Build
    from lepton_fl.compression.source import read_source

    torch.set_num_threads(1)
    model = read_source(source, task)
    with progress("variants") as bar:
        made = Build(
            model,
            wanted,
            classes,
            output,
            data,
            [read_source(path, task) for path in teacher or []],
            in_service,
            _device(device),
            sha256_hex(recipe.read_bytes()) if recipe else "",
            on_step=lambda what: bar.advance(0, description=what),
            on_done=lambda name: bar.advance(description=name),
        )
        made.run()
    _show(output, format, plot=output / PLOT)


@app.command("list")
def list_(folder: FolderArgument = Path("variants"), format: FormatOption = Format.TEXT) -> None:
    """All variants of a build, those that failed, and to whom each is offered. Every file is checked."""
    _show(folder, format)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Of the variant.")],
    folder: FolderArgument = Path("variants"),
    format: FormatOption = Format.TEXT,
) -> None:
    """One variant: lineage, figures, and what the gate says of each profile, with reasons."""
    from lepton_fl.compression.catalogue import read_report

    report, cards = read_report(folder)
    for failure in report.failures:
        if failure.name == name:
            print_data({"name": name, "failed": failure.reason}, format=format)
            return
    found = [card for card in cards if card.name == name]
    if not found:
        known = ", ".join((*report.names, *(f.name for f in report.failures)))
        raise NotFound(f"There is no variant {name!r} in {folder}.", hint=f"There are {known}.")
    card = found[0]
    if format == Format.JSON:
        print_data(card.to_json(), format=format)
        return
    body = card.to_json()
    parts = {key: body.pop(key) for key in ("lineage", "measured", "gate", "parity")}
    print_data(body)
    print_data(parts["lineage"], title="\nLineage")
    print_data(parts["measured"], title="\nMeasured")
    print_data(parts["gate"], title="\nGate", columns=["profile", "passed", "reasons"])


@app.command()
def compare(
    folder: FolderArgument = Path("variants"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The plot: .png, .pdf or .svg; default: in the folder."),
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Accuracy, size and latency of all variants beside the predicted N/k and N/k², as a table and a plot."""
    _show(folder, format, plot=output or folder / PLOT)


# --- helpers ----------------------------------------------------------------------------------------


def _recipe(path: Path | None, proxy: Path | None, *, generator: bool) -> "Recipe":
    from lepton_fl.compression.recipe import Recipe, TransferSpec, load_recipe
    from lepton_fl.tasks.sources import DataSourceSpec

    found = load_recipe(path) if path else Recipe()
    given = {"--proxy": proxy is not None, "--generator": generator, "a recipe with [transfer]": False}
    given["a recipe with [transfer]"] = found.transfer.source != "none"
    if sum(given.values()) > 1:
        named = " and ".join(name for name, there in given.items() if there)
        raise ConfigError(f"{named} contradict each other.", hint="Rows to learn from have one source.")
    if proxy is None and not generator:
        return found
    rows = TransferSpec(source="generator")
    if proxy is not None:
        rows = TransferSpec(source="proxy", data=DataSourceSpec(kind="npz", path=proxy))
    return found.model_copy(update={"transfer": rows})


def _profiles(path: Path | None) -> "Sequence[Profile]":
    from lepton_fl.compression.profiles import Profiles, load_profiles

    return load_profiles(path) if path else Profiles().profiles


def _device(name: str) -> Any:  # noqa: ANN401 - torch is imported late
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is none of auto, cpu, cuda.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda, but torch finds no GPU here.", hint="Use auto or cpu.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _show(folder: Path, format: Format, *, plot: Path | None = None) -> None:
    from lepton_fl.compression.catalogue import read_report

    report, cards = read_report(folder)
    rows = [_row(card, report) for card in cards]
    if plot is not None and cards:
        from lepton_fl.compression.plot import draw

        draw(report, cards, plot)
    if format == Format.JSON:
        body = report.to_json() | {"variants": rows, "plot": plot if cards else None}
        print_data(body, format=format)
        return
    print_data(rows, title=f"Variants of {report.run}, round {_round(cards)}", columns=COLUMNS)
    if report.failures:
        print_data([f.to_json() for f in report.failures], title="\nFailed", columns=["name", "reason"])
    if report.transfer is not None:
        learnt = report.transfer
        say(
            f"Learnt from: {learnt.source}, {learnt.rows} rows in {learnt.seconds:.1f} s; "
            f"shift {learnt.shift:.3f}"
        )
    for card in cards:
        taught = card.lineage.transfer
        if taught is not None and taught.source == "devices":
            say(
                f"{card.name} was taught on the devices in {taught.run}: {taught.rounds} rounds, "
                f"{taught.bytes_up / 1e6:.1f} MB up, {taught.bytes_down / 1e6:.1f} MB down, "
                f"{taught.privacy or 'no privacy guarantee'}."
            )
    refused = [
        {"name": card.name, "profile": verdict.profile, "reasons": "; ".join(verdict.reasons)}
        for card in cards
        for verdict in card.gate
        if not verdict.passed
    ]
    if refused:
        print_data(refused, title="\nRefused", columns=["name", "profile", "reasons"])
    if plot is not None and cards:
        say(f"Drawn into {plot}.")


def _round(cards: "Sequence[Card]") -> str:
    return str(cards[0].lineage.round) if cards and cards[0].lineage.round is not None else "unknown"


def _row(card: "Card", report: "Report") -> dict[str, Any]:
    from lepton_fl.compression.profiles import score_of

    measured = card.measured
    metric = score_of(measured.metrics)
    return {
        "name": card.name,
        "metric": metric,
        "score": measured.metrics[metric],
        "agreement": measured.agreement,
        "bytes": card.model_bytes,
        "predicted": round(card.predicted_bytes),
        "wire": measured.wire_bytes,
        "parameters": measured.parameters,
        "p50_ms": measured.p50_ms,
        "p95_ms": measured.p95_ms,
        "peak_MB": measured.peak_memory / 1e6,
        "macs": measured.macs,
        "energy_uj": measured.energy_uj,
        "seconds": measured.build_seconds,
        "pareto": card.name in report.pareto,
        "offered_to": [verdict.profile for verdict in card.gate if verdict.passed],
    }
