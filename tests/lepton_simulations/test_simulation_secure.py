"""Secure aggregation in a simulation: the protocol and its ideal functionality bring the same bits."""

import pytest
from pydantic import ValidationError

from lepton_fl.errors import ConfigError
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig


def run(mode: str = "required", how: str = "ideal", workers: int = 0, faults=None, folder="", **more):
    config = SimulationConfig.model_validate(
        {
            "run": {
                "task": "digits",
                "rounds": 2,
                "cohort": {"size": 18},
                "clip_norm": 2.0,
                "weighting": "examples",
                "max_weight": 100,
                "grid_step": 2.0**-18,
                "secure_aggregation": mode,
                **more,
            },
            "data": {"partition": {"kind": "iid", "clients": 20}},
            "engine": {"workers": workers, "tier": "lean", "secure_aggregation": how},
            "faults": faults or {},
            "output": {"folder": str(folder), "plots": False},
        }
    )
    return run_scenario(config)


def test_off_ideal_and_full_are_the_same_bits():
    plain, ideal, full = run("off"), run(), run(how="full")
    assert plain.weights_sha256 == ideal.weights_sha256 == full.weights_sha256
    assert [row.metrics for row in ideal.rows] == [row.metrics for row in full.rows]


def test_with_drop_outs_and_damaged_replies_too():
    faults = {"drop_out": 0.1, "corrupt": 0.1}
    ideal, full = run(faults=faults), run(how="full", faults=faults)
    assert ideal.weights_sha256 == full.weights_sha256 == run("off", faults=faults).weights_sha256


def test_sixteen_bits_too_and_workers_do_not_matter():
    ideal, full = run(secure={"bits": 16}), run(how="full", workers=2, secure={"bits": 16})
    assert ideal.weights_sha256 == full.weights_sha256


def test_too_many_drop_outs_give_no_sum_whichever_way():
    for how in ("ideal", "full"):
        result = run(how=how, faults={"drop_out": 0.7}, cohort={"size": 18, "max_attempts": 2})
        assert result.verdict.outcome == "failed"
        assert "secure aggregation needs" in result.verdict.reason


def test_attackers_are_not_shown_where_nobody_could_see_them():
    with pytest.raises(ConfigError, match="malicious"):
        run(faults={"malicious": 0.1, "attack": "sign_flip"})


def test_a_cohort_that_cannot_hide_anybody_is_refused():
    with pytest.raises(ValidationError, match="min_cohort"):
        run(cohort={"size": 8})


def test_a_recorded_run_says_nothing_of_single_devices(tmp_path):
    result = run(how="full", folder=tmp_path / "run")
    assert result.verdict.outcome == "completed"
    text = (tmp_path / "run" / "journal.jsonl").read_text()
    assert '"secure"' in text
    assert '"outcome":"counted"' in text
    assert '"examples":80' not in text  # what a device of this fleet trains on
    assert "secure aggregation: the whole protocol" in result.simulated
