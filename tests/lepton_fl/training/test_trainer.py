"""Local training: known answers, reference optimisers, and the one-step identity of FedAvg."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fl.errors import ConfigError, Rejection, TaskError, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks import Classification, DataContract, Dataset, Regression, Task, TrainingLoss, load_task
from lepton_fl.tasks.federated import federated_dataset
from lepton_fl.tasks.models import MLP, Linear
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.training.bridge import layout_of, load_vector, state_vector
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Layout, to_grid

torch.set_num_threads(1)


def classify(model=lambda: MLP(6, 3, (5,))) -> Task:
    contract = DataContract((6,), num_classes=3)
    return Task("probe", "1", model, contract, "cross_entropy", Classification(3))


def regress(model=lambda: Linear(2, 0)) -> Task:
    return Task("line", "1", model, DataContract((2,)), "squared_error", Regression())


def rows(n, seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n))


# --- the bridge


class Mixed(nn.Module):
    """Every kind of state: trained, frozen, buffers of float, integer, boolean type, and not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)
        self.head = Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(x))


def test_integer_buffers_stay_out_and_trained_tensors_come_first_frozen_ones_last():
    layout = layout_of(Mixed())
    names = [slot.name for slot in layout.slots]
    trained = ["norm.weight", "norm.bias", "head.head.weight", "head.head.bias"]
    assert names == [*trained, "norm.running_mean", "norm.running_var", "frozen"]
    assert (layout.fixed, layout.moving) == (2, layout.size - 2)


def test_a_layout_with_frozen_tensors_is_another_one():
    shapes = {"a": (3,), "b": (2,)}
    assert Layout.of_shapes(shapes).digest != Layout.of_shapes(shapes, 2).digest


def test_round_trip_between_modules():
    torch.manual_seed(0)
    one, two = Mixed(), Mixed()
    flat = np.random.default_rng(0).normal(size=layout_of(one).size).astype(np.float32)
    load_vector(one, layout_of(two), flat)
    np.testing.assert_array_equal(state_vector(one), flat)
    assert one.norm.num_batches_tracked == 0
    load_vector(two, layout_of(one), state_vector(one))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_layout_is_refused_and_leaves_the_module_alone():
    model = MLP(6, 3, (5,))
    before = state_vector(model)
    other = layout_of(MLP(6, 3, (4,)))
    with pytest.raises(UpdateRejected, match=r"'layers.0.bias' is \(5,\) here, \(4,\) there") as caught:
        load_vector(model, other, np.zeros(other.size, np.float32))
    assert caught.value.reason is Rejection.WRONG_SHAPE
    own = layout_of(model)
    swapped = Layout.of_shapes({slot.name: slot.shape for slot in reversed(own.slots)})
    with pytest.raises(UpdateRejected, match="the order differs"):
        load_vector(model, swapped, before)
    for bad in (before[:-1], before.astype(np.float64), before[None]):
        with pytest.raises(UpdateRejected, match="model vector is"):
            load_vector(model, own, bad)
    np.testing.assert_array_equal(state_vector(model), before)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.complex64])
def test_only_float32_can_be_averaged(kind):
    with pytest.raises(TaskError, match=r"'weight' of the model is torch\."):
        layout_of(nn.Linear(2, 2).to(kind) if kind != torch.complex64 else nn.Linear(2, 2, dtype=kind))


def test_training_touches_neither_frozen_parameters_nor_the_scratch_buffer():
    trainer = Trainer(classify(Mixed))
    start = trainer.initial(0)
    local = LocalPlan(weight_decay=0.1, proximal_mu=0.1, momentum=0.5, batch_size=8)
    delta = trainer.layout.unflatten(trainer.train(start, rows(32), local, seed=0).delta)
    assert not delta["frozen"].any()
    assert delta["head.head.weight"].any()
    assert delta["norm.running_mean"].any()  # a floating-point buffer is state, and is averaged


# --- one step


def test_one_step_of_fedavg_is_one_centralised_step():
    fleet = federated_dataset("digits", None, PartitionSpec(kind="dirichlet", clients=10, alpha=0.3), 0)
    trainer = Trainer(fleet.task)
    start, step = trainer.initial(0), 2.0**-24
    local = LocalPlan(learning_rate=0.1, batch_size=10_000, epochs=1)
    total, weight = np.zeros(len(start), np.int64), 0
    for client in fleet.clients:
        result = trainer.train(start, fleet.train(client), local, seed=1)
        assert result.steps == 1
        total += result.num_examples * to_grid(result.delta, step).astype(np.int64)
        weight += result.num_examples
    federated = start + (total * (step / weight)).astype(np.float32)
    everything = fleet.task.prepare(fleet.corpus.train)
    central = start + trainer.train(start, everything, local, seed=2).delta
    assert weight == len(everything) == 1437
    np.testing.assert_allclose(federated, central, rtol=0, atol=1e-6)
    assert np.abs(central - start).max() > 1e-3


def reference(task, start, data, optimizer, orders, clip=0.0, mu=0.0):
    """The same training, written with torch.optim."""
    module = task.model()
    load_vector(module, layout_of(module), start)
    anchor = [p.detach().clone() for p in module.parameters()]
    optimiser = optimizer(module.parameters())
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    for order in orders:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(x[order]), y[order])
        loss = loss + mu / 2 * sum(
            ((p - a) ** 2).sum() for p, a in zip(module.parameters(), anchor, strict=True)
        )
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimiser.step()
    return state_vector(module) - start


CASES = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, 0.05), {}),
    "momentum": (
        {"momentum": 0.9, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
        {},
    ),
    "adam": (
        {"optimizer": "adam", "weight_decay": 0.01},
        lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.01),
        {},
    ),
    "clip": ({"clip_grad_norm": 0.1}, lambda p: torch.optim.SGD(p, 0.05), {"clip": 0.1}),
    "fedprox": ({"proximal_mu": 0.7}, lambda p: torch.optim.SGD(p, 0.05), {"mu": 0.7}),
    "fedprox, momentum": (
        {"proximal_mu": 0.7, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        {"mu": 0.7},
    ),
    "fedprox, adam": (
        {"proximal_mu": 0.7, "optimizer": "adam"},
        lambda p: torch.optim.Adam(p, 0.05),
        {"mu": 0.7},
    ),
    "fedprox, clip": (
        {"proximal_mu": 0.7, "clip_grad_norm": 0.1},
        lambda p: torch.optim.SGD(p, 0.05),
        {"mu": 0.7, "clip": 0.1},
    ),
}


@pytest.mark.parametrize(("options", "optimizer", "extra"), CASES.values(), ids=CASES)
def test_agrees_with_torch_optim_over_shuffled_and_partial_batches(options, optimizer, extra):
    task, data = classify(), rows(23)
    trainer = Trainer(task)
    start = trainer.initial(4)
    local = LocalPlan(learning_rate=0.05, batch_size=10, epochs=3, **options)
    result = trainer.train(start, data, local, seed=9)
    rng = np.random.default_rng(9)
    rng.integers(2**63)  # the seed of dropout
    orders = [order[i : i + 10] for order in (rng.permutation(23) for _ in range(3)) for i in (0, 10, 20)]
    assert result.steps == 9
    np.testing.assert_allclose(
        result.delta, reference(task, start, data, optimizer, orders, **extra), rtol=1e-4, atol=2e-6
    )


def test_fedprox_known_answer():
    """A pure proximal pull: loss gradient g = -2, so w1 = 0.2; then g + mu * (w1 - w0)."""
    task = replace(regress(), loss=lambda out, _: (-2 * out).mean())
    trainer = Trainer(task)
    data = Dataset(np.array([[1.0, 0.0]], np.float32), np.zeros(1, np.float32))
    start = np.array([1.0, 0.0, 0.0], np.float32)
    local = LocalPlan(learning_rate=0.1, epochs=2, proximal_mu=0.5)
    delta = trainer.train(start, data, local, seed=0).delta
    assert trainer.layout.slots[0].name == "head.weight"
    np.testing.assert_allclose(delta, [0.2 + 0.1 * (2 - 0.5 * 0.2), 0, 0.39], rtol=1e-6)


# --- the loop


def test_same_arguments_same_result_and_another_seed_another():
    one, two = Trainer(classify()), Trainer(classify())
    start, data, local = one.initial(0), rows(50), LocalPlan(batch_size=7, epochs=2)
    first = one.train(start, data, local, seed=1).delta
    two.train(start + 1, rows(9, 5), replace_plan(local, optimizer="adam"), seed=3)  # leaves nothing behind
    np.testing.assert_array_equal(first, two.train(start, data, local, seed=1).delta)
    assert not np.array_equal(first, two.train(start, data, local, seed=2).delta)


def replace_plan(plan, **changes):
    return plan.model_copy(update=changes)


def test_dropout_and_augmentation_are_seeded_and_leave_the_global_state():
    def model():
        return nn.Sequential(nn.Dropout(0.5), MLP(6, 3, (5,)))

    task = replace(classify(model), augment=lambda x, rng: x + float(rng.normal()))
    trainer = Trainer(task)
    start = trainer.initial(0)
    state = torch.random.get_rng_state()
    one, two, other = (trainer.train(start, rows(20), LocalPlan(), seed=s).delta for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_the_global_model_is_not_written_to():
    trainer = Trainer(classify())
    start = trainer.initial(0)
    before = start.copy()
    start.setflags(write=False)  # as a vector decoded from a message is
    data = rows(20)
    data.x.setflags(write=False)
    trainer.train(start, data, LocalPlan(), seed=0)
    np.testing.assert_array_equal(start, before)


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1, 0, 3),
        (10, 4, 2, 0, 6),
        (10, 4, 2, 5, 5),
        (10, 4, 1, 99, 3),
        (1, 4, 3, 0, 3),
        (8, 4, 1, 0, 2),
    ],
)
def test_steps(n, batch, epochs, max_steps, steps):
    local = LocalPlan(batch_size=batch, epochs=epochs, max_steps=max_steps)
    result = Trainer(classify()).train(Trainer(classify()).initial(0), rows(n), local, seed=0)
    assert (result.steps, result.num_examples) == (steps, n)
    TrainingLoss().validate(result.sums)
    if not max_steps:
        assert result.sums["examples"][0] == n * epochs


def test_reported_loss_is_that_before_the_step():
    trainer = Trainer(classify())
    start = np.zeros(trainer.layout.size, np.float32)
    sums = trainer.train(start, rows(12), LocalPlan(batch_size=12), seed=0).sums
    assert TrainingLoss().summarise(sums)["loss"] == pytest.approx(np.log(3), rel=1e-6)


def test_divergence_is_refused_with_a_hint():
    data = Dataset(np.full((8, 2), 1e6, np.float32), np.ones(8, np.float32))
    trainer, local = Trainer(regress()), LocalPlan(learning_rate=1e6, epochs=30)
    with pytest.raises(UpdateRejected, match=r"training loss is (nan|inf)") as caught:
        trainer.train(trainer.initial(0), data, local, seed=0)
    assert caught.value.reason is Rejection.NON_FINITE
    assert "learning rate" in caught.value.hint


def test_a_trainer_recovers_from_divergence():
    trainer = Trainer(regress())
    start = trainer.initial(0)
    good = Dataset(np.ones((4, 2), np.float32), np.ones(4, np.float32))
    before = trainer.train(start, good, LocalPlan(momentum=0.9, epochs=3), seed=0).delta
    with pytest.raises(UpdateRejected):
        trainer.train(start, Dataset(good.x * np.nan, good.y), LocalPlan(), seed=0)
    after = trainer.train(start, good, LocalPlan(momentum=0.9, epochs=3), seed=0).delta
    np.testing.assert_array_equal(before, after)


def test_no_rows_wrong_model_and_stop():
    trainer = Trainer(classify())
    start = trainer.initial(0)
    with pytest.raises(UpdateRejected, match="no rows") as caught:
        trainer.train(start, rows(0), LocalPlan(), seed=0)
    assert caught.value.reason is Rejection.DATA_CONTRACT
    with pytest.raises(UpdateRejected, match="model vector") as caught:
        trainer.train(start[:-1], rows(4), LocalPlan(), seed=0)
    assert caught.value.reason is Rejection.WRONG_SHAPE
    answers = iter([False, False, True])
    with pytest.raises(UpdateRejected, match="stopped after 2 steps") as caught:
        trainer.train(start, rows(40), LocalPlan(batch_size=4), seed=0, should_stop=lambda: next(answers))
    assert caught.value.reason is Rejection.FAILED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ConfigError, match="no GPU"):
        Trainer(classify(), device="cuda")
    assert Trainer(classify(), device="auto").device.type == "cpu"


def test_unusable_tasks():
    with pytest.raises(TaskError, match="unknown loss 'hinge'"):
        Trainer(replace(classify(), loss="hinge"))
    with pytest.raises(TaskError, match="is a int, not a torch module"):
        Trainer(replace(classify(), model=lambda: 3))
    with pytest.raises(TaskError, match="no trainable parameter"):
        Trainer(replace(classify(), model=nn.ReLU))


# --- evaluation


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(batch):
    trainer, data = Trainer(classify()), rows(50)
    model = trainer.initial(0)
    sums, whole = (trainer.evaluate(model, data, batch_size=b) for b in (batch, 50))
    np.testing.assert_array_equal(sums["confusion"], whole["confusion"])
    np.testing.assert_allclose(sums["loss_sum"], whole["loss_sum"], rtol=1e-6)
    assert trainer.evaluate(model, rows(0))["examples"][0] == 0


def test_evaluation_between_rounds_changes_nothing():
    one, two = Trainer(classify(Mixed)), Trainer(classify(Mixed))
    start = one.initial(0)
    two.evaluate(start + 1, rows(30, 3))
    results = [t.train(start, rows(20), LocalPlan(batch_size=5), seed=0).delta for t in (one, two)]
    np.testing.assert_array_equal(*results)


def test_digits_learns():
    task = load_task("digits")
    fleet = federated_dataset(task, None, PartitionSpec(kind="iid", clients=5), 0)
    trainer, model = Trainer(task), Trainer(task).initial(0)
    for number in range(6):
        deltas = [
            trainer.train(model, fleet.train(c), LocalPlan(batch_size=16, epochs=2), seed=number).delta
            for c in fleet.clients
        ]
        model = model + np.mean(deltas, axis=0)
    assert task.metrics.summarise(trainer.evaluate(model, fleet.central_test()))["accuracy"] > 0.9
