"""What a demonstration has started does not outlive it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lepton_simulations import demo_warden
from lepton_simulations.demo_fleet import RealFleet

# A process with a child in a session of its own, as an agent has one.
PARENT = """
import subprocess, sys
code = "import sys, time; sys.stdout.write('up\\\\n'); sys.stdout.flush(); time.sleep(3600)"
subprocess.run([sys.executable, "-c", code], start_new_session=True)
"""
DEMONSTRATION = f"""
import sys, time
from lepton_simulations import demo_warden
from lepton_simulations.demo_fleet import RealFleet
fleet = RealFleet()
fleet._command = [sys.executable]
fleet._start("parent", "-c", {PARENT!r})
while "up" not in fleet.log("parent"):
    time.sleep(0.05)
print(fleet.folder, flush=True)
time.sleep(3600)
"""


def test_a_killed_demonstration_leaves_neither_processes_nor_files(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", DEMONSTRATION], stdout=subprocess.PIPE, text=True, env=environment
    ) as demonstration:
        folder = demonstration.stdout.readline().strip()
        assert len(demo_warden.marked(folder)) == 2
        demonstration.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 300
    while Path(folder).exists():
        assert time.monotonic() < ends, "the warden ends what is left"
        time.sleep(0.1)
    assert demo_warden.marked(folder) == []


def test_a_fleet_that_is_closed_takes_its_warden_along(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RealFleet() as fleet:
        fleet._command = [sys.executable]
        fleet._start("one", "-c", "import time; time.sleep(3600)")
        assert fleet.folder.exists()
    assert not fleet.folder.exists()
    assert fleet._warden.returncode == 0
    assert demo_warden.marked(str(fleet.folder)) == []
