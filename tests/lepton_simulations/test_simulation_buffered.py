"""Buffered runs in virtual time: stragglers cost less, a seed is a run, and crashes are survived."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from lepton_fl.config import load
from lepton_fl.errors import ConfigError
from lepton_simulations.api import run_scenario, simulate
from lepton_simulations.config import SimulationConfig
from lepton_strategies import FedBuff

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]

LOCAL = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 16, "epochs": 1}
CLIENTS = 12


def scenario(**changes) -> SimulationConfig:
    run = {
        "task": "digits",
        "rounds": 8,
        "cohort": {"size": CLIENTS, "deadline_s": 10_000.0, "fill_wait_s": 0.0},
        "local": LOCAL,
        "weighting": "equal",
        **changes.pop("run", {}),
    }
    devices = {"classes": [{"speed": {"kind": "lognormal", "median": 50.0, "sigma": 0.5}, "latency_s": 0.1}]}
    faults = {"stragglers": 0.25, "slowdown": 20.0, **changes.pop("faults", {})}
    body = {
        "run": run,
        "data": {"partition": {"kind": "iid", "clients": CLIENTS}},
        "engine": {"workers": 0, **changes.pop("engine", {})},
        "devices": devices,
        "faults": faults,
    }
    return SimulationConfig.model_validate({**body, **changes})


BUFFERED = {"mode": "buffered", "buffer": {"size": 4, "concurrency": 10}, "rounds": 16}


def time_to(result, accuracy):
    return next(row.time_s for row in result.rows if row.metric("accuracy") >= accuracy)


def test_with_stragglers_a_buffered_run_is_there_sooner():
    together = run_scenario(
        scenario(run={"early_stop": {"metric": "accuracy", "mode": "max", "target": 0.8}})
    )
    buffered = run_scenario(
        scenario(
            run={**BUFFERED, "early_stop": {"metric": "accuracy", "mode": "max", "target": 0.8}, "rounds": 60}
        )
    )
    assert time_to(buffered, 0.8) < time_to(together, 0.8) / 2


def test_the_result_does_not_depend_on_the_workers():
    results = [run_scenario(scenario(run={**BUFFERED, "rounds": 5}, engine={"workers": n})) for n in (0, 2)]
    again = run_scenario(scenario(run={**BUFFERED, "rounds": 5}))
    for other in (results[1], again):
        assert_array_equal(other.model, results[0].model)
        assert other.journal_sha256 == results[0].journal_sha256


def test_drop_outs_damage_and_a_crash_of_the_coordinator():
    faults = {"drop_training": 0.2, "silence_s": 5.0, "corrupt": 0.2, "crash_rounds": [2]}
    result = run_scenario(scenario(run={**BUFFERED, "rounds": 6}, faults=faults))
    assert result.verdict.outcome == "completed"
    assert [row.round for row in result.rows] == [1, 2, 3, 4, 5, 6]
    assert sum(row.outcomes.get("offline", 0) for row in result.rows) > 0
    assert np.isfinite(result.model).all()


def test_silence_without_word_lasts_until_the_deadline():
    faults = {"drop_training": 0.5, "silence_s": 0.0, "stragglers": 0.0}
    cohort = {"size": CLIENTS, "deadline_s": 30.0, "fill_wait_s": 0.0}
    run = {**BUFFERED, "buffer": {"size": 3, "concurrency": 6}, "rounds": 6, "cohort": cohort}
    result = run_scenario(scenario(run=run, faults=faults))
    assert result.rows[-1].time_s > 30
    assert sum(row.outcomes.get("offline", 0) for row in result.rows) > 0


def test_a_run_goes_on_from_its_last_step(tmp_path):
    looks = iter([False] * 5 + [True] * 1000)
    config = scenario(run={**BUFFERED, "rounds": 8}, output={"folder": str(tmp_path / "run"), "plots": False})
    stopped = run_scenario(config, should_stop=lambda: next(looks))
    assert stopped.verdict.outcome == "stopped"
    rest = run_scenario(config, resume=True)
    assert rest.verdict.outcome == "completed"
    assert [row.round for row in rest.rows] == list(range(1, 9))


def test_a_strategy_object_says_it_all():
    strategy = FedBuff("digits", size=2, concurrency=4, staleness=1.0, local=LOCAL)
    result = simulate("digits", strategy, clients=6, rounds=3, workers=0)
    assert result.verdict.outcome == "completed"
    assert [sum(row.outcomes.values()) for row in result.rows] == [2, 2, 2]


def test_flowers_own_loop_cannot_run_it():
    strategy = FedBuff("digits")
    with pytest.raises(ConfigError, match="buffered"):
        strategy.configure_train(1, None, None, None)


@pytest.mark.parametrize("name", ["heterogeneity", "heterogeneity_personal", "heterogeneity_buffered"])
def test_the_scenarios_load_with_every_setting_that_they_name(name):
    path = ROOT / "simulations" / f"{name}.toml"
    changes = {k: v for k, v in re.findall(r"--set (\S+)=(\S+)", path.read_text()) if k.startswith("run.")}
    assert changes
    for key, value in changes.items():
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        assert load(SimulationConfig, path, env={}, overrides={key: value}).value.run.task
