"""Predictions on the device: the library, the endpoint, the self-test, and releases that change."""

import asyncio
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load, save

from lepton_client.config import ClientConfig
from lepton_client.courier import _retreat_if_needed, self_test
from lepton_client.predictor import BATCH, Predictor
from lepton_client.serve import STARTS, Probation, serve
from lepton_client.state import GIVEN_UP, given_up
from lepton_fl.delivery.deliver import SelfTestCrashed
from lepton_fl.delivery.manifest import describe
from lepton_fl.delivery.slots import Record, Slots
from lepton_fl.errors import (
    ConfigError,
    ConnectionFailed,
    DataError,
    Fault,
    LeptonError,
    NotFound,
    ReleaseRefused,
    StateLocked,
)

pytestmark = pytest.mark.network


class Place:
    """A device's state folder with releases in it, as a delivery leaves them."""

    def __init__(self, folder, make_variant):
        self.folder, self.make_variant = folder, make_variant
        self.slots = Slots(folder / "delivery")
        self.slots.open()
        self.count = 0
        self.weights = {}

    def install(self, *, switch=True, **changes):
        self.count += 1
        variant = self.make_variant(self.folder / f"v{self.count}", **({"seed": self.count} | changes))
        manifest, _ = describe(variant, sequence=self.count)
        shutil.copytree(variant, self.slots.staging(manifest.name))
        self.slots.adopt(manifest)
        rng = np.random.default_rng(changes.get("seed", self.count))
        self.weights[manifest.name] = rng.normal(0, 0.3, (64, 10)).astype(np.float32)
        if switch:
            self.switch(manifest.name)
        return manifest.name

    def switch(self, name):
        self.slots.save(Record(current=name, previous=self.slots.record().current))

    def right(self, name, rows, outputs):
        return np.allclose(rows @ self.weights[name], outputs, atol=1e-4)


@pytest.fixture
def place(tmp_path, make_variant):
    return Place(tmp_path, make_variant)


ROWS = np.random.default_rng(3).random((5, 64), np.float32)

# --- the library --------------------------------------------------------------------------------------


def test_it_predicts_what_the_model_computes(place):
    name = place.install()
    with Predictor(place.folder, follow=False) as predictor:
        assert place.right(name, ROWS, predictor.predict(ROWS))
        assert place.right(name, ROWS[0], predictor.predict_one(ROWS[0]))
        for count in (BATCH - 1, BATCH, BATCH + 1, 3 * BATCH):  # computed in parts
            many = np.random.default_rng(count).random((count, 64), np.float32)
            assert place.right(name, many, predictor.predict(many))
        assert predictor.release == name
        assert predictor.card.name == "int8"


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.astype(np.float64),
        ROWS[:, :63],
        ROWS[0],
        ROWS[:0],
        np.full((1, 64), np.nan, np.float32),
        np.full((1, 64), np.inf, np.float32),
        np.zeros((1, 64), np.int64),
    ],
)
def test_rows_that_do_not_fit_are_refused(place, rows):
    place.install()
    predictor = Predictor(place.folder, follow=False)
    with pytest.raises(DataError):
        predictor.predict(rows)
    assert predictor.predict(ROWS).shape == (5, 10)


def test_without_a_release_it_says_what_to_do(tmp_path):
    with pytest.raises(NotFound, match="No release is in service"):
        Predictor(tmp_path)


def test_altered_files_are_never_opened(place):
    name = place.install()
    path = place.slots.path(name) / "model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ReleaseRefused, match="not the file that was installed"):
        Predictor(place.folder)


def test_it_follows_the_device_and_keeps_the_old_one_if_the_new_one_does_not_load(place):
    first = place.install()
    with Predictor(place.folder, follow=False) as predictor:
        assert not predictor.refresh()
        second = place.install()
        assert predictor.refresh()
        assert predictor.release == second
        assert place.right(second, ROWS, predictor.predict(ROWS))
        bad = place.install(damage="model")
        with pytest.raises(ReleaseRefused):
            predictor.refresh()
        assert not predictor.refresh()  # not again and again
        assert predictor.release == second
        place.switch(first)
        assert predictor.refresh()
    assert bad not in (first, second)


def test_a_device_that_only_serves_needs_neither_torch_nor_flower(place):
    name = place.install()
    absent = "torch flwr sklearn scipy pyarrow pandas onnx opacus PIL threadpoolctl sqlmodel dp_accounting"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent.split()}))  # importing one of them fails
import lepton_client.serve
from lepton_client.predictor import Predictor
import numpy
with Predictor({str(place.folder)!r}, follow=False) as predictor:
    predictor.predict(numpy.zeros((1, 64), numpy.float32))
    assert predictor.release == {name!r}
assert not {{"cryptography", "tuf", "grpc"}} & set(sys.modules)  # nor what only the agent uses
import lepton_client.agent, lepton_client.enrol
import lepton_fl.delivery.deliver, lepton_fl.delivery.trust, tuf.ngclient
from lepton_client.courier import self_test
from lepton_fl.delivery.slots import Slots
self_test(Slots(predictor._slots.folder).path({name!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- the self-test ------------------------------------------------------------------------------------


def test_the_self_test_tells_good_from_bad(place):
    self_test(place.slots.path(place.install()))
    for damage in ("parity", "model"):
        with pytest.raises(ReleaseRefused) as caught:
            self_test(place.slots.path(place.install(damage=damage)))
        assert caught.value.fault is Fault.SELF_TEST
    with pytest.raises(SelfTestCrashed):
        self_test(place.slots.folder / "nothing here")


# --- the endpoint -------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


@pytest.fixture
def serving(place):
    """Starts endpoints in threads; ``serving(port=0, …)`` gives a function that makes connections."""
    stop, threads, errors, made = threading.Event(), [], [], []

    def start(**section):
        config = ClientConfig.model_validate({"client": {"state_dir": place.folder}, "serve": section})
        ready, where = threading.Event(), []

        def body():
            try:
                serve(config, stop, lambda address: (where.append(address), ready.set()))
            except LeptonError as error:
                errors.append(error)
                ready.set()

        threads.append(threading.Thread(target=body))
        threads[-1].start()
        assert ready.wait(60)
        if errors:
            raise errors.pop()

        def connect():
            kind = UnixConnection if where[0].startswith("unix:") else http.client.HTTPConnection
            made.append(kind(where[0].removeprefix("unix:").removeprefix("http://"), timeout=60))
            return made[-1]

        return connect

    yield start
    for connection in made:
        connection.close()
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def ask(connection, body=None, path="/v1/predict", method="POST", kind="application/json", **headers):
    data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
    connection.request(method, path, data, {"content-type": kind} | headers)
    answer = connection.getresponse()
    raw = answer.read()
    is_json = answer.getheader("content-type") == "application/json"
    return answer.status, json.loads(raw) if is_json else raw


@pytest.mark.parametrize("section", [{}, {"port": 0}])
def test_the_endpoint_answers_singly_in_batches_and_with_tensors(place, serving, section):
    name = place.install()
    connection = serving(**section)()
    status, answer = ask(connection, {"row": ROWS[0].tolist()})
    assert (status, answer["release"]) == (200, name)
    assert place.right(name, ROWS[0], answer["output"])
    status, answer = ask(connection, {"rows": ROWS.tolist()})
    assert place.right(name, ROWS, answer["outputs"])
    status, raw = ask(connection, save({"input": ROWS}), kind="application/vnd.safetensors")
    assert place.right(name, ROWS, load(raw)["output"])
    status, answer = ask(connection, path="/v1/model", method="GET")
    assert (answer["release"], answer["input"]["shape"]) == (name, [None, 64])
    assert ask(connection, path="/healthz", method="GET") == (200, b"ok\n")
    if not section:
        assert (place.folder / "serve.sock").stat().st_mode & 0o777 == 0o600


def test_wrong_requests_are_named_and_the_endpoint_goes_on(place, serving):
    place.install()
    connect = serving(port=0, max_body_bytes=20_000, max_batch=3)
    row = ROWS[0].tolist()
    cases = [
        (404, {"path": "/v2"}),
        (405, {"method": "GET"}),
        (415, {"body": "x", "kind": "text/plain"}),
        (415, {"body": "row=1", "kind": "application/x-www-form-urlencoded"}),
        (403, {"body": {"row": row}, "host": "evil.example"}),
        (413, {"body": b"x" * 20_001}),
        (400, {"body": "{"}),
        (400, {"body": "[" * 10_000}),
        (400, {"body": {"row": row, "rows": [row]}}),
        (400, {"body": {"row": row[:-1]}}),
        (400, {"body": {"row": [*row[:-1], "x"]}}),
        (400, {"body": {"row": [*row[:-1], None]}}),
        (400, {"body": {"row": [*row[:-1], 1e300]}}),
        (400, {"body": '{"row": [NaN]}'}),
        (400, {"body": {"rows": [row, row[:3]]}}),
        (400, {"body": {"rows": []}}),
        (400, {"body": {"rows": [row] * 4}}),
        (400, {"body": b"nonsense", "kind": "application/vnd.safetensors"}),
        (400, {"body": save({"other": ROWS}), "kind": "application/vnd.safetensors"}),
        (400, {"body": save({"input": ROWS[:, :3]}), "kind": "application/vnd.safetensors"}),
    ]
    for expected, request in cases:
        status, answer = ask(connect(), **request)
        assert status == expected, (request, answer)
        assert set(answer) == {"error", "message", "hint"}
        assert "Traceback" not in answer["message"]
    assert ask(connect(), {"row": row})[0] == 200


def test_a_caller_too_many_is_told_to_come_again(place, serving):
    place.install()
    connect = serving(port=0, max_concurrent=1)
    slow = socket.create_connection((connect().host, connect().port), timeout=30)
    slow.sendall(
        b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 10\r\n\r\n{"
    )
    ends = time.monotonic() + 30
    while (status := ask(connect(), {"row": ROWS[0].tolist()})[0]) != 503:
        assert time.monotonic() < ends, status
    slow.close()
    while (status := ask(connect(), {"row": ROWS[0].tolist()})[0]) != 200:
        assert time.monotonic() < ends, status


def test_no_request_fails_while_releases_change(place, serving):
    """Callers hammer the endpoint; six times another release comes into service."""
    names = [place.install()]
    connect, stop, seen = serving(), threading.Event(), set()

    def hammer(number):
        connection, answered, bad = connect(), 0, []
        rows = np.random.default_rng(number).random((3, 64), np.float32)
        while not stop.is_set():
            status, answer = ask(connection, {"rows": rows.tolist()})
            if status != 200 or not place.right(answer["release"], rows, answer["outputs"]):
                bad.append((status, answer))
            seen.add(answer.get("release"))
            answered += 1
        return answered, bad

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(hammer, number) for number in range(4)]
        try:
            for _ in range(6):
                names.append(place.install())
                ends = time.monotonic() + 60
                while names[-1] not in seen:
                    assert time.monotonic() < ends, "the new release answers"
                    time.sleep(0.02)
        finally:
            stop.set()
        results = [caller.result() for caller in callers]
    assert [bad for _, bad in results] == [[]] * 4
    assert all(answered > 0 for answered, _ in results)
    assert seen == set(names)


def test_two_endpoints_do_not_share_a_socket_and_a_stale_one_is_replaced(place, serving, tmp_path):
    place.install()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(place.folder / "serve.sock"))
    stale.close()
    connect = serving()
    assert ask(connect(), {"row": ROWS[0].tolist()})[0] == 200
    with pytest.raises(StateLocked, match="Another process"):
        serving()
    with pytest.raises(ConfigError, match="107"):
        serving(socket=str(tmp_path / ("x" * 120)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="no socket"):
        serving(socket=str(tmp_path / "file"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConnectionFailed):
            serving(port=taken.getsockname()[1])
    assert (tmp_path / "file").read_text() == "mine"


# --- a release that ends the serving process ---------------------------------------------------------


def test_a_release_that_ends_the_process_twice_gives_way_to_the_one_before(place):
    first, bad = place.install(), place.install()
    folder = place.slots.folder
    for _ in range(STARTS):
        probation = Probation(folder)  # each start is a new process
        assert probation.chosen(place.slots) == bad
        probation.loading(bad)
    probation = Probation(folder)
    assert probation.chosen(place.slots) == first
    with Predictor(place.folder, follow=False, loading=probation.loading, first=first) as predictor:
        assert not predictor.refresh()
        assert predictor.release == first
    assert given_up(folder)["release"] == bad
    _retreat_if_needed(place.slots, "")
    record = place.slots.record()
    assert (record.current, record.failures[0].fault) == (first, Fault.CRASHED)
    assert "ended the serving process 2 times" in record.failures[0].detail
    assert not given_up(folder)
    place.switch(bad)  # asked for again: it has two starts again
    for _ in range(STARTS):
        probation = Probation(folder)
        assert probation.chosen(place.slots) == bad
        probation.loading(bad)
    assert Probation(folder).chosen(place.slots) == first
    _retreat_if_needed(place.slots, "")
    third = place.install()
    assert Probation(folder).chosen(place.slots) == third


def test_a_release_that_the_endpoint_cannot_load_is_told_and_taken_out_of_service(place, serving):
    """The self-test loads it, too; here its file is damaged after that."""
    first = place.install()
    connect = serving()
    bad = place.install(switch=False)
    (place.slots.path(bad) / "model.onnx").write_bytes(b"damaged")
    place.switch(bad)
    ends = time.monotonic() + 300
    while not given_up(place.slots.folder):
        assert time.monotonic() < ends, "it is noticed"
        time.sleep(0.02)
    assert given_up(place.slots.folder) | {"detail": ""} == {
        "release": bad,
        "fault": "tampered",
        "detail": "",
    }
    assert ask(connect(), {"row": ROWS[0].tolist()})[1]["release"] == first
    _retreat_if_needed(place.slots, "")
    record = place.slots.record()
    assert (record.current, record.failures[0].fault) == (first, Fault.TAMPERED)


def test_a_release_that_comes_back_is_tried_again(place):
    first = place.install()
    told = []
    with Predictor(place.folder, follow=False, refused=lambda name, error: told.append(name)) as predictor:
        bad = place.install(switch=False)
        model = place.slots.path(bad) / "model.onnx"
        good = model.read_bytes()
        model.write_bytes(b"damaged")
        place.switch(bad)
        with pytest.raises(ReleaseRefused):
            predictor.refresh()
        assert not predictor.refresh()  # it is not read again and again
        place.switch(first)
        assert not predictor.refresh()
        model.write_bytes(good)
        place.switch(bad)
        assert predictor.refresh()
        assert (predictor.release, told) == (bad, [bad])


def test_an_endpoint_that_starts_with_a_release_that_does_not_load_serves_the_one_before(place, serving):
    first, bad = place.install(), place.install(damage="model")
    connect = serving()
    assert ask(connect(), {"row": ROWS[0].tolist()})[1]["release"] == first
    assert given_up(place.slots.folder)["fault"] == "self-test"
    assert given_up(place.slots.folder)["release"] == bad


def test_the_only_release_is_reported_too_when_it_cannot_be_served(place, serving):
    """There is nothing to go back to: it stays, and is not loaded again and again."""
    bad = place.install(damage="model")
    for _ in range(2):
        with pytest.raises(ReleaseRefused):
            serving()
        _retreat_if_needed(place.slots, "")
    record = place.slots.record()
    assert (record.current, record.failures[0].manifest, record.failures[0].fault) == (bad, bad, "self-test")
    assert (place.slots.folder / GIVEN_UP).exists()


def test_an_orderly_end_is_no_crash(place):
    name = place.install()
    for _ in range(3 * STARTS):
        probation = Probation(place.slots.folder)
        assert probation.chosen(place.slots) == name
        probation.loading(name)
        probation.settled()


def test_the_only_release_is_not_loaded_for_ever(place):
    name = place.install()
    for _ in range(STARTS):
        Probation(place.slots.folder).loading(name)
    with pytest.raises(ReleaseRefused) as caught:
        Probation(place.slots.folder).chosen(place.slots)
    assert caught.value.fault is Fault.CRASHED


def test_a_request_that_a_shutdown_cuts_off_is_answered_and_leaves_no_traceback(place, caplog):
    from lepton_client.config import ServeSection
    from lepton_client.serve import Endpoint

    place.install()
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.Event().wait()

    async def cut_off():
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "server": None}
        scope["headers"] = [(b"content-type", b"application/json")]
        task = asyncio.ensure_future(endpoint(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with Predictor(place.folder, follow=False) as predictor:
        endpoint = Endpoint(predictor, ServeSection())
        asyncio.run(cut_off())
        endpoint.close()
    assert sent[0]["status"] == 503
    assert b"being stopped" in sent[1]["body"]
    assert "Traceback" not in caplog.text
