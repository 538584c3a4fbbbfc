"""The coordinator's way to the enrolment authority, which certifies devices' signing keys.

Devices trust each other's signing keys because the authority has certified them. Its private key should not
be here: whoever has it *and* the coordinator can invent devices, and then no sum hides anybody. So requests
are journalled, and the authority answers them elsewhere (``lepton authority``); only small installations
configure ``authority.key_file`` and have this process sign.

    signing = Signing.open(config.authority, store, deployment_of(ca_der))
    credential = signing.answer(device_id, request)      # b"": not yet
"""

import base64
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.crypto import load_signing_key
from lepton_fl.errors import ConfigError, NotFound, TrustError
from lepton_fl.files import canonical_json, write_atomic
from lepton_fl.secagg.identity import Certified, deployment_of, ends_of, issue, read_request
from lepton_server.authority import Authority
from lepton_server.config import AuthoritySection, ServerConfig
from lepton_server.store import Event, Store

log = logging.getLogger(__name__)

DAY_S = 86_400.0
KINDS = ("device.signing", "device.certified")


class Signing:
    """Takes devices' requests, and has the certificates."""

    def __init__(
        self,
        store: Store,
        deployment: str,
        public: bytes,
        key: Ed25519PrivateKey | None,
        days: float,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Make it.

        Args:
            store: where requests and certificates are recorded.
            deployment: the installation's name, ``lepton_fl.secagg.identity.deployment_of``.
            public: the authority's public key, 32 bytes.
            key: its private key; None = it is elsewhere.
            days: life of a certificate that is issued here.
            wall: UTC seconds.
        """
        self._store, self.deployment, self.public, self._key = store, deployment, public, key
        self.days, self._wall = days, wall
        self.trust = Certified([public])

    @classmethod
    def open(cls, config: AuthoritySection, store: Store, deployment: str) -> Self | None:
        """As configured; None where there is no authority.

        Raises:
            ConfigError: the two keys of the configuration do not belong together.
            NotFound, TrustError, StateCorrupt: the key file cannot be used.
        """
        key = None if config.key_file is None else load_signing_key(config.key_file)
        public = bytes.fromhex(config.public_key)
        if key is not None:
            own = key.public_key().public_bytes_raw()
            if public not in (b"", own):
                raise ConfigError(
                    f"authority.public_key is not that of {config.key_file}, which is {own.hex()}.",
                    hint="Remove one of the two, or give the file that belongs to the key.",
                )
            public = own
        return cls(store, deployment, public, key, config.certificate_days) if public else None

    def answer(self, device_id: str, request: bytes) -> bytes:
        """A device's certificate, 72 bytes; empty while the authority has not answered.

        Raises:
            UpdateRejected: MALFORMED, the request does not decode.
            TrustError: it is not signed by both keys, or is another device's.
        """
        device, signing_key = read_request(request, self.deployment)
        if device != device_id:
            raise TrustError(f"Device {device_id} asks for a signing certificate of device {device}.")
        events = [
            e
            for e in self._store.events(subject=device_id, kinds=KINDS)
            if e.body["signing_key"] == signing_key.hex()
        ]
        good = [e for e in events if e.kind == "device.certified" and self._left(e) > 0]
        if good and self._left(good[-1]) >= self.renew_s:
            return base64.b64decode(good[-1].body["credential"])
        if self._key is not None:
            return self._issue(device_id, signing_key)
        if not events or events[-1].kind != "device.signing":
            body = {
                "device_id": device_id,
                "signing_key": signing_key.hex(),
                "request": base64.b64encode(request).decode(),
            }
            self._store.record("device.signing", device_id, body)
            log.info("device %s asks the enrolment authority for a signing certificate", device_id)
        return base64.b64decode(good[-1].body["credential"]) if good else b""  # until the next one comes

    def install(self, device_id: str, signing_key: bytes, credential: bytes) -> None:
        """Record a certificate that the authority has issued elsewhere.

        Raises:
            TrustError: it is not the authority's, or has expired; or the device was revoked.
            UpdateRejected: MALFORMED, it does not decode.
            NotFound: there is no such device.
        """
        self.check(device_id, signing_key, credential)
        self._record(device_id, signing_key, credential)

    def check(self, device_id: str, signing_key: bytes, credential: bytes) -> None:
        """Check a certificate as devices do; raises TrustError or UpdateRejected."""
        self.trust.check(self.deployment, device_id, signing_key, credential, self._wall())

    def _issue(self, device_id: str, signing_key: bytes) -> bytes:
        assert self._key is not None  # the caller has looked
        not_after = int(self._wall() + self.days * DAY_S)
        credential = issue(self._key, self.deployment, device_id, signing_key, not_after)
        self._record(device_id, signing_key, credential)
        return credential

    def _record(self, device_id: str, signing_key: bytes, credential: bytes) -> None:
        body = {
            "device_id": device_id,
            "signing_key": signing_key.hex(),
            "credential": base64.b64encode(credential).decode(),
            "not_after": float(ends_of(credential)),
        }
        self._store.record("device.certified", device_id, body)
        log.info("the signing key of device %s is certified", device_id)

    def _left(self, certified: Event) -> float:
        return float(certified.body["not_after"]) - self._wall()

    @property
    def renew_s(self) -> float:
        """So long before its end a certificate is renewed, seconds."""
        return self.days * DAY_S / 3


# --- what is carried to an authority on another machine, and back -----------------------------------


_REQUESTS, _CERTIFICATES = "lepton signing requests 1", "lepton signing certificates 1"
_MOST_BYTES = 1 << 28  # of a file; a device takes about 500


@dataclass(frozen=True)
class Requests:
    """Devices' requests for signing certificates, as a file."""

    deployment: str
    devices: tuple[dict[str, str], ...]  # device_id, name, request (base64)

    def rows(self) -> list[dict[str, str]]:
        """For people."""
        return [{"device_id": d["device_id"], "name": d["name"]} for d in self.devices]

    def write(self, path: Path) -> None:
        """Write the file; raises DiskFull or StateError."""
        _write(path, _REQUESTS, self.deployment, self.devices)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it; raises ConfigError."""
        return cls(*_read(path, _REQUESTS, {"device_id", "name", "request"}))

    def sign(self, key: Ed25519PrivateKey, not_after: int) -> "Certificates":
        """Check every request and certify its key.

        Raises:
            TrustError: a request is not signed by both of its keys, or names another device.
            UpdateRejected: MALFORMED, it does not decode.
        """
        made = []
        for device in self.devices:
            found, signing_key = read_request(_base64(device["request"]), self.deployment)
            if found != device["device_id"]:
                raise TrustError(f"The request of device {found} is filed under {device['device_id']}.")
            credential = issue(key, self.deployment, found, signing_key, not_after)
            made.append(
                {
                    "device_id": found,
                    "name": device["name"],
                    "signing_key": signing_key.hex(),
                    "credential": base64.b64encode(credential).decode(),
                }
            )
        return Certificates(self.deployment, tuple(made))


@dataclass(frozen=True)
class Certificates:
    """The authority's answers, as a file."""

    deployment: str
    devices: tuple[dict[str, str], ...]  # device_id, name, signing_key (hexadecimal), credential (base64)

    def rows(self) -> list[dict[str, str]]:
        """For people."""
        return [{"device_id": d["device_id"], "name": d["name"]} for d in self.devices]

    def write(self, path: Path) -> None:
        """Write the file; raises DiskFull or StateError."""
        _write(path, _CERTIFICATES, self.deployment, self.devices)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it; raises ConfigError."""
        return cls(*_read(path, _CERTIFICATES, {"device_id", "name", "signing_key", "credential"}))

    def install(self, signing: Signing) -> list[dict[str, str]]:
        """Record all of them; a revoked device is left out.

        Raises:
            TrustError: one is not the configured authority's.
            ConfigError: they are for another installation.
        """
        if self.deployment != signing.deployment:
            raise ConfigError("These certificates are for devices of another coordinator.")
        for device in self.devices:
            signing.check(device["device_id"], _hex(device["signing_key"]), _base64(device["credential"]))
        done = []
        for device, row in zip(self.devices, self.rows(), strict=True):
            try:
                signing.install(
                    device["device_id"], _hex(device["signing_key"]), _base64(device["credential"])
                )
                done.append(row)
            except (TrustError, NotFound) as error:
                log.warning("%s", error)
        return done


def requests_of(store: Store, keys: Path) -> Requests:
    """The requests that the authority has not answered.

    Args:
        store: the coordinator's.
        keys: the folder of its certificate authority, whose certificate names the installation.
    """
    open_ones: dict[str, Event] = {}
    for event in store.events(kinds=(*KINDS, "device.revoked")):
        device_id = str(event.body["device_id"])
        if event.kind == "device.signing":
            open_ones[device_id] = event
        else:
            open_ones.pop(device_id, None)
    devices = [
        {"device_id": d, "name": store.device(d).name, "request": str(event.body["request"])}
        for d, event in open_ones.items()
    ]
    return Requests(deployment_of(Authority.open(keys).ca_der), tuple(devices))


def authority_key(config: ServerConfig) -> bytes:
    """The authority's public key as configured, 32 bytes; empty where there is none."""
    if config.authority.key_file is not None and not config.authority.public_key:
        return load_signing_key(config.authority.key_file).public_key().public_bytes_raw()
    return bytes.fromhex(config.authority.public_key)


def _write(path: Path, kind: str, deployment: str, devices: tuple[dict[str, str], ...]) -> None:
    write_atomic(path, canonical_json({"format": kind, "deployment": deployment, "devices": list(devices)}))


def _read(path: Path, kind: str, fields: set[str]) -> tuple[str, tuple[dict[str, str], ...]]:
    try:
        with open(path, "rb") as file:
            body = json.loads(file.read(_MOST_BYTES))
        devices = tuple(body["devices"])
        texts = [body["deployment"], *(text for device in devices for text in device.values())]
        if body["format"] != kind or not all(isinstance(text, str) for text in texts):
            raise ValueError("not the format")
        if any(set(device) != fields for device in devices):
            raise ValueError("other fields")
        return body["deployment"], devices
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no file of {kind!r}.") from error


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ConfigError("A request or certificate in the file does not decode.") from error


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError("A key in the file does not decode.") from error
