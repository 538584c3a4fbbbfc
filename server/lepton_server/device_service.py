"""The gRPC device service: enrolment, check-in and the waiting streams.

Two ports of one process. The *enrolment port* has server TLS and answers ``Enroll`` and ``Renew``: whoever
calls proves itself with a token or with its key. The *device port* demands a certificate of our authority and
answers ``CheckIn``, ``Wait``, ``Certify``, ``FetchMetadata`` and ``FetchChunks``.

Rules:

* A device is who its certificate's key says: its id is derived from the key. Names in the certificate mean
  nothing, and the fleet is asked at every call: a revoked device is refused though its certificate is valid.
* A request is bytes until its handler has checked every field. What is wrong is named, with its bound.
* A peer gets our errors (``lepton_fl.wire.status``) and never a stack trace; a secret is never logged.
* Who calls, how often and how many at once is looked at before a byte of the request is read, and a request
  that does not arrive within ``READ_S`` is given up. Who is put off is told for how long (``retry-after``).
* The event loop computes for microseconds and never waits: what touches the store runs in a small pool.

Example::

    service = DeviceService(config, store, authority, fleet)
    service.start()                       # ConnectionFailed: a port is taken
    service.endpoints.device_service      # "fl.example.org:9441"
    service.stop()
"""

import asyncio
import base64
import contextlib
import logging
import math
import os
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NoReturn, TypeVar, get_args

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError, Message

from lepton_fl import crypto
from lepton_fl.delivery.rollout import Service
from lepton_fl.delivery.trial import WORDS
from lepton_fl.errors import Cause, ConfigError, ConnectionFailed, Fault, LeptonError, NotFound, TrustError
from lepton_fl.plan import PROTOCOL_VERSION
from lepton_fl.privacy.head import HASH_BYTES, MAX_KEY, MAX_SIGNATURE, LedgerHead
from lepton_fl.wire.status import MAX_DETAIL, metadata_of, status_of, waited_s
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.admission import Door, Pace
from lepton_server.authority import Authority, DeviceCertificate
from lepton_server.config import ListenSection, ServerConfig
from lepton_server.connections import HANDSHAKE_S, Crowd, Room, address_of
from lepton_server.downloads import Downloads
from lepton_server.fleet import (
    BUSY,
    IDLE,
    NOT_ELIGIBLE,
    Engaged,
    Failed,
    Fleet,
    Report,
    Secrecy,
    Serving,
    TaskState,
    Tried,
)
from lepton_server.heads import Heads
from lepton_server.releases import shelf_of
from lepton_server.signing import Signing
from lepton_server.store import Device, Store, Token

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
W = TypeVar("W")  # who calls: a device, or at the enrolment port an address
Work = Callable[[bytes, Context, W], Awaitable[Message | None]]
Admit = Callable[[Context, bool], contextlib.AbstractContextManager[W]]  # the bool: it is a stream
M = TypeVar("M", bound=Message)

REPLAY_S = 600.0  # a device whose answer was lost may show its spent token again for so long
THIN_S = 1.0  # how often an address is looked for that has too many connections, ...
THIN_SHARE = 0.02  # ... less often where a look takes more than this share of the time
REFRESH_S = 3600.0  # how often the server's own certificate is looked at
RENEW_GAP_S = 60.0  # a device gets at most one certificate in this time
ENROLMENTS_AT_ONCE = 512  # more are put off, ...
ENROLMENTS_OF_ADDRESS = 32  # ... and more from one address
CALLS_OF_DEVICE = 16  # in hand at a time; it needs two
CALLS_OF_CONNECTION: Final = 8  # under way; HTTP/2 tells the peer, whose stack holds further ones back
LINE: Final = 4_000  # calls that gRPC keeps until we look at them
READ_S: Final = 10.0  # for the request of a call to arrive
SEND_S: Final = 120.0  # for a chunk (256 kB) to leave
LATE_S: Final = (
    0.5  # a call that has waited longer for its turn shows that there are too many; half of them are put off
)
MAX_FAILED = 9  # failed releases in one check-in
MAX_DOWNLOAD_CALLS = 4_000  # served or in line
_SERVICE = "lepton.v1.DeviceService"
_CALLS = ("Enroll", "Renew", "CheckIn", "Wait", "Certify", "FetchMetadata", "FetchChunks")
_STREAMS = ("Wait", "FetchChunks")
_STATUS = {pb.STATUS_IDLE: IDLE, pb.STATUS_BUSY: BUSY, pb.STATUS_NOT_ELIGIBLE: NOT_ELIGIBLE}
_Passing = Literal[
    "protocol",
    "status",
    "reason",
    "device_time",
    "desired_digest",
    "credential_ends",
    "adverts",
    "advert_session",
    "ledger",
    "troubles",
    "engaged",
]
_PASSING: tuple[_Passing, ...] = get_args(_Passing)  # what a check-in says of this moment only
_MOST_TROUBLES = 8  # in one check-in
_MOST_ENGAGED, _MAX_NAME = 8, 200  # attempts in one check-in, and characters of a run's name or a nonce
_MOST_ADVERTS, _MAX_ADVERT = 8, 1024  # keys made ahead in one check-in, and bytes of one
_RENEWED = {  # why a device came for a new certificate, where something was wrong
    Cause.EXPIRED_CERTIFICATE.value: "its certificate had expired; it was given a new one",
    Cause.WRONG_CERTIFICATE.value: "the certificate that it showed was not accepted; it was given a new one",
}
_MAX_CACHED = 100_000  # certificates (about 250 bytes each) whose check need not be repeated
_MAX_REPORTS = 8 << 20  # bytes of reports whose check need not be repeated; checked, they take more

_NO_SERVICE, _NO_TRIAL = ("", Service()), Tried()


class _Refusal(Exception):
    """An error whose gRPC status is another than its class' usual one, or that says when to come again."""

    def __init__(self, status: grpc.StatusCode, error: LeptonError, retry_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.status, self.error, self.retry_s = status, error, retry_s


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where devices find the services, ``host:port``."""

    enrolment: str
    device_service: str
    fleet: str


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a verified certificate says."""

    device_id: str
    not_after: float  # UTC, s
    renew_after: float  # UTC, s


class DeviceService:
    """The two gRPC ports, on an event loop in a thread of its own."""

    def __init__(
        self,
        config: ServerConfig,
        store: Store,
        authority: Authority,
        fleet: Fleet,
        *,
        fleet_port: int | None = None,
        signing: Signing | None = None,
        heads: Heads | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; nothing is opened before :meth:`start`.

        Args:
            config: Of the coordinator.
            store: Enrolments are recorded here.
            authority: Issues certificates and has the server's own.
            fleet: The view that check-ins feed; started by the caller.
            fleet_port: Where Flower's fleet API really listens, when the configured port is 0.
            signing: The way to the enrolment authority; None = there is none.
            heads: What devices are told of the privacy ledger; None = nothing.
            wall: UTC seconds.
        """
        self._signing, self._heads = signing, heads
        self._config, self._store, self._authority, self._fleet = config, store, authority, fleet
        self._fleet_port = config.listen.fleet_port if fleet_port is None else fleet_port
        self._wall = wall
        self._identities = _Identities(
            (1 - config.tls.renew_at) * config.tls.device_certificate_days * 86_400
        )
        self._reports: dict[bytes, Report] = {}
        self._reports_size = 0  # bytes of its keys
        limits = config.limits
        self._limiter = FailureLimiter(limits.enrolment_failures, limits.enrolment_window_s)
        self._pace = Pace(limits.calls_per_s, limits.call_burst)
        self._door = Door(limits.max_concurrent, CALLS_OF_DEVICE)
        self._shed = False  # the last late call was put off
        self._enrolment_door = Door(ENROLMENTS_AT_ONCE, ENROLMENTS_OF_ADDRESS)
        self._pool: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._servers: list[grpc.aio.Server] = []
        self._keepers: list[asyncio.Future[None]] = []
        self._room = Room.of(limits)
        self._downloads: Downloads | None = None
        self._endpoints: Endpoints | None = None

    # -- life ---------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> Endpoints:
        """Where devices reach this coordinator; known once it is started."""
        assert self._endpoints is not None, "the device service is not started"
        return self._endpoints

    @property
    def ports(self) -> tuple[int, int]:
        """The enrolment port and the device port that are bound."""
        enrolment, device = self.endpoints.enrolment, self.endpoints.device_service
        return int(enrolment.rpartition(":")[2]), int(device.rpartition(":")[2])

    def start(self) -> None:
        """Open both ports and serve until :meth:`stop`.

        Raises:
            ConnectionFailed: A port is taken or cannot be bound; nothing is left open.
        """
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="enrolment")
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="device-service", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), loop).result()
        except BaseException:
            self.stop(grace_s=0)
            raise
        where = self.endpoints
        most = self._room.device
        log.info("devices: %s, at most %d; enrolment: %s", where.device_service, most, where.enrolment)

    def stop(self, grace_s: float = 1.0) -> None:
        """End the waiting streams, give other calls ``grace_s`` seconds to end, and close the ports."""
        loop, thread, pool = self._loop, self._thread, self._pool
        self._loop = self._thread = self._pool = None
        if loop is None or thread is None or pool is None:
            return
        asyncio.run_coroutine_threadsafe(self._close(grace_s), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        pool.shutdown()
        loop.close()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()

    async def _open(self) -> None:
        listen, limits = self._config.listen, self._config.limits
        enrolling: dict[str, Work[str]] = {"Enroll": self._enroll, "Renew": self._renew}
        most = self._room.enrolment
        enrolment = self._server(enrolling, self._admit_address, 2 * ENROLMENTS_AT_ONCE, most, _BRIEF)
        # gRPC's own bound is the last resort: it does not say when to come again.
        room = 2 * limits.max_concurrent + self._config.check_in.max_waiting + MAX_DOWNLOAD_CALLS
        self._downloads = Downloads(shelf_of(self._config), self._config.delivery)
        calls: dict[str, Work[_Identity]] = {
            "CheckIn": self._check_in,
            "Wait": self._wait,
            "Certify": self._certify,
            "FetchMetadata": self._fetch_metadata,
            "FetchChunks": self._fetch_chunks,
        }
        device = self._server(calls, self._admit_device, room, self._room.device)
        self._servers = [enrolment, device]
        ports = [
            _bind(
                enrolment, listen.host, listen.enrolment_port, self._credentials(demand=False), "enrolment"
            ),
            _bind(device, listen.host, listen.device_port, self._credentials(demand=True), "device"),
        ]
        self._endpoints = endpoints_of(listen, ports[0], ports[1], self._fleet_port)
        for server in self._servers:
            await server.start()
        shares = (self._room.enrolment, self._room.device)
        bounds = {port: self._room.of_address(most) for port, most in zip(ports, shares, strict=True)}
        keepers = (self._keep_certificate(), self._keep_order(Crowd(bounds)))
        self._keepers = [asyncio.ensure_future(keeper) for keeper in keepers]

    async def _close(self, grace_s: float) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers.clear()
        self._fleet.close_streams()
        for server in self._servers:
            await server.stop(grace_s)
        self._servers.clear()
        if self._downloads is not None:
            self._downloads.close()

    def _credentials(self, *, demand: bool) -> grpc.ServerCredentials:
        own = _OwnCertificate(self._authority, demand)
        fetch: Any = own.fetch  # it may return None, which grpc's published types do not know
        return grpc.dynamic_ssl_server_credentials(own.load(), fetch, demand)

    async def _keep_certificate(self) -> None:
        """Renew the server's certificate in time; new connections then get the new one."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                names = hosts_of(self._config.listen)
                renewed = await asyncio.to_thread(self._authority.refresh_server, names, now=self._wall())
            except LeptonError as error:
                log.error("the server's certificate could not be renewed: %s", error)
                continue
            if renewed:
                log.info("the server's certificate was renewed", extra={"event": "server.renewed"})

    async def _keep_order(self, crowd: Crowd) -> None:
        """Leave every address only so many connections."""
        took = 0.0
        while True:
            await asyncio.sleep(max(THIN_S, took / THIN_SHARE))
            began = time.monotonic()
            await asyncio.to_thread(crowd.thin)
            took = time.monotonic() - began

    def _server(
        self,
        here: dict[str, Work[W]],
        admit: Admit[W],
        at_once: int,
        connections: int,
        more: Iterable[tuple[str, int]] = (),
    ) -> grpc.aio.Server:
        options = [*_options(self._config, connections), *more]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=at_once)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name in _CALLS:
            work = here.get(name, self._elsewhere)
            # On the wire these have one request; taken as streams, we hear of a call before its request.
            # No deserializer: bytes that do not decode are answered by us, in our words.
            make: Any = (
                grpc.stream_stream_rpc_method_handler
                if name in _STREAMS
                else grpc.stream_unary_rpc_method_handler
            )
            handlers[name] = make(_guarded(name, work, admit), response_serializer=_serialize)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        return server

    async def _elsewhere(self, _data: bytes, _context: Context, _who: object) -> Message | None:
        error = ConfigError(
            "This call is not served at this port.",
            hint="Enroll and Renew go to the enrolment port, all other calls to the device port.",
        )
        raise _Refusal(grpc.StatusCode.UNIMPLEMENTED, error)

    # -- the enrolment port ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _admit_address(self, context: Context, _stream: bool) -> Iterator[str]:
        """Let a call in, unless its address has failed too often lately, or has too many under way."""
        address = _address(context.peer())
        self._limiter.check(address)
        if not self._enrolment_door.enter(address):
            raise _busy("Too many enrolments are under way.", 1.0 + secrets.randbelow(4000) / 1000)
        try:
            yield address
        finally:
            self._enrolment_door.leave(address)

    async def _enroll(self, data: bytes, _context: Context, address: str) -> pb.EnrollResponse:
        return await self._limited(address, lambda: self._admit(_parse(pb.EnrollRequest(), data)))

    async def _renew(self, data: bytes, _context: Context, address: str) -> pb.RenewResponse:
        return await self._limited(address, lambda: self._reissue(_parse(pb.RenewRequest(), data)))

    async def _limited(self, address: str, work: Callable[[], M]) -> M:
        """Run ``work`` in the pool, and count when it is refused."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except (TrustError, ConfigError, _Refusal) as error:
            if not (isinstance(error, _Refusal) and error.retry_s):  # who is put off has failed in nothing
                self._limiter.failed(address)
            log.warning(
                "%s: refused: %s", address, error, extra={"event": "enrolment.refused", "peer": address}
            )
            raise

    def _admit(self, request: pb.EnrollRequest) -> pb.EnrollResponse:
        _check_protocol(request.protocol)
        _check_size("token_secret", len(request.token_secret), crypto.SECRET_BYTES, crypto.SECRET_BYTES)
        _check_size("csr_pem", len(request.csr_pem), 1, 8192)
        name = _words("name", request.name, 100) or "unnamed"
        groups = _labels(request.groups)
        key = crypto.verify_csr(request.csr_pem)
        secret_sha256 = crypto.secret_sha256(request.token_secret)
        self._token(secret_sha256)  # a forged token costs no write lock and no signature
        device_id = crypto.device_id(key)
        issued = self._issue(request.csr_pem, device_id)
        certificate = {"cert_serial": issued.serial, "cert_not_after": issued.not_after}
        with self._store.transaction() as change:
            token = self._token(secret_sha256)  # as it is now that nobody else can use it
            if self._is_replay(token, device_id):
                change.record("device.renewed", device_id, {"device_id": device_id, **certificate})
            else:
                change.record("token.used", token.id, {"token_id": token.id, "device_id": device_id})
                body = {
                    "device_id": device_id,
                    "name": name,
                    "public_key": _base64(crypto.public_der(key)),
                    "token_id": token.id,
                    "groups": groups,
                    **certificate,
                }
                change.record("device.enrolled", device_id, body)
        self._fleet.follow()  # its first check-in may come before the next look at the journal
        log.info(
            "device %s (%s) enrolled with token %s",
            device_id,
            name,
            token.id,
            extra={"event": "device.enrolled", "device": device_id, "token": token.id},
        )
        return pb.EnrollResponse(
            device_id=device_id,
            certificate_pem=issued.pem,
            ca_pem=self._authority.ca_pem,
            endpoints=self._wire_endpoints(),
        )

    def _issue(self, csr_pem: bytes, device_id: str) -> DeviceCertificate:
        days = self._config.tls.device_certificate_days
        return self._authority.sign_device(csr_pem, device_id, days, now=self._wall())

    def _token(self, secret_sha256: str) -> Token:
        token = self._store.token_by_secret(secret_sha256)
        if token is None:
            raise TrustError(
                "This coordinator did not make the token.",
                hint="Ask the operator for a new one (`lepton token create`).",
            )
        return token

    def _is_replay(self, token: Token, device_id: str) -> bool:
        """Whether the same key shows the same token again because the answer was lost, minutes ago."""
        if device_id not in token.used_by:
            return False
        device: Device = self._store.device(device_id)
        recent = abs(self._wall() - device.enrolled_at) <= REPLAY_S
        return device.state == "active" and device.token_id == token.id and recent

    def _reissue(self, request: pb.RenewRequest) -> pb.RenewResponse:
        _check_protocol(request.protocol)
        _check_size("csr_pem", len(request.csr_pem), 1, 8192)
        if not crypto.is_device_id(request.device_id):
            raise ConfigError(f"Expected a device id, got {_printable(request.device_id, 40)!r}.")
        key = crypto.verify_csr(request.csr_pem)
        if crypto.device_id(key) != request.device_id:
            words = "somebody without this device's key asked for a certificate in its name"
            self._fleet.note(request.device_id, Cause.WRONG_CERTIFICATE, words)
            raise TrustError(f"The request is not signed by the key of device {request.device_id}.")
        self._fleet.follow()  # a revocation that was written this instant counts
        if wait_s := self._fleet.may_renew(request.device_id, RENEW_GAP_S):
            raise _busy(f"Device {request.device_id} has renewed its certificate just now.", wait_s)
        issued = self._issue(request.csr_pem, request.device_id)
        body = {
            "device_id": request.device_id,
            "cert_serial": issued.serial,
            "cert_not_after": issued.not_after,
            "cause": request.cause if request.cause in _RENEWED else "",
        }
        self._store.record("device.renewed", request.device_id, body)
        if request.cause in _RENEWED:
            self._fleet.note(request.device_id, Cause(request.cause), _RENEWED[request.cause])
        log.info(
            "device %s renewed its certificate",
            request.device_id,
            extra={"event": "device.renewed", "device": request.device_id},
        )
        return pb.RenewResponse(certificate_pem=issued.pem, endpoints=self._wire_endpoints())

    def _wire_endpoints(self) -> pb.Endpoints:
        return pb.Endpoints(device_service=self.endpoints.device_service, fleet=self.endpoints.fleet)

    # -- the device port ------------------------------------------------------------------------------

    def _identify(self, context: Context) -> _Identity:
        """Who calls; the TLS handshake has verified the certificate, which may have expired since."""
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise TrustError("The call came without a client certificate.")
        identity = self._identities.of(next(iter(pem)))
        if identity.not_after <= self._wall():
            raise TrustError(
                f"The certificate of device {identity.device_id} has expired.",
                hint="Renew it at the enrolment port.",
            )
        return identity

    @contextlib.contextmanager
    def _admit_device(self, context: Context, stream: bool) -> Iterator[_Identity]:
        """Let a call of an admitted device in, unless it calls too often or too much is in hand."""
        identity = self._identify(context)
        device_id = identity.device_id
        self._fleet.require(device_id)  # nobody learns what we think of a message before that
        if wait_s := self._pace.take(device_id):
            raise _busy("This device calls too often.", wait_s)
        if (not stream and self._sheds(context)) or not self._door.enter(device_id, counted=not stream):
            raise _busy("The coordinator is busy.", self._fleet.next_turn_s())
        try:
            yield identity
        finally:
            self._door.leave(device_id, counted=not stream)

    def _sheds(self, context: Context) -> bool:
        """Whether to put a call off because it has waited long: every second one, so the line moves on."""
        if waited_s(context.invocation_metadata(), context.time_remaining()) <= LATE_S:
            return False
        self._shed = not self._shed
        return self._shed

    async def _check_in(self, data: bytes, _context: Context, identity: _Identity) -> pb.CheckInResponse:
        request = _parse(pb.CheckInRequest(), data)
        try:
            _check_protocol(request.protocol)
        except _Refusal as refusal:
            self._fleet.note(identity.device_id, Cause.WRONG_VERSION, str(refusal))
            raise
        status = _STATUS.get(request.status)
        if status is None:
            raise ConfigError(f"Expected a status of 1, 2 or 3, got {request.status}.")
        device_time = request.device_time
        if not (math.isfinite(device_time) and 0 <= device_time <= 1e11):
            raise ConfigError(f"Expected device_time in seconds since 1970, got {device_time}.")
        reason = _words("reason", request.reason, 500) if request.reason else ""
        if (desired := request.desired_digest) and len(desired) != 64:
            raise ConfigError(f"Expected desired_digest of 64 characters, got {len(desired)}.")
        secrecy = _secrecy(request)
        troubles = _troubles(request)
        serves, service = _service(request.service) if request.HasField("service") else _NO_SERVICE
        tried = _tried(request.trial) if request.HasField("trial") else _NO_TRIAL
        engaged = _engaged(request)
        seen = _seen_head(request)
        if self._heads is not None and seen is not None and not self._heads.fits(seen):
            work = partial(self._heads.judge, identity.device_id, seen)
            await asyncio.get_running_loop().run_in_executor(self._pool, work)
        answer = self._fleet.check_in(
            identity.device_id,
            self._report(request),  # consumes the request
            status,
            reason,
            device_time=device_time,
            desired_digest=desired,
            secrecy=secrecy,
            troubles=troubles,
            serves=serves,
            service=service,
            tried=tried,
            engaged=engaged,
        )
        wall = self._wall()
        return pb.CheckInResponse(
            next_check_in_s=answer.next_s,
            wait=answer.wait,
            server_time=wall,
            instructions=answer.instructions,
            renew=wall >= identity.renew_after,
            desired_json=answer.desired,
            certify=answer.certify,
            adverts_wanted=answer.adverts,
            ledger=self._heads.told if self._heads is not None else None,
        )

    async def _certify(self, data: bytes, context: Context, identity: _Identity) -> pb.CertifyResponse:
        device_id = identity.device_id
        request = _parse(pb.CertifyRequest(), data)
        _check_protocol(request.protocol)
        _check_size("request", len(request.request), 1, 1024)
        if self._signing is None:
            raise ConfigError("This coordinator knows no enrolment authority.")
        work = partial(self._certified, self._signing, device_id, request.request)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _certified(self, signing: Signing, device_id: str, request: bytes) -> pb.CertifyResponse:
        credential = signing.answer(device_id, request)
        self._fleet.follow()  # its next check-in is not told to ask again
        return pb.CertifyResponse(authority=signing.public, credential=credential)

    def _report(self, request: pb.CheckInRequest) -> Report:
        """The lasting part of a check-in; one that was checked before is recognised by its bytes."""
        for passing in _PASSING:
            request.ClearField(passing)
        key = request.SerializeToString(deterministic=True)
        report = self._reports.get(key)
        if report is None:
            report = _checked_report(request)
            if self._reports_size + len(key) > _MAX_REPORTS:  # one device could send ever new ones
                self._reports, self._reports_size = {}, 0
            self._reports[key], self._reports_size = report, self._reports_size + len(key)
        return report

    async def _wait(self, data: bytes, context: Context, identity: _Identity) -> None:
        device_id = identity.device_id
        _check_protocol(_parse(pb.WaitRequest(), data).protocol)
        stream = _Waiting(asyncio.get_running_loop())
        if not self._fleet.open_stream(device_id, stream):
            words = f"{self._config.check_in.max_waiting} devices are waiting already."
            hint = "Check in at the interval that was given."
            raise _busy(words, self._fleet.next_turn_s(), hint=hint)
        await self._serve_stream(device_id, stream, context)

    async def _fetch_metadata(
        self, data: bytes, context: Context, identity: _Identity
    ) -> pb.FetchMetadataResponse:
        request = _parse(pb.FetchMetadataRequest(), data)
        _check_protocol(request.protocol)
        assert self._downloads is not None, "the service is open"
        try:
            return pb.FetchMetadataResponse(data=await self._downloads.metadata(request.name))
        except NotFound as error:  # the usual answer to "is there a newer root?"
            raise _Refusal(grpc.StatusCode.NOT_FOUND, error) from error

    async def _fetch_chunks(self, data: bytes, context: Context, identity: _Identity) -> None:
        device_id = identity.device_id
        request = _parse(pb.FetchChunksRequest(), data)
        _check_protocol(request.protocol)
        assert self._downloads is not None, "the service is open"
        sent = self._downloads.chunks(device_id, request.sha256, lambda: self._fleet.require(device_id))
        async with contextlib.aclosing(sent) as chunks:  # its turn ends here, however the call ends
            async for chunk in chunks:
                try:
                    async with asyncio.timeout(SEND_S):  # whoever does not read gives its turn to others
                        await context.write(pb.Chunk(data=chunk))
                except TimeoutError as error:
                    slow = ConnectionFailed(f"A chunk was not taken within {SEND_S:g} s.")
                    raise _Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, slow) from error
                except grpc.aio.InternalError:  # the device has hung up; it asks for the rest when it is back
                    return

    async def _serve_stream(self, device_id: str, stream: "_Waiting", context: Context) -> None:
        end = stream.loop.time() + self._config.check_in.stream_s
        left: tuple[pb.Instruction, ...] = ()
        try:
            while await stream.woken(end):
                left = self._fleet.take(device_id, stream)
                while left:
                    await context.write(left[0])
                    left = left[1:]
        finally:  # also when the connection is lost, which cancels this call
            self._fleet.close_stream(device_id, stream, undelivered=left)


class _Waiting:
    """The open call of a device that waits (``fleet.Stream``)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._event = asyncio.Event()
        self._closed = False
        self._error: LeptonError | None = None

    def wake(self) -> None:
        """There is something to take; called by any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the call with it
            self.loop.call_soon_threadsafe(self._event.set)

    def close(self, error: LeptonError | None) -> None:
        """End the call; called by any thread."""
        self._error, self._closed = error, True
        self.wake()

    async def woken(self, end: float) -> bool:
        """Wait until there is something to take; False when the call should end in good order.

        Raises:
            LeptonError: It should end with this error.
        """
        try:
            async with asyncio.timeout_at(end):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        if self._error is not None:
            raise self._error
        return not self._closed


class _OwnCertificate:
    """The server's key and certificate for gRPC, read again when their file has been replaced."""

    def __init__(self, authority: Authority, demand: bool) -> None:
        self._authority, self._demand = authority, demand
        self._stamp = (0, 0)

    def _stamp_now(self) -> tuple[int, int]:
        status = os.stat(self._authority.server_path)
        return status.st_ino, status.st_mtime_ns

    def load(self) -> grpc.ServerCertificateConfiguration:
        """Read them."""
        self._stamp = self._stamp_now()
        authority = self._authority
        pair = [(authority.server_key_pem, authority.server_cert_pem)]
        return grpc.ssl_server_certificate_configuration(pair, authority.ca_pem if self._demand else None)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake; None = as before, and so is an error, which gRPC logs."""
        return None if self._stamp_now() == self._stamp else self.load()


class _Identities:
    """Certificates that were parsed once, by their bytes."""

    def __init__(self, renew_before: float) -> None:
        self._renew_before = renew_before  # s before its end; its start lies in the past for slow clocks
        self._known: dict[bytes, _Identity] = {}

    def of(self, pem: bytes) -> _Identity:
        """Return who holds a certificate.

        Raises:
            TrustError: It does not decode, or its key is not of our kind.
        """
        identity = self._known.get(pem)
        if identity is None:
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            identity = self._known[pem] = self._parse(pem)
        return identity

    def _parse(self, pem: bytes) -> _Identity:
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = certificate.public_key()
        except ValueError as error:
            raise TrustError("The client certificate does not decode.") from error
        if not isinstance(key, crypto.PublicKey):
            raise TrustError("The client certificate is not for an elliptic-curve key.")
        end = certificate.not_valid_after_utc.timestamp()
        return _Identity(crypto.device_id(key), end, end - self._renew_before)


class FailureLimiter:
    """Refuses an address that has failed too often in the window in hand; used on the event loop only."""

    def __init__(
        self,
        limit: int,
        window_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_peers: int = 10_000,
    ) -> None:
        self._limit, self._window, self._clock, self._max = limit, window_s, clock, max_peers
        self._failures: dict[str, tuple[float, int]] = {}  # address -> start of the window, count

    def check(self, address: str) -> None:
        """Raise ConnectionFailed, as RESOURCE_EXHAUSTED, when the address must wait."""
        start, count = self._failures.get(address, (0.0, 0))
        left = start + self._window - self._clock()
        if count >= self._limit and left > 0:
            error = ConnectionFailed(
                f"{count} attempts from {address} have failed; the next is allowed in {left:.0f} s.",
                hint="Check the token, then try again later.",
            )
            raise _Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, error, left)

    def failed(self, address: str) -> None:
        """Count a failure."""
        now = self._clock()
        start, count = self._failures.get(address, (now, 0))
        if start + self._window <= now:
            start, count = now, 0
        if len(self._failures) >= self._max and address not in self._failures:
            self._forget(now)
        self._failures[address] = (start, count + 1)

    def _forget(self, now: float) -> None:
        """Make room: windows that are over, or else the oldest."""
        self._failures = {a: f for a, f in self._failures.items() if f[0] + self._window > now}
        while len(self._failures) >= self._max:
            del self._failures[next(iter(self._failures))]


# -- the edge of gRPC ------------------------------------------------------------------------------------


def _guarded(
    name: str, work: Work[W], admit: Admit[W]
) -> Callable[[AsyncIterator[bytes], Context], Awaitable[Message | None]]:
    """Answer every error in our words; what we did not foresee is logged here and numbered there."""
    stream = name in _STREAMS

    async def call(_requests: AsyncIterator[bytes], context: Context) -> Message | None:
        try:
            with admit(context, stream) as who:
                return await work(await _read(context), context, who)
        except _Refusal as refusal:
            await _abort(context, refusal.status, refusal.error, refusal.retry_s)
        except LeptonError as error:
            log.info("%s refused: %s", name, error, extra={"event": "call.refused", "call": name})
            await _abort(context, grpc.StatusCode[status_of(error)], error)
        except Exception:  # the edge of the process: a peer gets a number, the log the cause
            number = secrets.token_hex(4)
            log.exception("%s failed (reference %s)", name, number)
            unforeseen = LeptonError(
                f"The coordinator failed; its log has the cause under reference {number}."
            )
            await _abort(context, grpc.StatusCode.INTERNAL, unforeseen)

    return call


async def _read(context: Context) -> bytes:
    """The one request of a call; not by its iterator, which costs a task more to end."""
    try:
        async with asyncio.timeout(READ_S):
            data = await context.read()
    except TimeoutError as error:
        late = ConnectionFailed(f"The request did not arrive within {READ_S:g} s.")
        raise _Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, late) from error
    if not isinstance(data, bytes):
        raise ConfigError("The call ended without a request.")
    return data


def _busy(message: str, retry_s: float, *, hint: str = "") -> _Refusal:
    hint = hint or f"Come again in {retry_s:.1f} s."
    return _Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, ConnectionFailed(message, hint=hint), retry_s)


async def _abort(
    context: Context, status: grpc.StatusCode, error: LeptonError, retry_s: float = 0.0
) -> NoReturn:
    await context.abort(status, str(error)[:MAX_DETAIL], metadata_of(error, retry_s))
    raise AssertionError("abort returned")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


_BRIEF = (  # the enrolment port knows nobody: whoever does nothing there is sent away, and the others soon
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.max_connection_age_ms", 120_000),
    ("grpc.max_connection_age_grace_ms", 30_000),
)


def _options(config: ServerConfig, connections: int) -> list[tuple[str, int]]:
    age = int(config.limits.connection_age_s * 1000)
    stream = int(config.check_in.stream_s * 1000)
    return [
        ("grpc.so_reuseport", 0),  # a second coordinator must fail, not share the port
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        ("grpc.max_concurrent_streams", CALLS_OF_CONNECTION),
        ("grpc.max_allowed_incoming_connections", connections),
        # gRPC hangs up on a call for which its line has no place, and does not say when to come again: we do.
        ("grpc.server.max_pending_requests", LINE),
        ("grpc.server.max_pending_requests_hard_limit", LINE),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        # A silent waiting device is noticed after 80 s; idle connections are not pinged.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),  # devices may ping so often
        ("grpc.max_connection_age_ms", age),  # gRPC itself spreads it by 10 %
        ("grpc.max_connection_age_grace_ms", stream + 30_000),  # a waiting stream ends by itself
    ]


def _bind(server: grpc.aio.Server, host: str, port: int, how: grpc.ServerCredentials, name: str) -> int:
    try:
        return server.add_secure_port(_join(host, port), how)
    except RuntimeError as error:
        raise ConnectionFailed(
            f"Cannot listen at {_join(host, port)} (the {name} port): it is taken or not ours to bind.",
            hint=f"Stop what uses it, or set [listen] {name}_port; `ss -ltnp` shows who has it.",
        ) from error


def endpoints_of(listen: ListenSection, enrolment: int, device: int, fleet: int) -> Endpoints:
    """Return the addresses to advertise: the first of ``hosts_of``, with the ports in use."""
    host = hosts_of(listen)[0]
    return Endpoints(_join(host, enrolment), _join(host, device), _join(host, fleet))


def hosts_of(listen: ListenSection) -> tuple[str, ...]:
    """Return the names by which devices reach this machine: those configured, else this host's own.

    A host whose own name does not resolve can only serve devices on itself until a name is configured.
    """
    if listen.public_names:
        return listen.public_names
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        log.warning("this host's name %r does not resolve; set listen.public_names for other machines", name)
        return ("127.0.0.1",)
    return (name,)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(peer: str) -> str:
    """Who counts as one caller, from gRPC's name of a peer."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return address_of(rest.rpartition(":")[0].strip("[]")) or kind


# -- checks of fields ------------------------------------------------------------------------------------


def _parse(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ConfigError(f"The {len(data)} bytes are no {type(message).__name__}.") from error
    return message


def _check_protocol(protocol: int) -> None:
    if protocol == PROTOCOL_VERSION:
        return
    older = "client" if protocol < PROTOCOL_VERSION else "coordinator"
    error = ConfigError(
        f"The device speaks protocol {protocol}, the coordinator {PROTOCOL_VERSION}.",
        hint=f"Update the {older}.",
    )
    raise _Refusal(grpc.StatusCode.FAILED_PRECONDITION, error)


def _check_size(field: str, size: int, least: int, most: int) -> None:
    if not least <= size <= most:
        bound = f"{least}" if least == most else f"{least} to {most}"
        raise ConfigError(f"Expected {field} of {bound} bytes, got {size}.")


def _printable(text: str, most: int) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:most]).strip()


def _words(field: str, text: str, most: int) -> str:
    """Text for people: its length is checked, line breaks and control characters become spaces."""
    if len(text) > most:
        raise ConfigError(f"Expected {field} of at most {most} characters, got {len(text)}.")
    return text if text.isprintable() else _printable(text, most)


def _label(field: str, text: str, least: int, most: int) -> str:
    """A word that is compared: it is refused rather than changed."""
    if not least <= len(text) <= most or not text.isprintable():
        raise ConfigError(
            f"Expected {field} of {least} to {most} printable characters, got {_printable(text, 60)!r}."
        )
    return text


def _labels(groups: Iterable[str]) -> list[str]:
    labels = [_label("groups", group, 1, 50) for group in groups]
    if len(labels) > 16:
        raise ConfigError(f"Expected at most 16 groups, got {len(labels)}.")
    return sorted(set(labels))


def _checked_report(request: pb.CheckInRequest) -> Report:
    if len(request.tasks) > 32:
        raise ConfigError(f"Expected at most 32 tasks, got {len(request.tasks)}.")
    tasks = tuple(_task_state(task) for task in request.tasks)
    if len({(t.name, t.version) for t in tasks}) != len(tasks):
        raise ConfigError("Expected each task version once.")
    can = request.capabilities
    for field, value, most in (("cpus", can.cpus, 65_536), ("memory_bytes", can.memory_bytes, 2**53)):
        if value > most:
            raise ConfigError(f"Expected {field} of at most {most}, got {value}.")
    capabilities: tuple[tuple[str, int | str], ...] = (
        ("cpus", can.cpus),
        ("memory_bytes", can.memory_bytes),
        ("accelerator", _words("accelerator", can.accelerator, 50)),
        ("os", _words("os", can.os, 100)),
    )
    version = _label("client_version", request.client_version, 0, 50)
    serving = _serving(request.serving) if request.HasField("serving") else None
    return Report(tasks, version, capabilities, serving)


def _serving(said: pb.Serving) -> Serving:
    if len(said.failed) > MAX_FAILED:
        raise ConfigError(f"Expected at most {MAX_FAILED} failed releases, got {len(said.failed)}.")
    return Serving(
        _label("a served task", said.task, 0, 200),
        _label("profile", said.profile, 0, 50),
        _digest("release", said.release, empty=True),
        tuple(_failed(failed) for failed in said.failed),
        said.trials,
    )


def _failed(said: pb.FailedRelease) -> Failed:
    if said.fault not in list(Fault):
        known = ", ".join(Fault)
        raise ConfigError(f"Expected one of {known} as a fault, got {_printable(said.fault, 40)!r}.")
    release = _digest("a failed release", said.release)
    return Failed(release, said.fault, _words("detail", said.detail, 500), said.final)


def _digest(field: str, text: str, *, empty: bool = False) -> str:
    if not (empty and not text) and (len(text) != 64 or not set(text) <= set("0123456789abcdef")):
        raise ConfigError(f"Expected {field} of 64 hexadecimal digits, got {_printable(text, 70)!r}.")
    return text


def _seen_head(request: pb.CheckInRequest) -> LedgerHead | None:
    """The head of the privacy ledger that a device has seen; not checked beyond its bounds."""
    if not request.HasField("ledger"):
        return None
    seen = request.ledger
    if not 0 < seen.seq < 2**63:
        raise ConfigError(f"Expected ledger.seq of 1 to 2^63 - 1, got {seen.seq}.")
    _check_size("ledger.hash", len(seen.hash), HASH_BYTES, HASH_BYTES)
    _check_size("ledger.key", len(seen.key), 1, MAX_KEY)
    _check_size("ledger.signature", len(seen.signature), 1, MAX_SIGNATURE)
    return LedgerHead(seen.seq, seen.hash, seen.key, seen.signature)


def _secrecy(request: pb.CheckInRequest) -> Secrecy:
    if len(request.adverts) > _MOST_ADVERTS:
        raise ConfigError(f"Expected at most {_MOST_ADVERTS} adverts, got {len(request.adverts)}.")
    for advert in request.adverts:  # what is in them, the round checks that uses them
        _check_size("an advert", len(advert), 1, _MAX_ADVERT)
    if request.advert_session or request.adverts:
        _check_size("advert_session", len(request.advert_session), 8, 8)
    if request.credential_ends > 1e11:
        raise ConfigError(f"Expected credential_ends in seconds since 1970, got {request.credential_ends}.")
    return Secrecy(float(request.credential_ends), tuple(request.adverts), request.advert_session)


def _troubles(request: pb.CheckInRequest) -> list[tuple[Cause, str]]:
    """What a device finds wrong with itself; a word that a newer client has is not refused."""
    if len(request.troubles) > _MOST_TROUBLES:
        raise ConfigError(f"Expected at most {_MOST_TROUBLES} troubles, got {len(request.troubles)}.")
    known = [t for t in request.troubles if t.cause in set(Cause)]
    return [(Cause(t.cause), _words("a trouble's detail", t.detail, 500)) for t in known]


def _engaged(request: pb.CheckInRequest) -> list[Engaged]:
    """What a device takes part in; unknown attempts are no error."""
    if len(request.engaged) > _MOST_ENGAGED:
        raise ConfigError(f"Expected at most {_MOST_ENGAGED} attempts, got {len(request.engaged)}.")
    return [
        Engaged(
            _label("engaged.run_id", each.run_id, 1, _MAX_NAME),
            each.round,
            _label("engaged.nonce", each.nonce, 0, _MAX_NAME),
            _words("engaged.failure", each.failure, 500),
        )
        for each in request.engaged
    ]


def _service(told: pb.Service) -> tuple[str, Service]:
    release = _digest("service.release", told.release, empty=True)
    if told.errors > told.requests or told.requests > 2**53:
        raise ConfigError(f"Expected errors within requests, got {told.errors} of {told.requests}.")
    if not 0 <= told.p95_ms <= 1e9:  # NaN is not
        raise ConfigError(f"Expected service.p95_ms from 0 to 1e9, got {told.p95_ms}.")
    return release, Service(told.requests, told.errors, told.p95_ms)


def _tried(told: pb.Trial) -> Tried:
    if told.word and told.word not in WORDS:
        raise ConfigError(f"Expected one of {', '.join(WORDS)}, got {_printable(told.word, 20)!r}.")
    release = _digest("trial.release", told.release, empty=True)
    return Tried(release, _digest("trial.question", told.question, empty=True), told.word)


def _task_state(task: pb.TaskReport) -> TaskState:
    return TaskState(
        _label("a task's name", task.name, 1, 200),
        _label("a task's version", task.version, 0, 50),  # empty: not known yet
        _digest("layout_digest", task.layout_digest, empty=True),
        task.ready,
        _words("a task's reason", task.reason, 500),
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
