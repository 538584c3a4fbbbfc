"""A run of real processes, exported and played again in virtual time."""

import pytest

from lepton_simulations.world import Replay, World, WorldConfig
from lepton_simulations.world.calibrate import calibrate, round_seconds

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 3
[run.cohort]
size = 2
min_reports = 2
deadline_s = 120
fill_wait_s = 60
[run.local]
batch_size = 10
epochs = 2
"""


def test_a_real_run_is_replayed(real_fleet, digit_files, tmp_path):
    fleet = real_fleet
    fleet.start_server()
    for i in range(2):
        fleet.join(f"dev{i}")
        fleet.start_client(f"dev{i}", digit_files[i])
    run_id = fleet.start_run(RUN)
    fleet.until(lambda: fleet.show(run_id)["state"] == "completed", "the run completes")
    path = tmp_path / "run.jsonl"
    fleet.run("run", "journal", run_id, "--output", str(path), "--config", str(fleet.config))

    replay = Replay.read(path)
    shown = fleet.show(run_id)["rounds_done"]
    assert replay.rounds == 3
    assert len(replay.devices) == 2
    world, training = replay.world(), [a for a in replay.attempts if a.committed]
    for attempt, row in zip(training, (r for r in shown if r["state"] == "committed"), strict=True):
        assert attempt.seconds == row["seconds"]
        world.clock.advance_to(attempt.start_s)
        world._next = replay.attempts.index(attempt)
        fates = list(world._recorded(attempt))
        assert {f.device_id for f in fates} == set(attempt.cohort)
        assert fates[-1].arrives_s == attempt.seconds
        for fate, part in zip(fates, attempt.parts, strict=True):
            assert fate.answers
            assert 0 < part.seconds <= part.arrived_s <= attempt.seconds
    assert [a.round for a in replay.attempts if a.kind == "evaluate"] == [1, 2, 3]

    devices = calibrate([replay], shared_cores=2)
    world = World.build(WorldConfig(devices=devices), replay.devices)
    predicted = round_seconds(world, replay.spec, replay.rows)
    assert len(predicted) == 3
    assert all(seconds > 0 for seconds in predicted)
