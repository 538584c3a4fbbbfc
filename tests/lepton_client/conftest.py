"""A coordinator in this process: real sockets and TLS, and nothing behind them."""

import datetime as dt
import ipaddress
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from lepton_client.config import ClientConfig
from lepton_client.inspection import Finding
from lepton_fl import crypto
from lepton_fl.errors import LeptonError, TrustError
from lepton_fl.wire.status import metadata_of, status_of
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_fl.wire.v1 import device_pb2_grpc

PEM = serialization.Encoding.PEM


class Authority:
    """A certificate authority for tests."""

    def __init__(self, name="test CA"):
        self.key = crypto.new_key()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key.public_key(), days=2, ca=True)
        self.pem = self.certificate.public_bytes(PEM)
        self.der = self.certificate.public_bytes(serialization.Encoding.DER)

    def _sign(self, subject, public_key, days=1.0, ca=False, names=(), start=None):
        start = start or dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def server(self):
        key = crypto.new_key()
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        return crypto.key_to_pem(key), self._sign(subject, key.public_key(), names=names).public_bytes(PEM)

    def device(self, key, **kwargs):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, crypto.device_id(key))])
        return self._sign(subject, key, **kwargs).public_bytes(PEM)


class Coordinator(device_pb2_grpc.DeviceServiceServicer):
    """Answers as scripted; remembers what it was told."""

    def __init__(self, ports):
        self.authority = Authority()
        self.enrolment_port, self.device_port = ports
        self.secrets = {}  # secret -> device id or None
        self.check_ins = queue.Queue()
        self.renewals = []
        self.instructions = queue.Queue()  # for the Wait stream
        self.refusal: LeptonError | None = None
        self.retry_s = 0.0  # said with a refusal: when to come again
        self.refused_at = []  # monotonic seconds
        self.lose_enrolment_answer = False
        self.wait = False
        self.tells = []  # instructions of the next answer to a check-in
        self.renew = False
        self.ledger = None  # the head that it shows
        self.interval = 0.05
        self.time_offset = 0.0
        self.waits = 0
        self.certificate = {}  # of the next certificates: days, start
        self.drop_streams = threading.Event()
        self._servers = []

    # life

    def start(self):
        key, certificate = self.authority.server()
        chain = [(key, certificate)]
        self.drop_streams.clear()
        for port, credentials in (
            (self.enrolment_port, grpc.ssl_server_credentials(chain)),
            (self.device_port, grpc.ssl_server_credentials(chain, self.authority.pem, True)),
        ):
            server = grpc.server(ThreadPoolExecutor(6), options=[("grpc.so_reuseport", 0)])
            device_pb2_grpc.add_DeviceServiceServicer_to_server(self, server)
            server.add_secure_port(f"127.0.0.1:{port}", credentials)
            server.start()
            self._servers.append(server)
        return self

    def stop(self):
        self.drop_streams.set()
        for event in [server.stop(0) for server in self._servers]:
            event.wait()
        self._servers.clear()

    def token(self):
        secret = crypto.new_secret()
        self.secrets[secret] = None
        return crypto.make_join_token(f"127.0.0.1:{self.enrolment_port}", self.authority.der, secret)

    def endpoints(self):
        address = f"127.0.0.1:{self.device_port}"
        return pb.Endpoints(device_service=address, fleet="127.0.0.1:1")

    def heard(self, matches=lambda request: True, timeout=60.0):
        """The next check-in that matches."""
        ends = time.monotonic() + timeout
        while True:
            request = self.check_ins.get(timeout=max(0.01, ends - time.monotonic()))
            if matches(request):
                return request

    # service

    def _abort(self, context, error):
        self.refused_at.append(time.monotonic())
        context.set_trailing_metadata(metadata_of(error, self.retry_s))
        context.abort(grpc.StatusCode[status_of(error)], str(error))

    def Enroll(self, request, context):  # noqa: N802 - the proto's name
        key = crypto.verify_csr(request.csr_pem)
        device_id = crypto.device_id(key)
        if self.secrets.get(request.token_secret, "unknown") not in (None, device_id):
            self._abort(context, TrustError("The token is not valid: unknown, used or expired."))
        self.secrets[request.token_secret] = device_id
        if self.lose_enrolment_answer:
            self.lose_enrolment_answer = False
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        return pb.EnrollResponse(
            device_id=device_id,
            certificate_pem=self.authority.device(key, **self.certificate),
            ca_pem=self.authority.pem,
            endpoints=self.endpoints(),
        )

    def Renew(self, request, context):  # noqa: N802 - the proto's name
        if self.refusal:
            self._abort(context, self.refusal)
        self.renewals.append(request.device_id)
        certificate = self.authority.device(crypto.verify_csr(request.csr_pem), **self.certificate)
        return pb.RenewResponse(certificate_pem=certificate, endpoints=self.endpoints())

    def CheckIn(self, request, context):  # noqa: N802 - the proto's name
        if self.refusal:
            self._abort(context, self.refusal)
        self.check_ins.put(request)
        tells, self.tells = self.tells, []
        return pb.CheckInResponse(
            instructions=tells,
            next_check_in_s=self.interval,
            wait=self.wait,
            server_time=time.time() + self.time_offset,
            renew=self.renew,
            ledger=self.ledger,
        )

    def Wait(self, request, context):  # noqa: N802 - the proto's name
        self.waits += 1
        while context.is_active() and not self.drop_streams.is_set():
            try:
                yield self.instructions.get(timeout=0.05)
            except queue.Empty:
                continue


@pytest.fixture
def coordinator(free_ports):
    made = Coordinator(free_ports(2))
    yield made.start()
    made.stop()


@pytest.fixture
def config(tmp_path):
    return ClientConfig.model_validate(
        {
            "client": {"state_dir": tmp_path / "state"},
            "tasks": [{"reference": "digits"}],
            "limits": {"nice": 0},
            "connection": {"backoff_min_s": 0.02, "backoff_max_s": 0.1, "poll_s": 0.01, "timeout_s": 5},
        }
    )


def ready(section):
    return Finding("lepton_fl.tasks.images:digits", "1", ready=True, rows=10)


@pytest.fixture
def good_data():
    """A contract check that passes at once."""
    return ready


@pytest.fixture
def running():
    """Runs agents in threads and stops them at the end."""
    started = []

    def start(agent):
        box = {}

        def body():
            try:
                box["ended"] = agent.run()
            except LeptonError as error:
                box["error"] = error

        thread = threading.Thread(target=body)
        thread.start()
        started.append((agent, thread))
        box["thread"] = thread
        return box

    yield start
    for agent, thread in started:
        agent.stop()
        thread.join(60)
        assert not thread.is_alive()
