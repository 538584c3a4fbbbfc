"""``lepton privacy plan``: the table, the plot, and what is refused."""

import json
from math import sqrt

import pytest

from lepton_fl.cli.app import run
from lepton_fl.plan import PrivacySpec
from lepton_fl.privacy.comparison import Rows, guarantees
from lepton_fl.privacy.example import example_epsilon, sampling_rate
from lepton_fl.privacy.planning import (
    Contract,
    Ring,
    epsilon_for,
    multiplier_for,
    prepare,
    spending_curve,
)

SMALL = ["--rounds=8", "--cohort=10", "--min-separation=2", "--epsilon=5", "--delta=1e-4"]


def test_the_table_is_that_of_the_planner(capsys):
    assert run(["privacy", "plan", *SMALL, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["mechanism"]: row for row in found if row["trust"] == "central"}
    assert set(rows) == {"every-round", "independent", "banded", "blt"}  # no population: no sampling
    contract = Contract(8, 10, 0, 2)
    for name, row in rows.items():
        assert row["noise_multiplier"] == pytest.approx(multiplier_for(name, contract, 5.0, 1e-4), rel=1e-6)
    assert rows["banded"]["final_noise"] < rows["independent"]["final_noise"]


def told(capsys, *options) -> list[dict]:
    assert run(["privacy", "plan", *SMALL, *options, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_row_says_what_it_protects_from_whom_and_none_is_a_sum(capsys):
    rows = told(capsys, "--coordinates=5000", "--rows=200", "--example-delta=1e-3")
    kinds = {(row["unit"], row["trust"]) for row in rows}
    assert kinds == {("device", "central"), ("device", "distributed"), ("example", "local")}
    assert {row["adjacency"] for row in rows} == {"zero-out"}
    assert {row["epsilon"] for row in rows} == {5.0}  # each by itself
    assert {row["delta"] for row in rows if row["unit"] == "device"} == {1e-4}
    assert [row["delta"] for row in rows if row["unit"] == "example"] == [1e-3]
    assert {row["unit"] for row in told(capsys, "--coordinates=0", "--rows=0")} == {"device"}


def test_noise_of_the_devices_is_what_a_run_would_get(capsys):
    rows = told(capsys, "--coordinates=5000", "--bits=18", "--min-survivors=0.8", "--colluders=0.1")
    wide, narrow = (row for row in rows if row["mechanism"] == "skellam")
    spec = PrivacySpec(
        trust="distributed",
        mechanism="skellam",
        epsilon=5.0,
        delta=1e-4,
        min_separation=2,
        bits=18,
        min_survivors=0.8,
        colluders=0.1,
    )
    ready = prepare(spec, rounds=8, cohort=10, coordinates=5000, grid_step=1.0, ring=Ring(32, 10))
    assert wide["noise_multiplier"] == pytest.approx(ready.noise_multiplier, rel=1e-6)
    assert (wide["ring"], wide["bits"], wide["min_survivors"]) == (32, 18, 8)
    # Seven honest shares are enough, all ten are in the sum, eight rounds add up.
    assert wide["final_noise"] == pytest.approx(wide["noise_multiplier"] * sqrt(10 / 7 * 8), rel=1e-6)
    assert (narrow["ring"], narrow["bits"]) == (16, 16)


def test_the_needed_bits_are_the_fewest_that_are_enough(capsys):
    for row in told(capsys, "--coordinates=5000"):
        if row["ring"] == 32:
            fewer, enough = row["needed_bits"] - 1, row["needed_bits"]
            again = {bits: told(capsys, "--coordinates=5000", f"--bits={bits}") for bits in (fewer, enough)}
            caveat = {
                bits: next(r["caveat"] for r in rows if (r["mechanism"], r["ring"]) == (row["mechanism"], 32))
                for bits, rows in again.items()
            }
            assert "coarse" in caveat[fewer]
            assert caveat[enough] == ""


def test_what_cannot_be_had_says_why_in_its_row(capsys):
    rows = told(capsys, "--coordinates=100000000", "--rows=200000")
    rotated = next(row for row in rows if row["ring"] == 16)
    assert rotated["noise_multiplier"] is None
    assert "16 bits are too few" in rotated["caveat"]
    example = rows[-1]
    assert example["noise_multiplier"] is None
    assert "above 1/200000" in example["caveat"]
    assert rows[0]["noise_multiplier"] > 0


def test_the_row_of_an_example_is_what_its_device_will_be_charged(capsys):
    row = told(capsys, "--rows=200", "--batch-size=20", "--epochs=2", "--max-participations=3")[-1]
    rate = sampling_rate(200, 20)
    assert example_epsilon(rate, 3 * 2 * 10, row["noise_multiplier"], 1e-4) == pytest.approx(5.0, rel=5e-3)
    assert row["final_noise"] is None  # nothing of it is in a sum over devices
    rows = Rows(200, 20, 2, 3)
    *_, again = guarantees(Contract(8, 10, 0, 2, 3), 5.0, 1e-4, None, rows)
    curve = dict(again.curve(range(1, 9)))
    assert curve[1] < curve[2] < curve[3] == curve[8] <= 5.0


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_plot_is_a_file_of_its_kind(tmp_path, suffix, head):
    path = tmp_path / f"plan.{suffix}"
    assert run(["privacy", "plan", *SMALL, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(head)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plot=plan.txt"], ".png"),
        (["--population=15"], "population"),
        (["--population=20000", "--delta=0.1"], "1/population"),
        (["--epsilon=0"], "epsilon"),
        (["--epsilon=nan"], "epsilon"),
        (["--delta=2"], "delta"),
        (["--colluders=0.8"], "colluders"),
        (["--example-delta=7"], "example-delta"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, words, capsys):
    assert run(["privacy", "plan", *SMALL, *options]) == 3
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("mechanism", ["every-round", "independent", "banded", "blt"])
def test_a_curve_rises_to_the_cost_of_the_whole_run(mechanism):
    contract = Contract(8, 10, 0, 2)
    curve = spending_curve(mechanism, contract, 2.0, 1e-4, range(1, 9))
    costs = [epsilon for _, epsilon in curve]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(epsilon_for(mechanism, contract, 2.0, 1e-4))
