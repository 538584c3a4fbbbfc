"""What each robust strategy is for: a fifth of the devices attack, on real data, and the model learns on."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

import lepton_strategies
from lepton_fl.errors import ConfigError
from lepton_fl.plan import RunSpec
from lepton_simulations import simulate
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig
from lepton_strategies.base import LeptonStrategy
from lepton_strategies.registry import STRATEGIES, settings_of, strategy_class

SCENARIO = tomllib.loads((Path(__file__).parents[2] / "simulations/robustness.toml").read_text())
ROUNDS = 6


def accuracy(changes: dict, attacked: bool = True):
    """After six rounds of the scenario that is shipped."""
    run = {**SCENARIO["run"], "rounds": ROUNDS, "evaluate_every": ROUNDS, **changes}
    body = {
        **SCENARIO,
        "run": run,
        "engine": {"workers": 0},
        "faults": SCENARIO["faults"] if attacked else {},
    }
    result = run_scenario(SimulationConfig.model_validate(body))
    assert result.verdict.outcome == "completed"
    return result.rows[-1].metrics["central_accuracy"], result


def rule(name: str) -> dict:
    return {"aggregation": {"name": name, "trim": 0.2, "malicious": 0.2}}


@pytest.fixture(scope="module")
def unharmed() -> float:
    return accuracy({}, attacked=False)[0]


def test_attackers_destroy_the_mean(unharmed):
    assert accuracy({})[0] < 0.45
    assert unharmed > 0.85


@pytest.mark.parametrize(
    ("name", "loss"),
    # Krum takes one device's update, which is noisy: that is its price.
    [("median", 0.1), ("trimmed_mean", 0.1), ("krum", 0.3), ("multi_krum", 0.1), ("geometric_median", 0.1)],
)
def test_a_robust_rule_learns_on_among_attackers(name, loss, unharmed):
    assert accuracy(rule(name))[0] > unharmed - loss


@pytest.mark.parametrize("name", ["median", "multi_krum"])
def test_without_attackers_a_rule_is_close_to_the_mean(name, unharmed):
    assert accuracy(rule(name), attacked=False)[0] > unharmed - 0.05


def test_norm_bounding_refuses_who_does_not_keep_to_it(unharmed):
    """Attackers scale their updates after clipping: the coordinator names them and goes on without them."""
    found, result = accuracy({"clip_norm": 0.5})
    assert found > unharmed - 0.1
    malicious = round(SCENARIO["faults"]["malicious"] * SCENARIO["data"]["partition"]["clients"])
    assert all(row.reports == SCENARIO["run"]["cohort"]["size"] - malicious for row in result.rows)


def test_norm_bounding_bounds_who_keeps_to_it():
    """Flipped labels give an update of ordinary length: it pulls, by no more than its share."""
    faults = {"malicious": 0.2, "attack": "label_flip"}
    settings = {"clients": 10, "rounds": 4, "local": SCENARIO["run"]["local"], "workers": 0, "faults": faults}
    result = simulate("digits", "norm_bounding", clip_norm=0.3, evaluate_every=4, **settings)
    assert all(row.reports == 10 for row in result.rows)
    assert result.rows[-1].metrics["central_accuracy"] > 0.6


# --- by class and by name ---------------------------------------------------------------------------------

ROBUST = {
    "Median": ("median", {}),
    "TrimmedMean": ("trimmed_mean", {"trim": 0.3}),
    "Krum": ("krum", {"malicious": 0.1}),
    "MultiKrum": ("multi_krum", {"malicious": 0.1}),
    "GeometricMedian": ("geometric_median", {}),
}


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_strategy_says_its_rule_and_weighs_all_alike(name):
    rule_name, parameters = ROBUST[name]
    spec = getattr(lepton_strategies, name)("digits", **parameters, server={"name": "fedadam"}).spec
    assert (spec.aggregation.name, spec.weighting, spec.server.name) == (rule_name, "equal", "fedadam")
    assert parameters.items() <= spec.aggregation.to_json().items()
    with pytest.raises(ValidationError, match="set weighting='equal'"):
        getattr(lepton_strategies, name)("digits", weighting="examples")


def test_norm_bounding_is_a_mean_of_clipped_updates():
    spec = lepton_strategies.NormBounding("digits", clip_norm=0.25).spec
    assert (spec.aggregation.name, spec.weighting, spec.clip_norm) == ("mean", "equal", 0.25)


def test_a_rule_goes_with_any_server_optimiser():
    aggregation = {"name": "median"}
    spec = lepton_strategies.FedYogi("digits", aggregation=aggregation, weighting="equal").spec
    assert (spec.server.name, spec.aggregation.name) == ("fedyogi", "median")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_is_a_documented_class_that_is_exported(name):
    found = strategy_class(name)
    assert issubclass(found, LeptonStrategy)
    assert getattr(lepton_strategies, found.__name__) is found
    assert found.__name__ in lepton_strategies.__all__
    assert found.__doc__
    assert found.settings.__doc__


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "median", "krum", "norm_bounding"])
def test_the_settings_of_a_name_are_those_of_the_class(name):
    named = RunSpec.model_validate({"task": "digits", **settings_of(name)})
    ours = strategy_class(name)("digits").spec
    assert named.model_copy(update={"task": ours.task}) == ours


def test_unknown_names_and_parameters_are_said():
    with pytest.raises(ConfigError, match="no strategy 'fedavgg'") as error:
        settings_of("fedavgg")
    assert "trimmed_mean" in error.value.hint
    with pytest.raises(ConfigError, match="no strategy 'mean'"):
        simulate("digits", "mean")
