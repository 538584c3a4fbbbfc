"""SCAFFOLD, personal heads and FedBuff on Flower's public API: strategies, client app, Grid."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.testing import assert_allclose, assert_array_equal

from lepton_fl.errors import ConfigError, Rejection
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.sources import DeviceData
from lepton_fl.tasks.task import load_task
from lepton_fl.wire.messages import Request
from lepton_strategies import AppNodes, FedPer, LocalGrid, Scaffold, client_app, initial_arrays, run_campaign
from lepton_strategies.grid import GridDispatcher
from lepton_strategies.memory import ContextMemory
from lepton_strategies.model import from_arrays, trainer_of, work_of

torch.set_num_threads(1)
TASK = "lepton_fl.tasks.images:digits"
NODES = 3
LOCAL = {"learning_rate": 0.1, "batch_size": 16}


class Silent:
    """No exchange: the nodes are a client app's."""

    def candidates(self):
        return [Candidate(f"d{i}", "eligible") for i in range(NODES)]

    def wait(self, seconds): ...


@pytest.fixture(autouse=True)
def flower_process(monkeypatch):
    """Flower's runtime says who a process is before any message is made; here nothing else does."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def grid():
    task, rng = load_task(TASK), np.random.default_rng(0)

    def rows(number, n):
        y = rng.integers(0, 10, n)
        x = np.clip(rng.normal(8, 4, (n, 8, 8)) + y[:, None, None] - number, 0, 16).astype(np.uint8)
        return task.prepare(Dataset(x, y))

    data = {number: DeviceData(rows(number, 40), rows(number, 20)) for number in range(NODES)}
    app = client_app([TASK], data=lambda context, task: data[int(context.node_config["partition-id"])])
    nodes = AppNodes(app, NODES)
    grid = LocalGrid(Silent(), Silent(), nodes)
    grid.nodes = nodes
    return grid


class Messages:
    """A grid that is not in this process, as far as a strategy can tell: it sees messages only."""

    def __init__(self, grid):
        self._grid = grid

    def __getattr__(self, name):
        return getattr(self._grid, name)

    def send_and_receive(self, messages, *, timeout=None):
        return self._grid.send_and_receive(list(messages), timeout=timeout)


def settings(**local):
    return {
        "cohort": {"size": NODES, "min_reports": NODES, "fill_wait_s": 0.0},
        "local": {**LOCAL, **local},
        "evaluate_every": 0,
        "seed": 3,
    }


def test_scaffold_in_flowers_loop_keeps_the_controls_in_step(grid):
    strategy = Scaffold(TASK, **settings())
    strategy.start(grid=Messages(grid), initial_arrays=initial_arrays(TASK), num_rounds=3)
    server = strategy._state.server.slots["control"]
    own = [
        ContextMemory(context).recall(strategy._run_id, lambda r, a: True)["control"]
        for context in grid.nodes._contexts.values()
    ]
    assert len(own) == NODES
    assert np.abs(own).max() > 1e-3
    assert_allclose(server, np.mean(own, axis=0), atol=1e-5)


def test_a_personal_head_stays_in_the_nodes_context(grid):
    head = ("head.*",) if any(s.name.startswith("head.") for s in trainer_of(TASK).layout.slots) else None
    names = [s.name for s in trainer_of(TASK).layout.slots]
    patterns = head or (names[-2], names[-1])
    strategy = FedPer(TASK, personal=patterns, **settings())
    start = initial_arrays(TASK)
    result = strategy.start(grid=Messages(grid), initial_arrays=start, num_rounds=2)
    mask = trainer_of(TASK).layout.select(patterns)
    before, after = from_arrays(start), from_arrays(result.arrays)
    assert_array_equal(after[mask], before[mask])
    assert (after[~mask] != before[~mask]).any()


def test_a_wrong_pattern_is_refused_when_the_strategy_is_made():
    with pytest.raises(ConfigError, match="matches no tensor"):
        FedPer(TASK, personal=("no such layer",))


def test_a_round_that_was_given_up_leaves_no_trace(grid):
    """Flower's loop goes on with the next number: nobody may take the lost round for one that counted."""
    strategy = Scaffold(TASK, **settings())
    lossy = Messages(grid)
    lost = lossy.send_and_receive
    rounds = iter([False, True, False])

    def sometimes(messages, *, timeout=None):
        messages = list(messages)
        replies = list(lost(messages, timeout=timeout)) if messages else []
        return [] if messages and next(rounds) else replies  # no messages: there is no evaluation

    lossy.send_and_receive = sometimes
    strategy.start(grid=lossy, initial_arrays=initial_arrays(TASK), num_rounds=3)
    own = [
        ContextMemory(context).recall(strategy._run_id, lambda r, a: r == 3)["control"]
        for context in grid.nodes._contexts.values()
    ]
    assert strategy._state.retried == ((2, 0),)
    assert_allclose(strategy._state.server.slots["control"], np.mean(own, axis=0), atol=1e-5)


def test_a_context_forgets_another_run():
    context = Context(1, 1, {}, RecordDict(), {})
    memory = ContextMemory(context)
    memory.keep("one", 1, 1, {"control": np.ones(3, np.float32)})
    assert ContextMemory(context).recall("one", lambda r, a: True)["control"].tolist() == [1, 1, 1]
    assert ContextMemory(context).recall("two", lambda r, a: True) == {}
    assert ContextMemory(context).recall("one", lambda r, a: True) == {}


def test_a_buffered_run_over_a_grid(grid):
    spec = RunSpec(
        task=TASK,
        mode="buffered",
        rounds=4,
        weighting="equal",
        evaluate_every=0,
        buffer={"size": 2, "concurrency": 2},
        cohort={"fill_wait_s": 0.0},
        local=LOCAL,
    )
    outcome = run_campaign(grid, spec, poll_s=0.001)
    assert outcome.verdict.outcome == "completed"
    assert outcome.state.round == 4


def test_the_dispatcher_gives_up_silent_nodes_and_untaken_messages():
    class Deaf:
        def __init__(self):
            self.pushed = 0

        def push_messages(self, messages):
            self.pushed += len(list(messages))
            return [f"m{self.pushed}"] if self.pushed == 1 else [None]

        def pull_messages(self, message_ids):
            return []

    now = [0.0]
    dispatcher = GridDispatcher(
        Deaf(), clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + max(s, 0.01))
    )
    work = work_of(TASK)
    model = np.zeros(work.num_coordinates, np.float32)
    spec = RunSpec(task=TASK, mode="buffered", weighting="equal", cohort={"deadline_s": 5.0})
    plan = plan_round(spec, "run", work, "train", 1, RunState(model), ("1", "2"), 2, "00")
    assert dispatcher.next(0.0) is None
    for device_id in plan.cohort:
        dispatcher.start(plan, Request.of(plan, model), device_id)
    first, none, second = dispatcher.next(1.0), dispatcher.next(1.0), dispatcher.next(60.0)
    assert (first.device_id, first.records.reason) == ("2", Rejection.OFFLINE)
    assert none is None
    assert (second.device_id, second.records.reason) == ("1", Rejection.OFFLINE)
    assert now[0] < 10
    dispatcher.withdraw()
    assert dispatcher.next(0.0) is None
