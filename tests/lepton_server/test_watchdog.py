"""What is wrong with a device follows from facts; the board tells it when nothing else can be written."""

import json
import logging
import os
import time
from dataclasses import dataclass, field

import pytest

from lepton_fl.errors import Cause, ConnectionFailed, DiskFull, Rejection, StateLocked
from lepton_fl.rounds.cohort import Candidate
from lepton_server import watchdog as module
from lepton_server.fleet import Trouble, Vitals
from lepton_server.ops import Meters
from lepton_server.report import live, troubles
from lepton_server.watchdog import (
    ADVICE,
    BOARD_BYTES,
    BOARD_FILE,
    Board,
    Facts,
    Wait,
    Watchdog,
    cause_of,
    diagnose,
    read_board,
    standing,
    wait_of,
)


def vitals(*, enrolled=True, streaming=True, clock=0.0, causes=()):
    told = tuple(Trouble(cause, "as told", float(i)) for i, cause in enumerate(causes))
    return Vitals(enrolled, True, streaming, clock, told)


def facts(asked=10.0, idle=1.0, lost=0.0, **more):
    return Facts(vitals(**more), asked, idle, lost)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (facts(), Cause.AT_WORK),
        (facts(asked=20.0, idle=None), Cause.AT_WORK),  # it is still importing what it needs
        (facts(asked=26.0, idle=None), Cause.HALF_OPEN),  # told, but it never came
        (facts(asked=600.0, idle=15.0), Cause.AT_WORK),  # one heartbeat is late
        (facts(asked=600.0, idle=23.0), Cause.HALF_OPEN),
        (
            facts(asked=600.0, idle=9.0, lost=30.0, streaming=False),
            Cause.AT_WORK,
        ),  # it still sends heartbeats
        (facts(asked=600.0, idle=12.0, lost=9.0, streaming=False), Cause.GONE),
        (facts(asked=600.0, idle=12.0, lost=3.0, streaming=False), Cause.AT_WORK),  # its stream was renewed
        (facts(asked=9.0, idle=500.0, lost=8.5, streaming=False), Cause.GONE),  # went before it came
        (facts(enrolled=False), Cause.REVOKED),
        (facts(causes=[Cause.HUNG_TRAINING]), Cause.HUNG_TRAINING),
        (facts(causes=[Cause.CLOCK_OFF, Cause.SLOW_LINK]), Cause.SLOW_LINK),  # the newest
        (facts(causes=[Cause.WRONG_CERTIFICATE]), Cause.AT_WORK),  # healed, or it could not be in a round
        (facts(clock=3600.0), Cause.CLOCK_OFF),
        (facts(clock=-59.0), Cause.AT_WORK),
        (facts(asked=600.0, idle=30.0, causes=[Cause.HUNG_TRAINING]), Cause.HALF_OPEN),  # its word is old
    ],
)
def test_a_diagnosis_follows_from_facts(found, cause):
    assert diagnose(found).cause is cause


@pytest.mark.parametrize(
    ("place", "known", "cause"),
    [
        ("eligible", vitals(), Cause.AT_WORK),
        ("eligible", vitals(clock=3600.0), Cause.CLOCK_OFF),
        ("eligible", vitals(causes=[Cause.EXPIRED_CERTIFICATE]), Cause.EXPIRED_CERTIFICATE),
        ("eligible", vitals(causes=[Cause.INTERRUPTED, Cause.WRONG_CERTIFICATE]), Cause.WRONG_CERTIFICATE),
        ("eligible", vitals(causes=[Cause.INTERRUPTED]), Cause.INTERRUPTED),
        ("eligible", vitals(causes=[Cause.INTERRUPTED, Cause.EVICTED]), Cause.EVICTED),
        ("eligible", vitals(clock=3600.0, causes=[Cause.INTERRUPTED]), Cause.CLOCK_OFF),
        ("offline", vitals(), Cause.OFFLINE),
        ("not-eligible", vitals(), Cause.NOT_ELIGIBLE),
        ("not-eligible", vitals(causes=[Cause.DISK_FULL]), Cause.DISK_FULL),
        ("wrong-version", vitals(causes=[Cause.OUT_OF_MEMORY]), Cause.WRONG_VERSION),
        ("quarantined", vitals(causes=[Cause.OUT_OF_MEMORY]), Cause.QUARANTINED),
        ("offline", vitals(causes=[Cause.WRONG_VERSION]), Cause.WRONG_VERSION),  # its calls are refused
    ],
)
def test_a_standing_has_a_cause_too(place, known, cause):
    assert standing(Candidate("d", place), known).cause is cause


def test_every_cause_has_advice_and_every_wait_has_words():
    assert set(ADVICE) == set(Cause)
    wait = Wait("2 of 4 devices", Cause.AT_WORK, "2 at work", 43_400.0)
    assert str(wait) == "waiting for 2 of 4 devices because 2 at work, until 12:03:20 UTC"
    assert str(Wait("its turn", Cause.QUEUE, "")) == "waiting for its turn because queue"
    found = [wait_of(kind("x"), 1.0).cause for kind in (DiskFull, StateLocked, ConnectionFailed)]
    assert found == [Cause.SERVER_DISK_FULL, Cause.DATABASE_LOCKED, Cause.DATABASE_LOST]


def test_the_cause_of_an_answer_is_the_given_one_or_that_of_its_reason():
    assert cause_of("offline", Cause.HALF_OPEN) == "half-open"
    assert cause_of(Rejection.OUT_OF_MEMORY.value) == "out-of-memory"
    assert cause_of("non-finite") == ""  # the answer itself was wrong


# --- the board ----------------------------------------------------------------------------------------


def test_the_board_has_its_room_from_the_start_and_is_private(tmp_path):
    board = Board(tmp_path / BOARD_FILE)
    board.open()
    status = os.stat(tmp_path / BOARD_FILE)
    assert status.st_size == BOARD_BYTES
    assert status.st_blocks * 512 >= BOARD_BYTES
    assert status.st_mode & 0o777 == 0o600
    board.write({"time": time.time(), "runs": {"r1": {"a": "x" * 1000}}})
    board.write({"time": time.time(), "runs": {"r1": {"a": "y"}}})  # shorter: nothing of the first shows
    assert read_board(tmp_path) == {"r1": {"a": "y"}}
    assert os.stat(tmp_path / BOARD_FILE).st_size == BOARD_BYTES
    board.write({"runs": "z" * BOARD_BYTES})  # too long: the old one stays
    assert read_board(tmp_path) == {"r1": {"a": "y"}}
    board.close()
    board.write({})  # of no effect
    assert read_board(tmp_path, wall=lambda: time.time() + 60) == {}  # stale


@pytest.mark.parametrize("content", [b"", b"12 ab\n", b"no number\nxx", b"5 " + b"0" * 64 + b"\n{}   "])
def test_a_board_that_is_damaged_says_nothing(tmp_path, content, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (tmp_path / BOARD_FILE).write_bytes(content)
    assert read_board(tmp_path) == {}


def test_without_room_there_is_no_board_and_the_watch_goes_on(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    board = Board(tmp_path / BOARD_FILE)
    board.open()
    board.write({"time": 0})
    assert "No space left" in caplog.text


# --- the watch ----------------------------------------------------------------------------------------


@dataclass
class Attempt:
    facts: dict
    round: int = 3
    attempt: int = 1
    asked: int = 4
    until: float = 43_400.0

    def open(self):
        return self.facts


@dataclass
class View:
    known: dict = field(default_factory=dict)
    store_error: Exception | None = None

    def vitals(self, device_id):
        return self.known.get(device_id, vitals())

    def troubled(self):
        return list(self.known.items())


@pytest.fixture
def watch(tmp_path):
    meters = Meters()
    made = Watchdog(View(), meters, tmp_path)
    made._board.open()
    made.meters, made.folder = meters, tmp_path
    yield made
    made.close()


def sample(watch, name, **labels):
    return watch.meters.registry.get_sample_value(name, labels)


def test_a_run_is_told_with_its_wait_and_its_faults(watch, caplog):
    caplog.set_level(logging.WARNING)
    watch.begins("r1")
    gone = facts(asked=600.0, idle=40.0, lost=30.0, streaming=False)
    watch.attends("r1", Attempt({"d1": facts(), "d2": gone}))
    watch.chooses_from("r1", lambda: [Candidate("d3", "offline"), Candidate("d4", "eligible")])
    told = watch.look()["runs"]["r1"]
    assert told["wait"]["words"] == (
        "waiting for 2 of 4 devices because 1 at work, 1 gone, until 12:03:20 UTC"
    )
    assert [(d["device_id"], d["cause"], d["asked"]) for d in told["devices"]] == [
        ("d2", "gone", True),
        ("d3", "offline", False),
    ]
    assert read_board(watch.folder)["r1"] == told
    assert sample(watch, "lepton_run_faults", run="r1", cause="gone") == 1
    records = [r for r in caplog.records if getattr(r, "cause", "") == "gone"]
    assert [(r.run, r.round, r.device) for r in records] == [("r1", 3, "d2")]
    watch.look()
    assert len([r for r in caplog.records if getattr(r, "cause", "") == "gone"]) == 1  # said once

    watch.waits("r1", Wait("the database", Cause.DATABASE_LOCKED, "held", 0.0))
    assert watch.look()["runs"]["r1"]["wait"]["cause"] == "database-locked"  # what holds the run itself
    assert sample(watch, "lepton_run_wait_cause", run="r1", cause="database-locked") == 1
    watch.waits("r1", None)
    watch.attends("r1", None)
    told = watch.look()["runs"]["r1"]
    assert told["wait"] is None
    assert [d["cause"] for d in told["devices"]] == ["offline"]
    assert sample(watch, "lepton_run_faults", run="r1", cause="gone") is None
    assert sample(watch, "lepton_run_wait_cause", run="r1", cause="database-locked") is None
    watch.ends("r1")
    assert watch.look()["runs"] == {}
    assert sample(watch, "lepton_run_faults", run="r1", cause="offline") is None


def test_a_database_that_nobody_can_write_is_named_before_the_run_stumbles_over_it(watch):
    watch.attends("r1", Attempt({"d1": facts()}))
    watch._fleet.store_error = StateLocked("lepton.db is locked.")
    assert watch.look()["runs"]["r1"]["wait"]["cause"] == "database-locked"
    watch._fleet.store_error = None
    assert watch.look()["runs"]["r1"]["wait"]["cause"] == "at-work"


def test_a_full_disk_is_named_before_a_write_fails(watch, monkeypatch):
    real = os.statvfs

    def full(path):
        return os.statvfs_result([*real(path)[:4], 3, *real(path)[5:]])  # blocks left

    watch.attends("r1", Attempt({"d1": facts()}))
    assert watch.look()["runs"]["r1"]["wait"]["cause"] == "at-work"
    monkeypatch.setattr(os, "statvfs", full)
    wait = watch.look()["runs"]["r1"]["wait"]
    assert wait["cause"] == "server-disk-full"
    assert "KiB are left on the disk" in wait["why"]


def test_a_large_fleet_is_summed_up(watch):
    watch.chooses_from("r1", lambda: [Candidate(f"d{i}", "offline") for i in range(500)])
    told = watch.look()["runs"]["r1"]
    assert (len(told["devices"]), told["more"]) == (module.MOST_DEVICES, 480)
    rows = troubles(live_of(told), [], {"d0": "kitchen"})
    assert rows[0]["device"] == "kitchen"
    assert rows[-1]["device"] == "480 more"


def live_of(told):
    from lepton_server.report import Live

    return Live(told["wait"], told["devices"], told["more"])


def test_a_watch_that_stumbles_goes_on(watch, monkeypatch, caplog):
    monkeypatch.setattr(module, "TICK_S", 0.01)
    watch.begins("r1")
    looks = []

    def stumble():
        looks.append(1)
        raise RuntimeError("a defect")

    monkeypatch.setattr(watch, "look", stumble)
    watch.start()
    ends = time.monotonic() + 30
    while len(looks) < 3:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert "stumbled" in caplog.text


# --- what run show makes of it ------------------------------------------------------------------------


@dataclass
class Shown:
    id: str = "r1"
    finished: bool = False
    waiting: str = ""


def test_a_coordinator_that_is_down_is_what_its_runs_wait_for(tmp_path):
    assert live(tmp_path, Shown()).row()["cause"] == "coordinator-down"
    assert live(tmp_path, Shown(finished=True)).row() == {}
    assert live(tmp_path / "elsewhere", Shown()).row() == {}  # the state is on another machine


def test_what_the_last_attempt_lacked_is_listed_with_advice():
    parts = [
        {"device_id": "d1", "attempt": 1, "cause": "gone", "detail": "old"},
        {"device_id": "d1", "attempt": 2, "cause": "", "detail": ""},
        {"device_id": "d2", "attempt": 2, "cause": "out-of-memory", "detail": "killed"},
    ]
    rows = troubles(live_of({"wait": None, "devices": [], "more": 0}), parts, {})
    assert [(r["device"], r["cause"]) for r in rows] == [("d2", "out-of-memory")]
    assert "memory" in rows[0]["advice"]
    json.dumps(rows)
