"""SCAFFOLD on a real fleet: a device that is killed and comes back still has its control."""

import re
import signal

import numpy as np
import pytest
from numpy.testing import assert_allclose

from lepton_client.memory import FileMemory
from lepton_fl.files import BlobStore
from lepton_fl.rounds.local import CONTROL
from lepton_server.book import load_server_state
from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 5
weighting = "equal"
evaluate_every = 0
[run.cohort]
size = 2
min_reports = 2
deadline_s = 120
fill_wait_s = 60
[run.local]
learning_rate = 0.05
batch_size = 16
control_variates = true
"""


def test_a_killed_device_keeps_its_control(real_fleet, digit_files):
    fleet = real_fleet
    fleet.start_server()
    for i in range(2):
        fleet.join(f"dev{i}")
        fleet.start_client(f"dev{i}", digit_files[i])
    run_id = fleet.start_run(RUN)

    def done(number):
        found = re.search(r"^lepton_rounds_total\{.*\} (\d+)", fleet.get("/metrics"), re.MULTILINE)
        return found is not None and int(found[1]) >= number

    fleet.until(lambda: done(2), "round 2 is committed")
    fleet.kill("dev1", signal.SIGKILL)
    fleet.start_client("dev1", digit_files[1])
    fleet.until(lambda: fleet.show(run_id)["state"] == "completed", "the run completes")
    for i in range(2):
        fleet.kill(f"dev{i}", signal.SIGTERM)

    with open_store(fleet.folder / "server" / "lepton.db") as store:
        last = max((r for r in store.rounds(run_id) if r.state == "committed"), key=lambda r: r.round)
    assert last.round == 5
    blobs = BlobStore(fleet.folder / "server" / "blobs")
    server = load_server_state(blobs, last.state_sha256).slots[CONTROL]
    own = [control(fleet.state(f"dev{i}"), run_id, last) for i in range(2)]
    assert all(np.abs(c).max() > 1e-3 for c in own)
    # Had the device come back with nothing, its later changes would not add up to what it holds.
    assert_allclose(server, np.mean(own, axis=0), atol=1e-5)


def control(state, run_id, last):
    """As the device's next round would find it."""
    held = FileMemory(state / "memory").recall(run_id, lambda r, a: (r, a) == (last.round, last.attempt))
    return held["control"]
