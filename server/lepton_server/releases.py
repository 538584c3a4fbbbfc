"""The coordinator's side of releases: which device should have which, and keeping the list fresh.

The seam for whoever decides (an operator's command, a staged rollout): :func:`assign` writes the device's
desired state, :func:`assigned_release` reads it. A device hears of it at its next check-in, and a waiting one
at once; what it makes of it is in its report (``Report.serving``).
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.delivery.keys import ONLINE, load_keys
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import LeptonError, NotFound
from lepton_server.config import ServerConfig

if TYPE_CHECKING:
    from lepton_fl.delivery.manifest import Manifest
    from lepton_fl.delivery.repository import Signers
    from lepton_server.store import Device, Store, Transaction

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # between two looks for a new list of releases
CHECK_S: Final = 60.0  # between two looks at expiry


def assigned_release(desired: Mapping[str, Any]) -> str | None:
    """The release that a device's desired state names (SHA-256 of its manifest); None = none."""
    release = desired.get("release") or {}
    name = release.get("manifest")
    return str(name) if name else None


def assign(store: "Store", device_ids: Iterable[str], release: str | None) -> int:
    """Have devices serve a release; None = no wish any more, they keep what they have.

    Each asking has a number, so that asking again for a release that a device gave up makes it try again.

    Args:
        store: The coordinator's state.
        device_ids: Enrolled devices; all of them change or none.
        release: SHA-256 (hex) of the manifest.

    Returns:
        How many devices were told.

    Raises:
        NotFound, TrustError: A device is unknown or revoked.
    """
    devices = [store.device(device_id) for device_id in device_ids]
    with store.transaction() as change:
        for device in devices:
            wish(change, device, release)
    return len(devices)


def wish(
    change: "Transaction", device: "Device", release: str | None, question: Mapping[str, Any] | None = None
) -> None:
    """Record what one device should serve; see :func:`assign`.

    Args:
        change: The transaction.
        device: Which.
        release: SHA-256 (hex) of the manifest; None = no wish.
        question: What it is asked about the release on its own rows, see ``lepton_fl.delivery.trial``.
    """
    desired = {key: value for key, value in device.desired.items() if key != "release"}
    serial = int((device.desired.get("release") or {}).get("serial", 0)) + 1
    if release is not None or "release" in device.desired:
        desired["release"] = {"manifest": release or "", "serial": serial}
        if question is not None:
            desired["release"]["trial"] = dict(question)
    change.record("device.desired", device.id, {"device_id": device.id, "desired": desired})


def adopt(store: "Store", shelf: Shelf) -> int:
    """Journal every signed release that the journal does not know: a publication may have been cut off.

    The signature makes a release, the journal follows. Called after signing, and by the coordinator before it
    tells devices of a new list; whoever comes first writes, one at a time.

    Returns:
        How many were missing.
    """
    if not shelf.repository.exists:
        return 0
    with shelf.repository.held():
        known = {event.subject for event in store.events(kinds=("release.published",))}
        missing = [name for name in shelf.repository.releases() if name not in known]
        if missing:
            with store.transaction() as change:
                for name in missing:
                    change.record("release.published", name, _published(name, shelf.manifest(name)))
    return len(missing)


def forget(store: "Store", shelf: Shelf, wanted: str, reason: str) -> str:
    """Journal that a release was withdrawn, once; returns its name.

    Raises:
        NotFound: The journal knows no such release that is off the signed list.
    """
    with shelf.repository.held():
        events = store.events(kinds=("release.published", "release.withdrawn"))
        gone = {event.subject for event in events if event.kind == "release.withdrawn"}
        known = {event.subject for event in events} - gone - shelf.repository.releases().keys()
        found = [name for name in known if len(wanted) >= 4 and name.startswith(wanted)]
        if len(found) != 1:
            raise NotFound(f"There is no release {wanted!r}.", hint="`lepton release list` shows them.")
        store.record("release.withdrawn", found[0], {"release": found[0], "reason": reason})
    return found[0]


def _published(name: str, manifest: "Manifest") -> dict[str, Any]:
    return {
        "release": name,
        "task": manifest.task,
        "variant": manifest.variant,
        "sequence": manifest.sequence,
        "run": manifest.lineage.run,
        "round": manifest.lineage.round,
    }


def shelf_of(config: ServerConfig) -> Shelf:
    """The coordinator's shelf, with the lifetimes that it is configured with."""
    life = {"timestamp": config.delivery.timestamp_days, "snapshot": config.delivery.snapshot_days}
    return Shelf(config.release_dir, life=life)


def online_keys(config: ServerConfig) -> Path:
    """The folder of the snapshot and timestamp keys."""
    return config.server.state_dir / "keys" / "releases"


def online_signers(shelf: Shelf, folder: Path) -> "Signers":
    """The keys that root trusts for snapshot and timestamp; raises NotFound where one is missing."""
    root = shelf.repository.root().signed
    signers = {role: load_keys(folder, role, set(root.roles[role].keyids), _no_passphrase) for role in ONLINE}
    for role, found in signers.items():
        if len(found) < root.roles[role].threshold:
            raise NotFound(
                f"The {role} key that devices trust is not in {folder}.",
                hint=f"Restore it, or make another: `lepton keys rotate {role} --keys FOLDER`.",
            )
    return signers


def _no_passphrase(path: Path) -> bytes:
    raise LeptonError(f"{path} is encrypted; the coordinator's own keys are not.")


class ListKeeper:
    """Signs snapshot and timestamp anew when releases were published, and before they expire."""

    def __init__(self, shelf: Shelf, keys: Path, store: "Store | None" = None) -> None:
        """Keep ``shelf``'s list with the online keys in ``keys``; ``store`` hears of releases first."""
        self._shelf, self._keys, self._store = shelf, keys, store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="release-keeper", daemon=True)
        self._seen = 0
        self._said = ""

    def start(self) -> None:
        """Begin; nothing is done as long as no keys were made."""
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        since = CHECK_S
        while not self._stop.wait(LOOK_S):
            since += LOOK_S
            seen = self._changed()
            if seen == self._seen and since < CHECK_S:
                continue
            self._seen, since = seen, 0.0
            self.look()

    def _changed(self) -> int:
        folder = self._shelf.repository.folder
        return folder.stat().st_mtime_ns if folder.exists() else 0

    def look(self) -> None:
        """Once; what goes wrong is logged, and devices keep what they have."""
        try:
            if not self._shelf.repository.exists:
                return
            if self._store is not None and (count := adopt(self._store, self._shelf)):
                log.info("%d signed releases were not in the journal yet", count)
            if self._shelf.repository.refresh(online_signers(self._shelf, self._keys)):
                log.info("the list of releases was signed anew", extra={"event": "releases.signed"})
        except LeptonError as error:
            self._say(f"the list of releases cannot be kept fresh: {error} {error.hint}")
        except Exception:  # this thread keeps the timestamp alive: it must not die of a surprise
            log.exception("the list of releases could not be looked at")
        else:
            self._say("")

    def _say(self, words: str) -> None:
        if words and words != self._said:
            log.error("%s", words)
        self._said = words
