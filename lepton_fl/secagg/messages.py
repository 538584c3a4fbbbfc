"""The nine messages of ``flsa/1``.

======  ============  =========  ====================================================================
number  message       direction  content
======  ============  =========  ====================================================================
1       Advert        device ->  two public keys, a commitment; may be sent rounds ahead (a prekey)
2       Roster        -> device  all adverts of the cohort, in the order of the device ids
3       Shares        device ->  sealed shares for everybody, and commitments to each half
4       Delivery      -> device  who has sent shares (R1), and what they have sealed for this device
5       Upload        device ->  the digest of the masked vector; complaints about unusable shares
6       Survivors     -> device  the set U whose vectors are to be added
7       Consent       device ->  a signature under U
8       Certificate   -> device  a quorum of these signatures
9       Reveal        device ->  one share for every device of R1: of b if it is in U, else of m
======  ============  =========  ====================================================================

A frame is ``flsa``, the version, the number, and the body. A device's frames end with its Ed25519 signature
over all that is before it. Positions are places in the roster; R, its digest, is in every later message.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lepton_fl.errors import TrustError
from lepton_fl.secagg.codec import Reader, Writer, to_bitmap
from lepton_fl.secagg.context import MOST_COHORT, VERSION
from lepton_fl.secagg.field import SECRET_BYTES, unpack
from lepton_fl.secagg.identity import MAX_CREDENTIAL, SIGNATURE_BYTES
from lepton_fl.secagg.keys import COMMITMENT_BYTES, SEALED_BYTES, check_order, check_public
from lepton_fl.wire.messages import malformed

_MAGIC = b"flsa\x01"
DIGEST_BYTES = 32
MAX_ADVERT = 1024  # bytes


def _frame(number: int, body: Writer) -> bytes:
    return bytes(Writer(_MAGIC).u8(number).raw(bytes(body)))


def _open(data: bytes, number: int) -> Reader:
    reader = Reader(data)
    if reader.raw(len(_MAGIC)) != _MAGIC:
        raise malformed("not a frame of flsa/1")
    found = reader.u8()
    if found != number:
        raise malformed(f"message number {found}, expected {number}")
    return reader


def message_number(data: bytes) -> int:
    """Which of the nine messages a frame claims to be.

    Raises:
        UpdateRejected: MALFORMED, it is no frame.
    """
    reader = Reader(data)
    if reader.raw(len(_MAGIC)) != _MAGIC:
        raise malformed("not a frame of flsa/1")
    return reader.u8()


def sign_frame(frame: bytes, signing: Ed25519PrivateKey) -> bytes:
    """A device's message: the frame, and the signature over it."""
    return frame + signing.sign(frame)


def verify_frame(message: bytes, key: bytes, device: str) -> None:
    """Check the signature at the end of a device's message.

    Raises:
        TrustError: it is not the device's.
    """
    verify(key, message[-SIGNATURE_BYTES:], message[:-SIGNATURE_BYTES], device)


def verify(key: bytes, signature: bytes, statement: bytes, device: str) -> None:
    """Check one Ed25519 signature (RFC 8032, strict about the scalar's range).

    Raises:
        TrustError: it is not the device's.
    """
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError) as error:
        raise TrustError(f"A message is not signed by device {device}.") from error


def digest_of(label: bytes, data: bytes) -> bytes:
    """SHA-256 under a name of its use."""
    return hashlib.sha256(VERSION + b" " + label + b"\0" + data).digest()


@dataclass(frozen=True)
class Advert:
    """A device's public keys for one round, signed; each is used once."""

    number: ClassVar[int] = 1
    deployment: str
    device: str
    signing_key: bytes  # 32, Ed25519
    credential: bytes  # for Trust
    not_after: int  # seconds since 1970
    share_key: bytes  # 32, X25519: shares are sealed with it
    mask_key: bytes  # 32, X25519: masks come from it
    commitment: bytes  # 32, to the self secret

    def encode(self, signing: Ed25519PrivateKey) -> bytes:
        """Signed."""
        body = Writer().text(self.deployment).text(self.device).raw(self.signing_key).blob(self.credential)
        body.u64(self.not_after).raw(self.share_key).raw(self.mask_key).raw(self.commitment)
        return sign_frame(_frame(self.number, body), signing)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read and verify the signature under the key that is shown; whose key it is, ``Trust`` says."""
        advert = cls.decode_unverified(data)
        verify_frame(data, advert.signing_key, advert.device)
        return advert

    @classmethod
    def decode_unverified(cls, data: bytes) -> Self:
        """Read what has been verified before."""
        reader = _open(data, cls.number)
        deployment, device, key = reader.text(), reader.text(), reader.raw(32)
        credential, not_after = reader.blob(MAX_CREDENTIAL), reader.u64()
        share_key, mask_key, commitment = reader.raw(32), reader.raw(32), reader.raw(32)
        reader.raw(SIGNATURE_BYTES)
        reader.finish()
        if not device or not device.isprintable():
            raise malformed("a device id is empty or not printable")
        if share_key == mask_key:
            raise malformed("an advert shows one key for two uses")
        check_public(share_key)
        check_public(mask_key)
        return cls(deployment, device, key, credential, not_after, share_key, mask_key, commitment)

    def check_order(self) -> None:
        """Refuse key-agreement keys of small order; the coordinator does it, devices would notice anyway.

        Raises:
            UpdateRejected: MALFORMED.
        """
        check_order(self.share_key)
        check_order(self.mask_key)


@dataclass(frozen=True)
class Roster:
    """The cohort; its digest R is the salt of every key."""

    number: ClassVar[int] = 2
    context: bytes  # 32, digest
    adverts: tuple[bytes, ...]  # ascending by device id

    def encode(self) -> bytes:
        """As sent to every device."""
        body = Writer().raw(self.context).u16(len(self.adverts))
        for advert in self.adverts:
            body.blob(advert)
        return _frame(self.number, body)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read; the adverts are not looked into."""
        reader = _open(data, cls.number)
        context, count = reader.raw(DIGEST_BYTES), reader.u16()
        if not 1 <= count <= MOST_COHORT:
            raise malformed(f"a roster of {count}, expected 1 to {MOST_COHORT}")
        adverts = tuple(reader.blob(MAX_ADVERT) for _ in range(count))
        reader.finish()
        return cls(context, adverts)

    @property
    def digest(self) -> bytes:
        """R."""
        return digest_of(b"roster", self.encode())


@dataclass(frozen=True)
class Shares:
    """One dealer's sealed shares and its commitments to them."""

    number: ClassVar[int] = 3
    roster: bytes
    sender: int
    sealed: bytes  # (n - 1) * 80, for the others by position
    commitments: bytes  # n * 32: to the half of b, then of m, of every holder

    def encode(self, signing: Ed25519PrivateKey) -> bytes:
        """Signed."""
        body = Writer().raw(self.roster).u16(self.sender).raw(self.sealed).raw(self.commitments)
        return sign_frame(_frame(self.number, body), signing)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``."""
        reader = _open(data, cls.number)
        roster, sender = reader.raw(DIGEST_BYTES), reader.u16()
        sealed, commitments = reader.raw((n - 1) * SEALED_BYTES), reader.raw(n * 2 * COMMITMENT_BYTES)
        reader.raw(SIGNATURE_BYTES)
        reader.finish()
        return cls(roster, _position(sender, n), sealed, commitments)

    def sealed_for(self, holder: int) -> bytes:
        """What this dealer has sealed for another position, 80 bytes."""
        place = holder - (holder > self.sender)
        return self.sealed[place * SEALED_BYTES : (place + 1) * SEALED_BYTES]

    def committed_to(self, holder: int) -> bytes:
        """The commitments to a holder's halves: 16 bytes of b, 16 of m."""
        return self.commitments[holder * 2 * COMMITMENT_BYTES : (holder + 1) * 2 * COMMITMENT_BYTES]


@dataclass(frozen=True)
class Delivery:
    """What one device gets of the others' shares."""

    number: ClassVar[int] = 4
    roster: bytes
    receiver: int
    dealers: frozenset[int]  # R1
    parts: Mapping[int, tuple[bytes, bytes]]  # dealer -> sealed, commitments; without the receiver's own

    def encode(self, n: int) -> bytes:
        """As sent to the receiver."""
        body = Writer().raw(self.roster).u16(self.receiver).raw(to_bitmap(self.dealers, n))
        for dealer in sorted(self.dealers - {self.receiver}):
            body.raw(self.parts[dealer][0]).raw(self.parts[dealer][1])
        return _frame(self.number, body)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``."""
        reader = _open(data, cls.number)
        roster, receiver = reader.raw(DIGEST_BYTES), _position(reader.u16(), n)
        dealers = reader.bitmap(n)
        parts = {
            dealer: (reader.raw(SEALED_BYTES), reader.raw(2 * COMMITMENT_BYTES))
            for dealer in sorted(dealers - {receiver})
        }
        reader.finish()
        return cls(roster, receiver, dealers, parts)


@dataclass(frozen=True)
class Upload:
    """The signed tail of a masked vector; the vector itself travels beside it, in chunks."""

    number: ClassVar[int] = 5
    roster: bytes
    sender: int
    dealers: bytes  # 32, digest of R1
    vector: bytes  # 32, SHA-256 of the vector's bytes
    complaints: frozenset[int]  # dealers whose shares this device could not use

    def encode(self, n: int, signing: Ed25519PrivateKey) -> bytes:
        """Signed."""
        body = Writer().raw(self.roster).u16(self.sender).raw(self.dealers).raw(self.vector)
        return sign_frame(_frame(self.number, body.raw(to_bitmap(self.complaints, n))), signing)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``."""
        reader = _open(data, cls.number)
        roster, sender = reader.raw(DIGEST_BYTES), _position(reader.u16(), n)
        dealers, vector = reader.raw(DIGEST_BYTES), reader.raw(DIGEST_BYTES)
        complaints = reader.bitmap(n)
        reader.raw(SIGNATURE_BYTES)
        reader.finish()
        return cls(roster, sender, dealers, vector, complaints)


@dataclass(frozen=True)
class Survivors:
    """The proposed set U; the same bytes to all."""

    number: ClassVar[int] = 6
    roster: bytes
    dealers: bytes  # digest of R1
    members: frozenset[int]  # U

    def encode(self, n: int) -> bytes:
        """As sent to the devices of U."""
        return _frame(
            self.number, Writer().raw(self.roster).raw(self.dealers).raw(to_bitmap(self.members, n))
        )

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``."""
        reader = _open(data, cls.number)
        roster, dealers, members = reader.raw(DIGEST_BYTES), reader.raw(DIGEST_BYTES), reader.bitmap(n)
        reader.finish()
        return cls(roster, dealers, members)

    def digest(self, context: bytes, n: int) -> bytes:
        """What is signed: context, R, R1 and U."""
        return digest_of(b"survivors", context + self.encode(n))


@dataclass(frozen=True)
class Consent:
    """One device's signature under U."""

    number: ClassVar[int] = 7
    roster: bytes
    sender: int
    survivors: bytes  # 32, Survivors.digest

    def frame(self) -> bytes:
        """Without the signature: what whoever checks a certificate can write down, too."""
        return _frame(self.number, Writer().raw(self.roster).u16(self.sender).raw(self.survivors))

    def encode(self, signing: Ed25519PrivateKey) -> bytes:
        """Signed."""
        return sign_frame(self.frame(), signing)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``."""
        reader = _open(data, cls.number)
        roster, sender, survivors = reader.raw(32), _position(reader.u16(), n), reader.raw(DIGEST_BYTES)
        reader.raw(SIGNATURE_BYTES)
        reader.finish()
        return cls(roster, sender, survivors)


@dataclass(frozen=True)
class Certificate:
    """A quorum of consents under one U."""

    number: ClassVar[int] = 8
    roster: bytes
    survivors: bytes  # Survivors.digest
    signatures: tuple[tuple[int, bytes], ...]  # ascending positions, with their signatures

    def encode(self) -> bytes:
        """As sent to the devices of U."""
        body = Writer().raw(self.roster).raw(self.survivors).u16(len(self.signatures))
        for sender, signature in self.signatures:
            body.u16(sender).raw(signature)
        return _frame(self.number, body)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``; refuses a device that is named twice."""
        reader = _open(data, cls.number)
        roster, survivors, count = reader.raw(DIGEST_BYTES), reader.raw(DIGEST_BYTES), reader.u16()
        if count > n:
            raise malformed(f"{count} signatures of {n} devices")
        signatures = tuple((_position(reader.u16(), n), reader.raw(SIGNATURE_BYTES)) for _ in range(count))
        reader.finish()
        _ascending([sender for sender, _ in signatures])
        return cls(roster, survivors, signatures)


@dataclass(frozen=True)
class Reveal:
    """One share for every device whose share the sender has."""

    number: ClassVar[int] = 9
    roster: bytes
    sender: int
    survivors: bytes  # Survivors.digest
    shares: Mapping[int, bytes]  # dealer -> 32 bytes: half of b if the dealer is in U, else of m

    def encode(self, n: int, signing: Ed25519PrivateKey) -> bytes:
        """Signed."""
        body = Writer().raw(self.roster).u16(self.sender).raw(self.survivors).raw(to_bitmap(self.shares, n))
        for dealer in sorted(self.shares):
            body.raw(self.shares[dealer])
        return sign_frame(_frame(self.number, body), signing)

    @classmethod
    def decode(cls, data: bytes, n: int) -> Self:
        """Read, for a roster of ``n``; refuses field elements that are not canonical."""
        reader = _open(data, cls.number)
        roster, sender, survivors = reader.raw(32), _position(reader.u16(), n), reader.raw(DIGEST_BYTES)
        dealers = sorted(reader.bitmap(n))
        shares = {dealer: reader.raw(SECRET_BYTES) for dealer in dealers}
        reader.raw(SIGNATURE_BYTES)
        reader.finish()
        unpack(b"".join(shares.values()))
        return cls(roster, sender, survivors, shares)


def dealers_digest(roster: bytes, dealers: frozenset[int], n: int) -> bytes:
    """The name of R1."""
    return digest_of(b"dealers", roster + to_bitmap(dealers, n))


def _position(position: int, n: int) -> int:
    if position >= n:
        raise malformed(f"position {position} in a roster of {n}")
    return position


def _ascending(positions: Sequence[int]) -> None:
    if any(b <= a for a, b in pairwise(positions)):
        raise malformed("positions are not in ascending order")
