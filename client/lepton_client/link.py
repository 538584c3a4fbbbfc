"""The wire to the coordinator: the calls of the device service, and errors as ours.

    with Link(address, ca_pem, timeout_s=20) as link:                       # enrolment port
    with Link(address, ca_pem, identity=(key_pem, certificate_pem)) as link:  # device port

The server must show a certificate of ``ca_pem``'s authority for the name that was dialled; there is no way
to switch that off.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

# Read when grpc is imported: its C library writes a line per failed handshake past our log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from lepton_fl.errors import ConnectionFailed, LeptonError, TrustError
from lepton_fl.wire.status import CODE_KEY, PATIENCE_KEY, error_from, retry_after
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_fl.wire.v1 import device_pb2_grpc

T = TypeVar("T")
PROTOCOL = 1
LATE_S = 10.0  # after its deadline gRPC itself must have ended a call
CLOSE_S = 5.0  # for gRPC to end what is under way when we hang up
_OPTIONS = (
    # A new Link must dial at once and not inherit the waiting time of one that failed.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 2**20),  # bytes; answers are small
)


class UntrustedServer(TrustError):
    """The other side shows no certificate of our authority: another machine, or a wrong clock."""


class HungUp(ConnectionFailed):
    """The other side answered the phone and put it down: what a server does with a certificate it refuses."""


class Busy(ConnectionFailed):
    """The coordinator is there and asks to come back: after so many seconds, or it does not say (0)."""

    def __init__(self, message: str, hint: str, wait_s: float) -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s


class Refused(TrustError):
    """The coordinator knows us and does not want us: revoked, or a token that is not good."""


class Cancelled(Exception):
    """The caller wanted to stop; nothing is known of the call."""


class Link:
    """One TLS channel to one address."""

    def __init__(
        self,
        address: str,
        ca_pem: bytes,
        *,
        identity: tuple[bytes, bytes] | None = None,  # key and certificate, PEM
        timeout_s: float = 20.0,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        key, certificate = identity or (None, None)
        credentials = grpc.ssl_channel_credentials(ca_pem, key, certificate)
        self.address = address
        self._timeout, self._stopping = timeout_s, stopping
        self._channel = grpc.secure_channel(address, credentials, options=_OPTIONS)
        generated: Any = device_pb2_grpc  # has no types
        self._stub = generated.DeviceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; what is under way ends. It never waits long: gRPC may for a call whose end got lost."""
        closing = threading.Thread(target=self._channel.close, name="lepton-hang-up", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def enroll(self, request: pb.EnrollRequest) -> pb.EnrollResponse:
        """Raises Refused, UntrustedServer, ConnectionFailed or another LeptonError."""
        return self._call(self._stub.Enroll, request, pb.EnrollResponse)

    def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        """Raises like ``enroll``."""
        return self._call(self._stub.Renew, request, pb.RenewResponse)

    def check_in(self, request: pb.CheckInRequest) -> pb.CheckInResponse:
        """Raises like ``enroll``."""
        return self._call(self._stub.CheckIn, request, pb.CheckInResponse)

    def certify(self, request: pb.CertifyRequest) -> pb.CertifyResponse:
        """Raises like ``enroll``."""
        return self._call(self._stub.Certify, request, pb.CertifyResponse)

    def fetch_metadata(self, name: str) -> bytes:
        """A file of the signed metadata of releases; raises NotFound, or like ``enroll``."""
        request = pb.FetchMetadataRequest(protocol=PROTOCOL, name=name)
        return self._call(self._stub.FetchMetadata, request, pb.FetchMetadataResponse).data

    def fetch_chunks(self, names: Sequence[str]) -> Iterator[bytes]:
        """Chunks of releases by SHA-256 (hex), in order, as they come; raises like ``enroll``."""
        request = pb.FetchChunksRequest(protocol=PROTOCOL, sha256=[bytes.fromhex(name) for name in names])
        call = self._stub.FetchChunks(request)
        try:
            for chunk in call:
                yield chunk.data
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None
        finally:
            call.cancel()  # also when nobody wants the rest

    def wait(self) -> "Listener":
        """Open the stream of instructions."""
        return Listener(self._stub.Wait(pb.WaitRequest(protocol=PROTOCOL)), self.address)

    def _call(self, method: Any, request: object, kind: type[T]) -> T:  # noqa: ANN401 - grpc has no types
        """Call and wait, but not longer than the caller wants to live."""
        metadata = ((PATIENCE_KEY, f"{self._timeout:.3f}"),)
        future = method.future(request, timeout=self._timeout, metadata=metadata)
        done, ends = threading.Event(), time.monotonic() + self._timeout + LATE_S
        future.add_done_callback(lambda _: done.set())
        while not done.wait(0.2):
            if self._stopping():
                future.cancel()
                raise Cancelled
            if time.monotonic() > ends:  # the agent's only thread must not depend on gRPC's own clock
                future.cancel()
                raise ConnectionFailed(f"A call to {self.address} does not end.")
        try:
            answer = future.result()
        except grpc.FutureCancelledError:
            raise Cancelled from None
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None
        if not isinstance(answer, kind):
            raise ConnectionFailed(f"{self.address} answered with {type(answer).__name__}.")
        return answer


class Listener:
    """The instructions of one Wait stream, as they come."""

    def __init__(self, call: Any, address: str) -> None:  # noqa: ANN401 - grpc has no types
        self._call, self._address = call, address

    def __iter__(self) -> Iterator[pb.Instruction]:
        """Ends when the coordinator or ``cancel`` ends the stream; raises like ``Link.enroll``."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            if self._call.code() is not grpc.StatusCode.CANCELLED:
                raise _translated(error, self._address) from None

    def cancel(self) -> None:
        """End the stream from any thread."""
        self._call.cancel()


def _translated(error: Any, address: str) -> LeptonError:  # noqa: ANN401 - grpc.RpcError, which is also a Call
    """The error of ours that a failed call means."""
    code, detail = error.code(), error.details() or ""
    metadata = [(key, value) for key, value in (error.trailing_metadata() or ())]
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in detail:
        return UntrustedServer(
            f"The machine at {address} shows a certificate that this device does not trust.",
            hint="It may be another machine, or this device's clock may be wrong. Nothing was sent.",
        )
    translated = error_from(code.name, detail, metadata)
    told = any(key == CODE_KEY for key, _ in metadata)
    if isinstance(translated, TrustError) and told:
        return Refused(str(translated), hint=translated.hint)
    if told and (wait_s := retry_after(metadata)):
        return Busy(str(translated), translated.hint, wait_s)
    if not told and code in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    ):  # gRPC's own bounds
        return Busy(f"{address} has too much to do ({code.name}).", "", 0.0)
    if not told and code is grpc.StatusCode.UNAVAILABLE and "Socket closed" in detail:
        return HungUp(
            f"{address} closed the connection.",
            hint="It may be restarting, or not accept this device's certificate.",
        )
    if not told:  # gRPC itself, or something between: the text is for engineers
        return ConnectionFailed(f"{address} cannot be reached ({code.name}: {_brief(detail)}).")
    return translated


def _brief(detail: str) -> str:
    """The last cause in gRPC's chain of them."""
    return detail.rsplit("last error: ", 1)[-1].strip()[:200] or "no detail"
