"""Real processes for the benchmarks: our coordinator and devices, and a stock Flower deployment.

Everything lives in one temporary folder and on free ports of the loopback interface; leaving the ``with``
block ends every process that was started, with its children, and removes the folder.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil

from lepton_simulations.demo_fleet import free_ports as free_ports

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
START_S = 60.0  # patience with the start of one process


class Processes:
    """Processes of one measurement and their folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lepton-bench-"))
        self.running: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its helpers by name
            "PYTHONPATH": str(HERE),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _leave)  # so that a benchmark that is stopped cleans up, too
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._show_logs()
        self.stop(self.running)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name: str, *command: object, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program of this Python environment; what it prints goes to ``<name>.log``."""
        program, *arguments = map(str, command)
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(BIN / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **environment},
                cwd=self.folder,
            )
        self.running.append(process)
        return process

    def call(self, *command: object) -> str:
        """Run a program to its end and return what it printed."""
        program, *arguments = map(str, command)
        done = subprocess.run(
            [str(BIN / program), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=2 * START_S,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{program} {arguments[0]} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout.strip()

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Return when ``ready``; end the benchmark when it takes too long or a process has died."""
        ends = time.monotonic() + seconds
        while not ready():
            dead = [process.args for process in self.running if process.poll()]
            if dead or time.monotonic() > ends:
                raise TimeoutError(
                    f"{what}: " + (f"{dead[0]!r} has died" if dead else f"{seconds:.0f} s over")
                )
            time.sleep(0.1)

    def stop(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """End processes and all their children, politely at first."""
        family = [member for process in processes for member in tree(process.pid)]
        for process in processes:
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for member in alive:
            member.kill()
        for process in processes:
            process.wait()
        self.running = [p for p in self.running if p not in processes]

    def cpu_s(self) -> float:
        """Processor seconds of all processes so far, ended children included."""
        total = 0.0
        for member in (m for p in self.running for m in tree(p.pid)):
            try:
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _show_logs(self) -> None:
        for path in sorted(self.folder.glob("*.log")):
            text = path.read_text(errors="replace")[-1500:]
            if text:
                print(f"--- {path.name}\n{text}", file=sys.stderr)


class Lepton(Processes):
    """Our coordinator and its devices."""

    def __enter__(self) -> Self:
        super().__enter__()
        ports = dict(
            zip(("enrolment_port", "device_port", "fleet_port", "ops_port"), free_ports(4), strict=True)
        )
        self.config = self.folder / "server.toml"
        self.config.write_text(
            f'[server]\nstate_dir = "{self.folder / "state"}"\n[log]\nlevel = "warning"\n'
            '[listen]\nhost = "127.0.0.1"\npublic_names = ["127.0.0.1"]\n'
            + "".join(f"{key} = {port}\n" for key, port in ports.items())
        )
        self.ops = f"http://127.0.0.1:{ports['ops_port']}"
        return self

    @property
    def store_url(self) -> str:
        """Of the coordinator's database."""
        return f"sqlite:///{self.folder / 'state' / 'lepton.db'}"

    def serve(self) -> subprocess.Popen[bytes]:
        """Start the coordinator and wait until it is ready."""
        server = self.start("server", "lepton", "server", "-c", self.config)
        self.wait(lambda: answers(self.ops + "/readyz"), START_S, "the coordinator's start")
        return server

    def token(self, uses: int) -> str:
        """A join token."""
        return self.call("lepton", "token", "create", "-c", self.config, "--uses", uses)

    def device(self, number: int, token: str, **environment: str) -> subprocess.Popen[bytes]:
        """Enrol a device and start it; it has a few rows of its own."""
        name, rng = f"device{number}", np.random.default_rng(number)
        rows = {"x": rng.standard_normal((8, 1000)), "y": rng.integers(0, 1000, 8)}
        np.savez(self.folder / f"{name}.npz", x=rows["x"].astype(np.float32), y=rows["y"])
        state = self.folder / name
        self.call("lepton", "client", "enroll", "--token", token, "--state-dir", state, "--name", name)
        source = json.dumps({"kind": "npz", "path": str(self.folder / f"{name}.npz")})
        return self.start(
            name,
            *("lepton", "client", "run", "--state-dir", state, "--task", "_million:task", "--data", source),
            LEPTON__LIMITS__NICE="0",  # as stock Flower's nodes run
            **environment,
        )

    def queue(self, devices: int, rounds: int, more: str = "") -> str:
        """Queue a run of all devices without evaluation; its id.

        Args:
            devices: in every round.
            rounds: how many.
            more: TOML, of the run.
        """
        spec = self.folder / "run.toml"
        spec.write_text(
            f'[run]\ntask = "_million:task"\nrounds = {rounds}\nevaluate_every = 0\n{more}'
            f"[run.local]\nmax_steps = 1\n"
            f"[run.cohort]\nsize = {devices}\nmin_reports = {devices}\nfill_wait_s = {START_S}\n"
            f"quorum_wait_s = {2 * START_S}\ndeadline_s = 300\nmax_attempts = 1\n"
        )
        return str(
            json.loads(self.call("lepton", "run", "start", spec, "-c", self.config, "--format", "json"))["id"]
        )


class StockFlower(Processes):
    """Flower's SuperLink and SuperNodes over TLS, and an app that does nothing but move a model."""

    def __enter__(self) -> Self:
        from lepton_server.authority import Authority

        super().__enter__()
        authority = Authority.open(self.folder / "tls", ["127.0.0.1"])
        for name, data in (
            ("ca.crt", authority.ca_pem),
            ("server.crt", authority.server_cert_pem),
            ("server.key", authority.server_key_pem),
        ):
            (self.folder / name).write_bytes(data)
        return self

    def serve(self, nodes: int) -> None:
        """Start a SuperLink and its SuperNodes."""
        port, *ports = free_ports(1 + nodes)
        self.address = f"127.0.0.1:{port}"
        tls = [f"--ssl-{a}={self.folder / b}" for a, b in _TLS_FILES.items()]
        self.start("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", port, *tls)
        self.wait(lambda: accepts(port), START_S, "the SuperLink's start")
        for number, own in enumerate(ports):
            self.node(number, own)

    def node(self, number: int, port: int) -> subprocess.Popen[bytes]:
        """Start one SuperNode."""
        return self.start(
            f"supernode{number}",
            *("flower-supernode", "--root-certificates", self.folder / "ca.crt", "--superlink", self.address),
            *("--host", "127.0.0.1", "--port", port, "--node-config", self.node_config(number)),
        )

    def node_config(self, number: int) -> str:
        """What a SuperNode is started with."""
        return f"number={number}"

    def submit(
        self,
        nodes: int,
        rounds: int,
        size: int,
        *,
        name: str = "noop",
        app: "App | None" = None,
        keys: str = "",
    ) -> Path:
        """Submit an app; the file that it writes a line to for each round, which begins with the time.

        Args:
            nodes: in every round.
            rounds: how many.
            size: float32 numbers of the model.
            name: of the app.
            app: None = one that does nothing but move the model.
            keys: a path, if it wants one.
        """
        home, folder = Path(self.environment["FLWR_HOME"]), self.folder / f"app-{name}"
        home.mkdir(exist_ok=True)
        connection = f'address = "{self.address}"\nroot-certificates = "{self.folder / "ca.crt"}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "bench"\n[superlink.bench]\n{connection}')
        (folder / name).mkdir(parents=True)
        (folder / "pyproject.toml").write_text(_PROJECT.format(name=name))
        (folder / name / "__init__.py").write_text("")
        for module, text in zip(("server.py", "client.py"), app or _NOOP, strict=True):
            (folder / name / module).write_text(text)
        times = self.folder / f"{name}.txt"
        settings = f'nodes={nodes} rounds={rounds} size={size} times="{times}" keys="{keys}"'
        self.call("flwr", "run", folder, "bench", "--run-config", settings)
        return times


App = tuple[str, str]  # the modules with the ServerApp and the ClientApp
_TLS_FILES: Mapping[str, str] = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 0
[tool.flwr.app.components]
serverapp = "{name}.server:app"
clientapp = "{name}.client:app"
[tool.flwr.app.config]
nodes = 2
rounds = 3
size = 1000000
times = ""
keys = ""
"""

_NOOP: App = (
    '''\
"""FedAvg as it comes, with a line for each round."""
import time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        with open(self.times, "a") as file:
            file.write(f"{time.time()} {sum(not r.has_error() for r in replies)}\\n")
        return result


@app.main()
def main(grid, context):
    config, nodes = context.run_config, context.run_config["nodes"]
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.times = config["times"]
    model = ArrayRecord([np.zeros(config["size"], np.float32)])
    strategy.start(grid=grid, initial_arrays=model, num_rounds=config["rounds"])
''',
    '''\
"""Answers with the model and a little noise: no two replies are alike."""
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    rng = np.random.default_rng()
    arrays = [
        a + rng.standard_normal(a.shape, np.float32) for a in message.content["arrays"].to_numpy_ndarrays()
    ]
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)
''',
)


def tree(pid: int) -> list[psutil.Process]:
    """A process and its children, if it lives."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def answers(url: str) -> bool:
    """Whether an HTTP address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def gaps(times: Sequence[float]) -> list[float]:
    """Seconds between neighbours."""
    return [b - a for a, b in itertools.pairwise(times)]


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    return statistics.median(values)


def _leave(*_: object) -> None:
    raise SystemExit(143)
