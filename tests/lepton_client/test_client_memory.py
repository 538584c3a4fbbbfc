"""A device's memory of its runs: a kill leaves the old or the new one, and only what counted is effective."""

import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lepton_client.memory import KEEP_RUNS, FileMemory
from lepton_fl.errors import DiskFull, StateCorrupt, StateError, StateTooNew, TrustError


def vector(value):
    return {"control": np.full(5, value, np.float32)}


def value_of(memory, counted=lambda r, a: True, run="run"):
    held = memory.recall(run, counted)
    return float(held["control"][0]) if held else None


@pytest.fixture
def memory(tmp_path):
    return FileMemory(tmp_path / "memory")


def test_nothing_is_remembered_and_nothing_made_at_first(memory, tmp_path):
    assert memory.recall("run", lambda r, a: True) == {}
    memory.settle("run", 1, 1, True)
    memory.settle("run", 1, 1, False)
    assert list(tmp_path.iterdir()) == []


def test_what_was_sent_and_counted_becomes_effective_even_after_a_restart(memory, tmp_path):
    memory.keep("run", 1, 1, vector(1))
    memory.settle("run", 1, 1, True)
    restarted = FileMemory(tmp_path / "memory")
    assert value_of(restarted, lambda r, a: (r, a) == (1, 1)) == 1
    assert value_of(FileMemory(tmp_path / "memory")) == 1


FATES = {
    "never sent": (lambda m: None, lambda r, a: True),
    "refused at once": (lambda m: m.settle("run", 2, 1, False), lambda r, a: True),
    "refused later": (
        lambda m: (m.settle("run", 2, 1, True), m.settle("run", 2, 1, False)),
        lambda r, a: True,
    ),
    "abandoned": (lambda m: m.settle("run", 2, 1, True), lambda r, a: False),
    "another attempt": (lambda m: m.settle("run", 2, 2, True), lambda r, a: True),
}


@pytest.mark.parametrize("fate", FATES)
def test_what_did_not_count_leaves_no_trace(memory, fate, tmp_path):
    memory.keep("run", 1, 1, vector(1))
    memory.settle("run", 1, 1, True)
    assert value_of(memory) == 1
    memory.keep("run", 2, 1, vector(2))
    happens, counted = FATES[fate]
    happens(memory)
    assert value_of(memory, counted) == 1
    assert len(list((tmp_path / "memory").iterdir())) == 1
    assert value_of(memory) == 1


def test_runs_do_not_mix_and_their_names_are_no_paths(memory, tmp_path):
    for number, run in enumerate(["run", "../../etc/x", "a/b", "*", ""]):
        memory.keep(run, 1, 1, vector(number))
        memory.settle(run, 1, 1, True)
    for number, run in enumerate(["run", "../../etc/x", "a/b", "*", ""]):
        assert value_of(memory, run=run) == number
    assert {path.name for path in tmp_path.iterdir()} == {"memory"}


def test_only_the_last_runs_are_kept(memory, tmp_path):
    for number in range(KEEP_RUNS + 3):
        memory.keep(f"run {number}", 1, 1, vector(number))
        memory.settle(f"run {number}", 1, 1, True)
        for path in (tmp_path / "memory").iterdir():
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
    assert len(list((tmp_path / "memory").iterdir())) == KEEP_RUNS
    assert value_of(memory, run="run 0") is None
    assert value_of(memory, run=f"run {KEEP_RUNS + 2}") == KEEP_RUNS + 2


def settled(memory, tmp_path):
    memory.keep("run", 1, 1, vector(1))
    memory.settle("run", 1, 1, True)
    value_of(memory)
    (path,) = (tmp_path / "memory").iterdir()
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: raw.replace(b'"run": "run"', b'"run": "ruN"'),
        lambda raw: raw[:-4] + b"\x00\x00\x00\x01",
        lambda raw: b"[" * 5000 + b"\n" + raw,
        lambda raw: b'{"format": "1", "run": "run", "sha256": 5}\n' + raw,
    ],
)
def test_a_damaged_file_is_named_and_not_used(memory, tmp_path, damage):
    path = settled(memory, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateCorrupt, match="damaged"):
        memory.recall("run", lambda r, a: True)


def test_a_file_of_a_newer_version_is_not_used(memory, tmp_path):
    path = settled(memory, tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format": "1"', b'"format": "2"'))
    with pytest.raises(StateTooNew):
        memory.recall("run", lambda r, a: True)


def test_files_are_private(memory, tmp_path):
    path = settled(memory, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(TrustError):
        memory.recall("run", lambda r, a: True)


def test_a_full_disk_leaves_the_old_memory(memory, tmp_path, small_files):
    settled(memory, tmp_path)
    with small_files(50), pytest.raises(DiskFull):
        memory.keep("run", 2, 1, vector(2))
    assert value_of(memory) == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "memory").write_text("in the way")
    with pytest.raises(StateError):
        FileMemory(tmp_path / "memory").keep("run", 1, 1, vector(1))


def test_every_state_a_kill_can_leave_is_the_old_memory_or_the_new(memory, tmp_path):
    """The steps of a participation, cut off after each of them."""
    steps = [
        lambda m: m.keep("run", 2, 1, vector(2)),
        lambda m: m.settle("run", 2, 1, True),
        lambda m: m.recall("run", lambda r, a: (r, a) == (2, 1)),
    ]
    for done in range(len(steps) + 1):
        folder = tmp_path / f"{done}"
        device = FileMemory(folder)
        device.keep("run", 1, 1, vector(1))
        device.settle("run", 1, 1, True)
        device.recall("run", lambda r, a: True)
        for step in steps[:done]:
            step(device)
        again = FileMemory(folder)
        assert value_of(again, lambda r, a: (r, a) == (2, 1)) == (1 if done < 2 else 2)
        assert_array_equal(
            again.recall("run", lambda r, a: False)["control"], vector(1 if done < 2 else 2)["control"]
        )
