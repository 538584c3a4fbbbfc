"""A few cases of `python benchmarks chaos`, which has all of them: SIGKILL at a point, the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.parametrize(
    ("mode", "points"),
    [
        ("plain", ["update.kept", "model.stored"]),
        ("secure", ["update.kept"]),
        ("central", ["noise.added"]),
    ],
)
def test_a_coordinator_that_is_killed_goes_on_to_the_same_bits(tmp_path, mode, points):
    found = tmp_path / "found.json"
    command = [sys.executable, str(CHAOS), "--modes", mode, "--seeds", "0", "--json", str(found), "--points"]
    done = subprocess.run([*command, *points], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert json.loads(found.read_text())[mode] == {
        "points": len(points),
        "seeds": 1,
        "good": len(points),
        "cases": len(points),
    }
