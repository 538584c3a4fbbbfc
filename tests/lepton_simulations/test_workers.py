"""Worker processes: answers in order, deaths named, nobody left behind."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lepton_fl.errors import DiskFull, Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import UpdateBatch
from lepton_fl.wire.records import Records
from lepton_simulations import workers as module
from lepton_simulations.backend import Alone, Outcome, Part, Trained, chunks
from lepton_simulations.workers import Pool, cores_of

MODEL = np.array([1.0, 2.0, 3.0], np.float32)
PLAN = RoundPlan.from_json(
    {
        "run_id": "run",
        "round": 1,
        "attempt": 1,
        "kind": "train",
        "task": "toy:task",
        "task_version": "1",
        "layout_digest": "",
        "num_coordinates": 3,
        "model_sha256": "",
        "cohort": ["a"],
        "wanted_reports": 1,
        "min_reports": 1,
        "deadline_s": 60.0,
        "local": {},
        "weighting": "examples",
        "max_weight": 2**20,
        "grid_step": 2.0**-24,
        "nonce": "00",
    }
)


@dataclass(frozen=True)
class Question:
    """Stands for a request: what a worker is told of it."""

    model: np.ndarray
    factor: int
    auxiliary: None = None

    def to_records(self) -> Records:
        return Records({"model": self.model}, {"factor": self.factor, "auxiliary-sha256": ""}, {})


@dataclass
class Toy:
    """Devices named by what they do."""

    size: int = 3
    update_size: int = 3
    auxiliary: int = 0
    chunk: int = 3
    on_gpu: bool = False
    is_plain: bool = False

    def act(self, device_id: str, should_stop: Callable[[], bool]) -> None:
        act, _, argument = device_id.partition(" ")
        if act == "parent" and os.getpid() == int(argument):
            raise ZeroDivisionError
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "full":
            raise DiskFull("No space was left.", hint="Free some.")
        if act == "once" and not Path(argument).exists():
            Path(argument).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "loop":
            while not should_stop():
                time.sleep(0.01)
        if act == "hang":
            time.sleep(1000)
        if act == "wait":
            time.sleep(float(argument))

    def train(self, plan, model, auxiliary, devices, accumulator, should_stop) -> Part:
        """A device of name d<n> has the update n times the model, and the weight n."""
        for device_id in devices:
            self.act(device_id, should_stop)
        refused = {
            d: UpdateRejected(Rejection.FAILED, "it is " + d) for d in devices if d.startswith("refuse")
        }
        numbers = [number(d) for d in devices if d not in refused]
        updates = np.array([model * n for n in numbers], np.int32).reshape(-1, 3)
        accumulator.add(UpdateBatch(updates, np.array(numbers, np.int64)))
        names = [d for d in devices if d not in refused]
        return Part([Trained(d, n, n / 3, 7) for d, n in zip(names, numbers, strict=True)], refused)

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        if device_id == "refuse":
            return UpdateRejected(Rejection.DATA_CONTRACT, "row 3 is NaN", hint="repair it")
        self.act(device_id, should_stop)
        update = (request.arrays["model"] * request.config["factor"]).astype(np.int32)
        metrics = {"seconds": 0.1, "sum.x": [float("nan"), 1 / 3], "pid": os.getpid()}
        return Records({"update": update}, {"round": 1}, metrics)


@pytest.fixture
def pool():
    with Pool(Toy(), 2) as it:
        yield it


def number(device_id: str) -> int:
    return int(device_id[1:]) if device_id[1:].isdigit() else 1


def begin(pool, *devices, factor=2, model=MODEL):
    pool.begin(PLAN, Question(model, factor))
    return pool.answer(devices)


def ask(pool, *devices, **question):
    return list(begin(pool, *devices, **question))


def train(pool, *devices, model=MODEL):
    """The sum, and what became of each device."""
    pool.begin(PLAN, Question(model, 1))
    parts = list(pool.train(devices, [1] * len(devices)))
    refused = {d: str(r) for part in parts for d, r in part.refused.items()}
    return pool.subtotal(), [t for part in parts for t in part.trained], refused


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
    answers = begin(pool, "a", "loop 1", "loop 2")
    next(answers)
    answers.close()
    assert [reason(o) for _, o in ask(pool, "b")] == ["answered"]


def test_a_worker_that_does_not_stop_is_replaced(pool, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    answers = begin(pool, "a", "hang")
    next(answers)
    answers.close()
    assert [reason(o) for _, o in ask(pool, "b", "c")] == ["answered"] * 2


def test_answers_that_wait_for_an_earlier_one_are_bounded(pool):
    """While the first device is slow, no more than AHEAD answers per worker pile up."""
    answers = begin(pool, "wait 0.3", *(f"d{i}" for i in range(50)))
    next(answers)
    held = answers.gi_frame.f_locals["done"]
    assert len(held) <= module.AHEAD * 2
    assert len(list(answers)) == 50


# --- training in chunks ---------------------------------------------------------------------------------


def expected(numbers):
    return sum(n * n for n in numbers) * np.array([1, 2, 3])


def test_the_sum_is_exact_and_the_same_whoever_computes_it(pool):
    devices = [f"d{n}" for n in range(1, 40)]
    for backend in (pool, Alone(Toy())):
        for _ in range(2):  # a second attempt starts at zero
            subtotal, trained, refused = train(backend, *devices)
            assert_array_equal(subtotal.total, expected(range(1, 40)))
            assert (subtotal.weight, subtotal.reports) == (sum(range(1, 40)), 39)
            assert sorted(t.num_examples for t in trained) == list(range(1, 40))
            assert {t.loss_sum for t in trained} == {n / 3 for n in range(1, 40)}
            assert refused == {}


def test_devices_trained_later_in_the_attempt_are_added(pool):
    train(pool, "d1", "d2", "d3", "d4")
    assert len(list(pool.train(["d5"], [1]))) == 1
    assert_array_equal(pool.subtotal().total, expected([1, 2, 3, 4, 5]))
    assert_array_equal(pool.subtotal().total, expected([1, 2, 3, 4, 5]))  # asking changes nothing


def test_whoever_takes_a_sum_may_change_it():
    with Pool(Toy(), 1) as pool:
        subtotal, _, _ = train(pool, "d1", "d2")
        subtotal.total[:] = -1
        assert_array_equal(pool.subtotal().total, expected([1, 2]))


def test_a_refused_device_is_not_in_the_sum(pool):
    subtotal, trained, refused = train(pool, "d1", "refuse 1", "d2")
    assert_array_equal(subtotal.total, expected([1, 2]))
    assert (subtotal.reports, len(trained)) == (2, 2)
    assert refused == {"refuse 1": "it is refuse 1"}


def test_what_a_dead_worker_had_added_is_trained_again(pool, tmp_path):
    """Devices of its earlier chunks are reported once, and counted once."""
    devices = [f"d{n}" for n in range(1, 30)]
    devices[20] = f"once {tmp_path / 'died'}"
    subtotal, trained, refused = train(pool, *devices)
    numbers = [number(d) for d in devices]
    assert_array_equal(subtotal.total, expected(numbers))
    assert sorted(t.device_id for t in trained) == sorted(devices)
    assert refused == {}


def test_only_the_device_that_kills_its_worker_fails(pool):
    subtotal, trained, refused = train(pool, *(f"d{n}" for n in range(1, 9)), "die", "d9", "d10")
    assert_array_equal(subtotal.total, expected(range(1, 11)))
    assert (subtotal.reports, len(trained)) == (10, 10)
    assert list(refused) == ["die"]
    assert "exit code -9" in refused["die"]


def test_closing_early_stops_the_training(pool):
    pool.begin(PLAN, Question(MODEL, 1))
    parts = pool.train(["d1", "d2", "d3", "d4", "d5", "d6", "loop 1", "loop 2", "loop 3"], [1] * 9)
    next(parts)
    parts.close()
    subtotal, _, _ = train(pool, "d3")
    assert_array_equal(subtotal.total, expected([3]))


def test_a_worker_that_dies_with_more_to_do_loses_none_of_it(pool):
    """A second chunk is on its way to it when the parent finds out."""
    pool.begin(PLAN, Question(MODEL, 1))
    victim, other = pool._workers
    parts = pool.train(["wait 0.3", *(f"d{n}" for n in range(1, 9))], [1] * 9)
    waiting = deque([["d1", "d2"], ["d3"]])
    parts.close()
    victim.queue.append(["d4"])  # that it was given
    victim.process.kill()
    victim.process.join()
    pool._hand_to(victim, waiting)
    assert list(waiting) == [["d1", "d2"], ["d3"]]  # still to be handed out
    victim.queue.clear()
    pool._hand_to(other, waiting)
    assert (list(waiting), list(other.queue)) == ([["d3"]], [["d1", "d2"]])


def test_deaths_that_no_device_has_caused_change_no_result(pool, tmp_path):
    """As when memory runs out: the same devices, the same sum."""
    devices = [f"once {tmp_path / f'died {n}'}" for n in range(4)]
    subtotal, trained, refused = train(pool, *devices, "d3")
    assert (subtotal.reports, len(trained), refused) == (5, 5, {})
    assert_array_equal(subtotal.total, expected([1, 1, 1, 1, 3]))
    answers = ask(pool, *(f"once {tmp_path / f'died again {n}'}" for n in range(4)), "a")
    assert [reason(o) for _, o in answers] == ["answered"] * 5


def test_what_is_trained_again_after_an_earlier_call_is_not_reported_again(pool, tmp_path):
    """A round that asks for more devices, and a worker that dies then."""
    train(pool, "d1", "d2", "d3", "d4", "d5", "d6")
    later = [f"once {tmp_path / 'a'}", f"once {tmp_path / 'b'}"]
    parts = list(pool.train(later, [1, 1]))
    assert sorted(t.device_id for part in parts for t in part.trained) == sorted(later)
    assert_array_equal(pool.subtotal().total, expected([1, 2, 3, 4, 5, 6, 1, 1]))


def test_a_full_disk_is_nobodys_fault(pool):
    for work in (train, ask):
        with pytest.raises(DiskFull, match="No space was left") as caught:
            work(pool, "d1", "full")
        assert caught.value.hint == "Free some."
    assert train(pool, "d1", "d2")[0].reports == 2


def test_a_sum_outlives_a_worker_that_dies_after_it_has_trained(pool):
    """While it is idle, and while a device answers singly."""
    train(pool, "d1", "d2", "d3", "d4", "d5", "d6")
    for worker in list(pool._workers):
        worker.process.kill()
        worker.process.join()
    assert_array_equal(pool.subtotal().total, expected(range(1, 7)))
    list(pool.train(["d7", "d8"], [1, 1]))
    assert [reason(o) for _, o in pool.answer(["die", "a"])] == ["failed", "answered"]
    subtotal = pool.subtotal()
    assert_array_equal(subtotal.total, expected(range(1, 9)))
    assert (subtotal.reports, subtotal.weight) == (8, 36)


@pytest.mark.parametrize("core", [-1, 0, 1])
def test_idle_workers_that_died_are_replaced_whichever_core_they_were_on(pool, monkeypatch, core):
    monkeypatch.setattr(module, "current_core", lambda: core)
    for worker in list(pool._workers):
        worker.process.kill()
        worker.process.join()
    subtotal, trained, _ = train(pool, *(f"d{n}" for n in range(1, 17)))  # more than one chunk for each
    assert_array_equal(subtotal.total, expected(range(1, 17)))
    assert len(trained) == 16


def test_the_worker_on_our_own_core_is_woken_last(pool, monkeypatch):
    woken = []
    for number, worker in enumerate(pool._workers):
        worker.cores = frozenset({number})
    monkeypatch.setattr(module, "current_core", lambda: 0)
    monkeypatch.setattr(pool, "_hand_to", lambda worker, waiting: woken.append(waiting.popleft() and worker))
    pool._hand_out(deque([["a"], ["b"]]))
    assert woken == [pool._workers[1], pool._workers[0]]


# --- where the parent trains, too -----------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 3])
def helping(request):
    with Pool(Toy(is_plain=True), request.param) as it:
        yield it


def test_the_parent_takes_the_place_of_one_worker(helping):
    devices = [f"d{n}" for n in range(1, 40)]
    for _ in range(3):
        subtotal, trained, refused = train(helping, *devices)
        assert_array_equal(subtotal.total, expected(range(1, 40)))
        assert (subtotal.weight, subtotal.reports) == (sum(range(1, 40)), 39)
        assert sorted(t.num_examples for t in trained) == list(range(1, 40))
        assert refused == {}
        assert helping._own.reports > 0
        subtotal.total[:] = -1  # whoever takes it may change it
    assert [d for d, _ in ask(helping, "d1", "d2", "d3")] == ["d1", "d2", "d3"]
    assert_array_equal(train(helping, "d5")[0].total, expected([5]))


def test_its_core_is_left_to_it(pool, monkeypatch):
    first, second = pool._workers
    first.cores, second.cores = frozenset({0}), frozenset({1})
    pool._helps, handed = True, []
    monkeypatch.setattr(pool, "_hand_to", lambda worker, waiting: handed.append((worker, waiting.popleft())))
    for core, other in ((0, second), (1, first)):
        monkeypatch.setattr(module, "current_core", lambda core=core: core)
        waiting, handed[:] = deque([["a"], ["b"], ["c"]]), []
        assert pool._hand_out(waiting, pool._absent()) == ["b"]
        assert handed == [(other, ["a"]), (other, ["c"])]


def test_what_the_parent_cannot_train_is_left_to_the_workers(helping, caplog):
    devices = [f"d{n}" for n in range(1, 30)] + [f"parent {os.getpid()}"]
    devices.insert(3, devices.pop())
    subtotal, trained, refused = train(helping, *devices)
    assert_array_equal(subtotal.total, expected([number(d) for d in devices]))
    assert sorted(t.device_id for t in trained) == sorted(devices)
    assert refused == {}
    assert_array_equal(train(helping, "d5")[0].total, expected([5]))


def test_idle_workers_that_died_do_not_matter_to_it(helping):
    train(helping, "d1")
    for worker in list(helping._workers):
        worker.process.kill()
        worker.process.join()
    devices = [f"d{n}" for n in range(1, 30)]
    subtotal, trained, _ = train(helping, *devices)
    assert_array_equal(subtotal.total, expected(range(1, 30)))
    assert len(trained) == 29


def test_closing_early_leaves_nothing_of_it_behind(helping):
    helping.begin(PLAN, Question(MODEL, 1))
    parts = helping.train([f"d{n}" for n in range(1, 20)], [1] * 19)
    next(parts)
    parts.close()
    assert_array_equal(train(helping, "d3")[0].total, expected([3]))


@pytest.mark.parametrize(
    ("count", "size", "workers"), [(4, 10, 2), (5, 2, 2), (100, 33, 2), (7, 3, 4), (1, 9, 8)]
)
def test_parts_are_even_and_no_larger_than_the_chunk(count, size, workers):
    devices = [f"d{n}" for n in range(count)]
    parts = chunks(devices, [60] * count, size, workers)
    assert sorted(d for part in parts for d in part) == sorted(devices)
    assert max(map(len, parts)) <= size
    assert [len(part) for part in parts] == sorted(map(len, parts), reverse=True)  # the last are waited for
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) % workers == 0 or len(parts) == count


def test_parts_of_unlike_devices_have_the_same_work():
    costs = sorted(np.random.default_rng(0).lognormal(4, 0.8, 100).astype(int).tolist(), reverse=True)
    parts = chunks([str(n) for n in range(100)], costs, 33, 2)
    work = [sum(costs[int(d)] for d in part) for part in parts]
    assert len(parts) == 4
    assert max(work) < 1.5 * min(work)


def test_nobody_is_no_part_and_work_may_be_nothing():
    assert chunks([], [], 10, 2) == []
    assert chunks(["a", "b"], [0, 0], 10, 2) == [["a"], ["b"]]
    assert chunks(["a", "b", "c"], [10**9, 0, 0], 10, 2) == [["a"], ["b", "c"]]


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


def test_as_many_workers_as_cores_have_one_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1}, raising=False)
    assert cores_of(1) == [frozenset()]  # others may want the same core
    assert cores_of(2) == cores_of(5) == [frozenset({1}), frozenset({3})]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores_of(2) == [frozenset()]
