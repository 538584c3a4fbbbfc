"""Example-level privacy on a real fleet: a device's own budget ends its part, and a kill loses no charge."""

import json
import re
import signal

import pytest

from lepton_client.config import ClientConfig
from lepton_client.report import budget_rows
from lepton_client.spending import Spending
from lepton_client.state import StateDir

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 4
evaluate_every = 0
[run.cohort]
size = 2
min_reports = 1
deadline_s = 120
fill_wait_s = 60
[run.local]
learning_rate = 0.3
batch_size = 32
[run.privacy]
unit = "example"
trust = "local"
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
"""
OWNED = """
[[tasks]]
reference = "digits"
data = {{ kind = "npz", path = "{path}" }}
privacy = {{ epsilon = 9.0, delta = 1e-4 }}
"""


def test_devices_spend_their_own_budgets_and_say_no(real_fleet, digit_files):
    fleet = real_fleet
    fleet.start_server()
    fleet.join_all(["free", "owned"])
    fleet.start_client("free", digit_files[0])
    config = fleet.folder / "owned.toml"
    config.write_text(OWNED.format(path=digit_files[1]))
    owned = ["client", "run", "--state-dir", str(fleet.state("owned")), "--config", str(config)]
    fleet.start("owned", *owned)
    run_id = fleet.start_run(RUN)
    spent = fleet.state("owned") / "budget.jsonl"
    fleet.until(
        lambda: spent.exists() and spent.read_bytes().count(b"\n") >= 1, "the device has spent something"
    )
    before = spent.read_bytes()
    fleet.kill("owned", signal.SIGKILL)
    fleet.start("owned", *owned)
    fleet.until(lambda: fleet.show(run_id)["state"] == "completed", "the run completes", 400)
    assert spent.read_bytes().startswith(before[: before.rfind(b"\n") + 1])

    settings = ClientConfig.model_validate(
        {"tasks": [{"reference": "digits", "privacy": {"epsilon": 9.0, "delta": 1e-4}}]}
    )
    (row,) = budget_rows(StateDir(fleet.state("owned")), settings)
    assert 0 < row["spent"] <= 9.0
    (free,) = Spending(fleet.state("free") / "budget.jsonl", {}).accounts()
    assert free["allowed"] is None
    assert free["rounds"] >= 3
    status = fleet.run(
        "client",
        "status",
        "--state-dir",
        str(fleet.state("owned")),
        "--config",
        str(config),
        "--format",
        "json",
    )
    told = json.loads(status.stdout)
    assert told["budgets"][0]["unit"] == "example"
    journal = fleet.run("run", "journal", run_id, "--config", str(fleet.config)).stdout
    assert "round.committed" in journal
    assert not re.search(r'loss"\s*:', journal)  # nobody told one


def test_a_model_whose_rows_mix_is_refused_before_anybody_is_asked(real_fleet):
    fleet = real_fleet
    fleet.start_server()
    run_id = fleet.start_run(RUN.replace('"digits"', '"shakespeare"'))
    fleet.until(lambda: fleet.show(run_id)["state"] == "failed", "the run fails")
    assert "recurrent is a GRU" in json.dumps(fleet.show(run_id))
