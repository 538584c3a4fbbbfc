"""``lepton server``, ``run``, ``devices``, ``token``, ``keys``, ``release``, ``audit``: operators' commands.

All but ``server`` work on the coordinator's database, found through the same configuration: they need no port
and no login, and they work while the coordinator is down. Importing this module imports none of its weight.
"""

import faulthandler
import json
import secrets
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import ConfigError, NotFound, RunError
from lepton_server import cli_privacy  # noqa: F401 - its commands join `lepton privacy`
from lepton_server.cli_audit import app as audit_app
from lepton_server.cli_backup import app as backup_app
from lepton_server.cli_releases import keys_app, release_app
from lepton_server.cli_rollout import app as rollout_app
from lepton_server.commands import ConfigOption, StateOption, find_device, find_run, load, opened

if TYPE_CHECKING:
    from lepton_server.store import Run, Store

app = typer.Typer()
run_app = typer.Typer(help="Start training runs and see how they go.", no_args_is_help=True)
devices_app = typer.Typer(help="The enrolled devices.", no_args_is_help=True)
authority_app = typer.Typer(
    help="The enrolment authority: whose signing keys devices believe in secure aggregation.",
    no_args_is_help=True,
)
token_app = typer.Typer(help="One-time tokens that let devices join.", no_args_is_help=True)
app.add_typer(run_app, name="run")
app.add_typer(audit_app, name="audit")
app.add_typer(backup_app, name="backup")
app.add_typer(devices_app, name="devices")
app.add_typer(token_app, name="token")
app.add_typer(keys_app, name="keys")
app.add_typer(release_app, name="release")
app.add_typer(rollout_app, name="rollout")
app.add_typer(authority_app, name="authority")

RunArgument = Annotated[str, typer.Argument(help="Run id, a unique beginning of it, or 'last'.")]

POLL_S = 0.5  # between two looks of `run watch`


# --- the process ------------------------------------------------------------------------------------


@app.command()
def server(
    config: ConfigOption = None,
    state_dir: StateOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; default: all.")] = None,
    public_name: Annotated[
        list[str] | None,
        typer.Option(help="Name or address by which devices reach this machine; repeatable."),
    ] = None,
    standby: Annotated[
        bool | None,
        typer.Option("--standby", help="Wait while another coordinator leads, and take over when it ends."),
    ] = None,
) -> None:
    """Run the coordinator until it is stopped. The first start makes its certificate authority."""
    given = {"server.state_dir": state_dir, "listen.host": host, "listen.public_names": public_name}
    settings = load(config, given | {"server.standby": standby})
    from lepton_fl.logs import configure
    from lepton_server.memory import give_back_early

    give_back_early()
    from lepton_server.coordinator import Coordinator

    configure(settings.log.level, settings.log.format)
    faulthandler.register(signal.SIGUSR1)  # `kill -USR1 PID` writes every thread's stack to the log
    coordinator = Coordinator(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: coordinator.stop())
    with coordinator:
        at = coordinator.endpoints
        say(f"Ready. Devices join at {at.enrolment}; `lepton token create` makes a token for one.")
        coordinator.wait()


# --- tokens -----------------------------------------------------------------------------------------


@token_app.command("create")
def token_create(
    config: ConfigOption = None,
    state_dir: StateOption = None,
    hours: Annotated[float, typer.Option(min=0.01, max=8760, help="Hours until it expires.")] = 24.0,
    uses: Annotated[int, typer.Option(min=1, max=10_000, help="How many devices may use it.")] = 1,
    note: Annotated[str, typer.Option(help="For your own records.")] = "",
    format: FormatOption = Format.TEXT,
) -> None:
    """Make a token and print it; it is shown only this once."""
    from lepton_fl import crypto
    from lepton_server.authority import Authority
    from lepton_server.device_service import endpoints_of, hosts_of
    from lepton_server.signing import authority_key

    settings = load(config, {"server.state_dir": state_dir})
    listen = settings.listen
    if not listen.enrolment_port:
        raise ConfigError(
            "listen.enrolment_port is 0, so a token cannot say where to join.", hint="Set a fixed port."
        )
    with opened(settings, make=True) as store:
        authority = Authority.open(settings.server.state_dir / "keys", hosts_of(listen))
        addr = endpoints_of(listen, listen.enrolment_port, listen.device_port, listen.fleet_port).enrolment
        secret = crypto.new_secret()
        token = crypto.make_join_token(addr, authority.ca_der, secret, authority_key(settings))
        token_id, expires = f"t-{secrets.token_hex(6)}", time.time() + hours * 3600
        body = {
            "token_id": token_id,
            "secret_sha256": crypto.secret_sha256(secret),
            "expires_at": expires,
            "note": note,
            "uses": uses,
        }
        store.record("token.created", token_id, body)
    if format == Format.JSON:
        print_data({"token": token, "id": token_id, "expires": _when(expires), "uses": uses}, format=format)
        return
    typer.echo(token)
    say(f"Valid for {uses} device(s) until {_when(expires):%Y-%m-%d %H:%M} UTC, at {addr}. On the device:")
    say("    lepton client enroll --token …")


# --- the enrolment authority ------------------------------------------------------------------------


@authority_app.command("create")
def authority_create(
    file: Annotated[Path, typer.Argument(help="File to write the private key to, mode 0600.")],
    format: FormatOption = Format.TEXT,
) -> None:
    """Make an enrolment authority, best on another machine than the coordinator; print its public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lepton_fl.crypto import save_signing_key

    if file.exists():
        raise ConfigError(f"{file} exists.", hint="Devices pin an authority for good: keep it.")
    key = Ed25519PrivateKey.generate()
    save_signing_key(file, key)
    public = key.public_key().public_bytes_raw().hex()
    print_data({"file": str(file), "public_key": public}, format=format)
    say(f'In the coordinator\'s configuration: [authority] public_key = "{public}"')


@authority_app.command("requests")
def authority_requests(
    output: Annotated[Path, typer.Argument(help="File to write: what `lepton authority sign` reads.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Write the devices' open requests for signing certificates, to be taken to the authority."""
    from lepton_server.signing import requests_of

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        found = requests_of(store, settings.server.state_dir / "keys")
    found.write(output)
    print_data(found.rows(), format=format, title="Requests", columns=["device_id", "name"])


@authority_app.command("sign")
def authority_sign(
    requests: Annotated[Path, typer.Argument(help="What `lepton authority requests` wrote.")],
    output: Annotated[Path, typer.Argument(help="File to write: what `lepton authority install` reads.")],
    key: Annotated[Path, typer.Option(help="The authority's private key.")],
    days: Annotated[float, typer.Option(min=1, max=3650, help="Life of the certificates.")] = 365.0,
    format: FormatOption = Format.TEXT,
) -> None:
    """Certify devices' signing keys; needs no coordinator. Look at the list: it says who may take part."""
    from lepton_fl.crypto import load_signing_key
    from lepton_server.signing import Requests

    signed = Requests.read(requests).sign(load_signing_key(key), int(time.time() + days * 86_400))
    signed.write(output)
    print_data(signed.rows(), format=format, title="Certified", columns=["device_id", "name"])


@authority_app.command("install")
def authority_install(
    certificates: Annotated[Path, typer.Argument(help="What `lepton authority sign` wrote.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Hand the authority's certificates to the coordinator; devices fetch them at their next check-in."""
    from lepton_fl.secagg.identity import deployment_of
    from lepton_server.authority import Authority
    from lepton_server.signing import Certificates, Signing

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        ca = Authority.open(settings.server.state_dir / "keys").ca_der
        signing = Signing.open(settings.authority, store, deployment_of(ca))
        if signing is None:
            raise ConfigError("No enrolment authority is configured.", hint="Set authority.public_key.")
        rows = Certificates.read(certificates).install(signing)
    print_data(rows, format=format, title="Installed", columns=["device_id", "name"])


# --- devices ----------------------------------------------------------------------------------------


@devices_app.command("list")
def devices_list(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """All enrolled devices, with what they last said."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        rows = [_device_row(device) for device in store.devices()]
    columns = ["id", "name", "state", "groups", "last_seen", "status", "tasks"]
    print_data(rows, format=format, title="Devices", columns=columns)


@devices_app.command("show")
def devices_show(
    device: Annotated[str, typer.Argument(help="Device id, or its name if that is unique.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """One device: identity, twin, certificate."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_device(store, device)
    row = _device_row(found) | {
        "certificate_ends": _when(found.cert_not_after),
        "enrolled": _when(found.enrolled_at),
        "reason": found.state_reason,
        "desired": dict(found.desired),
        "reported": dict(found.reported),
    }
    print_data(row, format=format)


@devices_app.command("revoke")
def devices_revoke(
    device: Annotated[str, typer.Argument(help="Device id, or its name if that is unique.")],
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Shut a device out for good; a running coordinator does so within a second."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_device(store, device)
        store.record("device.revoked", found.id, {"device_id": found.id, "reason": reason})
    print_data({"id": found.id, "name": found.name, "state": "revoked"}, format=format)


@devices_app.command("quarantine")
def devices_quarantine(
    device: Annotated[str, typer.Argument(help="Device id, or its name if that is unique.")],
    hours: Annotated[float, typer.Option(min=0.01, max=8760, help="For how long.")] = 24.0,
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "an operator's decision",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Draw a device into no round for a while; a running coordinator does so within a second."""
    until = time.time() + hours * 3600
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_device(store, device)
        body = {"device_id": found.id, "cause": reason, "faults": 0, "until": until}
        store.record("device.quarantined", found.id, body)
    print_data({"id": found.id, "name": found.name, "quarantined_until": _when(until)}, format=format)


@devices_app.command("readmit")
def devices_readmit(
    device: Annotated[str, typer.Argument(help="Device id, or its name if that is unique.")],
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "an operator's decision",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """End a quarantine; a running coordinator may draw the device within a second."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_device(store, device)
        store.record("device.readmitted", found.id, {"device_id": found.id, "reason": reason})
    print_data({"id": found.id, "name": found.name, "state": found.state}, format=format)


# --- runs -------------------------------------------------------------------------------------------


@run_app.command("start")
def run_start(
    spec: Annotated[Path | None, typer.Argument(help="TOML file with a [run] table.")] = None,
    task: Annotated[str | None, typer.Option(help="package.module:attribute or a short name.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    cohort: Annotated[int | None, typer.Option(min=1, help="Reports wanted per round.")] = None,
    min_reports: Annotated[int | None, typer.Option(min=1, help="Fewer and the round is repeated.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds per round.")] = None,
    name: Annotated[str, typer.Option(help="Shown in lists.")] = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Queue a training run; it starts as soon as enough devices are there."""
    from lepton_fl.files import BlobStore
    from lepton_fl.tasks import load_task, resolve
    from lepton_server.requests import RunFile, run_spec, with_teacher

    given = {
        "run.task": task,
        "run.rounds": rounds,
        "run.cohort.size": cohort,
        "run.cohort.min_reports": min_reports,
        "run.cohort.deadline_s": deadline,
        "run.name": name or None,
    }
    settings = load(config, {"server.state_dir": state_dir})
    wanted = run_spec(spec, given, RunFile, authority=settings.has_authority)
    installed = load_task(wanted.task)  # a wrong name fails here, not in the coordinator's log
    local = wanted.local if "local" in wanted.model_fields_set else installed.local
    wanted = wanted.model_copy(update={"task": resolve(wanted.task), "local": local})
    run_id = f"r-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    shown = wanted.name or wanted.task.rpartition(":")[2]
    with opened(settings) as store:
        wanted = with_teacher(wanted, installed, BlobStore(settings.blob_dir), partial(find_run, store))
        store.record("run.queued", run_id, {"run_id": run_id, "name": shown, "spec": wanted.to_json()})
    print_data({"id": run_id, "name": shown, "task": wanted.task, "state": "queued"}, format=format)


@run_app.command("list")
def run_list(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """All runs, the newest last."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        rows = [_run_row(run) for run in store.runs()]
    columns = ["id", "name", "state", "round", "rounds", "best", "queued", "waiting"]
    print_data(rows, format=format, title="Runs", columns=columns)


@run_app.command("show")
def run_show(
    run: RunArgument = "last",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """One run: state, what the coordinator sees of its devices, every round, each device in the last one."""
    from lepton_server.reach import coverage_of, floor_of
    from lepton_server.report import live, troubles

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        found = find_run(store, run)
        rounds = [_round_row(r) for r in store.rounds(found.id)]
        newest = max((int(r["round"]) for r in rounds), default=0)
        parts = [_plain(p) for p in store.participation(found.id, newest)] if newest else []
        reach = coverage_of(store, found)
        names = {d.id: d.name for d in store.devices()}
    now = live(settings.server.state_dir, found)
    row, seen = _run_row(found) | now.row(), _what_is_seen(found)
    row |= {"coverage": reach.sentence(), "flags": reach.flags(floor_of(found))}
    wrong = troubles(now, parts, names)
    if format == Format.JSON:
        more: dict[str, Any] = {"spec": dict(found.spec), "rounds_done": rounds}
        more |= {
            "participation": parts,
            "seen": seen,
            "wait": now.wait,
            "troubles": wrong,
            "coverage": reach.to_json(),
        }
        print_data(row | more, format=format)
        return
    print_data(row)
    print_data(wrong, title="What is wrong", columns=["device", "cause", "detail", "advice"])
    print_data([{"what the coordinator sees": sentence} for sentence in seen])
    print_data(rounds, title="Rounds")
    columns = ["attempt", "device_id", "outcome", "reason", "cause", "examples", "seconds", "bytes_up"]
    print_data(parts, title=f"Devices in round {newest}", columns=columns)


def _what_is_seen(run: "Run") -> list[str]:
    """In plain words; nothing for a run whose settings this version cannot read."""
    from pydantic import ValidationError

    from lepton_fl.plan import RunSpec
    from lepton_fl.rounds.visible import what_is_seen

    try:
        return list(what_is_seen(RunSpec.model_validate_json(json.dumps(dict(run.spec)))))
    except ValidationError:
        return []


@run_app.command("stop")
def run_stop(
    run: RunArgument,
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Stop a run: the round in hand gets ten seconds for the answers on their way. Its models stay."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_run(store, run)
        store.record("run.stopping", found.id, {"run_id": found.id, "reason": reason})
    print_data({"id": found.id, "state": "stopping"}, format=format)


@run_app.command("resume")
def run_resume(
    run: RunArgument = "last",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Queue an exhausted run again, after `lepton privacy budget` has raised what refused it."""
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        found = find_run(store, run)
        store.record("run.resumed", found.id, {"run_id": found.id})
    print_data({"id": found.id, "state": "queued"}, format=format)


@run_app.command("watch")
def run_watch(
    run: RunArgument = "last",
    timeout: Annotated[float, typer.Option(help="Give up after so many seconds; 0 = never.")] = 0.0,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Print each round as it is committed, until the run ends; exits 8 unless it completed."""
    ends = time.monotonic() + timeout if timeout else float("inf")
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        run_id = find_run(store, run).id
        for line in _follow(store, run_id, ends):
            typer.echo(json.dumps(line) if format == Format.JSON else _sentence(line))
        found = store.run(run_id)
    if not found.finished:
        raise RunError(f"Run {run_id} is still {found.state} after {timeout:g} s.", hint=found.waiting)
    if found.state != "completed":
        raise RunError(f"Run {run_id} {found.state}: {found.reason}")


@run_app.command("export")
def run_export(
    output: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    run: RunArgument = "last",
    best: Annotated[bool, typer.Option("--best", help="The best evaluated model, not the newest.")] = False,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Write a run's model as safetensors, tensor by tensor, with its lineage."""
    from lepton_fl.files import BlobStore
    from lepton_server.requests import export_model, lineage

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        found = find_run(store, run)
        sha256 = found.best_sha256 if best else found.model_sha256
        if sha256 is None:
            raise NotFound(f"Run {found.id} has no {'evaluated ' if best else ''}model yet.")
        known = lineage(store, found, sha256)
    size = export_model(BlobStore(settings.blob_dir), found, sha256, output, known)
    print_data({"file": str(output), "bytes": size, "model_sha256": sha256, "run": found.id}, format=format)


@run_app.command("journal")
def run_journal(
    run: RunArgument = "last",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; default: print it.")] = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
) -> None:
    """Export what happened in a run, as JSON lines; `lepton simulate --replay` plays it again."""
    from lepton_fl.files import write_atomic
    from lepton_server.requests import journal_lines

    with opened(load(config, {"server.state_dir": state_dir})) as store:
        lines = journal_lines(store, find_run(store, run))
        if output is not None:
            write_atomic(output, b"".join(lines))
            return
        for line in lines:
            typer.echo(line, nl=False)


# --- helpers ----------------------------------------------------------------------------------------


def _when(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _plain(record: object) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(record)  # type: ignore[call-overload, no-any-return]  # every view is a dataclass


def _device_row(device: Any) -> dict[str, Any]:  # noqa: ANN401 - store.Device, imported late
    tasks = device.reported.get("tasks", [])
    states = [
        f"{t['name'].rpartition(':')[2]} {'ready' if t['ready'] else t['reason'] or 'not ready'}"
        for t in tasks
    ]
    return {
        "id": device.id,
        "name": device.name,
        "state": device.state,
        "groups": list(device.groups),
        "last_seen": _when(device.last_seen),
        "status": device.status,
        "tasks": states,
    }


def _run_row(run: "Run") -> dict[str, Any]:
    best = (
        None if run.best_value is None else f"{run.best_metric} {run.best_value:.4g} (round {run.best_round})"
    )
    return {
        "id": run.id,
        "name": run.name,
        "state": run.state,
        "round": run.committed,
        "rounds": run.spec["rounds"],
        "best": best,
        "queued": _when(run.queued_at),
        "finished": _when(run.finished_at),
        "waiting": f"{run.waiting}, until {_when(run.waiting_until):%H:%M:%S} UTC" if run.waiting else None,
        "reason": run.reason,
        "model_sha256": run.model_sha256,
    }


def _round_row(record: Any) -> dict[str, Any]:  # noqa: ANN401 - store.Round, imported late
    figures = dict(record.metrics) | dict(record.evaluated)
    names = ("loss", "accuracy", "r2", "central_accuracy", "train_loss", "quantisation_error")
    short = {k: v for k, v in figures.items() if k in names}
    return {
        "round": record.round,
        "attempt": record.attempt,
        "state": record.state,
        "metrics": short if short else figures,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
        "cause": record.cause,
    }


_SHOWN = (
    "run.started",
    "run.waiting",
    "run.finished",
    "round.committed",
    "round.evaluated",
    "round.abandoned",
)


def _follow(store: "Store", run_id: str, ends: float) -> Iterator[dict[str, Any]]:
    """Events of a run as they come, as plain lines, until it has finished."""
    seen = 0
    while True:
        finished = store.run(run_id).finished
        for event in store.events(seen, kinds=_SHOWN, subject=run_id):
            seen = event.seq
            yield {"time": event.time, "kind": event.kind} | dict(event.body)
        if finished or time.monotonic() > ends:
            return
        time.sleep(POLL_S)


def _who(line: dict[str, Any]) -> str:
    """Whom a finished run was made of, and what is below the floor that was asked for."""
    from lepton_fl.rounds.coverage import Coverage

    if not line.get("coverage"):
        return ""  # of an older coordinator
    words = [Coverage.from_json(line["coverage"]).sentence(), *(f"FLAGGED: {f}" for f in line["flags"])]
    return "".join(f"\n{sentence}" for sentence in words)


def _sentence(line: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{k} {v:.4g}" for k, v in line.get("metrics", {}).items() if isinstance(v, int | float)
    )
    counted = sum(p["outcome"] == "counted" for p in line.get("participation", []))
    asked = len(line.get("participation", []))
    match line["kind"]:
        case "round.committed":
            megabytes = (line["bytes_up"] + line["bytes_down"]) / 1e6
            head = f"round {line['round']:>4}  {counted} of {asked} reports"
            return f"{head}  {line['seconds']:6.2f} s  {megabytes:8.2f} MB  {figures}"
        case "round.evaluated":
            return f"round {line['round']:>4}  evaluated by {counted}: {figures}"
        case "round.abandoned":
            return f"round {line['round']:>4}  abandoned: {line['cause']}"
        case "run.waiting":
            return f"waiting: {line['cause']}" if line["cause"] else "moving again"
        case "run.started":
            return "started"
        case "run.finished":
            return f"{line['verdict']}: {line['reason']}{_who(line)}"
    return str(line["kind"])
