"""Secure aggregation in a simulation: the protocol and its ideal functionality bring the same bits."""

import pytest
from pydantic import ValidationError

from lepton_fl.errors import ConfigError
from lepton_simulations import seats
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig


def run(
    mode: str = "required",
    how: str = "ideal",
    workers: int = 0,
    faults=None,
    folder="",
    engine=None,
    devices=None,
    options=None,
    **more,
):
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
            "data": {"partition": {"kind": "iid", "clients": 20 if devices is None else 30}},
            "devices": devices or {},
            "engine": {"workers": workers, "tier": "lean", "secure_aggregation": how} | (engine or {}),
            "faults": faults or {},
            "output": {"folder": str(folder), "plots": False},
        }
    )
    return run_scenario(config, **(options or {}))


def test_off_ideal_and_full_are_the_same_bits():
    plain, ideal, full = run("off"), run(), run(how="full")
    assert plain.weights_sha256 == ideal.weights_sha256 == full.weights_sha256
    assert [row.metrics for row in ideal.rows] == [row.metrics for row in full.rows]


def test_of_another_tier_too_if_devices_train_one_by_one():
    engine = {"tier": "fused", "one_by_one": True}
    plain, ideal, full = (run(m, h, engine=engine, rounds=1) for m, h in (("off", "ideal"), *BOTH))
    assert plain.weights_sha256 == ideal.weights_sha256 == full.weights_sha256


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


BOTH = (("required", "ideal"), ("required", "full"))
AT_EVERY_STAGE = {
    "drop_adverts": 0.06,
    "drop_shares": 0.06,
    "drop_training": 0.06,
    "drop_upload": 0.06,
    "drop_consents": 0.06,
    "drop_reveals": 0.06,
}


def test_drop_outs_at_every_stage_change_nothing_but_who_is_in_the_sum():
    faults = {**AT_EVERY_STAGE, "repeats": 0.3}
    ideal, full = run(faults=faults), run(how="full", faults=faults)
    assert ideal.weights_sha256 == full.weights_sha256
    assert [row.metrics for row in ideal.rows] == [row.metrics for row in full.rows]
    assert min(row.reports for row in full.rows) < 18


@pytest.mark.parametrize("stage", ["adverts", "shares", "consents", "reveals"])
@pytest.mark.parametrize("how", ["ideal", "full"])
def test_at_any_stage_too_many_give_no_sum(stage, how):
    result = run(how=how, faults={f"drop_{stage}": 0.75}, cohort={"size": 18, "max_attempts": 1})
    assert result.verdict.outcome == "failed"
    assert not result.rows
    burnt = stage in ("consents", "reveals")  # devices have signed: the next attempt is one at the next round
    assert ("gave no sum" in result.verdict.reason) == burnt


@pytest.mark.parametrize("bits", [16, 32])
def test_several_sums_of_which_some_fail(bits):
    more = {"cohort": {"size": 20}, "secure": {"min_cohort": 4, "max_cohort": 7, "bits": bits}, "rounds": 2}
    faults = {"drop_shares": 0.15, "drop_consents": 0.15, "drop_upload": 0.05}
    ideal, full = run(faults=faults, **more), run(how="full", faults=faults, **more)
    assert ideal.weights_sha256 == full.weights_sha256
    assert [row.reports for row in ideal.rows] == [row.reports for row in full.rows]
    assert any(row.reports <= 14 for row in full.rows)  # one of the three sums was lost


@pytest.mark.parametrize("bits", [16, 32])
def test_a_small_sum_is_not_closed_early_by_the_others(bits):
    speed = {"kind": "lognormal", "median": 10.0, "sigma": 1.0}
    more = {
        "cohort": {"size": 25, "over_selection": 1.2},
        "secure": {"min_cohort": 4, "max_cohort": 7, "bits": bits},
        "devices": {"classes": [{"name": "any", "speed": speed}]},
        "rounds": 3,
    }
    ideal, full = run(**more), run(how="full", **more)
    assert ideal.weights_sha256 == full.weights_sha256
    for a, b in zip(ideal.rows, full.rows, strict=True):
        assert a.reports == b.reports >= 5 * 5  # of each of the five sums of six, as many as it needs


def test_who_breaks_the_protocol_is_named_and_the_round_goes_on(tmp_path, caplog):
    faults = {"bad_shares": 0.05, "wrong_shares": 0.05}
    result = run(how="full", faults=faults, folder=tmp_path / "run", cohort={"size": 20}, rounds=1)
    assert result.verdict.outcome == "completed"
    assert result.rows[0].reports == 19
    text = (tmp_path / "run" / "journal.jsonl").read_text()
    assert text.count('"reason":"blamed"') == 1
    assert "round 1" not in caplog.text  # one attempt was enough
    with pytest.raises(ConfigError, match="full"):
        run(faults=faults)


def test_who_was_blamed_is_not_asked_again_after_a_restart(tmp_path):
    settings = {"how": "full", "faults": {"bad_shares": 0.05, "wrong_shares": 0.05}, "cohort": {"size": 20}}
    whole, seen = run(**settings), []
    stop = {"on_round": seen.append, "should_stop": lambda: bool(seen)}
    stopped = run(**settings, folder=tmp_path / "run", options=stop)
    assert (stopped.verdict.outcome, len(stopped.rows)) == ("stopped", 1)
    result = run(**settings, folder=tmp_path / "run", options={"resume": True})
    assert [row.asked for row in result.rows] == [20, 19]
    assert (result.weights_sha256, result.journal_sha256) == (whole.weights_sha256, whole.journal_sha256)


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


@pytest.fixture
def small_crews(monkeypatch):
    monkeypatch.setattr(seats, "WORTH_HELP", 4)


@pytest.mark.parametrize(
    "more",
    [
        {"faults": {**AT_EVERY_STAGE, "repeats": 0.3}, "rounds": 2},
        {"cohort": {"size": 16, "over_selection": 1.25}, "faults": {"drop_out": 0.1}, "rounds": 1},
        {"cohort": {"size": 20}, "secure": {"min_cohort": 4, "max_cohort": 7}, "rounds": 1},
        {"cohort": {"size": 20}, "faults": {"bad_shares": 0.05, "wrong_shares": 0.05}, "rounds": 1},
    ],
    ids=["leaving", "over-selection", "sums", "culprits"],
)
def test_sessions_on_helpers_change_nothing(small_crews, more):
    here, there = run(how="full", **more), run(how="full", workers=2, **more)
    assert here.rows[0].reports
    assert here.journal_sha256 == there.journal_sha256  # who came, when, and what became of it


def test_a_helper_that_dies_ends_the_run_with_a_word(small_crews, monkeypatch):
    started = []
    start = seats.Crew.start

    def dying(crew, device, delivery, vector):
        start(crew, device, delivery, vector)
        started.append(crew)
        crew._helpers[0].process.kill()

    monkeypatch.setattr(seats.Crew, "start", dying)
    result = run(how="full", workers=2, rounds=1)
    assert result.verdict.outcome == "failed"
    assert "died" in result.verdict.reason
    assert not started[0]._helpers  # none is left behind
