"""SCAFFOLD and personal heads in a simulation: workers, faults and interruptions change no bit."""

import errno
import os

import numpy as np
import pytest
import torch

from lepton_fl.errors import ConfigError
from lepton_simulations import simulate

torch.set_num_threads(1)

HEAD = ("classifier.layers.2.*",)
LOCAL = {"learning_rate": 0.05, "batch_size": 16, "control_variates": True, "personal": HEAD}


def run(**changes):
    settings = {
        "clients": 6,
        "rounds": 5,
        "cohort": {"size": 3, "min_reports": 2},
        "partition": "dirichlet",
        "weighting": "equal",
        "evaluate_every": 0,
        "drop_out": 0.3,
        "corrupt": 0.2,
        "local": LOCAL,
        "workers": 0,
    }
    return simulate("digits", **settings | changes)


@pytest.fixture(scope="module")
def whole():
    return run()


def test_the_result_does_not_depend_on_the_workers(whole):
    other = run(workers=2)
    assert other.weights_sha256 == whole.weights_sha256
    assert other.journal_sha256 == whole.journal_sha256


def test_a_run_that_was_stopped_goes_on_with_every_devices_memory(whole, tmp_path):
    looks = iter([False] * 12 + [True] * 1000)
    stopped = run(folder=tmp_path / "run", should_stop=lambda: next(looks))
    assert stopped.verdict.outcome == "stopped"
    assert run(folder=tmp_path / "run", resume=True).weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_ends_the_run_by_name_and_it_can_go_on(whole, tmp_path, monkeypatch, workers):
    rows, allocate = iter(range(4)), os.posix_fallocate

    def full(descriptor, start, length):
        if next(rows, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    ended = run(folder=tmp_path / "run", workers=workers)
    assert ended.verdict.outcome == "failed"
    assert "No space was left" in ended.verdict.reason
    monkeypatch.undo()
    again = run(folder=tmp_path / "run", workers=workers, resume=True)
    assert again.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_not_the_failure_of_a_device_that_answers_singly(tmp_path, monkeypatch, workers):
    def full(descriptor, start, length):
        if start:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    ended = run(folder=tmp_path / "run", workers=workers, corrupt=1.0, drop_out=0.0)
    assert "No space was left" in ended.verdict.reason
    assert not any(tally.asked for tally in ended.tallies.values())


def test_without_its_memory_it_would_be_another_run(whole, tmp_path):
    looks = iter([False] * 12 + [True] * 1000)
    run(folder=tmp_path / "run", should_stop=lambda: next(looks))
    table = tmp_path / "run" / "devices.memory"
    table.write_bytes(bytes(table.stat().st_size))
    assert run(folder=tmp_path / "run", resume=True).weights_sha256 != whole.weights_sha256


def test_the_shared_copy_of_the_head_stays_as_it_was(whole):
    mask = whole.layout.select(HEAD)
    start = run(rounds=1, drop_out=0.0, corrupt=0.0)
    assert np.array_equal(whole.model[mask], start.model[mask])
    assert (whole.model[~mask] != start.model[~mask]).any()


def test_a_wrong_pattern_is_named():
    with pytest.raises(ConfigError, match="no such layer"):
        run(local={**LOCAL, "personal": ("no such layer",)})


def test_the_bytes_of_the_devices_are_those_of_the_round(whole):
    """The control goes down with the model."""
    per_device = 2 * 4 * whole.layout.size
    assert sum(tally.bytes_down for tally in whole.tallies.values()) == sum(r.bytes_down for r in whole.rows)
    assert whole.rows[0].bytes_down == per_device * whole.rows[0].asked * whole.rows[0].attempts
