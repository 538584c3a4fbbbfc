"""What ``lepton doctor server`` looks at besides the machine: the coordinator's state. It changes nothing."""

import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_fl.cli.doctor import Check, Context
from lepton_fl.errors import LeptonError

if TYPE_CHECKING:
    from lepton_server.config import ServerConfig
    from lepton_server.store import Store

LOCK_FILE = "coordinator.lock"  # in the state folder; held by the coordinator that uses it
SOON_S = 30 * 86_400.0  # a CA that ends within this must be dealt with now


def checks(context: Context) -> Iterator[Check]:
    """The checks of the server's state; nothing for other roles."""
    if context.role != "server" or context.config is None:
        return
    config: ServerConfig = context.config.value
    yield from _coordinator(config)
    yield from _certificates(config)
    if config.database_file is not None and not config.database_file.exists():
        yield Check("database", True, f"{config.database_file} (will be made)")
        return
    from lepton_server.store import open_store

    try:
        store = open_store(config.store_url)
    except LeptonError as error:
        yield Check("database", False, str(error), error.hint)
        return
    with store:
        yield Check("database", True, f"{len(store.devices())} devices, {len(store.runs())} runs")
        yield from _journal(store, context.rebuild)
        yield _blobs(config, store)


def owner(state_dir: Path) -> str:
    """The process id of the coordinator that uses a state folder; '' when none does."""
    try:
        with open(state_dir / LOCK_FILE, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "unknown"
    except OSError:
        pass
    return ""


def _coordinator(config: "ServerConfig") -> Iterator[Check]:
    """Whether it runs; then the ports that it has are not taken by somebody else."""
    process = owner(config.server.state_dir)
    yield Check("coordinator", True, f"running, process {process}" if process else "not running")
    if process:
        for key, port in config.listen.model_dump().items():
            if key.endswith("_port") and port:
                yield Check(f"listen.{key}", True, f"{port}: the running coordinator's")


def _certificates(config: "ServerConfig") -> Iterator[Check]:
    from cryptography import x509

    for name, bound in (("ca.pem", SOON_S), ("server.pem", 0.0)):  # the server's is renewed by itself
        path = config.server.state_dir / "keys" / name
        if not path.exists():
            yield Check(name, True, "not made yet")
            continue
        try:
            pem = path.read_bytes()
            found = x509.load_pem_x509_certificate(pem[pem.find(b"-----BEGIN CERTIFICATE-----") :])
        except (OSError, ValueError) as error:
            yield Check(name, False, f"{path} cannot be read: {error}", "restore the folder from a copy")
            continue
        left = found.not_valid_after_utc.timestamp() - time.time()
        detail = f"until {found.not_valid_after_utc:%Y-%m-%d}"
        hint = "every device must enrol anew with a new CA: plan it" if bound else "restart the coordinator"
        yield Check(name, left > bound, detail, hint)


def _journal(store: "Store", rebuild: bool) -> Iterator[Check]:
    """The newest event against the journal's head; with ``--rebuild`` the whole chain and all tables."""
    head = store.head()
    if not rebuild:
        last = store.events(head.seq - 1) if head.seq else []
        fits = not head.seq or any((event.seq, event.hash) == head for event in last)
        detail = f"{head.seq} events, head {head.hash[:12]}"
        yield Check("journal", fits, detail, "run with --rebuild; restore the database from a copy")
        return
    report = store.rebuild()  # checks every link of the chain on the way
    yield Check("journal", True, f"{report.head.seq} events verified, head {report.head.hash[:12]}")
    if report.equal:
        yield Check("projections", True, f"{sum(report.rows.values())} rows follow from the journal")
        return
    shown = "; ".join(report.differences[:10])
    hint = "stop the coordinator and restore the database from a copy; the journal itself is intact"
    yield Check("projections", False, f"{report.different} rows differ: {shown}", hint)


def _blobs(config: "ServerConfig", store: "Store") -> Check:
    """What unfinished runs need to go on."""
    folder, missing = config.blob_dir, []
    for run in (r for r in store.runs() if not r.finished):
        models = [m.sha256 for m in store.models(run.id) if m.round == run.committed]
        newest = [r for r in store.rounds(run.id) if r.round == run.committed and r.state == "committed"]
        for sha256 in filter(None, [*models, *(r.state_sha256 for r in newest)]):
            if not (folder / sha256[:2] / sha256[2:]).is_file():
                missing.append(f"{sha256[:12]} of run {run.id}")
    if missing:
        return Check("models", False, f"missing: {', '.join(missing)}", f"restore {folder} from a copy")
    return Check("models", True, f"those of unfinished runs are in {folder}")
