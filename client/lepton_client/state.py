"""What a device keeps on disk: its key, its identity, its status, a lock, and what it remembers of runs.

Rules:

* A device is enrolled if and only if ``identity.json`` is there; it appears and changes by one rename.
* The key is made once and never leaves the folder. An enrolment that was cut off is completed with it.
* One agent per folder. The lock is the kernel's, so it ends with the process however that ends.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from lepton_fl.errors import NotFound, StateCorrupt, StateError, StateLocked, StateTooNew
from lepton_fl.files import canonical_json, make_private_folder, read_private, write_atomic, write_private

FORMAT: Final = 1  # of the files in the folder
MAX_FILE_BYTES: Final = 2**22  # none of ours is larger
# In the delivery folder: the serving process writes them, the agent reports them.
COUNTED: Final = "service.json"
GIVEN_UP: Final = "given_up.json"  # a release that it cannot serve, until that is out of service


@dataclass(frozen=True)
class Identity:
    """Who this device is to its coordinator; the private key is kept apart."""

    device_id: str
    name: str
    certificate_pem: str
    ca_pem: str
    enrolment: str  # host:port of Enroll and Renew
    device_service: str  # host:port of CheckIn and Wait
    fleet: str  # host:port of Flower's fleet API
    token_sha256: str  # of the secret it joined with, to know that token again
    valid_from: float  # of the certificate, UTC seconds; kept so that an idle agent need not decode it
    valid_until: float
    authority: str = ""  # the enrolment authority's public key, hexadecimal; empty = none is pinned yet

    @property
    def ends(self) -> str:
        """When the certificate ends, for people."""
        return datetime.fromtimestamp(self.valid_until, UTC).strftime("%Y-%m-%d %H:%M UTC")


class StateDir:
    """The files of one device in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "device.key"
        self.ledger = folder / "ledger.json"
        self.contracts = folder / "contracts.json"
        self.memory = folder / "memory"
        self.objects = folder / "objects"  # parts of models from earlier rounds
        self.signing_key = folder / "signing.key"
        self.signing = folder / "signing.json"  # the certificate of the signing key
        self.signed = folder / "signed.jsonl"  # which survivor set was signed in which round
        self.delivery = folder / "delivery"
        self.spending = folder / "budget.jsonl"
        self.trials = folder / "trials.json"
        self.witness = folder / "ledger_head.json"  # the newest head of the coordinator's privacy ledger
        self._identity = folder / "identity.json"
        self._status = folder / "status.json"
        self._lock = folder / "agent.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; makes it if it is missing.

        Raises:
            StateLocked: another process holds it; the message names its pid.
            StateError: the folder cannot be made or written.
        """
        make_private_folder(self.folder)
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(
                f"Cannot write to {self.folder}: {error.strerror}.",
                hint="Make the state folder writable for this user, or choose another with --state-dir.",
            ) from error
        try:
            self._take(descriptor)
            self._sweep()
            yield
        finally:
            os.close(descriptor)  # the file stays: removing it would race with the next holder

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise StateLocked(
                f"The state folder {self.folder} is in use by the process with pid {pid}.",
                hint=f"Stop it (kill {pid}), or give this agent another folder with --state-dir.",
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only the pid is missing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written; nobody else writes while we hold the lock."""
        with contextlib.suppress(OSError):
            for leftover in (*self.folder.glob(".*.tmp"), *self.memory.glob(".*.tmp")):
                leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ identity

    def identity(self) -> Identity:
        """Who this device is.

        Raises:
            NotFound: it is not enrolled.
            StateCorrupt, StateTooNew: the file cannot be used.
        """
        try:
            raw = read_private(self._identity)
        except NotFound:
            raise NotFound(
                f"This device is not enrolled: there is no {self._identity}.",
                hint="Run `lepton client enroll --token TOKEN` with a token of your operator.",
            ) from None
        return _identity_from(raw, self._identity)

    def is_enrolled(self) -> bool:
        """Whether there is an identity."""
        return self._identity.exists()

    def save_identity(self, identity: Identity) -> None:
        """Replace the identity, durably.

        Raises:
            DiskFull, StateError: it could not be written; the old one is unchanged.
        """
        write_private(self._identity, canonical_json({"format": FORMAT} | asdict(identity)))

    # -------------------------------------------------------------------------------------------- status

    def save_status(self, status: dict[str, Any]) -> None:
        """Replace what ``lepton client status`` shows; raises DiskFull or StateError."""
        write_atomic(self._status, canonical_json({"format": FORMAT} | status), mode=0o600)

    def status(self) -> dict[str, Any]:
        """What the agent last said of itself; empty if it never ran.

        Raises:
            StateCorrupt, StateTooNew: the file cannot be used.
        """
        try:
            return _decode(read_private(self._status), self._status)
        except NotFound:
            return {}

    def holder(self) -> int:
        """The pid of the agent that holds the folder now; 0 when none does."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            return int(text) if text.isdecimal() else 0
        else:
            return 0
        finally:
            os.close(descriptor)


def given_up(folder: Path) -> dict[str, Any]:
    """The ``release`` that the serving process cannot serve, its ``fault`` and ``detail``; {} = none."""
    try:
        found = json.loads((folder / GIVEN_UP).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity_from(raw: bytes, path: Path) -> Identity:
    body = _decode(raw, path)
    kinds: dict[str, type] = {f.name: float if f.type in (float, "float") else str for f in fields(Identity)}
    body = {"authority": ""} | body  # not in files of before there was one
    if set(body) != set(kinds) or not all(isinstance(body[name], kind) for name, kind in kinds.items()):
        raise StateCorrupt(
            f"{path} does not hold the fields of an identity.",
            hint="Restore the folder from a backup, or remove it and enrol again with a new token.",
        )
    return Identity(**body)


def _decode(raw: bytes, path: Path) -> dict[str, Any]:
    """A file of ours, without its format number."""
    try:
        body = json.loads(raw[:MAX_FILE_BYTES])
        written_as = body.pop("format")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise StateCorrupt(
            f"{path} is damaged: it is not the JSON that was written.", hint="Remove it, or restore it."
        ) from error
    if written_as != FORMAT:
        raise StateTooNew(
            f"{path} has format {written_as}, this version reads {FORMAT}.", hint="Install a newer lepton-fl."
        )
    return dict(body)
