"""The engine under the campaign of a real fleet: reproducible, recorded, resumable."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from lepton_fl.config import load
from lepton_fl.errors import (
    ConfigError,
    DataContractError,
    DiskFull,
    LeptonError,
    StateCorrupt,
    StateError,
    StateLocked,
)
from lepton_fl.tasks.federated import federated_dataset
from lepton_fl.tasks.losses import loss_of
from lepton_fl.tasks.models import initial_model
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.task import load_task, resolve
from lepton_simulations.api import run_scenario, simulate
from lepton_simulations.backends import local_backend
from lepton_simulations.book import FolderBook
from lepton_simulations.config import SimulationConfig
from lepton_simulations.exchange import InMemoryExchange
from lepton_simulations.fleet import VirtualFleet
from lepton_simulations.journal import verify_journal

ROOT = Path(__file__).parents[2]
LOCAL = {"learning_rate": 0.1, "batch_size": 32}
ONE_STEP = {"learning_rate": 0.1, "batch_size": 2000}


def small(**changes):
    settings = {
        "clients": 6,
        "rounds": 3,
        "cohort": 3,
        "partition": "dirichlet",
        "workers": 0,
        "local": LOCAL,
    }
    return simulate("digits", **settings | changes)


@pytest.fixture(scope="module")
def undisturbed():
    return small(rounds=4)


def test_a_fleet_of_which_nobody_can_train_says_why():
    with pytest.raises(DataContractError, match=r"No device can train: .* of row 0"):
        small(faults={"corrupt_data": 1.0})


# --- reproducible -------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_workers():
    faulty = {"drop_out": 0.3, "corrupt": 0.3, "seed": 5}
    cohort = {"cohort": 4, "rounds": 3}
    results = [small(**cohort, **faulty, workers=workers) for workers in (0, 1, 3)]
    for other in results[1:]:
        assert_array_equal(other.model, results[0].model)
        assert other.weights_sha256 == results[0].weights_sha256
        assert other.journal_sha256 == results[0].journal_sha256
        for a, b in zip(other.rows, results[0].rows, strict=True):
            assert (a.metrics, a.train_loss, a.outcomes) == (b.metrics, b.train_loss, b.outcomes)


def test_over_selection_keeps_the_same_devices_whatever_the_workers():
    cohort = {"size": 2, "over_selection": 2.0}
    one, two = (small(cohort=cohort, workers=workers, rounds=2) for workers in (0, 2))
    assert_array_equal(one.model, two.model)
    assert one.rows[0].outcomes == {"accepted": 2, "surplus": 2}


def test_another_seed_is_another_run(undisturbed):
    assert (small(rounds=4, seed=1).model != undisturbed.model).any()


def test_a_simulation_learns():
    local = {"optimizer": "adam", "learning_rate": 0.006, "batch_size": 16, "epochs": 2}
    result = small(clients=5, cohort=5, rounds=4, partition="iid", local=local)
    assert result.verdict.outcome == "completed"
    assert result.rows[-1].metric("accuracy") > 0.9
    assert result.best.round == max(result.rows, key=lambda row: -row.metric("loss")).round


def test_one_step_of_everybody_is_one_step_of_one():
    """One full-batch step per device, weighted by examples, is one step on all rows together."""
    result = small(cohort=6, rounds=1, local=ONE_STEP)
    task = load_task("digits")
    data = task.prepare(task.data(None).train)
    module = initial_model(task, 0)
    loss = loss_of(task)(module(torch.from_numpy(data.x)), torch.from_numpy(data.y))
    loss.backward()
    with torch.no_grad():
        expected = {k: (p - 0.1 * p.grad).numpy() for k, p in module.named_parameters()}
    for name, tensor in result.state_dict().items():
        assert_allclose(tensor, expected[name], atol=1e-6)


def test_central_evaluation_is_that_of_all_test_rows(undisturbed):
    task = load_task("digits")
    data = task.transform(task.data(None).test)
    module = initial_model(task, 0)
    module.load_state_dict({k: torch.tensor(v) for k, v in undisturbed.state_dict().items()}, strict=False)
    module.eval()
    with torch.inference_mode():
        hits = (module(torch.from_numpy(data.x)).argmax(1).numpy() == data.y).mean()
    assert undisturbed.rows[-1].metrics["central_accuracy"] == pytest.approx(hits)


def test_devices_evaluate_their_share_of_the_same_rows():
    spec = {"run": {"task": "digits", "rounds": 1, "cohort": {"size": 6}, "local": LOCAL}}
    data = {"partition": {"clients": 6}, "evaluate": "devices"}
    result = run_scenario(SimulationConfig.model_validate({**spec, "data": data, "engine": {"workers": 0}}))
    metrics = result.rows[0].metrics
    assert metrics["accuracy"] == pytest.approx(metrics["central_accuracy"])
    assert metrics["examples"] == metrics["central_examples"] == 360


# --- faults -------------------------------------------------------------------------------------------


def test_corrupt_devices_are_refused_by_name_and_the_rest_learns():
    result = small(clients=30, cohort=30, corrupt=0.5, drop_out=0.2, rounds=1, seed=0, local=ONE_STEP)
    outcomes = result.rows[0].outcomes
    assert sum(outcomes.values()) == 30
    assert outcomes["accepted"] == result.rows[0].reports
    assert {"non-finite", "wrong-shape", "replayed", "wrong-version", "malformed", "offline"} <= set(outcomes)


def test_every_corrupt_device_stays_so_and_no_honest_one_is_refused():
    result = small(clients=8, cohort=8, corrupt=0.5, seed=1, rounds=3, local=ONE_STEP)
    assert [row.reports for row in result.rows] == [4] * 3


def test_a_fleet_that_is_all_silent_ends_with_a_verdict():
    result = small(drop_out=1.0)
    assert result.verdict.outcome == "failed"
    assert "abandoned 5 times in a row" in result.verdict.reason
    assert result.rows == []


def test_a_device_whose_data_break_the_contract_sits_out(monkeypatch):
    task = load_task("digits")
    data = federated_dataset(task, None, PartitionSpec(clients=3), 0)
    x = data.corpus.train.x.copy()
    x[data.train_rows["1"][0]] = 99  # digits go to 16
    object.__setattr__(data.corpus.train, "x", x)
    fleet = VirtualFleet.build(resolve("digits"), data)
    assert list(fleet.unfit) == ["1"]
    assert "99" in fleet.unfit["1"]


# --- the folder ---------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(tmp_path):
    result = small(folder=tmp_path / "run")
    folder = tmp_path / "run"
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    each = ["round.planned", "round.committed", "round.evaluated"]
    assert [e["kind"] for e in events] == ["run.started", *each * 3]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["central_accuracy"]) == result.rows[-1].metric("accuracy")
    named = load_file(folder / "model.safetensors")
    for name, tensor in result.state_dict().items():
        assert_array_equal(named[name], tensor)
    checkpoints = [p for p in (folder / "checkpoints").glob("??/*") if p.is_file()]
    assert 1 <= len(checkpoints) <= 2  # the last and the best
    assert load(SimulationConfig, None, overrides={"run.task": "digits"}).value.run.task == "digits"


def test_a_run_that_was_stopped_continues_bit_for_bit(tmp_path, undisturbed):
    def stopping(folder: Path, **server):
        seen = []
        stop = {"on_round": seen.append, "should_stop": lambda: len(seen) >= 4}  # each round is shown twice
        return small(rounds=4, folder=folder, **stop, **server)

    for name in ("fedavg", "fedyogi"):
        folder = tmp_path / name
        server = {"server": {"name": name}}
        whole = undisturbed if name == "fedavg" else small(rounds=4, **server)
        seen = []
        first = small(
            rounds=4,
            folder=folder,
            on_round=seen.append,
            should_stop=lambda seen=seen: len(seen) >= 4,
            **server,
        )
        assert first.verdict.outcome == "stopped"
        assert first.rows[-1].round == 2
        second = small(rounds=4, folder=folder, resume=True, workers=2, **server)
        assert second.verdict.outcome == "completed"
        assert_array_equal(second.model, whole.model)
        assert [row.metrics for row in second.rows] == [row.metrics for row in whole.rows]
        assert second.best == whole.best
        assert second.weights_sha256 == whole.weights_sha256
        assert second.journal_sha256 == whole.journal_sha256
        assert second.tallies == whole.tallies
        assert_array_equal(second.best_model, whole.best_model)


def test_what_a_crash_left_behind_the_commit_point_is_cut_off(tmp_path, undisturbed):
    folder = tmp_path / "run"
    seen = []
    small(rounds=4, folder=folder, on_round=seen.append, should_stop=lambda: len(seen) >= 4)
    journal = folder / "journal.jsonl"
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"event":"planned","round":3}\n{"event":"comm')
    (folder / ".state.json.abc.tmp").write_text("{")
    result = small(rounds=4, folder=folder, resume=True)
    assert_array_equal(result.model, undisturbed.model)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [e["body"]["round"] for e in lines if e["kind"] == "round.committed"] == [1, 2, 3, 4]
    assert result.journal_sha256 == undisturbed.journal_sha256


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(tmp_path):
    first = small(folder=tmp_path / "run")
    again = small(folder=tmp_path / "run", resume=True)
    assert again.verdict.outcome == "completed"
    assert_array_equal(again.model, first.model)


@pytest.mark.slow
def test_a_run_that_was_killed_continues_bit_for_bit(tmp_path):
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        '[run]\ntask = "digits"\nrounds = 6\n[run.cohort]\nsize = 4\n[run.local]\nepochs = 3\n'
        "[data.partition]\nclients = 8\n[engine]\nworkers = 2\n"
    )
    lepton = [str(Path(sys.executable).parent / "lepton"), "simulate"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    folder = tmp_path / "killed"
    process = subprocess.Popen([*lepton, str(scenario), "--output", str(folder)], **quiet)
    end = time.monotonic() + 120
    while process.poll() is None and committed(folder) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert committed(folder) >= 1
    subprocess.run([*lepton, str(folder), "--resume"], check=True, timeout=200, **quiet)
    whole = run_scenario(
        load(SimulationConfig, scenario, overrides={"output.folder": str(tmp_path / "whole")}).value
    )
    assert committed(folder) == 6
    assert verify_journal(folder / "journal.jsonl").sha256 == whole.journal_sha256
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert whole.rows[-1].round == 6


def committed(folder: Path) -> int:
    try:
        return json.loads((folder / "state.json").read_text())["state"]["round"]
    except FileNotFoundError:
        return 0


# --- bad input leaves the folder as it is ---------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path) -> Path:
    small(rounds=2, folder=tmp_path / "run")
    return tmp_path / "run"


def test_a_second_run_does_not_overwrite_the_first(run):
    before = contents(run)
    with pytest.raises(StateError, match="holds a run already"):
        small(rounds=2, folder=run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("changes", "section"),
    [({"rounds": 3}, "run"), ({"clients": 7}, "data"), ({"corrupt": 0.1}, "faults"), ({"seed": 9}, "engine")],
)
def test_a_run_is_not_continued_with_other_settings(run, changes, section):
    before = contents(run)
    with pytest.raises(StateError, match=rf"other settings in \[.*{section}"):
        small(**{"rounds": 2, "folder": run, "resume": True, **changes})
    assert contents(run) == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(StateError, match="holds no run to continue"):
        small(folder=tmp_path / "new", resume=True)
    with pytest.raises(ConfigError, match="nothing to resume without a folder"):
        small(resume=True)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", lambda b: b[:-20]),
        ("state.json", lambda b: b"[]"),
        ("state.json", lambda b: b'{"state": {}}'),
        ("state.json", lambda b: b.replace(b'"bytes":', b'"bytes":99')),
        ("scenario.json", lambda b: b[:50]),
        ("scenario.json", lambda b: b.replace(b'"rounds"', b'"rund"')),
        ("journal.jsonl", lambda b: b[:100]),
        ("checkpoint", lambda b: b[:-4] + b"\0\0\0\1"),
        ("checkpoint", lambda b: b""),
        ("checkpoint", None),
    ],
)
def test_damage_is_noticed(run, file, damage):
    path = next((run / "checkpoints").glob("??/*")) if file == "checkpoint" else run / file
    for path in (run / "checkpoints").glob("??/*") if file == "checkpoint" else [run / file]:
        if damage is None:
            path.unlink()
        elif path.is_file():
            path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LeptonError) as caught:
        small(rounds=2, folder=run, resume=True)
    assert isinstance(caught.value, StateCorrupt) or damage is None


def test_two_processes_do_not_work_in_one_folder(run):
    code = (
        "import sys; from pathlib import Path; from lepton_simulations.book import _lock; "
        f"_lock(Path({str(run)!r})); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StateLocked, match="Another process works in"):
            small(rounds=2, folder=run, resume=True)
    finally:
        holder.communicate("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="Cannot use"):
        small(folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"clients": 0}, "clients"),
        ({"local": {"learning_rate": -1}}, "learning_rate"),
        ({"drop_out": 2}, "drop_out"),
        ({"workers": -7}, "workers"),
        ({"localy": 1}, "localy"),
        ({"cohort": {"size": 2, "min_reports": 3}}, "^cohort: min_reports=3 exceeds size=2.$"),
        ({"mode": "buffered", "aggregation": {"name": "median"}}, "^mode = 'buffered' cannot be combined"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


@pytest.mark.parametrize("limit", [300, 1_500, 20_000])  # of the scenario, the journal and a checkpoint
def test_a_full_disk_ends_the_run_by_name(tmp_path, limit):
    folder = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DiskFull, match="No space was left"):
            small(folder=folder, rounds=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.glob("**/*.tmp"))
    if (folder / "scenario.json").exists():  # the run can be continued, or begun anew
        resume = (folder / "state.json").exists()
        assert small(folder=folder, rounds=20, resume=resume).verdict.outcome == "completed"


@pytest.mark.parametrize(
    "setting",
    [
        {"initial_model": "0" * 64},
        {"central_data": "built-in"},
        {"cohort": {"groups": ["ward"]}},
        {"task_version": "0"},
    ],
)
def test_settings_without_a_meaning_here_are_refused(setting):
    with pytest.raises(ConfigError, match="cannot be used in a simulation"):
        small(**setting)


# --- scenarios, plot, exchange --------------------------------------------------------------------------


def test_a_wish_for_more_devices_than_there_are_does_not_wait():
    result = small(cohort=50, rounds=1)
    assert result.rows[0].asked == 6


def test_the_plot_is_a_picture(tmp_path, undisturbed):
    assert undisturbed.plot(tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert undisturbed.plot(tmp_path / "deep" / "a.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match="Cannot draw into"):
        undisturbed.plot(tmp_path / "a.doc")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StateError, match="Cannot write"):
        undisturbed.plot(tmp_path / "folder.png")
    with pytest.raises(ConfigError, match="nothing to draw"):
        small(drop_out=1.0).plot(tmp_path / "none.png")


def test_the_callers_threads_stay_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small(rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_large_data_set_is_prepared_when_asked_for(monkeypatch, undisturbed):
    monkeypatch.setattr("lepton_simulations.fleet.MAX_PREPARED", 0)
    assert_array_equal(small(rounds=4).model, undisturbed.model)


def test_a_book_and_an_exchange_close_twice(tmp_path):
    fleet = VirtualFleet.build(
        resolve("digits"), federated_dataset("digits", None, PartitionSpec(clients=2), 0)
    )
    exchange = InMemoryExchange(fleet, local_backend(fleet, 1))
    exchange.close()
    exchange.close()
    assert fleet.size == fleet.trainer.layout.size
    with FolderBook(tmp_path / "b", fleet.trainer.layout, np.random) as book:
        assert not book.started
