"""``lepton rollout``: bring releases to devices in stages, and take them back. Imports none of its weight."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import ConfigError
from lepton_server.commands import ConfigOption, StateOption, load, opened

if TYPE_CHECKING:
    from rich.console import Group

    from lepton_server.store import Rollout, Store

app = typer.Typer(help="Bring releases to devices in stages; taken back by itself.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(help="Id of the rollout; may be left out where only one is open.")]
ReasonOption = Annotated[str, typer.Option(help="Kept in the journal.")]
LOOK_S = 1.0  # between two looks of `watch`


@app.command("plan")
def plan(
    file: Annotated[Path, typer.Argument(help="TOML: id, releases by profile, stages, health.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check a plan, journal it, and show whom each stage would reach. No device hears of it yet."""
    from lepton_fl.config import load as read
    from lepton_fl.delivery.rollout import Wish
    from lepton_server.releases import shelf_of
    from lepton_server.rollouts import create, view

    settings = load(config, {"server.state_dir": state_dir})
    wish = read(Wish, file, env={}).value
    with opened(settings) as store:
        made = create(store, shelf_of(settings), wish)
        stages = view(store, store.rollout(made.id), time.time()).stages
    print_data({"rollout": made.id, "task": made.task, "stages": stages}, format=format)
    if format == Format.TEXT:
        say(f"Begin with: lepton rollout start {made.id}")


@app.command("start")
def start(
    rollout: IdArgument = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Begin the first stage; the running coordinator does the rest."""
    _move("running", "started", rollout, "", config, state_dir, format)


@app.command("pause")
def pause(
    rollout: IdArgument = "",
    reason: ReasonOption = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Reach no further device and judge nothing; those that were told go on."""
    _move("paused", "paused", rollout, reason, config, state_dir, format)


@app.command("resume")
def resume(
    rollout: IdArgument = "",
    reason: ReasonOption = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Go on with the stage in hand; it is watched anew."""
    _move("running", "resumed", rollout, reason, config, state_dir, format)


@app.command("abort")
def abort(
    rollout: IdArgument = "",
    reason: ReasonOption = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Take the releases back from every device that was told."""
    _move("rolling-back", "aborted", rollout, reason, config, state_dir, format)


@app.command("list")
def list_all(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """All rollouts, the newest last."""
    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        rows = [_line(row) for row in store.rollouts()]
    print_data(rows, format=format, title="Rollouts", columns=["rollout", "task", "phase", "stage", "cause"])


@app.command("status")
def status(
    rollout: IdArgument = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Where a rollout is, what it waits for, and as of when that is known."""
    from lepton_server.rollouts import find

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        found, stages = _status(settings.server.state_dir, store, find(store, rollout))
    if format == Format.JSON:
        print_data(found | {"stages": stages}, format=format)
        return
    print_data(found)
    print_data(stages, title="Stages")


@app.command("watch")
def watch(rollout: IdArgument = "", config: ConfigOption = None, state_dir: StateOption = None) -> None:
    """The same, live, until the rollout is over. Ctrl-C ends the watching only."""
    from rich.live import Live

    from lepton_fl.cli.output import console
    from lepton_server.rollouts import find

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store, Live(console=console(), auto_refresh=False) as live:
        row = find(store, rollout)
        while True:
            row = store.rollout(row.id)
            live.update(_picture(*_status(settings.server.state_dir, store, row)), refresh=True)
            if row.phase in ("rolled-back", "aborted", "done"):
                return
            time.sleep(LOOK_S)


# --- helpers ----------------------------------------------------------------------------------------


def _move(
    phase: str,
    word: str,
    rollout: str,
    reason: str,
    config: Path | None,
    state_dir: Path | None,
    format: Format,
) -> None:
    from lepton_server.rollouts import find, move

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        row = find(store, rollout)
        if word == "started" and row.phase != "planned":
            raise ConfigError(
                f"Rollout {row.id} is {row.phase}, not planned.", hint=f"`lepton rollout status {row.id}`"
            )
        if word == "resumed" and row.phase != "paused":
            raise ConfigError(f"Rollout {row.id} is {row.phase}, not paused.")
        aborting = word == "aborted"
        if aborting and row.phase == "planned":
            phase = "aborted"
        cause = f"{word} by the operator" + (f": {reason}" if reason else "")
        move(store, row.id, phase, cause, aborting=aborting)
    print_data({"rollout": row.id, "phase": phase, "cause": cause}, format=format)


def _line(row: "Rollout") -> dict[str, Any]:
    stages = row.plan["stages"]
    return {
        "rollout": row.id,
        "task": row.task,
        "phase": row.phase,
        "stage": f"{row.stage + 1} of {len(stages)}",
        "cause": row.cause,
    }


def _status(state_dir: Path, store: "Store", row: "Rollout") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A rollout as its coordinator sees it at this moment; without one, as the journal has it."""
    from lepton_server.fleet import REPORT_GAP_S
    from lepton_server.rollouts import View, view
    from lepton_server.watchdog import read_board

    found, active = _line(row), row.phase in ("running", "rolling-back")
    told = read_board(state_dir, about="rollouts").get(row.id) if active else None
    seen = View(**told) if told else view(store, row, time.time())
    if row.suspect:
        found["suspect"] = row.suspect
    if active and seen.act == "wait":
        found["waiting"] = seen.cause
        if seen.until:
            found["until"] = _clock(seen.until)
    elif active and seen.act != "suspect":
        found["next"] = f"{seen.act}: {seen.cause}" if seen.cause else seen.act
    found["as of"] = (
        f"{_clock(seen.at)}, {max(0.0, time.time() - seen.at):.0f} s ago"
        if seen.at
        else f"the journal: reports may be {REPORT_GAP_S:g} s old, and what devices counted is not in it"
    )
    return found, seen.stages


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _picture(found: dict[str, Any], stages: list[dict[str, Any]]) -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in stages[0]:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for line in stages:
        table.add_row(*map(str, line.values()))
    words = [Text(f"{name}: {value}") for name, value in found.items() if value]
    return Group(*words, table)
