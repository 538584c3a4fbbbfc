"""Our strategies under Flower's own loop, over a grid in this process."""

import itertools
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

import lepton_strategies
from lepton_fl.errors import ConfigError, QuorumError, TaskError
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, plan_round
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.federated import federated_dataset
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.sources import DeviceData
from lepton_fl.tasks.task import load_task, resolve
from lepton_fl.wire.messages import Request
from lepton_simulations.backend import Alone
from lepton_simulations.book import MemoryBook
from lepton_simulations.exchange import InMemoryExchange
from lepton_simulations.fleet import VirtualFleet, VirtualRoster
from lepton_strategies import FedAvg, FedProx, client_app, initial_arrays, run_campaign, to_state_dict
from lepton_strategies.grid import GridExchange
from lepton_strategies.model import from_arrays, to_arrays, trainer_of, work_of
from lepton_strategies.records import from_record_dict

NODES = 4
SPEC: dict[str, Any] = {
    "cohort": {"size": NODES, "min_reports": 2, "fill_wait_s": 0.0},
    "local": {"learning_rate": 0.1, "batch_size": 32},
}
Node = Callable[[Message], Message | None]


class LocalGrid(Grid):
    """Flower's grid, with nodes that are functions; a node that returns None stays silent."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes
        self.replies: dict[str, Message | None] = {}
        self.pushed: list[Message] = []
        self._ids = itertools.count(1)

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError  # deprecated by Flower

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{next(self._ids)}"  # as Flower's own grid does it
            self.pushed.append(message)
            self.replies[message.metadata.message_id] = self.nodes[message.metadata.dst_node_id](message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self.replies.pop(i) for i in list(message_ids) if self.replies.get(i) is not None]
        return [reply for reply in found if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture(autouse=True)
def flower_process(monkeypatch):
    """Flower's runtime says who a process is before any message is made; here nothing else does."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def fleet() -> VirtualFleet:
    spec = PartitionSpec(kind="dirichlet", clients=NODES, alpha=1.0)
    return VirtualFleet.build(resolve("digits"), federated_dataset("digits", None, spec, seed=0))


@pytest.fixture
def honest(fleet) -> dict[int, Node]:
    """Nodes 0, 1, ... that hold what the virtual devices of the same name hold."""

    def data(context: Context, task: str) -> DeviceData:
        name = str(context.node_config["partition-id"])
        return DeviceData(fleet.rows(name, "train"), fleet.rows(name, "evaluate"))

    app = client_app(["digits"], data=data)

    def node(number: int) -> Node:
        config = {"partition-id": number, "num-partitions": NODES}
        return lambda message: app(message, Context(1, number, config, RecordDict(), {}))

    return {number: node(number) for number in range(NODES)}


def train(strategy, nodes: dict[int, Node], rounds: int = 1):
    grid = LocalGrid(nodes)
    return strategy.start(grid=grid, initial_arrays=initial_arrays("digits"), num_rounds=rounds), grid


# --- the same bits, whoever carries the messages --------------------------------------------------------


def simulate(fleet: VirtualFleet, spec: RunSpec) -> tuple[RunState, MemoryBook]:
    book = MemoryBook()
    with InMemoryExchange(fleet, Alone(fleet)) as exchange:
        work = fleet.work(exchange, on_devices=True)
        campaign = Campaign(spec, "simulated", work, exchange, VirtualRoster(fleet), book, Random(1))
        model = fleet.trainer.initial(spec.seed)
        campaign.run(RunState(model, ServerState.initial(spec.server, model.size)))
    assert book.state is not None
    return book.state, book


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_flowers_loop_our_campaign_and_the_simulation_agree_bit_for_bit(name, fleet, honest):
    strategy = getattr(lepton_strategies, name)("digits", learning_rate=0.1, **SPEC)
    result, _ = train(strategy, honest, rounds=2)
    spec = strategy.spec.model_copy(update={"rounds": 2})
    state, book = simulate(fleet, spec)
    assert_array_equal(from_arrays(result.arrays), state.model)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == book.rows[-1].metrics["accuracy"]
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(book.rows[-1].train_loss, rel=1e-12)
    outcome = run_campaign(LocalGrid(honest), spec, poll_s=0)
    assert outcome.verdict.outcome == "completed"
    assert_array_equal(outcome.model, state.model)


def test_a_private_run_is_never_run_in_the_clear(honest):
    strategy = FedAvg("digits", privacy={"noise_multiplier": 1.0, "mechanism": "independent"})
    with pytest.raises(ConfigError, match="adds no noise"):
        train(strategy, honest)


def test_fedprox_stays_closer_to_the_global_model(fleet, honest):
    start = from_arrays(initial_arrays("digits"))
    moved = {}
    for mu in (0.0, 5.0):
        local = {**SPEC["local"], "epochs": 5}
        strategy = FedProx("digits", proximal_mu=mu, cohort=SPEC["cohort"], local=local)
        assert strategy.spec.local.proximal_mu == mu
        result, _ = train(strategy, honest)
        moved[mu] = float(np.linalg.norm(from_arrays(result.arrays) - start))
    assert moved[5.0] < 0.9 * moved[0.0]


def test_fedavg_is_flowers_fedavg_but_for_the_grid(fleet, honest):
    """Flower averages whole models in float32, we average differences exactly: equal up to both roundings."""
    result, grid = train(FedAvg("digits", **SPEC), honest)
    start, theirs = from_arrays(initial_arrays("digits")), flower.FedAvg()
    replies = []
    for message in grid.pushed[:NODES]:
        reply = honest[message.metadata.dst_node_id](message)
        records = from_record_dict(reply.content)
        trained = start + (records.arrays["update"] * 2.0**-24).astype(np.float32)
        metrics = MetricRecord({"num-examples": records.metrics["num-examples"]})
        content = RecordDict({"arrays": to_arrays(trained), "metrics": metrics})
        replies.append(Message(content=content, reply_to=message))
    arrays, _ = theirs.aggregate_train(1, replies)
    assert_allclose(from_arrays(result.arrays), from_arrays(arrays), atol=1e-6)


# --- bad replies ----------------------------------------------------------------------------------------


def crash(message: Message) -> Message:
    return Message(error=Error(code=2, reason="boom"), reply_to=message)


def unavailable(message: Message) -> Message:
    return Message(error=Error(code=5, reason="node unavailable"), reply_to=message)


def flowers_own(message: Message) -> Message:
    """What a client app of somebody else would send."""
    arrays = ArrayRecord([np.zeros(3, np.float32)])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 5})})
    return Message(content=content, reply_to=message)


def empty(message: Message) -> Message:
    return Message(content=RecordDict(), reply_to=message)


def other_family(message: Message) -> Message:
    return Message(content=RecordDict({"extra": ConfigRecord({"a": 1})}), reply_to=message)


def changed(honest: Node, edit: Callable[[RecordDict], None]) -> Node:
    def node(message: Message) -> Message:
        reply = honest(message)
        edit(reply.content)
        return reply

    return node


def nan_loss(content: RecordDict) -> None:
    content["metrics"]["sum.loss_sum"] = [float("nan")]


def stale(content: RecordDict) -> None:
    content["config"]["nonce"] = "0" * 32


def short(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"update": flwr_array(np.zeros(3, np.int32))})


def flwr_array(array):
    from flwr.app import Array

    return Array(array)


BAD = {
    "failed": crash,
    "offline": unavailable,
    "malformed": flowers_own,
    "malformed ": empty,
    "malformed  ": other_family,
    "non-finite": nan_loss,
    "replayed": stale,
    "wrong-shape": short,
    "offline ": lambda message: None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_node_is_named_and_the_round_goes_on_without_it(name, honest):
    bad, reason = BAD[name], name.strip()
    healthy, _ = train(FedAvg("digits", **SPEC), {n: honest[n] for n in (0, 1, 3)})
    node = changed(honest[2], bad) if bad in (nan_loss, stale, short) else bad

    def only_training(message: Message) -> Message | None:
        return node(message) if message.metadata.message_type == "train" else honest[2](message)

    result, _ = train(FedAvg("digits", **SPEC), honest | {2: only_training})
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["reports"], metrics["asked"], metrics[f"rejected.{reason}"]) == (3, 4, 1)
    assert_array_equal(from_arrays(result.arrays), from_arrays(healthy.arrays))
    assert result.evaluate_metrics_clientapp[1]["reports"] == 4


def test_too_few_reports_leave_the_model_and_the_run_goes_on(honest):
    rounds = []

    def flaky(message: Message) -> Message | None:
        rounds.append(message.metadata.group_id)
        return None if message.metadata.group_id == "1" else honest[message.metadata.dst_node_id](message)

    nodes = {0: honest[0], **dict.fromkeys((1, 2, 3), flaky)}
    strategy = FedAvg("digits", **SPEC, evaluate_every=2)
    result, grid = train(strategy, nodes, rounds=2)
    assert result.train_metrics_clientapp[1]["rejected.offline"] == 3
    assert result.train_metrics_clientapp[2]["reports"] == 4
    assert 1 not in result.evaluate_metrics_clientapp
    first, second = grid.pushed[0], grid.pushed[NODES]
    sent = [from_record_dict(m.content).arrays["model"] for m in (first, second)]
    assert_array_equal(sent[0], sent[1])  # nothing was learnt in round 1


def test_only_listed_tasks_run(fleet):
    app = client_app(["fashion_mnist"])
    nodes = {n: lambda message, n=n: app(message, Context(1, n, {}, RecordDict(), {})) for n in range(2)}
    strategy = FedAvg("digits", cohort={"size": 2})
    result, _ = train(strategy, nodes)
    assert result.train_metrics_clientapp[1]["rejected.failed"] == 2


@pytest.mark.parametrize(
    "config", [{}, {"partition-id": 9, "num-partitions": 2}, {"data-source": "/no/such/source.toml"}]
)
def test_a_node_without_usable_data_says_so_and_sits_out(config, honest):
    app = client_app(["digits"])
    nodes = honest | {1: lambda message: app(message, Context(1, 1, config, RecordDict(), {}))}
    result, _ = train(FedAvg("digits", **SPEC), nodes)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["reports"], metrics["rejected.failed"]) == (3, 1)


def test_a_node_finds_its_part_or_its_own_file(tmp_path, honest):
    raw = load_task("digits").data(None).train
    np.savez(tmp_path / "own.npz", x_train=raw.x[:50], y_train=raw.y[:50])
    source = tmp_path / "source.toml"
    source.write_text(f'kind = "npz"\npath = "{tmp_path}/own.npz"\n')
    app = client_app(["digits"])
    configs = [{"partition-id": 0, "num-partitions": 2}, {"data-source": str(source)}]
    nodes = {
        n: lambda message, n=n: app(message, Context(1, n, configs[n], RecordDict(), {"partition": "iid"}))
        for n in range(2)
    }
    result, _ = train(FedAvg("digits", cohort={"size": 2, "min_reports": 2}), nodes)
    assert result.train_metrics_clientapp[1]["reports"] == 2
    assert result.evaluate_metrics_clientapp[1]["reports"] == 2


# --- settings and surroundings ---------------------------------------------------------------------------


def test_wrong_settings_are_named():
    with pytest.raises(ValidationError, match="cohrt"):
        FedAvg("digits", cohrt={"size": 2})
    with pytest.raises(TaskError, match="Did you mean 'digits'"):
        FedAvg("digit")
    with pytest.raises(TaskError):
        client_app(["digit"])


def test_a_config_that_no_node_would_read_is_refused(honest):
    config = ConfigRecord({"lr": 0.1})
    with pytest.raises(ConfigError, match="train_config sets lr"):
        FedAvg("digits", **SPEC).start(LocalGrid(honest), initial_arrays("digits"), 1, train_config=config)


@pytest.mark.parametrize(
    "arrays", [to_arrays(np.zeros(7, np.float32)), ArrayRecord([np.zeros((2, 2), np.float32)])]
)
def test_arrays_of_another_model_are_refused(arrays, honest):
    with pytest.raises(Exception, match=r"7 coordinates|one flat float32 array"):
        FedAvg("digits", **SPEC).start(LocalGrid(honest), arrays, 1)


def test_too_few_nodes_end_the_wait():
    spec = {"cohort": {"size": 2, "min_reports": 2, "quorum_wait_s": 1e-9}}
    with pytest.raises(QuorumError, match="0 nodes connected within 1e-09 s, 2 are needed"):
        train(FedAvg("digits", **spec), {})


def test_a_seed_repeats_the_cohorts(honest):
    def asked(seed):
        _, grid = train(FedAvg("digits", cohort={"size": 2}, seed=seed, evaluate_every=0), honest, rounds=3)
        return [m.metadata.dst_node_id for m in grid.pushed]

    assert asked(3) == asked(3)


def test_a_state_dict_fits_the_module():
    arrays = initial_arrays("digits", seed=4)
    named = to_state_dict("digits", arrays)
    module = load_task("digits").model()
    missing, unexpected = module.load_state_dict(named, strict=False)
    assert (missing, unexpected) == ([], [])
    assert_array_equal(
        trainer_of(resolve("digits")).layout.flatten({k: t.numpy() for k, t in named.items()}),
        from_arrays(arrays),
    )


def test_the_model_is_sent_as_one_object(honest):
    """Equal for all nodes, so that Flower stores and transfers it once."""
    _, grid = train(FedAvg("digits", **SPEC, evaluate_every=0), honest)
    assert len({m.content["arrays"].object_id for m in grid.pushed}) == 1
    assert len({m.content["config"].object_id for m in grid.pushed}) == 1


# --- the exchange over a grid ------------------------------------------------------------------------------


class SlowGrid(LocalGrid):
    """Replies come one per look; what ``lost`` names cannot be sent."""

    def __init__(self, nodes, lost=()):
        super().__init__(nodes)
        self.lost = lost
        self.looks = 0

    def push_messages(self, messages):
        kept = list(messages)
        ids = iter(super().push_messages([m for m in kept if m.metadata.dst_node_id not in self.lost]))
        return [None if m.metadata.dst_node_id in self.lost else next(ids) for m in kept]

    def pull_messages(self, message_ids):
        self.looks += 1
        first = next((i for i in message_ids if self.replies.get(i) is not None), None)
        return [self.replies.pop(first)] if first else []


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def exchange_over(grid):
    clock = Clock()
    return GridExchange(grid, poll_s=1.0, clock=clock, sleep=clock.sleep), clock


@pytest.fixture
def asked(fleet):
    spec = RunSpec(task="digits", cohort={"size": NODES, "deadline_s": 10})
    state = RunState(fleet.trainer.initial(0))
    cohort = [str(n) for n in range(NODES)]
    plan = plan_round(spec, "r", work_of("digits"), "train", 1, state, cohort, NODES, "n")
    return plan, Request.of(plan, state.model)


def test_replies_are_yielded_as_they_come(honest, asked):
    grid = SlowGrid(honest)
    exchange, clock = exchange_over(grid)
    answers = exchange.ask(*asked)
    next(answers)
    assert (grid.looks, clock.now) == (1, 0)
    assert [a.device_id for a in answers] == ["1", "2", "3"]
    assert grid.looks == 4


def test_the_deadline_ends_the_wait(honest, asked):
    exchange, clock = exchange_over(SlowGrid(honest | {3: lambda message: None}))
    assert [a.device_id for a in exchange.ask(*asked)] == ["0", "1", "2"]
    assert clock.now == pytest.approx(10)


def test_what_cannot_be_sent_is_offline_at_once(honest, asked):
    exchange, clock = exchange_over(SlowGrid(honest, lost=(1,)))
    answers = {a.device_id: a for a in exchange.ask(*asked)}
    assert len(answers) == 4
    assert "did not take" in str(answers["1"].records)
    assert answers["1"].records.reason == "offline"
    assert clock.now < 10


def test_a_reply_to_another_message_is_not_taken_for_an_answer(honest, asked):
    class Confused(LocalGrid):
        def pull_messages(self, message_ids):
            found = list(super().pull_messages(message_ids))
            for reply in found[:1]:
                reply.metadata.__dict__["_reply_to_message_id"] = "somebody else's"
            return found

    exchange, _ = exchange_over(Confused(honest))
    assert [a.device_id for a in exchange.ask(*asked)] == ["1", "2", "3"]


def test_a_grid_may_go_through_the_messages_twice(fleet, honest):
    """As Flower's own does: first each message gets its id, then all are sent."""

    class Twice(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            first = list(messages)
            assert [id(m) for m in messages] == [id(m) for m in first]
            return super().push_messages(messages)

    strategy, grid = FedAvg("digits", **SPEC), Twice(honest)
    result = strategy.start(grid=grid, initial_arrays=initial_arrays("digits"), num_rounds=1)
    assert result.train_metrics_clientapp[1]["reports"] == NODES
