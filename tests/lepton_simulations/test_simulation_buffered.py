"""Buffered runs in virtual time: stragglers cost less, a seed is a run, and crashes are survived."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from lepton_fl.config import load
from lepton_fl.errors import ConfigError, StateCorrupt
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
    speed = {"kind": "lognormal", "median": 50.0, "sigma": 0.5}
    devices = changes.pop("devices", {"classes": [{"speed": speed, "latency_s": 0.1}]})
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


FAULTS = {"drop_training": 0.2, "silence_s": 5.0, "corrupt": 0.2, "crash_rounds": [3]}
AWAY = {"kind": "daily", "period_s": 40.0, "on_fraction": 0.8}
HARD = {
    "run": {**BUFFERED, "rounds": 6, "server": {"name": "fedadam", "learning_rate": 0.01}},
    "faults": FAULTS,
    "devices": {"classes": [{"speed": {"kind": "lognormal", "median": 50.0}, "availability": AWAY}]},
}


def hard(folder=None, **changes) -> SimulationConfig:
    """All that can happen at once: old models, drop-outs, a coordinator that crashes, devices that leave."""
    output = {"output": {"folder": str(folder), "plots": False}} if folder else {}
    return scenario(**{**HARD, **output, **changes})


@pytest.fixture(scope="module")
def undisturbed():
    return run_scenario(hard())


def the_same(result, whole):
    assert result.verdict.outcome == "completed"
    assert (result.weights_sha256, result.journal_sha256) == (whole.weights_sha256, whole.journal_sha256)
    assert result.tallies == whole.tallies
    assert [row.metrics for row in result.rows] == [row.metrics for row in whole.rows]
    assert [row.time_s for row in result.rows] == [row.time_s for row in whole.rows]


def test_the_scenario_is_as_hard_as_it_claims(undisturbed, tmp_path):
    outcomes = Counter()
    for row in undisturbed.rows:
        outcomes.update(row.outcomes)
    assert outcomes["offline"] > 0
    assert len(outcomes) > 2
    seen = []
    run_scenario(hard(tmp_path / "run"), on_round=seen.append, should_stop=lambda: len(seen) >= 9)
    saved = json.loads((tmp_path / "run/state.json").read_text())["state"]
    assert len(saved["at_work"]) > 4
    assert len(saved["models"]) > 1  # old ones, too


@pytest.mark.parametrize("looks", [0, 1, 7, 14, 20, 33, 40])
def test_stopped_and_resumed_it_ends_with_the_same_hashes(tmp_path, undisturbed, looks):
    left = iter([False] * looks)
    stopped = run_scenario(hard(tmp_path / "run"), should_stop=lambda: next(left, True))
    assert stopped.verdict.outcome == "stopped"
    the_same(run_scenario(hard(tmp_path / "run"), resume=True), undisturbed)


def test_stopped_again_and_again_and_with_other_workers(tmp_path, undisturbed):
    config, resume, outcome = hard(tmp_path / "run"), False, "stopped"
    while outcome == "stopped":
        seen = []
        result = run_scenario(
            config, resume=resume, on_round=seen.append, should_stop=lambda seen=seen: len(seen) > 1
        )
        outcome, resume = result.verdict.outcome, True
    the_same(result, undisturbed)
    stopped = iter([False] * 20)
    run_scenario(hard(tmp_path / "two"), should_stop=lambda: next(stopped, True))
    config = hard(tmp_path / "two", engine={"workers": 2})
    the_same(run_scenario(config, resume=True), undisturbed)


@pytest.mark.parametrize("at", [3, 9, 15, 21, 26, 27, 28, 29, 30, 31, 32, 33, 34, 40, 47])
def test_killed_at_a_write_and_resumed_it_ends_with_the_same_hashes(
    tmp_path, killed_at_write, undisturbed, at
):
    with killed_at_write(at):
        run_scenario(hard(tmp_path / "run"))
    the_same(run_scenario(hard(tmp_path / "run"), resume=True), undisturbed)


def test_old_models_are_kept_only_as_long_as_somebody_trains_from_them(tmp_path):
    run_scenario(hard(tmp_path / "run"))
    saved = json.loads((tmp_path / "run/state.json").read_text())["state"]
    kept = {saved["checkpoint"], saved["best_checkpoint"], *saved["models"].values()} - {""}
    found = {p.parent.name + p.name for p in (tmp_path / "run/checkpoints").glob("??/*")}
    assert found == kept
    assert {one["device_id"] for one in saved["at_work"]} <= {str(n) for n in range(CLIENTS)}


@pytest.mark.parametrize("change", ["plan", "model"])
def test_a_state_that_does_not_fit_the_journal_is_refused(tmp_path, change):
    seen = []
    run_scenario(hard(tmp_path / "run"), on_round=seen.append, should_stop=lambda: len(seen) >= 4)
    path = tmp_path / "run/state.json"
    saved = json.loads(path.read_text())
    if change == "plan":
        saved["state"]["at_work"][0]["round"] = 99
    else:
        saved["state"]["models"] = {}
    path.write_text(json.dumps(saved))
    with pytest.raises(StateCorrupt, match="does not fit the journal"):
        run_scenario(hard(tmp_path / "run"), resume=True)


@pytest.mark.slow
def test_a_process_that_is_killed_twice_continues_bit_for_bit(tmp_path, undisturbed):
    path, folder = tmp_path / "scenario.json", tmp_path / "run"
    path.write_text(json.dumps(hard(folder).to_json()))
    for last in (2, 5):
        child = subprocess.run([sys.executable, "-c", CHILD, str(path), str(last)], timeout=300, check=False)
        assert child.returncode == -signal.SIGKILL
        assert json.loads((folder / "state.json").read_text())["state"]["round"] == last
    the_same(run_scenario(hard(folder), resume=True), undisturbed)


CHILD = """
import os, signal, sys
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig

def commit(row):
    if row.round == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

config = SimulationConfig.model_validate_json(open(sys.argv[1]).read())
run_scenario(config, resume=sys.argv[2] != "2", on_round=commit)
"""


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
