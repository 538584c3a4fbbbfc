"""The commands and the agent as real processes: signals, kills, memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lepton_client.enrol import enrol
from lepton_client.state import StateDir
from lepton_fl.errors import TrustError
from lepton_fl.wire.v1 import device_pb2 as pb

pytestmark = pytest.mark.network

LEPTON = str(Path(sys.executable).with_name("lepton"))
IDLE_BYTES = 60_000_000


def lepton(*arguments, **kwargs):
    return subprocess.run(
        [LEPTON, "client", *map(str, arguments)], capture_output=True, text=True, timeout=120, **kwargs
    )


@pytest.fixture
def background():
    """Starts processes and kills what is left of them."""
    started = []

    def start(command):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def is_idle(request):
    return request.status == pb.STATUS_IDLE and bool(request.tasks) and request.tasks[0].ready


def test_two_commands_from_nothing_to_an_idle_device(coordinator, background, tmp_path):
    coordinator.interval = 0.2
    folder = tmp_path / "state"
    token = coordinator.token()
    first = lepton("enroll", "--token", token, "--state-dir", folder, "--format", "json")
    assert first.returncode == 0, first.stderr
    again = lepton("enroll", "--token", "-", "--state-dir", folder, input=token + "\n")
    assert again.returncode == 0, again.stderr
    process = background([LEPTON, "client", "run", "--state-dir", str(folder), "--task", "digits"])
    request = coordinator.heard(is_idle, timeout=60)
    assert request.tasks[0].name == "lepton_fl.tasks.images:digits"

    seen = psutil.Process(process.pid)
    until_gone(lambda: seen.children(), "the data check is over")
    assert seen.memory_info().rss <= IDLE_BYTES
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
    loaded = Path(f"/proc/{process.pid}/maps").read_text()
    assert not any(name in loaded for name in ("libtorch", "/numpy/", "/flwr/", "pyarrow", "sklearn"))

    shown = json.loads(lepton("status", "--state-dir", folder, "--format", "json").stdout)
    assert shown["pid"] == process.pid
    assert shown["device_id"] == json.loads(first.stdout)["device_id"]
    assert (shown["state"], shown["connected"]) == ("idle", True)

    second = lepton("run", "--state-dir", folder)
    assert second.returncode == 7
    assert f"pid {process.pid}" in second.stderr

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert json.loads(lepton("status", "--state-dir", folder, "--format", "json").stdout)["running"] is False


def until_gone(condition, what, timeout=60.0):
    ends = time.monotonic() + timeout
    while condition():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def test_revoked_the_process_ends_with_code_6(coordinator, background, tmp_path):
    folder = tmp_path / "state"
    assert lepton("enroll", "--token", coordinator.token(), "--state-dir", folder).returncode == 0
    coordinator.refusal = TrustError("This device was revoked.", hint="Ask your operator.")
    result = lepton("run", "--state-dir", folder, "--task", "digits")
    assert result.returncode == 6
    assert "revoked" in result.stderr
    assert "Ask your operator" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("enroll", "--token", "lepton1.xyz"), 6, "join token"),
        (("run",), 9, "lepton client enroll"),
        (("run", "--data", "x.npz"), 3, "--task"),
        (("run", "--task", "digits", "--data", "x.txt"), 3, "neither"),
        (("run", "--task", "digits", "--data", "{"), 3, "JSON"),
        (("run", "--task", "no such"), 3, "short name"),
        (("check",), 3, "No task"),
        (("check", "--task", "digits", "--data", "missing.npz"), 4, "missing.npz"),
        (("status",), 9, "not enrolled"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(tmp_path, arguments, code, words):
    home = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "COLUMNS": "500"}
    result = lepton(*arguments, env=home)
    assert result.returncode == code, result.stderr
    assert words in result.stdout + result.stderr
    assert not list(tmp_path.glob("*/device.key"))


def test_check_prints_a_table(tmp_path):
    result = lepton("check", "--task", "digits", "--format", "json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["ready"] is True
    assert row["rows"] > 1000


# An agent whose rounds come from a folder: a message waits as a file until it is answered.
FOLDER_AGENT = """
import sys, time
from pathlib import Path
from lepton_client.agent import Agent
from lepton_client.config import ClientConfig
from lepton_client.inspection import Finding
from lepton_fl.wire.messages import Ticket
from lepton_fl.wire.records import Records

folder = Path(sys.argv[1])

class Node:
    def activate(self): pass
    moving_s = 0.0
    def deactivate(self): pass
    def close(self): pass
    def pull(self):
        if not (folder / "message").exists():
            return None
        return 1, Records(config=Ticket("train", "run", 1, 1, "00").to_config())
    def push(self, handle, records):
        (folder / "message").unlink()
    def push_error(self, handle, reason, message):
        (folder / "refused").write_text(message)
        (folder / "message").unlink()

def train(records, should_stop):
    with open(folder / "trained", "a") as file:
        file.write("once ")
    while not should_stop():
        time.sleep(0.01)
    return records

config = ClientConfig.model_validate({
    "client": {"state_dir": folder / "state"}, "tasks": [{"reference": "digits"}],
    "limits": {"nice": 0}, "connection": {"backoff_min_s": 0.02, "backoff_max_s": 0.1, "poll_s": 0.01},
})
good = Finding("d", "1", ready=True)
Agent(config, node_factory=lambda *_: Node(), answer=train, check=lambda section: good).run()
"""


def test_killed_in_mid_training_it_does_not_train_twice(coordinator, background, tmp_path):
    state = StateDir(tmp_path / "state")
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    coordinator.wait = True
    call = pb.Participate(run_id="run", round=1, attempt=1, nonce="00", deadline_s=60)
    (tmp_path / "message").touch()
    trained, refused = tmp_path / "trained", tmp_path / "refused"

    first = background([sys.executable, "-c", FOLDER_AGENT, str(tmp_path)])
    coordinator.heard(is_idle, timeout=60)
    coordinator.instructions.put(pb.Instruction(participate=call))
    until_gone(lambda: not (trained.exists() and trained.read_text()), "training began")
    first.kill()
    first.wait()
    assert state.holder() == 0  # the lock ended with the process

    background([sys.executable, "-c", FOLDER_AGENT, str(tmp_path)])
    until_gone(lambda: not (refused.exists() and refused.read_text()), "the message was answered")
    assert "works once" in refused.read_text()
    coordinator.heard(is_idle, timeout=60)
    assert trained.read_text() == "once "


def test_the_memory_cap_is_an_error_that_training_can_report():
    code = """
from lepton_client.config import LimitsSection
from lepton_client.limits import apply_limits
apply_limits(LimitsSection(memory_bytes=2**28, nice=0))
try:
    bytearray(2**29)
except MemoryError:
    print("capped")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "capped\n"
