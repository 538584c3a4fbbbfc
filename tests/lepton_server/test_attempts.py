"""What an open attempt has heard outlives the coordinator, on both engines, and goes when it is closed."""

import shutil

import pytest
from sqlalchemy import delete, select, update

from lepton_fl.errors import StateCorrupt, StateError
from lepton_server.attempts import INLINE, AttemptLog, forget_spool, sweep_spools
from lepton_server.store import Attempt, open_store
from lepton_server.store.attempts import following
from lepton_server.store.tables import ATTEMPT_RECORD

HERE = Attempt("r1", 1, 1)
RECORDS = [b"small", b"", b"large" * INLINE, bytes(range(256)), b"last"]


@pytest.fixture
def store(database):
    with open_store(database) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


def files(folder, run="r1"):
    return {p.parent.name + p.name for p in (folder / run).glob("??/*")}


def filled(store, folder):
    log = AttemptLog(store, folder, HERE)
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


def test_what_was_appended_is_found_in_order(store, folder):
    filled(store, folder)
    assert list(AttemptLog(store, folder, HERE).found) == RECORDS
    assert AttemptLog(store, folder, Attempt("r1", 1, 2)).found == ()
    assert AttemptLog(store, folder, Attempt("r2", 1, 1)).found == ()


def test_another_host_with_the_store_and_the_folder_goes_on(store, folder, tmp_path, database):
    log = filled(store, folder)
    log.spool.append("d1", b"masked")
    log.append(b"d1 has sent it", durable=False)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    with open_store(database) as other:
        there = AttemptLog(other, moved, HERE)
        assert list(there.found) == [*RECORDS, b"d1 has sent it"]
        assert b"".join(there.spool.read("d1")) == b"masked"
        there.append(b"and on", durable=True)
    with pytest.raises(StateError):  # the first one is not dead after all: it is stopped
        log.append(b"a second decision", durable=True)


def test_vectors_come_in_pieces_are_named_by_the_next_record_and_can_come_again(store, folder):
    log = AttemptLog(store, folder, HERE)
    log.spool.append("d1", b"12")
    log.spool.append("d1", memoryview(b"345"))
    log.append(b"first", durable=False)
    log.spool.append("d2", b"x" * 600_000)  # no record: as if the coordinator had died here
    assert (log.spool.size("d1"), log.spool.size("d2"), log.spool.size("d3")) == (5, 600_000, 0)
    again = AttemptLog(store, folder, HERE)
    assert b"".join(again.spool.read("d1")) == b"12345"
    assert again.spool.size("d2") == 0
    assert len(files(folder)) == 2  # what no record names is gone
    again.spool.discard("d1")
    again.spool.append("d1", b"other")
    again.append(b"second", durable=False)
    assert b"".join(AttemptLog(store, folder, HERE).spool.read("d1")) == b"other"


def test_devices_that_send_the_same_bytes_do_not_lose_each_others(store, folder):
    log = AttemptLog(store, folder, HERE)
    for device in ("d1", "d2"):
        log.spool.append(device, b"same")
    log.spool.discard("d1")
    assert b"".join(log.spool.read("d2")) == b"same"
    log.spool.discard("d2")
    assert not files(folder)


def test_a_record_that_could_not_be_written_can_be_written_again(store, folder, monkeypatch):
    log = filled(store, folder)
    log.spool.append("d1", b"masked")
    with monkeypatch.context() as patch:
        patch.setattr(store, "keep", lambda *args, **more: (_ for _ in ()).throw(StateError("no")))
        with pytest.raises(StateError):
            log.append(b"six", durable=True)
    log.append(b"six", durable=True)
    found = AttemptLog(store, folder, HERE)
    assert list(found.found) == [*RECORDS, b"six"]
    assert b"".join(found.spool.read("d1")) == b"masked"


@pytest.mark.parametrize(
    "change",
    [
        {"body": b"smell"},
        {"blob": "0" * 64},
        {"spooled": '{"d1":[]}'},
        {"hash": "0" * 64},
        {"number": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_damage_is_noticed(store, folder, change):
    filled(store, folder)
    with store._engine.begin() as connection:
        connection.execute(update(ATTEMPT_RECORD).where(ATTEMPT_RECORD.c.number == 1).values(**change))
    with pytest.raises(StateCorrupt, match="Record 1 of run r1, round 1, attempt 1"):
        store.kept(HERE)


def test_a_record_out_of_the_middle_is_missed_and_a_damaged_file_too(store, folder):
    filled(store, folder)
    large = store.kept(HERE)[2].blob
    path = folder / "r1" / large[:2] / large[2:]
    path.write_bytes(b"x")
    with pytest.raises(StateCorrupt):
        AttemptLog(store, folder, HERE)
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
def test_the_event_that_closes_the_attempt_takes_its_records_and_only_its(store, folder, kind, body):
    for run in ("r1", "r2"):
        start_run(store, run)
    filled(store, folder)
    AttemptLog(store, folder, Attempt("r2", 1, 1)).append(b"of another run", durable=True)
    store.record(kind, {"run_id": "r1"} | body)
    assert store.kept(HERE) == []
    assert len(store.kept(Attempt("r2", 1, 1))) == 1
    assert store.rebuild().equal  # records are no projection
    assert files(folder)
    AttemptLog(store, folder, Attempt("r1", 2, 1))  # the next attempt sweeps
    assert not files(folder)


def test_a_transaction_that_fails_takes_no_record(store, folder):
    start_run(store)
    filled(store, folder)
    body = {"run_id": "r1", "round": 1, "attempt": 1, "cause": "x"}

    def fail():
        with store.transaction() as change:
            change.record("round.abandoned", body)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(store.kept(HERE)) == len(RECORDS)


def test_what_ended_runs_have_left_is_swept(store, folder):
    for run in ("r1", "r2"):
        start_run(store, run)
        AttemptLog(store, folder, Attempt(run, 1, 1)).spool.append("d", run.encode())
    (folder / "strange").mkdir()
    store.record(
        "run.finished", {"run_id": "r1", "verdict": "failed", "reason": "", "model_sha256": None, "rounds": 0}
    )
    sweep_spools(store, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["r2"]
    forget_spool(folder, "r2")
    assert not list(folder.iterdir())
    forget_spool(folder, "r2")


def test_a_record_is_the_same_whoever_made_it(store):
    first = following(HERE, None, b"a", "", {"d2": ("b" * 64,), "d1": ()})
    store.keep(HERE, first, durable=True)
    assert store.kept(HERE) == [first]
    with store._engine.connect() as connection:
        (row,) = connection.execute(select(ATTEMPT_RECORD)).mappings()
    assert row["spooled"] == '{"d1":[],"d2":["' + "b" * 64 + '"]}'
