"""Both ends of the Flower transport over real loopback TLS."""

import base64
import datetime
import ipaddress
import logging
import random
import shutil
import socket
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lepton_fl.errors import (
    ConnectionFailed,
    DiskFull,
    Rejection,
    StateConflict,
    TrustError,
    UpdateRejected,
)
from lepton_fl.wire.records import Records

pytestmark = [
    pytest.mark.network,
    # uvicorn's websocket support imports a module that says it is old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:websockets"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn"),
]

HOST = "127.0.0.1"
FUZZ_INPUTS = 300  # benchmarks/noise.py sends a million
FOUR_MB = 1_000_000  # float32 numbers


def der(key):
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def new_key(curve=None):
    return ec.generate_private_key(curve or ec.SECP256R1())


def make_certificate(folder):
    """A self-signed server certificate, which is its own CA."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem


class Server:
    """A link served by uvicorn in a thread, on a free port."""

    def __init__(self, folder, **options):
        import uvicorn

        from lepton_server.flower import FlowerLink, Limits

        self.ca = make_certificate(folder)
        self.folder = folder
        self.refusals = []
        limits = Limits(**options.pop("limits", {}))
        self.link = FlowerLink(limits, on_refused=self.refusals.append, **options).start()
        self.socket = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self.socket.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(
                self.link.app,
                ssl_certfile=folder / "cert.pem",
                ssl_keyfile=folder / "key.pem",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
                ws="none",
            )
        )
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],))
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.005)

    def node(self, key, **options):
        from lepton_client.flower import FlowerNode

        return FlowerNode(self.address, self.ca, key, **({"retry_for_s": 20} | options))

    def http(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.ca.decode())
        return httpx.Client(base_url=f"https://{self.address}", verify=context, timeout=10)

    def close(self):
        self.link.close()
        self.uvicorn.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture
def serve(tmp_path):
    """Start servers; all are stopped at the end."""
    with ExitStack() as stack:

        def start(**options):
            server = Server(tmp_path, **options)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def server(serve):
    return serve()


@contextmanager
def joined(server, count=1):
    """Nodes that are admitted and active, with their ids."""
    with ExitStack() as stack:
        nodes = []
        for _ in range(count):
            key = new_key()
            node = stack.enter_context(server.node(key))
            node_id = server.link.admit(der(key))
            assert node.activate() == node_id
            nodes.append((node_id, node, key))
        yield nodes


def headers(key, **changes):
    """Flower's authentication headers."""
    stamp = changes.get("stamp", datetime.datetime.now(datetime.UTC).isoformat())
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "content-type": "application/protobuf",
        "flwr-public-key": base64.b64encode(pem).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


def model(seed=0, size=FOUR_MB):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def reply_to(records):
    """What the devices of these tests do."""
    return Records({"update": records.arrays["model"] + 1}, {"round": records.config["round"]}, {"loss": 0.5})


# --- the way it should go -------------------------------------------------------------------------------


def test_a_message_goes_out_and_its_answer_comes_back_bit_for_bit(server):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        sent = Records({"model": model()}, {"round": 3, "note": "ü"}, {"lr": 0.1})
        message_id = box.post(node_id, sent, message_type="train", ttl_s=60)
        handle, got = node.pull()
        assert (handle.message_id, handle.message_type) == (message_id, "train")
        np.testing.assert_array_equal(got.arrays["model"], sent.arrays["model"])
        assert (got.config, got.metrics) == (sent.config, sent.metrics)
        node.push(handle, reply_to(got))
        reply = box.get(timeout_s=10)
        assert (reply.message_id, reply.node_id) == (message_id, node_id)
        np.testing.assert_array_equal(reply.content.arrays["update"], sent.arrays["model"] + 1)
        assert reply.content.metrics == {"loss": 0.5}
        assert reply.num_bytes > 4 * FOUR_MB
        assert node.pull() is None
        assert box.open_messages() == []
        assert_empty(server)


def counted_calls(node):
    """The names of the requests that a node makes from now on."""
    names, call = [], node._call
    node._call = lambda method, request: (names.append(method.__name__), call(method, request))[1]
    return names


def test_a_small_message_takes_one_request_down_and_its_answer_one_up(server):
    disk = Disk()
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        for keep in (None, disk):
            box.post(
                node_id, Records({}, {"round": 1}, {"lr": 0.1}), message_type="train", ttl_s=60, keep=keep
            )
            calls = counted_calls(node)
            handle, got = node.pull()
            assert (got.config, got.metrics) == ({"round": 1}, {"lr": 0.1})
            node.push(handle, Records({"u": np.arange(9)}, {"x": 1}, {"loss": 0.5}))
            assert calls == ["PullMessages", "PushMessages"]
            content = box.get(timeout_s=5).content
            assert (content.arrays["u"].tolist(), content.config) == (list(range(9)), {"x": 1})
        assert len(disk.kept) == 1
        assert disk.kept[0][1] == sum(map(len, disk.kept[0][0].values()))  # bytes on the wire
        assert_empty(server)


def test_of_a_large_message_only_what_is_large_takes_requests_of_its_own(server):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({"model": model()}, {"round": 1}), message_type="train", ttl_s=60)
        calls = counted_calls(node)
        handle, got = node.pull()
        node.push(handle, reply_to(got))
        assert calls == ["PullMessages", "PullObject", "PushMessages", "PushObject"]
        assert len(box.get(timeout_s=5).content.arrays["update"]) == FOUR_MB


@pytest.mark.parametrize("end", ["device", "coordinator"])
def test_an_end_that_knows_nothing_of_this_gets_the_objects_one_by_one(server, end, monkeypatch):
    module = {"device": "lepton_client.flower", "coordinator": "lepton_server.flower.guard"}[end]
    monkeypatch.setattr(f"{module}.add_along", lambda message, objects: None)
    monkeypatch.setattr(f"{module}.read_along", lambda message: {})
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        calls = counted_calls(node)
        handle, _ = node.pull()
        node.push(handle, Records({"u": np.arange(9)}, {"x": 1}))
        assert (calls.count("PullObject"), calls.count("PushObject")) == (3, 7)
        assert box.get(timeout_s=5).content.config == {"x": 1}
        assert_empty(server)


@pytest.mark.parametrize("came", ["foreign", "altered", "too much"])
def test_objects_that_do_not_belong_to_an_answer_are_not_taken(server, came, monkeypatch):
    import lepton_client.flower
    from lepton_fl.wire.v1.device_pb2 import Along

    def add(message, objects):
        if not hasattr(message, "clientapp_runtime_list"):
            return
        wrong = {
            "foreign": [b"ConfigRecord  2\0{}"],
            "altered": [bytes(content) + b"x" for content in objects],
            "too much": [*map(bytes, objects), b"x" * 16_384],
        }[came]
        message.MergeFromString(Along(objects=wrong).SerializeToString())

    monkeypatch.setattr(lepton_client.flower, "add_along", add)
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        calls = counted_calls(node)
        node.push(node.pull()[0], Records({}, {"x": 1}))
        assert calls.count("PushObject") == 4
        assert box.get(timeout_s=5).content.config == {"x": 1}
        assert_empty(server)


def assert_empty(server):
    """Nothing is left in Flower's state."""
    state = server.link._state
    assert len(state.object_store) == 0
    assert (state.num_message_ins(), state.num_message_res()) == (0, 0)
    assert (state._inbox, state._object_push_sessions, server.link._posts) == ({}, {}, {})


def work(node, rounds):
    """A device's loop."""
    for _ in range(rounds):
        while (item := node.pull()) is None:
            time.sleep(0.01)
        node.push(item[0], reply_to(item[1]))


def test_five_nodes_work_at_the_same_time(server):
    with joined(server, 5) as nodes:
        box = server.link.mailbox()
        threads = [threading.Thread(target=work, args=(node, 2)) for _, node, _ in nodes]
        for thread in threads:
            thread.start()
        for round_ in range(2):
            records = Records({"model": model(round_)}, {"round": round_})
            posted = {box.post(n, records, message_type="train", ttl_s=60): n for n, _, _ in nodes}
            for _ in nodes:
                reply = box.get(timeout_s=30)
                assert posted.pop(reply.message_id) == reply.node_id
                np.testing.assert_array_equal(reply.content.arrays["update"], records.arrays["model"] + 1)
            assert box.get(timeout_s=0) is None
        for thread in threads:
            thread.join()
        assert_empty(server)


def test_a_model_is_stored_once_for_any_number_of_recipients(server):
    box = server.link.mailbox()
    for shared in (Records({"model": model()}, {"round": 1}), None):
        for _ in range(50):
            node_id = server.link.admit(der(new_key()))
            records = shared or Records({"model": model(1)}, {"round": 2})  # equal, not the same object
            box.post(node_id, records, message_type="train", ttl_s=60)
        store = server.link._state.object_store
        stored = sum(len(entry.content) for entry in store.store.values())
        assert stored < 4 * FOUR_MB + 100_000
        box.withdraw(box.open_messages())
        assert_empty(server)


def test_identical_answers_of_different_nodes_all_count(server):
    with joined(server, 4) as nodes:
        box = server.link.mailbox()
        for node_id, _, _ in nodes:
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        zero = Records({"update": np.zeros(300_000, np.float32)}, {"round": 1})
        threads = [threading.Thread(target=lambda n=node: n.push(n.pull()[0], zero)) for _, node, _ in nodes]
        for thread in threads:
            thread.start()
        assert {box.get(timeout_s=10).node_id for _ in nodes} == {node_id for node_id, _, _ in nodes}
        for thread in threads:
            thread.join()
        assert_empty(server)


def test_mailboxes_do_not_mix(server):
    with joined(server) as [(node_id, node, _)]:
        boxes = [server.link.mailbox(), server.link.mailbox()]
        ids = [
            b.post(node_id, Records({}, {"round": i}), message_type="train", ttl_s=60)
            for i, b in enumerate(boxes)
        ]
        for _ in boxes:
            handle, records = node.pull()
            node.push(handle, Records({}, records.config))
        for i, box in enumerate(boxes):
            reply = box.get(timeout_s=5)
            assert (reply.message_id, reply.content.config) == (ids[i], {"round": i})
            assert box.get(timeout_s=0) is None


def test_a_waiting_round_is_woken_at_once_and_by_close(server):
    box = server.link.mailbox()
    got = []
    thread = threading.Thread(target=lambda: got.append(box.get()))
    thread.start()
    box.close()
    thread.join(5)
    assert got == [None]
    assert box.get() is None


def test_a_closed_link_asks_devices_to_come_back_and_takes_no_more_work(server):
    from lepton_fl.errors import StateError

    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        server.link.close()
        assert box.get() is None
        with pytest.raises(ConnectionFailed, match="busy"):  # and not: your key is unknown
            node.pull()
        with pytest.raises(StateError, match="closed"):
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        with pytest.raises(StateError, match="closed"):
            server.link.admit(der(new_key()))
        assert_empty(server)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda c: c.name)
def test_keys_of_both_curves_work(server, curve):
    key = new_key(curve)
    node_id = server.link.admit(der(key))
    assert server.link.admit(der(key)) == node_id
    with server.node(key) as node:
        assert node.activate() == node_id


def test_a_restarted_device_activates_at_once_and_gets_its_message_again(server):
    with joined(server) as [(node_id, node, key)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        assert node.pull() is not None
        with server.node(key) as again:
            assert again.activate() == node_id
            handle, records = again.pull()
            again.push(handle, Records({}, records.config))
        assert box.get(timeout_s=5).content.config == {"round": 1}


# --- packed models --------------------------------------------------------------------------------------


def weights(round_number):
    steps = np.random.default_rng(1).normal(0, 0.0005, (round_number + 1, FOUR_MB // 4))
    return (model(0, FOUR_MB // 4) / 20 + steps.sum(axis=0)).astype(np.float32)


def kept_in(folder, quota=2**24):
    from lepton_client.objects import KeptObjects

    return KeptObjects(folder, quota)


def rounds_of(server, node_id, node, numbers, **options):
    """Send these models, one a message; how many bytes went down for each."""
    sent = []
    for number in numbers:
        box = server.link.mailbox(**({"packs_for": "r"} | options))
        message_id = box.post(node_id, Records({"model": weights(number)}), message_type="train", ttl_s=60)
        handle, got = node.pull()
        np.testing.assert_array_equal(got.arrays["model"], weights(number))
        node.push(handle, Records({}, {"round": number}))
        assert box.get(timeout_s=10).message_id == message_id
        sent.append(box.sent[message_id])
        box.close()
    return sent


@contextmanager
def keeping(server, folder, quota=2**24):
    key = new_key()
    with server.node(key, kept=kept_in(folder, quota)) as node:
        node_id = server.link.admit(der(key))
        node.activate()
        yield node_id, node


def test_a_model_comes_whole_then_as_a_difference_and_then_not_at_all(server, tmp_path):
    plain = FOUR_MB  # bytes of the model
    with keeping(server, tmp_path / "objects") as (node_id, node):
        first, second, again, late = rounds_of(server, node_id, node, [0, 1, 1, 2])
    assert 0.8 * plain < first < 0.87 * plain
    assert second < 0.75 * plain
    assert again < 5_000
    assert late < 0.75 * plain
    assert len(list((tmp_path / "objects").iterdir())) == 1  # what has a successor is not kept
    assert_empty(server)


def test_a_device_that_was_away_or_lost_its_files_gets_the_whole(server, tmp_path):
    folder = tmp_path / "objects"
    with keeping(server, folder) as (node_id, node), joined(server) as [(other, away, _)]:
        rounds_of(server, node_id, node, [0])
        rounds_of(server, other, away, [1])
        assert rounds_of(server, node_id, node, [2])[0] > 0.8 * FOUR_MB  # it has 0, the difference is to 1
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
        assert rounds_of(server, node_id, node, [3])[0] > 0.8 * FOUR_MB  # after a difference to nothing
        shutil.rmtree(folder)
        assert rounds_of(server, node_id, node, [4])[0] > 0.8 * FOUR_MB


def test_a_device_of_an_earlier_version_and_a_plain_run_get_models_as_they_are(server, tmp_path):
    with joined(server) as [(node_id, node, _)], keeping(server, tmp_path / "objects") as (other, newer):
        assert min(rounds_of(server, node_id, node, [0, 1])) > FOUR_MB
        assert rounds_of(server, other, newer, [2], packs_for="")[0] > FOUR_MB


def test_a_device_without_room_gets_whole_models(server, tmp_path):
    with keeping(server, tmp_path / "objects", quota=0) as (node_id, node):
        assert min(rounds_of(server, node_id, node, [0, 1])) > 0.8 * FOUR_MB
    assert not (tmp_path / "objects").exists()


@pytest.mark.parametrize("what", ["bomb", "another", "nothing"])
def test_a_packed_model_that_is_not_right_is_fetched_as_it_is(server, tmp_path, monkeypatch, caplog, what):
    from lepton_fl.wire.downlink import pack
    from lepton_server.flower.forms import Forms

    wrong = {"bomb": pack(bytes(2**22)), "another": pack(weights(5).tobytes()), "nothing": b""}
    monkeypatch.setattr(Forms, "smallest", lambda self, name, held: wrong[what] or b"?")
    with keeping(server, tmp_path / "objects") as (node_id, node):
        assert rounds_of(server, node_id, node, [0])[0] > FOUR_MB
    assert "fetched again" in caplog.text


def test_an_object_that_is_not_what_its_name_says_is_refused(server, tmp_path, monkeypatch):
    from lepton_server.flower import guard

    right = guard.pull_response
    monkeypatch.setattr(guard, "pull_response", lambda content: right(bytes(content)[:-1] + b"?"))
    box = server.link.mailbox()
    with keeping(server, tmp_path / "objects") as (node_id, node):
        box.post(node_id, Records({"model": weights(0)}), message_type="train", ttl_s=60)
        with pytest.raises(UpdateRejected) as error:
            node.pull()
    assert error.value.reason is Rejection.MALFORMED
    assert not (tmp_path / "objects").exists()


def test_frozen_numbers_are_fetched_once(server, tmp_path):
    """The teacher of a distillation, which goes with every round."""
    teacher = model(9, FOUR_MB // 4)
    with keeping(server, tmp_path / "objects") as (node_id, node):
        sent = []
        for number in range(3):
            box = server.link.mailbox(packs_for="r" if number == 2 else "", seams={"model": 5_000})
            array = np.concatenate([model(number, 5_000), teacher])
            message_id = box.post(node_id, Records({"model": array}), message_type="train", ttl_s=60)
            handle, got = node.pull()
            np.testing.assert_array_equal(got.arrays["model"], array)
            node.push(handle, Records({}, {"round": number}))
            assert box.get(timeout_s=10) is not None
            sent.append(box.sent[message_id])
            box.close()
    assert sent[0] > FOUR_MB
    assert max(sent[1:]) < 4 * 5_000 + 5_000


# --- durable before it is acknowledged ------------------------------------------------------------------


class Disk:
    """Keeps replies; ``trouble`` is raised while it lasts."""

    def __init__(self):
        self.kept, self.trouble, self.slow = [], None, threading.Event()
        self.slow.set()

    def __call__(self, contents, num_bytes):
        assert self.slow.wait(30)
        if self.trouble is not None:
            raise self.trouble
        self.kept.append((dict(contents), num_bytes))
        return lambda: dict(contents)


def test_a_reply_is_durable_before_the_device_hears_that_it_has_come(server):
    disk = Disk()
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60, keep=disk)
        handle, _ = node.pull()
        disk.slow.clear()
        done = threading.Event()
        pushing = threading.Thread(
            target=lambda: (node.push(handle, Records({"u": np.arange(9)}, {"x": 1})), done.set())
        )
        pushing.start()
        assert not done.wait(0.5)
        assert box.get(timeout_s=0) is None  # nor has the round got it
        disk.slow.set()
        pushing.join(30)
        assert done.is_set()
        assert len(disk.kept) == 1
        reply = box.get(timeout_s=5)
        assert reply.content.config == {"x": 1}
        assert reply.content.arrays["u"].tolist() == list(range(9))
        assert_empty(server)


def test_durable_replies_leave_memory_and_their_slots_to_others(server):
    disk, count = Disk(), 6  # three times as many as there are slots, and nobody takes one
    with joined(server, count) as members:
        box = server.link.mailbox(max_unread_replies=2)
        for node_id, _, _ in members:
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60, keep=disk)
        for number, (_, node, _) in enumerate(members):
            handle, _ = node.pull()
            node.push(handle, Records({"u": np.full(100_000, number)}, {"x": number}))
        held = sum(len(content or b"") for content in stored(server))
        assert held < 100_000
        found = {box.get(timeout_s=5).content.config["x"] for _ in members}
        assert found == set(range(count))
        assert_empty(server)


def stored(server):
    """The contents of Flower's object store."""
    return [entry.content for entry in server.link._state.object_store.store.values()]


def test_a_reply_that_cannot_be_kept_is_not_acknowledged_and_sent_again(server):
    disk = Disk()
    disk.trouble = DiskFull("no space")
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60, keep=disk)
        handle, _ = node.pull()
        threading.Timer(0.5, lambda: setattr(disk, "trouble", None)).start()
        node.push(handle, Records({}, {"x": 1}))
        assert len(disk.kept) == 1
        assert box.get(timeout_s=5).content.config == {"x": 1}
        assert_empty(server)


def test_a_round_that_takes_no_more_says_that_it_is_late(server):
    disk = Disk()
    disk.trouble = StateConflict("closed")
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60, keep=disk)
        handle, _ = node.pull()
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, {"x": 1}))
        assert refused.value.reason is Rejection.LATE
        box.close()
        assert_empty(server)


# --- failures that are reported -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "seen"),
    [
        (Rejection.DATA_CONTRACT, Rejection.DATA_CONTRACT),
        (Rejection.FAILED, Rejection.FAILED),
        (Rejection.REVOKED, Rejection.FAILED),  # not for a device to say
    ],
)
def test_a_device_reports_why_it_failed(server, reason, seen):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        node.push_error(node.pull()[0], reason, "column 'x'\nis missing" + "!" * 600)
        reply = box.get(timeout_s=5)
        assert (reply.node_id, reply.content.reason) == (node_id, seen)
        assert str(reply.content).startswith("column 'x' is missing!")
        assert len(str(reply.content)) <= 500
        assert_empty(server)


def test_no_answer_in_time_is_reported_and_a_later_one_refused(server):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        message_id = box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=0.05)
        handle, records = node.pull()
        reply = box.get(timeout_s=5)
        assert (reply.message_id, reply.content.reason) == (message_id, Rejection.OFFLINE)
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, records.config))
        assert refused.value.reason is Rejection.LATE
        assert_empty(server)


def test_a_late_answer_is_refused_counted_and_reported(server):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        message_id = box.post(node_id, Records({"model": model(size=10)}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
        box.withdraw([message_id])
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, {"x": 1}))
        assert refused.value.reason is Rejection.LATE
        assert server.link.refused == {Rejection.LATE: 1}
        assert [(r.node_id, r.message_id, r.reason) for r in server.refusals] == [
            (node_id, message_id, Rejection.LATE)
        ]
        assert box.get(timeout_s=0) is None
        assert node.pull() is None
        assert_empty(server)


def test_an_answer_to_a_server_that_has_been_restarted_is_late(serve):
    first = serve()
    with joined(first) as [(node_id, node, key)]:
        first.link.mailbox().post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
    second = serve()
    second.link.admit(der(key))
    with second.node(key) as node:
        node.activate()
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, {"round": 1}))
    assert refused.value.reason is Rejection.LATE


def test_a_repeated_push_counts_once_and_another_answer_is_a_duplicate(server):
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
        reply = node._reply(handle, content=_content({"x": 1}))
        node._push(reply)
        node._push(reply)  # the acknowledgement was lost: before the round has read it
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, {"x": 2}))
        assert refused.value.reason is Rejection.DUPLICATE
        assert box.get(timeout_s=5).content.config == {"x": 1}
        node._push(reply)  # and after
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records({}, {"x": 2}))
        assert refused.value.reason is Rejection.LATE
        assert box.get(timeout_s=0) is None
        assert_empty(server)


def _content(config):
    from lepton_strategies.records import to_record_dict

    return to_record_dict(Records({}, config), salt=b"s" * 16)


# --- who may do what ------------------------------------------------------------------------------------


def register(client, key):
    from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

    head = headers(key)
    pem = base64.b64decode(head["flwr-public-key"])
    body = RegisterNodeFleetRequest(public_key=pem).SerializeToString()
    return client.post("/v1/fleet/register-node", content=body, headers=head).status_code


def test_a_stranger_can_do_nothing(server):
    key = new_key()
    with server.node(key) as node, pytest.raises(TrustError, match="refuses this device's key"):
        node.activate()
    with server.http() as client:
        assert register(client, key) == 404
        for name in ("activate-node", "pull-messages", "push-messages", "push-object", "pull-object"):
            answer = client.post(f"/v1/fleet/{name}", content=b"x" * 1000, headers=headers(key))
            assert (answer.status_code, answer.json()["code"]) == (401, "unknown-key")
            assert client.post(f"/v1/fleet/{name}", content=b"").status_code == 401
    assert server.link._state.nodes == {}


NO_PATHS = [
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/confirm-message-received",
]


def test_only_seven_paths_exist(server):
    with joined(server) as [(_, _, key)], server.http() as client:
        for path in NO_PATHS:
            assert client.get(path, headers=headers(key)).status_code == 404, path
            assert client.post(path, headers=headers(key)).status_code == 404, path
        assert client.get("/v1/fleet/pull-messages", headers=headers(key)).status_code == 404


def test_an_expelled_node_can_do_nothing_and_its_message_fails(server):
    with joined(server) as [(node_id, node, key)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
        assert server.link.expel(der(key))
        assert not server.link.expel(der(key))
        assert box.get(timeout_s=5).content.reason is Rejection.REVOKED
        for attempt in (node.activate, node.pull, lambda: node.push(handle, Records({}, {"x": 1}))):
            with pytest.raises(TrustError):
                attempt()
        with server.http() as client:
            assert register(client, key) == 404
        assert_empty(server)
        again = server.link.admit(der(key))  # enrolled anew with the same key
        assert again != node_id
        assert node.activate() == again


def test_a_forged_sender_is_refused(server):
    with joined(server, 2) as [(_, thief, _), (victim_id, victim, _)]:
        box = server.link.mailbox()
        box.post(victim_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = victim.pull()
        honest = thief._node
        with pytest.raises(UpdateRejected) as refused:  # as itself, for the other's message
            thief.push(handle, Records({}, {"x": 1}))
        assert refused.value.reason is Rejection.NOT_SELECTED
        thief._node = victim._node  # in the other's name
        with pytest.raises(UpdateRejected) as refused:
            thief.push(handle, Records({}, {"x": 1}))
        assert refused.value.reason is Rejection.LATE
        with pytest.raises(TrustError):
            thief.pull()
        thief._node = honest
        assert box.get(timeout_s=0) is None
        victim.push(handle, Records({}, {"x": 2}))
        assert box.get(timeout_s=5).content.config == {"x": 2}


def test_an_upload_of_another_node_cannot_be_fed(server):
    from flwr.proto.message_pb2 import PushObjectRequest

    with joined(server, 2) as [(thief_id, thief, _), (victim_id, victim, _)]:
        box = server.link.mailbox()
        for node_id in (thief_id, victim_id):
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        announce(thief, thief.pull()[0], Records({}, {"x": 1}))
        handle, records = victim.pull()
        reply = victim._reply(handle, content=_content(records.config))
        session = announce(victim, handle, records).session_id
        for node in (thief._node, victim._node):
            request = PushObjectRequest(
                node=node,
                run_id=handle.run_id,
                object_id=reply.object_id,
                object_content=reply.deflate(),
                session_id=session,
            )
            with pytest.raises((ConnectionFailed, UpdateRejected)):
                thief._call(thief._client.PushObject, request)
        victim.push(handle, records)
        assert box.get(timeout_s=5).node_id == victim_id


def test_objects_of_another_nodes_message_cannot_be_fetched(server):
    with joined(server, 2) as [(_, thief, _), (victim_id, _, _)]:
        box = server.link.mailbox()
        message_id = box.post(victim_id, Records({"model": model(size=10)}), message_type="train", ttl_s=60)
        for object_id in list(server.link._state.object_store.store):
            with pytest.raises(UpdateRejected):
                thief._pull_object(server.link.run_id, object_id)
        assert message_id in server.link._state.object_store


def test_a_wrong_clock_on_the_device_is_put_right(server, monkeypatch):
    import lepton_client.flower

    class Slow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) - datetime.timedelta(days=3)

    monkeypatch.setattr(lepton_client.flower, "datetime", Slow)
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, records = node.pull()
        node.push(handle, records)
        assert box.get(timeout_s=5).content.config == {"round": 1}


def test_an_old_signature_is_refused(server):
    with joined(server) as [(_, _, key)], server.http() as client:
        for seconds in (-310, 10):
            stamp = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()
            answer = client.post("/v1/fleet/pull-messages", headers=headers(key, stamp=stamp))
            assert (answer.status_code, answer.json()["code"]) == (401, "clock")


def test_another_ca_is_not_believed(server, tmp_path_factory):
    other = make_certificate(tmp_path_factory.mktemp("other"))
    from lepton_client.flower import FlowerNode

    with FlowerNode(server.address, other, new_key()) as node, pytest.raises(TrustError, match="certificate"):
        node.activate()
    with pytest.raises(TrustError, match="CA certificate"):
        FlowerNode(server.address, b"no certificate", new_key())


def test_a_coordinator_that_is_away_is_a_failed_connection(tmp_path):
    from lepton_client.flower import FlowerNode

    with socket.create_server((HOST, 0)) as free:
        address = f"{HOST}:{free.getsockname()[1]}"
    with FlowerNode(address, make_certificate(tmp_path), new_key()) as node, pytest.raises(ConnectionFailed):
        node.activate()


# --- sizes, times, numbers ------------------------------------------------------------------------------


def test_an_oversized_body_is_refused(serve):
    server = serve(limits={"max_body_bytes": 100_000})
    with joined(server) as [(node_id, node, key)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
        with server.http() as client:
            claimed = client.post("/v1/fleet/pull-messages", content=b"x" * 100_001, headers=headers(key))
            streamed = client.post(
                "/v1/fleet/pull-messages", content=(b"x" * 50_000 for _ in range(3)), headers=headers(key)
            )
        for answer in (claimed, streamed):
            assert (answer.status_code, answer.json()["code"]) == (413, "too-large")
            assert "65536 bytes" in answer.json()["message"]
        with pytest.raises(UpdateRejected, match="100000 bytes") as refused:
            node.push(handle, Records({"update": model(size=50_000)}))
        assert refused.value.reason is Rejection.OUT_OF_RANGE
        node.push_error(handle, Rejection.FAILED, "too large")  # the device can still say so
        assert box.get(timeout_s=5).content.reason is Rejection.FAILED


def test_a_reply_of_too_many_objects_is_refused(serve):
    server = serve(limits={"max_reply_bytes": 100_000})
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox(1)
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        handle, _ = node.pull()
        many = {f"a{i}": model(i, size=5_000) for i in range(10)}  # 20 kB each
        with pytest.raises(UpdateRejected) as refused:
            node.push(handle, Records(many))
        assert refused.value.reason is Rejection.OUT_OF_RANGE
        assert server.link.refused == {Rejection.OUT_OF_RANGE: 1}
        node.push(handle, Records({"a": many["a0"]}))  # the slot is free again
        assert isinstance(box.get(timeout_s=5).content, Records)


def test_a_body_that_dribbles_is_cut_off(serve):
    server = serve(limits={"upload_timeout_s": 0.2})
    with joined(server) as [(_, _, key)]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=server.ca.decode())
        host, port = server.address.split(":")
        with (
            socket.create_connection((host, int(port)), 5) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            head = {"host": host, "content-length": "1000"} | headers(key)
            lines = "".join(f"{k}: {v}\r\n" for k, v in head.items())
            tls.sendall(f"POST /v1/fleet/pull-messages HTTP/1.1\r\n{lines}\r\nabc".encode())
            assert b" 408 " in tls.recv(100)


def announce(node, handle, records):
    """Announce a reply as a device that dies right afterwards; what is missing."""
    from flwr.app import RecordDict
    from flwr.app.message import make_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import get_object_tree

    from lepton_strategies.records import to_record_dict

    reply = node._reply(handle, content=to_record_dict(records))
    bare = make_message(metadata=reply.metadata, content=RecordDict())
    request = PushMessagesRequest(
        node=node._node, messages_list=[message_to_proto(bare)], message_object_trees=[get_object_tree(reply)]
    )
    return node._call(node._client.PushMessages, request)


def test_a_device_that_dies_while_uploading_frees_its_slot(serve):
    server = serve(limits={"upload_timeout_s": 0.3})
    with joined(server, 2) as [(dead_id, dead, key), (live_id, live, _)]:
        box = server.link.mailbox(1)
        for node_id in (dead_id, live_id):
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        response = announce(dead, dead.pull()[0], Records({"update": model(size=1000)}))
        assert len(response.objects_to_push) > 2
        handle, records = live.pull()
        live.push(handle, records)  # waits for the slot
        assert box.get(timeout_s=5).node_id == live_id
        assert box.get(timeout_s=0) is None  # done with that answer: its slot is free
        with server.node(key) as again:  # and the other one comes back to life
            again.activate()
            handle, records = again.pull()
            again.push(handle, records)
        assert box.get(timeout_s=5).node_id == dead_id
        assert_empty(server)


def test_no_slot_in_time_is_busy_and_the_device_tries_again(serve):
    server = serve(limits={"slot_wait_s": 0.05})
    with joined(server, 2) as nodes:
        box = server.link.mailbox(1)
        for node_id, _, _ in nodes:
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        (_, first, _), (second_id, second, _) = nodes
        handle, records = first.pull()
        first.push(handle, records)  # unread: holds the only slot
        handle, records = second.pull()
        second._retry_for_s = 0.1
        with pytest.raises(ConnectionFailed, match="busy"):
            second.push(handle, records)
        assert box.get(timeout_s=5) is not None
        with pytest.raises(ConnectionFailed, match="busy"):  # the round still works on the first answer
            second.push(handle, records)
        assert box.get(timeout_s=0) is None  # now it does not
        second.push(handle, records)
        assert box.get(timeout_s=5).node_id == second_id


def test_a_waiting_device_that_hangs_up_takes_no_slot(server):
    with joined(server, 3) as nodes:
        box = server.link.mailbox(1)
        for node_id, _, _ in nodes:
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        pulled = [node.pull() for _, node, _ in nodes]
        nodes[0][1].push(*pulled[0])
        impatient = nodes[1][1]
        impatient._client._client.timeout = 0.2
        with pytest.raises(ConnectionFailed):
            announce(impatient, pulled[1][0], Records({"update": model(size=1000)}))
        assert box.get(timeout_s=5).node_id == nodes[0][0]
        assert box.get(timeout_s=0) is None  # done with that answer: its slot is free
        nodes[2][1].push(*pulled[2])
        assert box.get(timeout_s=5).node_id == nodes[2][0]


def test_unread_replies_are_bounded_whatever_the_cohort(serve):
    server = serve(max_unread_replies=2)
    peak = 0
    with joined(server, 8) as nodes:
        box = server.link.mailbox()
        records = Records({"model": model(size=100_000)}, {"round": 1})
        for node_id, _, _ in nodes:
            box.post(node_id, records, message_type="train", ttl_s=60)
        threads = [
            threading.Thread(target=work_distinct, args=(node, i)) for i, (_, node, _) in enumerate(nodes)
        ]
        for thread in threads:
            thread.start()
        store = server.link._state.object_store
        for _ in nodes:
            for _ in range(10):  # a slow round
                time.sleep(0.005)
                with store.lock_store:
                    peak = max(peak, sum(len(entry.content) for entry in store.store.values()))
            assert isinstance(box.get(timeout_s=10).content, Records)
        for thread in threads:
            thread.join()
    assert peak < (1 + 2) * 400_000 + 50_000  # the model and two replies
    assert_empty(server)


def work_distinct(node, seed):
    handle, _ = node.pull()
    node.push(handle, Records({"update": model(seed, size=100_000)}))


# --- content that is not what it should be --------------------------------------------------------------


def push_raw(node, handle, content):
    node._push(node._reply(handle, content=content))


def test_a_reply_that_does_not_decode_is_malformed_and_harms_nobody(server):
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    contents = [
        RecordDict({"unknown": ConfigRecord({"a": 1})}),
        RecordDict({"arrays": ArrayRecord({"a": Array("float32", (4,), "numpy.ndarray", b"no array")})}),
        RecordDict({"arrays": ArrayRecord({"a": Array("float32", (4,), "torch.pickle", b"abc")})}),
    ]
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        for content in contents:
            box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
            push_raw(node, node.pull()[0], content)
            reply = box.get(timeout_s=5)
            assert (reply.node_id, reply.content.reason) == (node_id, Rejection.MALFORMED)
        assert_empty(server)


def test_a_chunk_that_is_repeated_without_end_does_not_unpack(serve):
    """An array of 64 kB on the wire that claims to unpack to hundreds of megabytes."""
    from flwr.app import Array, ArrayRecord, RecordDict

    class Bomb(Array):
        __qualname__ = "Array"

        def slice_array(self):
            return super().slice_array() * 20_000

        @property
        def children(self):
            return dict(Array.slice_array(self))

    server = serve(limits={"max_reply_bytes": 10_000_000})
    with joined(server) as [(node_id, node, _)]:
        box = server.link.mailbox()
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=60)
        record = ArrayRecord()
        record["a"] = Bomb("float32", (4,), "numpy.ndarray", b"x" * 40_000)
        push_raw(node, node.pull()[0], RecordDict({"arrays": record}))
        assert box.get(timeout_s=5).content.reason is Rejection.MALFORMED


def test_whatever_a_node_sends_is_answered_in_our_words(serve, caplog):
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
    from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
    from flwr.proto.node_pb2 import Node

    server, rng = serve(limits={"calls_per_s": 1e5, "call_burst": 10**6}), random.Random(0)
    with joined(server) as [(node_id, node, key)], server.http() as client, caplog.at_level(logging.ERROR):
        box, sender = server.link.mailbox(1), Node(node_id=node_id)
        box.post(node_id, Records({}, {"round": 1}), message_type="train", ttl_s=600)
        work = node.pull()
        run, name = server.link._state.run_id, "ab" * 32
        tree = ObjectTree(object_id=name, children=[ObjectTree(object_id="cd" * 32)])
        announced = PushMessagesRequest(node=sender, message_object_trees=[tree])
        announced.messages_list.add().metadata.src_node_id = node_id
        good = {
            "pull-messages": PullMessagesRequest(node=sender),
            "push-messages": announced,
            "pull-object": PullObjectRequest(node=sender, run_id=run, object_id=name),
            "push-object": PushObjectRequest(
                node=sender, run_id=run, object_id=name, object_content=b"x" * 50
            ),
            "send-node-heartbeat": PullMessagesRequest(node=sender),
            "activate-node": PullMessagesRequest(),
        }
        statuses = set()
        for _ in range(FUZZ_INPUTS):
            path = rng.choice(list(good))
            data = bytearray(good[path].SerializeToString())
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.choice((0, 1, 4))] = rng.choice(
                    (b"", b"\xff", rng.randbytes(3), b"\x12\xff\x7f")
                )
            told = headers(key)
            if rng.random() < 0.1:
                told[rng.choice(list(told))] = rng.choice(("", "x" * 500, "AAAA", "2026-01-01"))
            answer = client.post(f"/v1/fleet/{path}", content=bytes(data), headers=told)
            statuses.add(answer.status_code)
            assert b"Traceback" not in answer.content
        assert not {status for status in statuses if status >= 500}, statuses
        assert {400, 401} <= statuses
        handle, records = work
        node.push(handle, records)  # all is well
        assert box.get(timeout_s=10) is not None


def test_a_node_that_calls_too_often_is_told_when_to_come_again(serve):
    server = serve(limits={"calls_per_s": 2, "call_burst": 4})
    with joined(server, 2) as [(_, node, key), (_, other, _)], server.http() as client:
        answers = [client.post("/v1/fleet/pull-object", content=b"", headers=headers(key)) for _ in range(8)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert 1 <= len(refused) <= 5
        assert {a.json()["code"] for a in refused} == {"too-often"}
        assert {a.headers["retry-after"] for a in refused} == {"1"}
        assert other.pull() is None  # for itself each
        node._retry_for_s = 10
        assert node._retry(node.pull) is None  # comes again when it was told to


@pytest.mark.parametrize("body", [b"", b"\xff" * 100, b"\x0a\x02\x08\x01"])
def test_garbage_is_refused_without_a_trace(server, body, caplog):
    with joined(server) as [(_, _, key)], server.http() as client, caplog.at_level(logging.CRITICAL, "flwr"):
        for name in ("push-messages", "pull-object", "push-object", "pull-messages", "activate-node"):
            answer = client.post(f"/v1/fleet/{name}", content=body, headers=headers(key))
            assert 400 <= answer.status_code < 500, name
    assert_empty(server)


def test_arguments_are_checked(server):
    from lepton_fl.errors import StateError
    from lepton_server.flower import Limits

    with pytest.raises(TrustError, match="DER"):
        server.link.admit(b"no key")
    with pytest.raises(ValueError, match="ttl_s=0"):
        server.link.mailbox().post(1, Records(), message_type="train", ttl_s=0)
    with pytest.raises(StateError, match="node 12345"):
        server.link.mailbox().post(12345, Records({}, {"a": 1}), message_type="train", ttl_s=1)
    with pytest.raises(ValueError, match="max_pulls=0"):
        Limits(max_pulls=0)
    with pytest.raises(ValueError, match="slots=-1"):
        server.link.mailbox(-1)
