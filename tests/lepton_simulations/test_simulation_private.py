"""Private runs in a simulation: the real mechanisms, repeatable, and labelled for what they are."""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lepton_fl.cli.app import run
from lepton_fl.errors import ConfigError
from lepton_fl.plan import PrivacySpec
from lepton_fl.privacy.accounting import GdpExact
from lepton_fl.privacy.planning import prepare
from lepton_simulations import private
from lepton_simulations.api import simulate

DELTA = 1e-2
PRIVACY = {
    "mechanism": "banded",
    "noise_multiplier": 0.5,
    "delta": DELTA,
    "clip_norm": 1.0,
    "min_separation": 2,
    "max_participations": 2,
}


def small(**changes):
    settings = {
        "clients": 12,
        "rounds": 4,
        "cohort": 4,
        "workers": 0,
        "local": {"learning_rate": 0.1, "batch_size": 32},
        "privacy": PRIVACY,
    }
    return simulate("digits", **settings | changes)


@pytest.fixture(scope="module")
def undisturbed():
    return small()


def test_epsilon_in_the_rows_is_the_accountants(undisturbed):
    size = undisturbed.layout.size
    ready = prepare(PrivacySpec(**PRIVACY), rounds=4, cohort=4, coordinates=size, grid_step=2.0**-24)
    expected = [
        GdpExact().epsilon({ready.mechanism.event_of(number, 2, 2): 1}, DELTA) for number in range(1, 5)
    ]
    assert [row.epsilon for row in undisturbed.rows] == pytest.approx(expected)
    assert undisturbed.rows[-1].epsilon == pytest.approx(ready.epsilon)
    assert {row.clip_norm for row in undisturbed.rows} == {1.0}


def test_only_public_rows_are_told_and_the_result_says_what_it_is(undisturbed):
    for row in undisturbed.rows:
        assert row.train_loss is None
        assert all(name.startswith("central_") for name in row.metrics)
        assert row.metrics
    assert any("it protects nobody" in label for label in undisturbed.simulated)
    assert all(tally.examples == 0 for tally in undisturbed.tallies.values())
    assert all(tally.accepted <= 2 for tally in undisturbed.tallies.values())


def test_almost_no_noise_gives_the_run_without_privacy():
    """Up to 1.75 grid steps of noise, and a millionth of the clip."""
    quiet = {"mechanism": "independent", "noise_multiplier": 1e-6, "delta": DELTA, "clip_norm": 1.0}
    private = small(privacy=quiet)
    plain = small(privacy=None, clip_norm=1.0, weighting="equal")
    assert_allclose(private.model, plain.model, atol=1e-4)
    assert not np.array_equal(private.model, plain.model)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_bits_whoever_computes_and_however_often_it_is_resumed(undisturbed, tmp_path, workers):
    rounds = []
    first = small(
        folder=tmp_path, workers=workers, on_round=rounds.append, should_stop=lambda: len(rounds) >= 4
    )
    assert first.verdict.outcome == "stopped"
    assert first.rows[-1].round == 2
    second = small(folder=tmp_path, workers=workers, resume=True)
    assert second.verdict.outcome == "completed"
    assert_array_equal(second.model, undisturbed.model)
    assert second.journal_sha256 == undisturbed.journal_sha256
    assert [row.epsilon for row in second.rows] == [row.epsilon for row in undisturbed.rows]


def test_a_coordinator_that_dies_is_not_charged_for_what_it_never_released():
    fallen = small(faults={"crash_rounds": [1, 3]})
    assert fallen.verdict.outcome == "completed"
    assert fallen.rows[-1].attempts == 1
    assert fallen.rows[-1].epsilon == pytest.approx(small().rows[-1].epsilon)


def test_remembered_noise_is_not_in_the_clear(tmp_path):
    small(folder=tmp_path, rounds=2)
    state = json.loads((tmp_path / "state.json").read_text())["state"]
    name = state["private"]
    blob = (tmp_path / "checkpoints" / name[:2] / name[2:]).read_bytes()
    header, _, sealed = blob.partition(b"\n")
    assert json.loads(header)["took_part"]
    assert b"lepton-noise-state" not in sealed
    assert len({path.name for path in (tmp_path / "checkpoints").glob("??/*")}) <= 3  # old ones are forgotten
    journal = (tmp_path / "journal.jsonl").read_text().splitlines()
    entries = [entry for line in journal for entry in json.loads(line)["body"].get("participation", [])]
    assert entries
    assert {entry["examples"] for entry in entries} == {0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": {**PRIVACY, "population": 50}}, ("population=50", "12 devices")),
        ({"privacy": {**PRIVACY, "min_separation": 4}}, ("need a population of 16",)),
        ({"privacy": {**PRIVACY, "delta": 0.2}}, ("1/12",)),
        ({"weighting": "examples", "clip_norm": 2.0}, ("weighting", "clip_norm=2")),
        ({"mode": "buffered", "buffer": {"size": 2}}, ("buffered",)),
    ],
)
def test_what_would_not_be_true_is_refused_before_anything_is_trained(changes, words):
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_section_is_named():
    with pytest.raises(ConfigError, match="privacy"):
        small(privacy={**PRIVACY, "epsilon": 1.0})


def test_a_spent_budget_ends_a_simulation_with_its_own_word(monkeypatch, tmp_path, capsys):
    """A plan always fits its own budget; here, half of it was spent elsewhere."""
    real = private.budget_of

    def half(*of):
        budget = real(*of)
        return replace(budget, epsilon=0.5 * budget.epsilon)

    monkeypatch.setattr(private, "budget_of", half)
    spent = small(privacy={"mechanism": "independent", "noise_multiplier": 1.0, "delta": DELTA})
    assert spent.verdict.outcome == "exhausted"
    assert 0 < len(spent.rows) < 4
    assert np.isfinite(spent.model).all()
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        '[run]\ntask = "digits"\n[run.privacy]\nmechanism = "independent"\nnoise_multiplier = 1.0\n'
        "delta = 0.01\n[data.partition]\nclients = 12\n"
    )
    argv = ["simulate", str(scenario), "--output", str(tmp_path / "run"), "--workers=0", "--rounds=3"]
    assert run([*argv, "--set", "output.plots=false"]) == 8
    assert "budget-refused" in capsys.readouterr().err
