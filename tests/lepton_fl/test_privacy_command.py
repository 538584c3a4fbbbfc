"""``lepton privacy plan``: the table, the plot, and what is refused."""

import json

import pytest

from lepton_fl.cli.app import run
from lepton_fl.privacy.planning import Contract, epsilon_for, multiplier_for, spending_curve

SMALL = ["--rounds=8", "--cohort=10", "--min-separation=2", "--epsilon=5", "--delta=1e-4"]


def test_the_table_is_that_of_the_planner(capsys):
    assert run(["privacy", "plan", *SMALL, "--format=json"]) == 0
    rows = {row["mechanism"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"every-round", "independent", "banded", "blt"}  # no population: no sampling
    contract = Contract(8, 10, 0, 2)
    for name, row in rows.items():
        assert row["noise_multiplier"] == pytest.approx(multiplier_for(name, contract, 5.0, 1e-4), rel=1e-6)
    assert rows["banded"]["final_noise"] < rows["independent"]["final_noise"]


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
