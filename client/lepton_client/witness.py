"""What this device has seen of the coordinator's privacy ledger, so that an older copy of it is refused.

A coordinator whose database was restored from a copy has forgotten what was spent since. Every check-in
answers with the ledger's signed head (``lepton_fl.privacy.head``); the newest is kept here, durably, and
shown at the next check-in. While the ledger is behind it, on another branch or gone, ``objection`` says so
and this device trains nothing.

    witness = Witness(state.witness, identity.ca_pem)
    witness.hear(head)              # of a check-in's answer; None: it had none
    witness.objection               # why this device sits out, or ""

The first head that comes is believed, as is its key. Another coordinator (another certificate authority) is
another ledger.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Final

from lepton_fl.errors import LeptonError, StateCorrupt, TrustError
from lepton_fl.files import canonical_json, read_private, write_private
from lepton_fl.privacy.head import LedgerHead

log = logging.getLogger("lepton_client")

FORMAT: Final = 1
GONE: Final = "The coordinator shows no privacy ledger any more, and there was one"


class Witness:
    """The newest head that was seen; used by the agent's main thread."""

    def __init__(self, path: Path, ca_pem: str) -> None:
        """Read it.

        Args:
            path: of the file; made with the first head.
            ca_pem: the coordinator's certificate authority.

        Raises:
            StateCorrupt: the file is damaged; without it an older ledger could not be told.
        """
        self._path = path
        self._coordinator = hashlib.sha256(ca_pem.encode()).hexdigest()
        self.seen: LedgerHead | None = self._read()
        self.objection = ""

    def hear(self, head: LedgerHead | None) -> bool:
        """Take in what a check-in has answered; returns whether ``objection`` changed.

        Raises:
            DiskFull, StateError: a newer head cannot be kept; the objection is as it was.
        """
        before = self.objection
        self.objection = self._judged(head)
        if head is not None and head != self.seen and not self.objection:
            self.objection = before
            self._keep(head)
            self.objection = ""
        return self.objection != before

    def _judged(self, head: LedgerHead | None) -> str:
        if head is None:
            return GONE if self.seen else ""
        if head == self.seen:
            return ""
        try:
            head.check()
        except TrustError as error:
            return f"The coordinator's privacy ledger is not signed ({str(error).rstrip('.')})"
        return head.objection(self.seen)

    def _keep(self, head: LedgerHead) -> None:
        body = {"format": FORMAT, "coordinator": self._coordinator, "head": head.to_json()}
        write_private(self._path, canonical_json(body))
        self.seen = head

    def _read(self) -> LedgerHead | None:
        if not self._path.exists():
            return None
        try:
            body = json.loads(read_private(self._path))
            if body["format"] != FORMAT:
                raise StateCorrupt(f"It has format {body['format']}, this version reads {FORMAT}.")
            if body["coordinator"] != self._coordinator:
                log.info("another coordinator than before: its privacy ledger is another one")
                return None
            return LedgerHead.from_json(body["head"])
        except (LeptonError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise StateCorrupt(
                f"What was seen of the coordinator's privacy ledger, {self._path}, cannot be read ({error}).",
                hint="Without it an older copy of the ledger would not be noticed. Remove the file to "
                "believe the next head.",
            ) from error
