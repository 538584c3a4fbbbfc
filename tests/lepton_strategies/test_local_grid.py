"""Flower's own loop over devices in this process: our strategies, Flower's, and client apps of anybody."""

from collections.abc import Generator
from random import Random

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from numpy.testing import assert_allclose, assert_array_equal

import lepton_strategies
from lepton_fl.errors import ConfigError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.exchange import AddedUp, Answer
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.sources import DeviceData
from lepton_fl.tasks.task import load_task
from lepton_fl.wire.messages import Request
from lepton_simulations import simulate
from lepton_simulations.flower import flower_process, local_grid
from lepton_strategies import (
    AppNodes,
    EngineNodes,
    FedAvg,
    LocalGrid,
    client_app,
    initial_arrays,
    run_campaign,
)
from lepton_strategies import planned as planned_module
from lepton_strategies.model import from_arrays
from lepton_strategies.planned import PlannedMessages

CLIENTS = 6
LOCAL = {"learning_rate": 0.1, "batch_size": 16}


class Spy:
    """An exchange that counts what came through."""

    def __init__(self, exchange) -> None:
        self.exchange = exchange
        self.seen: list[Answer | AddedUp] = []
        self.plans: list[RoundPlan] = []

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        self.plans.append(plan)
        for answer in self.exchange.ask(plan, request):
            self.seen.append(answer)
            yield answer

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        self.exchange.tell(plan, device_id, refusal)


@pytest.fixture
def lean():
    """Devices that train alike in chunks and one by one, to the last bit."""
    with local_grid("digits", clients=CLIENTS, local=LOCAL, workers=0, tier="lean") as grid:
        yield grid


@pytest.fixture
def grid():
    with local_grid("digits", clients=CLIENTS, local=LOCAL, workers=0) as grid:
        yield grid


def spied(grid: LocalGrid) -> Spy:
    spy = Spy(grid._exchange)
    grid._exchange = spy
    return spy


def strategy(name: str, **settings):
    settings = {"cohort": {"size": CLIENTS}, "local": LOCAL, "seed": 5, **settings}
    return getattr(lepton_strategies, name)("digits", **settings)


def start(a_strategy, grid, rounds: int = 2, **more):
    return a_strategy.start(grid, initial_arrays("digits"), num_rounds=rounds, **more)


# --- our strategies ---------------------------------------------------------------------------------------


def campaign(grid: LocalGrid, spec, seed: int) -> RunState:
    """The same rounds by our own loop, over the same exchange."""
    from lepton_strategies.grid import LogBook
    from lepton_strategies.model import trainer_of, work_of

    book, model = LogBook(), trainer_of(spec.task).initial(spec.seed)
    state = RunState(model, ServerState.initial(spec.server, model.size))
    run = Campaign(spec, "r", work_of(spec.task), grid._exchange, grid._roster, book, Random(seed))
    assert run.run(state).outcome == "completed"
    return book.state


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "Median", "MultiKrum", "GeometricMedian"])
def test_flowers_loop_gives_the_bits_of_our_campaign(name, grid):
    ours = strategy(name, cohort={"size": CLIENTS}, **({"malicious": 0.1} if name == "MultiKrum" else {}))
    result = start(ours, grid)
    spec = ours.spec.model_copy(update={"rounds": 2})
    assert_array_equal(from_arrays(result.arrays), campaign(grid, spec, 5).model)
    assert result.train_metrics_clientapp[2]["reports"] == CLIENTS
    assert result.evaluate_metrics_clientapp[2]["reports"] == CLIENTS


def test_a_seed_draws_the_cohorts_that_our_campaign_draws(grid):
    ours = strategy("FedAvg", cohort={"size": 3})
    spy = spied(grid)
    result = start(ours, grid, rounds=3)
    asked, spy.plans = spy.plans, []
    state = campaign(grid, ours.spec.model_copy(update={"rounds": 3}), 5)
    assert [p.cohort for p in asked] == [p.cohort for p in spy.plans]
    assert_array_equal(from_arrays(result.arrays), state.model)


def test_one_exact_sum_comes_back_and_no_message_is_made(grid, monkeypatch):
    monkeypatch.setattr(planned_module, "to_messages", None)  # what would make them
    spy = spied(grid)
    start(strategy("FedAvg", evaluate_every=0), grid, rounds=3)
    assert [type(answer) for answer in spy.seen] == [AddedUp] * 3
    assert [len(part.reports) for part in spy.seen] == [CLIENTS] * 3


def test_the_simulation_gives_the_same_bits(grid):
    ours = strategy("FedAvg")
    result = start(ours, grid)
    simulated = simulate("digits", clients=CLIENTS, rounds=2, local=LOCAL, workers=0)
    assert_array_equal(from_arrays(result.arrays), simulated.model)


def test_workers_do_not_matter(grid):
    alone = start(strategy("FedAvg"), grid)
    with local_grid("digits", clients=CLIENTS, local=LOCAL, workers=2) as other:
        together = start(strategy("FedAvg"), other)
    assert_array_equal(from_arrays(together.arrays), from_arrays(alone.arrays))


def test_who_looks_at_the_messages_and_replies_gets_some(lean):
    """A strategy around ours that wants to see every message gets real ones, and the same bits."""

    class Curious(FedAvg):
        seen = 0

        def configure_train(self, *args):
            messages = super().configure_train(*args)
            assert isinstance(messages, PlannedMessages)
            Curious.seen += len({m.metadata.dst_node_id for m in messages})
            return messages

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            Curious.seen += sum("metrics" in reply.content for reply in replies)
            return super().aggregate_train(server_round, replies)

    curious = Curious("digits", cohort={"size": CLIENTS}, local=LOCAL, seed=5)
    result = start(curious, lean)
    assert Curious.seen == 2 * 2 * CLIENTS
    assert_array_equal(from_arrays(result.arrays), from_arrays(start(strategy("FedAvg"), lean).arrays))


def test_a_way_of_training_that_the_engine_was_not_checked_for_is_refused(grid):
    with pytest.raises(ConfigError, match=r"trains with {'batch_size': 8}, the grid's engine") as error:
        start(strategy("FedAvg", local={**LOCAL, "batch_size": 8}), grid)
    assert "local_grid(..., local={'batch_size': 8})" in error.value.hint
    start(strategy("FedAvg", local={**LOCAL, "learning_rate": 0.01}), grid, rounds=1)


def test_the_world_is_that_of_the_simulation():
    faults = {"drop_out": 0.5, "malicious": 0.34, "attack": "nan_update"}
    with local_grid("digits", clients=12, local=LOCAL, workers=0, faults=faults) as grid:
        result = start(strategy("FedAvg", cohort={"size": 12}, evaluate_every=0), grid, rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["asked"] == 12
    assert 0 < metrics["reports"] < 12
    assert metrics["rejected.offline"] > 0


# --- any Flower strategy over the engine ------------------------------------------------------------------


def test_flowers_own_fedavg_learns_digits():
    with local_grid("digits", clients=10, local={**LOCAL, "epochs": 3}, workers=0) as grid:
        result = start(flower.FedAvg(), grid, rounds=6)
    last = result.evaluate_metrics_clientapp[6]
    assert last["accuracy"] > 0.85
    assert (
        result.train_metrics_clientapp[6]["train_loss"] < result.train_metrics_clientapp[1]["train_loss"] / 2
    )


def test_flowers_own_fedavg_is_ours_up_to_rounding(lean):
    """Flower averages whole models in float64, we average differences on a grid."""
    theirs, ours = start(flower.FedAvg(), lean, rounds=1), start(strategy("FedAvg"), lean, rounds=1)
    assert_allclose(theirs.arrays["model"].numpy(), from_arrays(ours.arrays), atol=1e-6)


def test_named_tensors_come_back_by_name_and_what_is_no_coordinate_as_it_went(grid):
    module = load_task("digits").model()
    arrays = ArrayRecord({**ArrayRecord(module.state_dict()), "steps": ArrayRecord([np.array([7])])["0"]})
    result = flower.FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=1)
    assert list(result.arrays) == list(arrays)
    assert result.arrays["steps"].numpy().tolist() == pytest.approx([7])  # a weighted mean, in Flower
    trained = result.arrays.to_torch_state_dict()
    del trained["steps"]
    module.load_state_dict(trained)


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "FedAdam", "FedProx", "QFedAvg"])
def test_other_strategies_of_flower_run(name, grid):
    settings = {"FedProx": {"proximal_mu": 0.1}, "Krum": {"num_malicious_nodes": 1}}
    settings |= {"QFedAvg": {"client_learning_rate": 0.1}}
    theirs = getattr(flower, name)(fraction_evaluate=0.0, **settings.get(name, {}))
    if name == "FedProx":
        with pytest.raises(ConfigError, match="proximal_mu"):  # the engine was not chosen for it
            start(theirs, grid, rounds=1)
        return
    result = start(theirs, grid, rounds=2)  # some hand on float64
    model = result.arrays["model"].numpy()
    assert np.isfinite(model).all()
    assert not np.array_equal(model, from_arrays(initial_arrays("digits")))


def test_flowers_own_settings_of_a_device_are_read(grid):
    moved = []
    for rate in (0.1, 0.001):
        config = ConfigRecord({"lr": rate})
        result = start(flower.FedAvg(fraction_evaluate=0.0), grid, rounds=1, train_config=config)
        moved.append(np.linalg.norm(from_arrays(result.arrays) - from_arrays(initial_arrays("digits"))))
    assert moved[0] > 20 * moved[1]
    with pytest.raises(ConfigError, match="sets lrate, which no node here reads"):
        start(flower.FedAvg(), grid, rounds=1, train_config=ConfigRecord({"lrate": 1.0}))


def test_arrays_of_another_model_are_refused(grid):
    with pytest.raises(ConfigError, match="not the model of"):
        flower.FedAvg().start(grid, ArrayRecord({"w": ArrayRecord([np.zeros(3, np.float32)])["0"]}), 1)


def test_a_device_that_drops_out_or_is_refused_has_no_arrays_in_the_round():
    faults = {"drop_out": 0.3, "corrupt": 0.3}
    with local_grid("digits", clients=12, local=LOCAL, workers=0, seed=1, faults=faults) as grid:
        nodes = list(grid.get_node_ids())
        content = RecordDict({"arrays": initial_arrays("digits")})
        replies = list(grid.send_and_receive([Message(content, n, "train") for n in nodes]))
        result = start(flower.FedAvg(fraction_evaluate=0.0), grid, rounds=1)
    assert 1 <= sum(not r.has_error() for r in replies) < 12
    assert {r.error.reason.split(":")[0] for r in replies if r.has_error()} - {"offline"}
    assert np.isfinite(from_arrays(result.arrays)).all()


# --- client apps ------------------------------------------------------------------------------------------


def counting_app() -> ClientApp:
    """Adds 1 to every array, says how often it was called, and fails on node 2."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 2:
            raise ValueError("no luck")
        calls = context.state.setdefault("calls", MetricRecord({"n": 0}))
        calls["n"] += 1
        name, arrays = next(iter(message.content.array_records.items()))
        more = ArrayRecord([array.numpy() + 1 for array in arrays.values()])
        assert context.node_config["num-partitions"] == 4
        metrics = MetricRecord({"num-examples": 1, "calls": calls["n"], "lr": context.run_config["lr"]})
        return Message(RecordDict({name: more, "metrics": metrics}), reply_to=message)

    return app


class Roster:
    """So many nodes are there; waiting brings one more."""

    def __init__(self, there: int, total: int) -> None:
        self.there, self.total, self.waited = there, total, 0.0

    def candidates(self):
        return [Candidate(f"d{i}", "eligible" if i < self.there else "offline") for i in range(self.total)]

    def wait(self, seconds):
        self.waited += seconds
        self.there = min(self.there + 1, self.total)


def test_a_client_app_of_ones_own(grid):
    nodes = AppNodes(counting_app(), 4, run_config={"lr": 0.5})
    own = LocalGrid(Spy(None), Roster(4, 4), nodes)
    theirs = flower.FedAvg(fraction_evaluate=0.0)
    result = theirs.start(own, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=3)
    assert_array_equal(result.arrays["0"].numpy(), [3, 3, 3])
    assert dict(result.train_metrics_clientapp[3]) == {"calls": 3, "lr": 0.5}  # each node kept its context
    message = Message(RecordDict({"arrays": ArrayRecord([np.zeros(1)])}), 2, "train")
    [reply] = own.send_and_receive([message])
    assert "ValueError: no luck" in reply.error.reason


def test_our_client_app_behind_the_grid_gives_the_bits_of_the_engine(lean):
    """And over push and pull, as a server app of one's own would do it."""
    fleet = lean._roster.fleet

    def data(context, task):
        name = str(context.node_config["partition-id"])
        return DeviceData(fleet.rows(name, "train"), fleet.rows(name, "evaluate"))

    own = LocalGrid(Spy(None), VirtualNames(fleet), AppNodes(client_app(["digits"], data=data), CLIENTS))
    ours = strategy("FedAvg")
    spec = ours.spec.model_copy(update={"rounds": 2, "evaluate_every": 0})
    outcome = run_campaign(own, spec, poll_s=0)
    assert outcome.verdict.outcome == "completed"
    assert_array_equal(outcome.model, from_arrays(start(ours, lean).arrays))


class VirtualNames(Roster):
    def __init__(self, fleet) -> None:
        super().__init__(len(fleet.devices), len(fleet.devices))


# --- the grid itself --------------------------------------------------------------------------------------


def test_pushed_messages_are_answered_once(grid):
    content = RecordDict({"arrays": initial_arrays("digits")})
    ids = list(grid.push_messages([Message(content, node, "evaluate") for node in (0, 3)]))
    replies = list(grid.pull_messages([*ids, "unknown"]))
    assert {r.metadata.reply_to_message_id for r in replies} == set(ids)
    assert {r.metadata.src_node_id for r in replies} == {0, 3}
    assert list(grid.pull_messages(ids)) == []


def test_what_cannot_be_answered_is_said(grid):
    content = RecordDict({"arrays": initial_arrays("digits")})
    with pytest.raises(ConfigError, match="There is no node 99; there are 6, from 0"):
        grid.send_and_receive([Message(content, 99, "train")])
    [reply] = grid.send_and_receive([grid.create_message(content, "train.special", 1, "g")])
    assert "answers 'train' and 'evaluate', not 'train.special'" in reply.error.reason
    with pytest.raises(ConfigError, match="2 records of type ArrayRecord"):
        grid.send_and_receive(
            [Message(RecordDict({"a": content["arrays"], "b": content["arrays"]}), 1, "train")]
        )
    with pytest.raises(ConfigError, match="nobody here answers them"):
        LocalGrid(Spy(None), Roster(2, 2)).send_and_receive([Message(content, 1, "train")])
    with pytest.raises(ConfigError, match="No run was set"):
        _ = grid.run
    grid.set_run("a run")
    assert grid.run == "a run"


def test_looking_again_for_missing_nodes_lets_time_pass():
    roster = Roster(1, 3)
    grid = LocalGrid(Spy(None), roster)
    assert [len(list(grid.get_node_ids())) for _ in range(4)] == [1, 2, 3, 3]
    assert roster.waited == 2


def test_an_engine_that_adds_up_what_was_asked_for_singly_is_refused():
    class Wrong(Spy):
        def ask(self, plan, request):
            yield AddedUp((), {}, None)

    with flower_process():
        nodes = EngineNodes(Wrong(None), "digits")
        message = Message(RecordDict({"arrays": initial_arrays("digits")}), 0, "train")
        with pytest.raises(ConfigError, match="asked for one by one"):
            list(nodes.answer([message], {0: "0"}))


def test_the_process_is_nobody_afterwards():
    with local_grid("digits", clients=2, workers=0):
        assert TaskIdentity.run_id == 1
    with pytest.raises(RuntimeError):
        _ = TaskIdentity.run_id


def test_a_process_that_is_somebody_stays_it(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 77)
    with flower_process():
        assert TaskIdentity.run_id == 77
    assert TaskIdentity.run_id == 77


def test_wrong_settings_of_a_grid_are_named():
    with (
        pytest.raises(ConfigError, match=r"learning_rate = -1"),
        local_grid("digits", local={"learning_rate": -1}),
    ):
        pass


def test_a_distillation_needs_its_teacher_before_anybody_is_asked():
    spec = RunSpec(task="lepton_fl.compression.taught:digits")
    with pytest.raises(ConfigError, match="names no model to learn from"):
        run_campaign(None, spec)
    with pytest.raises(ConfigError, match="no distillation"):
        run_campaign(None, spec.model_copy(update={"task": "digits", "teacher": "model.safetensors"}))
