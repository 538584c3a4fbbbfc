"""What is compiled on the spot: the same numbers as numpy and the trainer, and nothing of anybody else's."""

import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_fl.rounds.accumulator import Accumulator
from lepton_fl.tasks import Classification, DataContract, Dataset, Regression, Task
from lepton_fl.tasks.models import CNN, MLP
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import scaling
from lepton_simulations.engines import ClientWork, adding, choose, library, schedule
from lepton_simulations.engines.contract import Elsewhere, Trained, Unsupported
from lepton_simulations.engines.lean import LeanEngine
from lepton_simulations.engines.native import NativeEngine

torch.set_num_threads(1)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = (library.library, adding.compiled, schedule.compiled_order)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


PLAN = LocalPlan(learning_rate=0.1, batch_size=10)


def task_of(model, inputs, classes) -> Task:
    metrics = Classification(classes) if classes else Regression()
    loss = "cross_entropy" if classes else "squared_error"
    return Task("probe", "1", model, DataContract((inputs,), num_classes=classes), loss, metrics)


def works_of(inputs, classes, sizes=(23, 60, 5), outputs=()) -> list[ClientWork]:
    works = []
    for i, n in enumerate(sizes):
        rng = np.random.default_rng(i)
        y = rng.integers(0, classes, n) if classes else rng.normal(size=(n, *outputs)).astype(np.float32)
        works.append(ClientWork(Dataset(rng.normal(size=(n, inputs)).astype(np.float32), y), 100 + i))
    return works


# --- training


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 16, 64])
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (17, 15), (70, 33, 5), (300, 3)])
def test_every_shape_of_a_tile(batch, sizes):
    inputs, *hidden = sizes
    trainer = Trainer(task_of(lambda: MLP(inputs, 3, tuple(hidden)), inputs, 3), dtype=torch.float64)
    works, start = works_of(inputs, 3, (23, 9)), trainer.initial(3)
    plan = PLAN.model_copy(update={"batch_size": batch, "epochs": 2, "weight_decay": 0.01})
    expected = LeanEngine(trainer).train(start, works, plan)
    found = NativeEngine(trainer, works[0].data).train(start, works, plan)
    np.testing.assert_allclose(found.deltas, expected.deltas, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-12)


class Odd(nn.Module):
    """Layers without bias or ReLU, several outputs per row, and a ReLU at the end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, 7, bias=False), nn.Linear(7, 18), nn.ReLU(), nn.Linear(18, 4), nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_a_chain_of_another_form(loss):
    trainer = Trainer(replace(task_of(Odd, 9, 0), loss=loss), dtype=torch.float64)
    works, start = works_of(9, 0, outputs=(4,)), trainer.initial(3)
    plan = PLAN.model_copy(update={"momentum": 0.9, "proximal_mu": 0.1})
    expected = LeanEngine(trainer).train(start, works, plan)
    found = NativeEngine(trainer, works[0].data).train(start, works, plan)
    np.testing.assert_allclose(found.deltas, expected.deltas, rtol=0, atol=1e-12)


def test_norms_and_peaks_are_those_of_numpy_to_the_bit():
    trainer = Trainer(task_of(lambda: MLP(70, 3, (80,)), 70, 3))
    works = works_of(70, 3)
    works[1].data.x[0] = np.nan
    found = NativeEngine(trainer, works[0].data).train(trainer.initial(0), works, PLAN)
    assert found.failures.keys() == {1}
    norms, peaks = found.looked
    assert_array_equal(norms, scaling(np.ascontiguousarray(found.deltas), 2.0**-24, 1.0).norms)
    assert_array_equal(peaks, np.abs(found.deltas).max(axis=1))


def test_a_long_training_is_stopped_between_its_steps(monkeypatch):
    monkeypatch.setattr("lepton_simulations.engines.native._PATIENCE", 3000)
    trainer = Trainer(task_of(lambda: MLP(6, 3, (5,)), 6, 3))
    engine = NativeEngine(trainer, works_of(6, 3)[0].data)
    start, works = trainer.initial(0), works_of(6, 3, (20, 60, 5))
    whole = engine.train(start, works, PLAN)
    deltas, asked = whole.deltas.copy(), []
    result = engine.train(start, works, PLAN, should_stop=lambda: len(asked) == 3 or asked.append(1))
    assert result.failures.keys() == {1, 2}
    assert [f.reason for f in result.failures.values()] == [Rejection.FAILED] * 2
    assert_array_equal(result.deltas[0], deltas[0])
    assert not result.deltas[1:].any()
    assert not result.looked[0][1:].any()
    again = engine.train(start, works, PLAN)  # nothing is left behind
    assert_array_equal(again.deltas, deltas)


def test_other_models_are_left_to_other_engines():
    image = Task("probe", "1", lambda: CNN((1, 8, 8), 3), DataContract((1, 8, 8), num_classes=3),
                 "cross_entropy", Classification(3))  # fmt: skip
    data = Dataset(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
    with pytest.raises(Elsewhere, match="convolutions"):
        NativeEngine(Trainer(image), data)
    assert choose(Trainer(image), PLAN, [ClientWork(data, 0)])[1] == ""  # fused is the fastest for it
    deep = task_of(lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(17))), 3, 3)
    with pytest.raises(Unsupported, match="17 linear layers"):
        NativeEngine(Trainer(deep), works_of(3, 3)[0].data)
    first = task_of(lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), 3, 3)
    assert (
        "The native engine is not used: it begins with a ReLU."
        in choose(Trainer(first), PLAN, works_of(3, 3))[1]
    )


# --- orders of rows


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 60, 64, 65, 600])
def test_orders_are_those_of_numpy(rows):
    plan = PLAN.model_copy(update={"batch_size": 7, "epochs": 3})
    assert schedule.compiled_order() is not None
    for seed in (0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, 2**64, 2**100, 123456789):
        found, rng = schedule.schedule(rows, seed, plan), np.random.default_rng(seed)
        rng.integers(2**63)
        width = found.width
        expected = np.zeros((3, -(-rows // width) * width), np.int64)
        for epoch in expected:
            epoch[:rows] = rng.permutation(rows) if rows > 7 else np.arange(rows)
        assert_array_equal(found.rows.reshape(3, -1), expected)


# --- adding


def plan_of(size: int, **changes) -> RoundPlan:
    base = RoundPlan(
        run_id="run", round=1, attempt=1, kind="train", task="a:b", task_version="1", layout_digest="d" * 64,
        num_coordinates=size, model_sha256="e" * 64, cohort=("d",), wanted_reports=1, min_reports=1,
        deadline_s=1.0, local=PLAN, weighting="examples", max_weight=2**22, grid_step=2.0**-24,
        clip_norm=0.0, nonce="00",
    )  # fmt: skip
    return base.model_copy(update=changes)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e4])
@pytest.mark.parametrize("bad", [None, np.nan, np.inf, 300.0])
@pytest.mark.parametrize("size", [1, 31, 4096, 9001])
@pytest.mark.parametrize("looked", [True, False])
def test_the_sum_is_that_of_numpy_to_the_bit(clip_norm, bad, size, looked):
    rng = np.random.default_rng(size)
    lengths = 10.0 ** rng.uniform(-4, 1, (6, 1))
    wide = np.zeros((6, size + 5), np.float32)  # rows of a larger memory, as an engine has it
    deltas = wide[:, :size]
    deltas[:] = rng.standard_normal((6, size)) * lengths / size**0.5
    if bad is not None:
        deltas[2, -1] = bad
    counts, plan = np.array([1, 5, 7, 2**22, 9, 2**30]), plan_of(size, clip_norm=clip_norm)
    trained = Trained.of(deltas)
    trained.fail(4, UpdateRejected(Rejection.FAILED, "for a reason"))
    if looked:
        trained.looked = adding._look(adding.compiled(), deltas)
    ours, theirs = Accumulator(plan), Accumulator(plan)
    found = adding.add_deltas(ours, plan, trained, counts)
    expected = theirs.add_deltas(np.ascontiguousarray(deltas), counts, leave_out=[4])
    assert {k: str(v) for k, v in found.refused.items()} == {k: str(v) for k, v in expected.refused.items()}
    assert_array_equal(found.norms, expected.norms)
    assert_array_equal(ours.subtotal().total, theirs.subtotal().total)
    assert (ours.reports, ours.weight) == (theirs.reports, theirs.weight)


def test_without_a_compiler_numpy_adds_and_another_engine_trains(fresh, monkeypatch, tmp_path):
    drawn = schedule.schedule(23, 5, PLAN).rows
    for function in (library.library, schedule.compiled_order):
        function.cache_clear()
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    assert adding.compiled() is schedule.compiled_order() is None
    assert_array_equal(schedule.schedule(23, 5, PLAN).rows, drawn)
    deltas, plan = np.ones((2, 5), np.float32), plan_of(5)
    accumulator = Accumulator(plan)
    adding.add_deltas(accumulator, plan, Trained.of(deltas), np.array([1, 2]))
    assert_array_equal(accumulator.subtotal().total, np.full(5, 3 * 2**24))
    trainer, works = Trainer(task_of(lambda: MLP(6, 3, (5,)), 6, 3)), works_of(6, 3)
    engine, why = choose(trainer, PLAN, works)
    assert engine.name == "fused"
    assert why.startswith("The native engine is not used: there is no C compiler (")
    with pytest.raises(ConfigError, match="no C compiler"):
        choose(trainer, PLAN, works, tier="native")


def test_a_library_that_computes_something_else_is_not_used(fresh, monkeypatch, tmp_path):
    text = library.SOURCE.read_text()
    wrong = text.replace("sum += LOG(whole)", "sum += 1.001 * LOG(whole)").replace(
        "sum[i] += weight * whole[i]", "sum[i] += weight * whole[i] + 1"
    )
    source = tmp_path / "wrong.c"
    source.write_text(wrong)
    monkeypatch.setattr(library, "SOURCE", source)
    assert adding.compiled() is None
    engine, why = choose(Trainer(task_of(lambda: MLP(6, 3, (5,)), 6, 3)), PLAN, works_of(6, 3))
    assert engine.name == "fused"
    assert "it differs from autograd by" in why


def test_it_is_compiled_once_for_this_user_only(fresh):
    library.library()
    folder = library.cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (path,) = folder.iterdir()
    made = path.stat().st_mtime_ns
    library.library.cache_clear()
    library.library()
    assert path.stat().st_mtime_ns == made
    path.unlink()  # another file: the old one is in use
    path.write_bytes(b"damaged")
    library.library.cache_clear()
    assert library.library().lepton_room  # made anew
    assert path.stat().st_mtime_ns != made


@pytest.mark.parametrize("case", ["writable by others", "a link", "a file"])
def test_a_folder_that_is_not_ours_alone_is_not_used(case, fresh, monkeypatch):
    folder = library.cache_folder()
    folder.parent.mkdir(parents=True)
    if case == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif case == "a link":
        (folder.parent / "elsewhere").mkdir()
        folder.symlink_to(folder.parent / "elsewhere")
    else:
        folder.write_text("")
    monkeypatch.setenv("CC", "cc -O0")
    assert library.library().lepton_room
    assert folder.is_file() or not list(folder.iterdir())


def test_what_the_compiler_says_is_told(fresh, monkeypatch, tmp_path):
    source = tmp_path / "wrong.c"
    source.write_text("int nonsense(void) { return missing; }")
    monkeypatch.setattr(library, "SOURCE", source)
    with pytest.raises(Unsupported, match=r"fails \(.*missing"):
        library.library()
    assert not list(library.cache_folder().iterdir())


# --- a first layer without weights of its own


def spare_work(sizes=(33, 60, 8, 20), inputs=80, hidden=(68,), dtype=torch.float32, **changes):
    """Devices whose first layer needs none, an engine for them, where they begin, and a plan."""
    trainer = Trainer(task_of(lambda: MLP(inputs, 3, hidden), inputs, 3), dtype=dtype)
    works = [replace(work, data=work.data.aligned()) for work in works_of(inputs, 3, sizes)]
    engine = NativeEngine(trainer, works[0].data)
    return engine, works, trainer.initial(0), PLAN.model_copy(update=changes)


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 16, 64])
@pytest.mark.parametrize(
    ("inputs", "hidden", "sizes"),
    [(16, (4,), (8, 1)), (48, (20, 5), (19, 40, 7)), (80, (68,), (33, 60)), (192, (128,), (256, 64, 2))],
)
@pytest.mark.parametrize("more", [{"epochs": 3}, {"max_steps": 4}])
def test_every_shape_without_weights(batch, inputs, hidden, sizes, more):
    more |= {"batch_size": batch, "learning_rate": 0.01}  # at a larger one, rounding grows step by step
    engine, works, start, plan = spare_work(sizes, inputs, hidden, torch.float64, **more)
    expected = LeanEngine(engine._trainer).train(start, works, plan)
    found = engine.train(start, works, plan)
    assert len(engine._moves) == len(works)
    np.testing.assert_allclose(found.deltas, expected.deltas, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-12)
    again = engine.train(start, works, plan)  # with what was kept
    assert_array_equal(again.deltas, engine.train(start, works, plan).deltas)


def test_weights_are_spared_only_where_that_is_right():
    engine, works, start, plan = spare_work((60, 137, 20))
    told = {"momentum": 0.9}, {"weight_decay": 0.01}, {"proximal_mu": 0.1}
    assert engine.train(start, works[::2], plan).unwritten is not None
    assert engine.train(start, works, plan).unwritten is None  # 137 rows are more than twice 68 outputs
    for more in told:
        assert engine.train(start, works[::2], plan.model_copy(update=more)).unwritten is None
    x = np.zeros(60 * 80 + 1, np.float32)[1:].reshape(60, 80)  # in the midst of a cache line
    works[0] = replace(works[0], data=Dataset(x, works[0].data.y))
    assert engine.train(start, works[:1], plan).unwritten is None


def test_a_device_gives_the_same_bits_whatever_is_beside_it():
    engine, works, start, plan = spare_work((33, 60, 140, 8))
    together = engine.train(start, works, plan).deltas.copy()
    alone = [engine.train(start, [work], plan).deltas[0].copy() for work in works]
    assert_array_equal(together, alone)
    fresh = spare_work((33, 60, 140, 8))[0]
    backwards = fresh.train(start, works[::-1], plan).deltas[::-1]
    assert_array_equal(together, backwards)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05, 10.0])
@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_what_is_added_unwritten_is_what_would_be_written(clip_norm, weighting):
    engine, works, start, plan = spare_work()
    counts = np.array([len(work.data) for work in works])
    of = plan_of(len(start), clip_norm=clip_norm, weighting=weighting)
    trained, ours, theirs = engine.train(start, works, plan), Accumulator(of), Accumulator(of)
    trained.fail(2, UpdateRejected(Rejection.FAILED, "for a reason"))
    found = adding.add_deltas(ours, of, trained, counts)
    assert trained.unwritten is not None  # still: nobody has asked for the numbers
    norms = trained.unwritten.norms()
    assert trained.deltas is trained.rows
    assert trained.unwritten is None
    exact = np.linalg.norm(trained.deltas.astype(np.float64), axis=1)
    assert (norms >= exact).all()
    assert (norms <= exact * (1 + 1e-3)).all()
    assert not trained.deltas[2].any()
    trained.looked = norms, np.abs(trained.deltas).max(axis=1)
    again = adding.add_deltas(theirs, of, trained, counts)
    assert_array_equal(ours.subtotal().total, theirs.subtotal().total)
    assert_array_equal(found.factors, again.factors)
    assert (ours.weight, ours.reports) == (theirs.weight, theirs.reports) == (int(ours.weight), 3)
    assert not found.refused


def test_the_bound_of_a_norm_holds_where_rows_and_moves_cancel():
    engine, works, start, plan = spare_work((60,), batch_size=60, epochs=5, learning_rate=1e-3)
    works[0].data.x[:] = 1 + 1e-3 * works[0].data.x  # rows that are nearly the same
    trained = engine.train(start, works, plan)
    bound, norm = trained.unwritten.norms()[0], np.linalg.norm(trained.deltas[0].astype(np.float64))
    assert norm <= bound <= 1.01 * norm


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e4])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_an_update_off_the_grid_is_taken_back(bad, clip_norm):
    engine, works, start, plan = spare_work()
    of = plan_of(len(start), clip_norm=clip_norm, grid_step=2.0**-24)
    trained = engine.train(start, works, plan)
    for place in (0, 67):  # seen in the first tile, and in the last one
        trained.unwritten._moves[1].view(-1)[59 * 80 + place] = bad
        ours, theirs = Accumulator(of), Accumulator(of)
        found = adding.add_deltas(ours, of, trained, np.array([1, 2, 3, 4]))
        rest = engine.train(start, [works[0], *works[2:]], plan)
        expected = adding.add_deltas(theirs, of, rest, np.array([1, 3, 4]))
        if clip_norm and np.isfinite(bad):
            assert not found.refused
            assert found.factors[1] < expected.factors[0]
        else:
            assert found.refused.keys() == {1}
            assert str(bad) in str(found.refused[1]) or "bound" in str(found.refused[1])
            assert_array_equal(ours.subtotal().total, theirs.subtotal().total)
            assert (ours.weight, ours.reports) == (theirs.weight, theirs.reports)
        trained = engine.train(start, works, plan)


def test_a_stopped_call_leaves_no_moves_behind(monkeypatch):
    engine, works, start, plan = spare_work()
    monkeypatch.setattr("lepton_simulations.engines.native._PATIENCE", 10**6)  # some devices in a call
    whole, asked = engine.train(start, works, plan).deltas.copy(), []
    result = engine.train(start, works, plan, should_stop=lambda: len(asked) == 1 or asked.append(1))
    assert 0 < len(result.failures) < 4
    for position in range(4):
        expected = whole[position] if position not in result.failures else np.zeros_like(start)
        assert_array_equal(result.deltas[position], expected)


@pytest.mark.parametrize("grid_step", [2.0**-24, 2.0**-37])  # the bound is within the grid, or beyond it
def test_a_clipped_sum_does_not_depend_on_who_is_trained_together(grid_step):
    engine, works, start, plan = spare_work((60, 33, 140), learning_rate=0.01)
    of = plan_of(len(start), clip_norm=0.02, grid_step=grid_step, weighting="equal")
    totals = []
    for groups in ([[0, 1, 2]], [[0, 1], [2]], [[2], [1], [0]]):
        sums = Accumulator(of)
        for group in groups:
            trained = engine.train(start, [works[i] for i in group], plan)
            found = adding.add_deltas(sums, of, trained, np.ones(len(group), np.int64))
            assert not found.refused
            assert (found.norms > 0.02).all()
        totals.append(sums.subtotal().total)
    assert_array_equal(totals[0], totals[1])
    assert_array_equal(totals[0], totals[2])
