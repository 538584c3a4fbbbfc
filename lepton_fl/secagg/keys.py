"""Every key of ``flsa/1`` and what it is derived from. Each derivation names its use and its version.

* ``R``, the roster digest, is the salt of everything that two devices share: a key made for one roster is
  useless in another.
* The mask key pair comes from the mask secret ``m`` by HKDF, so that recovering ``m`` recovers the key.
* The ids of both ends are in the derivation, in order: whoever copies another's public key gets other masks.

HKDF is RFC 5869 with SHA-256; X25519 is RFC 7748.
"""

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lepton_fl.secagg.codec import Writer
from lepton_fl.secagg.context import COMPLETE, VERSION
from lepton_fl.secagg.field import SECRET_BYTES
from lepton_fl.wire.messages import malformed

KEY_BYTES = 32
COMMITMENT_BYTES = 16
SEALED_BYTES = 2 * SECRET_BYTES + 16  # both shares and the tag
SELF, MASK = b"b", b"m"  # the two secrets, and the two halves of a share
_NONCE = bytes(12)  # every sealing key seals one message
_SHARE_COMMITMENT = VERSION + b" share commitment\0"
_CURVE_PRIME = 2**255 - 19


def hkdf(secret: bytes | bytearray, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256; ``info`` gets the protocol's version in front."""
    derivation = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=VERSION + b" " + info)
    return derivation.derive(secret)


def wipe(*secrets: bytearray) -> None:
    """Overwrite with zeros. Copies that libraries or the interpreter have made are out of reach."""
    for secret in secrets:
        secret[:] = bytes(len(secret))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The 32 bytes of a key's public half."""
    return key.public_key().public_bytes_raw()


def mask_key(secret: bytes | bytearray) -> X25519PrivateKey:
    """The mask key pair of the packed mask secret ``m``."""
    return X25519PrivateKey.from_private_bytes(hkdf(secret, b"", b"mask key"))


def self_seed(secret: bytes | bytearray, roster: bytes) -> bytes:
    """The seed of a device's own mask, from its packed self secret ``b``."""
    return hkdf(secret, roster, b"self mask")


def commit_self(deployment: str, device: str, share_key: bytes, mask_key: bytes, secret: bytes) -> bytes:
    """The commitment to ``b`` in an advert: what a recovered ``b`` is checked against."""
    writer = Writer(VERSION + b" self commitment\0").text(deployment).text(device)
    return hashlib.sha256(bytes(writer.raw(share_key).raw(mask_key).raw(secret))).digest()


def commit_share(roster: bytes, dealer: int, holder: int, half: bytes, share: bytes) -> bytes:
    """The dealer's commitment to one half of one holder's share."""
    pair = dealer.to_bytes(2, "big") + holder.to_bytes(2, "big")
    return hashlib.sha256(_SHARE_COMMITMENT + roster + pair + half + share).digest()[:COMMITMENT_BYTES]


def agree(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    """X25519.

    Raises:
        UpdateRejected: MALFORMED, the other key is a point of small order: everybody would know the result.
    """
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise malformed("an X25519 public key is of small order") from error


def check_public(key: bytes) -> None:
    """Refuse a public key that is not in its one encoding.

    Raises:
        UpdateRejected: MALFORMED.
    """
    if int.from_bytes(key, "little") >= _CURVE_PRIME:
        raise malformed("an X25519 public key is not in its canonical form")


def check_order(key: bytes) -> None:
    """Refuse a public key with which everybody agrees on the same, known secret.

    Raises:
        UpdateRejected: MALFORMED.
    """
    agree(_PROBE, key)


_PROBE = X25519PrivateKey.from_private_bytes(bytes(range(32)))  # not a secret: shows keys of small order


def pair_mask(mine: X25519PrivateKey, theirs: bytes, roster: bytes, a: int, b: int) -> tuple[bytes, int]:
    """The seed of the mask between two positions, and the coin that decides whether they have one.

    Returns:
        32 bytes, and an integer of [0, 2**64); both ends compute the same.
    """
    low, high = sorted((a, b))
    info = bytes(Writer(b"pair mask").u16(low).u16(high))
    both = hkdf(agree(mine, theirs), roster, info, KEY_BYTES + 8)
    return both[:KEY_BYTES], int.from_bytes(both[KEY_BYTES:], "big")


def has_edge(coin: int, odds: int) -> bool:
    """Whether two devices share a mask."""
    return odds == COMPLETE or coin < odds


def sign_of(me: int, other: int) -> int:
    """The lower position adds a pair's mask, the higher one subtracts it."""
    return 1 if me < other else -1


def sealing_key(shared: bytes, roster: bytes, dealer: int, holder: int) -> bytes:
    """The key under which ``dealer`` seals its shares for ``holder``: for one message of one roster."""
    return hkdf(shared, roster, bytes(Writer(b"seal").u16(dealer).u16(holder)))


def _associated(roster: bytes, dealer: int, holder: int) -> bytes:
    return bytes(Writer(b"share").raw(roster).u16(dealer).u16(holder))


def seal(key: bytes, shares: bytes, roster: bytes, dealer: int, holder: int) -> bytes:
    """Encrypt both shares of one holder: 64 bytes become 80."""
    return AESGCM(key).encrypt(_NONCE, shares, _associated(roster, dealer, holder))


def open_sealed(key: bytes, sealed: bytes, roster: bytes, dealer: int, holder: int) -> bytes:
    """Decrypt what :func:`seal` made.

    Raises:
        cryptography.exceptions.InvalidTag: another key, roster, dealer or holder, or altered bytes.
    """
    return AESGCM(key).decrypt(_NONCE, sealed, _associated(roster, dealer, holder))
