"""Privacy on real processes: the devices add noise, and the coordinator sees sums that hold it."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

DEVICES = 5
RUN = f"""
[run]
task = "digits"
rounds = 2
central_data = "built-in"
[run.cohort]
size = {DEVICES}
deadline_s = 120
fill_wait_s = 60
[run.secure]
min_cohort = {DEVICES}
[run.privacy]
preset = "strong"
epsilon = 500.0
delta = 1e-2
min_survivors = 0.8
[run.privacy.adaptive_clip]
bit_noise = 3.0
[run.privacy.metrics]
share = 0.1
[run.early_stop]
metric = "accuracy"
mode = "max"
"""


def test_strong_privacy_in_one_word_on_a_fleet(real_fleet, digit_files):
    fleet = real_fleet
    fleet.make_authority()
    fleet.start_server()
    fleet.join_all([f"dev{i}" for i in range(DEVICES)])
    for i in range(DEVICES):
        fleet.start_client(
            f"dev{i}",
            digit_files[i],
            '[client]\nsecure_aggregation = "required"\nleast_cohort = 4\nleast_noise = 0.05',
        )
    run_id = fleet.start_run(RUN)
    fleet.until(lambda: fleet.show(run_id)["state"] in ("completed", "failed"), "the run ends", 400)
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
