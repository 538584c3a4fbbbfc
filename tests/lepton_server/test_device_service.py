"""The device service over real sockets and real TLS: devices that behave, and peers that do not."""

import asyncio
import base64
import datetime as dt
import logging
import os
import queue
import random
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

import grpc
import pytest
from cryptography import x509

from lepton_fl import crypto
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import ConfigError, ConnectionFailed, LeptonError, TrustError
from lepton_fl.privacy.head import LedgerHead, sign_head
from lepton_fl.privacy.record import Policy
from lepton_fl.wire.status import CODE_KEY, PATIENCE_KEY, RETRY_KEY, error_from, retry_after
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_fl.wire.v1.device_pb2_grpc import DeviceServiceStub
from lepton_server import connections, device_service
from lepton_server.admission import Door
from lepton_server.authority import Authority
from lepton_server.config import ServerConfig
from lepton_server.device_service import DeviceService, FailureLimiter, _address
from lepton_server.fleet import Fleet
from lepton_server.heads import Heads
from lepton_server.privacy import PrivacyKeys, set_budget
from lepton_server.store import open_store

pytestmark = pytest.mark.network

TASK = "pkg.tasks:digits"
FUZZ_INPUTS = 300  # benchmarks/noise.py sends a million
PATIENCE = 60.0  # s; for what takes milliseconds


def check_in_request(**changes) -> pb.CheckInRequest:
    values = {
        "protocol": 1,
        "status": pb.STATUS_IDLE,
        "tasks": [pb.TaskReport(name=TASK, version="1", ready=True)],
        "client_version": "0.1",
        "capabilities": pb.Capabilities(cpus=2, memory_bytes=2**30, os="linux"),
        "device_time": time.time(),
    }
    return pb.CheckInRequest(**(values | changes))


def call(method, request, **options):
    """Call and raise what the server meant."""
    try:
        return method(request, timeout=PATIENCE, **options)
    except grpc.RpcError as error:
        raised = error_from(error.code().name, error.details() or "", error.trailing_metadata() or ())
        raised.status = error.code()
        raised.metadata = dict(error.trailing_metadata() or ())
        raise raised from error


@dataclass
class World:
    """One coordinator: its state survives a restart of its service."""

    path: object
    config: ServerConfig
    store: object
    authority: Authority
    channels: list = field(default_factory=list)
    service: DeviceService | None = None
    fleet: Fleet | None = None
    keys: PrivacyKeys | None = None

    def start(self) -> None:
        self.fleet = Fleet(self.store, self.config.check_in)
        self.keys = PrivacyKeys(self.path / "keys", self.config.privacy)
        heads = Heads(self.store, self.keys)
        heads.refresh()
        self.fleet.on_grown(heads.refresh)
        self.fleet.start()
        self.service = DeviceService(
            self.config, self.store, self.authority, self.fleet, fleet_port=4242, heads=heads
        )
        self.service.start()

    def stop(self) -> None:
        self.service.stop()
        self.fleet.stop()

    def token(self, *, uses=1, lasts=3600.0) -> bytes:
        secret = crypto.new_secret()
        body = {
            "token_id": secret.hex()[:8],
            "secret_sha256": crypto.secret_sha256(secret),
            "expires_at": time.time() + lasts,
            "uses": uses,
        }
        self.store.record("token.created", body["token_id"], body)
        return secret

    def stub(self, port: int, key=None, certificate=None, ca=None) -> DeviceServiceStub:
        key_pem = crypto.key_to_pem(key) if key else None
        credentials = grpc.ssl_channel_credentials(ca or self.authority.ca_pem, key_pem, certificate)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options)
        self.channels.append(channel)
        return DeviceServiceStub(channel)

    def enrolment(self) -> DeviceServiceStub:
        return self.stub(self.service.ports[0])

    def enrol(self, key=None, secret=None, *, stub=None, **changes) -> "Device":
        key = key or crypto.new_key()
        request = pb.EnrollRequest(
            protocol=1,
            token_secret=secret or self.token(),
            csr_pem=crypto.make_csr(key, "x"),
            name="kitchen",
            groups=["home"],
        )
        for name, value in changes.items():
            if name == "groups":
                del request.groups[:]
                request.groups.extend(value)
            else:
                setattr(request, name, value)
        answer = call((stub or self.enrolment()).Enroll, request)
        return Device(self, key, answer.device_id, answer.certificate_pem, answer)


@dataclass
class Device:
    world: World
    key: object
    device_id: str
    certificate: bytes
    answer: pb.EnrollResponse | None = None

    def stub(self) -> DeviceServiceStub:
        return self.world.stub(self.world.service.ports[1], self.key, self.certificate)

    def check_in(self, stub=None, **changes) -> pb.CheckInResponse:
        return call((stub or self.stub()).CheckIn, check_in_request(**changes))

    def renew(self, key=None) -> bytes:
        csr = crypto.make_csr(key or self.key, "x")
        request = pb.RenewRequest(protocol=1, device_id=self.device_id, csr_pem=csr)
        return call(self.world.enrolment().Renew, request).certificate_pem


class Listening:
    """A waiting stream whose instructions and end land in a queue."""

    def __init__(self, device: Device, stub=None):
        self.call = (stub or device.stub()).Wait(pb.WaitRequest(protocol=1))
        self.items = queue.Queue()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        try:
            for item in self.call:
                self.items.put(item)
            self.items.put(None)
        except grpc.RpcError as error:
            self.items.put(error)

    def next(self):
        return self.items.get(timeout=PATIENCE)

    def close(self):
        self.call.cancel()
        self.thread.join(PATIENCE)


@pytest.fixture
def settings():
    return {}


@pytest.fixture
def world(tmp_path, settings):
    config = ServerConfig.model_validate(
        {
            "server": {"state_dir": tmp_path / "state"},
            "listen": {
                "host": "127.0.0.1",
                "public_names": ["127.0.0.1"],
                "enrolment_port": 0,
                "device_port": 0,
            },
            "check_in": {
                "journal_poll_s": 0.05,
                "batch_window_s": 0.05,
                "max_waiting": 3,
                **settings.get("check_in", {}),
            },
            "limits": {"max_message_bytes": 16_384, "enrolment_failures": 50, **settings.get("limits", {})},
        }
    )
    with open_store(tmp_path / "lepton.db") as store:
        made = World(tmp_path, config, store, Authority.open(tmp_path / "tls"))
        made.start()
        try:
            yield made
        finally:
            for channel in made.channels:
                channel.close()
            made.stop()


@pytest.fixture
def device(world):
    return world.enrol()


def until(condition) -> bool:
    end = time.monotonic() + PATIENCE
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return bool(found)


def participate(run="r1", round=1):
    return pb.Instruction(
        participate=pb.Participate(run_id=run, round=round, attempt=1, kind="train", task=TASK, deadline_s=60)
    )


# -- a device that behaves ----------------------------------------------------------------------------


def test_enrol_check_in_wait_instruct_verdict(world, device):
    assert device.device_id == crypto.device_id(device.key.public_key())
    assert device.answer.ca_pem == world.authority.ca_pem
    assert device.answer.endpoints.device_service == f"127.0.0.1:{world.service.ports[1]}"
    assert device.answer.endpoints.fleet == "127.0.0.1:4242"
    world.authority.verify_device_certificate(device.certificate, time.time())
    row = world.store.device(device.device_id)
    assert (row.name, row.groups) == ("kitchen", ("home",))
    assert row.public_key == crypto.public_der(device.key.public_key())

    stub = device.stub()
    answer = device.check_in(stub)
    assert answer.wait
    assert not answer.renew
    assert 45 <= answer.next_check_in_s <= 75
    assert abs(answer.server_time - time.time()) < 60
    assert [c.standing for c in world.fleet.candidates(TASK, "1")] == ["eligible"]

    listening = Listening(device, stub)
    assert until(lambda: world.fleet.is_waiting(device.device_id))
    assert world.fleet.instruct(device.device_id, participate())
    told = listening.next().participate
    assert (told.run_id, told.kind) == ("r1", "train")
    assert 50 < told.deadline_s <= 60
    assert device.check_in(stub, status=pb.STATUS_BUSY).instructions == []
    verdict = pb.Instruction(verdict=pb.Verdict(run_id="r1", round=1, attempt=1, accepted=True))
    assert world.fleet.instruct(device.device_id, verdict)
    assert listening.next() == verdict
    listening.close()
    assert until(lambda: not world.fleet.is_waiting(device.device_id))


def test_a_check_in_tells_the_head_of_the_privacy_ledger_and_shows_what_was_seen(world, device):
    stub = device.stub()
    assert not device.check_in(stub).HasField("ledger")
    with world.store.transaction() as change:
        set_budget(change, world.keys, Policy("fleet", 1, 5.0, 1e-5))
    assert until(lambda: device.check_in(stub).HasField("ledger"))
    told = device.check_in(stub).ledger
    head = LedgerHead(told.seq, told.hash, told.key, told.signature)
    head.check()
    assert world.store.event_hash(head.seq) == head.hash.hex()
    device.check_in(stub, ledger=told)
    lost = sign_head(head.seq + 100, "a" * 64, world.keys.signer())  # what a newer database had signed
    shown = pb.LedgerHead(seq=lost.seq, hash=lost.hash, key=lost.key, signature=lost.signature)
    before = world.store.head_seq()
    for _ in range(3):
        assert device.check_in(stub, ledger=shown).ledger.seq == head.seq
    (missed,) = world.store.events(before, kinds=["ledger.missed"])
    assert missed.body["seq"] == lost.seq
    for damaged in (
        pb.LedgerHead(hash=bytes(32), key=b"x", signature=b"x"),
        pb.LedgerHead(seq=2**63, hash=bytes(32), key=b"x", signature=b"x"),
        pb.LedgerHead(seq=1, hash=b"x", key=b"x", signature=b"x"),
        pb.LedgerHead(seq=1, hash=bytes(32), key=bytes(1000), signature=b"x"),
        pb.LedgerHead(seq=1, hash=bytes(32), key=b"x"),
    ):
        with pytest.raises(ConfigError):
            device.check_in(stub, ledger=damaged)


def test_an_instruction_for_an_absent_device_comes_with_its_check_in(world, device):
    assert not world.fleet.instruct(device.device_id, participate())
    (told,) = device.check_in().instructions
    assert told.participate.run_id == "r1"


def test_presence_is_batched_and_idle_check_ins_leave_no_events(world, device):
    stub = device.stub()
    device.check_in(stub)
    assert until(lambda: world.store.device(device.device_id).reported)
    head = world.store.head_seq()
    for _ in range(30):
        device.check_in(stub)
    assert until(lambda: world.store.device(device.device_id).status == "idle")
    device.check_in(stub, status=pb.STATUS_NOT_ELIGIBLE, reason="load\n3.2")
    assert until(lambda: world.store.device(device.device_id).status == "not-eligible")
    assert world.store.head_seq() == head
    (candidate,) = world.fleet.candidates(TASK, "1")
    assert (candidate.standing, candidate.reason) == ("not-eligible", "load 3.2")


def test_a_fleet_of_two_hundred(world):
    devices, lock = [], threading.Lock()
    secret = world.token(uses=200)

    def some():
        stub = world.enrolment()
        for _ in range(25):
            made = world.enrol(secret=secret, stub=stub)
            made.check_in()
            with lock:
                devices.append(made)

    threads = [threading.Thread(target=some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({d.device_id for d in devices}) == 200
    assert world.fleet.counts().online == 200
    assert [c.standing for c in world.fleet.candidates(TASK, "1")] == ["eligible"] * 200
    with pytest.raises(TrustError, match="200 of 200"):
        world.enrol(secret=secret)
    world.store.verify_journal()


def test_devices_come_back_after_a_restart(world, device):
    stub = device.stub()
    listening = Listening(device, stub)
    assert until(lambda: world.fleet.is_waiting(device.device_id))
    ports = world.service.ports
    world.stop()
    assert listening.next() is None  # ended in good order
    listening.close()
    with pytest.raises(ConnectionFailed):
        device.check_in(stub)
    fixed = world.config.listen.model_copy(
        update=dict(zip(("enrolment_port", "device_port"), ports, strict=True))
    )
    world.config = world.config.model_copy(update={"listen": fixed})
    world.start()
    assert [c.standing for c in world.fleet.candidates(TASK, "1")] == ["offline"]
    call(stub.CheckIn, check_in_request(), wait_for_ready=True)  # the same connection object
    assert [c.standing for c in world.fleet.candidates(TASK, "1")] == ["eligible"]


# -- tokens -------------------------------------------------------------------------------------------


def test_a_token_is_good_once(world):
    secret = world.token()
    world.enrol(secret=secret)
    head = world.store.head_seq()
    with pytest.raises(TrustError, match="used 1 of 1") as caught:
        world.enrol(secret=secret)
    assert caught.value.status is grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.hint
    assert world.store.head_seq() == head
    assert world.fleet.counts().registered == 1


def test_of_many_at_once_one_gets_the_token(world):
    secret, results = world.token(), queue.Queue()

    def attempt():
        try:
            results.put(world.enrol(secret=secret))
        except TrustError as error:
            results.put(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = [results.get_nowait() for _ in threads]
    assert sum(isinstance(o, Device) for o in outcomes) == 1
    assert world.fleet.counts().registered == 1


def test_a_lost_answer_is_answered_again_to_the_same_key_only(world, monkeypatch):
    secret, key = world.token(), crypto.new_key()
    first = world.enrol(key, secret)
    again = world.enrol(key, secret)
    assert again.device_id == first.device_id
    assert again.certificate != first.certificate
    again.check_in()
    assert [e.kind for e in world.store.events(subject=first.device_id)][:2] == [
        "device.enrolled",
        "device.renewed",
    ]
    monkeypatch.setattr(device_service, "REPLAY_S", 0.0)  # minutes later
    with pytest.raises(TrustError, match="used"):
        world.enrol(key, secret)


def test_expired_forged_and_truncated_tokens(world):
    expiring = world.token(lasts=0.05)
    time.sleep(0.06)
    with pytest.raises(TrustError, match="expired"):
        world.enrol(secret=expiring)
    with pytest.raises(TrustError, match="did not make"):
        world.enrol(secret=crypto.new_secret())
    with pytest.raises(ConfigError, match=r"token_secret of 20 bytes, got 10"):
        world.enrol(secret=world.token()[:10])
    assert world.fleet.counts().registered == 0


def test_an_address_that_fails_too_often_must_wait(world, monkeypatch):
    monkeypatch.setattr(world.service, "_limiter", FailureLimiter(3, 60.0))
    for _ in range(3):
        with pytest.raises(TrustError):
            world.enrol(secret=crypto.new_secret())
    with pytest.raises(ConnectionFailed, match=r"3 attempts from 127\.0\.0\.1 have failed") as caught:
        world.enrol()
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_limiter_forgets_and_stays_small():
    now = [0.0]
    limiter = FailureLimiter(1, 10.0, clock=lambda: now[0], max_peers=5)
    limiter.failed("a")
    with pytest.raises(Exception, match="allowed in 10 s"):
        limiter.check("a")
    limiter.check("b")
    now[0] = 10.0
    limiter.check("a")
    for i in range(100):
        limiter.failed(f"x{i}")
    assert len(limiter._failures) <= 5


def test_addresses():
    assert _address("ipv4:192.0.2.1:50000") == "192.0.2.1"
    assert _address("ipv6:%5B2001:db8::1:2%5D:50000") == "2001:db8::/64"
    assert _address("ipv6:[fe80::1%25eth0]:50000") == "fe80::/64"
    assert _address("unix:") == "unix"


def test_secrets_are_not_logged(world, caplog):
    caplog.set_level(logging.DEBUG)
    secret = world.token()
    world.enrol(secret=secret)
    with pytest.raises(TrustError):
        world.enrol(secret=secret)
    for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
        assert form not in caplog.text
    assert "PRIVATE" not in caplog.text


# -- certificates -------------------------------------------------------------------------------------


def refused_in_the_handshake(world, key, certificate):
    stub = world.stub(world.service.ports[1], key, certificate)
    with pytest.raises(LeptonError) as caught:
        call(stub.CheckIn, check_in_request())
    assert caught.value.status is grpc.StatusCode.UNAVAILABLE
    assert CODE_KEY not in caught.value.metadata


def test_a_call_without_a_certificate_gets_nowhere(world):
    refused_in_the_handshake(world, None, None)


def test_a_certificate_of_another_authority(world, device, tmp_path):
    other = Authority.open(tmp_path / "other")
    issued = other.sign_device(crypto.make_csr(device.key, "x"), device.device_id)
    refused_in_the_handshake(world, device.key, issued.pem)


def test_an_expired_certificate_and_its_renewal(world, device):
    csr = crypto.make_csr(device.key, "x")
    old = world.authority.sign_device(csr, device.device_id, 1, now=time.time() - 2 * 86_400)
    refused_in_the_handshake(world, device.key, old.pem)
    device.certificate = device.renew()
    assert not device.check_in().renew


def test_a_certificate_that_expires_on_a_kept_connection(world, device):
    stub = device.stub()
    device.check_in(stub)
    world.service._wall = lambda: time.time() + 21 * 86_400
    assert device.check_in(stub).renew
    world.service._wall = lambda: time.time() + 31 * 86_400
    with pytest.raises(TrustError, match="expired"):
        device.check_in(stub)


def test_renewal_is_for_the_registered_key_only(world, device):
    with pytest.raises(TrustError, match="not signed by the key"):
        device.renew(crypto.new_key())
    stranger = crypto.new_key()
    never = Device(world, stranger, crypto.device_id(stranger.public_key()), b"")
    with pytest.raises(TrustError, match="not enrolled"):
        never.renew()
    renewed = device.renew()
    assert renewed != device.certificate
    for _ in range(12):  # more than the failures that an address may have: this is none
        with pytest.raises(ConnectionFailed, match="renewed its certificate") as caught:
            device.renew()
        assert 0 < retry_after(caught.value.metadata.items()) <= device_service.RENEW_GAP_S
    world.store.record("device.revoked", device.device_id, {"device_id": device.device_id})
    with pytest.raises(TrustError, match="revoked"):
        device.renew()


def test_a_certificate_signed_by_us_for_a_key_that_never_enrolled(world):
    key = crypto.new_key()
    device_id = crypto.device_id(key.public_key())
    issued = world.authority.sign_device(crypto.make_csr(key, "x"), device_id)
    with pytest.raises(TrustError, match="not enrolled") as caught:
        Device(world, key, device_id, issued.pem).check_in()
    assert caught.value.status is grpc.StatusCode.PERMISSION_DENIED


def test_the_servers_own_certificate_is_no_device(world):
    key = crypto.key_from_pem(world.authority.server_key_pem)
    refused_in_the_handshake(world, key, world.authority.server_cert_pem)


def test_a_device_does_not_talk_to_another_server(world, device, tmp_path):
    other = Authority.open(tmp_path / "other")
    stub = world.stub(world.service.ports[1], device.key, device.certificate, ca=other.ca_pem)
    with pytest.raises(ConnectionFailed):
        call(stub.CheckIn, check_in_request())


def test_a_renewed_server_certificate_is_used_without_a_restart(world, device):
    def served():
        pem = ssl.get_server_certificate(("127.0.0.1", world.service.ports[0]), timeout=PATIENCE)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    stub = device.stub()
    device.check_in(stub)
    before = served()
    assert before == served()
    assert world.authority.refresh_server(["fl.example.org"])
    assert served() != before
    device.check_in(stub)
    device.check_in()


def test_revocation_ends_the_stream_and_every_later_call(world, device, tmp_path):
    stub = device.stub()
    listening = Listening(device, stub)
    assert until(lambda: world.fleet.is_waiting(device.device_id))
    with open_store(tmp_path / "lepton.db") as command_line:
        body = {"device_id": device.device_id, "reason": "stolen"}
        command_line.record("device.revoked", device.device_id, body)
    end = listening.next()
    assert end.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "revoked" in end.details()
    listening.close()
    with pytest.raises(TrustError, match="revoked"):
        device.check_in(stub)
    with pytest.raises(TrustError, match="revoked"):
        world.enrol(device.key)
    refused = Listening(device)
    assert refused.next().code() is grpc.StatusCode.PERMISSION_DENIED
    refused.close()


# -- peers that do not behave -------------------------------------------------------------------------


def test_each_call_at_its_port(world, device):
    enrolment, mine = world.enrolment(), device.stub()
    for method in (enrolment.CheckIn, mine.Enroll, mine.Renew):
        with pytest.raises(ConfigError, match="not served at this port") as caught:
            call(method, pb.CheckInRequest(protocol=1))
        assert caught.value.status is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError, match="not served at this port"):
        next(enrolment.Wait(pb.WaitRequest(protocol=1)))


def raw(world, port, method, data, key=None, certificate=None):
    key_pem = crypto.key_to_pem(key) if key else None
    credentials = grpc.ssl_channel_credentials(world.authority.ca_pem, key_pem, certificate)
    channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials)
    world.channels.append(channel)
    return call(channel.unary_unary(f"/lepton.v1.DeviceService/{method}"), data)


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 40, check_in_request().SerializeToString()[:-3], b"\x0a\xff\xff\xff"],
    ids=["noise", "cut short", "a length beyond the end"],
)
def test_malformed_bytes(world, device, data):
    with pytest.raises(ConfigError, match="are no CheckInRequest") as caught:
        raw(world, world.service.ports[1], "CheckIn", data, device.key, device.certificate)
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(ConfigError, match="are no EnrollRequest"):
        raw(world, world.service.ports[0], "Enroll", b"\xff" * 40)
    device.check_in()


def test_an_oversized_message(world, device):
    with pytest.raises(LeptonError) as caught:
        device.check_in(reason="x" * 20_000)
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    device.check_in()


def test_something_that_is_not_tls(world, device):
    for port in world.service.ports:
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
            plain.settimeout(PATIENCE)
            while plain.recv(4096):
                pass
    device.check_in()


def unfinished(world, port, method, key=None, certificate=None):
    """A call whose request does not come until the returned function is given it; None ends it without."""
    key_pem = crypto.key_to_pem(key) if key else None
    credentials = grpc.ssl_channel_credentials(world.authority.ca_pem, key_pem, certificate)
    channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)])
    world.channels.append(channel)
    requests = queue.SimpleQueue()
    sent = channel.stream_unary(f"/lepton.v1.DeviceService/{method}").future(iter(requests.get, None))
    return sent, requests.put


def test_a_request_that_does_not_come_is_given_up(world, device, monkeypatch):
    monkeypatch.setattr(device_service, "READ_S", 0.2)
    enrolment, mine = world.service.ports
    calls = [
        unfinished(world, enrolment, "Enroll"),
        unfinished(world, mine, "CheckIn", device.key, device.certificate),
        unfinished(world, mine, "Wait", device.key, device.certificate),
        unfinished(world, mine, "FetchChunks", device.key, device.certificate),
    ]
    for sent, finish in calls:
        error = sent.exception(PATIENCE)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not arrive within 0.2 s" in error.details()
        finish(None)
    for door in (world.service._door, world.service._enrolment_door):
        assert until(lambda door=door: not door._inside)
        assert door._counted == 0
    device.check_in()


def test_a_call_without_a_request(world, device):
    sent, finish = unfinished(world, world.service.ports[1], "CheckIn", device.key, device.certificate)
    finish(None)
    assert "ended without a request" in sent.exception(PATIENCE).details()
    sent, finish = unfinished(world, world.service.ports[1], "CheckIn", device.key, device.certificate)
    finish(check_in_request().SerializeToString())
    assert sent.result(PATIENCE)  # of a stream the first one counts
    finish(None)


def busy(caught) -> float:
    """After how many seconds a call may come again that was put off."""
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert RETRY_KEY in caught.value.metadata
    return retry_after(caught.value.metadata.items())


class TestPace:
    @pytest.fixture
    def settings(self):
        return {"limits": {"calls_per_s": 0.25, "call_burst": 3}}

    def test_a_device_that_calls_too_often_is_told_when_to_come_again(self, world, device):
        other, stub = world.enrol(), device.stub()
        for _ in range(3):
            device.check_in(stub)
        with pytest.raises(grpc.RpcError, match="calls too often"):
            next(stub.Wait(pb.WaitRequest(protocol=1)))
        with pytest.raises(ConnectionFailed, match="calls too often") as caught:
            device.check_in(stub)
        assert 0 < busy(caught) <= 4
        other.check_in()


def test_too_much_in_hand_is_put_off_to_the_next_turn(world, device):
    other, port = world.enrol(), world.service.ports[1]
    world.service._door = Door(1, 2)
    held = [unfinished(world, port, "CheckIn", device.key, device.certificate)]
    assert until(lambda: world.service._door._counted == 1)
    with pytest.raises(ConnectionFailed, match="busy") as caught:
        other.check_in()
    assert 45 <= busy(caught) <= 75  # check_in.interval_s
    held.append(unfinished(world, port, "Wait", device.key, device.certificate))
    assert until(lambda: world.service._door._inside[device.device_id] == 2)
    with pytest.raises(grpc.RpcError, match="busy"):
        next(device.stub().Wait(pb.WaitRequest(protocol=1)))
    listening = Listening(other)  # streams are not counted among the calls
    assert until(lambda: world.fleet.is_waiting(other.device_id))
    listening.close()
    for sent, finish in held:
        sent.cancel()
        finish(None)
    assert until(lambda: not world.service._door._counted)
    other.check_in()


def test_of_calls_that_have_waited_long_every_second_one_is_put_off(world, device):
    stub, late = device.stub(), ((PATIENCE_KEY, str(PATIENCE + 1)),)  # as if a second had gone by in line
    put_off = []
    for _ in range(6):
        try:
            call(stub.CheckIn, check_in_request(), metadata=late)
        except ConnectionFailed as error:
            put_off.append(retry_after(error.metadata.items()))
    assert len(put_off) == 3
    assert all(45 <= wait_s <= 75 for wait_s in put_off)
    for fresh in (((PATIENCE_KEY, str(PATIENCE)),), ((PATIENCE_KEY, "nonsense"),), ()):
        for _ in range(3):
            call(stub.CheckIn, check_in_request(), metadata=fresh)


def test_one_address_cannot_hold_the_enrolment_port(world):
    world.service._enrolment_door = Door(9, 2)
    held = [unfinished(world, world.service.ports[0], "Enroll") for _ in range(2)]
    assert until(lambda: world.service._enrolment_door._counted == 2)
    with pytest.raises(ConnectionFailed, match="enrolments are under way") as caught:
        world.enrol()
    assert 1 <= busy(caught) <= 5
    for sent, finish in held:
        sent.cancel()
        finish(None)
    assert until(lambda: not world.service._enrolment_door._counted)
    world.enrol()


class TestCrowd:
    @pytest.fixture
    def settings(self, monkeypatch):
        monkeypatch.setattr(connections, "ENROLMENT_CONNECTIONS", 12)
        return {"limits": {"max_device_connections": 10, "max_connections_per_address": 4}}

    def test_one_address_holds_few_connections_and_others_come_in(self, world, device):
        stub = device.stub()
        device.check_in(stub)
        for port, most in zip(world.service.ports, (4, 4), strict=True):
            held = [
                socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=("127.0.0.2", 0))
                for _ in range(8)
            ]
            try:
                assert until(lambda held=held, most=most: sum(map(is_open, held)) <= most)
            finally:
                for near in held:
                    near.close()
        device.check_in(stub)  # a connection of another address is not touched

    def test_more_than_all_are_hung_up_on_and_come_in_when_there_is_room(self, world, device):
        port = world.service.ports[1]
        world.service._keepers[1].cancel()  # who leaves every address only so many
        held = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(30)]
        try:
            assert until(lambda: sum(map(is_open, held)) <= 10)
            with pytest.raises(LeptonError):
                device.check_in()
        finally:
            for near in held:
                near.close()
        assert until(lambda: comes_in(device))


def is_open(near):
    near.setblocking(False)
    try:
        while near.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def comes_in(device):
    try:
        device.check_in()
    except ConnectionFailed:
        return False
    return True


def damaged(seed: bytes, rng: random.Random) -> bytes:
    """Something like a good message."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 8)))
        data[at:end] = rng.choice(
            (b"", b"\xff", rng.randbytes(end - at), bytes(data[at:end]) * 40, b"\x0a\xff\x7f")
        )
    return bytes(data)


class TestNoise:
    @pytest.fixture
    def settings(self):
        no_bound = {"calls_per_s": 1e5, "call_burst": 10**6, "enrolment_failures": 10**5}
        return {"limits": no_bound}

    def test_whatever_comes_is_answered_in_our_words(self, world, device, caplog):
        rng, csr = random.Random(0), crypto.make_csr(device.key, "x")
        enrolment, mine = world.service.ports
        good = {
            "Enroll": pb.EnrollRequest(protocol=1, token_secret=bytes(20), csr_pem=csr, groups=["a"]),
            "Renew": pb.RenewRequest(protocol=1, device_id=device.device_id, csr_pem=csr),
            "CheckIn": check_in_request(reason="why", desired_digest="ab" * 32, adverts=[b"x" * 40]),
            "Wait": pb.WaitRequest(protocol=1),
            "Certify": pb.CertifyRequest(protocol=1, request=bytes(200)),
            "FetchMetadata": pb.FetchMetadataRequest(protocol=1, name="timestamp.json"),
            "FetchChunks": pb.FetchChunksRequest(protocol=1, sha256=[bytes(32)]),
        }
        key = crypto.key_to_pem(device.key)
        ours = grpc.ssl_channel_credentials(world.authority.ca_pem, key, device.certificate)
        anyone = grpc.ssl_channel_credentials(world.authority.ca_pem)
        statuses, told = set(), []
        for port, credentials in ((enrolment, anyone), (mine, ours)):
            channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials)
            world.channels.append(channel)
            for _ in range(FUZZ_INPUTS):
                name = rng.choice(list(good))
                method = f"/lepton.v1.DeviceService/{name if rng.random() < 0.95 else name + 'x'}"
                data = damaged(good[name].SerializeToString(), rng)
                metadata = [(rng.choice((PATIENCE_KEY, "x", "y-bin")), rng.choice((b"1e99", b"", b"nan")))]
                answers = channel.unary_stream(method)(data, timeout=PATIENCE, metadata=metadata)
                try:
                    if name == "Wait":  # a good one would wait
                        answers.add_callback(lambda: None)
                        time.sleep(0.001)
                        answers.cancel()
                    for _ in answers:
                        pass
                except grpc.RpcError as error:
                    statuses.add(error.code().name)
                    in_our_words = CODE_KEY in dict(error.trailing_metadata() or ())
                    told.append((error.code().name, in_our_words, error.details() or ""))
        broken = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED"}
        assert not [t for t in told if t[0] in broken or (t[0] == "UNAVAILABLE" and not t[1])]
        assert not [t for t in told if "Traceback" in t[2]]
        assert {"INVALID_ARGUMENT", "PERMISSION_DENIED", "UNIMPLEMENTED"} <= statuses
        assert "reference" not in caplog.text  # nothing that nobody foresaw
        for door in (world.service._door, world.service._enrolment_door):
            assert until(lambda door=door: not door._inside)
        device.check_in()


def test_a_device_leaves_what_is_not_open_and_its_report_stays_the_same(world, device):
    world.fleet.open_attempt("r1", "aa")
    engaged = [pb.Engaged(run_id="r1", round=3, nonce="aa"), pb.Engaged(run_id="r1", round=2, nonce="bb")]
    answer = device.check_in(engaged=engaged)
    assert [i.leave.nonce for i in answer.instructions] == ["bb"]
    assert (answer.instructions[0].leave.run_id, answer.instructions[0].leave.round) == ("r1", 2)
    world.fleet.close_attempt("r1", "aa")
    assert len(device.check_in(engaged=engaged).instructions) == 2
    assert len(world.service._reports) == 1


def test_reports_that_were_checked_are_remembered_up_to_a_size(world, device, monkeypatch):
    monkeypatch.setattr("lepton_server.device_service._MAX_REPORTS", 2000)
    for number in range(20):
        device.check_in(client_version=f"0.{number}")
        kept = sum(map(len, world.service._reports))
        assert 0 < kept == world.service._reports_size <= 2000


@pytest.mark.parametrize("protocol", [0, 2])
def test_another_protocol_version_names_both(world, device, protocol):
    with pytest.raises(ConfigError, match=f"speaks protocol {protocol}, the coordinator 1") as caught:
        device.check_in(protocol=protocol)
    assert caught.value.status is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(ConfigError, match=f"speaks protocol {protocol}"):
        world.enrol(protocol=protocol)


BAD_CHECK_INS = {
    "status": {"status": 0},
    "status of 1, 2 or 3, got 9": {"status": 9},
    "reason of at most 500": {"reason": "x" * 501},
    "at most 32 tasks": {"tasks": [pb.TaskReport(name=f"t:{i}", version="1") for i in range(33)]},
    "each task version once": {"tasks": [pb.TaskReport(name="t:a", version="1")] * 2},
    "a task's name of 1 to 200": {"tasks": [pb.TaskReport(version="1")]},
    "a task's version": {"tasks": [pb.TaskReport(name="t:a", version="1\n")]},
    "layout_digest": {"tasks": [pb.TaskReport(name="t:a", version="1", layout_digest="zz")]},
    "a task's reason": {"tasks": [pb.TaskReport(name="t:a", version="1", reason="x" * 501)]},
    "client_version": {"client_version": "x" * 51},
    "cpus": {"capabilities": pb.Capabilities(cpus=10**6)},
    "memory_bytes": {"capabilities": pb.Capabilities(memory_bytes=2**60)},
    "accelerator": {"capabilities": pb.Capabilities(accelerator="x" * 51)},
    "device_time in seconds since 1970, got nan": {"device_time": float("nan")},
    "device_time in seconds since 1970, got inf": {"device_time": float("inf")},
    "device_time": {"device_time": -1.0},
    "desired_digest": {"desired_digest": "abc"},
    "at most 8 attempts": {"engaged": [pb.Engaged(run_id="r", round=i) for i in range(9)]},
    "engaged.run_id": {"engaged": [pb.Engaged(run_id="")]},
    "engaged.nonce": {"engaged": [pb.Engaged(run_id="r", nonce="x" * 201)]},
    "engaged.failure": {"engaged": [pb.Engaged(run_id="r", failure="x" * 501)]},
}


def test_every_field_of_a_check_in_is_checked(world, device):
    stub = device.stub()
    for message, changes in BAD_CHECK_INS.items():
        with pytest.raises(ConfigError, match=message) as caught:
            device.check_in(stub, **changes)
        assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert world.fleet.counts().online == 0  # nothing of it was taken in
    device.check_in(stub)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("name of at most 100", {"name": "x" * 101}),
        ("groups of 1 to 50", {"groups": ["x" * 51]}),
        ("groups of 1 to 50", {"groups": ["a\tb"]}),
        ("at most 16 groups", {"groups": [f"g{i}" for i in range(17)]}),
        ("csr_pem of 1 to 8192", {"csr_pem": b""}),
        ("csr_pem of 1 to 8192", {"csr_pem": b"x" * 9000}),
    ],
)
def test_every_field_of_an_enrolment_is_checked(world, message, changes):
    secret = world.token()
    with pytest.raises(ConfigError, match=message):
        world.enrol(secret=secret, **changes)
    world.enrol(secret=secret)  # the token was not spent


def test_a_request_that_its_key_did_not_sign(world):
    secret, csr = world.token(), crypto.make_csr(crypto.new_key(), "x")
    der = bytearray(base64.b64decode(b"".join(csr.split(b"\n")[1:-2])))
    der[-1] ^= 1
    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.b64encode(bytes(der))
    forged += b"\n-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(TrustError):
        world.enrol(secret=secret, csr_pem=forged)
    world.enrol(secret=secret)


def test_no_more_than_the_allowed_number_wait(world):
    devices = [world.enrol() for _ in range(4)]
    waiting = [Listening(d) for d in devices[:3]]
    assert until(lambda: world.fleet.counts().waiting == 3)
    fourth = Listening(devices[3])
    end = fourth.next()
    assert end.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3 devices are waiting" in end.details()
    for listening in [*waiting, fourth]:
        listening.close()


def test_a_second_stream_replaces_the_first(world, device):
    first, second = Listening(device), None
    assert until(lambda: world.fleet.is_waiting(device.device_id))
    second = Listening(device)
    assert first.next() is None
    world.fleet.instruct(device.device_id, participate())
    assert second.next().participate.run_id == "r1"
    first.close()
    second.close()


class TestShortStreams:
    @pytest.fixture
    def settings(self):
        return {"check_in": {"stream_s": 0.1}}

    def test_a_stream_ends_in_good_order(self, world, device):
        listening = Listening(device)
        assert listening.next() is None
        listening.close()


def test_a_surprise_is_numbered_and_not_shown(world, device, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(world.fleet, "check_in", broken)
    with pytest.raises(LeptonError, match=r"reference [0-9a-f]{8}") as caught:
        device.check_in()
    assert caught.value.status is grpc.StatusCode.INTERNAL
    assert "secret detail" not in str(caught.value)
    assert "secret detail" in caplog.text


def test_a_taken_port_is_named_and_nothing_stays_open(world):
    enrolment, taken = world.service.ports
    listen = world.config.listen.model_copy(update={"device_port": taken})
    config = world.config.model_copy(update={"listen": listen})
    second = DeviceService(config, world.store, world.authority, world.fleet)
    with pytest.raises(ConnectionFailed, match=f"127.0.0.1:{taken} \\(the device port\\)"):
        second.start()
    assert not [
        t for t in threading.enumerate() if t.name == "device-service" and t is not world.service._thread
    ]
    assert enrolment


def test_a_full_disk_spends_no_token(world, monkeypatch):
    from lepton_fl.errors import DiskFull

    secret = world.token()

    def full(*_args):
        raise DiskFull("no space was left")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "transaction", full)
        with pytest.raises(DiskFull) as caught:
            world.enrol(secret=secret)
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    world.enrol(secret=secret)


def test_certificate_times_follow_the_configuration(world, device):
    certificate = x509.load_pem_x509_certificate(device.certificate)
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=29) < left <= dt.timedelta(days=30)


# -- releases -------------------------------------------------------------------------------------------


def test_what_a_device_serves_is_checked(world, device):
    good = {"task": "digits", "profile": "gateway", "release": "a" * 64}
    failed = pb.FailedRelease(release="b" * 64, fault="self-test", detail="differs", final=True)
    device.check_in(serving=pb.Serving(**good, failed=[failed]))
    assert world.fleet.releases() == {"a" * 64: 1}
    for change in (
        {"release": "a" * 63},
        {"release": "Z" * 64},
        {"profile": "x" * 51},
        {"failed": [failed] * 10},
        {"failed": [pb.FailedRelease(release="b" * 64, fault="because")]},
        {"failed": [pb.FailedRelease(release="", fault="self-test")]},
    ):
        with pytest.raises(ConfigError):
            device.check_in(serving=pb.Serving(**(good | change)))


def test_a_device_that_does_not_read_loses_its_turn(world, device, monkeypatch):
    monkeypatch.setattr(device_service, "SEND_S", 0.3)
    world.service._downloads._turn = asyncio.Semaphore(1)
    blobs, other = Shelf(world.config.release_dir).blobs, world.enrol()
    names = [bytes.fromhex(blobs.put(os.urandom(2**18))) for _ in range(16)]
    chunks = pb.FetchChunksRequest(protocol=1, sha256=names)
    slow = device.stub().FetchChunks(chunks, timeout=4 * PATIENCE)  # nobody reads
    assert until(world.service._downloads._turn.locked)
    assert len(list(other.stub().FetchChunks(chunks, timeout=4 * PATIENCE))) == 16
    with pytest.raises(grpc.RpcError, match="not taken within"):
        list(slow)


def test_chunks_and_metadata_are_for_enrolled_devices_at_the_device_port(world, device):
    name = Shelf(world.config.release_dir).blobs.put(b"chunk")
    chunks = pb.FetchChunksRequest(protocol=1, sha256=[bytes.fromhex(name)])
    metadata = pb.FetchMetadataRequest(protocol=1, name="1.root.json")
    stub = device.stub()
    assert [c.data for c in stub.FetchChunks(chunks, timeout=PATIENCE)] == [b"chunk"]
    with pytest.raises(LeptonError) as caught:
        call(stub.FetchMetadata, metadata)
    assert caught.value.status is grpc.StatusCode.NOT_FOUND
    with pytest.raises(LeptonError) as caught:
        call(world.enrolment().FetchMetadata, metadata)
    assert caught.value.status is grpc.StatusCode.UNIMPLEMENTED
    refused_in_the_handshake(world, None, None)
    world.store.record("device.revoked", {"device_id": device.device_id})
    world.fleet.follow()
    with pytest.raises(TrustError):
        call(stub.FetchMetadata, metadata)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.FetchChunks(chunks, timeout=PATIENCE))
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
