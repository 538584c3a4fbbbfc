"""SCAFFOLD and personal heads, over whole runs: what each is for, and what must leave no trace."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from torch import nn

from lepton_fl.errors import ConfigError, Rejection, StateCorrupt, UpdateRejected
from lepton_fl.plan import LocalPlan, RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Work, after_attempt, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.local import CONTROL as SERVER_CONTROL
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks import Classification, DataContract, Dataset, Regression, Task
from lepton_fl.tasks.models import MLP
from lepton_fl.training.local import LocalState, control_moves
from lepton_fl.training.memory import CONTROL, PERSONAL, VolatileMemory
from lepton_fl.training.respond import respond
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import vector_digest
from lepton_fl.wire.messages import AUXILIARY, UPDATE, Request
from lepton_fl.wire.records import Records
from lepton_strategies.desk import PartitionDesk

torch.set_num_threads(1)
NAME = "pkg:task"


@dataclass
class Devices:
    """Real devices in this process: exchange and roster of a run."""

    task: Task
    rows: dict[str, Dataset]
    held_out: dict[str, Dataset] = field(default_factory=dict)
    lose: Callable[[str, int, int], bool] = lambda device, round_number, attempt: False  # its answer
    spoil: Callable[[str, int, Records], Records] = lambda device, round_number, reply: reply
    sent: list[tuple[str, Records]] = field(default_factory=list)

    def __post_init__(self):
        self.trainer = Trainer(self.task)
        self.memories = {device_id: VolatileMemory() for device_id in self.rows}
        self.work = Work(
            NAME,
            self.task.version,
            self.trainer.layout.digest,
            self.trainer.layout.size,
            self.task.metrics,
            evaluate_on_devices=bool(self.held_out),
            layout=self.trainer.layout,
        )

    def data(self, device_id, kind):
        return (self.rows if kind == "train" else self.held_out)[device_id]

    def ask(self, plan, request):
        for device_id in plan.cohort:
            memory = self.memories[device_id]
            desk = PartitionDesk(device_id, NAME, self.trainer, self.data, memory=memory)
            reply = respond(request.to_records(), desk)
            self.sent.append((device_id, reply))
            if plan.kind == "train" and self.lose(device_id, plan.round, plan.attempt):
                memory.refused(plan.run_id)  # its node could not hand it over
                continue
            yield Answer(device_id, self.spoil(device_id, plan.round, reply))

    def tell(self, plan, device_id, refusal):
        if refusal is not None:
            self.memories[device_id].refused(plan.run_id)

    def candidates(self):
        return [Candidate(device_id, "eligible") for device_id in self.rows]

    def wait(self, seconds): ...

    def run(self, *, rounds, seed=0, **fields):
        cohort = {"size": len(self.rows), **fields.pop("cohort", {})}
        spec = RunSpec(task=NAME, rounds=rounds, weighting="equal", cohort=cohort, **fields)
        book = Book()
        campaign = Campaign(spec, "run", self.work, self, self, book, Random(seed))
        model = self.trainer.initial(0)
        book.verdict = campaign.run(RunState(model, ServerState.initial(spec.server, model.size)))
        return book

    def controls(self, state):
        """Every device's control, as its next request would find it."""
        counted = plan_round(
            self.spec_of(), "run", self.work, "train", state.round + 1, state, ("x",), 1, "n"
        )
        held = [memory.recall("run", counted.counted) for memory in self.memories.values()]
        return np.array([h.get(CONTROL, np.zeros(self.trainer.layout.size)) for h in held])

    def spec_of(self):
        return RunSpec(task=NAME, local={"control_variates": True})


class Book:
    def __init__(self):
        self.states, self.abandoned_plans, self.evaluations, self.verdict = [], [], [], None

    def planned(self, plan): ...

    def abandoned(self, collected, cause):
        self.abandoned_plans.append((collected.plan.round, collected.plan.attempt))

    def committed(self, round_):
        self.states.append(round_.state)

    def evaluated(self, evaluation):
        self.evaluations.append(evaluation)

    def waiting(self, cause, seconds): ...

    @property
    def model(self):
        return self.states[-1].model


# --- SCAFFOLD: a known answer where federated averaging is provably wrong ------------------------------


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x[:, 0] * self.w


RATE, STEPS = 0.04, 10
A, B = np.array([1.0, 3.0, 2.0, 0.5]), np.array([2.0, -3.0, 1.0, 2.0])  # f_i(w) = (a_i w - b_i)^2
OPTIMUM = (A @ B) / (A @ A)
# Where each device's pull over so many steps cancels out: not the optimum.
PULL = 1 - (1 - 2 * RATE * A**2) ** STEPS
DRIFTED = (PULL @ (B / A)) / PULL.sum()
LOCAL = {"learning_rate": RATE, "epochs": STEPS, "batch_size": 10}
SCAFFOLD = {**LOCAL, "control_variates": True}


def quadratics(**more) -> Devices:
    task = Task("slope", "1", Slope, DataContract((1,)), "squared_error", Regression())
    rows = {
        f"d{i}": Dataset(np.full((2, 1), a, np.float32), np.full(2, b, np.float32))
        for i, (a, b) in enumerate(zip(A, B, strict=True))
    }
    return Devices(task, rows, **more)


def test_averaging_drifts_to_a_known_wrong_point_and_scaffold_finds_the_optimum():
    assert abs(DRIFTED - OPTIMUM) > 0.5
    assert_allclose(quadratics().run(rounds=30, local=LOCAL).model, [DRIFTED], atol=1e-4)
    assert_allclose(quadratics().run(rounds=60, local=SCAFFOLD).model, [OPTIMUM], atol=1e-4)


def test_scaffold_finds_the_optimum_when_half_of_the_devices_take_part():
    half = {"rounds": 120, "cohort": {"size": 2}}
    book = quadratics().run(**half, local=SCAFFOLD)
    assert_allclose(book.model, [OPTIMUM], atol=1e-3)
    ends = [state.model[0] for state in quadratics().run(**half, local=LOCAL).states[-60:]]
    assert abs(np.mean(ends) - OPTIMUM) > 0.3


def test_the_wrong_sign_does_not_find_it(monkeypatch):
    right = LocalState.correction.fget
    monkeypatch.setattr(LocalState, "correction", property(lambda self: -right(self)))
    book = quadratics().run(rounds=60, local=SCAFFOLD)
    assert book.verdict.outcome == "failed" or abs(book.model[0] - OPTIMUM) > 0.3


@pytest.mark.parametrize("server", ["fedavgm", "fedadam"])
def test_scaffold_goes_with_other_server_optimisers(server):
    rate = {"fedavgm": 0.03, "fedadam": 0.02}[server]
    book = quadratics().run(
        rounds=100,
        local=SCAFFOLD,
        server={"name": server, "learning_rate": rate},
    )
    assert_allclose(book.model, [OPTIMUM], atol=2e-2)
    assert set(book.states[-1].server.slots) > {SERVER_CONTROL}


def test_a_device_learns_its_own_mean_gradient():
    """Option II: after a round from w to the end, c_i is the mean of the gradients on the way."""
    devices = quadratics()
    book = devices.run(rounds=1, local=SCAFFOLD)
    for a, b, control in zip(A, B, devices.controls(book.states[0])[:, 0], strict=True):
        w, gradients = 0.0, []
        for _ in range(STEPS):
            gradients.append(2 * a * (a * w - b))
            w -= RATE * gradients[-1]
        assert control == pytest.approx(np.mean(gradients), rel=1e-4)


# --- the server's control is the mean of the devices', whatever happens --------------------------------


def cut(reply: Records) -> Records:
    return Records({UPDATE: reply.arrays[UPDATE][:-1]}, reply.config, reply.metrics)


TROUBLE = {
    "none": {},
    "lost answers": {"lose": lambda d, r, a: d == f"d{r % 4}"},
    "abandoned attempts": {"lose": lambda d, r, a: a == 1 and r % 2 == 0},
    "refused answers": {"spoil": lambda d, r, reply: cut(reply) if d == f"d{r % 3}" else reply},
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_servers_control_is_the_mean_of_the_devices(trouble, clip):
    devices = quadratics(**TROUBLE[trouble])
    book = devices.run(rounds=9, local=SCAFFOLD, clip_norm=clip, cohort={"size": 3, "min_reports": 2})
    assert book.verdict.outcome == "completed"
    assert bool(book.abandoned_plans) == (trouble == "abandoned attempts")
    state = book.states[-1]
    controls = devices.controls(state)
    assert np.abs(controls).max() > 0.1
    assert_allclose(state.server.slots[SERVER_CONTROL], controls.mean(axis=0), atol=1e-5)


def test_a_restart_goes_on_with_what_it_had():
    """The state is all there is on the server: model, control and which attempts counted."""
    together = quadratics().run(rounds=6, local=SCAFFOLD)
    devices = quadratics()
    first = devices.run(rounds=3, local=SCAFFOLD)
    spec = RunSpec(task=NAME, rounds=6, weighting="equal", cohort={"size": 4}, local=SCAFFOLD)
    book = Book()
    Campaign(spec, "run", devices.work, devices, devices, book, Random(9)).run(first.states[-1])
    assert_allclose(book.model, together.model, atol=1e-6)


# --- SCAFFOLD on a network -----------------------------------------------------------------------------


def classes(count: int, seed: int = 0, *, permuted: bool = False) -> Devices:
    """Devices with the same kind of data; permuted: each calls the classes by other names."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 6)) * 2

    def draw(names, n):
        y = rng.integers(0, 3, n)
        x = centres[y] + rng.normal(size=(n, 6))
        return Dataset(x.astype(np.float32), names[y])

    names = [np.roll(np.arange(3), i if permuted else 0) for i in range(count)]
    task = Task(
        "classes", "1", lambda: MLP(6, 3, (8,)), DataContract((6,), num_classes=3), "cross_entropy",
        Classification(3),
    )  # fmt: skip
    rows = {f"d{i}": draw(names[i], 40) for i in range(count)}
    return Devices(task, rows, {f"d{i}": draw(names[i], 60) for i in range(count)})


SGD = {"learning_rate": 0.1, "batch_size": 8, "epochs": 2}


def test_with_controls_of_zero_scaffold_is_averaging_to_the_bit(monkeypatch):
    plain, scaffold = classes(3).run(rounds=1, local=SGD), classes(3)
    book = scaffold.run(rounds=1, local={**SGD, "control_variates": True})
    assert_array_equal(book.model, plain.model)
    monkeypatch.setattr(
        "lepton_fl.training.local.control_moves", lambda deltas, *others: np.zeros_like(deltas)
    )
    plain, book = (
        classes(3).run(rounds=4, local=local) for local in (SGD, {**SGD, "control_variates": True})
    )
    assert_array_equal(book.model, plain.model)
    changed = classes(3)
    monkeypatch.undo()
    book = changed.run(rounds=4, local={**SGD, "control_variates": True})
    assert (book.model != plain.model).any()


def test_the_wire_carries_update_and_control_and_the_request_both_vectors():
    devices = classes(2)
    devices.run(rounds=1, evaluate_every=0, local={**SGD, "control_variates": True})
    size = devices.trainer.layout.size
    assert {reply.arrays[UPDATE].shape for _, reply in devices.sent} == {(2 * size,)}


def test_moves_are_zero_where_nothing_is_trained_or_shared():
    deltas = np.ones((2, 5), np.float32)
    personal = np.array([True, False, False, False, False])
    moves = control_moves(deltas, np.full(3, 0.5, np.float32), np.array([1, 2]), 0.5, personal)
    assert_allclose(moves, [[0, -2.5, -2.5, 0, 0], [0, -1.5, -1.5, 0, 0]])


# --- personal heads ------------------------------------------------------------------------------------

HEAD = ("layers.2.*",)


def accuracy(book):
    return book.evaluations[-1].metrics["accuracy"]


def test_personal_heads_serve_devices_that_call_the_same_things_by_other_names():
    run = {"rounds": 12, "evaluate_every": 12, "local": SGD}
    shared = classes(3, permuted=True).run(**run)
    personal = classes(3, permuted=True).run(**{**run, "local": {**SGD, "personal": HEAD}})
    assert accuracy(shared) < 0.6
    assert accuracy(personal) > 0.8


def test_nothing_of_the_head_leaves_a_device_or_reaches_the_model():
    devices = classes(3, permuted=True)
    book = devices.run(rounds=3, local={**SGD, "personal": HEAD, "control_variates": True})
    mask = devices.trainer.layout.select(HEAD)
    updates = [r.arrays[UPDATE].reshape(2, -1) for _, r in devices.sent if UPDATE in r.arrays]
    assert len(updates) == 9
    for update in updates:
        assert not update[:, mask].any()
        assert update[:, ~mask].any()
    assert_array_equal(book.model[mask], devices.trainer.initial(0)[mask])
    heads = [memory.recall("run", lambda r, a: True)[PERSONAL] for memory in devices.memories.values()]
    assert all((a != b).any() for a, b in pairwise(heads))


def test_an_attacker_cannot_move_the_shared_copy_of_the_head():
    def attack(device, number, reply):
        if UPDATE not in reply.arrays:
            return reply
        return Records({UPDATE: np.full_like(reply.arrays[UPDATE], 2**20)}, reply.config, reply.metrics)

    devices = classes(2)
    devices.spoil = attack
    book = devices.run(rounds=1, evaluate_every=0, local={**SGD, "personal": HEAD})
    mask = devices.trainer.layout.select(HEAD)
    assert_array_equal(book.model[mask], devices.trainer.initial(0)[mask])
    assert (book.model[~mask] != devices.trainer.initial(0)[~mask]).all()


@pytest.mark.parametrize(
    ("patterns", "words"), [(("haed.*",), "matches no tensor"), (("*",), "match every tensor")]
)
def test_a_wrong_pattern_ends_the_run_before_any_device_is_asked(patterns, words):
    devices = classes(2)
    book = devices.run(rounds=2, local={**SGD, "personal": patterns})
    assert book.verdict.outcome == "failed"
    assert words in book.verdict.reason
    assert devices.sent == []


def test_without_a_layout_patterns_cannot_be_checked():
    devices = classes(2)
    devices.work = replace(devices.work, layout=None)
    book = devices.run(rounds=2, local={**SGD, "personal": HEAD})
    assert book.verdict.outcome == "failed"
    assert "layout" in book.verdict.reason


def test_a_lost_answer_leaves_the_head_as_it_was():
    devices = classes(2)
    devices.lose = lambda device, number, attempt: number == 2 and device == "d0"
    devices.run(rounds=2, evaluate_every=0, local={**SGD, "personal": HEAD})
    after_two = devices.memories["d0"].recall("run", lambda r, a: True)[PERSONAL]
    once = classes(2)
    once.run(rounds=1, evaluate_every=0, local={**SGD, "personal": HEAD})
    assert_array_equal(after_two, once.memories["d0"].recall("run", lambda r, a: True)[PERSONAL])


# --- messages ------------------------------------------------------------------------------------------


def request(**changes) -> Records:
    devices = quadratics()
    spec = RunSpec(task=NAME, local=SCAFFOLD)
    model = control = np.zeros(1, np.float32)
    plan = plan_round(spec, "run", devices.work, "train", 3, RunState(model), ("d0",), 1, "00")
    records = Request.of(plan, model, control).to_records()
    return replace(records, **changes)


def test_a_request_is_read_as_it_was_written():
    read = Request.read(request())
    assert read.auxiliary is not None
    assert_array_equal(read.auxiliary, [0])
    assert read.auxiliary_sha256 == vector_digest(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": {"model": np.zeros(1, np.float32)}},
        {"arrays": {"model": np.zeros(1, np.float32), AUXILIARY: np.ones(1, np.float32)}},
        {"config": {**request().config, "retried": "[[1]]"}},
        {"config": {**request().config, "retried": "[[1, -2]]"}},
        {"config": {**request().config, "retried": "[[1, true]]"}},
        {"config": {**request().config, "retried": "{"}},
        {"config": {**request().config, "auxiliary-sha256": ""}},
    ],
)
def test_a_request_that_does_not_fit_together_is_refused(changes):
    with pytest.raises(UpdateRejected) as caught:
        Request.read(request(**changes))
    assert caught.value.reason == Rejection.MALFORMED


@pytest.mark.parametrize(
    ("control", "reason"),
    [(np.zeros(2, np.float32), Rejection.MALFORMED), (np.full(1, np.nan, np.float32), Rejection.NON_FINITE)],
)
def test_a_control_that_cannot_be_used_is_refused_by_the_device(control, reason):
    devices = quadratics()
    spec = RunSpec(task=NAME, local=SCAFFOLD)
    model = np.zeros(1, np.float32)
    plan = plan_round(spec, "run", devices.work, "train", 1, RunState(model), ("d0",), 1, "00")
    plan = plan.model_copy(update={"auxiliary_sha256": vector_digest(control)})
    desk = PartitionDesk("d0", NAME, devices.trainer, devices.data, memory=VolatileMemory())
    reply = respond(Request.of(plan, model, control).to_records(), desk)
    assert reply.config["failed"] == reason.value


def test_a_device_without_memory_says_so():
    devices = quadratics()
    desk = PartitionDesk("d0", NAME, devices.trainer, devices.data)
    reply = respond(request(), desk)
    assert reply.config["failed"] == Rejection.FAILED.value
    assert "remember" in reply.config["detail"]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({CONTROL: np.zeros(3, np.float32)}, "expected 1"),
        ({CONTROL: np.full(1, np.inf, np.float32)}, "finite"),
    ],
)
def test_a_memory_that_does_not_fit_is_named(held, words):
    trainer = quadratics().trainer
    with pytest.raises(StateCorrupt, match=words):
        LocalState.of(
            LocalPlan(**SCAFFOLD), trainer.layout, 1, np.zeros(1, np.float32), np.zeros(1, np.float32), held
        )


@pytest.mark.parametrize(
    ("kind", "now", "attempt", "counts"),
    [
        ("train", 5, (4, 1), True),
        ("train", 5, (5, 1), False),  # an earlier attempt at the same round was abandoned
        ("train", 5, (6, 1), False),  # from a future that a restored backup does not know
        ("evaluate", 5, (5, 1), True),
        ("evaluate", 5, (6, 1), False),
        ("train", 5, (3, 1), False),
        ("train", 5, (3, 2), True),
        ("train", 5, (2, 1), False),  # no attempt at it counted
        ("train", 5, (0, 0), False),
    ],
)
def test_which_attempt_has_counted(kind, now, attempt, counts):
    devices, model = quadratics(), np.zeros(1, np.float32)
    state = RunState(model, retried=((2, 0), (3, 2)))
    spec = RunSpec(task=NAME, local=SCAFFOLD)
    plan = plan_round(spec, "run", devices.work, kind, now, state, ("d0",), 1, "00")
    assert plan.counted(*attempt) == counts
    if kind == "train":
        assert Request.read(Request.of(plan, model, model).to_records()).counted(*attempt) == counts


def test_rounds_before_the_oldest_that_is_told_are_not_known():
    retried: tuple[tuple[int, int], ...] = ()
    for number in range(1, 400):
        retried = after_attempt(retried, number, 2 - number % 2)  # every second one at the second attempt
    assert len(retried) == 199
    for number in range(400, 800):
        retried = after_attempt(retried, number, 2)
    assert len(retried) == 256
    state = RunState(np.zeros(1, np.float32), retried=retried)
    plan = plan_round(
        RunSpec(task=NAME, local=SCAFFOLD), "run", quadratics().work, "train", 900, state, ("d0",), 1, "00"
    )
    assert not plan.counted(1, 1)
    assert plan.counted(799, 2)


# --- what cannot work is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"local": {"control_variates": True, "momentum": 0.9}}, "momentum"),
        ({"local": {"control_variates": True, "optimizer": "adam"}}, "optimizer"),
        ({"local": {"control_variates": True, "proximal_mu": 0.1}}, "proximal_mu"),
        ({"local": {"control_variates": True, "clip_grad_norm": 1.0}}, "clip_grad_norm"),
        ({"local": {"control_variates": True}, "mode": "buffered"}, "control_variates"),
        ({"local": {"personal": ("head.*",)}, "mode": "buffered"}, "personal"),
        ({"local": {"personal": ("",)}}, "at least 1 character"),
        ({"mode": "buffered", "buffer": {"size": 100}}, "lower max_weight"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        RunSpec(task=NAME, **fields)


def test_patterns_choose_whole_tensors():
    layout = classes(1).trainer.layout
    assert layout.select(("layers.2.bias",)).sum() == 3
    assert layout.select(("*.bias", "layers.2.bias")).sum() == 3 + 8
    with pytest.raises(ConfigError, match="haed"):
        layout.select(("haed.*",))
