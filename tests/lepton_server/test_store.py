"""What the store promises, on both engines."""

import base64
import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from lepton_fl.errors import LeptonError, NotFound, StateConflict, StateCorrupt, StateError, TrustError
from lepton_fl.files import GENESIS, event_hash
from lepton_server.store import KINDS, Head, open_store
from lepton_server.store.events import TaskRegistered
from lepton_server.store.tables import EVENT, HEAD, PROJECTIONS

SHA = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abcdef"}
NOW = 1_800_000_000.0


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(database, clock):
    with open_store(database, clock=clock) as opened:
        yield opened


def key_of(device):
    return hashlib.sha512(device.encode()).digest()


def token(store, name="t1", **fields):
    body = {"token_id": name, "secret_sha256": hashlib.sha256(name.encode()).hexdigest()}
    store.record("token.created", name, body | {"expires_at": NOW + 1e6} | fields)


def enrolled(device, token_id="t1", **fields):
    body = {
        "device_id": device,
        "name": f"name of {device}",
        "public_key": base64.b64encode(key_of(device)).decode(),
        "cert_serial": "ab12",
        "cert_not_after": NOW + 1e6,
        "token_id": token_id,
        "groups": ["lab"],
    }
    return body | fields


def enrol(store, *devices):
    token(store, uses=max(1, len(devices)))
    with store.transaction() as change:
        for device in devices:
            change.record("token.used", "t1", {"token_id": "t1", "device_id": device})
            change.record("device.enrolled", device, enrolled(device))


def start_run(store, run="r1"):
    store.record("run.queued", run, {"run_id": run, "name": "first", "spec": {"rounds": 3}})
    store.record("run.started", run, {"run_id": run})


def plan(store, number, attempt=1, run="r1"):
    body = {
        "run_id": run,
        "round": number,
        "attempt": attempt,
        "plan": {"clip": 1.5},
        "model_sha256": SHA["a"],
    }
    return store.record("round.planned", run, body)


def commit(store, number, attempt=1, run="r1", **fields):
    body = {"run_id": run, "round": number, "attempt": attempt, "model_sha256": SHA["b"]} | fields
    return store.record("round.committed", run, body)


EVENT_JSON = '{"!":"gaussian","noise_multiplier":4.0}'


def attempt(number, tries, **fields):
    return {"run_id": "r1", "round": number, "attempt": tries} | fields


def charge(store, number, tries, events=(EVENT_JSON,), accounts=("run:r1", "fleet")):
    body = attempt(number, tries, events=list(events), accounts=list(accounts))
    store.record("privacy.reserved", body)


def everything(store):
    """All rows of all tables but presence."""
    with store._engine.connect() as connection:
        return {
            table.name: sorted(connection.execute(select(table)), key=repr)
            for table in (EVENT, HEAD, *PROJECTIONS)
        }


def refused(store, error, kind, body, match=None):
    """The event is refused and nothing has changed."""
    before = everything(store)
    with pytest.raises(error, match=match):
        store.record(kind, body)
    assert everything(store) == before


def moved(phase, stage=0, **more):
    return {"rollout_id": "u1", "phase": phase, "stage": stage, **more}


def a_rollout(store, releases=("phone",)):
    plan = {"releases": dict.fromkeys(releases, "4" * 64), "stages": [{"share": 0.1}, {"share": 1.0}]}
    store.record("rollout.planned", {"rollout_id": "u1", "task": "digits", "plan": plan})
    store.record("rollout.moved", moved("running"))
    told = {"device_id": "d1", "before": "5" * 64, "p95_ms": 1.5}
    store.record("rollout.told", {"rollout_id": "u1", "stage": 0, "devices": [told]})
    store.record("rollout.suspected", {"rollout_id": "u1", "cause": "1 of 2 predictions failed"})
    store.record("rollout.moved", moved("running", 1))
    told = {"device_id": "d2"}
    store.record("rollout.told", {"rollout_id": "u1", "stage": 1, "devices": [told]})
    store.record("rollout.moved", moved("rolling-back", 1, cause="enough", aborting=True))
    store.record("rollout.reverted", {"rollout_id": "u1", "devices": ["d1"]})


def a_whole_life(store):
    """Record at least one event of every kind."""
    store.record("server.started", "server", {"version": "0.1.0"})
    enrol(store, "d1", "d2", "d3")
    token(store, "t2")
    store.record("token.revoked", "t2", {"token_id": "t2", "reason": "leaked"})
    store.record(
        "device.renewed", "d1", {"device_id": "d1", "cert_serial": "cd", "cert_not_after": NOW + 2e6}
    )
    store.record(
        "device.reported", "d1", {"device_id": "d1", "reported": {"rows": 5, "load": 0.25, "ü": None}}
    )
    store.record("device.desired", "d1", {"device_id": "d1", "desired": {"paused": True}})
    rests = {"device_id": "d1", "cause": "gone", "faults": 3, "until": NOW + 3600}
    store.record("device.quarantined", rests)
    store.record("device.readmitted", {"device_id": "d1", "reason": "mended"})
    store.record("device.quarantined", rests | {"run_id": "r0"})
    signing = {"device_id": "d1", "signing_key": SHA["e"]}
    store.record("device.signing", "d1", signing | {"request": "cmVx" * 20})
    certified = signing | {"credential": "Y3Jl" * 20, "not_after": NOW + 1e6}
    store.record("device.certified", "d1", certified)
    signed = {"release": "4" * 64, "task": "digits", "variant": "int8", "sequence": 1}
    store.record("release.published", signed)
    store.record("release.withdrawn", {"release": "4" * 64})
    a_rollout(store)
    store.record("device.revoked", "d3", {"device_id": "d3", "reason": "lost"})
    task = {"name": "digits", "reference": "lepton_fl.tasks:digits", "version": "1", "num_parameters": 10}
    store.record("task.registered", "digits", task | {"layout_digest": SHA["f"]})
    start_run(store)
    model = {"run_id": "r1", "model_sha256": SHA["a"], "round": 0, "parent_sha256": None, "metrics": {}}
    store.record("model.created", "r1", model)
    budget = {"account": "run:r1", "version": 1, "unit": "device", "trust": "central", "epsilon": 8.0}
    budget |= {"adjacency": "zero-out", "accountant": "auto", "delta": 1e-6}
    key = base64.b64encode(key_of("budgets")).decode()
    store.record("budget.set", budget | {"key": key, "signature": "c2lnbmVkIQ=="})
    plan(store, 1)
    charge(store, 1, 1)
    store.record("privacy.voided", attempt(1, 1, evidence="1 of 2"))
    store.record("run.waiting", "r1", {"run_id": "r1", "cause": "1 of 2 eligible", "until": NOW + 60})
    again = {"run_id": "r1", "round": 1, "attempt": 1, "device_id": "d1", "cause": "evicted"}
    store.record("round.reoffered", again)
    part = {"device_id": "d1", "outcome": "dropped", "reason": "offline", "seconds": 60.0, "cause": "gone"}
    body = {"run_id": "r1", "round": 1, "attempt": 1, "cause": "1 of 2", "participation": [part]}
    store.record("round.abandoned", "r1", body)
    plan(store, 1, attempt=2)
    charge(store, 1, 2)
    store.record("round.moved", {"run_id": "r1", "round": 1, "attempt": 2, "phase": "offered"})
    store.record("privacy.releasing", attempt(1, 2))
    released = attempt(1, 2, model_sha256=SHA["b"], state_sha256=SHA["d"], extra=[EVENT_JSON])
    store.record("privacy.committed", released)
    good = {"device_id": "d1", "outcome": "counted", "seconds": 1.5, "examples": 7, "bytes_up": 9}
    late = {"device_id": "d2", "outcome": "rejected", "reason": "late"}
    commit(store, 1, 2, participation=[good, late], metrics={"loss": 0.5}, state_sha256=SHA["c"], seconds=2.5)
    model = {"run_id": "r1", "model_sha256": SHA["b"], "round": 1, "parent_sha256": SHA["a"]}
    store.record("model.created", "r1", model)
    store.record("round.evaluated", "r1", {"run_id": "r1", "round": 1, "metrics": {"accuracy": 0.9}})
    best = {"run_id": "r1", "round": 1, "model_sha256": SHA["b"], "metric": "accuracy", "value": 0.9}
    store.record("run.best", "r1", best)
    done = {"run_id": "r1", "verdict": "exhausted", "reason": "spent", "rounds": 1}
    store.record("run.finished", "r1", done)
    store.record("run.resumed", "r1", {"run_id": "r1"})
    store.record("run.stopping", "r1", {"run_id": "r1", "reason": "enough"})
    done = {"run_id": "r1", "verdict": "stopped", "reason": "enough", "model_sha256": SHA["b"], "rounds": 1}
    store.record("run.finished", "r1", done)
    missed = {"device_id": "d1", "seq": 99, "hash": SHA["a"], "signature": "ab" * 64}
    missed |= {"key": key_of("budgets").hex()}
    store.record("ledger.missed", missed)
    store.record("server.stopped", "server", {})


class TestJournal:
    def test_empty(self, store):
        assert store.head() == Head(0, GENESIS)
        assert store.head_seq() == 0
        assert store.events() == []
        assert store.verify_journal() == store.head()
        assert store.rebuild().equal

    def test_every_kind_is_kept_chained_and_rebuilt(self, store, database):
        a_whole_life(store)
        events = store.events()
        assert {event.kind for event in events} == set(KINDS)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.prev for event in events] == [GENESIS, *(event.hash for event in events[:-1])]
        assert store.verify_journal() == store.head() == (events[-1].seq, events[-1].hash)
        report = store.rebuild()
        assert report.equal
        assert not report.replaced
        assert all(report.rows.values())
        with open_store(database) as again:
            assert again.events() == events

    def test_the_hash_is_the_documented_one(self, store):
        event = store.record("server.started", {"version": "é"})
        body = '{"info":{},"version":"é"}'
        assert event.hash == event_hash(GENESIS, 1, NOW + 1, "server.started", "server", body)
        text = f'["lepton journal v1","{GENESIS}",1,"{(NOW + 1).hex()}","server.started","server",'
        text += '"{\\"info\\":{},\\"version\\":\\"é\\"}"]'
        assert event.hash == hashlib.sha256(text.encode()).hexdigest()

    def test_events_by_kind_subject_and_place(self, store):
        a_whole_life(store)
        assert [e.subject for e in store.events(kinds=["device.enrolled"])] == ["d1", "d2", "d3"]
        assert {e.subject for e in store.events(subject="r1")} == {"r1"}
        assert [e.seq for e in store.events(3, limit=2)] == [4, 5]
        assert store.events(kinds=[]) == []

    def test_follow_yields_what_comes(self, store):
        stop, seen = threading.Event(), []

        def follow():
            for event in store.follow(1, stop=stop, poll=0.01, kinds=["server.stopped"]):
                seen.append(event.seq)
                if len(seen) == 2:
                    stop.set()

        store.record("server.stopped", {})
        thread = threading.Thread(target=follow)
        thread.start()
        for kind in ("server.started", "server.stopped", "server.started", "server.stopped"):
            store.record(kind, {})
        thread.join(timeout=30)
        assert seen == [3, 5]

    def test_the_database_refuses_to_change_the_journal(self, store):
        a_whole_life(store)
        before = store.head()
        for statement in (
            "UPDATE event SET body = '{}' WHERE seq = 2",
            "DELETE FROM event WHERE seq = 2",
            "INSERT INTO event SELECT 99, time, kind, subject, body, prev, hash FROM event WHERE seq = 2",
        ):
            with pytest.raises(DBAPIError, match="append-only"), store._engine.begin() as connection:
                connection.execute(text(statement))
        assert store.verify_journal() == before

    def test_replacing_a_row_is_refused_too(self, store):
        a_whole_life(store)
        if store._engine.dialect.name == "postgresql":
            statement = "TRUNCATE event"
        else:
            statement = "INSERT OR REPLACE INTO event SELECT * FROM event WHERE seq = 2"
        with pytest.raises(DBAPIError, match="append-only"), store._engine.begin() as connection:
            connection.execute(text(statement))
        store.verify_journal()

    @pytest.mark.parametrize(
        ("statement", "first"),
        [
            ("UPDATE event SET body = replace(body, 'lab', 'bab') WHERE seq = 4", 4),
            ("UPDATE event SET time = time + 0.001 WHERE seq = 5", 5),
            ("UPDATE event SET kind = 'server.stopped' WHERE seq = 1", 1),
            ("UPDATE event SET subject = 'd9' WHERE seq = 4", 4),
            ("UPDATE event SET hash = prev WHERE seq = 3", 3),
            ("DELETE FROM event WHERE seq = 1", 1),
            ("DELETE FROM event WHERE seq = 6", 6),
            ("DELETE FROM event WHERE seq > 7", 8),
            ("DELETE FROM event", 1),
            ("UPDATE event SET seq = CASE seq WHEN 3 THEN -4 ELSE -3 END WHERE seq IN (3, 4)", -4),
            ("UPDATE journal_head SET seq = 2", 3),
        ],
    )
    def test_tampering_is_found_and_named(self, store, statement, first):
        a_whole_life(store)
        with store._engine.begin() as connection:
            _drop_triggers(connection)
            connection.execute(text(statement))
            if first < 0:  # reordered: two rows have changed places
                connection.execute(text("UPDATE event SET seq = -seq WHERE seq < 0"))
                first = 3
        with pytest.raises(StateCorrupt, match=rf"event {first}\b"):
            store.verify_journal()
        rows = store.devices()
        with pytest.raises(StateCorrupt, match=rf"event {first}\b"):
            store.rebuild(check_only=False)
        assert store.devices() == rows

    def test_a_whole_new_history_is_found_by_a_head_noted_earlier(self, store):
        a_whole_life(store)
        noted = store.head()
        store.record("server.started", {})
        assert store.verify_journal(noted).seq == noted.seq + 1
        with pytest.raises(StateCorrupt, match="noted earlier"):
            store.verify_journal(Head(noted.seq, SHA["a"]))
        with pytest.raises(StateCorrupt, match="noted earlier"):
            store.verify_journal(Head(noted.seq + 9, noted.hash))


def _drop_triggers(connection):
    if connection.dialect.name == "postgresql":
        connection.execute(text("ALTER TABLE event DISABLE TRIGGER ALL"))
        return
    for name in ("event_no_update", "event_no_delete", "event_in_order"):
        connection.execute(text(f"DROP TRIGGER {name}"))


class TestRebuild:
    @pytest.mark.parametrize(
        ("statement", "told"),
        [
            ("UPDATE device SET state = 'active' WHERE id = 'd3'", "device d3: state differs"),
            ("UPDATE enrolment_token SET uses = 100, revoked = 0 WHERE id = 't2'", "uses, revoked differ"),
            ("DELETE FROM participation WHERE device_id = 'd2'", "participation r1/1/2/d2: missing"),
            ("UPDATE model_version SET metrics = '[]' WHERE round = 1", "model_version r1/1: metrics"),
            ("UPDATE round SET seconds = 2.5000001 WHERE attempt = 2", "round r1/1/2: seconds differs"),
            ("INSERT INTO task_version VALUES ('x', '1', 'r', 'd', 1, 0)", "task_version x/1: not in"),
        ],
    )
    def test_what_the_journal_does_not_say_is_found_and_undone(self, store, statement, told):
        a_whole_life(store)
        truth = (store.devices(), store.tokens(), store.runs(), store.rounds("r1"), store.participation("r1"))
        with store._engine.begin() as connection:
            connection.execute(text(statement))
        report = store.rebuild()
        assert report.different == 1
        assert told in report.differences[0]
        assert not store.rebuild().equal  # looking changes nothing
        assert store.rebuild(check_only=False).replaced
        assert store.rebuild().equal
        assert truth == (
            store.devices(),
            store.tokens(),
            store.runs(),
            store.rounds("r1"),
            store.participation("r1"),
        )

    def test_from_nothing(self, store):
        a_whole_life(store)
        with store._engine.begin() as connection:
            for name in (
                "rollout_device",
                "rollout",
                "privacy_total",
                "privacy_charge",
                "participation",
                "round",
                "model_version",
                "run",
                "device",
                "token_use",
            ):
                connection.execute(text(f"DELETE FROM {name}"))
        assert store.rebuild(check_only=False).different > 5
        assert store.rebuild().equal


class TestBodies:
    def test_unknown_kinds_and_fields_are_refused(self, store):
        refused(store, StateError, "device.exploded", {}, "device.exploded")
        refused(store, StateError, "server.started", {"versoin": "1"}, "versoin")
        refused(store, StateError, "token.revoked", {}, "token_id")

    @pytest.mark.parametrize(
        "change",
        [
            {"expires_at": float("nan")},
            {"expires_at": float("inf")},
            {"expires_at": "tomorrow"},
            {"expires_at": NOW - 1},
            {"secret_sha256": "A" * 64},
            {"secret_sha256": SHA["a"] + "\n"},
            {"uses": 0},
            {"uses": True},
            {"uses": 1.0},
            {"note": "a\x00b"},
            {"note": "\ud800"},
            {"note": "x" * 3000},
            {"token_id": ""},
            {"token_id": "a/b"},
            {"token_id": "t\n"},
        ],
    )
    def test_bad_values_are_refused(self, store, change):
        body = {"token_id": "t1", "secret_sha256": SHA["a"], "expires_at": NOW + 9} | change
        refused(store, StateError, "token.created", body)

    def test_json_that_is_none_is_refused(self, store):
        enrol(store, "d1")
        for value in ({"x": float("nan")}, {"x": {1: 2}}, {"x": b"y"}, ["x"], {"x": "\ud800"}):
            refused(store, StateError, "device.reported", {"device_id": "d1", "reported": value})

    def test_a_wrong_subject_is_refused(self, store):
        with pytest.raises(StateError, match="subject"):
            store.record("server.started", "d1", {})
        assert store.head_seq() == 0

    def test_too_large_a_body_is_refused(self, store):
        big = {"version": "", "info": {"x": "y" * (9 << 20)}}
        refused(store, StateError, "server.started", big, "at most")

    def test_a_devices_words_cannot_keep_a_round_from_being_recorded(self, store):
        enrol(store, "d1")
        start_run(store)
        plan(store, 1)
        part = {"device_id": "d1", "outcome": "rejected", "reason": "\x1b[2J\x00\ud800" + "x" * 9999}
        commit(store, 1, participation=[part])
        (row,) = store.participation("r1")
        assert row.reason.startswith("�[2J��xxx")
        assert len(row.reason) == 300
        assert store.rebuild().equal

    @pytest.mark.parametrize("now", [float("nan"), float("inf"), -1.0])
    def test_a_broken_clock_is_refused(self, database, now):
        with open_store(database, clock=lambda: now) as store, pytest.raises(StateError, match="clock"):
            store.record("server.started", {})

    def test_a_clock_that_jumps_back_is_recorded_as_it_is(self, database):
        times = iter([NOW, NOW - 1e6, NOW + 1e6])
        with open_store(database, clock=lambda: next(times)) as store:
            for _ in range(3):
                store.record("server.started", {})
            assert store.verify_journal().seq == 3


class TestTransactions:
    def test_all_or_nothing(self, store):
        token(store)
        before = store.head()

        def die_in_the_middle():
            with store.transaction() as change:
                change.record("token.used", "t1", {"token_id": "t1", "device_id": "d1"})
                change.record("device.enrolled", "d1", enrolled("d1"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            die_in_the_middle()
        assert store.head() == before
        assert store.devices() == []
        assert store.tokens()[0].used == 0

    def test_a_refused_event_leaves_the_others(self, store):
        enrol(store, "d1", "d2")
        store.record("device.revoked", {"device_id": "d1"})
        with store.transaction() as change:
            for device in ("d1", "d2"):
                try:
                    change.record("device.reported", {"device_id": device, "reported": {"a": 1}})
                except TrustError:
                    assert device == "d1"
        assert store.device("d2").reported == {"a": 1}
        assert store.verify_journal() == store.head()
        assert store.rebuild().equal

    def test_many_threads(self, store):
        def work(number):
            for _ in range(10):
                store.record("server.started", {"version": str(number)})
                store.head_seq()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert store.verify_journal().seq == 80


class TestTokens:
    def test_states(self, store):
        token(store)
        token(store, "t2", expires_at=NOW + 50)
        token(store, "t3")
        store.record("token.revoked", {"token_id": "t3"})
        store.record("token.used", {"token_id": "t1", "device_id": "d1"})
        assert [t.state(NOW + 60) for t in store.tokens()] == ["used", "expired", "revoked"]
        assert store.tokens()[1].state(NOW + 49) == "valid"
        found = store.token_by_secret(hashlib.sha256(b"t1").hexdigest())
        assert found.id == "t1"
        assert found.used_by == ("d1",)
        assert found.secret_sha256 not in repr(found)
        assert store.token_by_secret(SHA["f"]) is None

    def test_once(self, store):
        enrol(store, "d1")
        refused(store, TrustError, "token.used", {"token_id": "t1", "device_id": "d2"}, "1 of 1")
        refused(store, TrustError, "token.used", {"token_id": "t1", "device_id": "d1"}, "by this device")

    def test_forged_expired_revoked(self, store, clock):
        refused(store, TrustError, "token.used", {"token_id": "t9", "device_id": "d1"}, "did not make")
        token(store, "t2")
        store.record("token.revoked", {"token_id": "t2"})
        refused(store, TrustError, "token.used", {"token_id": "t2", "device_id": "d1"}, "revoked")
        refused(store, StateConflict, "token.revoked", {"token_id": "t2"}, "already")
        refused(store, NotFound, "token.revoked", {"token_id": "t9"})
        token(store, "t3", expires_at=NOW + 100)
        clock.now = NOW + 99
        refused(store, TrustError, "token.used", {"token_id": "t3", "device_id": "d1"}, "expired 0 s ago")

    def test_names_and_secrets_are_unique(self, store):
        token(store)
        same_id = {"token_id": "t1", "secret_sha256": SHA["a"], "expires_at": NOW + 1e6}
        refused(store, StateConflict, "token.created", same_id)
        same_secret = {"token_id": "t2", "expires_at": NOW + 1e6}
        same_secret["secret_sha256"] = hashlib.sha256(b"t1").hexdigest()
        refused(store, StateConflict, "token.created", same_secret)

    def test_enrolling_without_spending_a_token(self, store):
        token(store)
        refused(store, TrustError, "device.enrolled", enrolled("d1"), "did not spend")
        store.record("token.used", {"token_id": "t1", "device_id": "d1"})
        refused(store, TrustError, "device.enrolled", enrolled("d2"), "did not spend")
        store.record("device.enrolled", enrolled("d1"))
        refused(store, TrustError, "device.enrolled", enrolled("d1"), "did not spend")


class TestDevices:
    def test_reads(self, store):
        enrol(store, "d1", "d2", "d3")
        store.record("device.revoked", {"device_id": "d2", "reason": "lost"})
        store.note_presence(
            [("d1", 5.0, "idle"), ("d3", 7.0, "busy"), ("d1", 6.0, "busy"), ("d3", 2.0, "idle")]
        )
        assert [d.id for d in store.devices()] == ["d1", "d2", "d3"]
        assert [d.id for d in store.devices(state="active")] == ["d1", "d3"]
        assert [d.id for d in store.devices(after_id="d1", limit=1)] == ["d2"]
        assert [d.id for d in store.devices(group="lab")] == ["d1", "d2", "d3"]
        assert store.devices(group="la") == store.devices(group="%") == []
        assert store.device("d2").state_reason == "lost"
        assert store.device_by_key(key_of("d2")).id == "d2"
        assert store.device_by_key(b"") is None
        assert [(d.id, d.last_seen, d.status, d.groups) for d in store.active_devices()] == [
            ("d1", 6.0, "busy", ("lab",)),
            ("d3", 7.0, "busy", ("lab",)),
        ]
        with pytest.raises(NotFound):
            store.device("d9")

    def test_presence_is_newest_wins_and_not_in_the_journal(self, store):
        enrol(store, "d1")
        head = store.head()
        store.note_presence([("d1", 5.0, "idle")])
        store.note_presence([("d1", 4.0, "busy")])
        store.note_presence([])
        assert (store.device("d1").last_seen, store.device("d1").status) == (5.0, "idle")
        assert store.head() == head
        assert store.rebuild(check_only=False).equal
        assert store.device("d1").last_seen == 5.0

    def test_revoked_is_for_good(self, store):
        enrol(store, "d1")
        store.record("device.revoked", {"device_id": "d1"})
        renew = {"device_id": "d1", "cert_serial": "cd", "cert_not_after": NOW}
        refused(store, TrustError, "device.renewed", renew, "revoked")
        refused(store, TrustError, "device.reported", {"device_id": "d1", "reported": {"a": 1}})
        refused(store, TrustError, "device.desired", {"device_id": "d1", "desired": {}})
        refused(store, StateConflict, "device.revoked", {"device_id": "d1"}, "already")
        token(store, "t2")
        store.record("token.used", {"token_id": "t2", "device_id": "d1"})
        refused(store, TrustError, "device.enrolled", enrolled("d1", "t2"), "revoked")

    def test_enrolling_again_keeps_the_twin(self, store):
        enrol(store, "d1")
        store.record("device.desired", {"device_id": "d1", "desired": {"paused": True}})
        token(store, "t2")
        store.record("token.used", {"token_id": "t2", "device_id": "d1"})
        store.record("device.enrolled", enrolled("d1", "t2", name="new", cert_serial="ff"))
        device = store.device("d1")
        assert (device.name, device.cert_serial, device.desired) == ("new", "ff", {"paused": True})

    def test_nobody_takes_anothers_key_or_name(self, store):
        enrol(store, "d1")
        token(store, "t2", uses=5)
        for device in ("d1", "d2"):
            store.record("token.used", {"token_id": "t2", "device_id": device})
        key = base64.b64encode(key_of("d1")).decode()
        refused(store, StateConflict, "device.enrolled", enrolled("d2", "t2", public_key=key), "belongs")
        other = base64.b64encode(key_of("d7")).decode()
        refused(
            store, StateConflict, "device.enrolled", enrolled("d1", "t2", public_key=other), "another key"
        )

    def test_only_news_is_reported(self, store):
        enrol(store, "d1")
        store.record("device.reported", {"device_id": "d1", "reported": {"a": 1, "b": 2}})
        refused(store, StateConflict, "device.reported", {"device_id": "d1", "reported": {"b": 2, "a": 1}})
        refused(store, NotFound, "device.reported", {"device_id": "d9", "reported": {}})

    def test_tasks(self, store):
        task = TaskRegistered(
            name="digits", reference="m:t", version="1", layout_digest=SHA["a"], num_parameters=5
        )
        assert store.ensure_task(task)
        assert not store.ensure_task(task)
        with pytest.raises(StateConflict, match="already") as caught:
            store.ensure_task(task.model_copy(update={"layout_digest": SHA["b"]}))
        assert "new version" in caught.value.hint
        assert store.ensure_task(task.model_copy(update={"version": "2"}))
        assert [(t.name, t.version) for t in store.tasks()] == [("digits", "1"), ("digits", "2")]


class TestRuns:
    def test_a_round_is_committed_once_and_only_as_its_current_attempt(self, store):
        start_run(store)
        body = {"run_id": "r1", "round": 1, "attempt": 1, "model_sha256": SHA["b"]}
        refused(store, StateConflict, "round.committed", body, "never planned")
        plan(store, 1)
        refused(store, StateConflict, "round.committed", body | {"attempt": 2}, "not open")
        store.record("round.abandoned", {"run_id": "r1", "round": 1, "attempt": 1, "cause": "restart"})
        refused(store, StateConflict, "round.committed", body, "abandoned")
        plan(store, 1, attempt=2)
        refused(store, StateConflict, "round.committed", body, "attempt 2 is planned")
        commit(store, 1, attempt=2)
        refused(store, StateConflict, "round.committed", body | {"attempt": 2}, "committed")
        again = {"run_id": "r1", "round": 1, "attempt": 2, "cause": "x"}
        refused(store, StateConflict, "round.abandoned", again)
        assert [(r.round, r.attempt, r.state) for r in store.rounds("r1")] == [
            (1, 1, "abandoned"),
            (1, 2, "committed"),
        ]
        assert store.run("r1").committed == 1

    def test_rounds_are_planned_in_order(self, store):
        start_run(store)
        base = {"run_id": "r1", "plan": {}, "model_sha256": SHA["a"]}
        refused(store, StateConflict, "round.planned", base | {"round": 2, "attempt": 1}, "Expected round 1")
        refused(
            store, StateConflict, "round.planned", base | {"round": 1, "attempt": 2}, "Expected attempt 1"
        )
        plan(store, 1)
        refused(store, StateConflict, "round.planned", base | {"round": 1, "attempt": 2}, "is planned")
        commit(store, 1)
        refused(store, StateConflict, "round.planned", base | {"round": 1, "attempt": 2}, "Expected round 2")

    def test_a_finished_run_accepts_nothing_more(self, store):
        a_whole_life(store)
        kinds = [k for k, m in KINDS.items() if m.subject_field == "run_id" and k != "run.queued"]
        bodies = {event.kind: event.body for event in store.events(subject="r1")}
        for kind in kinds:
            refused(store, StateConflict, kind, bodies[kind], "is stopped")
        assert len(kinds) >= 10

    def test_finishing_closes_the_open_round(self, store):
        start_run(store)
        plan(store, 1)
        store.record("run.finished", {"run_id": "r1", "verdict": "failed", "reason": "boom", "rounds": 0})
        assert store.rounds("r1")[0].state == "abandoned"
        assert store.run("r1").finished
        assert store.rebuild().equal

    def test_order_of_states(self, store):
        refused(store, NotFound, "run.started", {"run_id": "r9"})
        store.record("run.queued", {"run_id": "r1", "name": "n", "spec": {}})
        refused(store, StateConflict, "run.queued", {"run_id": "r1", "name": "n", "spec": {}})
        first = {"run_id": "r1", "round": 1, "attempt": 1, "plan": {}, "model_sha256": SHA["a"]}
        refused(store, StateConflict, "round.planned", first, "queued")
        store.record("run.started", {"run_id": "r1"})
        store.record("run.started", {"run_id": "r1"})  # a restarted coordinator goes on
        plan(store, 1)
        store.record("run.stopping", {"run_id": "r1"})
        refused(store, StateConflict, "run.stopping", {"run_id": "r1"}, "stopping")
        commit(store, 1)  # the round in hand counts
        refused(store, StateConflict, "round.planned", first | {"round": 2}, "stopping")
        assert [r.state for r in store.runs(state="stopping")] == ["stopping"]
        assert store.runs(state="queued") == []

    def test_participation_of_unknown_or_doubled_devices(self, store):
        enrol(store, "d1")
        start_run(store)
        plan(store, 1)
        body = {"run_id": "r1", "round": 1, "attempt": 1, "model_sha256": SHA["b"]}
        part = {"device_id": "d1", "outcome": "counted"}
        refused(store, StateError, "round.committed", body | {"participation": [part, part]}, "at most once")
        unknown = {"participation": [part, part | {"device_id": "d9"}]}
        refused(store, NotFound, "round.committed", body | unknown, "d9")
        for bad in ({"seconds": float("nan")}, {"examples": -1}, {"outcome": "great"}):
            refused(store, StateError, "round.committed", body | {"participation": [part | bad]})

    def test_lineage(self, store):
        start_run(store)
        model = {"run_id": "r1", "round": 0, "model_sha256": SHA["a"]}
        refused(store, NotFound, "model.created", model | {"parent_sha256": SHA["f"]}, "parent")
        store.record("model.created", model)
        refused(store, StateConflict, "model.created", model, "already")
        child = {"run_id": "r1", "round": 1, "model_sha256": SHA["b"], "parent_sha256": SHA["a"]}
        refused(store, StateConflict, "model.created", child, "not committed")
        plan(store, 1)
        commit(store, 1)
        store.record("model.created", child)
        assert [(m.round, m.parent_sha256) for m in store.models("r1")] == [(0, None), (1, SHA["a"])]


RACER = """
import sys
from lepton_server.store import open_store
from lepton_fl.errors import TrustError
with open_store(sys.argv[1], lock_timeout=60) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "race":
        try:
            store.record("token.used", {"token_id": "t1", "device_id": sys.argv[3]})
            print("won")
        except TrustError:
            print("lost")
    else:
        for i in range(int(sys.argv[2])):
            store.record("server.started", {"version": f"{sys.argv[3]} {i}"})
"""


def together(database, what, names):
    """Run one process each, all let go at the same moment; return the last words of each."""
    command = [sys.executable, "-c", RACER, database, what]
    racers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        answers = [racer.communicate(timeout=120)[0].strip() for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * len(racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
            racer.stdin.close()
            racer.stdout.close()
    return answers


class TestProcesses:
    def test_two_writers_make_one_chain(self, database):
        together(database, "200", ["a", "b"])  # both also make the schema at once
        with open_store(database) as store:
            assert store.verify_journal().seq == 400
            assert store.rebuild().equal
            versions = [event.body["version"].split() for event in store.events()]
        for name in "ab":
            assert [int(number) for who, number in versions if who == name] == list(range(200))

    def test_one_of_two_racers_gets_the_token(self, database):
        with open_store(database) as store:
            token(store, expires_at=4e9)
            assert sorted(together(database, "race", ["d1", "d2"])) == ["lost", "won"]
            assert store.tokens()[0].used == 1
            assert store.verify_journal().seq == 2


def test_every_error_is_ours(store):
    """A closed database is one, too."""
    with store._engine.begin() as connection:
        connection.execute(text("DROP TABLE presence"))
    with pytest.raises(LeptonError):
        store.devices()


class TestRollouts:
    def test_the_tables_follow(self, store):
        enrol(store, "d1", "d2")
        a_rollout(store)
        (found,) = store.rollouts()
        assert (found.phase, found.stage, found.cause, found.aborting) == ("rolling-back", 1, "enough", True)
        assert found.suspect == ""  # a new stage begins without suspicion
        assert store.told("u1") == [("d2", 1, "", 0.0)]
        assert store.told_in() == {"d2": "u1"}
        refused(store, StateConflict, "rollout.moved", moved("aborted", 1), "still have releases")
        store.record("rollout.reverted", {"rollout_id": "u1", "devices": ["d2"]})
        store.record("rollout.moved", moved("aborted", 1))
        assert store.told_in() == {}
        assert store.rebuild().equal

    def test_two_rollouts_cannot_fight_over_a_device(self, store):
        enrol(store, "d1", "d2")
        a_rollout(store, releases=("phone", "gateway"))
        for other, profiles in (("u2", ["gateway"]), ("u3", ["server"])):
            plan = {"releases": dict.fromkeys(profiles, "4" * 64), "stages": [{"share": 1.0}]}
            store.record("rollout.planned", {"rollout_id": other, "task": "digits", "plan": plan})
        other = moved("running") | {"rollout_id": "u2"}
        refused(store, StateConflict, "rollout.moved", other, "u1 of digits is rolling-back for gateway")
        store.record("rollout.moved", moved("running") | {"rollout_id": "u3"})
        store.record("rollout.reverted", {"rollout_id": "u1", "devices": ["d2"]})
        store.record("rollout.moved", moved("aborted", 1))
        store.record("rollout.moved", other)

    def test_what_does_not_follow_is_refused(self, store):
        enrol(store, "d1", "d2")
        told = {"rollout_id": "u1", "stage": 0, "devices": [{"device_id": "d1"}]}
        refused(store, NotFound, "rollout.told", told, "no rollout u1")
        plan = {"releases": {"phone": "4" * 64}, "stages": [{"share": 1.0}]}
        store.record("rollout.planned", {"rollout_id": "u1", "task": "digits", "plan": plan})
        refused(store, StateConflict, "rollout.told", told, "is planned")
        refused(store, StateConflict, "rollout.moved", moved("done"), "planned and cannot be done")
        store.record("rollout.moved", moved("running"))
        refused(store, StateConflict, "rollout.moved", moved("running", 1), "at stage 0, not 1")
        refused(store, NotFound, "rollout.told", told | {"devices": [{"device_id": "d9"}]}, "d9")
        store.record("rollout.told", told)
        refused(store, StateConflict, "rollout.told", told, "was told")
        gone = {"rollout_id": "u1", "devices": ["d1"]}
        refused(store, StateConflict, "rollout.reverted", gone, "nothing is taken back")
        store.record("rollout.moved", moved("rolling-back"))
        refused(store, StateConflict, "rollout.reverted", gone | {"devices": ["d1", "d2"]}, "Not all")
