"""The child process that has torch in it: results, errors, its death and ours."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.errors import DataError, TaskError
from lepton_server.patience import Interrupted
from lepton_server.workshop import Workshop

TASK = "lepton_fl.tasks.images:digits"


def sleep_for_ever():
    time.sleep(600)


def die():
    os._exit(9)


def fail():
    raise ValueError("the task's own")


@pytest.fixture
def made():
    shop = Workshop()
    yield shop
    shop.close()


def test_models_come_from_the_child_and_errors_keep_their_kind(made):
    layout, model = made.initial_model(TASK, 3)
    assert model.shape == (layout.size,)
    np.testing.assert_array_equal(model, made.initial_model(TASK, 3)[1])
    sums = made.evaluate(TASK, model, "built-in")
    assert sums["examples"][0] > 0
    with pytest.raises(TaskError, match="no module"):
        made.initial_model("nowhere.tasks:x", 0)
    with pytest.raises((DataError, TaskError)):
        made.evaluate("lepton_fl.tasks.images:fashion_mnist", model, "/nowhere")
    assert made.initial_model(TASK, 3)[0] == layout  # still alive


def test_a_child_that_dies_is_named_and_replaced(made):
    with pytest.raises(TaskError, match="ended unexpectedly"):
        made._call(die)
    with pytest.raises(TaskError, match="ValueError: the task's own"):
        made._call(fail)


def test_whoever_waits_can_give_up_and_the_child_ends():
    leave = threading.Event()
    shop = Workshop(leave.is_set)
    threading.Timer(0.5, leave.set).start()
    with pytest.raises(Interrupted):
        shop._call(sleep_for_ever)
    assert shop._process is None
    with pytest.raises(Interrupted):
        shop._call(sleep_for_ever)


PARENT = """
import os, signal, sys
from lepton_server.workshop import Workshop, load_task
if __name__ == "__main__":
    shop = Workshop()
    shop._call(os.getpid)
    print(shop._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = Path(f"/proc/{int(done.stdout)}")
    ends = time.monotonic() + 60
    while child.exists() and "zombie" not in (child / "status").read_text():
        assert time.monotonic() < ends
        time.sleep(0.05)
