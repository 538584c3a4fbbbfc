"""Secure aggregation on real processes: the coordinator adds what it cannot see."""

import pytest

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]

DEVICES = 5
RUN = f"""
[run]
task = "digits"
rounds = 2
secure_aggregation = "required"
clip_norm = 4.0
weighting = "equal"
[run.cohort]
size = {DEVICES}
min_reports = {DEVICES}
deadline_s = 120
fill_wait_s = 60
[run.secure]
min_cohort = {DEVICES}
"""


def test_a_fleet_trains_and_the_coordinator_sees_sums_only(real_fleet, digit_files):
    fleet = real_fleet
    fleet.make_authority()
    fleet.start_server()
    fleet.join_all([f"dev{i}" for i in range(DEVICES)])
    for i in range(DEVICES):
        fleet.start_client(
            f"dev{i}", digit_files[i], '[client]\nsecure_aggregation = "required"\nleast_cohort = 4'
        )
    run_id = fleet.start_run(RUN)
    fleet.until(lambda: fleet.show(run_id)["state"] in ("completed", "failed"), "the run ends")
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
    assert not (fleet.folder / "server" / "secure" / run_id).exists()
