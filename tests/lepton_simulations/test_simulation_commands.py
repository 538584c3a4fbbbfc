"""``lepton demo`` and ``lepton simulate`` as a user sees them."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_fl.cli.app import run
from lepton_fl.errors import DiskFull
from lepton_simulations.appended import AppendedFile
from lepton_simulations.demo import demo_config

LEPTON = str(Path(sys.executable).parent / "lepton")
ROOT = Path(__file__).parents[2]
SCENARIO = """
[run]
task = "digits"
rounds = 2
[run.cohort]
size = 2
[run.local]
batch_size = 256
[data.partition]
clients = 4
[engine]
workers = 0
"""


@pytest.fixture
def scenario(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO)
    return path


def test_a_scenario_becomes_lines_plots_and_a_folder(scenario, tmp_path, capsys):
    assert run(["simulate", str(scenario)]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first.startswith("round 1/2  devices 2/2  accuracy ")
    assert second.startswith("round 2/2  devices 2/2  accuracy ")
    assert "All 2 rounds are done." in shown.err
    assert "Simulated: 4 virtual devices: rows dealt at random;" in shown.err.replace("\n", " ")
    assert (tmp_path / "runs/tiny/plots/learning.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "runs/tiny/plots/participation.png").read_bytes()[:4] == b"\x89PNG"


def test_the_end_says_whom_the_model_was_made_of(scenario, capsys):
    cohort = "size = 4\nmin_reports = 1\ndeadline_s = 60\ncoverage_floor = 0.5"
    quick, slow = (
        f'[[devices.classes]]\nname = "{n}"\nspeed = {s}\n' for n, s in (("quick", 1e6), ("slow", 1))
    )
    scenario.write_text(SCENARIO.replace("\nsize = 2", f"\n{cohort}") + quick + slow)
    assert run(["simulate", str(scenario)]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "By class: quick 2 of 2, slow 0 of 2." in said
    assert "FLAGGED: coverage of group slow: 0 of 2, below the floor of 0.5" in said


def test_json_is_one_document(scenario, capsys):
    assert run(["simulate", str(scenario), "--rounds", "3", "--output", "out", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["outcome"] == "completed"
    assert [row["round"] for row in document["rounds"]] == [1, 2, 3]
    assert document["folder"] == "out"
    assert 0 <= document["rounds"][-1]["metrics"]["central_accuracy"] <= 1
    assert len(document["weights_sha256"]) == len(document["journal_sha256"]) == 64
    assert "4 virtual devices: rows dealt at random" in document["simulated"]


def test_the_end_says_why_not_the_fastest_engine_trained(scenario, capsys):
    run(["simulate", str(scenario)])
    assert "engine is not used" not in capsys.readouterr().err.replace("\n", " ")
    adam = ["simulate", str(scenario), "--output", "adam", "--set", "run.local.optimizer=adam"]
    assert run(adam) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "The native and fused engines are not used: the optimiser is 'adam'." in said


def test_refused_devices_are_counted_by_name(scenario, capsys):
    scenario.write_text(SCENARIO.replace("size = 2", "size = 4") + "[faults]\ncorrupt = 0.5\n")
    assert run(["simulate", str(scenario)]) == 0
    assert "not counted: " in capsys.readouterr().out.splitlines()[0]


def test_a_run_that_failed_has_its_exit_code_and_its_reason(scenario, capsys):
    scenario.write_text(SCENARIO + "[faults]\ndrop_out = 1.0\n")
    assert run(["simulate", str(scenario)]) == 8
    assert "Round 1 was abandoned 5 times in a row" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_moment_has_its_own_exit_code(scenario, capsys, monkeypatch):
    synced, sync = [], AppendedFile.sync

    def full(file):
        synced.append(file)
        if len(synced) == 5:  # in the second round
            raise DiskFull("No space was left; the last committed round is safe.")
        return sync(file)

    monkeypatch.setattr(AppendedFile, "sync", full)
    assert run(["simulate", str(scenario)]) == 7
    said = capsys.readouterr().err
    assert "No space was left" in said
    assert "disk-full (exit 7)" in said
    assert run(["simulate", "--resume", "runs/tiny"]) == 0


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [
        ("[run]\ntask = 'digits'\nround = 3", "did you mean 'run.rounds'", 3),
        ("[run]\nrounds = 3", "run.task is required", 3),
        ("[run]\ntask = 'digit'", "Did you mean 'digits'", 4),
        ("[run]\ntask = 'fashion_mnist'", "folder", 4),
        ("[run]\ntask = 'digits'\n[data.partition]\nkind = 'natural'", "no natural users", 3),
        ("[run", "is not valid TOML", 3),
    ],
)
def test_bad_scenarios_are_refused_in_one_block(scenario, tmp_path, capsys, line, message, code):
    scenario.write_text(line)
    assert run(["simulate", str(scenario)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_scenario_that_is_not_there(tmp_path, capsys):
    assert run(["simulate", str(tmp_path / "none.toml")]) == 3
    assert "does not exist" in capsys.readouterr().err


def test_resume_needs_the_flag_and_a_run(scenario, tmp_path, capsys):
    assert run(["simulate", str(scenario)]) == 0
    assert run(["simulate", str(scenario)]) == 7
    assert "--resume" in capsys.readouterr().err
    assert run(["simulate", "--resume", "runs/tiny"]) == 0
    assert run(["simulate", str(scenario), "--resume", "--output", "elsewhere"]) == 7


def test_any_key_can_be_set(scenario, tmp_path, capsys):
    more = ["--set", "run.local.epochs=2", "--set", "output.plots=false", "--seed", "7", "--engine", "lean"]
    assert run(["simulate", str(scenario), *more]) == 0
    recorded = json.loads((tmp_path / "runs/tiny/scenario.json").read_text())
    assert recorded["run"]["local"]["epochs"] == 2
    assert recorded["run"]["local"]["batch_size"] == 256  # the scenario's stays
    assert (recorded["run"]["seed"], recorded["data"]["seed"], recorded["engine"]["seed"]) == (7, 7, 7)
    assert recorded["engine"]["tier"] == "lean"
    assert not (tmp_path / "runs/tiny/plots").exists()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("run.local.epochs", "expected KEY=VALUE"),
        ("run.local.epoch=2", "did you mean 'run.local.epochs'"),
        ("run.rounds=many", "run.rounds = 'many' should be a valid integer"),
        ("=3", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_named(scenario, capsys, pair, message):
    assert run(["simulate", str(scenario), "--set", pair]) == 3
    assert message in " ".join(capsys.readouterr().err.split())


def test_runs_are_compared(scenario, tmp_path, capsys):
    for name, rounds in (("a", "2"), ("b", "2"), ("c", "3")):
        assert run(["simulate", str(scenario), "--output", name, "--rounds", rounds]) == 0
    capsys.readouterr()
    assert run(["compare", "a", "b", "c", "--metric", "loss", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line["run"] for line in document["lines"]] == ["a", "b", "c"]
    a, b, c = document["lines"]
    assert a["journal_sha256"] == b["journal_sha256"] != c["journal_sha256"]
    assert document["mode"] == "min"
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert run(["compare", "a", "b", "--output", "two.svg"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].startswith("accuracy (best = highest")
    assert "the same weights and the same journal" in " ".join(shown.err.split())
    journal = tmp_path / "a/journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"examples":3', b'"examples":4', 1))
    assert run(["compare", "a"]) == 7
    assert "was altered" in capsys.readouterr().err
    assert run(["compare", "nowhere"]) == 9


@pytest.mark.slow
def test_ctrl_c_stops_after_the_round_and_the_run_goes_on_later(scenario, tmp_path):
    scenario.write_text(SCENARIO.replace("rounds = 2", "rounds = 500").replace("workers = 0", "workers = 2"))
    process = subprocess.Popen(
        [LEPTON, "simulate", str(scenario)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    state, end = tmp_path / "runs/tiny/state.json", time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopping after this client step" in said
    assert "lepton simulate --resume runs/tiny" in said
    assert json.loads(state.read_text())["state"]["round"] >= 1


@pytest.mark.slow
def test_the_demo_learns_and_draws(tmp_path):
    done = subprocess.run(
        [LEPTON, "demo", "--output", str(tmp_path), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["rounds"][-1]["metrics"]["central_accuracy"] >= 0.95
    assert len(document["rounds"]) == demo_config().run.rounds
    assert Path(document["plot"]).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_on_a_terminal_the_table_grows(scenario):
    main, other = pty.openpty()
    process = subprocess.Popen(
        [LEPTON, "simulate", str(scenario)],
        stdout=other,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(other)
    shown = b""
    while chunk := read(main):
        shown += chunk
    os.close(main)
    assert process.wait(60) == 0
    assert shown.count(b"accuracy") >= 4  # drawn anew with every commit and evaluation
    assert b"2/2" in shown  # the bar of the rounds is full


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end was closed
        return b""


def test_the_commands_are_light():
    code = (
        "import sys; import lepton_simulations.cli, lepton_simulations.config; "
        "heavy = {'torch', 'flwr', 'matplotlib', 'sklearn', 'scipy', 'rich.live', 'pandas', 'pyarrow'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
