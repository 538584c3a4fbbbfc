"""The head of the privacy ledger, which devices keep, and what it means when one has seen more than is here.

A database that was restored from an older copy does not know what was spent since. Devices do: every check-in
tells them the ledger's signed head, and shows the newest that they have seen.

    heads = Heads(store, keys)
    heads.refresh()                        # when the journal has grown
    heads.told                             # for the answers to check-ins; None: there is no ledger
    heads.fits(seen) or heads.judge(device_id, seen)      # the second may wait for the store

    refuse_older(store, head)              # StateCorrupt: the ledger here does not have what ``head`` proves

A head that our budget key has signed and that is not in our journal is journalled (``ledger.missed``). From
then on nothing is reserved (``privacy.Ledger``): what is missing was spent, and nobody here knows how much.
"""

import json
import logging
import threading

from lepton_fl.errors import StateCorrupt, TrustError
from lepton_fl.privacy.head import LedgerHead, sign_head
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.privacy import PrivacyKeys
from lepton_server.store import Store

log = logging.getLogger(__name__)

MAX_KNOWN = 10_000  # heads whose place in the journal need not be looked up again


class Heads:
    """The head as it is now, and a judge of those that devices have seen; safe for any number of threads."""

    def __init__(self, store: Store, keys: PrivacyKeys) -> None:
        """Make it; :meth:`refresh` reads the head."""
        self._store, self._keys, self._lock = store, keys, threading.Lock()
        self._head: LedgerHead | None = None
        self._known: set[tuple[int, bytes]] = set()
        self._strangers: set[str] = set()  # devices whose head is not ours; said once
        self.told: pb.LedgerHead | None = None

    def refresh(self) -> None:
        """Sign the newest head, if it is another than before.

        Raises:
            NotFound, TrustError: the budget key is missing, or others can read it.
        """
        with self._lock:
            newest = self._store.ledger_head()
            if newest.seq == 0 or (self._head is not None and newest.seq == self._head.seq):
                return
            head = self._head = sign_head(newest.seq, newest.hash, self._keys.signer())
            self._note(head)
            self.told = pb.LedgerHead(seq=head.seq, hash=head.hash, key=head.key, signature=head.signature)

    @property
    def head(self) -> LedgerHead | None:
        """The newest one; None: nothing was ever charged or allowed here."""
        return self._head

    def fits(self, seen: LedgerHead | None) -> bool:
        """Whether what a device has seen is known to be here; does not wait."""
        return seen is None or (seen.seq, seen.hash) in self._known

    def judge(self, device_id: str, seen: LedgerHead) -> None:
        """Look for a head in the journal, and journal that it is missing if our key has signed it."""
        if self._store.event_hash(seen.seq) == seen.hash.hex():
            self.refresh()  # another process may have written it a moment ago: the answer must not be older
            with self._lock:
                self._note(seen)
            return
        if not self._ours(seen):
            self._say_strange(device_id)
            return
        with self._lock:
            missed = self._store.missed_head()
            if missed is None or seen.seq > missed:
                body = {"device_id": device_id, "seq": seen.seq, "hash": seen.hash.hex()}
                proof = {"key": seen.key.hex(), "signature": seen.signature.hex()}
                self._store.record("ledger.missed", body | proof)
                log.error(
                    "device %s has seen event %d of the privacy ledger, which is not here: this database was "
                    "restored from an older copy. No private run goes on",
                    device_id,
                    seen.seq,
                )

    def _ours(self, seen: LedgerHead) -> bool:
        """Whether our budget key has signed it: a device cannot stop a coordinator by inventing one."""
        try:
            seen.check()
        except TrustError:
            return False
        return self._keys.can_sign and seen.key == self._keys.public()

    def _note(self, head: LedgerHead) -> None:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known.add((head.seq, head.hash))

    def _say_strange(self, device_id: str) -> None:
        if device_id not in self._strangers and len(self._strangers) < MAX_KNOWN:
            self._strangers.add(device_id)
            log.warning(
                "device %s shows the head of a ledger that this coordinator has not signed", device_id
            )


def head_from(data: bytes) -> LedgerHead:
    """Read a head that was published (``lepton privacy head --format json``).

    Raises:
        StateCorrupt: it is none.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateCorrupt("Expected the head of a privacy ledger as JSON.") from error
    return LedgerHead.from_json(body)


def refuse_older(store: Store, head: LedgerHead) -> None:
    """Check that a ledger goes on from a head that was noted elsewhere.

    Args:
        store: the state to be used.
        head: as devices have it, or as it was published; its signature is checked.

    Raises:
        TrustError: the head is not signed by the key that it names.
        StateCorrupt: the event is not here, or is another one.
    """
    head.check()
    if store.event_hash(head.seq) != head.hash.hex():
        newest = store.ledger_head()
        raise StateCorrupt(
            f"Event {head.seq} of the privacy ledger was seen elsewhere and is not here, where it ends with "
            f"event {newest.seq}: this is an older copy, which does not know what was spent.",
            hint="Restore the newest copy. What is missing was spent.",
        )
