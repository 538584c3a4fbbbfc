"""The signed head of a coordinator's privacy ledger: who has seen it knows an older copy when it comes back.

    head = sign_head(seq, digest, budget_key)          # the coordinator, of the ledger's newest event
    head.check()                                       # TrustError: not signed by the key that it names
    words = head.objection(kept)                       # why it does not follow from ``kept``; "" if it may

A ledger only grows, so a head with a lower number, or with the same number and another hash, is that of a
copy which does not know what was spent. Of a higher number only the coordinator can say whether the head
that was seen is in its chain: so devices show theirs. Being signed, it proves what was lost, and nobody can
invent one.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from lepton_fl.errors import StateCorrupt, TrustError
from lepton_fl.files import canonical_json

if TYPE_CHECKING:
    from lepton_fl.crypto import PrivateKey

HASH_BYTES, MAX_KEY, MAX_SIGNATURE = 32, 200, 100  # P-256: 91 and at most 72 bytes


@dataclass(frozen=True)
class LedgerHead:
    """The newest event of a ledger, and who says so."""

    seq: int  # in the journal, 1 or more
    hash: bytes  # 32 bytes, of that event; it covers all before it
    key: bytes  # the budget key, DER SubjectPublicKeyInfo
    signature: bytes = b""  # ECDSA over P-256 and SHA-256

    def signed_bytes(self) -> bytes:
        """What the signature covers."""
        return canonical_json(["lepton ledger head v1", self.seq, self.hash.hex()])

    def check(self) -> None:
        """Check the signature against the key that it names.

        Raises:
            TrustError: it is no head, or somebody else's.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        from lepton_fl.crypto import public_from_der

        lengths = len(self.hash) == HASH_BYTES and len(self.key) <= MAX_KEY
        if not (lengths and len(self.signature) <= MAX_SIGNATURE and 0 < self.seq < 2**63):
            raise TrustError("The head of a privacy ledger is not as it should be.")
        try:
            public_from_der(self.key).verify(self.signature, self.signed_bytes(), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError) as error:
            raise TrustError(f"The head of a privacy ledger, event {self.seq}, is not signed.") from error

    def objection(self, kept: "LedgerHead | None") -> str:
        """Why a ledger with this head cannot be the one whose head ``kept`` was; '' if it may be."""
        if kept is None:
            return ""
        if self.key != kept.key:
            return "The coordinator's privacy ledger is signed by another key than before"
        if self.seq < kept.seq:
            return (
                f"The coordinator's privacy ledger ends with event {self.seq}, and event {kept.seq} was "
                "seen: it was restored from an older copy, which does not know what was spent"
            )
        if self.seq == kept.seq and self.hash != kept.hash:
            return (
                f"Event {self.seq} of the coordinator's privacy ledger is another than the one that was "
                "seen: it has gone on from an older copy"
            )
        return ""

    # ------------------------------------------------------------------------------------------- as JSON

    def to_json(self) -> dict[str, int | str]:
        """Plain JSON types."""
        return {
            "seq": self.seq,
            "hash": self.hash.hex(),
            "key": self.key.hex(),
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_json(cls, body: Any) -> Self:  # noqa: ANN401 - whatever was decoded
        """Read it back; the signature is not checked.

        Raises:
            StateCorrupt: it is no head.
        """
        try:
            named = {name: bytes.fromhex(body[name]) for name in ("hash", "key", "signature")}
            return cls(seq=int(body["seq"]), **named)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StateCorrupt("Expected the head of a privacy ledger: seq, hash, key, signature.") from error


def sign_head(seq: int, digest: str, key: "PrivateKey") -> LedgerHead:
    """The head whose event has this number and hash (64 hexadecimal digits), signed by the budget key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    from lepton_fl.crypto import public_der

    head = LedgerHead(seq, bytes.fromhex(digest), public_der(key.public_key()))
    return replace(head, signature=key.sign(head.signed_bytes(), ec.ECDSA(hashes.SHA256())))
