"""The signed list of releases, as The Update Framework keeps it (python-tuf; specification 1.0).

=========  ======================  ==========================================  =====================
role       its key lies            it says                                     it lasts
=========  ======================  ==========================================  =====================
root       offline                 which keys count for which role, how many   a year
targets    offline                 which manifests are releases                three months
snapshot   on the coordinator      which version of targets is the newest      a week
timestamp  on the coordinator      which snapshot is the newest, and so that   a day
                                   this coordinator is alive
=========  ======================  ==========================================  =====================

Whoever takes over the coordinator can withhold releases until the timestamp expires; nothing that it makes up
is a release. Files: ``metadata/N.root.json``, ``N.targets.json``, ``N.snapshot.json``, ``timestamp.json``.
A file is written whole or not at all, and what is written verifies: unsigned work never reaches the folder.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.delivery.keys import OFFLINE, ROLES
from lepton_fl.delivery.manifest import Manifest
from lepton_fl.errors import ConfigError, NotFound, StateConflict, StateCorrupt, TrustError
from lepton_fl.files import make_private_folder, remove, write_atomic

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

LIFE: Final = {"root": 365.0, "targets": 90.0, "snapshot": 7.0, "timestamp": 1.0}  # days
MAX_METADATA: Final = 900 * 1024  # bytes of one file: about 2,500 releases; one message carries it
KEPT: Final = 8  # earlier versions of snapshot and targets that devices may be in the middle of reading
_NAME: Final = re.compile(r"([1-9]\d{0,8})\.(root|targets|snapshot)\.json|timestamp\.json")

Signers = Mapping[str, Sequence["CryptoSigner"]]


def is_metadata(name: str) -> bool:
    """Whether a device may ask for a file of that name."""
    return _NAME.fullmatch(name) is not None


class Repository:
    """The metadata in ``folder``; any number of processes may read, one at a time writes."""

    def __init__(
        self,
        folder: Path,
        *,
        life: Mapping[str, float] = LIFE,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``life`` is in days, by role."""
        self.folder = folder / "metadata"
        self._life, self._now = dict(LIFE) | dict(life), now

    # --- reading ------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether keys were ever made."""
        return self._newest("root") > 0

    def read(self, name: str) -> bytes:
        """A metadata file, as devices get it; raises NotFound."""
        if is_metadata(name):
            with contextlib.suppress(FileNotFoundError):
                return (self.folder / name).read_bytes()
        raise NotFound(f"There is no metadata {name[:60]!r}.")

    def root(self) -> "Metadata[Root]":
        """The newest root.

        Raises:
            NotFound: No keys were made.
        """
        if not self.exists:
            raise NotFound(
                f"No release was ever signed here: there is no root in {self.folder}.",
                hint="Run `lepton keys init --keys FOLDER` first, with FOLDER on a disk that you take away.",
            )
        found: Metadata[Root] = self._load("root")
        return found

    def targets(self) -> "Metadata[Targets]":
        """The newest list of releases, verified; raises TrustError if it is not signed as root demands."""
        found: Metadata[Targets] = self._load("targets")
        self._verify(self.root(), "targets", found)
        return found

    def releases(self) -> dict[str, dict[str, Any]]:
        """What is signed: the summary of each manifest by its SHA-256, the oldest first."""
        found = self.targets().signed.targets
        rows = {path.removesuffix(".json"): dict(target.custom or {}) for path, target in found.items()}
        return dict(sorted(rows.items(), key=lambda row: (row[1].get("task"), row[1].get("sequence"))))

    def next_sequence(self, task: str) -> int:
        """The number of a task's next release; numbers of withdrawn ones are not used again."""
        return int(self._numbers().get(task, 0)) + 1

    def expiries(self) -> dict[str, datetime]:
        """When the newest file of each role ends."""
        return {role: self._load(role).signed.expires for role in ROLES if self._newest(role)}

    # --- offline: with the root and targets keys ----------------------------------------------------

    def create(self, signers: Signers, thresholds: Mapping[str, int]) -> None:
        """Begin: root, an empty list of releases, snapshot and timestamp.

        Args:
            signers: The keys of every role.
            thresholds: How many must sign, by role; 1 where it does not say.

        Raises:
            StateConflict: There is a root already.
            ConfigError: A threshold is not between 1 and the number of keys.
        """
        from tuf.api.metadata import Metadata, Root, Targets

        if self.exists:
            raise StateConflict(
                f"There are keys already: {self.folder} holds a root.",
                hint="`lepton keys rotate` replaces keys.",
            )
        root = Root(version=1, expires=self._until("root"), consistent_snapshot=True)
        for role in ROLES:
            _set_role(root, role, signers[role], thresholds.get(role, 1))
        targets = Targets(version=1, expires=self._until("targets"))
        make_private_folder(self.folder)
        with self.held():
            self._write("targets", 1, self._signed(root, "targets", Metadata(targets), signers["targets"]))
            self._write("root", 1, self._signed(root, "root", Metadata(root), signers["root"]))
        self.refresh(signers)

    def publish(self, manifests: Iterable[Manifest], signers: Sequence["CryptoSigner"]) -> None:
        """Sign releases; their chunks must be in place already.

        Raises:
            StateConflict: A sequence number is taken, or a round is older than a release of its run.
            TrustError: The keys are not enough.
        """
        from tuf.api.metadata import TargetFile

        with self.held(), self._edit("targets", signers) as targets:
            numbers = dict(targets.unrecognized_fields.get("lepton-sequences", {}))
            for manifest in manifests:
                self._check_forward(manifest, targets, numbers)
                numbers[manifest.task] = manifest.sequence
                path = f"{manifest.name}.json"
                target = TargetFile.from_data(path, manifest.to_bytes(), ["sha256"])
                target.unrecognized_fields["custom"] = manifest.summary()
                targets.targets[path] = target
            targets.unrecognized_fields["lepton-sequences"] = numbers

    def withdraw(self, name: str, signers: Sequence["CryptoSigner"]) -> None:
        """Take a release off the list: no device installs it any more; raises NotFound."""
        with self.held(), self._edit("targets", signers) as targets:
            if targets.targets.pop(f"{name}.json", None) is None:
                raise NotFound(f"There is no release {name}.", hint="`lepton release list` shows them.")

    def renew(self, signers: Signers) -> None:
        """Sign root (where its keys are given) and targets again, for another life."""
        with self.held():
            for role in OFFLINE:
                if signers.get(role):
                    with self._edit(role, signers[role]):
                        pass

    def rotate(self, role: str, new: Sequence["CryptoSigner"], signers: Signers) -> None:
        """Replace all keys of a role; the old ones count for nothing once a device has seen the new root.

        Args:
            role: Whose keys.
            new: As many as before, or more.
            signers: The root keys in use.
        """
        with self.held():
            threshold = self.root().signed.roles[role].threshold
            signing = [*signers["root"], *(new if role == "root" else ())]
            with self._edit("root", signing) as root:
                _set_role(root, role, new, threshold)
            if role == "targets":
                with self._edit("targets", new):
                    pass

    def follow(self, other: "Repository") -> None:
        """Take over newer roots and the newest targets of a copy of this repository.

        Raises:
            TrustError: A root is not signed by the one before, or targets not as root demands.
            StateConflict: The copy is behind, or does not continue this repository.
        """
        from tuf.api.metadata import Metadata

        with self.held():
            for version in range(1, other._newest("root") + 1):
                content = other.read(f"{version}.root.json")
                if version <= self._newest("root"):
                    if content != self.read(f"{version}.root.json"):
                        raise StateConflict("The folder has other roots: it is no copy of this repository.")
                    continue
                self._check_handed_over(content)
                found = Metadata.from_bytes(content)
                self._verify(found, "root", found)
                if found.signed.version != version:
                    raise StateConflict(f"{version}.root.json holds version {found.signed.version}.")
                self._write("root", version, content)
            mine, theirs = self._newest("targets"), other._newest("targets")
            if theirs < mine:
                raise StateConflict(
                    f"The folder has version {theirs} of the list of releases, this one has {mine}.",
                    hint="Copy the repository to the signing machine again, and publish there once more.",
                )
            found = other._load("targets")
            self._verify(self.root(), "targets", found)
            if theirs == mine and found != self._load("targets"):
                raise StateConflict(f"There are two different versions {mine} of the list of releases.")
            self._write("targets", theirs, other.read(f"{theirs}.targets.json"))

    def _check_forward(self, manifest: Manifest, targets: "Targets", numbers: Mapping[str, int]) -> None:
        if manifest.sequence <= numbers.get(manifest.task, 0):
            raise StateConflict(
                f"Release {manifest.sequence} of {manifest.task} is not after {numbers[manifest.task]}.",
                hint="Somebody has published meanwhile: publish again.",
            )
        for target in targets.targets.values():
            other: dict[str, Any] = target.custom or {}
            same_run = (other.get("task"), other.get("run")) == (manifest.task, manifest.lineage.run)
            newer, older = other.get("round"), manifest.lineage.round
            if same_run and newer is not None and older is not None and newer > older:
                raise StateConflict(
                    f"Round {older} of run {manifest.lineage.run} is older than round {newer}, which is a "
                    "release: no device would take it.",
                    hint="To go back, assign the earlier release to the devices that had it.",
                )

    def _numbers(self) -> Mapping[str, int]:
        return dict(self.targets().signed.unrecognized_fields.get("lepton-sequences", {}))

    # --- online: with the snapshot and timestamp keys -------------------------------------------------

    def refresh(self, signers: Signers) -> bool:
        """Sign snapshot and timestamp if they no longer say what is true, or at half of their life.

        Returns:
            Whether anything was written.

        Raises:
            TrustError: The list of releases is not signed as root demands; what was served stays.
            NotFound: No keys were made.
        """
        with self.held():
            root, version = self.root(), self.targets().signed.version
            snapshot = self._snapshot(root, version)
            wrote = snapshot is not None
            if snapshot is not None:
                content = self._signed(root.signed, "snapshot", snapshot, signers["snapshot"])
                self._write("snapshot", snapshot.signed.version, content)
            timestamp = self._timestamp(root)
            if timestamp is not None:
                content = self._signed(root.signed, "timestamp", timestamp, signers["timestamp"])
                write_atomic(self.folder / "timestamp.json", content)
                self._forget()
            return wrote or timestamp is not None

    def _snapshot(self, root: "Metadata[Root]", targets: int) -> "Metadata[Snapshot] | None":
        from tuf.api.metadata import Metadata, MetaFile, Snapshot

        meta = {"targets.json": MetaFile(targets)}
        number = self._newest("snapshot")
        if number:
            old = self._load("snapshot")
            if self._good(root, "snapshot", old) and old.signed.meta == meta:
                return None
        return Metadata(Snapshot(version=number + 1, expires=self._until("snapshot"), meta=meta))

    def _timestamp(self, root: "Metadata[Root]") -> "Metadata[Timestamp] | None":
        from tuf.api.metadata import Metadata, MetaFile, Timestamp

        wanted = MetaFile(self._newest("snapshot"))
        number = 0
        if self._newest("timestamp"):
            old = self._load("timestamp")
            if self._good(root, "timestamp", old) and old.signed.snapshot_meta == wanted:
                return None
            number = old.signed.version
        return Metadata(Timestamp(version=number + 1, expires=self._until("timestamp"), snapshot_meta=wanted))

    def _good(self, root: "Metadata[Root]", role: str, found: "Metadata[Any]") -> bool:
        """Signed by keys that count, and in the first half of its life."""
        try:
            self._verify(root, role, found)
        except TrustError:
            return False
        return bool(found.signed.expires - self._now() > timedelta(days=self._life[role] / 2))

    def _forget(self) -> None:
        """Remove what no device asks for any more; every root stays, devices walk from one to the next."""
        for role in ("snapshot", "targets"):
            for number in range(self._newest(role) - KEPT, 0, -1):
                path = self.folder / f"{number}.{role}.json"
                if not path.exists():
                    break
                remove(path)

    # --- files --------------------------------------------------------------------------------------

    def _until(self, role: str) -> datetime:
        return self._now().replace(microsecond=0) + timedelta(days=self._life[role])

    def _newest(self, role: str) -> int:
        """The highest version of a role's file; 0 = none."""
        if role == "timestamp":
            return int((self.folder / "timestamp.json").exists())
        numbers = [
            int(match[1])
            for path in self.folder.glob(f"*.{role}.json")
            if (match := _NAME.fullmatch(path.name))
        ]
        return max(numbers, default=0)

    def _load(self, role: str, back: int = 0) -> Any:  # noqa: ANN401 - Metadata of the role's own type
        from tuf.api.metadata import Metadata
        from tuf.api.serialization import DeserializationError

        prefix = "" if role == "timestamp" else f"{max(1, self._newest(role) - back)}."
        path = self.folder / f"{prefix}{role}.json"
        try:
            return Metadata.from_bytes(path.read_bytes())
        except OSError as error:
            raise StateCorrupt(f"{path} cannot be read: {error.strerror}.") from error
        except DeserializationError as error:
            raise StateCorrupt(f"{path} is damaged: {error}.", hint="Restore it from a copy.") from error

    def _verify(self, root: "Metadata[Root]", role: str, found: "Metadata[Any]") -> None:
        from tuf.api.exceptions import UnsignedMetadataError

        try:
            root.signed.verify_delegate(role, found.signed_bytes, found.signatures)
        except UnsignedMetadataError as error:
            raise TrustError(
                f"The {role} metadata is not signed by enough of its keys.",
                hint=f"Sign with the {role} keys that `lepton keys show` names.",
            ) from error

    @contextlib.contextmanager
    def _edit(self, role: str, signers: Sequence["CryptoSigner"]) -> Iterator[Any]:
        """Change a role's newest metadata; written as the next version when the block ends well.

        What is there must be signed as the newest root demands, or the one before it: a rotation of the
        targets keys that was cut off is completed by the next change.
        """
        found = self._load(role)
        try:
            self._verify(self.root(), role, found)
        except TrustError:
            self._verify(self._load("root", back=1), role, found)
        yield found.signed
        found.signed.version += 1
        found.signed.expires = self._until(role)
        root = found.signed if role == "root" else self.root().signed
        content = self._signed(root, role, found, signers)
        if role == "root":
            self._check_handed_over(content)
        self._write(role, found.signed.version, content)

    def _check_handed_over(self, content: bytes) -> None:
        """A new root must be signed by the keys of the one before, too, or no device follows."""
        from tuf.api.metadata import Metadata

        self._verify(self.root(), "root", Metadata.from_bytes(content))

    def _signed(
        self, root: "Root", role: str, found: "Metadata[Any]", signers: Sequence["CryptoSigner"]
    ) -> bytes:
        from tuf.api.metadata import Metadata
        from tuf.api.serialization.json import JSONSerializer

        found.signatures.clear()
        for signer in signers:
            found.sign(signer, append=True)
        self._verify(Metadata(root), role, found)
        content = found.to_bytes(JSONSerializer(compact=True))
        if len(content) > MAX_METADATA:
            raise ConfigError(
                f"The {role} metadata has {len(content)} bytes, at most {MAX_METADATA} are possible.",
                hint="`lepton release withdraw` takes old releases off the list.",
            )
        return content

    def _write(self, role: str, version: int, content: bytes) -> None:
        write_atomic(self.folder / f"{version}.{role}.json", content)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """One writer at a time, in whatever process; not to be entered twice."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _set_role(root: "Root", role: str, signers: Sequence["CryptoSigner"], threshold: int) -> None:
    if not 1 <= threshold <= len(signers):
        raise ConfigError(f"Expected a threshold of 1 to {len(signers)} for {role}, got {threshold}.")
    for key in list(root.roles[role].keyids):
        root.revoke_key(key, role)
    for signer in signers:
        root.add_key(signer.public_key, role)
    root.roles[role].threshold = threshold
