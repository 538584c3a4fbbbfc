"""Runs from the queue to the verdict, through crashes, stops, full disks and each other's company."""

import contextlib
import os
import threading
from collections import Counter
from random import Random

import numpy as np
import pytest

from lepton_fl.errors import DiskFull, Rejection, StateLocked
from lepton_fl.files import BlobStore
from lepton_fl.rounds.quantised import compressed
from lepton_fl.secagg.quantised import ring_bits
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Ticket, TrainReply
from lepton_server import patience
from lepton_server.book import RunBook, load_model, progress_of
from lepton_server.runs import RunDriver
from lepton_server.store import Store


def drive(works, run_id):
    """The run in this thread, so that a kill can be caught; as ``RunDriver._drive`` without its net."""
    driver = works.driver()
    driver._finish(run_id, driver._run(run_id))


def history(works, run_id):
    """Models and evaluations by round, the best, and the verdict."""
    rounds = [r for r in works.store.rounds(run_id) if r.state == "committed"]
    run = works.store.run(run_id)
    return (
        [(r.round, r.model_sha256, r.state_sha256, dict(r.metrics), dict(r.evaluated)) for r in rounds],
        (run.best_round, run.best_sha256, run.best_value, run.state, run.committed, run.model_sha256),
    )


SPEC = {"server": {"name": "fedadam", "learning_rate": 0.1}, "early_stop": {"metric": "loss"}}


def test_a_run_killed_around_any_record_goes_on_bit_for_bit(works, kill_at):
    works.queue("undisturbed", **SPEC)
    count = kill_at(0)
    drive(works, "undisturbed")
    expected, transactions = history(works, "undisturbed"), count["seen"]
    assert len(expected[0]) == 2
    assert transactions >= 10
    for number in range(1, transactions + 1):
        for when in ("before", "after"):
            run_id = works.queue(f"{when}-{number}", **SPEC)
            kill_at(number, when)
            with contextlib.suppress(
                kill_at.error
            ):  # the task was registered by the first run: one record fewer
                drive(works, run_id)
            kill_at(0)
            works.fleet.release(run_id)
            if not works.store.run(run_id).finished:
                drive(works, run_id)
            assert history(works, run_id) == expected, (number, when)
    works.unharmed()
    load_model(works.blobs, expected[1][1])
    for round_ in expected[0]:
        load_model(works.blobs, round_[1])


def test_an_attempt_that_a_crash_left_open_is_abandoned_by_name(works, kill_at):
    works.queue()
    kill_at(5)  # started, task, model, planned; then committed
    with pytest.raises(kill_at.error):
        drive(works, "r1")
    works.fleet.release("r1")
    works.fleet.open_attempt("r1", "aa")  # as it is found at a start
    honest, seen = works.exchange.script, []
    works.exchange.script = lambda *asked: seen.append(works.fleet._attempts.get("r1")) or honest(*asked)
    drive(works, "r1")
    assert set(seen) == {None}  # who still worked on it was told to leave, or there would be no quorum
    attempts = [(r.round, r.attempt, r.state, r.cause) for r in works.store.rounds("r1")]
    assert attempts == [
        (1, 1, "abandoned", "the coordinator was restarted"),
        (1, 2, "committed", ""),
        (2, 1, "committed", ""),
    ]
    works.unharmed()


def test_evaluations_that_say_nothing_about_the_watched_metric_are_not_counted_after_a_restart(
    works, kill_at
):
    def silent_at_first(device_id, plan, request):
        quiet = plan.kind == "evaluate" and plan.round in (2, 3)
        return None if quiet else honest(device_id, plan, request)

    honest = works.exchange.script
    works.exchange.script = silent_at_first
    spec = {"rounds": 4, "early_stop": {"metric": "loss", "patience": 2}, "central_data": "built-in"}
    works.queue("whole", **spec)
    drive(works, "whole")
    assert "All 4 rounds are done" in works.store.run("whole").reason
    works.queue("cut", **spec)
    kill_at(12)  # after two evaluations that had central figures only
    with pytest.raises(kill_at.error):
        drive(works, "cut")
    works.fleet.release("cut")
    drive(works, "cut")
    assert history(works, "cut") == history(works, "whole")


# --- the driver ---------------------------------------------------------------------------------------


def test_runs_queue_and_two_go_at_once(works):
    hold = threading.Event()
    honest = works.exchange.script

    def held(device_id, plan, request):
        hold.wait(30)
        return honest(device_id, plan, request)

    works.exchange.script = held
    for i in range(3):
        works.queue(f"r{i}", cohort={"size": 1, "min_reports": 1})
    driver = works.driver(max_concurrent_runs=2)
    driver.start()
    works.until(lambda: len(works.exchange.asked) == 2)
    assert [works.store.run(f"r{i}").state for i in range(3)] == ["running", "running", "queued"]
    first, second = works.exchange.asked
    assert not set(first.cohort) & set(second.cohort)
    hold.set()
    for i in range(3):
        assert works.finished(f"r{i}").state == "completed"
    works.until(lambda: driver.active() == 0)
    assert works.fleet.counts().busy == 0
    works.unharmed()


def test_two_runs_that_want_the_whole_fleet_take_turns_and_lose_no_round(works):
    for run_id in ("a", "b"):
        works.queue(run_id, rounds=4, evaluate_every=0, cohort={"size": 3, "min_reports": 3})
    works.driver().start()
    for run_id in ("a", "b"):
        assert works.finished(run_id).state == "completed"
        assert [r.state for r in works.store.rounds(run_id)] == ["committed"] * 4


def test_a_claim_takes_all_or_nothing(works):
    a, b, c = works.ids
    assert works.fleet.claim([a, b], "r1")
    assert not works.fleet.claim([b, c], "r2")
    assert works.fleet.claim([c], "r2")
    works.fleet.release("r1")
    assert works.fleet.claim([a, b, c], "r2")


@pytest.mark.parametrize("state", ["queued", "waiting", "asking"])
def test_a_stop_ends_a_run_whatever_it_does(works, monkeypatch, state):
    monkeypatch.setattr("lepton_server.exchange.STOP_S", 0.2)
    works.queue(cohort={"min_reports": 3, "deadline_s": 600})
    driver = works.driver(max_concurrent_runs=1)
    if state == "waiting":
        works.fleet.claim(works.ids[:1], "another")
        driver.start()
        works.until(lambda: works.store.run("r1").waiting)
    elif state == "asking":  # the real exchange: nobody answers
        driver._exchange = None  # the real one
        driver.start()
        works.until(lambda: works.store.rounds("r1"))
    works.store.record("run.stopping", {"run_id": "r1", "reason": "enough"})
    if state == "queued":
        driver.start()
    run = works.finished()
    assert run.state == "stopped", run.reason
    assert run.waiting == ""
    assert works.fleet.counts().busy == (state == "waiting")
    if state == "asking":
        (attempt,) = works.store.rounds("r1")
        assert attempt.cause == "Stopped on request: 0 of 3 reports: 3 offline"
    works.unharmed()


@pytest.mark.parametrize(("owner", "name"), [(RunDriver, "_record_start"), (RunBook, "planned")])
def test_a_stop_between_two_looks_is_a_stop_and_no_failure(works, monkeypatch, owner, name):
    works.queue()
    real = getattr(owner, name)

    def stop_first(self, *rest):
        works.store.record("run.stopping", {"run_id": "r1", "reason": ""})
        return real(self, *rest)

    monkeypatch.setattr(owner, name, stop_first)
    driver = works.driver()
    monkeypatch.setattr(driver, "_is_stopping", lambda run_id: lambda: False)  # it has not looked yet
    with pytest.raises(patience.Stopped):
        driver._run("r1")


@pytest.mark.parametrize("where", ["waiting", "asking", "building"])
def test_a_shutdown_leaves_the_run_to_be_continued(works, monkeypatch, where):
    works.queue(cohort={"min_reports": 3, "deadline_s": 600})
    driver = works.driver()
    if where == "waiting":
        works.fleet.claim(works.ids[:1], "another")
    driver._exchange = None  # the real one
    if where == "building":
        monkeypatch.setattr(driver, "_prepare", lambda *_: driver._closing.wait() and interrupted())
    driver.start()
    reached = {
        "waiting": lambda: works.store.run("r1").waiting,
        "asking": lambda: works.store.rounds("r1"),
        "building": lambda: works.store.run("r1").state == "running",
    }
    works.until(reached[where])
    driver.close()
    assert driver.active() == 0
    assert works.store.run("r1").state == "running"
    works.fleet.release("another")
    works.driver().start()
    assert works.finished().state == "completed"
    assert works.store.run("r1").waiting == ""
    works.unharmed()


def interrupted():
    raise patience.Interrupted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "lepton_fl.tasks.nowhere:task"}, "is not installed: there is no module"),
        ({"task": "nosuch"}, "There is no task 'nosuch'"),
        ({"task_version": "99"}, "installed is '1'"),
        ({"initial_model": "ab" * 32}, "There is no blob"),
        ({"early_stop": {"metric": "beauty"}}, "early_stop.metric is 'beauty'"),
        ({"cohort": {"quorum_wait_s": 0.1, "min_reports": 3, "groups": ("x",)}}, "No quorum within 0.1 s"),
    ],
)
def test_a_run_that_cannot_go_on_gets_a_verdict_that_says_why(works, changes, words):
    works.queue(**changes)
    works.driver().start()
    run = works.finished()
    assert run.state == "failed"
    assert words in run.reason
    works.unharmed()


def test_a_verdict_of_many_lines_is_recorded_as_one(works, monkeypatch):
    works.queue()
    driver = works.driver()
    monkeypatch.setattr(driver, "_prepare", lambda *_: (_ for _ in ()).throw(ValueError("a\nb\x1b[1m" * 900)))
    driver.start()
    run = works.finished()
    assert run.state == "failed"
    assert run.reason.startswith("Internal error: ValueError: a b [1ma")


def test_a_fleet_with_another_version_is_named_where_people_look(works):
    works.check_in(*works.ids[1:], version="0")
    works.queue()
    works.driver().start()
    cause = works.until(lambda: works.store.run("r1").waiting)
    assert cause == "1 of 3 eligible (2 needed): 2 wrong version"
    assert works.meters.registry.get_sample_value("lepton_run_waiting", {"run": "r1"}) == 1
    works.check_in(*works.ids)
    assert works.finished().state == "completed"
    assert works.store.run("r1").waiting == ""
    assert works.meters.registry.get_sample_value("lepton_run_waiting", {"run": "r1"}) == 0


def test_an_answer_out_of_any_range_costs_its_sender_only(works):
    bad = works.ids[0]
    honest = works.exchange.script

    def absurd(device_id, plan, request):
        records = honest(device_id, plan, request)
        if device_id == bad:
            records.metrics["seconds"] = -5.0 if plan.round == 1 else 1e300
            records.metrics["num-examples"] = 1 if plan.round == 1 else 2**62
        return records

    works.exchange.script = absurd
    works.queue()
    works.driver().start()
    assert works.finished().state == "completed"
    parts = {(p.device_id, p.outcome, p.reason) for p in works.store.participation("r1")}
    assert (bad, "rejected", "out-of-range") in parts
    assert Counter(outcome for _, outcome, _ in parts)["counted"] == 2
    told = {refusal.reason for device, refusal in works.exchange.told if device == bad}
    assert told == {Rejection.OUT_OF_RANGE}


# --- trouble that passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["blobs", "rows"])
def test_a_full_disk_holds_a_run_up_and_says_so(works, monkeypatch, what):
    monkeypatch.setattr(patience, "RETRY_S", 0.05)
    full = threading.Event()
    full.set()
    if what == "blobs":
        real_put = BlobStore.put

        def put(self, data):
            if full.is_set() and works.store.rounds("r1"):
                raise DiskFull("No space was left.", hint="Free some.")
            return real_put(self, data)

        monkeypatch.setattr(BlobStore, "put", put)
    else:
        real = Store.transaction

        @contextlib.contextmanager
        def transaction(self):
            if full.is_set() and works.store.rounds("r1"):
                raise StateLocked("lepton.db is locked by process 7 (backup).")
            with real(self) as change:
                yield change

        monkeypatch.setattr(Store, "transaction", transaction)
    works.queue()
    works.driver().start()
    sample = works.meters.registry.get_sample_value
    works.until(lambda: sample("lepton_run_waiting", {"run": "r1"}) == 1)
    if what == "blobs":  # a row still fits
        assert works.until(lambda: works.store.run("r1").waiting) == "No space was left."
    full.clear()
    assert works.finished().state == "completed"
    assert [r.state for r in works.store.rounds("r1")] == ["committed"] * 2  # the round was not trained again
    assert works.store.run("r1").waiting == ""
    works.unharmed()


def test_a_run_that_waits_for_space_can_be_stopped_and_left(works, monkeypatch):
    monkeypatch.setattr(patience, "RETRY_S", 0.05)

    def full(self, data):
        raise DiskFull("No space was left.")

    real = BlobStore.put
    monkeypatch.setattr(BlobStore, "put", full)
    works.queue("left")
    first = works.driver()
    first.start()
    works.until(lambda: works.store.run("left").waiting)
    first.close()
    assert works.store.run("left").state == "running"
    works.driver().start()
    works.queue("stopped")
    works.until(lambda: works.store.run("stopped").waiting)
    works.store.record("run.stopping", {"run_id": "stopped", "reason": ""})
    run = works.finished("stopped")
    assert run.state == "stopped"
    assert "No space was left." in run.reason
    monkeypatch.setattr(BlobStore, "put", real)
    assert works.finished("left").state == "completed"


def test_a_database_that_is_held_while_a_run_is_read_does_not_end_it(works, monkeypatch):
    import lepton_server.runs

    monkeypatch.setattr(lepton_server.runs, "RETRY_S", 0.05)
    real, failures = Store.events, iter(range(2))

    def events(self, *args, **kwargs):
        if kwargs.get("subject") == "r1" and next(failures, None) is not None:
            raise StateLocked("held")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Store, "events", events)
    works.queue()
    works.driver().start()
    assert works.finished().state == "completed"


def test_the_watch_survives_a_defect(works, monkeypatch):
    import lepton_server.runs

    monkeypatch.setattr(lepton_server.runs, "RETRY_S", 0.01)
    real, failures = Store.runs, iter(range(2))

    def runs(self, **options):
        if next(failures, None) is not None:
            raise ZeroDivisionError
        return real(self, **options)

    monkeypatch.setattr(Store, "runs", runs)
    works.queue()
    driver = works.driver()
    driver.start()
    works.until(lambda: works.exchange.asked)
    assert driver.is_watching()
    monkeypatch.setattr(Store, "runs", real)
    assert works.finished().state == "completed"


# --- checkpoints --------------------------------------------------------------------------------------


def test_old_checkpoints_go_and_the_first_the_best_and_shared_ones_stay(works):
    honest = works.exchange.script

    def worse_after_two(device_id, plan, request):
        records = honest(device_id, plan, request)
        if plan.kind == "evaluate" and plan.round > 2:
            records.metrics["sum.loss_sum"] = [1e6]
        return records

    works.exchange.script = worse_after_two
    spec = {"rounds": 8, "server": {"name": "fedavgm"}, "early_stop": {"metric": "loss"}}
    works.queue("short", **spec | {"rounds": 3})  # the same models: shares its blobs with the long one
    drive(works, "short")
    works.queue("long", **spec)
    drive(works, "long")
    models = {m.round: m.sha256 for m in works.store.models("long")}
    states = {r.round: r.state_sha256 for r in works.store.rounds("long")}
    shared = {m.round for m in works.store.models("short")}
    assert {m.sha256 for m in works.store.models("short")} <= set(models.values())
    assert works.store.run("long").best_round == 2
    assert {r for r, sha256 in models.items() if works.blobs.has(sha256)} == shared | {6, 7, 8}
    assert {r for r, sha256 in states.items() if works.blobs.has(sha256)} == {1, 2, 3, 6, 7, 8}


def test_checkpoints_that_a_kill_left_behind_are_dropped_later(works, monkeypatch, kill_at):
    from lepton_server.book import RunBook

    works.queue(rounds=7, evaluate_every=0)
    undone = RunBook._drop_old_checkpoints
    monkeypatch.setattr(RunBook, "_drop_old_checkpoints", lambda book: None)
    real = works.exchange.script

    def dying(device_id, plan, request):
        if plan.round == 6:
            raise kill_at.error
        return real(device_id, plan, request)

    works.exchange.script = dying
    with pytest.raises(kill_at.error):
        drive(works, "r1")
    monkeypatch.setattr(RunBook, "_drop_old_checkpoints", undone)
    works.fleet.release("r1")
    works.exchange.script = real
    driver = works.driver()
    driver._finish("r1", driver._run("r1"))
    models = {m.round: m.sha256 for m in works.store.models("r1")}
    assert {r for r, sha256 in models.items() if works.blobs.has(sha256)} == {0, 5, 6, 7}


def test_a_round_that_changes_nothing_does_not_cost_the_first_model(works):
    honest = works.exchange.script

    def idle_at_first(device_id, plan, request):
        records = honest(device_id, plan, request)
        if plan.kind == "train" and plan.round <= 2:
            records.arrays["update"] = np.zeros_like(records.arrays["update"])
        return records

    works.exchange.script = idle_at_first
    works.queue(rounds=7, evaluate_every=0)
    drive(works, "r1")
    models = {m.round: m.sha256 for m in works.store.models("r1")}
    assert models[0] == models[1] == models[2]
    assert works.blobs.has(models[0])


# --- revocation ---------------------------------------------------------------------------------------


def test_a_revoked_device_is_shut_out_in_mid_round_and_the_round_goes_on(works):
    works.queue(rounds=1, evaluate_every=0, cohort={"min_reports": 1, "max_attempts": 1})
    driver = works.driver()
    driver._exchange = None  # the real one
    works.fleet.on_revoked(driver.expel)
    driver.start()
    works.until(lambda: len(driver._keys) == 3)
    for device_id in works.ids:
        works.store.record("device.revoked", {"device_id": device_id, "reason": "lost"})
    works.fleet.follow()
    run = works.finished()
    assert run.state == "failed"
    assert "0 of 3 reports: 3 revoked" in run.reason
    assert {p.reason for p in works.store.participation("r1")} == {"revoked"}
    works.unharmed()


def test_one_refused_report_does_not_keep_the_others_from_the_journal(works):
    gone = works.ids[1]
    works.store.record(
        "device.revoked", {"device_id": gone, "reason": "lost"}
    )  # the fleet has not seen it yet
    works.fleet.flush(everything=True)
    reported = {d.id: bool(d.reported) for d in works.store.devices()}
    assert reported == {d: d != gone for d in works.ids}
    before = works.store.head_seq()
    works.fleet.flush(everything=True)
    assert works.store.head_seq() == before
    works.unharmed()


def test_a_run_in_few_bits_is_journalled_with_what_it_expects_and_begins_anew_after_a_lost_sum(works):
    lengths = {1: 0.01, 2: 0.01, 3: 0.9, 4: 0.9}

    def answer(device_id, plan, request):
        if plan.kind == "evaluate":
            return honest(device_id, plan, request)
        delta = np.random.default_rng(len(device_id)).normal(size=len(request.model)).astype(np.float32)
        delta *= lengths[plan.round] / np.linalg.norm(delta)
        sums = {"loss_sum": np.array([1.0]), "examples": np.array([2])}
        update = to_grid(delta, plan.grid_step, plan.clip_norm)
        reply = TrainReply(Ticket.of(plan), plan.task_version, 2, update, sums, 0.1).to_records()
        return compressed(request.to_records(), reply, os.urandom)

    honest, works.exchange.script = works.exchange.script, answer
    few = {"quantisation": {"bits": 4}, "clip_norm": 1.0, "weighting": "equal", "rounds": 4}
    drive(works, works.queue("r1", **few))
    run = works.store.run("r1")
    assert run.state == "completed", run.reason
    planned = [e.body["plan"] for e in works.store.events(kinds=("round.planned",), subject="r1")]
    first, tuned = 16, ring_bits(4, 3, len(load_model(works.blobs, run.model_sha256)))
    bits = [(p["round"], p["quantisation"]["bits"]) for p in planned if p["kind"] == "train"]
    assert bits == [(1, first), (2, tuned), (3, tuned), (3, first), (4, tuned)]
    (lost,) = works.store.events(kinds=("round.abandoned",), subject="r1")
    assert lost.body["wrapped"]
    assert f"left its ring of {tuned} bits" in lost.body["cause"]
    done = list(works.store.events(kinds=("round.committed",), subject="r1"))
    assert all({"quantisation_error", "ring_bits", "sum_norm"} <= e.body["metrics"].keys() for e in done)
    assert progress_of(works.store, "r1").expected == done[-1].body["expected"] > done[0].body["expected"]
    assert works.store.rebuild().equal
    works.unharmed()


def test_a_run_in_few_bits_killed_around_any_record_goes_on_with_the_same_rings(works, kill_at):
    def answer(device_id, plan, request):
        asked, reply = request.to_records(), honest(device_id, plan, request)
        return compressed(asked, reply, Random(f"{plan.round} {device_id}").randbytes)

    honest, works.exchange.script = works.exchange.script, answer
    few = {"quantisation": {"bits": 8}, "clip_norm": 100.0, "weighting": "equal", "evaluate_every": 0}
    works.queue("undisturbed", **few)
    count = kill_at(0)
    drive(works, "undisturbed")

    def rings(run_id):
        events = works.store.events(kinds=("round.planned",), subject=run_id)
        return {e.body["round"]: e.body["plan"]["quantisation"]["bits"] for e in events}

    for number in range(2, count["seen"] + 1):
        run_id = works.queue(f"after-{number}", **few)
        kill_at(number, "after")
        with contextlib.suppress(kill_at.error):
            drive(works, run_id)
        kill_at(0)
        works.fleet.release(run_id)
        if not works.store.run(run_id).finished:
            drive(works, run_id)
        assert works.store.run(run_id).state == "completed"
        assert rings(run_id) == rings("undisturbed")
