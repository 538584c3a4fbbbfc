"""A real fleet: one `lepton server` and several `lepton client` processes over TLS on loopback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lepton_fl.crashpoints import VARIABLE

LEPTON = Path(sys.executable).parent / "lepton"
WAIT_S = 300.0  # for anything to happen on a loaded machine


def until(condition, what, seconds=WAIT_S):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class RealFleet:
    """Starts, kills and restarts the processes of a fleet in one folder."""

    def __init__(self, folder: Path, ports: Sequence[int], database: str = "") -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        enrolment, device, fleet, self.ops = ports
        self.config = folder / "server.toml"
        url = f'[store]\nurl = "{database}"\n' if database else ""
        self.config.write_text(
            f'[server]\nstate_dir = "{folder / "server"}"\n'
            f'[listen]\nhost = "127.0.0.1"\npublic_names = ["127.0.0.1"]\nenrolment_port = {enrolment}\n'
            f"device_port = {device}\nfleet_port = {fleet}\nops_port = {self.ops}\n"
            f"[check_in]\ninterval_s = 2.0\n{url}"
        )

    # --- processes ----------------------------------------------------------------------------------

    def start(self, name, *arguments, crash=""):
        environment = {**os.environ, VARIABLE: crash}
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(LEPTON), *arguments], stdout=log, stderr=log, env=environment
            )

    def kill(self, name, number=signal.SIGKILL):
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=30)

    def start_server(self):
        self.start("server", "server", "--config", str(self.config))
        until(self.is_ready, f"the server is ready; its log: {self.log('server')}")

    def is_ready(self):
        assert self.processes["server"].poll() is None, self.log("server")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return self.get("/readyz") == "ready\n"
        return False

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ops}{path}", timeout=60) as answer:
            return answer.read().decode()

    def join(self, name, *, groups=()):
        token = self.lepton("token", "create")["token"]
        labels = [part for group in groups for part in ("--group", group)]
        self.run(
            "client",
            "enroll",
            "--token",
            token,
            "--state-dir",
            str(self.state(name)),
            "--name",
            name,
            *labels,
        )

    def join_all(self, names):
        """Many devices, without a process for each."""
        from lepton_client.enrol import enrol
        from lepton_client.state import StateDir

        token = self.lepton("token", "create", "--uses", str(len(names)))["token"]
        for name in names:
            state = StateDir(self.state(name))
            with state.locked():
                enrol(state, token, name=name)

    def start_client(self, name, data: Path, settings="", *, crash=""):
        arguments = ["--state-dir", str(self.state(name)), "--task", "digits", "--data", str(data)]
        if settings:
            path = self.folder / f"{name}.toml"
            path.write_text(settings)
            arguments += ["--config", str(path)]
        self.start(name, "client", "run", *arguments, crash=crash)

    def make_authority(self):
        """An enrolment authority on the coordinator's own machine."""
        key = self.folder / "authority.key"
        public = json.loads(self.run("authority", "create", str(key), "--format", "json").stdout)[
            "public_key"
        ]
        with open(self.config, "a") as file:
            file.write(f'[authority]\nkey_file = "{key}"\n')
        return public

    def close(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- commands -----------------------------------------------------------------------------------

    def run(self, *arguments, check=True, crash=""):
        environment = {**os.environ, VARIABLE: crash}
        done = subprocess.run(
            [str(LEPTON), *arguments],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=environment,
        )
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done

    def lepton(self, *arguments):
        """An operator's command, as data."""
        return json.loads(self.run(*arguments, "--config", str(self.config), "--format", "json").stdout)

    def start_run(self, text):
        path = self.folder / "run.toml"
        path.write_text(text)
        return self.lepton("run", "start", str(path))["id"]

    def show(self, run_id):
        return self.lepton("run", "show", run_id)

    # --- looking ------------------------------------------------------------------------------------

    def state(self, name):
        return self.folder / name

    def until(self, condition, what, seconds=WAIT_S):
        """Wait; if it is in vain, the error shows what every thread of the server is doing."""
        try:
            return until(condition, what, seconds)
        except AssertionError as error:
            self.processes["server"].send_signal(signal.SIGUSR1)
            time.sleep(1)
            raise AssertionError(f"{error}; the server's log: {self.log('server')[-12000:]}") from None

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def make_fleet(free_ports):
    """``make_fleet(folder, database)``: a RealFleet, closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(folder, database=""):
            fleet = RealFleet(folder, free_ports(4), database)
            stack.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture
def real_fleet(tmp_path, make_fleet):
    return make_fleet(tmp_path)


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory):
    """Six devices' own digits, with very different labels: each lacks two or three of the ten."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(7)
    share = rng.dirichlet(np.full(6, 0.6), size=10)  # label x device
    owner = np.array([rng.choice(6, p=share[label]) for label in digits.target])
    owner[rng.permutation(len(owner))[:300]] = np.repeat(np.arange(6), 50)  # nobody has too few rows
    paths = []
    for device in range(6):
        rows = np.flatnonzero(owner == device)
        paths.append(folder / f"{device}.npz")
        np.savez(paths[-1], x=digits.images[rows].astype(np.uint8), y=digits.target[rows])
    return paths


@pytest.fixture(autouse=True)
def no_orphans():
    """A test leaves no process behind."""
    yield
    mine = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    left = [line for line in mine.stdout.splitlines() if "/lepton " in line or "lepton_client" in line]
    assert left == []
