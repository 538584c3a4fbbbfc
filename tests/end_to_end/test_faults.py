"""Some of the faults of ``benchmarks/faults.py``; all fifteen take ten minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def test_faults_on_real_processes_are_named_and_the_run_goes_on():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "gone,disk-full,evicted,wrong-version", "--patience", "240"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for cause in ("gone", "evicted", "wrong-version"):
        assert f": {cause} after" in done.stdout
