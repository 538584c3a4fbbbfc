"""A recorded run happens again: the journals are those of the coordinator's own book and store."""

import json
import threading
from random import Random

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, NotFound, RunError, StateCorrupt
from lepton_fl.files import BlobStore
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Work
from lepton_fl.rounds.exchange import Answer
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import EvaluateReply, Ticket, TrainReply
from lepton_server.book import Checkpoints, RunBook, save_model
from lepton_server.ops import Meters
from lepton_server.patience import Patience
from lepton_server.requests import journal_lines
from lepton_server.store import open_store
from lepton_simulations.world import Replay, World, WorldConfig

IDS = tuple(f"d-{i:02}" for i in range(12))
DEVICES = {
    "classes": [
        {"speed": {"kind": "lognormal", "median": 50.0, "sigma": 0.8}, "jitter": 0.3, "latency_s": 0.1}
    ]
}
FAULTS = {
    "drop_training": 0.15,
    "drop_out": 0.1,
    "silence_s": 6.0,
    "corrupt": 0.17,
    "crash_rounds": [2],
    "restart_s": 30.0,
}
SPEC = RunSpec(
    task="tests.none:task",
    rounds=4,
    cohort={"size": 5, "over_selection": 1.6, "min_reports": 4, "deadline_s": 40.0, "fill_wait_s": 0.0},
    early_stop={"metric": "loss"},
)
WORK = Work(SPEC.task, "1", "0" * 64, 3, TrainingLoss())


class Crash(Exception):
    pass


class VirtualExchange:
    """Devices that pull the model towards their own point, in the time that a world says."""

    def __init__(self, world):
        self.world, self.asked = world, []

    def ask(self, plan, request):
        clock, began = self.world.clock, self.world.clock()
        self.asked.append(plan)
        if self.world.crashes(plan):
            clock.advance_to(began + self.world.downtime_s(plan))
            raise Crash
        fates = self.world.fates(plan, lambda device_id: 100, 0, 0)
        for fate in fates:
            if fate.arrives_s > plan.deadline_s:
                clock.advance_to(began + plan.deadline_s)
                return
            clock.advance_to(began + fate.arrives_s)
            records = self.reply(plan, request, fate) if fate.answers else fate.word()
            yield Answer(fate.device_id, records, 100 if fate.answers else 0)

    def reply(self, plan, request, fate):
        sums = {"loss_sum": np.array([2.0]), "examples": np.array([2])}
        ticket, size = Ticket.of(plan), 3
        if plan.kind == "evaluate":
            honest = EvaluateReply(ticket, "1", 2, sums, fate.seconds)
        else:
            update = np.full(size, 1000 * (1 + IDS.index(fate.device_id)), np.int32)
            honest = TrainReply(ticket, "1", 2, update, sums, fate.seconds)
        return self.world.spoil(fate, honest.to_records())

    def tell(self, plan, device_id, refusal):
        pass


class VirtualRoster:
    def __init__(self, world):
        self.world = world

    def candidates(self):
        return self.world.candidates(self.world.clock())

    def wait(self, seconds):
        clock = self.world.clock
        clock.advance_to(min(self.world.next_change(clock()), clock() + seconds))


class Recorded:
    """Runs campaigns into one coordinator's store, in virtual time."""

    def __init__(self, folder):
        self.world = None

        def clock() -> float:
            return 1.7e9 + (self.world.clock() if self.world else 0.0)

        self.store = open_store(folder / "lepton.db", clock=clock)
        self.checkpoints = Checkpoints(self.store, BlobStore(folder / "blobs"))
        for number, device_id in enumerate(IDS):
            self.enrol(number, device_id)

    def enrol(self, number, device_id):
        token, record = f"t-{number}", self.store.record
        secret = f"{number:064x}"
        record("token.created", {"token_id": token, "secret_sha256": secret, "expires_at": 2e9})
        record("token.used", {"token_id": token, "device_id": device_id})
        body = {"device_id": device_id, "name": device_id, "token_id": token, "cert_serial": f"{number:x}"}
        record("device.enrolled", body | {"public_key": f"{number:080}", "cert_not_after": 2e9})

    def run(self, run_id, world, spec=SPEC):
        self.world = world
        store, blobs = self.store, self.checkpoints.blobs
        store.record("run.queued", {"run_id": run_id, "name": run_id, "spec": spec.to_json()})
        store.record("run.started", {"run_id": run_id})
        model = np.zeros(3, np.float32)
        first = {"model_sha256": save_model(blobs, model), "run_id": run_id, "round": 0}
        store.record("model.created", first)
        meters, state = Meters(), RunState(model)
        patience = Patience(store, run_id, meters, closing=threading.Event(), stopping=lambda: False)
        exchange, last = VirtualExchange(world), [state]
        while True:
            book = RunBook(self.checkpoints, run_id, spec, meters, patience)
            campaign = Campaign(
                spec,
                run_id,
                WORK,
                exchange,
                VirtualRoster(world),
                Keeping(book, last),
                Random(3),
                clock=world.clock,
            )
            try:
                verdict = campaign.run(last[0])
            except Crash:
                plan = exchange.asked[-1]
                body = {"run_id": run_id, "round": plan.round, "attempt": plan.attempt}
                body |= {"cause": "the coordinator was restarted", "participation": []}
                store.record("round.abandoned", body)
                store.record("run.started", {"run_id": run_id})
                last[0] = RunState(last[0].model, round=plan.round - 1, attempt=plan.attempt)
                last[0] = RunState(**{**vars(last[0]), "evaluated": plan.round - 1})
                continue
            body = {"run_id": run_id, "verdict": verdict.outcome, "reason": verdict.reason}
            store.record("run.finished", body | {"rounds": store.run(run_id).committed})
            return verdict

    def export(self, run_id, path):
        path.write_bytes(b"".join(journal_lines(self.store, self.store.run(run_id))))
        return path

    def story(self, run_id):
        """What happened: who took part in what order, with which outcome, and when it closed."""
        lines = []
        kinds = ("round.planned", "round.committed", "round.abandoned", "round.evaluated")
        for event in self.store.events(kinds=kinds, subject=run_id):
            came = [p for p in event.body.get("participation", []) if p["arrived_s"] is not None]
            came.sort(key=lambda p: (round(p["arrived_s"], 6), p["device_id"]))
            parts = [(p["device_id"], p["outcome"], p["reason"]) for p in came]
            cohort = sorted(event.body["plan"]["cohort"]) if event.kind == "round.planned" else None
            seconds = event.body.get("seconds")
            lines.append((event.kind, event.body["round"], event.body.get("attempt"), cohort, parts, seconds))
        return lines

    def times(self, run_id):
        return [e.time - 1.7e9 for e in self.store.events(subject=run_id) if e.kind.startswith("round.")]


class Keeping:
    """A book that also keeps the last committed state, as a coordinator would find it after a crash."""

    def __init__(self, book, last):
        self.book, self.last = book, last

    def __getattr__(self, name):
        return getattr(self.book, name)

    def committed(self, round_):
        self.book.committed(round_)
        self.last[0] = round_.state


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with over-selection, drop-outs, corrupt replies, an abandoned attempt and a crash; its export."""
    folder = tmp_path_factory.mktemp("recorded")
    works = Recorded(folder)
    world = World.build(WorldConfig.of(devices=DEVICES, faults=FAULTS), IDS, seed=5)
    verdict = works.run("first", world)
    assert verdict.outcome == "completed", verdict
    yield works, works.export("first", folder / "first.jsonl")
    works.store.close()


def test_what_is_read(recorded):
    works, path = recorded
    replay = Replay.read(path)
    assert (replay.run_id, replay.spec, replay.rounds) == ("first", SPEC, 4)
    assert set(replay.devices) <= set(IDS)
    assert set(replay.rows.values()) == {2}
    assert set(replay.rows) < set(IDS)  # the corrupt ones never counted
    assert replay.evaluates_on_devices
    assert not replay.without_evaluations().evaluates_on_devices
    assert [a.round for a in replay.attempts if a.kind == "evaluate"] == [1, 2, 3, 4]
    assert sum(a.crashed for a in replay.attempts) == 1
    outcomes = {(p.outcome, p.reason) for a in replay.attempts for p in a.parts}
    assert {("counted", ""), ("surplus", ""), ("dropped", "offline")} < outcomes
    assert any(o == "rejected" for o, _ in outcomes)
    committed = [a for a in replay.attempts if a.committed]
    rows = [r for r in works.store.rounds("first") if r.state == "committed"]
    for attempt, row in zip(committed, rows, strict=True):
        assert attempt.seconds == row.seconds
        parts = {p.device_id: p for p in works.store.participation("first", attempt.round)}
        for part in attempt.counted:
            found = parts[part.device_id]
            assert (part.seconds, part.examples, part.bytes_up) == (found.seconds, 2, 100)


def test_it_happens_again(recorded, tmp_path):
    works, path = recorded
    replay = Replay.read(path)
    verdict = works.run("second", replay.world())
    assert verdict.outcome == "completed"
    first, second = works.story("first"), works.story("second")
    for one, other in zip(first, second, strict=True):
        assert one[:5] == other[:5]  # the same cohorts, order of arrival, outcomes
        assert one[5] == pytest.approx(other[5])
    assert works.times("second") == pytest.approx(works.times("first"))
    models = [[m.sha256 for m in works.store.models(run)] for run in ("first", "second")]
    assert models[0] == models[1]
    again = Replay.read(works.export("second", tmp_path / "second.jsonl"))
    assert [a.key for a in again.attempts] == [a.key for a in replay.attempts]


def test_a_replay_goes_on_where_it_was_left(recorded):
    replay = Replay.read(recorded[1])
    resumed = replay.world()
    for attempt in replay.attempts:
        now = attempt.start_s
        resumed._next = None  # as in a new process: the clock alone says where it stands
        resumed.clock.advance_to(now)
        expected = {d for d, there in zip(replay.devices, resumed.standings(now), strict=True) if there}
        assert expected == set(attempt.cohort)
    end = replay.attempts[-1].start_s + replay.attempts[-1].seconds
    resumed._next = None
    assert not resumed.standings(end + 1).any()
    assert {c.reason for c in resumed.candidates(end + 1)} == {"the record ends here"}


def test_other_devices_play_the_recorded_ones(recorded):
    replay = Replay.read(recorded[1])
    names = [f"virtual {i}" for i in range(20)]
    world = replay.world(names)
    there = [c.device_id for c in world.candidates(0.0) if c.standing == "eligible"]
    assert there == [names[i] for i, d in enumerate(replay.devices) if d in replay.attempts[0].cohort]
    with pytest.raises(ConfigError, match=r"about \d+ devices, the simulated fleet has 3"):
        replay.world(names[:3])


def test_a_round_that_was_not_recorded(recorded):
    replay = Replay.read(recorded[1])
    exchange = VirtualExchange(replay.world())
    spec = SPEC.model_copy(update={"rounds": 9})
    roster = VirtualRoster(exchange.world)
    plan = Campaign(spec, "x", WORK, exchange, roster, None, Random(0))._plan(
        "train", 7, RunState(np.zeros(3, np.float32), attempt=1), IDS[:2], 2
    )
    with pytest.raises(RunError, match="no train round 7, attempt 1"):
        exchange.world.fates(plan, lambda d: 1, 0, 0)


# --- bad files --------------------------------------------------------------------------------------


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def bad(tmp_path, lines):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def changed(line, **fields):
    return json.dumps({**json.loads(line), **fields}).encode() + b"\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ls: [], "line 1 cannot be read: it is cut short"),
        (lambda ls: [b"[]\n"], "line 1 cannot be read: it holds no JSON object"),
        (lambda ls: [changed(ls[0], format="lepton run journal 9")], "says format 'lepton run journal 9'"),
        (lambda ls: [*ls[:4], ls[4][:-40]], "line 5 cannot be read: it is cut short"),
        (lambda ls: [*ls[:4], b"\xff\xfe\n"], "line 5 cannot be read"),
        (lambda ls: [*ls[:4], changed(ls[4], time=5.0)], "line 5 was altered"),
        (lambda ls: [*ls[:4], changed(ls[4], seq="x")], "line 5 was altered"),
        (lambda ls: [*ls[:4], changed(ls[4], surprise=1)], "line 5 is not an event"),
        (lambda ls: [*ls[:5], ls[4], *ls[5:]], "line 6 does not come after"),
        (lambda ls: [ls[0], *ls[2:]], "none says what the run was asked for"),
        (lambda ls: [line for line in ls if b'"round.planned"' not in line], "which is not open"),
        (lambda ls: ls[:4], "no round was committed"),
    ],
)
def test_a_damaged_file_is_refused_and_the_line_named(recorded, tmp_path, spoil, message):
    path = bad(tmp_path, spoil(lines_of(recorded[1])))
    with pytest.raises(StateCorrupt) as error:
        Replay.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_two_runs_in_one_file(recorded, tmp_path):
    works, path = recorded
    store = works.store
    store.record("run.queued", {"run_id": "other", "name": "other", "spec": SPEC.to_json()})
    other = works.export("other", tmp_path / "other.jsonl")
    both = bad(tmp_path, lines_of(path) + lines_of(other)[1:])
    with pytest.raises(StateCorrupt, match="is about 'other', the lines before it about 'first'"):
        Replay.read(both)


def test_there_is_no_file(tmp_path):
    with pytest.raises(NotFound, match="no journal"):
        Replay.read(tmp_path / "none.jsonl")


def test_a_run_that_goes_on_can_be_replayed_as_far_as_it_is(recorded, tmp_path):
    lines = lines_of(recorded[1])
    last = max(i for i, line in enumerate(lines) if b'"round.planned"' in line)
    replay = Replay.read(bad(tmp_path, lines[: last + 1]))
    assert replay.rounds == 3
    assert not [a for a in replay.attempts if a.round == 4]


def test_a_simulation_is_replayed_from_its_own_journal(tmp_path):
    """The record alone says who dropped out and when; the weights are the same."""
    from lepton_simulations import run_scenario
    from lepton_simulations.config import SimulationConfig

    scenario = {
        "run": {
            "task": "digits",
            "rounds": 3,
            "cohort": {"size": 4, "over_selection": 1.5, "min_reports": 2},
            "local": {"epochs": 1},
        },
        "data": {"partition": {"kind": "iid", "clients": 10}},
        "engine": {"workers": 0},
        "devices": {"classes": [{"speed": {"kind": "lognormal", "median": 300.0, "sigma": 0.5}}]},
        "faults": {"drop_training": 0.25, "crash_rounds": [2]},
        "output": {"folder": str(tmp_path / "first"), "plots": False, "tensorboard": False},
    }
    first = run_scenario(SimulationConfig.model_validate(scenario))
    journal = tmp_path / "first" / "journal.jsonl"
    again = {**scenario, "devices": {}, "faults": {}, "replay": {"file": str(journal)}}
    again["output"] = {**scenario["output"], "folder": str(tmp_path / "second")}
    second = run_scenario(SimulationConfig.model_validate(again))
    assert first.verdict == second.verdict
    assert first.weights_sha256 == second.weights_sha256
    runs = [Replay.read(r.folder / "journal.jsonl") for r in (first, second)]
    for one, other in zip(*(run.attempts for run in runs), strict=True):
        assert one.key == other.key
        assert set(one.cohort) == set(other.cohort)
        assert [p.device_id for p in one.counted] == [p.device_id for p in other.counted]
        assert (one.start_s, one.seconds) == pytest.approx((other.start_s, other.seconds))
        assert one.crashed == other.crashed


@pytest.mark.parametrize("whose", ["The recorded run's", "The scenario's"])
def test_buffered_runs_are_not_replayed(tmp_path, whose):
    from lepton_simulations import run_scenario
    from lepton_simulations.config import SimulationConfig

    def scenario(mode, folder, replay=""):
        run = {"task": "digits", "rounds": 2, "cohort": {"size": 2}, "local": {"max_steps": 1}, "mode": mode}
        output = {"folder": str(folder), "plots": False, "tensorboard": False}
        body = {
            "run": run | {"evaluate_every": 0},
            "data": {"partition": {"kind": "iid", "clients": 4}},
            "engine": {"workers": 0},
            "output": output,
            "replay": {"file": str(replay)},
        }
        return SimulationConfig.model_validate(body)

    modes = ["buffered", "synchronous"] if whose == "The recorded run's" else ["synchronous", "buffered"]
    run_scenario(scenario(modes[0], tmp_path / "first"))
    with pytest.raises(ConfigError, match=f"{whose} run.mode is 'buffered', and only rounds"):
        run_scenario(scenario(modes[1], tmp_path / "second", tmp_path / "first" / "journal.jsonl"))
    assert not (tmp_path / "second").exists()
