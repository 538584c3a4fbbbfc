"""The example app on a stock Flower deployment: a SuperLink, two SuperNodes, ``flwr run``.

``--insecure`` is for loopback in a test only; see the example's README.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1200)]


class Deployment:
    """Flower's processes, each with its children in a group of its own, so that all can be ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.env = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "HOME": str(folder / "home"),
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_COLOR": "1",
        }
        (folder / "home").mkdir()

    def start(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.folder,
                start_new_session=True,
            )
        self.started.append(process)

    def call(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"\n--- {f.name}\n{f.read_text(errors='replace')[-4000:]}" for f in files)

    def wait_until(self, condition: Callable[[], bool], what: str, every: float = 0.5) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            dead = [p.args for p in self.started if p.poll() is not None]
            assert not dead, f"{dead} ended while waiting until {what}{self.logs()}"
            assert time.monotonic() < end, f"waited {PATIENCE_S:g} s until {what}{self.logs()}"
            time.sleep(every)

    def stop(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self.started:
                try:
                    os.killpg(process.pid, sign)
                except ProcessLookupError:
                    continue
            for process in self.started:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    continue


@pytest.fixture
def deployment(tmp_path) -> Iterator[Deployment]:
    it = Deployment(tmp_path)
    try:
        yield it
    finally:
        it.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_example_trains_on_stock_flower(deployment, tmp_path, free_ports):
    server, *nodes = free_ports(3)
    address = f"127.0.0.1:{server}"
    deployment.start(
        "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(server)
    )
    deployment.wait_until(lambda: listens(server), "the SuperLink listens")
    for number, port in enumerate(nodes):
        place = ("--node-config", f"partition-id={number} num-partitions=2")
        host = ("--superlink", address, "--host", "127.0.0.1", "--port", str(port))
        deployment.start(f"node{number}", "flower-supernode", "--insecure", *host, *place)
    app = tmp_path / "app"
    shutil.copytree(ROOT / "examples" / "stock_flower", app)
    named = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    (tmp_path / "home" / "config.toml").write_text(named)

    output = tmp_path / "output"
    deployment.call("flwr", "run", str(app), "here", "--run-config", f'num-server-rounds=2 output="{output}"')

    def ended() -> bool:
        runs = json.loads(deployment.call("flwr", "list", "here", "--format", "json"))["runs"]
        status = runs[0]["status"]
        assert not status.startswith("finished") or status == "finished:completed", status + deployment.logs()
        return status == "finished:completed"

    deployment.wait_until(ended, "the run is completed")
    figures = json.loads((output / "metrics.json").read_text())
    assert [figures[r]["reports"] for r in ("1", "2")] == [2, 2]
    assert figures["2"]["accuracy"] > 0.6
    assert sum(tensor.size for tensor in load_file(output / "model.safetensors").values()) > 9000


NODES = 4


@pytest.fixture
def secure(deployment, tmp_path) -> Iterator[Deployment]:
    """The example of the documentation, nodes' keys, and an end of what keeps nodes' secrets."""
    from lepton_strategies.keeper import Beside, NodeKeys
    from lepton_strategies.secure_keys import make_key

    keys = [make_key(tmp_path / f"node{i}.key").hex() for i in range(NODES)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    shutil.copytree(ROOT / "examples" / "secure_flower", tmp_path / "app")
    short = tempfile.mkdtemp(prefix="k")  # a socket's path must be short
    deployment.env["TMPDIR"] = short
    try:
        yield deployment
    finally:
        deployment.stop()
        for number in range(NODES):
            its = NodeKeys(tmp_path / f"node{number}.key", tmp_path / "keys.txt")
            Beside(its, folder=Path(short) / f"lepton-{os.geteuid()}").stop()
        while Path(short).exists():
            with contextlib.suppress(FileNotFoundError):  # one that ends takes its socket with it
                shutil.rmtree(short)


def start_link(secure: Deployment, port: int, *more: str) -> str:
    """A SuperLink that ``flwr`` knows as "here"; its address."""
    place = ("--insecure", "--host", "127.0.0.1", "--port", str(port))
    secure.start("superlink", "flower-superlink", *place, *more)
    secure.wait_until(lambda: listens(port), "the SuperLink listens")
    named = (
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    (secure.folder / "home" / "config.toml").write_text(named)
    return f"127.0.0.1:{port}"


def run_documented(secure: Deployment, rounds: int, *more: str) -> str:
    """Run it to its end; what the server app has logged."""
    settings = f'rounds={rounds} nodes={NODES} keys="{secure.folder}/keys.txt"'
    secure.call("flwr", "run", str(secure.folder / "app"), "here", "--run-config", settings, *more)
    ended: list[str] = []

    def has_ended() -> bool:
        [run] = json.loads(secure.call("flwr", "list", "here", "--format", "json"))["runs"]
        if run["status"].startswith("finished"):
            ended.append(secure.call("flwr", "log", str(run["run-id"]), "here", "--show"))
            assert run["status"] == "finished:completed", ended[0] + secure.logs()
        return bool(ended)

    secure.wait_until(has_ended, "the run is completed", every=5.0)  # a command takes seconds
    return ended[0]


def check_rounds(log: str, rounds: int) -> None:
    """All nodes are in every sum, and something is learnt."""
    found = re.findall(r"Aggregated MetricRecord: \{'train_loss': ([\d.e+-]+), 'reports': (\d+)", log)
    assert [int(reports) for _, reports in found] == [NODES] * rounds, log
    losses = [float(loss) for loss, _ in found]
    assert losses == sorted(losses, reverse=True), log
    assert 0 < losses[-1] < 2.31, log


def test_the_documented_lines_on_a_stock_deployment(secure, tmp_path, free_ports):
    """A process for every message: only what is kept beside a node outlives a stage."""
    server, *nodes = free_ports(1 + NODES)
    address = start_link(secure, server)
    for number, port in enumerate(nodes):
        config = (
            f'partition-id={number} num-partitions={NODES} secagg-key="{tmp_path}/node{number}.key" '
            f'secagg-peers="{tmp_path}/keys.txt" secagg-cohort={NODES}'
        )
        host = ("--superlink", address, "--host", "127.0.0.1", "--port", str(port))
        secure.start(f"node{number}", "flower-supernode", "--insecure", *host, "--node-config", config)
    check_rounds(run_documented(secure, 1), 1)


def test_the_documented_lines_in_flowers_simulation(secure, tmp_path, free_ports):
    secure.env |= {
        "LEPTON_SECAGG_KEY": f"{tmp_path}/node{{partition-id}}.key",
        "LEPTON_SECAGG_PEERS": f"{tmp_path}/keys.txt",
        "LEPTON_SECAGG_COHORT": str(NODES),
    }
    start_link(secure, *free_ports(1), "--simulation")
    resources = f"num-supernodes={NODES} client-resources-num-cpus=1"
    check_rounds(run_documented(secure, 2, "--federation-config", resources), 2)
