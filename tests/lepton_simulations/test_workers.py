"""Worker processes: answers in order, deaths named, nobody left behind."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.wire.records import Records
from lepton_simulations import workers as module
from lepton_simulations.workers import Outcome, Pool

MODEL = np.array([1.0, 2.0, 3.0], np.float32)


@dataclass
class Toy:
    """Devices named by what they do."""

    size: int = 3

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        act, _, argument = device_id.partition(" ")
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "refuse":
            return UpdateRejected(Rejection.DATA_CONTRACT, "row 3 is NaN", hint="repair it")
        if act == "loop":
            while not should_stop():
                time.sleep(0.01)
        if act == "hang":
            time.sleep(1000)
        if act == "wait":
            time.sleep(float(argument))
        update = (request.arrays["model"] * request.config["factor"]).astype(np.int32)
        metrics = {"seconds": 0.1, "sum.x": [float("nan"), 1 / 3], "pid": os.getpid()}
        return Records({"update": update}, {"round": 1}, metrics)


@pytest.fixture
def pool():
    with Pool(Toy(), 2) as it:
        yield it


def ask(pool, *devices, factor=2, model=MODEL):
    return list(pool.ask({"factor": factor}, model, devices))


def reason(outcome: Outcome) -> str:
    return outcome.reason.value if isinstance(outcome, UpdateRejected) else "answered"


def test_answers_come_in_the_order_asked_and_whole(pool):
    answers = ask(pool, "wait 0.2", "a", "b", "c", "wait 0.05", "d")
    assert [d for d, _ in answers] == ["wait 0.2", "a", "b", "c", "wait 0.05", "d"]
    for _, records in answers:
        assert_array_equal(records.arrays["update"], [2, 4, 6])
        assert records.arrays["update"].dtype == np.int32
        assert records.config == {"round": 1}
        assert np.isnan(records.metrics["sum.x"][0])
        assert records.metrics["sum.x"][1] == 1 / 3
    assert len({records.metrics["pid"] for _, records in answers} - {os.getpid()}) == 2


def test_each_question_has_its_own_model(pool):
    ask(pool, "a", "b")
    ((_, records),) = ask(pool, "a", model=MODEL * 10, factor=1)
    assert_array_equal(records.arrays["update"], [10, 20, 30])


def test_a_refusal_crosses_the_process_boundary(pool):
    ((_, refusal),) = ask(pool, "refuse")
    assert (refusal.reason, str(refusal), refusal.hint) == (
        Rejection.DATA_CONTRACT,
        "row 3 is NaN",
        "repair it",
    )


def test_a_worker_that_dies_fails_its_device_only(pool):
    answers = ask(pool, "a", "die 1", "b", "die 2", "die 3", "c")
    assert [reason(o) for _, o in answers] == [
        "answered",
        "failed",
        "answered",
        "failed",
        "failed",
        "answered",
    ]
    assert "exit code -9" in str(answers[1][1])
    assert [reason(o) for _, o in ask(pool, "a", "b", "c")] == ["answered"] * 3


def test_a_worker_that_dies_while_idle_is_replaced(pool):
    pids = {records.metrics["pid"] for _, records in ask(pool, "wait 0.1", "wait 0.1")}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for worker in pool._workers:
        worker.process.join()
    answers = ask(pool, "a", "b")
    assert [d for d, _ in answers] == ["a", "b"]
    assert not {o.metrics["pid"] for _, o in answers if isinstance(o, Records)} & pids


def test_closing_early_stops_those_who_still_train(pool):
    answers = pool.ask({"factor": 2}, MODEL, ["a", "loop 1", "loop 2"])
    next(answers)
    answers.close()
    assert [reason(o) for _, o in ask(pool, "b")] == ["answered"]


def test_a_worker_that_does_not_stop_is_replaced(pool, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    answers = pool.ask({"factor": 2}, MODEL, ["a", "hang"])
    next(answers)
    answers.close()
    assert [reason(o) for _, o in ask(pool, "b", "c")] == ["answered"] * 2


def test_answers_that_wait_for_an_earlier_one_are_bounded(pool):
    """While the first device is slow, no more than AHEAD answers per worker pile up."""
    answers = pool.ask({"factor": 2}, MODEL, ["wait 0.3", *(f"d{i}" for i in range(50))])
    next(answers)
    held = answers.gi_frame.f_locals["done"]
    assert len(held) <= module.AHEAD * 2
    assert len(list(answers)) == 50


def test_no_process_stays_behind():
    pool = Pool(Toy(), 2)
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_orphans_leave(monkeypatch):
    """A parent that is killed takes its workers with it."""
    monkeypatch.setattr(module, "PARENT_CHECK_S", 0.1)
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:  # a process of its own, so that it can be killed
        pool = Pool(Toy(), 2)
        os.write(write, " ".join(str(w.process.pid) for w in pool._workers).encode())
        time.sleep(1000)
    pids = [int(p) for p in os.read(read, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)
    os.close(read)
    os.close(write)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
