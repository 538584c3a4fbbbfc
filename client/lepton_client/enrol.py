"""How a device gets and keeps its certificate.

Both steps can be repeated: the key is made once and written before anything is asked, and the coordinator
answers the same token and key again. So a kill or a lost answer at any point leaves a device that is either
enrolled or can run the same command once more.

    identity = enrol(StateDir(folder), token_text, name="kitchen", groups=("home",))
"""

from dataclasses import replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from lepton_client.link import PROTOCOL, Link, UntrustedServer
from lepton_client.secure import signing_key
from lepton_client.state import Identity, StateDir
from lepton_fl import crypto
from lepton_fl.crashpoints import reached
from lepton_fl.errors import ConfigError, NotFound, TrustError
from lepton_fl.wire.v1 import device_pb2 as pb


def enrol(
    state: StateDir, token: str, *, name: str, groups: tuple[str, ...] = (), timeout_s: float = 20.0
) -> Identity:
    """Join a coordinator with a one-time token.

    Args:
        state: Where key and identity are kept; locked by the caller.
        token: The line that ``lepton token create`` printed.
        name: At most 64 characters.
        groups: Labels.
        timeout_s: Patience with the coordinator, seconds.

    Returns:
        The identity; the one already there if this token made it.

    Raises:
        TrustError: the token does not decode or is not accepted, or the server is not the token's.
        ConfigError: the device is enrolled already, with another token.
        ConnectionFailed: the coordinator cannot be reached; run it again.
        DiskFull, StateError: nothing could be written; the device is not enrolled.
    """
    join = crypto.parse_join_token(token)
    if state.is_enrolled():
        return _already(state.identity(), join)
    key = _key(state)
    signing_key(state)  # made here, certified at the first check-in
    reached("enrol.key")
    request = pb.EnrollRequest(
        protocol=PROTOCOL,
        token_secret=join.secret,
        csr_pem=crypto.make_csr(key, name),
        name=name,
        groups=groups,
    )
    with Link(join.addr, join.ca_pem, timeout_s=timeout_s) as link:
        answer = link.enroll(request)
    reached("enrol.answered")
    identity = Identity(
        device_id=answer.device_id,
        name=name,
        certificate_pem=answer.certificate_pem.decode("ascii", "replace"),
        ca_pem=join.ca_pem.decode("ascii"),
        enrolment=join.addr,
        device_service=answer.endpoints.device_service,
        fleet=answer.endpoints.fleet,
        token_sha256=join.secret_sha256,
        valid_from=0.0,
        valid_until=0.0,
        authority=join.authority.hex(),
    )
    return _keep(state, identity, key)


def renew(state: StateDir, identity: Identity, link: Link, cause: str = "") -> Identity:
    """Get a new certificate for the same key, and keep it; ``cause`` tells the coordinator why.

    Raises:
        TrustError: the coordinator refuses, or answers with a certificate that is not ours.
        ConnectionFailed: it cannot be reached; the old certificate stays.
    """
    key = crypto.load_key(state.key)
    csr = crypto.make_csr(key, identity.name)
    request = pb.RenewRequest(protocol=PROTOCOL, device_id=identity.device_id, csr_pem=csr, cause=cause)
    answer = link.renew(request)
    renewed = replace(
        identity,
        certificate_pem=answer.certificate_pem.decode("ascii", "replace"),
        device_service=answer.endpoints.device_service or identity.device_service,
        fleet=answer.endpoints.fleet or identity.fleet,
    )
    return _keep(state, renewed, key)


def _already(identity: Identity, join: crypto.JoinToken) -> Identity:
    if identity.token_sha256 == join.secret_sha256:
        return identity
    raise ConfigError(
        f"This device is enrolled already, as {identity.device_id} at {identity.enrolment}.",
        hint="Keep using it, or choose another folder with --state-dir. The token was not used.",
    )


def _key(state: StateDir) -> crypto.PrivateKey:
    try:
        return crypto.load_key(state.key)
    except NotFound:
        key = crypto.new_key()
        crypto.save_key(state.key, key)
        return key


def _keep(state: StateDir, identity: Identity, key: crypto.PrivateKey) -> Identity:
    """Verify, then save."""
    certificate = _verified(identity, key)
    checked = replace(
        identity,
        valid_from=certificate.not_valid_before_utc.timestamp(),
        valid_until=certificate.not_valid_after_utc.timestamp(),
    )
    state.save_identity(checked)
    return checked


def _verified(identity: Identity, key: crypto.PrivateKey) -> x509.Certificate:
    """The answer must be a certificate of our authority, for our key, under the id that our key gives."""
    certificate = _decode(identity)
    authority = x509.load_pem_x509_certificate(identity.ca_pem.encode())
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise UntrustedServer(
            "The certificate that came back was not issued by the token's authority."
        ) from error
    if crypto.public_der(key.public_key()) != _public_der(certificate):
        raise UntrustedServer("The certificate that came back is for another key.")
    if identity.device_id != crypto.device_id(key.public_key()):
        raise UntrustedServer(f"The id {identity.device_id[:40]!r} that came back is not that of our key.")
    for address in (identity.device_service, identity.fleet):
        if not address.rpartition(":")[0]:
            raise UntrustedServer(f"The coordinator named {address[:100]!r} as an address, not host:port.")
    return certificate


def _public_der(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    return crypto.public_der(key) if isinstance(key, crypto.PublicKey) else b""


def _decode(identity: Identity) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(identity.certificate_pem.encode())
    except ValueError as error:
        raise TrustError("The device's certificate does not decode.") from error
