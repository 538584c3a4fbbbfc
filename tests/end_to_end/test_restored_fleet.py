"""A case of `python benchmarks restored`, which has all: lost in mid-round, restored, the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RESTORED = Path(__file__).parents[2] / "benchmarks" / "restored.py"


def test_a_run_goes_on_from_a_backup_to_the_same_bits(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, str(RESTORED), "--modes", "plain", "--seeds", "1", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert json.loads(found.read_text()) == {"plain": {"good": 1, "cases": 1}}
