"""``lepton privacy plan``: what each mechanism is worth under a contract, before anything is spent.

A coordinator adds the commands of its ledger (``lepton_server.cli_privacy``).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from lepton_fl.privacy.planning import Choice, Contract

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
}
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
    epsilon: Annotated[float, typer.Option(help="Of the whole run, for each device.")] = 8.0,
    delta: Annotated[float, typer.Option(help="At most one over the devices.")] = 1e-6,
    plot: Annotated[
        Path | None, typer.Option(help="Draw epsilon against rounds into this PNG, PDF or SVG file.")
    ] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Compare the mechanisms at equal privacy (device level, central, zero-out adjacency).

    The noise is in clip norms, of a sum over the cohort: that of one round, of the final model, and the root
    mean square over the models of all rounds. Less is better.
    """
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{plot} ends in none of {', '.join(SUFFIXES)}.", hint="Name a file such as plan.png."
        )
    try:
        _plan(rounds, cohort, population, min_separation, max_participations, epsilon, delta, plot, format)
    except ModuleNotFoundError as error:
        extra = "sim" if error.name and error.name.startswith("matplotlib") else "privacy"
        raise ConfigError(
            f"This needs {error.name}, which is not installed.", hint=f"pip install 'lepton-fl[{extra}]'"
        ) from error


def _plan(
    rounds: int,
    cohort: int,
    population: int,
    min_separation: int,
    max_participations: int,
    epsilon: float,
    delta: float,
    plot: Path | None,
    format: Format,
) -> None:
    from lepton_fl.privacy.planning import Contract, choices

    if population and delta * population > 1:
        raise ConfigError(
            f"delta={delta:g} is above 1/population={1 / population:g}: that would allow to publish one "
            "device's data whole."
        )
    contract = Contract(rounds, cohort, population, min_separation, max_participations)
    found = choices(contract, epsilon, delta)
    title = (
        f"epsilon = {epsilon:g} at delta = {delta:g}, {rounds} rounds, a device in at most {contract.times}"
    )
    print_data([_row(choice, contract) for choice in found], format=format, title=title)
    if plot is not None:
        _draw(found, contract, delta, plot, title)
        say(f"Drawn into {plot}.")


def _row(choice: "Choice", contract: "Contract") -> dict[str, object]:
    return {
        "mechanism": choice.mechanism,
        "noise_multiplier": choice.noise_multiplier,
        "final_noise": choice.final_noise,
        "mean_noise": choice.mean_noise,
        "mean_update_noise": choice.noise_multiplier / contract.cohort,
        "caveat": choice.caveat,
    }


def _draw(choices: "tuple[Choice, ...]", contract: "Contract", delta: float, path: Path, title: str) -> None:
    import io

    from matplotlib.figure import Figure

    from lepton_fl.files import write_atomic
    from lepton_fl.privacy.planning import spending_curve

    lengths = sorted({max(1, round(contract.rounds * i / POINTS)) for i in range(1, POINTS + 1)} | {1})
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for choice in choices:
        curve = spending_curve(choice.mechanism, contract, choice.noise_multiplier, delta, lengths)
        label = f"{choice.mechanism}: final noise {choice.final_noise:.3g}"
        axes.plot(*zip(*curve, strict=True), color=COLOURS[choice.mechanism], lw=1.9, label=label)
    axes.set(xlabel="Rounds", ylabel="Epsilon so far", title=title, ylim=(0, None), xlim=(0, contract.rounds))
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=150)
    write_atomic(path, drawn.getvalue())
