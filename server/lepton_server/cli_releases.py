"""``lepton keys`` and ``lepton release``: sign variants, and say which device should serve which.

The root and targets keys are the operator's, in a folder that need not be on the coordinator: a removable
disk (``--keys``), or another machine that holds a copy of the release folder (``--shelf``), from which
``release import`` brings what was signed. Importing this module imports none of its weight.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, is_terminal, print_data, say
from lepton_fl.errors import ConfigError, NotFound
from lepton_server.commands import ConfigOption, StateOption, find_device, load, opened, read_passphrase

if TYPE_CHECKING:
    from lepton_fl.delivery.manifest import Manifest
    from lepton_fl.delivery.shelf import Shelf
    from lepton_server.config import ServerConfig
    from lepton_server.store import Device

keys_app = typer.Typer(help="The keys that sign releases.", no_args_is_help=True)
release_app = typer.Typer(help="Sign variants as releases and hand them out.", no_args_is_help=True)

KeysOption = Annotated[
    list[Path],
    typer.Option("--keys", help="Folder of root and targets keys, on a disk that you take away; repeatable."),
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        envvar="LEPTON_KEYS_PASSPHRASE_FILE",
        help="Private file (mode 0600) whose first line is the keys' passphrase; without it you are asked.",
    ),
]
NoPassphraseOption = Annotated[
    bool, typer.Option("--no-passphrase", help="Do not encrypt: the disk itself is, or it is a test.")
]
ShelfOption = Annotated[
    Path | None,
    typer.Option(help="Release folder; default: the coordinator's. On a signing machine: a copy of it."),
]
ReleaseArgument = Annotated[
    str, typer.Argument(help="A beginning of its SHA-256, VARIANT@SEQUENCE, or VARIANT for its newest.")
]
DeviceOption = Annotated[list[str] | None, typer.Option("--device", help="Id or name; repeatable.")]
GroupOption = Annotated[
    list[str] | None, typer.Option("--group", help="All devices with this label; repeatable.")
]
CountOption = Annotated[int, typer.Option(min=1, max=16)]


# --- keys -------------------------------------------------------------------------------------------


@keys_app.command("init")
def keys_init(
    keys: Annotated[Path, typer.Option("--keys", help="New folder for the root and targets keys.")],
    root_keys: CountOption = 1,
    root_threshold: CountOption = 1,
    targets_keys: CountOption = 1,
    targets_threshold: CountOption = 1,
    passphrase_file: PassphraseOption = None,
    no_passphrase: NoPassphraseOption = False,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Make all keys and an empty list of releases. Then take the --keys folder away from the coordinator."""
    from lepton_fl.delivery.keys import OFFLINE, ONLINE, new_key
    from lepton_server.releases import online_keys, shelf_of

    settings = load(config, {"server.state_dir": state_dir})
    if settings.database_file is not None and not settings.database_file.exists():
        with opened(settings, make=True):
            pass
    shelf = shelf_of(settings)
    if shelf.repository.exists:
        raise ConfigError(
            f"{shelf.folder} has keys already.", hint="`lepton keys rotate` replaces keys, `show` lists them."
        )
    counts = {"root": root_keys, "targets": targets_keys}
    secret = None if no_passphrase else _new_passphrase(passphrase_file)
    signers = {role: [new_key(keys, role, secret) for _ in range(counts[role])] for role in OFFLINE}
    signers |= {role: [new_key(online_keys(settings), role, None)] for role in ONLINE}
    shelf.repository.create(signers, {"root": root_threshold, "targets": targets_threshold})
    _print_keys(shelf, settings, format)
    say(f"Take {keys} away now and keep a second copy: without the root key no device learns of new keys.")


@keys_app.command("show")
def keys_show(
    shelf: ShelfOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Which keys count for which role, how many must sign, and when each file ends."""
    settings = load(config, {"server.state_dir": state_dir})
    _print_keys(_shelf(settings, shelf), settings, format)


@keys_app.command("rotate")
def keys_rotate(
    role: Annotated[str, typer.Argument(help="root, targets, snapshot or timestamp.")],
    keys: KeysOption,
    passphrase_file: PassphraseOption = None,
    no_passphrase: NoPassphraseOption = False,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Replace the keys of a role; needs the root keys. Devices follow at their next download."""
    from lepton_fl.delivery.keys import OFFLINE, ROLES, need_keys, new_key
    from lepton_fl.files import remove
    from lepton_server.releases import online_keys

    if role not in ROLES:
        raise ConfigError(f"Expected one of {', '.join(ROLES)} as a role, got {role!r}.")
    settings = load(config, {"server.state_dir": state_dir})
    shelf = _shelf(settings, None)
    secret = _secret_reader(passphrase_file)
    root = shelf.repository.root().signed
    old = root.roles["root"]
    signers = {"root": need_keys(keys, "root", set(old.keyids), old.threshold, secret)}
    count = len(root.roles[role].keyids)
    if role in OFFLINE:
        passphrase = None if no_passphrase else _new_passphrase(passphrase_file)
        new = [new_key(keys[0], role, passphrase) for _ in range(count)]
    else:
        new = [new_key(online_keys(settings), role, None) for _ in range(count)]
    shelf.repository.rotate(role, new, signers)
    _refresh(shelf, settings)
    if role not in OFFLINE:
        kept = {f"{role}-{signer.public_key.keyid[:16]}" for signer in new}
        for path in online_keys(settings).glob(f"{role}-*.pem"):
            if path.stem not in kept:
                remove(path)
    _print_keys(shelf, settings, format)
    if role in OFFLINE:
        say(f"The old {role} keys count for nothing any more: destroy their files.")


@keys_app.command("renew")
def keys_renew(
    keys: KeysOption,
    passphrase_file: PassphraseOption = None,
    shelf: ShelfOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Sign the list of releases, and root where its keys are there, for another life."""
    from lepton_fl.delivery.keys import OFFLINE, load_keys

    settings = load(config, {"server.state_dir": state_dir})
    here = _shelf(settings, shelf)
    root, secret = here.repository.root().signed, _secret_reader(passphrase_file)
    signers = {
        role: [s for folder in keys for s in load_keys(folder, role, set(root.roles[role].keyids), secret)]
        for role in OFFLINE
    }
    if not any(signers.values()):
        raise NotFound(f"No root or targets key that counts lies in {', '.join(map(str, keys))}.")
    here.repository.renew(signers)
    _refresh(here, settings, only_if_here=shelf is not None)
    _print_keys(here, settings, format)


# --- releases ---------------------------------------------------------------------------------------


@release_app.command("publish")
def release_publish(
    variants: Annotated[list[Path], typer.Argument(help="Folders of variants (`lepton variants build`).")],
    keys: KeysOption,
    passphrase_file: PassphraseOption = None,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="Also variants that were held against no device profile.")
    ] = False,
    shelf: ShelfOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Sign variants with the targets keys: devices may take them from now on, none does before it is told."""
    settings = load(config, {"server.state_dir": state_dir})
    here = _shelf(settings, shelf)
    made = here.publish(variants, _targets_signers(here, keys, passphrase_file), ungated=ungated)
    if shelf is None:
        _record(settings, here)
    _refresh(here, settings, only_if_here=shelf is not None)
    rows = [{"release": name} | manifest.summary() | _saved(manifest) for name, manifest in made]
    print_data(rows, format=format, title="Released", columns=_COLUMNS)


@release_app.command("import")
def release_import(
    folder: Annotated[Path, typer.Argument(help="A copy of the release folder in which was published.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Take over what was signed on another machine; signatures are checked before anything is kept."""
    settings = load(config, {"server.state_dir": state_dir})
    here, other = _shelf(settings, None), _shelf(settings, folder)
    made = [(name, other.manifest(name)) for name in here.take_from(other)]
    _record(settings, here)
    _refresh(here, settings)
    rows = [{"release": name} | manifest.summary() for name, manifest in made]
    print_data(rows, format=format, title="Imported", columns=_COLUMNS)


@release_app.command("list")
def release_list(
    shelf: ShelfOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """All signed releases, the newest of each task last."""
    here = _shelf(load(config, {"server.state_dir": state_dir}), shelf)
    rows = [{"release": name} | row for name, row in here.repository.releases().items()]
    print_data(rows, format=format, title="Releases", columns=_COLUMNS)


@release_app.command("show")
def release_show(
    release: ReleaseArgument,
    shelf: ShelfOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """One release: files, lineage, and what a download costs."""
    here = _shelf(load(config, {"server.state_dir": state_dir}), shelf)
    name = here.find(release)
    manifest = here.manifest(name)
    files = [
        {
            "name": f.name,
            "bytes": f.bytes,
            "sha256": f.sha256,
            "packs": [
                f"{p.bytes} bytes, {p.transform}{' to ' + p.base[:12] if p.base else ''}" for p in f.packs
            ],
        }
        for f in manifest.files
    ]
    row = {"release": name} | manifest.summary() | {"lineage": manifest.lineage.to_json()}
    if format == Format.JSON:
        print_data(row | {"files": files}, format=format)
        return
    print_data(row)
    print_data(files, title="Files")


@release_app.command("withdraw")
def release_withdraw(
    release: ReleaseArgument,
    keys: KeysOption,
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "",
    passphrase_file: PassphraseOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Take a release off the list: no device installs it any more; those that serve it go on.

    Cut off and repeated, with a beginning of the release's SHA-256, it goes on where it was.
    """
    from lepton_server.releases import forget

    settings = load(config, {"server.state_dir": state_dir})
    here = _shelf(settings, None)
    signers, name = _targets_signers(here, keys, passphrase_file), release
    with contextlib.suppress(NotFound):  # off the list already: the journal may not have heard
        name = here.find(release)
        here.repository.withdraw(name, signers)
    with opened(settings) as store:
        name = forget(store, here, name, reason)
    here.tidy()
    _refresh(here, settings)
    print_data({"release": name, "state": "withdrawn"}, format=format)


@release_app.command("assign")
def release_assign(
    release: ReleaseArgument,
    device: DeviceOption = None,
    group: GroupOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Have devices serve a release. Again for the same one: devices that gave it up try once more."""
    settings = load(config, {"server.state_dir": state_dir})
    name = _shelf(settings, None).find(release)
    _assign(settings, name, device, group, format)


@release_app.command("unassign")
def release_unassign(
    device: DeviceOption = None,
    group: GroupOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Ask nothing of devices any more: each keeps what it serves."""
    _assign(load(config, {"server.state_dir": state_dir}), None, device, group, format)


@release_app.command("status")
def release_status(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """What each device should serve, serves, and could not take, as of its last report."""
    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        devices = [device for device in store.devices() if device.state == "active"]
    here = _shelf(settings, None)
    rows = here.repository.releases() if here.repository.exists else {}
    names = {name: f"{row['variant']}@{row['sequence']}" for name, row in rows.items()}
    print_data(
        [_status_row(found, names) for found in devices],
        format=format,
        title="Releases on devices",
        columns=["device", "name", "profile", "assigned", "serving", "failed"],
    )


_COLUMNS = ["release", "variant", "sequence", "run", "round", "bytes", "profiles", "published"]


def _status_row(device: "Device", names: dict[str, str]) -> dict[str, Any]:
    from lepton_server.releases import assigned_release

    told = device.reported.get("serving") or {}
    wanted, serving = assigned_release(device.desired), told.get("release", "")
    failed = told.get("failed", [])
    return {
        "device": device.id,
        "name": device.name,
        "groups": list(device.groups),
        "task": told.get("task", ""),
        "profile": told.get("profile", ""),
        "assigned": names.get(wanted or "", wanted),
        "assigned_release": wanted,
        "serving": names.get(serving, serving) or None,
        "serving_release": serving or None,
        "failed": [f"{names.get(f['release'], f['release'][:12])}: {f['fault']}" for f in failed],
        "failures": failed,
    }


# --- helpers ----------------------------------------------------------------------------------------


def _shelf(settings: "ServerConfig", folder: Path | None) -> "Shelf":
    from lepton_fl.delivery.shelf import Shelf
    from lepton_server.releases import shelf_of

    if folder is None:
        return shelf_of(settings)
    if not (folder / "metadata").is_dir():
        raise NotFound(
            f"{folder} is no release folder: it has no metadata.", hint="Copy the coordinator's, all of it."
        )
    return Shelf(folder)


def _targets_signers(shelf: "Shelf", keys: list[Path], passphrase_file: Path | None) -> list[Any]:
    from lepton_fl.delivery.keys import need_keys

    role = shelf.repository.root().signed.roles["targets"]
    return need_keys(keys, "targets", set(role.keyids), role.threshold, _secret_reader(passphrase_file))


def _refresh(shelf: "Shelf", settings: "ServerConfig", *, only_if_here: bool = False) -> None:
    """Sign snapshot and timestamp at once where their keys are; else the coordinator does, in a second."""
    from lepton_server.releases import online_keys, online_signers

    folder = online_keys(settings)
    if only_if_here or not folder.is_dir():
        return
    shelf.repository.refresh(online_signers(shelf, folder))


def _record(settings: "ServerConfig", shelf: "Shelf") -> None:
    from lepton_server.releases import adopt

    with opened(settings) as store:
        adopt(store, shelf)


def _saved(manifest: "Manifest") -> dict[str, object]:
    """What devices fetch instead of all bytes, where something smaller is offered."""
    least = sum(min([f.bytes, *(p.bytes for p in f.packs)]) for f in manifest.files)
    return {"least_bytes": least}


def _assign(
    settings: "ServerConfig",
    name: str | None,
    devices: list[str] | None,
    groups: list[str] | None,
    format: Format,
) -> None:
    from lepton_server.releases import assign
    from lepton_server.rollouts import check_free

    if not devices and not groups:
        raise ConfigError("No device was named.", hint="Give --device or --group.")
    wanted = set(groups or ())
    with opened(settings) as store:
        chosen = {find_device(store, device).id for device in devices or ()}
        members = {d.id for d in store.devices() if d.state == "active" and wanted & set(d.groups)}
        if groups and not members:
            raise NotFound(f"No enrolled device has the label {' or '.join(sorted(wanted))}.")
        check_free(store, chosen | members)
        count = assign(store, sorted(chosen | members), name)
    print_data({"release": name, "devices": count}, format=format)


def _print_keys(shelf: "Shelf", settings: "ServerConfig", format: Format) -> None:
    from lepton_fl.delivery.keys import ROLES
    from lepton_fl.files import sha256_hex
    from lepton_server.releases import online_keys

    repository = shelf.repository
    root, ends = repository.root().signed, repository.expiries()
    here = {path.stem for path in online_keys(settings).glob("*.pem")}
    rows = [
        {
            "role": role,
            "threshold": root.roles[role].threshold,
            "keys": sorted(key[:16] for key in root.roles[role].keyids),
            "here": sum(f"{role}-{key[:16]}" in here for key in root.roles[role].keyids),
            "ends": ends.get(role),
        }
        for role in ROLES
    ]
    first = sha256_hex(repository.read("1.root.json"))
    if format == Format.JSON:
        print_data({"roles": rows, "root_version": root.version, "first_root_sha256": first}, format=format)
        return
    print_data(rows, title="Keys")
    say(f"Root version {root.version}. Devices pin the first root, SHA-256 {first}.")


def _new_passphrase(file: Path | None) -> bytes:
    if file is not None:
        return read_passphrase(file)
    return _ask("Passphrase for the new keys", confirm=True)


def _secret_reader(file: Path | None) -> Callable[[Path], bytes]:
    """Asks once, and only when a key turns out to be encrypted."""
    known: list[bytes] = []

    def secret(path: Path) -> bytes:
        if not known:
            known.append(read_passphrase(file) if file is not None else _ask(f"Passphrase of {path.name}"))
        return known[0]

    return secret


def _ask(words: str, *, confirm: bool = False) -> bytes:
    if not is_terminal() or not os.isatty(0):
        raise ConfigError(
            "A passphrase is needed and there is no terminal to ask at.",
            hint="Give --passphrase-file, or `--no-passphrase` where keys are made.",
        )
    answer: str = typer.prompt(words, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer.encode()
