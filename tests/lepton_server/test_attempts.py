"""What open attempts have heard outlives the coordinator, on both engines, and goes when they are closed."""

import hashlib
import shutil
import threading

import numpy as np
import pytest
from sqlalchemy import delete, insert, text, update

from lepton_fl.errors import (
    DiskFull,
    NotFound,
    Rejection,
    StateConflict,
    StateCorrupt,
    StateError,
    UpdateRejected,
)
from lepton_fl.files import BlobStore
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_server.attempts import INLINE, Attempts, Vectors, adopt
from lepton_server.exchange import FleetExchange
from lepton_server.patience import Interrupted
from lepton_server.store import Attempt, open_store
from lepton_server.store.attempts import following
from lepton_server.store.tables import ATTEMPT_RECORD

SIZE = 4
HERE = Attempt("r1", 1, 1)
RECORDS = [b"small", b"", b"large" * INLINE, bytes(range(256)), b"last"]


def objects(*contents):
    return {hashlib.sha256(c).hexdigest(): c for c in contents}


@pytest.fixture
def planned(works):
    """A run whose first attempt is open; its plan."""
    works.queue()
    works.store.record("run.started", {"run_id": "r1"})
    spec = RunSpec(task="pkg:task", cohort={"size": 3, "deadline_s": 20.0})
    work = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
    state = RunState(np.zeros(SIZE, np.float32)).on(attempt=1)
    plan = plan_round(spec, "r1", work, "train", 1, state, works.ids, 3, "ab" * 16)
    body = {
        "run_id": "r1",
        "round": 1,
        "attempt": 1,
        "plan": plan.to_json(),
        "model_sha256": plan.model_sha256,
    }
    works.store.record("round.planned", body)
    return plan


@pytest.fixture
def inbox(works):
    """The attempts, as a coordinator finds them that starts."""
    return lambda: Attempts(works.store, BlobStore(works.folder / "attempts"))


def files(works):
    return [path for path in (works.folder / "attempts").rglob("*") if path.is_file()]


def test_what_is_kept_is_there_after_a_restart_and_the_first_one_moves_the_attempt(works, planned, inbox):
    one, first = works.ids[:2], objects(b"a" * 1000, b"", b"root")
    inbox().keep(planned, one[0], first, 1004)
    assert works.store.phase("r1", 1, 1) == "collecting"
    inbox().keep(planned, one[1], objects(b"b"), 1)
    again = {kept.device_id: kept for kept in inbox().of(planned)}
    assert inbox().one(planned, one[1]).read() == again[one[1]].read()
    with pytest.raises(NotFound):
        inbox().one(planned, works.ids[2])
    assert list(again) == sorted(one)
    assert {name: bytes(content) for name, content in again[one[0]].read().items()} == first
    assert again[one[0]].num_bytes == 1004
    assert len(files(works)) == 2
    kinds = [e.kind for e in works.store.events(subject="r1")]
    assert kinds.count("round.moved") == 1
    works.unharmed()


def test_one_device_has_one_update_and_a_closed_attempt_takes_none(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a"), 1)
    with pytest.raises(StateConflict, match="already"):
        box.keep(planned, works.ids[0], objects(b"b"), 1)
    with works.store.transaction() as change:
        assert change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[:1])
    with pytest.raises(StateConflict, match="takes no updates"):
        box.keep(planned, works.ids[1], objects(b"c"), 1)
    assert len(files(works)) == 1  # what was refused is not left


def test_once_it_is_fixed_who_counts_nobody_else_is_found(works, planned, inbox):
    box = inbox()
    for device in works.ids:
        box.keep(planned, device, objects(device.encode()), 1)
    assert not box.is_closed(planned)
    with works.store.transaction() as change:
        change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[1:])
    assert box.is_closed(planned)
    assert [kept.device_id for kept in box.of(planned)] == sorted(works.ids[1:])


def test_phases_only_go_on(works, planned):
    def move(phase):
        with works.store.transaction() as change:
            return change.move("r1", 1, 1, phase)

    assert move("collecting")
    assert not move("offered")
    assert not move("collecting")
    assert move("aggregated")
    with pytest.raises(StateConflict, match="cannot be offered"):
        works.store.record("round.moved", {"run_id": "r1", "round": 1, "attempt": 1, "phase": "offered"})
    with pytest.raises(StateConflict, match="cannot be released"):
        works.store.record("round.moved", {"run_id": "r1", "round": 1, "attempt": 1, "phase": "released"})
    with pytest.raises(StateConflict, match="unplanned"):
        works.store.record("round.moved", {"run_id": "r1", "round": 2, "attempt": 1, "phase": "offered"})


def test_what_was_never_acknowledged_and_what_is_over_are_erased(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a"), 1)
    box.blobs.put(b"an update whose row a crash has prevented")
    (works.folder / "attempts" / "tmp" / "half").write_bytes(b"an update that a crash has cut off")
    assert len(files(works)) == 3
    box = inbox()
    assert len(files(works)) == 1
    box.forget("r1", 1)
    assert files(works) == []
    assert works.store.received("r1", 1, 1) == []


def test_a_damaged_or_missing_file_is_noticed(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a" * 100), 1)
    assert box.is_whole(planned)
    (path,) = files(works)
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        assert not box.is_whole(planned)
    path.unlink()
    assert not box.is_whole(planned)


def test_a_full_disk_keeps_nothing_and_says_so(works, planned, inbox, small_files):
    box = inbox()
    with small_files(2000), pytest.raises(DiskFull):
        box.keep(planned, works.ids[0], objects(bytes(5000)), 1)
    assert works.store.received("r1", 1, 1) == []
    assert files(works) == []
    box.keep(planned, works.ids[0], objects(bytes(5000)), 1)


# --- an attempt that a restart has cut off ----------------------------------------------------------


def exchange_of(works, inbox, **settings):
    return FleetExchange(
        works.link,
        works.fleet,
        lambda device_id: works.store.device(device_id).public_key,
        stay_s=1.0,
        closing=settings.pop("closing", lambda: False),
        attempts=inbox,
        **settings,
    )


def reply_objects(works, number):
    """A device's reply as Flower's objects, the root last."""
    from flwr.app import Message, RecordDict
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )

    from lepton_strategies.records import to_record_dict

    metadata = Metadata(1, "", 1, 1, "m", "g", 0.0, 1.0, "train")
    metadata.delivered_at = ""
    message = make_message(metadata=metadata, content=to_record_dict(Records({}, {"x": number})))
    assert isinstance(message, Message)
    assert isinstance(message.content, RecordDict)
    made = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return {node.object_id: made[node.object_id] for node in iterate_object_tree(get_object_tree(message))}


def test_a_restarted_round_has_what_had_come_and_asks_the_others_only(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    for number, device in enumerate(works.ids[:2]):
        box.keep(planned, device, reply_objects(works, number), 10)
    told, phases = [], []
    real = works.fleet.instruct
    works.fleet.instruct = lambda device, what: told.append((device, what)) or real(device, what)
    exchange = exchange_of(works, inbox(), unfinished=planned, moved=lambda plan, phase: phases.append(phase))
    answers = exchange.ask(planned, request)
    found = {a.device_id: a.records.config["x"] for a in (next(answers), next(answers))}
    assert found == {works.ids[0]: 0, works.ids[1]: 1}
    assert not told  # and nobody was asked for that

    def wait():
        with pytest.raises(Interrupted):
            list(answers)

    worker = threading.Thread(target=wait)
    worker.start()
    works.until(lambda: works.link._posts)
    assert [device for device, _ in told] == [works.ids[2]]
    assert told[0][1].participate.resumed
    assert phases == ["offered"]
    exchange._closing = lambda: True
    worker.join(30)
    assert not worker.is_alive()
    assert [what.WhichOneof("kind") for _, what in told] == ["participate"]  # at a shutdown they go on


def test_nobody_is_asked_once_it_is_fixed_who_counts(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    for number, device in enumerate(works.ids[:2]):
        box.keep(planned, device, reply_objects(works, number), 10)
    with works.store.transaction() as change:
        change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[:1])
    answers = list(exchange_of(works, inbox(), unfinished=planned).ask(planned, request))
    assert [a.device_id for a in answers] == works.ids[:1]
    assert not works.link._posts


def test_a_lost_file_costs_one_device_its_answer(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    box.keep(planned, works.ids[0], reply_objects(works, 7), 10)
    files(works)[0].write_bytes(b"?")
    answers = exchange_of(works, box, unfinished=planned).ask(planned, request)
    lost = next(answers)
    answers.close()
    assert isinstance(lost.records, UpdateRejected)
    assert lost.records.reason is Rejection.OFFLINE


def test_what_counts_is_read_again_for_whom_it_is_wanted(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], reply_objects(works, 7), 10)
    exchange = exchange_of(works, inbox())
    with works.store.transaction() as change:
        change.move("r1", 1, 1, "aggregated")  # it does not count, and is there
    assert exchange.kept(planned, works.ids[0]).config["x"] == 7
    with pytest.raises(NotFound):
        exchange.kept(planned, works.ids[1])


# --- the records of secure rounds -------------------------------------------------------------------


@pytest.fixture
def store(database):
    with open_store(database) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "attempts"


@pytest.fixture
def attempts(store, folder):
    """As a coordinator finds them that starts, in a store with one open attempt."""
    start_run(store)
    return lambda: Attempts(store, BlobStore(folder))


def records_of(folder):
    return {p.parent.name + p.name for p in folder.glob("??/*")}


def filled(attempts):
    log = attempts().log(HERE)
    for number, record in enumerate(RECORDS):
        log.append(record, durable=number == 3)
    return log


def start_run(store, run="r1"):
    """A run with an open attempt."""
    store.record("run.queued", {"run_id": run, "name": run, "spec": {}})
    store.record("run.started", {"run_id": run})
    model = {"run_id": run, "round": 0, "model_sha256": "a" * 64, "metrics": {}}
    store.record("model.created", model)
    plan = {"run_id": run, "round": 1, "attempt": 1, "plan": {}, "model_sha256": "a" * 64}
    store.record("round.planned", plan)


def test_what_was_appended_is_found_in_order(attempts):
    filled(attempts)
    assert list(attempts().log(HERE).found) == RECORDS
    assert attempts().log(Attempt("r1", 1, 2)).found == ()
    assert attempts().log(Attempt("r2", 1, 1)).found == ()


def test_another_host_with_the_store_and_the_folder_goes_on(attempts, folder, tmp_path, database):
    log = filled(attempts)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    with open_store(database) as other:
        there = Attempts(other, BlobStore(moved)).log(HERE)
        assert list(there.found) == RECORDS
        there.append(b"and on", durable=True)
    with pytest.raises(StateError):  # the first one is not dead after all: it is stopped
        log.append(b"a second decision", durable=True)


def test_a_record_that_could_not_be_written_can_be_written_again(attempts, store, monkeypatch):
    log = filled(attempts)
    with monkeypatch.context() as patch:
        patch.setattr(store, "keep", lambda *args, **more: (_ for _ in ()).throw(StateError("no")))
        with pytest.raises(StateError):
            log.append(b"six", durable=True)
    log.append(b"six", durable=True)
    assert list(attempts().log(HERE).found) == [*RECORDS, b"six"]


@pytest.mark.parametrize(
    "change",
    [{"body": b"smell"}, {"blob": "0" * 64}, {"hash": "0" * 64}, {"number": 9}],
    ids=lambda change: next(iter(change)),
)
def test_damage_is_noticed(attempts, store, change):
    filled(attempts)
    with store._engine.begin() as connection:
        connection.execute(update(ATTEMPT_RECORD).where(ATTEMPT_RECORD.c.number == 1).values(**change))
    with pytest.raises(StateCorrupt, match="Record 1 of run r1, round 1, attempt 1"):
        store.kept(HERE)


def test_a_record_out_of_the_middle_is_missed_and_a_file_too(attempts, store, folder):
    filled(attempts)
    large = store.kept(HERE)[2].blob
    path = folder / large[:2] / large[2:]
    path.write_bytes(b"x")
    with pytest.raises(StateCorrupt):
        attempts().log(HERE)
    path.unlink()
    with pytest.raises(StateCorrupt, match="record 3"):
        attempts().log(HERE)
    with store._engine.begin() as connection:
        connection.execute(delete(ATTEMPT_RECORD).where(ATTEMPT_RECORD.c.number == 3))
    with pytest.raises(StateCorrupt, match="Record 3"):
        store.kept(HERE)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("round.committed", {"round": 1, "attempt": 1, "model_sha256": "b" * 64}),
        ("round.abandoned", {"round": 1, "attempt": 1, "cause": "too few"}),
        ("run.finished", {"verdict": "failed", "reason": "", "model_sha256": None, "rounds": 0}),
    ],
)
@pytest.mark.parametrize("crashed", [False, True])
def test_a_closed_attempt_is_forgotten_now_or_at_the_next_start_and_no_other(
    attempts, store, folder, kind, body, crashed
):
    start_run(store, "r2")
    filled(attempts)
    attempts().log(Attempt("r2", 1, 1)).append(b"of another run" * INLINE, durable=True)
    store.record(kind, {"run_id": "r1"} | body)
    assert store.rebuild().equal  # records are no projection
    assert len(records_of(folder)) == 2
    if not crashed:
        attempts().forget("r1", None if kind == "run.finished" else 1)
    attempts()
    assert store.kept(HERE) == []
    (left,) = store.kept(Attempt("r2", 1, 1))
    assert records_of(folder) == {left.blob}


def test_a_record_is_the_same_whoever_made_it(attempts, store):
    attempts()
    first = following(HERE, None, b"a", "b" * 64)
    store.keep(HERE, first, durable=True)
    assert store.kept(HERE) == [first]
    assert first.hash == "45b059a44cd972d22f32063332275d6c36347ebe37fdc916b7bfdf3e73a7de0c"


def test_a_vector_is_read_where_it_lies_unless_it_is_in_hand_or_to_come_again():
    kept, reads = {"d1": b"12345", "d2": b"67"}, []
    vectors = Vectors(lambda device: reads.append(device) or kept[device])
    for device in ("d1", "d1", "d2"):
        assert b"".join(vectors.read(device)) == kept[device]
        assert vectors.size(device) == len(kept[device])
    assert reads == ["d1", "d2"]
    vectors.discard("d1")
    assert vectors.size("d1") == 0
    vectors.append("d1", memoryview(b"123"))
    assert (vectors.size("d1"), b"".join(vectors.read("d1"))) == (3, b"123")
    assert reads == ["d1", "d2"]


# --- an installation that is upgraded in the middle of an attempt -----------------------------------


def before_v0007(store, folder, rows):
    """Rows and files as before: rows named masked vectors, and each run had a folder."""
    from lepton_fl.files import GENESIS, canonical_json

    old, last = BlobStore(folder / "spool" / HERE.run_id), GENESIS
    with store._engine.begin() as connection:
        connection.execute(text("ALTER TABLE attempt_record ADD COLUMN spooled TEXT NOT NULL DEFAULT '{}'"))
        connection.execute(text("ALTER TABLE rollout DROP COLUMN suspect_requests"))
        connection.execute(text("UPDATE lepton_version SET version_num = 'v0006'"))
        for number, (body, spooled) in enumerate(rows, 1):
            blob = old.put(body) if len(body) > INLINE else ""
            body = b"" if blob else body
            named = canonical_json({d: [old.put(v)] for d, v in spooled.items()}).decode()
            head = canonical_json([*HERE, last, number, blob, named])
            last = hashlib.sha256(len(head).to_bytes(8, "big") + head + body).hexdigest()
            row = HERE._asdict() | {"number": number, "body": body, "blob": blob, "hash": last}
            connection.execute(insert(ATTEMPT_RECORD).values(**row))
            connection.execute(
                text("UPDATE attempt_record SET spooled = :x WHERE hash = :h"), {"x": named, "h": last}
            )


@pytest.mark.parametrize("damaged", [False, True])
def test_an_upgrade_in_the_middle_of_an_attempt_goes_on_with_its_records(database, tmp_path, damaged):
    with open_store(database) as store:
        start_run(store)
        before_v0007(store, tmp_path, [(RECORDS[0], {"d1": b"masked"}), (RECORDS[2], {}), (b"x", {})])
        if damaged:
            with store._engine.begin() as connection:
                last = update(ATTEMPT_RECORD).where(ATTEMPT_RECORD.c.number == 3)
                connection.execute(last.values(body=b"y"))
    with open_store(database) as store:
        attempts = Attempts(store, BlobStore(tmp_path / "attempts"))
        for _ in range(2):
            adopt(store, attempts.blobs, tmp_path / "spool")
        assert not (tmp_path / "spool").exists()
        assert len(records_of(tmp_path / "attempts")) == 1  # vectors are there as updates
        if damaged:
            with pytest.raises(StateCorrupt, match="Record 3"):
                attempts.log(HERE)
            return
        log = attempts.log(HERE)
        assert list(log.found) == [RECORDS[0], RECORDS[2], b"x"]
        log.append(b"and on", durable=True)
        assert attempts.log(HERE).found[-1] == b"and on"
