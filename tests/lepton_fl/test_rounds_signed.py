"""A device signs one survivor set per round, whatever happens in between."""

import os
import subprocess
import sys

import pytest

from lepton_fl.errors import StateCorrupt, StateError
from lepton_fl.rounds.signed import FileLedger

A, B = bytes(32), b"\1" * 32


def test_the_first_digest_of_a_round_stays(tmp_path):
    path = tmp_path / "signed"
    assert FileLedger(path).claim("r1", A) == A
    assert FileLedger(path).claim("r1", B) == A
    assert FileLedger(path).claim("r2", B) == B
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes().splitlines()) == 2


def test_what_was_signed_is_known_and_asking_writes_nothing(tmp_path):
    path = tmp_path / "signed"
    assert not FileLedger(path).signed("r1")
    FileLedger(path).give("r1", 1, A)
    before = path.read_bytes()
    assert not FileLedger(path).signed("r1")
    assert path.read_bytes() == before
    FileLedger(path).claim("r1", A)
    assert FileLedger(path).signed("r1")


def test_a_line_that_a_crash_cut_short_was_never_signed(tmp_path):
    path = tmp_path / "signed"
    FileLedger(path).claim("r1", A)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole + whole[:size].replace(b"r1", b"r2"))
        assert FileLedger(path).claim("r2", B) == B
        assert FileLedger(path).claim("r1", B) == A


@pytest.mark.parametrize("line", [b"nonsense\n", b'["r1"]\n', b'["r1", "zz"]\n', b"[1, 2]\n", b"\xff\n"])
def test_a_damaged_line_is_named_and_nothing_is_signed(tmp_path, line):
    path = tmp_path / "signed"
    path.write_bytes(line)
    with pytest.raises(StateCorrupt, match="cannot be read"):
        FileLedger(path).claim("r9", A)
    assert path.read_bytes() == line


def test_a_ledger_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(StateError, match="cannot be written"):
        FileLedger(tmp_path / "missing" / "signed").claim("r", A)


def test_vectors_are_given_in_ever_later_attempts_and_none_after_a_signature(tmp_path):
    path = tmp_path / "signed"
    assert FileLedger(path).give("r1", 2, A)
    assert FileLedger(path).give("r1", 2, A)  # again
    assert not FileLedger(path).give("r1", 1, A)
    assert not FileLedger(path).give("r1", 2, B)
    assert FileLedger(path).give("r1", 3, B)
    assert not FileLedger(path).give("r1", 2, A)
    assert FileLedger(path).claim("r1", A) == A
    assert FileLedger(path).give("r1", 3, B)
    assert not FileLedger(path).give("r1", 4, B)
    assert FileLedger(path).give("r2", 1, A)
    assert len(path.read_bytes().splitlines()) == 4


def test_processes_that_race_agree(tmp_path):
    script = (
        "import sys; from pathlib import Path; from lepton_fl.rounds.signed import FileLedger; "
        "print(FileLedger(Path(sys.argv[1])).claim('r', bytes([int(sys.argv[2])]) * 32).hex())"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "signed"), str(i)],
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        for i in range(3)
    ]
    answers = {racer.communicate()[0] for racer in racers}
    assert len(answers) == 1
    assert len((tmp_path / "signed").read_bytes().splitlines()) == 1
