"""What may be asked for, what is refused, and the table of choices."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from pydantic import ValidationError

from lepton_fl.errors import ConfigError
from lepton_fl.plan import AggregationSpec, CohortSpec, PrivacySpec, RunSpec
from lepton_fl.privacy.accounting import RdpGate
from lepton_fl.privacy.budget import Account, Budget
from lepton_fl.privacy.events import DistributedGaussian, Skellam, composed
from lepton_fl.privacy.mechanisms import Correlated, Independent
from lepton_fl.privacy.planning import (
    CENTRAL,
    Contract,
    choices,
    epsilon_curve,
    epsilon_for,
    multiplier_at_noise,
    multiplier_for,
    prepare,
)
from lepton_fl.privacy.spec import refuse_conflicts

SMALL = Contract(rounds=500, cohort=100, population=5000, min_separation=50)
RUN = {
    "task": "digits",
    "rounds": 500,
    "weighting": "equal",
    "evaluate_every": 0,
    "cohort": CohortSpec(size=100),
}


def spec(**values) -> PrivacySpec:
    return PrivacySpec(**{"epsilon": 8.0, "delta": 1e-5, "min_separation": 50, "population": 5000, **values})


# ------------------------------------------------------------------------------------------ the choices


def test_the_small_fleet_at_equal_noise():
    """What a claim of sampling is worth, and what correlated noise is worth without one."""
    expected = {"every-round": 344.5, "independent": 17.9, "blt": 2.60, "poisson": 2.77}
    for mechanism, epsilon in expected.items():
        z = multiplier_at_noise(mechanism, SMALL, sqrt(500))
        assert epsilon_for(mechanism, SMALL, z, 1e-5) == pytest.approx(epsilon, rel=5e-3)


def test_noise_and_epsilon_are_inverse_for_every_mechanism():
    for adjacency in ("zero-out", "replace-one"):
        for mechanism in CENTRAL:
            if mechanism == "poisson":
                continue
            z = multiplier_for(mechanism, SMALL, 4.0, 1e-5, adjacency)
            assert 3.999 < epsilon_for(mechanism, SMALL, z, 1e-5, adjacency) <= 4.0


def test_the_table_is_ordered_as_theory_says():
    short = Contract(rounds=50, cohort=100, population=5000, min_separation=10)
    rows = {row.mechanism: row for row in choices(short, 1.0, 1e-5)}
    assert list(rows) == list(CENTRAL)
    assert (
        rows["every-round"].final_noise
        > rows["independent"].final_noise
        > rows["blt"].final_noise
        >= rows["banded"].final_noise
    )
    assert rows["poisson"].caveat
    assert all(row.mean_noise <= row.final_noise for row in rows.values())
    assert epsilon_for("poisson", short, rows["poisson"].noise_multiplier, 1e-5) <= 1.0
    unknown = choices(Contract(rounds=50, cohort=100, min_separation=10), 4.0, 1e-5)
    assert "poisson" not in [row.mechanism for row in unknown]


def test_epsilon_grows_with_the_rounds():
    curve = epsilon_curve("independent", SMALL, 2.0, 1e-5, [1, 50, 51, 500])
    assert [n for n, _ in curve] == [1, 50, 51, 500]
    values = [epsilon for _, epsilon in curve]
    assert values[0] == values[1] < values[2] < values[3]  # the first 50 rounds see a device once


def test_a_contract_that_the_population_cannot_keep_is_refused():
    with pytest.raises(ConfigError, match="at least cohort \\* min_separation = 5000") as caught:
        Contract(rounds=500, cohort=100, population=4999, min_separation=50)
    assert "49" in caught.value.hint
    with pytest.raises(ConfigError, match="rounds >= 1"):
        Contract(rounds=0, cohort=1)
    with pytest.raises(ConfigError, match="size is not given"):
        epsilon_for("poisson", Contract(rounds=5, cohort=1), 1.0, 1e-5)


# ------------------------------------------------------------------------------------------ the specification


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"epsilon": 0.0}, "either noise_multiplier or epsilon"),
        ({"noise_multiplier": 1.0}, "either noise_multiplier or epsilon"),
        ({"trust": "distributed"}, "mechanism='blt' gives unit='device', trust='central'"),
        ({"unit": "example"}, "mechanism='blt' gives unit='device'"),
        ({"mechanism": "skellam"}, "trust='distributed'"),
        ({"delta": 1e-3}, "above 1/population"),
        ({"sampling": "poisson"}, "is for mechanism='independent'"),
        ({"sampling": "poisson", "mechanism": "independent"}, "always answer"),
        (
            {
                "sampling": "poisson",
                "mechanism": "independent",
                "always_reachable": True,
                "adjacency": "replace-one",
            },
            "zero-out",
        ),
        ({"adaptive_clip": {}}, "adaptive_clip is for noise that is fresh"),
        ({"bands": 3}, "bands is for mechanism='banded'"),
        ({"bands": 51, "mechanism": "banded"}, "exceeds min_separation=50"),
        (
            {"mechanism": "skellam", "trust": "distributed", "colluders": 0.7},
            "leaves nobody honest",
        ),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"clip_norm": float("nan")}, "finite number|greater than 0"),
        ({"epsilon": float("inf")}, "finite number"),
        ({"something": 1}, "Extra inputs"),
    ],
)
def test_a_specification_that_cannot_be_true_is_refused(values, why):
    with pytest.raises(ValidationError, match=why):
        spec(**values)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"weighting": "examples"}, "weighting='examples'"),
        ({"aggregation": AggregationSpec(name="median")}, "'median' is no sum"),
        ({"mode": "buffered"}, "mode='buffered'"),
        ({"clip_norm": 2.0}, "clip_norm=2 differs"),
        ({"evaluate_every": 1}, "evaluate_every"),
        ({"local": {"control_variates": True}}, "control_variates"),
        ({"cohort": CohortSpec(size=101)}, "need a population of 5050"),
        ({"cohort": CohortSpec(size=100, over_selection=1.2)}, "need a population of 6000"),
    ],
)
def test_a_run_in_which_the_guarantee_would_be_false_is_refused(values, why):
    refuse_conflicts(spec(), RunSpec(**RUN), secure_aggregation=False)
    with pytest.raises(ConfigError, match=why):
        refuse_conflicts(spec(), RunSpec(**{**RUN, **values}), secure_aggregation=False)


def test_all_conflicts_are_named_at_once():
    run = RunSpec(**{**RUN, "weighting": "examples", "evaluate_every": 1})
    distributed = spec(mechanism="skellam", trust="distributed")
    with pytest.raises(ConfigError, match=r"secure aggregation.*") as caught:
        refuse_conflicts(distributed, run, secure_aggregation=False)
    assert all(word in str(caught.value) for word in ("weighting", "evaluate_every", "trust"))
    refuse_conflicts(distributed, RunSpec(**RUN), secure_aggregation=True)


# ------------------------------------------------------------------------------------------ from spec to code


@pytest.mark.parametrize("mechanism", ["blt", "banded", "independent"])
def test_a_prepared_run_fits_its_own_budget_to_the_last_round(mechanism):
    asked = spec(mechanism=mechanism, min_separation=5, population=5000)
    ready = prepare(asked, rounds=20, cohort=100, coordinates=30, grid_step=2.0**-20)
    account, running = Account(Budget("model", epsilon=8.0, delta=1e-5)), ready.mechanism
    for number in range(1, 21):
        event = running.charge(number)
        if event is not None:
            account = account.reserve(f"{number}", event)
        running = running.release(np.zeros(30, np.int64), number).following
    assert account.spent == ready.epsilon
    assert 7.99 < ready.epsilon <= 8.0
    assert account.events == ready.planned


def test_the_kind_of_mechanism_follows_the_specification():
    def made(**values):
        return prepare(spec(**values), rounds=50, cohort=100, coordinates=3, grid_step=2.0**-20).mechanism

    assert isinstance(made(), Correlated)
    assert made(mechanism="banded", bands=7).factorization.bands[6] != 0
    assert made(mechanism="independent") == Independent(
        made(mechanism="independent").noise_multiplier, 2.0**20, 1
    )
    assert made(mechanism="independent", min_separation=1).participations == 0
    drawn = made(
        mechanism="independent", min_separation=1, sampling="poisson", always_reachable=True, epsilon=1.0
    )
    assert drawn.sampling_probability == 0.02
    weaker = made(epsilon=0.0, noise_multiplier=0.5)
    assert weaker.noise_multiplier == 0.5


def test_the_clip_moves_and_the_price_does_not():
    step, cohort = 2.0**-20, 100
    ready = prepare(
        spec(mechanism="independent", adaptive_clip={}, population=0, clip_norm=4.0),
        rounds=50,
        cohort=cohort,
        coordinates=3,
        grid_step=step,
    )
    shape = ready.shape(ready.clip)
    assert ready.mechanism.norm_bound == shape.norm_bound
    after = ready.clip.updated(cohort * shape.part.bit, shape.part.bit, cohort)  # everybody within the clip
    assert after.clip_norm < 4.0
    smaller = ready.shape(after)
    assert smaller.clip_norm <= after.clip_norm < shape.clip_norm * 1.1
    assert smaller.norm_bound < shape.norm_bound
    assert smaller.part.bit / smaller.norm_bound == pytest.approx(shape.part.bit / shape.norm_bound, rel=1e-4)
    fixed = prepare(spec(), rounds=50, cohort=cohort, coordinates=3, grid_step=step)
    assert fixed.shape(None).part.tail == 0
    assert fixed.shape(None).norm_bound == fixed.clip_norm / step


@pytest.mark.parametrize("kind", ["skellam", "ddgauss"])
def test_devices_add_noise_in_proportion_to_a_clip_that_moves(kind):
    """Every round costs at most what is charged, fits its bits, and has few different clips."""
    asked = spec(
        mechanism=kind, trust="distributed", adaptive_clip={}, metrics={}, clip_norm=1.0, min_separation=10
    )
    ready = prepare(asked, rounds=50, cohort=100, coordinates=1000, grid_step=2.0**-24)
    noise, clip, laws = ready.distributed, ready.clip, set()
    honest = noise.min_survivors - noise.colluders
    for wanted in np.geomspace(1e-4, 1e4, 200).tolist():
        shape = ready.shape(replace(clip, clip_norm=wanted))
        assert 0.9 < shape.clip_norm / wanted <= 1.1
        assert (shape.clip_norm / shape.grid_step).is_integer()
        l1 = min(sqrt(1003) * shape.norm_bound, shape.norm_bound**2)
        variance = shape.part.share_variance * honest
        event = {
            "skellam": lambda l1=l1, n=shape.norm_bound, v=variance: Skellam(l1, n, v),
            "ddgauss": lambda l1=l1, n=shape.norm_bound, v=variance: DistributedGaussian(
                l1, n, v, float(honest), 1003.0
            ),
        }[kind]()
        assert RdpGate().epsilon({event: 5}, asked.delta) <= ready.epsilon * (1 + 1e-12)
        largest = 100 * shape.norm_bound + 4 * sqrt(100 * shape.part.share_variance)
        assert largest < 2.0 ** (asked.bits - 1)
        laws.add(shape.part.share_variance)
    assert len(laws) <= 8


def test_distributed_runs_bring_their_own_grid():
    asked = spec(mechanism="skellam", trust="distributed", bits=24, min_separation=10)
    ready = prepare(asked, rounds=50, cohort=100, coordinates=1000, grid_step=2.0**-20)
    assert ready.mechanism is ready.distributed
    assert ready.mechanism.charge(1) == composed(ready.distributed.planned_event, 5)
    assert ready.mechanism.charge(2) is None
    assert ready.distributed.min_survivors == 70
    assert ready.planned == {ready.distributed.planned_event: 5}
    assert 7.99 < ready.epsilon <= 8.0
    with pytest.raises(ConfigError, match="planned from epsilon"):
        prepare(
            asked.model_copy(update={"epsilon": 0.0, "noise_multiplier": 1.0}),
            rounds=50,
            cohort=100,
            coordinates=10,
            grid_step=1.0,
        )
    with pytest.raises(ConfigError, match="Example-level"):
        prepare(
            PrivacySpec(mechanism="dp-sgd", unit="example", trust="local", epsilon=8.0),
            rounds=5,
            cohort=10,
            coordinates=10,
            grid_step=1.0,
        )
