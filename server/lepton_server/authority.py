"""The coordinator's certificate authority: who may call itself a device, and who is the coordinator.

Rules:

* The first start makes the CA (10 years). It is never replaced by itself: every device trusts this one, and a
  lost key is a decision for the operator.
* The server's certificate is renewed when a third of its life is left or its names have changed.
* A device certificate says one thing: this key belongs to the device whose id follows from the key. Whatever
  else a request asks for is ignored.

Files in the folder: ``ca.key`` (0600), ``ca.pem`` (to hand out), ``server.pem`` (0600; key and certificate in
one file, so that they can never be of two generations).

Example::

    authority = Authority.open(folder, ["fl.example.org", "192.0.2.7"])
    issued = authority.sign_device(csr, device_id)
    authority.verify_device_certificate(issued.pem, now=time.time())   # the device id, or TrustError
"""

import contextlib
import datetime as dt
import fcntl
import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lepton_fl.crypto import (
    UNREADABLE,
    PrivateKey,
    PublicKey,
    device_id,
    fingerprint,
    key_from_pem,
    key_to_pem,
    load_key,
    new_key,
    save_key,
    verify_csr,
)
from lepton_fl.errors import ConfigError, StateCorrupt, StateError, TrustError
from lepton_fl.files import make_private_folder, read_private, write_atomic, write_private

CA_DAYS = 3652  # ten years
SERVER_DAYS = 365
DEVICE_DAYS = 30
MAX_DEVICE_DAYS = 398
_SKEW = dt.timedelta(hours=24)  # a device's clock may be this far behind when it meets a fresh certificate
_ALWAYS = ("localhost", "127.0.0.1", "::1")
_DNS = re.compile(r"(\*\.)?(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


@dataclass(frozen=True)
class DeviceCertificate:
    """A certificate that was issued.

    Attributes:
        pem: The certificate, PEM.
        serial: Its serial number, lower-case hexadecimal.
        not_after: When it expires, seconds since 1970.
    """

    pem: bytes
    serial: str
    not_after: float


class Authority:
    """An opened certificate authority; make it with :meth:`open`. Safe to use from many threads."""

    def __init__(self, folder: Path, key: PrivateKey, certificate: x509.Certificate) -> None:
        self.folder = folder
        self._key = key
        self._certificate = certificate

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        hosts: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> "Authority":
        """Open the authority in ``folder``, making what is missing and renewing the server's certificate.

        Args:
            folder: Private folder of the keys; made with mode 0700.
            hosts: Names and IP addresses under which devices reach this server; localhost is always there.
            clock: Seconds since 1970.

        Raises:
            ConfigError: A host is neither a name nor an IP address.
            TrustError: A key file can be read by others.
            StateCorrupt: Key and certificate do not decode or do not belong together.
            StateError: The CA has expired, or its key is gone while its certificate is there.
            DiskFull: No space was left.
        """
        names = _san(hosts)
        path, now = Path(folder), clock()
        make_private_folder(path)
        with _locked(path):
            key, certificate = _open_ca(path, now)
            authority = cls(path, key, certificate)
            authority._refresh_server(names, now)
        return authority

    @property
    def ca_pem(self) -> bytes:
        """The CA certificate, PEM: what devices trust."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def ca_der(self) -> bytes:
        """The CA certificate, DER: what a join token carries."""
        return self._certificate.public_bytes(serialization.Encoding.DER)

    @property
    def ca_path(self) -> Path:
        """The file of the CA certificate."""
        return self.folder / "ca.pem"

    @property
    def ca_fingerprint(self) -> str:
        """SHA-256 of the CA certificate, for people to compare."""
        return fingerprint(self.ca_der)

    @property
    def server_path(self) -> Path:
        """The file of the server's key and certificate, fit for ``ssl.SSLContext.load_cert_chain``."""
        return self.folder / "server.pem"

    @property
    def server_key_pem(self) -> bytes:
        """The server's private key, PEM."""
        return key_to_pem(_read_server(self.server_path)[0])

    @property
    def server_cert_pem(self) -> bytes:
        """The server's certificate, PEM."""
        return _read_server(self.server_path)[1].public_bytes(serialization.Encoding.PEM)

    @property
    def server_not_after(self) -> float:
        """When the server's certificate expires, seconds since 1970."""
        return _read_server(self.server_path)[1].not_valid_after_utc.timestamp()

    # ------------------------------------------------------------------------------------------- devices

    def sign_device(
        self, csr_pem: bytes, expected_id: str, days: float = DEVICE_DAYS, *, now: float | None = None
    ) -> DeviceCertificate:
        """Issue a client certificate for the key of a request.

        Subject, extensions and attributes of the request are ignored.

        Args:
            csr_pem: The device's request, PEM.
            expected_id: The device it must be for; follows from its key.
            days: Life of the certificate, at most 398, and never longer than the CA's.
            now: Seconds since 1970; the system's clock by default.

        Raises:
            TrustError: The request is bad, or its key is another device's.
            ConfigError: ``days`` is out of bounds.
        """
        key = verify_csr(csr_pem)
        found = device_id(key)
        if found != expected_id:
            raise TrustError(f"The request is for the key of device {found}, not of {expected_id}.")
        return self.issue_device(key, days, now=now)

    def issue_device(
        self, key: PublicKey, days: float = DEVICE_DAYS, *, now: float | None = None
    ) -> DeviceCertificate:
        """Issue a client certificate for a key whose holder has proved that it is theirs (``verify_csr``).

        Args:
            key: The device's public key; its id follows from it.
            days: Life of the certificate, at most 398, and never longer than the CA's.
            now: Seconds since 1970; the system's clock by default.

        Raises:
            ConfigError: ``days`` is out of bounds.
        """
        if not 0 < days <= MAX_DEVICE_DAYS:
            raise ConfigError(f"Expected 0 < days <= {MAX_DEVICE_DAYS} for a device certificate, got {days}.")
        builder = self._builder(device_id(key), key, time.time() if now is None else now, days)
        certificate = (
            builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(_usage(digital_signature=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return DeviceCertificate(
            certificate.public_bytes(serialization.Encoding.PEM),
            f"{certificate.serial_number:x}",
            certificate.not_valid_after_utc.timestamp(),
        )

    def verify_device_certificate(self, certificate: bytes, now: float) -> str:
        """Check that this authority issued a client certificate that is valid now, and say for which device.

        Revocation is not checked here: the store knows it.

        Args:
            certificate: PEM or DER.
            now: Seconds since 1970.

        Raises:
            TrustError: Another issuer, another use, expired, not yet valid, or not a certificate.
        """
        leaf = _parse_certificate(certificate)
        try:
            leaf.verify_directly_issued_by(self._certificate)
            uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
            names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            key = leaf.public_key()
        except UNREADABLE as error:
            raise TrustError(
                "The certificate was not issued to a device by this coordinator.",
                hint="Enrol the device with a token of this coordinator.",
            ) from error
        if constraints.ca or ExtendedKeyUsageOID.CLIENT_AUTH not in uses:
            raise TrustError("The certificate is not one for devices.")
        _check_time(leaf, now)
        if not isinstance(key, ec.EllipticCurvePublicKey) or len(names) != 1:
            raise TrustError("The certificate is not one for devices.")
        if names[0].value != device_id(key):
            raise TrustError("The certificate's name does not follow from its key.")
        return device_id(key)

    # -------------------------------------------------------------------------------------------- server

    def refresh_server(self, hosts: Sequence[str] = (), *, now: float | None = None) -> bool:
        """Renew the server's certificate if it is due or its names changed; return whether it was.

        For a server that runs for months: the new one is in ``server_path`` for the next TLS set-up.
        """
        names = _san(hosts)
        with _locked(self.folder):
            return self._refresh_server(names, time.time() if now is None else now)

    def _refresh_server(self, names: Sequence[x509.GeneralName], now: float) -> bool:
        if self.server_path.exists() and self._server_is_good(names, now):
            return False
        key = new_key()
        certificate = (
            self._builder("lepton coordinator", key.public_key(), now, SERVER_DAYS)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_usage(digital_signature=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        write_private(
            self.server_path, key_to_pem(key) + certificate.public_bytes(serialization.Encoding.PEM)
        )
        return True

    def _server_is_good(self, names: Sequence[x509.GeneralName], now: float) -> bool:
        try:
            key, certificate = _read_server(self.server_path)
            certificate.verify_directly_issued_by(self._certificate)
            held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (StateCorrupt, *UNREADABLE):
            return False  # it is ours to replace: nobody pins it
        start, end = (
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )
        fresh = start <= now and end - now > (end - start) / 3
        return fresh and set(held) == set(names) and key.public_key() == certificate.public_key()

    def _builder(self, name: str, key: PublicKey, now: float, days: float) -> x509.CertificateBuilder:
        start = _utc(now)
        end = min(start + dt.timedelta(days=days), self._certificate.not_valid_after_utc)
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(_ec(self._certificate))
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - _SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority_key, critical=False)
        )


# ------------------------------------------------------------------------------------------------------ CA


def _open_ca(folder: Path, now: float) -> tuple[PrivateKey, x509.Certificate]:
    key_path, certificate_path = folder / "ca.key", folder / "ca.pem"
    if certificate_path.exists() and not key_path.exists():
        raise StateError(
            f"{certificate_path} is there, but its key {key_path} is gone.",
            hint="Restore the key from a copy. A new CA would mean that every device has to enrol again.",
        )
    if not key_path.exists():
        save_key(key_path, new_key())
    key = load_key(key_path)
    if not certificate_path.exists():  # the first start, or one that was killed in between
        certificate = _make_ca(key, now)
        write_atomic(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
    return key, _read_ca(certificate_path, key, now)


def _make_ca(key: PrivateKey, now: float) -> x509.Certificate:
    public, start = key.public_key(), _utc(now)
    name = _name(f"lepton CA {device_id(public)[2:10]}")  # tells two coordinators' CAs apart
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _SKEW)
        .not_valid_after(start + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _read_ca(path: Path, key: PrivateKey, now: float) -> x509.Certificate:
    try:
        certificate = _parse_certificate(path.read_bytes())
    except TrustError as error:
        raise StateCorrupt(f"{path} holds no certificate.", hint="Restore it from a copy.") from error
    except OSError as error:
        raise StateError(f"Cannot read {path}: {error.strerror}.") from error
    if certificate.public_key() != key.public_key():
        raise StateCorrupt(
            f"{path} is not the certificate of the key in {path.with_name('ca.key')}.",
            hint="Restore both from the same copy.",
        )
    try:
        _check_time(certificate, now)
    except TrustError as error:
        raise StateError(
            f"{path}: {error}",
            hint="Check this machine's clock. An expired CA must be replaced and all devices enrolled anew.",
        ) from error
    return certificate


def _read_server(path: Path) -> tuple[PrivateKey, x509.Certificate]:
    pem = read_private(path)
    marker = pem.find(b"-----BEGIN CERTIFICATE-----")
    try:
        return key_from_pem(pem[:marker]), _parse_certificate(pem[marker:])
    except TrustError as error:
        raise StateCorrupt(
            f"{path} holds no certificate.", hint="Remove it; the next start makes one."
        ) from error


# ------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make files here: two first starts must not make two CAs."""
    with open(folder / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse_certificate(data: bytes) -> x509.Certificate:
    try:
        if data.lstrip().startswith(b"-----"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except UNREADABLE as error:
        raise TrustError("Expected a certificate in PEM or DER, got bytes that are none.") from error


def _check_time(certificate: x509.Certificate, now: float) -> None:
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if not now >= start:  # written so that NaN fails, too
        raise TrustError(
            f"The certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on.",
            hint="Check the clocks.",
        )
    if not now < end:
        raise TrustError(
            f"The certificate expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.",
            hint="Enrol the device again with a new token.",
        )


def _san(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return the names for a server certificate, each once, localhost among them."""
    return [_general_name(host) for host in dict.fromkeys([*_ALWAYS, *(host.strip() for host in hosts)])]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if len(host) > 253 or not _DNS.fullmatch(host):
        raise ConfigError(f"Expected a host name or an IP address for the server certificate, got {host!r}.")
    return x509.DNSName(host.lower())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _ec(certificate: x509.Certificate) -> PublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise StateCorrupt("Expected a CA certificate with an elliptic-curve key.")
    return key


def _utc(now: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(now, tz=dt.UTC).replace(microsecond=0)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
