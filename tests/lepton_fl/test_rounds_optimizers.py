"""Server optimisers against the papers' formulas written out plainly, and against answers by hand."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from lepton_fl.errors import RunError
from lepton_fl.plan import ServerOptimizerSpec
from lepton_fl.rounds import optimizers as module
from lepton_fl.rounds.optimizers import ServerState, step

NAMES = ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


def run(spec: ServerOptimizerSpec, model, means):
    model = np.asarray(model, np.float32)
    state = ServerState.initial(spec, len(model))
    for mean in means:
        model, state = step(spec, model, np.asarray(mean, np.float64), state)
    return model, state


def reference(spec: ServerOptimizerSpec, x, deltas):
    """Algorithm 2 of Reddi et al. 2021, and FedAvgM of Hsu et al. 2019, a coordinate at a time in float64."""
    eta, b1, b2, tau = spec.learning_rate, spec.momentum, spec.beta_2, spec.tau
    out = []
    for i, value in enumerate(x):
        xi, m, v = float(value), 0.0, tau**2
        for delta in deltas:
            d = float(delta[i])
            if spec.name == "fedavg":
                xi += eta * d
                continue
            if spec.name == "fedavgm":
                m = b1 * m + d
                xi += eta * m
                continue
            m = b1 * m + (1 - b1) * d
            if spec.name == "fedadagrad":
                v = v + d**2
            elif spec.name == "fedadam":
                v = b2 * v + (1 - b2) * d**2
            else:
                assume(abs(v - d**2) > 1e-5 * v)  # at the jump of the sign, rounding decides
                sign = (v - d**2 > 0) - (v - d**2 < 0)
                v = v - (1 - b2) * d**2 * sign
            xi += eta * m / (v**0.5 + tau)
        out.append(xi)
    return np.array(out)


@pytest.mark.parametrize("name", NAMES)
@given(
    deltas=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    momentum=st.floats(0, 0.99),
    tau=st.floats(1e-4, 1e-1),
)
@settings(deadline=None, max_examples=40)
def test_against_the_formulas(name, deltas, momentum, tau):
    spec = ServerOptimizerSpec(name=name, learning_rate=0.3, momentum=momentum, beta_2=0.9, tau=tau)
    model, _ = run(spec, [1.0, 0.0, -2.0], deltas)
    # Optimiser memory is kept in float32 between rounds; where the update is tiny, sqrt(v) magnifies that.
    assert_allclose(model, reference(spec, [1.0, 0.0, -2.0], deltas), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "means", "expected"),
    [
        (ServerOptimizerSpec(name="fedavg"), [[0.5], [0.25]], 1.75),
        (ServerOptimizerSpec(name="fedavg", learning_rate=0.5), [[0.5]], 1.25),
        (ServerOptimizerSpec(name="fedavgm", momentum=0.5), [[1.0], [1.0]], 1 + 1 + 1.5),
        # m = 0.5, v = 1 + 1 = 2: 1 + 0.5 / (sqrt(2) + 1)
        (ServerOptimizerSpec(name="fedadagrad", momentum=0.5, tau=1.0), [[1.0]], 1 + 0.5 / (2**0.5 + 1)),
        # m = 2 * 0.5 = 1, v = 0.75 * 1 + 0.25 * 4 = 1.75
        (
            ServerOptimizerSpec(name="fedadam", momentum=0.5, beta_2=0.75, tau=1.0),
            [[2.0]],
            1 + 1 / (1.75**0.5 + 1),
        ),
        # v - d^2 = 1 - 4 < 0, so v = 1 + 0.25 * 4 = 2
        (
            ServerOptimizerSpec(name="fedyogi", momentum=0.5, beta_2=0.75, tau=1.0),
            [[2.0]],
            1 + 1 / (2**0.5 + 1),
        ),
        # v - d^2 = 1 - 0.25 > 0, so v = 1 - 0.25 * 0.25 = 0.9375
        (
            ServerOptimizerSpec(name="fedyogi", momentum=0.0, beta_2=0.75, tau=1.0),
            [[0.5]],
            1 + 0.5 / (0.9375**0.5 + 1),
        ),
        # v = d^2: the sign is 0 and v stays
        (ServerOptimizerSpec(name="fedyogi", momentum=0.0, beta_2=0.5, tau=1.0), [[1.0]], 1 + 1 / 2),
    ],
)
def test_by_hand(spec, means, expected):
    model, _ = run(spec, [1.0], means)
    assert model[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_stay_as_they_are_and_blocks_do_not_matter(name, monkeypatch):
    spec = ServerOptimizerSpec(name=name, learning_rate=0.1)
    rng = np.random.default_rng(0)
    model, mean = rng.normal(size=50).astype(np.float32), rng.normal(size=50)
    state = ServerState.initial(spec, 50)
    kept = model.copy(), mean.copy(), {k: v.copy() for k, v in state.slots.items()}
    after, slots = step(spec, model, mean, state)
    assert_array_equal(model, kept[0])
    assert_array_equal(mean, kept[1])
    for key, value in kept[2].items():
        assert_array_equal(state.slots[key], value)
    monkeypatch.setattr(module, "BLOCK", 7)
    again, more = step(spec, model, mean, state)
    assert_array_equal(again, after)
    for key in slots.slots:
        assert_array_equal(more.slots[key], slots.slots[key])


@pytest.mark.parametrize("name", NAMES)
def test_no_update_moves_nothing(name):
    model, _ = run(ServerOptimizerSpec(name=name), [1.0, -1.0], [[0.0, 0.0]])
    assert_array_equal(model, [1.0, -1.0])


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e39])
def test_a_model_that_is_not_finite_is_refused(bad):
    with pytest.raises(RunError, match="non-finite weights"):
        run(ServerOptimizerSpec(), [1.0, 1.0], [[0.0, bad]])
