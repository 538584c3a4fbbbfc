"""Every engine computes what the trainer computes, for every device on its own."""

import multiprocessing
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks import Classification, DataContract, Dataset, Regression, Task
from lepton_fl.tasks.models import CNN, GRU, LSTM, MLP, Linear
from lepton_fl.training.trainer import Trainer
from lepton_simulations.engines import ClientWork, choose, fused, hidden
from lepton_simulations.engines.contract import Elsewhere
from lepton_simulations.engines.fused import FusedEngine
from lepton_simulations.engines.grams import Grams
from lepton_simulations.engines.layers import Dense, PooledConv
from lepton_simulations.engines.lean import LeanEngine
from lepton_simulations.engines.native import NativeEngine
from lepton_simulations.engines.schedule import schedule
from lepton_simulations.engines.vectorised import VectorisedEngine

torch.set_num_threads(1)

# name -> model, shape of a row, classes (0 = a number)
MODELS = {
    "mlp": (lambda: MLP(20, 5, (33, 7)), (20,), 5),
    "mlp of images": (lambda: MLP(48, 10, (40,)), (3, 4, 4), 10),
    "linear": (lambda: Linear(9, 3), (9,), 3),
    "ridge": (lambda: Linear(9, 0), (9,), 0),
    "mlp of numbers": (lambda: MLP(12, 0, (31,)), (12,), 0),
    "cnn": (lambda: CNN((1, 8, 8), 4, width=6, hidden=11), (1, 8, 8), 4),
    "cnn of colours": (lambda: CNN((3, 9, 10), 0, width=4, hidden=8), (3, 9, 10), 0),
}
SEQUENCES = {
    "gru": (lambda: GRU(3, inputs=2, hidden=5), (6, 2), 3),
    "lstm": (lambda: LSTM(0, inputs=2, hidden=5), (6, 2), 0),
}
PLANS = {
    "plain": LocalPlan(learning_rate=0.1, batch_size=10),
    "epochs": LocalPlan(learning_rate=0.1, batch_size=8, epochs=3, weight_decay=0.01),
    "max steps": LocalPlan(learning_rate=0.1, batch_size=4, epochs=5, max_steps=7, proximal_mu=0.3),
    "whole batch": LocalPlan(
        learning_rate=0.1, batch_size=1000, epochs=2, weight_decay=0.02, proximal_mu=0.1
    ),
    "momentum": LocalPlan(
        learning_rate=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.2, batch_size=7, epochs=2
    ),
}
OTHER_PLANS = {
    "adam": LocalPlan(optimizer="adam", learning_rate=0.01, weight_decay=0.01, batch_size=6, epochs=2),
    "clip": LocalPlan(learning_rate=0.1, clip_grad_norm=0.05, proximal_mu=0.2, batch_size=10),
}
SIZES = (23, 60, 5, 10, 31, 1, 64)


def task_of(model, shape, classes, loss="") -> Task:
    if classes:
        metrics, loss = Classification(classes), loss or "cross_entropy"
    else:
        metrics, loss = Regression(), loss or "squared_error"
    return Task("probe", "1", model, DataContract(shape, num_classes=classes), loss, metrics)


def rows(n, shape, classes, seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n) if classes else rng.normal(size=n).astype(np.float32)
    return Dataset(rng.normal(size=(n, *shape)).astype(np.float32), y)


def clients_of(shape, classes, sizes=SIZES, **more) -> list[ClientWork]:
    return [ClientWork(rows(n, shape, classes, i), seed=100 + i, **more) for i, n in enumerate(sizes)]


def start_of(trainer) -> np.ndarray:
    start = trainer.initial(3)
    return start + np.random.default_rng(5).normal(scale=0.05, size=start.shape).astype(np.float32)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """Small layers behind convolutions are trained like large ones, but where engines are told not to."""
    monkeypatch.setattr(hidden, "LARGE", 0)


def engines_of(trainer, sample, sequences=False):
    if not sequences:
        yield FusedEngine(trainer, sample, chunk=4)
        yield FusedEngine(trainer, sample, dual=False, chunk=3)
        with suppress(Elsewhere):
            yield NativeEngine(trainer, sample)
    yield VectorisedEngine(trainer, sample, chunk=4)


def expect_equal(ours, theirs, tolerance):
    assert ours.failures.keys() == theirs.failures.keys()
    np.testing.assert_allclose(ours.deltas, theirs.deltas, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(ours.steps, theirs.steps)
    np.testing.assert_array_equal(ours.seen, theirs.seen)
    np.testing.assert_allclose(
        ours.loss_sum, theirs.loss_sum, rtol=max(tolerance, 1e-12) * 10, atol=tolerance
    )


# --- the same updates


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("model", "shape", "classes"), MODELS.values(), ids=MODELS)
def test_in_double_precision_every_engine_equals_the_trainer(model, shape, classes, plan):
    trainer = Trainer(task_of(model, shape, classes), dtype=torch.float64)
    works, start = clients_of(shape, classes), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, plan)
    assert np.abs(expected.deltas).max() > 1e-3
    for engine in engines_of(trainer, works[0].data):
        expect_equal(engine.train(start, works, plan), expected, 1e-12)


@pytest.mark.parametrize("plan", ["plain", "epochs", "max steps", "momentum"])
@pytest.mark.parametrize("name", ["cnn", "cnn of colours"])
def test_convolutions_without_a_compiler(name, plan, monkeypatch):
    monkeypatch.setattr(fused, "_functions", lambda dtype: None)
    model, shape, classes = MODELS[name]
    trainer = Trainer(task_of(model, shape, classes), dtype=torch.float64)
    works, start = clients_of(shape, classes), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, PLANS[plan])
    for dual in (True, False):
        engine = FusedEngine(trainer, works[0].data, dual=dual, chunk=3)
        expect_equal(engine.train(start, works, PLANS[plan]), expected, 1e-12)


@pytest.mark.parametrize("plan", ["plain", "whole batch", "momentum"])
@pytest.mark.parametrize(("model", "shape", "classes"), MODELS.values(), ids=MODELS)
def test_in_single_precision_they_differ_by_rounding(model, shape, classes, plan):
    """Convolutions by more: they add up in another order. The test above tells that it is only that."""
    trainer = Trainer(task_of(model, shape, classes))
    works, start = clients_of(shape, classes), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, PLANS[plan])
    for engine in engines_of(trainer, works[0].data):
        tolerance = 1e-5 if any(isinstance(m, nn.Conv2d) for m in trainer.module.modules()) else 1e-6
        expect_equal(engine.train(start, works, PLANS[plan]), expected, tolerance)


@pytest.mark.parametrize("plan", [*PLANS.values(), *OTHER_PLANS.values()], ids=[*PLANS, *OTHER_PLANS])
@pytest.mark.parametrize(("model", "shape", "classes"), SEQUENCES.values(), ids=SEQUENCES)
def test_sequences(model, shape, classes, plan):
    trainer = Trainer(task_of(model, shape, classes), dtype=torch.float64)
    works, start = clients_of(shape, classes, (9, 23)), start_of(trainer)
    engine, why = choose(trainer, plan, works)
    assert (engine.name, "GRU" in why or "LSTM" in why or "optim" in why or "clip" in why) == ("lean", True)
    single = works[0]
    expected = trainer.train(start, single.data, plan, seed=single.seed)
    np.testing.assert_array_equal(engine.train(start, [single], plan).deltas[0], expected.delta)


@pytest.mark.parametrize("plan", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_any_optimiser_vectorised(plan):
    model, shape, classes = MODELS["mlp"]
    trainer = Trainer(task_of(model, shape, classes), dtype=torch.float64)
    works, start = clients_of(shape, classes), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, plan)
    engine = VectorisedEngine(trainer, works[0].data, chunk=4)
    expect_equal(engine.train(start, works, plan), expected, 1e-10 if plan.optimizer == "adam" else 1e-12)


@pytest.mark.parametrize("plan", ["plain", "max steps", "momentum"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_corrections_and_own_starting_points(name, plan):
    model, shape, classes = MODELS[name]
    trainer = Trainer(task_of(model, shape, classes), dtype=torch.float64)
    start, rng = start_of(trainer), np.random.default_rng(1)
    works = clients_of(shape, classes)
    for i in (0, 3, 4):
        works[i] = replace(works[i], correction=rng.normal(scale=0.1, size=start.shape).astype(np.float32))
    for i in (1, 3):
        works[i] = replace(works[i], start=start + rng.normal(scale=0.1, size=start.shape).astype(np.float32))
    expected = LeanEngine(trainer).train(start, works, PLANS[plan])
    for engine in engines_of(trainer, works[0].data):
        expect_equal(engine.train(start, works, PLANS[plan]), expected, 1e-12)


@pytest.mark.parametrize("loss", ["huber", "squared_error"])
def test_losses_of_numbers(loss):
    trainer = Trainer(task_of(lambda: MLP(6, 0, (9,)), (6,), 0, loss), dtype=torch.float64)
    works, start = clients_of((6,), 0), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, PLANS["plain"])
    for engine in engines_of(trainer, works[0].data):
        expect_equal(engine.train(start, works, PLANS["plain"]), expected, 1e-12)


def test_huber_on_both_sides_of_its_bend():
    trainer = Trainer(task_of(lambda: Linear(2, 0), (2,), 0, "huber"), dtype=torch.float64)
    x = np.ones((4, 2), np.float32)
    works = [ClientWork(Dataset(x, np.array([0.2, -5.0, 3.0, 1.0], np.float32)), 0)]
    start, plan = np.zeros(3, np.float32), LocalPlan(batch_size=4, epochs=3)
    expected = LeanEngine(trainer).train(start, works, plan)
    for engine in engines_of(trainer, works[0].data):
        expect_equal(engine.train(start, works, plan), expected, 1e-12)


class Written(nn.Module):
    """A user's own forward(), with functions instead of modules, a stride and no bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, stride=2, bias=False)
        self.second = nn.Linear(20, 6, bias=False)
        self.third = nn.Linear(6, 3)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.first(x)), 2)
        x = functional.relu(self.second(torch.flatten(x, 1)))
        return self.third(x)


def test_a_model_is_known_by_its_structure():
    trainer = Trainer(task_of(Written, (2, 10, 10), 3), dtype=torch.float64)
    works, start = clients_of((2, 10, 10), 3), start_of(trainer)
    engine, why = choose(trainer, PLANS["epochs"], works)
    assert (engine.name, why) == ("fused", "")
    expected = LeanEngine(trainer).train(start, works, PLANS["epochs"])
    expect_equal(engine.train(start, works, PLANS["epochs"]), expected, 1e-12)


def test_weights_of_a_row_loss_that_is_a_function():
    def loss(outputs, targets):
        return ((outputs - targets[:, None]) ** 4).mean()

    task = replace(task_of(lambda: MLP(4, 2, (3,)), (4,), 2), loss=loss)
    trainer = Trainer(task, dtype=torch.float64)
    works = clients_of((4,), 0)
    engine, _ = choose(trainer, PLANS["plain"], works, tier="vectorised")
    expected = LeanEngine(trainer).train(start_of(trainer), works, PLANS["plain"])
    expect_equal(engine.train(start_of(trainer), works, PLANS["plain"]), expected, 1e-12)


class Pooled(nn.Sequential):
    """Convolutions of all kinds, each with pooling: strides, overlapping windows, lines of odd lengths."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 16, (3, 5), stride=(1, 2), padding=(2, 1)),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 7, (2, 3), padding=(0, 2), bias=False),
            nn.ReLU(),
            nn.MaxPool2d((1, 2)),
            nn.Conv2d(7, 4, (3, 2)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_convolutions_with_pooling_pass_over_zeros(channels, dtype, monkeypatch):
    calls = []
    right = PooledConv.backward
    monkeypatch.setattr(
        PooledConv,
        "backward",
        lambda self, grad, k, *, needs_input: (
            calls.append(needs_input) or right(self, grad, k, needs_input=needs_input)
        ),
    )
    shape = (channels, 14, 19)
    trainer = Trainer(task_of(lambda: Pooled(channels), shape, 3), dtype=dtype)
    works, start = clients_of(shape, 3, (23, 10)), start_of(trainer)
    expected = LeanEngine(trainer).train(start, works, PLANS["epochs"])
    engine = FusedEngine(trainer, works[0].data)
    expect_equal(
        engine.train(start, works, PLANS["epochs"]), expected, 1e-12 if dtype == torch.float64 else 1e-5
    )
    assert set(calls) == ({True} if channels == 1 else {True, False})


# --- each device for itself


@pytest.mark.parametrize("name", ["mlp", "mlp of images", "ridge", "cnn"])
@pytest.mark.parametrize("plan", ["plain", "epochs", "whole batch", "momentum"])
@pytest.mark.parametrize("kind", ["dual", "direct", "native"])
def test_a_result_does_not_depend_on_the_company_to_the_bit(name, plan, kind):
    if (name, kind) == ("cnn", "native"):
        return
    model, shape, classes = MODELS[name]
    trainer = Trainer(task_of(model, shape, classes))
    works, start, local = (
        clients_of(shape, classes, (60, 23, 60, 5, 31, 9, 64)),
        start_of(trainer),
        PLANS[plan],
    )

    def make(chunk):
        if kind == "native":
            return NativeEngine(trainer, works[0].data, chunk=chunk)
        return FusedEngine(trainer, works[0].data, chunk=chunk, dual=kind == "dual")

    engine = make(5)
    together = engine.train(start, works, local)
    deltas, losses = together.deltas.copy(), together.loss_sum
    for other in (engine, make(2)):
        for some in ([6], [2, 0], [5, 4, 3, 2, 1, 0]):
            result = other.train(start, [works[i] for i in some], local)
            np.testing.assert_array_equal(result.deltas, deltas[some])
            np.testing.assert_array_equal(result.loss_sum, losses[some])


def test_where_rows_lie_in_memory_does_not_matter():
    model, shape, classes = MODELS["mlp"]
    trainer = Trainer(task_of(model, shape, classes))
    work, start = clients_of(shape, classes, (40,))[0], start_of(trainer)
    shifted = np.empty(work.data.x.size + 3, np.float32)[3:].reshape(work.data.x.shape)
    shifted[:] = work.data.x
    other = replace(work, data=Dataset(shifted, work.data.y))
    for engine in (FusedEngine(trainer, work.data), NativeEngine(trainer, work.data), LeanEngine(trainer)):
        for plan in (PLANS["plain"], PLANS["whole batch"]):
            one = engine.train(start, [work], plan).deltas.copy()
            np.testing.assert_array_equal(one, engine.train(start, [other], plan).deltas)


def test_products_of_rows_are_kept_and_change_nothing():
    trainer = Trainer(task_of(lambda: MLP(120, 4, (32,)), (120,), 4))
    works, start = clients_of((120,), 4, (23, 30, 60)), start_of(trainer)
    engine, local = FusedEngine(trainer, works[0].data), PLANS["epochs"]
    first = engine.train(start, works, local).deltas.copy()
    kept, nothing = engine._grams, torch.zeros(1, 120)
    for work in works[:2]:
        np.testing.assert_allclose(kept.of(work.data, nothing), work.data.x @ work.data.x.T + 1, rtol=1e-4)
    assert kept.of(works[2].data, nothing).shape == (1, 1)  # many rows of few features: not kept
    np.testing.assert_array_equal(engine.train(start, works, local).deltas, first)
    for steps in (2, 5):  # some of the rows, in the first epoch and in the second
        few = local.model_copy(update={"max_steps": steps})
        expect_equal(engine.train(start, works, few), LeanEngine(trainer).train(start, works, few), 1e-6)


def test_processes_share_the_products_of_rows():
    data = rows(6, (40,), 3)
    grams, x = Grams(torch.float32, biased=False), torch.from_numpy(data.x)
    grams.reserve(data, x)
    child = multiprocessing.get_context("fork").Process(target=grams.of, args=(data, x))
    child.start()
    child.join()
    assert child.exitcode == 0
    torch.testing.assert_close(grams.of(data, torch.zeros(6, 40)), x @ x.T)  # not computed again


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("plan", ["plain", "epochs", "momentum"])
def test_a_device_that_diverges_fails_alone(name, plan):
    model, shape, classes = MODELS[name]
    trainer = Trainer(task_of(model, shape, classes))
    works, start = clients_of(shape, classes), start_of(trainer)
    ill = works.copy()
    x = works[1].data.x.copy()
    x[3] = np.nan
    ill[1] = replace(works[1], data=Dataset(x, works[1].data.y))
    for engine in engines_of(trainer, works[0].data):
        well = engine.train(start, works, PLANS[plan])
        expected = np.delete(well.deltas, 1, 0)
        result = engine.train(start, ill, PLANS[plan])
        assert result.failures.keys() == {1}
        assert result.failures[1].reason is Rejection.NON_FINITE
        assert "training loss is nan" in str(result.failures[1])
        assert not result.deltas[1].any()
        assert result.steps[1] == result.seen[1] == 0
        np.testing.assert_array_equal(np.delete(result.deltas, 1, 0), expected)
        again = engine.train(start, works, PLANS[plan])  # and nothing is left behind
        np.testing.assert_array_equal(np.delete(again.deltas, 1, 0), expected)
        assert not again.failures


def test_devices_that_do_not_fit_are_left_to_the_trainer():
    model, shape, classes = MODELS["mlp"]
    trainer = Trainer(task_of(model, shape, classes))
    works, start = clients_of(shape, classes), start_of(trainer)
    empty = Dataset(works[0].data.x[:0], works[0].data.y[:0])
    wrong = works[2].data.y.copy()
    wrong[0] = 77
    ignored = works[3].data.y.copy()
    ignored[0] = -100  # torch's cross entropy passes over these
    mixed = [
        replace(works[0], data=empty),
        works[1],
        replace(works[2], data=Dataset(works[2].data.x, wrong)),
        replace(works[3], data=Dataset(works[3].data.x, ignored)),
        replace(works[4], start=start[:-1]),
        replace(works[5], correction=start[:-1]),
    ]
    expected = LeanEngine(trainer).train(start, mixed, PLANS["plain"])
    assert {i: f.reason for i, f in expected.failures.items()} == {
        0: Rejection.DATA_CONTRACT,
        2: Rejection.FAILED,
        4: Rejection.WRONG_SHAPE,
        5: Rejection.WRONG_SHAPE,
    }
    for engine in (FusedEngine(trainer, works[0].data), NativeEngine(trainer, works[0].data)):
        result = engine.train(start, mixed, PLANS["plain"])
        assert {i: str(f) for i, f in result.failures.items()} == {
            i: str(f) for i, f in expected.failures.items()
        }
        expect_equal(result, expected, 1e-6)
        with pytest.raises(UpdateRejected, match="model vector"):
            engine.train(start[:-1], works, PLANS["plain"])


@pytest.mark.parametrize("make", [FusedEngine, VectorisedEngine, lambda trainer, _: LeanEngine(trainer)])
def test_stop(make):
    model, shape, classes = MODELS["mlp"]
    trainer = Trainer(task_of(model, shape, classes))
    works = clients_of(shape, classes, (20, 20, 20))
    answers = iter([False, True])
    engine = make(trainer, works[0].data)
    result = engine.train(start_of(trainer), works, PLANS["plain"], should_stop=lambda: next(answers, True))
    assert result.failures.keys() == {0, 1, 2}
    assert {f.reason for f in result.failures.values()} == {Rejection.FAILED}
    assert "stopped after 1 steps" in str(result.failures[0])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("n", [1, 4, 5, 8, 23])
def test_the_schedule_is_the_trainers(n, plan):
    data = Dataset(np.arange(n, dtype=np.float32)[:, None], np.zeros(n, np.float32))
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].int().tolist())
            return super().forward(x).squeeze(-1) * 0

    trainer = Trainer(task_of(lambda: Spy(1, 1), (1,), 0))
    trainer.train(trainer.initial(0), data, plan, seed=4)
    own = schedule(n, 4, plan)
    assert [r[:s].tolist() for r, s in zip(own.rows, own.sizes, strict=True)] == seen


# --- which engine


def probe(trainer_model, shape=(6,), classes=3, **changes):
    trainer = Trainer(replace(task_of(trainer_model, shape, classes), **changes))
    return trainer, clients_of(shape, classes, (20, 33))


@pytest.mark.parametrize(
    ("model", "changes", "plan", "reason"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.5), MLP(6, 3)), {}, {}, "it has a layer of type Dropout"),
        (lambda: nn.Sequential(nn.BatchNorm1d(6), MLP(6, 3)), {}, {}, "it has buffers"),
        (lambda: MLP(6, 3), {"augment": lambda x, rng: x}, {}, "the task augments its batches"),
        (lambda: MLP(6, 3), {"loss": lambda o, t: o.mean()}, {}, "its loss is a function of its own"),
        (lambda: MLP(6, 3), {}, {"optimizer": "adam"}, "the optimiser is 'adam'"),
        (lambda: MLP(6, 3), {}, {"clip_grad_norm": 1.0}, "gradients are clipped at every step"),
    ],
)
def test_what_fused_cannot_do_is_left_to_lean_with_a_sentence(model, changes, plan, reason):
    trainer, works = probe(model, **changes)
    local = LocalPlan(**plan)
    engine, why = choose(trainer, local, works)
    assert (engine.name, why) == ("lean", f"The native and fused engines are not used: {reason}.")
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(trainer, local, works, tier="fused")
    assert "'lean'" in caught.value.hint


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x)))


class Skip(Twice):
    def forward(self, x):
        return self.head(self.layer(x) + x)


class Branch(Twice):
    def forward(self, x):
        return self.head(self.layer(x) if x.sum() > 0 else x)


class Hooked(MLP):
    def __init__(self):
        super().__init__(6, 3)
        self.layers[0].register_forward_hook(lambda module, given, out: out * 2)


@pytest.mark.parametrize("model", [Twice, Skip, Branch, Hooked])
def test_what_is_no_chain_is_trained_all_the_same(model):
    trainer, works = probe(model)
    engine, why = choose(trainer, PLANS["plain"], works)
    assert engine.name == "lean"
    assert why.startswith("The native and fused engines are not used: ")
    assert not engine.train(trainer.initial(0), works, PLANS["plain"]).failures


def test_frozen_parameters_are_left_to_lean():
    def model():
        made = MLP(6, 3)
        made.layers[0].weight.requires_grad_(False)
        return made

    trainer, works = probe(model)
    engine, why = choose(trainer, PLANS["plain"], works)
    assert (engine.name, "frozen" in why) == ("lean", True)
    start = start_of(trainer)
    expected = engine.train(start, works, PLANS["epochs"])
    expect_equal(
        VectorisedEngine(trainer, works[0].data).train(start, works, PLANS["epochs"]), expected, 1e-6
    )


@pytest.mark.parametrize("layer", [Dense, PooledConv])
def test_a_wrong_layer_is_caught_by_the_check(layer, monkeypatch):
    right = layer.backward

    def wrong(self, grad, *number, needs_input):
        back = right(self, grad, *number, needs_input=needs_input)
        return None if back is None else back * (1 + 1e-6)

    trainer, works = probe(*MODELS["cnn"])
    assert choose(trainer, PLANS["plain"], works)[0].name == "fused"
    monkeypatch.setattr(layer, "backward", wrong)
    engine, why = choose(trainer, PLANS["plain"], works)
    assert engine.name == "lean"
    assert "it differs from autograd by" in why
    with pytest.raises(ConfigError, match="differs from autograd"):
        choose(trainer, PLANS["plain"], works, tier="fused")


def test_a_layer_that_raises_is_caught_by_the_check(monkeypatch):
    monkeypatch.setattr(Dense, "forward", lambda self, x: x.nonsense())
    trainer, works = probe(*MODELS["cnn"])
    engine, why = choose(trainer, PLANS["plain"], works)
    assert (engine.name, "it failed on this model (AttributeError)" in why) == ("lean", True)


@pytest.mark.parametrize("tier", ["lean", "fused", "native", "vectorised"])
def test_a_tier_by_name(tier):
    trainer, works = probe(*MODELS["mlp"])
    engine, why = choose(trainer, PLANS["plain"], works, tier=tier)
    assert (engine.name, why) == (tier, "")
    assert engine.chunk >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile imports its own old parts
def test_compiled():
    trainer, works = probe(*MODELS["mlp"])
    engine, _ = choose(trainer, PLANS["plain"], works, tier="compiled")
    start = start_of(trainer)
    works = clients_of((20,), 5, (23, 60))
    expected = LeanEngine(trainer).train(start, works, PLANS["plain"])
    expect_equal(engine.train(start, works, PLANS["plain"]), expected, 1e-6)


def test_no_sample():
    trainer, _ = probe(*MODELS["mlp"])
    with pytest.raises(ConfigError, match="no device to check"):
        choose(trainer, PLANS["plain"], [])
