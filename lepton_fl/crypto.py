"""Who a device is: its key, its name, its certificate request, and the token that lets it join.

Rules:

* A device makes its key itself; the private half never leaves it. The id is derived from the public half,
  so nobody can hold another device's id without holding its key.
* Keys are elliptic curve P-256: any TLS stack takes them, and so does Flower's node authentication, which
  verifies ECDSA with whatever curve the key has.
* A join token is one printable line with all that the owner of a device needs: where the coordinator is,
  which certificate authority to trust, and a secret that is good once.

Example::

    key = new_key()
    csr = make_csr(key, "kitchen")
    token = parse_join_token(text)          # TrustError when it is cut off or altered
"""

import base64
import binascii
import hashlib
import ipaddress
import json
import os
import re
import secrets
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import NameOID

from lepton_fl.errors import ConfigError, StateCorrupt, TrustError
from lepton_fl.files import canonical_json, read_private, write_private

# What the cryptography library raises for bytes that are no certificate, request or key, or a damaged one.
UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

MIN_PASSPHRASE = 12  # bytes
_SALT_BYTES, _NONCE_BYTES = 16, 12
SECRET_BYTES = 20  # 160 bits of a join token's secret
_TOKEN_PREFIX = "lepton1."  # noqa: S105 - the marker in front of every token, not a secret
_MAX_TOKEN = 8192  # characters; a real one has about 1,000
_MAX_PEM = 16384  # bytes; a real request has about 500
_ID_CONTEXT = b"lepton device id v1\x00"
_ID_BYTES = 15  # 120 bits, which base32 writes as 24 characters without padding
_CHECK_CONTEXT = b"lepton join token v1\x00"
_CHECK_BYTES = 8
_DEVICE_ID = re.compile(r"d-[a-z2-7]{24}")
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


# ---------------------------------------------------------------------------------------------------- keys


def new_key() -> PrivateKey:
    """Make a P-256 key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey) -> bytes:
    """Encode a private key as PKCS #8 PEM, not encrypted: keep it in a private file only."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes) -> PrivateKey:
    """Decode a P-256 private key.

    Raises:
        StateCorrupt: It does not decode, or is a key of another kind.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except UNREADABLE as error:
        raise StateCorrupt("Expected an unencrypted private key in PEM, got bytes that are none.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise StateCorrupt("Expected an elliptic-curve P-256 private key, got another kind of key.")
    return key


def save_key(path: str | os.PathLike[str], key: PrivateKey) -> None:
    """Write a private key with mode 0600, durably.

    Raises:
        DiskFull: No space was left; nothing is left behind.
    """
    write_private(path, key_to_pem(key))


def load_key(path: str | os.PathLike[str]) -> PrivateKey:
    """Read a private key that :func:`save_key` wrote.

    Raises:
        NotFound: There is no such file.
        TrustError: Others can read the file.
        StateCorrupt: It holds no P-256 key.
    """
    pem = read_private(path)
    try:
        return key_from_pem(pem)
    except StateCorrupt as error:
        raise StateCorrupt(
            f"{os.fspath(path)}: {error}",
            hint="Restore the file, or remove it and enrol again with a new token.",
        ) from error


def save_signing_key(path: str | os.PathLike[str], key: Ed25519PrivateKey) -> None:
    """Write an Ed25519 key, hexadecimal on one line, with mode 0600, durably.

    Raises:
        DiskFull: No space was left; nothing is left behind.
    """
    write_private(path, key.private_bytes_raw().hex().encode() + b"\n")


def load_signing_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read what :func:`save_signing_key` wrote.

    Raises:
        NotFound: There is no such file.
        TrustError: Others can read the file.
        StateCorrupt: It holds no key.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(read_private(path).decode().strip()))
    except ValueError as error:
        raise StateCorrupt(
            f"{os.fspath(path)} holds no Ed25519 key.", hint="Restore the file from a copy."
        ) from error


def public_der(key: PublicKey) -> bytes:
    """Encode a public key as DER SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_pem(key: PublicKey) -> bytes:
    """Encode a public key as PEM SubjectPublicKeyInfo: the form that Flower's node authentication uses."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_from_der(der: bytes) -> PublicKey:
    """Decode a P-256 public key.

    Raises:
        TrustError: It does not decode, or is a key of another kind.
    """
    try:
        key = serialization.load_der_public_key(der)
    except UNREADABLE as error:
        raise TrustError("Expected a public key in DER, got bytes that are none.") from error
    return _require_p256(key)


def _require_p256(key: object) -> PublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("Expected an elliptic-curve P-256 public key, got another kind of key.")
    return key


def device_id(key: PublicKey) -> str:
    """Return the id of the device that holds ``key``: ``d-`` and 24 of ``a-z2-7`` (120 bits of SHA-256)."""
    digest = hashlib.sha256(_ID_CONTEXT + public_der(key)).digest()[:_ID_BYTES]
    return "d-" + base64.b32encode(digest).decode("ascii").lower()


def is_device_id(text: str) -> bool:
    """Return whether ``text`` has the form of a device id."""
    return _DEVICE_ID.fullmatch(text) is not None


def fingerprint(der: bytes) -> str:
    """Return SHA-256 of a DER certificate or key as people compare it: ``AB:CD:…``, 32 pairs."""
    return hashlib.sha256(der).digest().hex(":").upper()


# ------------------------------------------------------------------------------- certificate requests (CSR)


def make_csr(key: PrivateKey, name: str) -> bytes:
    """Ask for a certificate for ``key``: a PKCS #10 request in PEM, signed with it.

    Args:
        key: The device's own key.
        name: What the owner calls the device, 1 to 64 characters; a wish, the coordinator decides.

    Raises:
        ConfigError: The name is empty or too long.
    """
    if not 1 <= len(name) <= 64:
        raise ConfigError(f"Expected a device name of 1 to 64 characters, got {len(name)}.")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def verify_csr(pem: bytes) -> PublicKey:
    """Check that a request was signed by the key it is for, and return that key.

    Nothing else in the request counts: subject, extensions and attributes are the applicant's wishes.

    Raises:
        TrustError: It does not decode, has a bad signature, or its key is not P-256.
    """
    if len(pem) > _MAX_PEM:
        raise TrustError(f"Expected a certificate request of at most {_MAX_PEM} bytes, got {len(pem)}.")
    try:
        request = x509.load_pem_x509_csr(pem)
        key = _require_p256(request.public_key())
        valid = request.is_signature_valid
    except UNREADABLE as error:
        raise TrustError("Expected a certificate request in PEM, got bytes that are none.") from error
    if not valid:
        raise TrustError("The certificate request is not signed by the key it is for.")
    return key


# ---------------------------------------------------------------------------------------------- join tokens


@dataclass(frozen=True)
class JoinToken:
    """What a device owner gets from the operator.

    Attributes:
        addr: ``host:port`` of the enrolment service.
        ca: The coordinator's CA certificate, DER.
        secret: 20 random bytes, good for one enrolment; never logged, stored at the coordinator as a hash.
        authority: The enrolment authority's public key, Ed25519, 32 bytes; empty where there is none.
    """

    addr: str
    ca: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    authority: bytes = b""

    @property
    def secret_sha256(self) -> str:
        """What the coordinator keeps of the secret."""
        return secret_sha256(self.secret)

    @property
    def ca_pem(self) -> bytes:
        """The CA certificate in PEM, as TLS libraries want it."""
        return x509.load_der_x509_certificate(self.ca).public_bytes(serialization.Encoding.PEM)


def new_secret() -> bytes:
    """Return the secret of a new join token: 20 bytes of the operating system's randomness."""
    return secrets.token_bytes(SECRET_BYTES)


def secret_sha256(secret: bytes) -> str:
    """Return the hash under which the coordinator knows a secret (64 hexadecimal digits).

    A plain hash suffices, because the secret is 160 random bits and not a password.
    """
    return hashlib.sha256(secret).hexdigest()


def make_join_token(addr: str, ca: bytes, secret: bytes, authority: bytes = b"") -> str:
    """Print a join token: ``lepton1.`` and the base64url of its canonical JSON.

    Args:
        addr: ``host:port`` of the enrolment service as devices reach it; IPv6 as ``[::1]:port``.
        ca: The CA certificate, DER.
        secret: 20 bytes from :func:`new_secret`.
        authority: The enrolment authority's public key, 32 bytes, which the device then pins; may be empty.

    Raises:
        ConfigError: A part is not usable.
    """
    try:
        _check_parts(addr, ca, secret, authority)
    except TrustError as error:
        raise ConfigError(str(error)) from error
    check = _checksum(addr, ca, secret, authority)
    fields = {
        "addr": addr,
        "ca": base64.b64encode(ca).decode("ascii"),
        "check": _b64url(check),
        "secret": _b64url(secret),
    }
    if authority:
        fields["authority"] = _b64url(authority)
    return _TOKEN_PREFIX + _b64url(canonical_json(fields))


def parse_join_token(text: str) -> JoinToken:
    """Read a join token; white space around it, as copying leaves it, does not matter.

    Raises:
        TrustError: It is not a join token, is cut off, or was altered.
    """
    token = text.strip()
    if not token.startswith(_TOKEN_PREFIX):
        raise _bad_token(f"Expected a join token that starts with {_TOKEN_PREFIX!r}")
    if len(token) > _MAX_TOKEN:
        raise _bad_token(f"Expected a join token of at most {_MAX_TOKEN} characters, got {len(token)}")
    try:
        raw = _unb64url(token.removeprefix(_TOKEN_PREFIX))
        fields = json.loads(raw)
        if not isinstance(fields, dict) or set(fields) - {"authority"} != {"addr", "ca", "check", "secret"}:
            raise _bad_token("The join token does not have the expected parts")
        if not all(isinstance(value, str) for value in fields.values()) or canonical_json(fields) != raw:
            raise _bad_token("The join token is not in its canonical form")
        ca = base64.b64decode(fields["ca"], validate=True)
        addr, secret, check = fields["addr"], _unb64url(fields["secret"]), _unb64url(fields["check"])
        authority = _unb64url(fields.get("authority", ""))
    except (ValueError, RecursionError) as error:
        raise _bad_token("The join token does not decode") from error
    if not secrets.compare_digest(check, _checksum(addr, ca, secret, authority)):
        raise _bad_token("The join token does not match its checksum")
    _check_parts(addr, ca, secret, authority)
    return JoinToken(addr, ca, secret, authority)


def _check_parts(addr: str, ca: bytes, secret: bytes, authority: bytes) -> None:
    _check_address(addr)
    if len(authority) not in (0, 32):
        raise _bad_token(f"Expected an authority's key of 32 bytes, got {len(authority)}")
    if len(secret) != SECRET_BYTES:
        raise _bad_token(f"Expected a secret of {SECRET_BYTES} bytes, got {len(secret)}")
    try:
        x509.load_der_x509_certificate(ca)
    except UNREADABLE as error:
        raise _bad_token("The CA certificate in the join token does not decode") from error


def _check_address(addr: str) -> None:
    host, separator, port = addr.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise _bad_token(f"Expected an address HOST:PORT with a port from 1 to 65535, got {addr!r}")
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as error:
            raise _bad_token(f"Expected an IPv6 address in brackets, got {host!r}") from error
    elif len(host) > 253 or not _HOST.fullmatch(host):
        raise _bad_token(f"Expected a host name or an IP address, got {host!r}")


def _checksum(addr: str, ca: bytes, secret: bytes, authority: bytes) -> bytes:
    """Tell a slip of the pen from a good token before the network is asked. Not a signature."""
    parts = [addr, ca.hex(), secret.hex(), *([authority.hex()] if authority else [])]
    return hashlib.sha256(_CHECK_CONTEXT + canonical_json(parts)).digest()[:_CHECK_BYTES]


def _bad_token(message: str) -> TrustError:
    return TrustError(
        message + ".", hint="Copy the whole line that `lepton token create` printed, or ask for a new token."
    )


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unb64url(text: str) -> bytes:
    """Decode base64url without padding; raises ValueError for anything but its one encoding."""
    if not text.isascii():
        raise binascii.Error("not ASCII")
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _b64url(data) != text:
        raise binascii.Error("not the canonical encoding")
    return data


# ------------------------------------------------------------------------------------- under a passphrase


def seal(data: bytes, passphrase: bytes, purpose: str) -> bytes:
    """Encrypt and authenticate: scrypt (RFC 7914, 128 MB of memory a guess), then AES-256-GCM.

    Args:
        data: what nobody without the passphrase shall read.
        passphrase: it may be attacked offline, for years.
        purpose: what it is for; of another purpose it does not open.

    Raises:
        TrustError: the passphrase is shorter than :data:`MIN_PASSPHRASE`.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise TrustError(
            f"Expected a passphrase of at least {MIN_PASSPHRASE} bytes, got {len(passphrase)}.",
            hint="Five random words do.",
        )
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    return salt + nonce + _passphrase_cipher(passphrase, salt).encrypt(nonce, data, purpose.encode())


def unseal(box: bytes, passphrase: bytes, purpose: str) -> bytes:
    """Open what :func:`seal` made.

    Raises:
        TrustError: it is another passphrase, or the box was altered.
    """
    salt, nonce = box[:_SALT_BYTES], box[_SALT_BYTES : _SALT_BYTES + _NONCE_BYTES]
    try:
        cipher = _passphrase_cipher(passphrase, salt)
        return cipher.decrypt(nonce, box[_SALT_BYTES + _NONCE_BYTES :], purpose.encode())
    except (InvalidTag, ValueError) as error:
        raise TrustError("The passphrase does not open it.", hint="Check it and try again.") from error


def _passphrase_cipher(passphrase: bytes, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, n=2**17, r=8, p=1).derive(passphrase))
