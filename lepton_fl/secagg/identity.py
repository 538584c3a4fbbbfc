"""Who signs: an Ed25519 key per device, certified by an enrolment authority.

A device's identity is its P-256 key (``lepton_fl.crypto``): TLS and Flower want it, and the device id is its
hash. Protocol messages are signed with a second key, Ed25519, because its signatures are deterministic, need
no randomness at signing time and are checked by the thousand. The two are tied together once, at enrolment:

1. the device makes the Ed25519 key and asks (:func:`request_certificate`): the identity key signs the new
   key, the new key signs the identity, so neither can be claimed by somebody else;
2. the authority checks that, checks that the device is enrolled, and answers (:func:`certify`);
3. devices know the authority's public key from their enrolment and check each other (:class:`Certified`).

The authority's key must not be on the aggregator: whoever has both can invent devices, and no protocol of
this family withstands that.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lepton_fl.crypto import PrivateKey, device_id, public_der, public_from_der
from lepton_fl.errors import TrustError
from lepton_fl.secagg.codec import Reader, Writer
from lepton_fl.secagg.context import VERSION

SIGNATURE_BYTES = 64
MAX_CREDENTIAL = 256  # bytes
_CACHE = 4096  # credentials that were found good


class Trust(Protocol):
    """Decides which signing key belongs to a device."""

    def check(self, deployment: str, device: str, key: bytes, credential: bytes, now: float) -> None:
        """Return if ``key`` (Ed25519, 32 bytes) is the device's, else raise TrustError.

        Args:
            deployment: The installation that the device claims to be enrolled at.
            device: Its id.
            key: The signing key that it shows.
            credential: What it shows as proof; may be empty.
            now: Seconds since 1970.
        """
        ...


class Pinned:
    """Trust in a list of keys that came by another way (a file from the fleet's owner)."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    def check(self, deployment: str, device: str, key: bytes, credential: bytes, now: float) -> None:
        """See :class:`Trust`; the deployment and the time do not matter, a credential is refused."""
        if self._keys.get(device) != key or credential:
            raise TrustError(f"The signing key of device {device} is not the one on the list.")


class Certified:
    """Trust in what an enrolment authority has signed; good certificates are remembered (they are public)."""

    def __init__(self, authorities: Collection[bytes]) -> None:
        self._authorities = [Ed25519PublicKey.from_public_bytes(key) for key in authorities]
        self._good: OrderedDict[bytes, float] = OrderedDict()  # digest -> not after

    def check(self, deployment: str, device: str, key: bytes, credential: bytes, now: float) -> None:
        """See :class:`Trust`."""
        digest = hashlib.sha256(_certified(deployment, device, key, 0) + credential).digest()
        not_after = self._good.get(digest)
        if not_after is None:
            not_after = self._verify(deployment, device, key, credential)
            self._good[digest] = not_after
            if len(self._good) > _CACHE:
                self._good.popitem(last=False)
        if now > not_after:
            raise TrustError(
                f"The signing certificate of device {device} has expired.",
                hint="The device must enrol again.",
            )

    def _verify(self, deployment: str, device: str, key: bytes, credential: bytes) -> float:
        reader = Reader(credential)
        not_after, signature = reader.u64(), reader.raw(SIGNATURE_BYTES)
        reader.finish()
        statement = _certified(deployment, device, key, not_after)
        for authority in self._authorities:
            try:
                authority.verify(signature, statement)
                return float(not_after)
            except InvalidSignature:
                continue
        raise TrustError(f"The signing key of device {device} is not certified by a known authority.")


def deployment_of(ca_der: bytes) -> str:
    """The name of a coordinator's installation: that of its CA certificate (DER), which its devices have."""
    return "ca-" + hashlib.sha256(ca_der).hexdigest()


def request_certificate(identity: PrivateKey, signing: Ed25519PrivateKey, deployment: str) -> bytes:
    """Ask that ``signing`` be certified for the device whose identity key is ``identity``."""
    key = signing.public_key().public_bytes_raw()
    der = public_der(identity.public_key())
    statement = _requested(deployment, der, key)
    proof = identity.sign(statement, ec.ECDSA(hashes.SHA256()))
    return bytes(Writer().blob(der).raw(key).raw(signing.sign(statement)).blob(proof))


def certify(
    authority: Ed25519PrivateKey, request: bytes, deployment: str, not_after: int
) -> tuple[str, bytes]:
    """Check a request and sign the device's certificate. Whether the device is enrolled, the caller checks.

    Args:
        authority: The enrolment authority's key.
        request: From :func:`request_certificate`.
        deployment: The installation's name.
        not_after: Seconds since 1970.

    Returns:
        The id of the device, derived from its identity key, and the credential for its adverts (72 bytes).

    Raises:
        UpdateRejected: MALFORMED, it does not decode.
        TrustError: one of the two signatures is wrong.
    """
    device, key = read_request(request, deployment)
    return device, issue(authority, deployment, device, key, not_after)


def read_request(request: bytes, deployment: str) -> tuple[str, bytes]:
    """Who asks for which signing key to be certified; both have signed.

    Returns:
        The device's id and the signing key, 32 bytes.

    Raises:
        UpdateRejected: MALFORMED, it does not decode.
        TrustError: one of the two signatures is wrong, or the identity is no P-256 key.
    """
    reader = Reader(request)
    der, key = reader.blob(512), reader.raw(32)
    possession, proof = reader.raw(SIGNATURE_BYTES), reader.blob(128)
    reader.finish()
    identity = public_from_der(der)
    statement = _requested(deployment, der, key)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(possession, statement)
        identity.verify(proof, statement, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise TrustError(
            "The request for a signing certificate is not signed by both of its keys."
        ) from error
    return device_id(identity), key


def issue(authority: Ed25519PrivateKey, deployment: str, device: str, key: bytes, not_after: int) -> bytes:
    """The credential (72 bytes) of a device whose request was found good."""
    signature = authority.sign(_certified(deployment, device, key, not_after))
    return bytes(Writer().u64(not_after).raw(signature))


def ends_of(credential: bytes) -> int:
    """When a credential ends, seconds since 1970; raises UpdateRejected if it is none."""
    reader = Reader(credential)
    not_after = reader.u64()
    reader.raw(SIGNATURE_BYTES)
    reader.finish()
    return not_after


def _requested(deployment: str, der: bytes, key: bytes) -> bytes:
    return bytes(Writer(VERSION + b" certificate request\0").text(deployment).blob(der).raw(key))


def _certified(deployment: str, device: str, key: bytes, not_after: int) -> bytes:
    writer = Writer(VERSION + b" certificate\0").text(deployment).text(device)
    return bytes(writer.raw(key).u64(not_after))
