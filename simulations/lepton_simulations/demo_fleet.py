"""A real fleet on this machine, for a demonstration: one ``lepton server`` and many ``lepton client``.

Every part is a process of its own, started by the ``lepton`` command as an operator or an owner would; they
talk over TLS on loopback. Nothing is replaced by something simpler. Whatever happens, all of them end with
the ``with`` block or, if this process is killed, by ``demo_warden``; what they kept on the disk is removed.

    with RealFleet(folder) as fleet:
        fleet.start_server()
        fleet.join("d00", ("canary",), settings, token)
        fleet.lepton("release", "status")            # an operator's command, as data
        fleet.ask("d00", "GET", "/v1/model")         # a program on the device
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from types import FrameType, TracebackType
from typing import Any, Final, Self

from lepton_fl.errors import ConfigError, RunError
from lepton_simulations import demo_warden

READY_S: Final = 120.0  # until the coordinator answers
COMMAND_S: Final = 300.0  # patience with one command
ASK_S: Final = 60.0  # patience with one prediction
PAUSE_S: Final = 0.05  # between two requests of the caller
TELLING: Final = 2000  # characters of a log that an error shows

_PORTS: Final = range(20_000, 32_000)  # below those that systems give to outgoing connections


class RealFleet:
    """The processes of one demonstration."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        # Not below the output folder: the path of a Unix socket has to be short.
        self.folder = Path(tempfile.mkdtemp(prefix="lepton-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._command = _lepton()
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LEPTON_")}
        self._environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self._warden = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", demo_warden.__name__, str(self.folder)],
            stdin=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        self._environment[demo_warden.MARK] = str(self.folder)
        self._before: Any = None
        enrolment, device, fleet, self._ops = free_ports(4)
        self._config = self.folder / "server.toml"
        self._config.write_text(
            f'[server]\nstate_dir = "{self.folder / "server"}"\n'
            f'[listen]\nhost = "127.0.0.1"\npublic_names = ["127.0.0.1"]\nenrolment_port = {enrolment}\n'
            f"device_port = {device}\nfleet_port = {fleet}\nops_port = {self._ops}\n"
            "[check_in]\ninterval_s = 5.0\n"
        )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _interrupt)  # so that the block is left in order
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)

    def close(self) -> None:
        """End every process, and remove what they kept."""
        for process in self._processes.values():
            process.terminate()
        ends = time.monotonic() + demo_warden.END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._warden.communicate()  # it finds nothing to end, and ends

    # --- the operator -------------------------------------------------------------------------------

    def start_server(self) -> None:
        """The coordinator; raises RunError if it does not come up."""
        self._start("server", "server", "--config", str(self._config))
        ends = time.monotonic() + READY_S
        while self._get("/readyz") != "ready\n":
            if self._processes["server"].poll() is not None or time.monotonic() > ends:
                raise RunError(f"The coordinator did not come up: {self.log('server')}")
            time.sleep(0.2)

    def lepton(self, *arguments: str) -> Any:  # noqa: ANN401 - what the command prints
        """An operator's command; returns its JSON.

        Raises:
            RunError: It failed; the message has what it said.
        """
        return json.loads(self._run(*arguments, "--config", str(self._config), "--format", "json"))

    def served(self) -> dict[str, int]:
        """How many devices serve each release (its first 12 digits), as the coordinator's metrics say."""
        found = {}
        for line in self._get("/metrics").splitlines():
            if line.startswith("lepton_serving{"):
                name, _, count = line.partition(" ")
                found[name.split('"')[1]] = int(float(count))
        return found

    def _get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ops}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return ""

    # --- the devices --------------------------------------------------------------------------------

    def join(self, name: str, groups: Sequence[str], settings: str, token: str) -> None:
        """Enrol a device, and start its agent and its prediction endpoint.

        Args:
            name: Of the device.
            groups: Its labels.
            settings: Of its TOML file, all but [client].
            token: Of the operator.
        """
        config = self.folder / f"{name}.toml"
        labels = json.dumps(list(groups))
        config.write_text(
            f'[client]\nname = "{name}"\nstate_dir = "{self.state(name)}"\ngroups = {labels}\n{settings}'
        )
        self._run("client", "enroll", "--token", token, "--config", str(config))
        self._start(name, "client", "run", "--config", str(config))
        self._start(f"{name}-serve", "client", "serve", "--config", str(config))

    def state(self, name: str) -> Path:
        """The state folder of a device."""
        return self.folder / name

    def ask(self, name: str, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Ask the prediction endpoint of a device; raises RunError."""
        try:
            with contextlib.closing(self.connect(name)) as connection:
                return _answer(connection, method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise RunError(f"The endpoint of {name} does not answer: {error}.") from error

    def connect(self, name: str) -> "SocketConnection":
        """A connection to the endpoint of a device."""
        return SocketConnection(str(self.state(name) / "serve.sock"), timeout=ASK_S)

    def answers(self, name: str) -> bool:
        """Whether the endpoint of a device can be connected to."""
        with socket.socket(socket.AF_UNIX) as trial:
            return trial.connect_ex(str(self.state(name) / "serve.sock")) == 0

    # --- processes ----------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise RunError if a process has ended by itself."""
        for name, process in self._processes.items():
            if (code := process.poll()) is not None:
                raise RunError(f"The process {name} has ended with code {code}: {self.log(name)}")

    def memory(self) -> dict[str, int]:
        """Resident bytes of every process, by name."""
        return {name: _resident(process.pid) for name, process in self._processes.items()}

    def log(self, name: str) -> str:
        """The end of what a process has written."""
        try:
            return (self.folder / f"{name}.log").read_text(errors="replace")[-TELLING:]
        except OSError:
            return ""

    def _start(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - our own command
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours; we end them
            )

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(  # noqa: S603 - our own command
                [*self._command, *arguments],
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
                env=self._environment,
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"`lepton {' '.join(arguments[:2])}` took longer than {COMMAND_S:g} s.") from error
        if done.returncode:
            raise RunError(f"`lepton {' '.join(arguments[:2])}` failed: {done.stderr.strip()[-TELLING:]}")
        return done.stdout


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def connect(self) -> None:
        """Open the socket that the host names."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def _answer(connection: SocketConnection, method: str, path: str, body: object) -> dict[str, Any]:
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"content-type": "application/json"})
    answer = connection.getresponse()
    found = dict(json.loads(answer.read()))
    if answer.status != 200:
        raise RunError(f"The endpoint answers {answer.status}: {found.get('message')}")
    return found


@dataclass
class Caller:
    """A program that asks every device again and again, so that a request that fails at a switch is seen.

    Attributes:
        fleet: Whose devices.
        rows: By device, a row as its endpoint takes it.
        requests: So far.
        failures: What went wrong, by device and in words.
    """

    fleet: RealFleet
    rows: Mapping[str, object]
    requests: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-caller", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        open_: dict[str, SocketConnection] = {}
        with contextlib.ExitStack() as stack:
            while not self._stop.is_set():
                for name in self.rows:
                    if name not in open_ and self.fleet.answers(name):
                        open_[name] = stack.enter_context(contextlib.closing(self.fleet.connect(name)))
                    if name in open_ and not self._stop.wait(PAUSE_S):
                        self._ask(name, open_[name])
                self._stop.wait(PAUSE_S)

    def _ask(self, name: str, connection: SocketConnection) -> None:
        self.requests += 1
        try:
            _answer(connection, "POST", "/v1/predict", {"row": self.rows[name]})
        except (OSError, http.client.HTTPException, ValueError, RunError) as error:
            self.failures.append(f"{name}: {error}")


class Watching:
    """Notes every half second how many devices serve which release."""

    def __init__(self, fleet: RealFleet, period_s: float = 0.5) -> None:
        self._fleet, self._period_s = fleet, period_s
        self._stop = threading.Event()
        self.began = time.monotonic()
        self.samples: list[tuple[float, dict[str, int]]] = []  # seconds since the beginning, release -> count
        self.marks: list[tuple[float, str]] = []  # what happened, for the plot
        self._thread = threading.Thread(target=self._run, name="demo-watching", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def mark(self, words: str) -> None:
        """Something happened now."""
        self.marks.append((time.monotonic() - self.began, words))

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.samples.append((time.monotonic() - self.began, self._fleet.served()))


def in_parallel(work: Callable[[str], None], names: Sequence[str], threads: int) -> None:
    """Do the same for every name, so many at once; the first error is raised when all have ended."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, names))


def _lepton() -> list[str]:
    beside = Path(sys.executable).parent / "lepton"
    found = str(beside) if beside.exists() else shutil.which("lepton")
    if found is None:
        raise ConfigError("There is no `lepton` command here.", hint="Install lepton-fl.")
    return [found]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, and that no outgoing connection gets before somebody listens there.

    One that a device is given while it tries to reach a coordinator that is down would be the coordinator's.
    """
    found = list[int]()
    with contextlib.ExitStack() as held:
        for port in SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            one = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found
