"""``lepton client enroll|run|serve|status|check``: what the owner of a device types.

Importing this module imports neither gRPC nor numpy; commands import what they need.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data
from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from lepton_client.config import ClientConfig

app = typer.Typer()
client_app = typer.Typer(help="Run this machine as a device: join, train, report.", no_args_is_help=True)
app.add_typer(client_app, name="client")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The device's TOML file; see client/client.toml.")
]
StateOption = Annotated[
    Path | None, typer.Option("--state-dir", help="Folder of the device's key, certificate and status.")
]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Allow this task: package.module:attribute or a short name.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="The task's data: a .npz, .csv or .parquet file, a folder of images, or a JSON object with the "
        "keys of a data source. Without it the task's own published data are used.",
    ),
]

_KINDS = {".npz": "npz", ".csv": "csv", ".parquet": "parquet"}


@client_app.command()
def enroll(
    token: Annotated[
        str,
        typer.Option(
            envvar="LEPTON_TOKEN",
            help="What `lepton token create` printed; '-' reads it from standard input.",
        ),
    ],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    name: Annotated[
        str | None, typer.Option(help="Shown to the operator; default: this host's name.")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="A label; may be repeated.")] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Join a coordinator with a one-time token. May be repeated with the same token until it succeeds."""
    import platform
    import sys

    from lepton_client.enrol import enrol
    from lepton_client.state import StateDir
    from lepton_fl import crypto

    settings = _load(config, {"client.state_dir": state_dir, "client.name": name})
    text = sys.stdin.readline() if token == "-" else token  # noqa: S105 - "-" is no password
    crypto.parse_join_token(text)  # a bad token leaves nothing behind
    state = StateDir(settings.client.state_dir)
    with state.locked():
        identity = enrol(
            state,
            text,
            name=settings.client.name or platform.node()[:64] or "device",
            groups=tuple(group) if group else settings.client.groups,
            timeout_s=settings.connection.timeout_s,
        )
    record = {
        "device_id": identity.device_id,
        "name": identity.name,
        "coordinator": identity.device_service,
        "certificate_ends": identity.ends,
        "state_dir": str(state.folder),
    }
    print_data(record, format=format, title="Enrolled. Next: lepton client run")


@client_app.command()
def run(
    config: ConfigOption = None,
    state_dir: StateOption = None,
    task: TaskOption = None,
    data: DataOption = None,
) -> None:
    """Check in, train when selected, until stopped. Survives a coordinator that is away."""
    from lepton_client.process import become

    become(_with_task(_load(config, {"client.state_dir": state_dir}), task, data))


@client_app.command()
def serve(
    config: ConfigOption = None,
    state_dir: StateOption = None,
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket; default: serve.sock in the state folder.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP on 127.0.0.1 instead of a Unix socket.")
    ] = None,
) -> None:
    """Answer prediction requests of programs on this device, with the release in service, until stopped."""
    from lepton_client.process import become_server

    given = {"client.state_dir": state_dir, "serve.socket": socket, "serve.port": port}
    become_server(_load(config, given))


@client_app.command()
def status(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """Say how this device is, and what became of its last answers."""
    from lepton_client.report import budget_rows, describe, verdict_rows
    from lepton_client.state import StateDir

    settings = _load(config, {"client.state_dir": state_dir})
    state = StateDir(settings.client.state_dir)
    identity = state.identity()
    record, verdicts = describe(state, identity), verdict_rows(state)
    budgets = budget_rows(state, settings)
    if format == Format.JSON:
        print_data(record | {"budgets": budgets, "verdicts": verdicts}, format=format)
        return
    print_data(record)
    if budgets:
        print_data(
            budgets,
            title="\nPrivacy spent by each row, over all runs",
            columns=["task", "spent", "allowed", "delta", "unit", "trust", "adjacency", "rounds"],
        )
    if verdicts:
        print_data(
            verdicts, title="\nLast answers", columns=["at", "run", "round", "accepted", "reason", "detail"]
        )


@client_app.command()
def check(
    config: ConfigOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check the owner's data against the contract of each allowed task. Exit code 4 if one cannot train."""
    from lepton_client.inspection import inspect

    settings = _with_task(_load(config, {}), task, data)
    if not settings.tasks:
        raise ConfigError(
            "No task is allowed on this device.", hint="Add [[tasks]] to the configuration, or give --task."
        )
    findings = [inspect(section) for section in settings.tasks]
    rows = [
        {"task": f.name, "version": f.version, "ready": f.ready, "rows": f.rows, "reason": f.reason}
        for f in findings
    ]
    print_data(
        rows, format=format, title="Contract check", columns=["task", "version", "ready", "rows", "reason"]
    )
    if not all(finding.ready for finding in findings):
        raise typer.Exit(4)


def _load(path: Path | None, overrides: dict[str, Any]) -> "ClientConfig":
    from lepton_client.config import ClientConfig
    from lepton_fl.config import load

    texts = {key: str(value) if value is not None else None for key, value in overrides.items()}
    return load(ClientConfig, path, overrides=texts).value


def _with_task(settings: "ClientConfig", task: str | None, data: str | None) -> "ClientConfig":
    """Options that stand for one [[tasks]] entry."""
    from pydantic import ValidationError

    if task is None:
        if data is not None:
            raise ConfigError("--data was given without --task.", hint="Say which task the data are for.")
        return settings
    try:
        return settings.with_task(task, source_from(data) if data is not None else {})
    except ValidationError as error:
        raise ConfigError(error.errors(include_url=False)[0]["msg"]) from None


def source_from(text: str) -> dict[str, Any]:
    """A data source from one option: a JSON object, a file by its suffix, or a folder of images.

    Raises:
        ConfigError: neither fits.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--data is not a JSON object: {error}.") from None
    path = Path(text).expanduser().absolute()
    if (kind := _KINDS.get(path.suffix.lower())) is not None:
        return {"kind": kind, "path": str(path)}
    if path.is_dir():
        return {"kind": "images", "path": str(path)}
    raise ConfigError(
        f"--data {text!r} is neither a .npz, .csv or .parquet file, nor a folder, nor a JSON object.",
        hint='Check the path; write {"kind": ...} to say what it is.',
    )
