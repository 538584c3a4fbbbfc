"""Power loss at every write of a download, an installation and a switch: no corrupt state, ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("crash_driver.py")


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_a_whole_release_in_service(world, copy_tree):
    names = [world.publish(width=300, seed=seed, like=1 if seed == 2 else None) for seed in (1, 2, 3)]
    assert world.deliver(names[0]).state == "serving"
    copy_tree(world.slots.folder, world.folder / "device0")
    assert world.deliver(names[1]).state == "serving"
    copy_tree(world.slots.folder, world.folder / "device2")
    copy_tree(world.folder / "device0", world.folder / "device")
    (world.folder / "root.json").write_bytes(world.pinned)
    (world.folder / "names.json").write_text(json.dumps(names))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(world.folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["corrupt"] == []
    assert found["kills"] >= 500, found["kills"]
    assert 0 < found["switched"] < found["kills"]  # before and after the switch
