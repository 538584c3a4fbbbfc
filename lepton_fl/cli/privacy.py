"""``lepton privacy plan``: what each guarantee takes under a contract, before anything is spent.

A coordinator adds the commands of its ledger (``lepton_server.cli_privacy``).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lepton_fl.privacy.comparison import Guarantee, Masked

app = typer.Typer(
    help="Plan the privacy of a run; see, prove and bound what runs have spent.", no_args_is_help=True
)

POINTS: Final = 24  # of a curve
COLOURS: Final = {  # Okabe and Ito
    "every-round": "#9aa5b1",
    "independent": "#0072b2",
    "banded": "#009e73",
    "blt": "#d55e00",
    "poisson": "#cc79a7",
    "skellam": "#56b4e9",
    "ddgauss": "#e69f00",
    "dp-sgd": "#000000",
}
LINES: Final = {"central": "-", "distributed": "--", "local": ":"}  # by trust
COLUMNS: Final = (
    "mechanism",
    "unit",
    "trust",
    "adjacency",
    "delta",
    "noise_multiplier",
    "final_noise",
    "mean_noise",
    "ring",
    "bits",
    "needed_bits",
    "min_survivors",
    "caveat",
)
SUFFIXES: Final = (".png", ".pdf", ".svg")


@app.callback()
def _privacy() -> None:
    """Plan the privacy of a run; see, prove and bound what runs have spent."""


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(min=1, help="Of the run.")] = 100,
    cohort: Annotated[int, typer.Option(min=1, help="Devices a round.")] = 100,
    population: Annotated[int, typer.Option(min=0, help="Devices there are; 0 = not known.")] = 0,
    min_separation: Annotated[
        int, typer.Option(min=1, help="Rounds from one participation of a device to its next.")
    ] = 1,
    max_participations: Annotated[
        int, typer.Option(min=0, help="Of one device; 0 = as often as the separation allows.")
    ] = 0,
    epsilon: Annotated[float, typer.Option(help="Of the whole run, of each guarantee by itself.")] = 8.0,
    delta: Annotated[float, typer.Option(help="At most one over the devices.")] = 1e-6,
    coordinates: Annotated[
        int, typer.Option(min=0, help="Of an update: for noise that devices add; 0 = leave it out.")
    ] = 100_000,
    bits: Annotated[
        int, typer.Option(min=2, max=32, help="privacy.bits: what sums of devices' noise may fill.")
    ] = 20,
    min_survivors: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the cohort without which there is no sum.")
    ] = 0.7,
    colluders: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the cohort that may tell its noise.")
    ] = 0.0,
    rows: Annotated[
        int, typer.Option(min=0, help="Of one device: for example-level privacy; 0 = leave it out.")
    ] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step of DP-SGD, on average.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Of DP-SGD in a round.")] = 1,
    example_delta: Annotated[
        float, typer.Option(help="At most one over the rows; 0 = as for the devices.")
    ] = 0.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw epsilon against rounds into this PNG, PDF or SVG file.")
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Compare all guarantees at the same epsilon: each by itself, for its unit and trust; they do not add up.

    Device level: the noise is in clip norms, of a sum over the cohort: the least of one round, that of the
    final model, and the root mean square over the models of all rounds. Less is better. Example level: the
    noise of one step of DP-SGD on the device, in norms of one row's gradient, not comparable with the others.
    """
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{plot} ends in none of {', '.join(SUFFIXES)}.", hint="Name a file such as plan.png."
        )
    if population and delta * population > 1:
        raise ConfigError(
            f"delta={delta:g} is above 1/population={1 / population:g}: that would allow to publish one "
            "device's data whole."
        )
    if not 0 <= example_delta < 1:
        raise ConfigError(f"Expected 0 <= example-delta < 1, got {example_delta:g}.")
    try:
        from lepton_fl.privacy.comparison import Rows, guarantees
        from lepton_fl.privacy.planning import Contract

        contract = Contract(rounds, cohort, population, min_separation, max_participations)
        masked = _masked(cohort, coordinates, bits, min_survivors, colluders) if coordinates else None
        one = Rows(rows, batch_size, epochs, max_participations, example_delta) if rows else None
        found = guarantees(contract, epsilon, delta, masked, one)
        title = f"epsilon = {epsilon:g}, {rounds} rounds, a device in at most {contract.times}"
        print_data([_row(row, cohort) for row in found], format=format, title=title, columns=COLUMNS)
        if plot is not None:
            _draw(found, rounds, plot, title)
            say(f"Drawn into {plot}.")
    except ModuleNotFoundError as error:
        extra = "sim" if error.name and error.name.startswith("matplotlib") else "privacy"
        raise ConfigError(
            f"This needs {error.name}, which is not installed.", hint=f"pip install 'lepton-fl[{extra}]'"
        ) from error


def _masked(cohort: int, coordinates: int, bits: int, min_survivors: float, colluders: float) -> "Masked":
    """Sums as secure aggregation makes them: 32 bits as they are, 16 bits rotated."""
    from math import sqrt

    from lepton_fl.plan import SecureSpec
    from lepton_fl.privacy.comparison import Masked
    from lepton_fl.privacy.planning import Ring
    from lepton_fl.secagg.rotation import rotation_width

    if not colluders < min_survivors:
        raise ConfigError(
            f"colluders={colluders:g} leaves nobody honest of min_survivors={min_survivors:g}.",
            hint="Raise min_survivors, or count on fewer colluders.",
        )
    secure = SecureSpec()
    asked, flat = max(secure.sums(cohort)), secure.spread / sqrt(rotation_width(coordinates))
    return Masked(coordinates, (Ring(32, asked), Ring(16, asked, flat)), bits, min_survivors, colluders)


def _row(row: "Guarantee", cohort: int) -> dict[str, object]:
    named = {name: value for name, value in vars(row).items() if name != "curve"}
    told = None if row.final_noise is None or row.noise_multiplier is None else row.noise_multiplier / cohort
    return named | {"mean_update_noise": told}


def _draw(found: "Sequence[Guarantee]", rounds: int, path: Path, title: str) -> None:
    import io

    from matplotlib.figure import Figure

    from lepton_fl.files import write_atomic

    lengths = sorted({max(1, round(rounds * i / POINTS)) for i in range(1, POINTS + 1)} | {1})
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for row in {row.mechanism: row for row in reversed(found)}.values():  # the first ring of each
        if row.curve is None:
            continue
        axes.plot(
            *zip(*row.curve(lengths), strict=True),
            color=COLOURS[row.mechanism],
            ls=LINES[row.trust],
            lw=1.9,
            label=_label(row),
        )
    axes.set(xlabel="Rounds", ylabel="Epsilon so far, each by itself", ylim=(0, None), xlim=(0, rounds))
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=150)
    write_atomic(path, drawn.getvalue())


def _label(row: "Guarantee") -> str:
    noise = f", final noise {row.final_noise:.3g}" if row.final_noise is not None else ""
    return f"{row.mechanism} ({row.unit}, {row.trust}, delta {row.delta:g}){noise}"
