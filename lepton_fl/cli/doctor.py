"""``lepton doctor``: is this machine fit for a role? It looks and never changes anything.

A package adds checks by an entry point in the group ``lepton.doctor``: a callable that takes a ``Context``
and returns ``Check`` records. It is called for every ``lepton doctor``: it looks at ``context.role`` first,
imports heavy things late, and neither writes nor leaves anything behind. One that fails is a failed check;
one that has the name of an earlier check replaces it (a role knows whose process has its ports).
"""

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl import __version__
from lepton_fl.cli.config import ConfigOption, role_model
from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.errors import LeptonError

if TYPE_CHECKING:
    from lepton_fl.config import Resolved

GROUP = "lepton.doctor"
LEAST_PYTHON = (3, 11)
LEAST_DISK = 2**29  # bytes free where the state is; models and a journal need room to grow
ROLE_EXTRAS = {"server": "server", "client": "client", "simulation": "sim"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str  # what was seen
    hint: str = ""  # what to do, if not ok


@dataclass(frozen=True, slots=True)
class Context:
    """What a check may look at."""

    role: str | None  # the role asked about; None: the machine only
    config: "Resolved[Any] | None"  # that role's configuration, if it is valid
    rebuild: bool  # also do what takes long: prove that stored projections follow from the journal


def doctor(
    role: Annotated[
        str | None, typer.Argument(metavar="[ROLE]", help="server, client or simulation: check it as well.")
    ] = None,
    config: ConfigOption = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Server: rebuild all tables from the journal, in memory, and compare."
        ),
    ] = False,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check this machine, and a role's configuration and state. Changes nothing; exits 1 if a check fails."""
    if (config or rebuild) and role is None:
        raise typer.BadParameter("--config and --rebuild need a ROLE: lepton doctor server --config FILE")
    checks = examine(role, config, rebuild=rebuild)
    failed = [check for check in checks if not check.ok]
    if format == Format.JSON:
        print_data({"ok": not failed, "checks": checks}, format=format)
    else:
        rows = [{"check": c.name, "result": "ok" if c.ok else "FAILED", "detail": c.detail} for c in checks]
        print_data(rows, title=f"lepton {__version__}")
        for check in failed:
            say(f"{check.name}: {check.hint or 'see above'}")
    if failed:
        raise typer.Exit(1)


def examine(role: str | None = None, path: Path | None = None, *, rebuild: bool = False) -> list[Check]:
    """All checks for a role, or those of the machine."""
    checks = [_python(), _clock(), *_extras(role)]
    config = None
    if role is not None:
        config, check = _configuration(role, path)
        checks.append(check)
    if config is not None:
        checks += [*_state_folders(config), *_ports(config)]
    else:
        checks.append(_disk("disk", Path.cwd()))
    context = Context(role, config, rebuild)
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        checks += _contributed(entry, context)
    return list({check.name: check for check in checks}.values())


def _contributed(entry: metadata.EntryPoint, context: Context) -> list[Check]:
    try:
        function: Callable[[Context], Iterable[Check]] = entry.load()
        return list(function(context))
    except LeptonError as error:
        return [Check(entry.name, False, str(error), error.hint)]
    except Exception as error:  # noqa: BLE001 -- one broken check must not hide the others
        return [Check(entry.name, False, f"the check itself failed: {type(error).__name__}: {error}")]


# --- the machine ------------------------------------------------------------------------------------------


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    least = ".".join(map(str, LEAST_PYTHON))
    return Check("python", sys.version_info >= LEAST_PYTHON, version, f"install Python {least} or newer")


def _clock() -> Check:
    """The clock cannot be before the files of this very program; certificates depend on it."""
    now, written = time.time(), Path(__file__).stat().st_mtime
    seen = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < written - 86_400:
        return Check("clock", False, f"{seen}, earlier than this program's files", "set the clock; run NTP")
    return Check("clock", True, seen)


def _extras(role: str | None) -> Iterator[Check]:
    """Which extras are complete. A missing one is a fault only if the role needs it."""
    needed = ROLE_EXTRAS.get(role or "")
    for extra in ("client", "train", "server", "sim"):
        missing = missing_packages(extra)
        ok = extra != needed or not missing
        detail = f"not installed: {', '.join(missing)}" if missing else "complete"
        yield Check(f"packages [{extra}]", ok, detail, f"pip install 'lepton-fl[{extra}]'")


def missing_packages(extra: str) -> list[str]:
    """Distributions that an extra asks for and that are not installed, extras of extras included."""
    missing = []
    for requirement in metadata.requires("lepton-fl") or ():
        name, _, marker = requirement.partition(";")
        if marker.split("==")[-1].strip().strip("'\"") != extra or "extra" not in marker:
            continue
        name, _, inner = name.strip().partition("[")
        base = "".join(char if char.isalnum() or char in "-_." else " " for char in name).split()[0]
        if base == "lepton-fl":
            missing += [item for part in inner.split("]")[0].split(",") for item in missing_packages(part)]
        elif not _installed(base):
            missing.append(base)
    return sorted(set(missing))


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- a role -----------------------------------------------------------------------------------------------


def _configuration(role: str, path: Path | None) -> "tuple[Resolved[Any] | None, Check]":
    from lepton_fl.config import load

    model = role_model(role)
    try:
        resolved = load(model, path)
    except LeptonError as error:
        return None, Check("configuration", False, str(error), error.hint)
    return resolved, Check("configuration", True, str(path or "defaults"))


def _state_folders(config: "Resolved[Any]") -> Iterator[Check]:
    for setting in config.settings():
        if setting.key.split(".")[-1] != "state_dir":
            continue
        folder = Path(setting.value)
        yield _writable(setting.key, folder)
        yield _disk(f"{setting.key} space", folder)


def _writable(name: str, folder: Path) -> Check:
    """Whether the folder, or the one it would be made in, can be written; by asking, not by writing."""
    there = _existing(folder)
    if not there.is_dir():
        return Check(name, False, f"{there} is not a folder", "choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(
            name, False, f"{there} cannot be written by user {os.geteuid()}", "change its owner or the path"
        )
    return Check(name, True, str(folder) if there == folder else f"{folder} (will be made)")


def _disk(name: str, folder: Path) -> Check:
    free = shutil.disk_usage(_existing(folder)).free
    least = f"{LEAST_DISK / 2**20:.0f} MiB"
    return Check(name, free >= LEAST_DISK, f"{free / 2**20:,.0f} MiB free", f"make room: at least {least}")


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _ports(config: "Resolved[Any]") -> Iterator[Check]:
    """Every ``X_port`` on ``X_host`` of its section, or on ``host``."""
    values = {setting.key: setting.value for setting in config.settings()}
    for key, port in values.items():
        section, _, name = key.rpartition(".")
        if not isinstance(port, int) or not port or not (name == "port" or name.endswith("_port")):
            continue
        stem = name.removesuffix("port")
        host = values.get(f"{section}.{stem}host") or values.get(f"{section}.host")
        if host:  # no host: another machine's port
            yield _port(key, str(host), port)


def _port(key: str, host: str, port: int) -> Check:
    """Bind without listening: nobody outside can notice."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        hint = f"another program, or a running server, has it; otherwise set {key} to a free port"
        return Check(key, False, f"{host}:{port} cannot be used: {error.strerror or error}", hint)
    return Check(key, True, f"{host}:{port} is free")
