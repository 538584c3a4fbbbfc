"""A private run on a real fleet: charged, killed in mid-round, exhausted, resumed, and proven elsewhere."""

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 4
evaluate_every = 0
[run.cohort]
size = 4
min_reports = 3
deadline_s = 120
fill_wait_s = 60
[run.local]
learning_rate = 0.1
batch_size = 10
[run.privacy]
mechanism = "independent"
clip_norm = 0.5
noise_multiplier = 3.0
delta = 1e-3
"""


def rounds_of(fleet, run_id):
    """From the database: a command takes longer than a round."""
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        return [(r.round, r.attempt, r.state) for r in store.rounds(run_id)]


def test_a_private_run_is_charged_killed_exhausted_resumed_and_proven(real_fleet, digit_files, tmp_path):
    from lepton_fl.privacy.accounting import GdpExact
    from lepton_fl.privacy.events import Gaussian

    fleet = real_fleet
    fleet.start_server()
    for i in range(4):
        fleet.join(f"dev{i}")
        fleet.start_client(f"dev{i}", digit_files[i])
    cap = GdpExact().epsilon({Gaussian(3.0): 2}, 1e-3) * 1.001  # two releases, not three
    fleet.lepton("privacy", "budget", "fleet", "--epsilon", str(cap), "--delta", "1e-3", "--note", "small")
    run_id = fleet.start_run(RUN)
    fleet.until(lambda: rounds_of(fleet, run_id), "round 1 is planned")
    fleet.kill("server", signal.SIGKILL)
    fleet.start_server()
    fleet.until(lambda: fleet.show(run_id)["state"] == "exhausted", "the budget ends the run")

    shown = fleet.show(run_id)
    assert "Budget 'fleet' allows" in shown["reason"]
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        charges = store.charges(run_id)
    counted = [c for c in charges if c.state != "voided"]
    assert 1 <= shown["round"] <= 2
    assert len(counted) == 2  # what the kill had cut short is given back, or counts as spent
    exported = tmp_path / "model.safetensors"
    fleet.lepton("run", "export", str(exported))  # the last model is there as before
    assert exported.stat().st_size > 0

    budgets = {b["budget"]: b for b in fleet.lepton("privacy", "show")["budgets"]}
    assert budgets["fleet"]["spent"] == budgets[f"run:{run_id}"]["spent"] <= cap
    assert budgets["fleet"]["unit"] == "device"
    fleet.lepton("privacy", "budget", "fleet", "--epsilon", "50", "--delta", "1e-3")
    fleet.lepton("run", "resume", run_id)
    fleet.until(lambda: fleet.show(run_id)["state"] in ("completed", "exhausted"), "the run goes on")
    assert fleet.show(run_id)["round"] >= 3

    proof = tmp_path / "ledger.jsonl"
    fleet.lepton("privacy", "export", str(proof))
    own = fleet.lepton("privacy", "verify")
    away = fleet.run("privacy", "verify", str(proof), "--key", own["budget_key"], "--format", "json")
    assert json.loads(away.stdout) == own
    assert own["releases"] == fleet.show(run_id)["round"]
    lines = proof.read_text().splitlines()
    proof.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert fleet.run("privacy", "verify", str(proof), check=False).returncode == 7
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        store.verify_journal()
        assert store.rebuild().equal


def test_a_restored_older_ledger_is_refused_by_the_device_and_noticed_by_the_coordinator(
    real_fleet, digit_files
):
    fleet = real_fleet
    database, copy = fleet.folder / "server" / "lepton.db", fleet.folder / "copy.db"
    budget = ("privacy", "budget", "fleet", "--delta", "1e-3", "--epsilon")
    fleet.start_server()
    fleet.join("dev0")
    fleet.lepton(*budget, "5")
    with contextlib.closing(sqlite3.connect(database)) as source:
        source.execute("VACUUM INTO ?", (str(copy),))
    fleet.lepton(*budget, "6")
    fleet.start_client("dev0", digit_files[0])
    kept = fleet.state("dev0") / "ledger_head.json"
    fleet.until(kept.exists, "the device has seen the ledger")
    fleet.kill("dev0", signal.SIGKILL)
    fleet.kill("server", signal.SIGKILL)
    for file in database.parent.glob("lepton.db*"):
        file.unlink()
    copy.rename(database)
    fleet.start_server()
    fleet.start_client("dev0", digit_files[0])
    with open_store(database) as store:
        fleet.until(lambda: store.missed_head() is not None, "the coordinator hears of it")
        assert store.missed_head() == json.loads(kept.read_text())["head"]["seq"]
        fleet.until(lambda: store.active_devices()[0].status == "not-eligible", "the device sits out")
    shown = fleet.run("privacy", "show", "--config", str(fleet.config))
    assert "this is an older copy" in shown.stdout + shown.stderr


def test_verifying_an_export_needs_neither_database_nor_torch(tmp_path):
    empty = tmp_path / "ledger.json"
    empty.write_text(json.dumps([{"format": "lepton privacy ledger 1", "events": 0, "head": "0" * 64}]))
    script = (
        "import sys\nfrom lepton_fl.cli.app import run\n"
        f"assert run(['privacy', 'verify', {str(empty)!r}]) == 0\n"
        "assert not {'sqlalchemy', 'sqlmodel', 'torch', 'flwr'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
