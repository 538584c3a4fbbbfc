"""Students, pruning, training on a teacher's answers, graphs and their quantisation, on small models."""

from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from scipy import stats
from torch import nn

from lepton_fl.compression import graph
from lepton_fl.compression.fit import Lesson, answers_of, fit, teaching_loss
from lepton_fl.compression.quantise import quantise
from lepton_fl.compression.recipe import (
    GeneratorSpec,
    PruneSpec,
    QuantiseSpec,
    StudentSpec,
    Training,
    TransferSpec,
)
from lepton_fl.compression.students import (
    pruned,
    student,
    thinned,
    with_rounding,
    without_rounding,
    zero_masks,
)
from lepton_fl.compression.transfer import TransferRows, describe, generated_rows, proxy_rows
from lepton_fl.errors import ConfigError, DataContractError, DataError, RunError, StateCorrupt, TaskError
from lepton_fl.tasks import load_task
from lepton_fl.tasks.federated import read
from lepton_fl.tasks.models import CNN, GRU, MLP, initial_model
from lepton_fl.training.bridge import load_vector
from lepton_fl.training.trainer import Trainer

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
DIGITS = load_task("digits")


@pytest.fixture(scope="module")
def rows():
    return DIGITS.transform(read(DIGITS, None).test)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return CNN((1, 8, 8), 10, 8, 16).eval()


@pytest.fixture(scope="module")
def trained(rows):
    """A model that has seen half of the test rows: enough to be sure of something."""
    trainer = Trainer(DIGITS)
    half = rows.take(np.arange(180))
    model = initial_model(DIGITS, 0)
    start = trainer.initial(0)
    delta = trainer.train(start, half, DIGITS.local.model_copy(update={"epochs": 8}), seed=0).delta
    load_vector(model, trainer.layout, start + delta)
    return model.eval()


def images(n=16, seed=0):
    return np.random.default_rng(seed).random((n, 1, 8, 8), np.float32)


def ran(model, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": x})[0]


# --- students and pruning -----------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.9])
def test_magnitude_pruning_takes_the_smallest_share_away(teacher, amount):
    made, masks = pruned(teacher, PruneSpec(amount=amount), images())
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert float(1 - kept.mean()) == pytest.approx(amount, abs=1e-3)
    weights = dict(made.named_parameters())
    before = {name: weight.detach() for name, weight in teacher.named_parameters()}
    gone = max(float(before[k][m == 0].abs().max()) for k, m in masks.items())
    assert all(
        (weights[k][m == 0] == 0).all() and weights[k][m == 1].abs().min() >= gone for k, m in masks.items()
    )


def test_two_of_four_neighbours_stay(teacher):
    made, masks = pruned(teacher, PruneSpec(kind="2:4"), images())
    for name in masks:
        groups = dict(made.named_parameters())[name].flatten(1).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    assert zero_masks(made).keys() == masks.keys()


def test_removed_channels_make_the_model_smaller_and_leave_the_teacher_alone(teacher):
    before = deepcopy(teacher.state_dict())
    made = thinned(teacher, 0.5, images())
    assert made(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in teacher.parameters()) / 2
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "tiny"}, "no student 'tiny'"),
        ({"kind": "gru"}, "does not take"),
    ],
)
def test_a_student_that_does_not_fit_the_task_is_refused(teacher, spec, message):
    with pytest.raises(TaskError, match=message):
        student(StudentSpec(**spec), DIGITS, teacher, images(), 0)


def test_recurrent_layers_are_not_thinned():
    model = GRU(5, vocabulary=7, hidden=8)
    with pytest.raises(TaskError, match="GRU layers"):
        thinned(model, 0.5, np.zeros((2, 4), np.int64))


def test_a_model_trained_with_rounding_becomes_an_ordinary_one_again(teacher):
    rounding = with_rounding(teacher, 8, activations=True)
    x = torch.from_numpy(images())
    assert not torch.equal(rounding(x), teacher(x))
    rounding(x).square().sum().backward()
    assert all(p.grad is not None for p in rounding.parameters())
    assert torch.equal(without_rounding(rounding, teacher)(x), teacher(x))


# --- training ----------------------------------------------------------------------------------------------


def test_the_teaching_loss_is_zero_for_the_teacher_and_that_of_the_formula_else():
    logits = torch.randn(6, 5)
    assert float(teaching_loss(logits, logits, 3.0)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(6, 5)
    p, q = (torch.softmax(t / 3.0, 1) for t in (logits, other))
    wanted = 9 * (p * (p / q).log()).sum(1).mean()
    assert float(teaching_loss(other, logits, 3.0)) == pytest.approx(float(wanted), rel=1e-4)
    assert float(teaching_loss(torch.zeros(4), torch.ones(4), 3.0)) == 1.0


class Killed(Exception):
    pass


def taught(teacher, path, *, die_after=None):
    model = _start()
    x = images(64)
    lesson = Lesson.of(x, answers_of([teacher], x, CPU), None, CPU)
    done = []

    def on_step(what):
        done.append(what)
        if len(done) == die_after:
            raise Killed

    fit(model, DIGITS, lesson, Training(epochs=4), seed=3, checkpoint=path, on_step=on_step)
    return model


def _start():
    """With batch normalisation, whose running means are no parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_a_killed_training_ends_with_the_same_weights(teacher, tmp_path, epochs):
    whole = taught(teacher, tmp_path / "whole")
    with pytest.raises(Killed):
        taught(teacher, tmp_path / "part", die_after=epochs)
    resumed = taught(teacher, tmp_path / "part")
    found = resumed.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())


def test_a_damaged_training_state_is_refused(teacher, tmp_path):
    with pytest.raises(Killed):
        taught(teacher, tmp_path / "part", die_after=1)
    data = (tmp_path / "part").read_bytes()
    (tmp_path / "part").write_bytes(data[:-3])
    with pytest.raises(StateCorrupt):
        taught(teacher, tmp_path / "part")


def test_masked_weights_stay_zero(teacher, tmp_path):
    model, masks = pruned(teacher, PruneSpec(amount=0.7), images())
    x = images(64)
    lesson = Lesson.of(x, answers_of([teacher], x, CPU), None, CPU)
    fit(model, DIGITS, lesson, Training(epochs=2), seed=0, checkpoint=tmp_path / "c", masks=masks)
    weights = dict(model.named_parameters())
    assert all((weights[name][mask == 0] == 0).all() for name, mask in masks.items())


def test_training_that_diverges_is_told(teacher, tmp_path):
    x = images(64)
    lesson = Lesson.of(x, np.full((64, 10), np.nan, np.float32), None, CPU)
    with pytest.raises(RunError, match="diverged"):
        fit(deepcopy(teacher), DIGITS, lesson, Training(epochs=1), seed=0, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_ensemble_answers_with_the_mean(teacher):
    other = deepcopy(teacher)
    with torch.no_grad():
        other.classifier.layers[-1].bias += 2
    x = images()
    both = answers_of([teacher, other], x, CPU)
    np.testing.assert_allclose(both, answers_of([teacher], x, CPU) + 1, atol=1e-5)


# --- rows to learn from ---------------------------------------------------------------------------------


def shift_of(model, x, reference):
    answers = answers_of([model], x, CPU)
    found = TransferRows(x, None, 0.0)
    spec = TransferSpec(source="generator")
    return describe(found, spec, answers, answers_of([model], reference, CPU), classes=True)


def test_rows_of_the_same_source_are_near_and_others_far(rows, trained):
    near = shift_of(trained, rows.x[180:270], rows.x[270:])
    assert near.shift < 0.3
    far = shift_of(trained, images(200), rows.x[180:])
    assert far.shift > 0.5


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    from lepton_fl.compression.transfer import _distance

    a, b = RNG.normal(size=50), RNG.normal(0.5, size=70)
    assert _distance(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic)


def proxied(path, **arrays):
    np.savez(path, **arrays)
    spec = TransferSpec.model_validate({"source": "proxy", "data": {"kind": "npz", "path": path}, "rows": 5})
    return proxy_rows(spec, DIGITS)


def test_a_proxy_set_needs_no_labels(tmp_path):
    found = proxied(tmp_path / "x.npz", x=np.ones((8, 8, 8)))
    assert found.x.shape == (5, 1, 8, 8)
    assert found.labels is None
    assert (proxied(tmp_path / "y.npz", x=np.ones((8, 8, 8)), y=np.full(8, 99)).x == found.x).all()


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.full((4, 8, 8), 99.0), DataContractError),
        (np.full((4, 8, 8), np.nan), DataContractError),
        (np.ones((4, 8, 9)), DataContractError),
        (np.ones((0, 8, 8)), DataError),
    ],
)
def test_proxy_rows_must_keep_the_contract(tmp_path, x, error):
    with pytest.raises(error):
        proxied(tmp_path / "x.npz", x=x)


def test_a_generator_finds_rows_of_every_class_of_which_the_teacher_is_sure(trained):
    """Noise does not: most of it is of three classes to this teacher."""
    spec = GeneratorSpec(steps=100, batch_size=64, rows=2000)
    made = generated_rows(spec, DIGITS, [trained], images(2), seed=0, device=CPU)
    answers = {
        name: torch.from_numpy(answers_of([trained], x, CPU)).softmax(1)
        for name, x in (("made", made.x), ("noise", images(2000)))
    }
    share = {name: torch.bincount(p.argmax(1), minlength=10) / 2000 for name, p in answers.items()}
    assert 0.05 < share["made"].min() < share["made"].max() < 0.2
    assert share["noise"].min() < 0.05
    sure = {name: float(p.max(1).values.mean()) for name, p in answers.items()}
    assert sure["made"] > sure["noise"]


def test_a_generator_needs_bounds_and_makes_rows_within_them(teacher):
    made = generated_rows(
        GeneratorSpec(steps=6, batch_size=8, rows=20), DIGITS, [teacher], images(), seed=0, device=CPU
    )
    assert made.x.shape == (20, 1, 8, 8)
    assert made.x.min() >= 0
    assert made.x.max() <= 1
    shakespeare = load_task("shakespeare")
    with pytest.raises(ConfigError, match="generator"):
        generated_rows(
            GeneratorSpec(), shakespeare, [teacher], np.zeros((2, 80), np.int64), seed=0, device=CPU
        )


# --- graphs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(teacher):
    return graph.export(teacher, images())


@pytest.fixture(scope="module")
def recurrent():
    torch.manual_seed(0)
    model = GRU(7, vocabulary=11, embedding=32, hidden=24, every_step=True).eval()
    return model, graph.export(model, RNG.integers(0, 11, (4, 6)))


def test_a_graph_computes_what_the_model_does_for_any_batch(teacher, exported):
    for n in (1, 2, 7):
        assert graph.compare(exported, teacher, images(n)) < 1e-4
    inputs, outputs = graph.interface(exported)
    assert (inputs.name, inputs.shape, outputs.name) == ("input", (None, 1, 8, 8), "output")
    assert graph.opset(exported) == 20


def test_another_model_is_not_mistaken_for_it(exported):
    with pytest.raises(TaskError, match="differs"):
        graph.compare(exported, CNN((1, 8, 8), 10, 8, 16).eval(), images())


def test_a_graph_says_nothing_about_the_machine_that_made_it(exported):
    data = exported.SerializeToString()
    assert b".py" not in data
    assert b"stack_trace" not in data


def test_weights_that_are_not_finite_are_not_exported(teacher):
    broken = deepcopy(teacher)
    with torch.no_grad():
        broken.features[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TaskError, match="not finite"):
        graph.export(broken, images())


class Stubborn(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_exported_says_so():
    with pytest.raises(TaskError, match="cannot be exported"):
        graph.export(Stubborn(), images())


def test_multiply_adds_are_those_counted_by_hand(exported, recurrent):
    convolutions = 8 * 9 * 64 + 16 * 8 * 9 * 16
    assert graph.multiply_adds(exported) == convolutions + 64 * 16 + 16 * 10
    gates = 3 * 24 * (32 + 24)
    assert graph.multiply_adds(recurrent[1]) == 6 * (gates + 24 * 7)


def test_the_energy_is_an_estimate_by_a_named_formula():
    assert graph.energy_uj(1_000_000, 0, 32) == pytest.approx(4.6)
    assert graph.energy_uj(0, 1_000_000, 8) == pytest.approx(160)
    assert "Horowitz" in graph.ENERGY_MODEL


# --- quantisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "dynamic", "weights", "fp16"])
def test_a_quantised_graph_is_smaller_and_nearly_the_same(teacher, exported, kind):
    x = images(64)
    made = quantise(exported, QuantiseSpec(kind=kind), x)
    onnx.checker.check_model(made, full_check=False)
    want = ran(exported, x)
    assert len(made.SerializeToString()) < len(exported.SerializeToString())
    assert np.abs(ran(made, x) - want).mean() < 0.1 * np.abs(want).mean()


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_weights_are_the_nearest_of_their_grid(recurrent, bits):
    model, made = recurrent
    small = quantise(made, QuantiseSpec(kind="weights", bits=bits), np.zeros(0))
    x = RNG.integers(0, 11, (4, 6))
    rounded = deepcopy(model)
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.ndim > 1 and weight.numel() >= 256:
                peak = 2 ** (bits - 1) - 1
                scale = weight.abs().amax(1, keepdim=True) / peak
                weight.copy_((weight / scale).round() * scale)
        wanted = rounded(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ran(small, x), wanted, atol=1e-5)
    assert graph.opset(small) == (20 if bits == 8 else 21)


def test_matrix_products_read_four_bits(teacher):
    model = MLP(64, 10, (64,)).eval()
    x = images()
    whole = graph.export(model, x)
    small = quantise(whole, QuantiseSpec(kind="matmul", bits=4), x)
    assert "MatMulNBits" in graph.operators(small)
    assert np.abs(ran(small, x) - ran(whole, x)).max() < 0.2


def test_a_graph_without_an_operator_for_it_is_told(exported):
    with pytest.raises(TaskError, match="changed nothing"):
        quantise(exported, QuantiseSpec(kind="dynamic", operators=("LSTM",)), images())
