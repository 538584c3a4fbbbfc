"""What the operator's commands share: options, configuration, the store, names of devices and runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.errors import NotFound, TrustError

if TYPE_CHECKING:
    from lepton_server.config import ServerConfig
    from lepton_server.store import Device, Run, Store

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The coordinator's TOML file; see server/server.toml.")
]
StateOption = Annotated[Path | None, typer.Option("--state-dir", help="Folder of keys, database and models.")]


def load(path: Path | None, given: dict[str, Any]) -> "ServerConfig":
    """The checked configuration; ``given`` are overrides by dotted key, None = not given."""
    from lepton_fl.config import load as read
    from lepton_server.config import ServerConfig

    return read(ServerConfig, path, overrides=given).value


@contextmanager
def opened(settings: "ServerConfig", *, make: bool = False) -> Iterator["Store"]:
    """The coordinator's state; only a first start and a first token make one, a typing error does not."""
    from lepton_fl.files import make_private_folder
    from lepton_server.lease import refuse_unfinished
    from lepton_server.store import open_store

    folder = settings.server.state_dir
    refuse_unfinished(folder)
    if make:
        make_private_folder(folder)
    elif settings.database_file is not None and not settings.database_file.exists():
        raise NotFound(
            f"There is no coordinator's state in {folder.absolute()}.",
            hint="Name its folder with --state-dir or --config, or start `lepton server` there first.",
        )
    with open_store(settings.store_url) as store:
        yield store


def read_passphrase(file: Path) -> bytes:
    """The first line of a private file; TrustError if it is empty or others can read it."""
    from lepton_fl.files import read_private

    secret = read_private(file).split(b"\n", 1)[0].strip()
    if not secret:
        raise TrustError(f"The first line of {file} is empty; it should hold the passphrase.")
    return secret


def find_device(store: "Store", wanted: str) -> "Device":
    """The device of that id or name; raises NotFound."""
    from lepton_fl.crypto import is_device_id

    if is_device_id(wanted):
        return store.device(wanted)
    found = [d for d in store.devices() if d.name == wanted]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} devices are named" if found else "There is no device"
    raise NotFound(f"{problem} {wanted!r}.", hint="`lepton devices list` shows their ids.")


def find_run(store: "Store", wanted: str) -> "Run":
    """The run of that id, of that unique beginning of an id, or the last one; raises NotFound."""
    runs = store.runs()
    if wanted == "last":
        found = runs[-1:]
    else:
        found = [r for r in runs if r.id == wanted] or [r for r in runs if r.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"There is no run {wanted!r}.", hint="`lepton run list` shows them.")
    raise NotFound(f"{len(found)} runs begin with {wanted!r}.", hint="Give more of the id.")
