"""Fifteen faults on a real coordinator and real devices: named as what, how soon, and does the run go on?

    python benchmarks/faults.py                   # all, about ten minutes; some need root (tmpfs, cgroups)
    python benchmarks/faults.py --only gone,evicted
    python benchmarks/faults.py --clean 100       # so many runs without a fault: nothing may be named

One coordinator, three devices with real TLS, and one run that goes on all the time. Each fault is injected
while a device trains; the clock stops when `lepton run show` would name it. Then the next round must be
committed, the fault is taken back, and the device must count again. Exit code 1 if a fault was named late,
wrongly or not at all, if the run did not go on, or if a clean run was accused of anything.
"""

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from _fleet import HERE, START_S, Lepton, answers
from _proxy import Proxy
from rich.console import Console
from rich.table import Table

from lepton_fl.errors import Cause
from lepton_server.report import live, troubles
from lepton_server.store import Store, open_store

LEFT_OUT = "left out: needs root"
NAMED_S = 30.0  # the target
LOAD_S = 300.0  # torch, three times and at once
PATIENCE_S = 180.0  # for everything else
DEVICES = ("dev0", "dev1", "dev2")
RUN = """
[run]
task = "_faulty:task"
rounds = {rounds}
evaluate_every = 0
[run.local]
batch_size = 4
epochs = {epochs}
[run.cohort]
size = 3
min_reports = 2
deadline_s = 50
fill_wait_s = 1
quorum_wait_s = 300
max_attempts = 50
"""
SKEW = """
import os, time
_real, _skew = time.time, float(os.environ.get("LEPTON_SKEW", "0"))
if _skew:
    time.time = lambda: _real() + _skew
"""


class Fleet(Lepton):
    """A coordinator on a disk of its own, and devices behind proxies."""

    def __enter__(self) -> "Fleet":
        super().__enter__()
        self.undo: list[Callable[[], object]] = []
        self.proxies: dict[str, tuple[Proxy, Proxy]] = {}
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        self.ids: dict[str, str] = {}
        self.extra: dict[str, dict[str, str]] = {}
        (self.folder / "sitecustomize.py").write_text(SKEW)
        given = [path for path in [os.environ.get("PYTHONPATH")] if path]
        self.environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), str(HERE), *given])
        self.roomy = {name: self.disk(name, mib) for name, mib in (("state", 96), ("dev0", 64))}
        with open(self.config, "a") as file:
            file.write("[check_in]\ninterval_s = 2.0\n[watchdog]\nquarantine_after = 6\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pair in self.proxies.values():
            for proxy in pair:
                proxy.close()
        self.stop(self.running)
        for back in reversed(self.undo):
            back()
        super().__exit__(kind, error, trace)

    def disk(self, name: str, mib: int) -> bool:
        """Give a folder a small file system of its own; False where that is not allowed."""
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
        if done:
            self.undo.append(lambda: subprocess.run(["umount", "-l", str(folder)], check=False))
        return done

    # --- processes ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start everything, and the run."""
        self.evict = self.folder / "evict.txt"
        self.server = self.start("server", "python", HERE / "_evicting.py", self.config, self.evict)
        self.wait(lambda: answers(self.ops + "/readyz"), START_S, "the coordinator's start")
        self.store: Store = open_store(self.store_url)
        self.undo.append(self.store.close)
        token = self.token(len(DEVICES))
        for number, name in enumerate(DEVICES):
            self.enrol(number, name, token)
            self.run_client(name)

    def enrol(self, number: int, name: str, token: str) -> None:
        """Enrol a device, with a proxy between."""
        rng = np.random.default_rng(number)
        rows = {"x": rng.standard_normal((40, 64)).astype(np.float32), "y": rng.integers(0, 10, 40)}
        np.savez(self.data(name), **rows)
        state = self.folder / name
        self.call("lepton", "client", "enroll", "--token", token, "--state-dir", state, "--name", name)
        identity = self.identity(name)
        self.ids[name] = str(identity["device_id"])
        pair = tuple(Proxy(int(str(identity[k]).rpartition(":")[2])) for k in ("device_service", "fleet"))
        self.proxies[name] = pair[0], pair[1]
        self.proxied(name)

    def proxied(self, name: str) -> None:
        """Have a device call through its proxies; a renewal names the real ports again."""
        device, fleet = self.proxies[name]
        self.change(name, device_service=f"127.0.0.1:{device.port}", fleet=f"127.0.0.1:{fleet.port}")

    def data(self, name: str) -> Path:
        """A device's rows."""
        return self.folder / f"{name}.npz"

    def fault(self, name: str) -> Path:
        """What a device's task obeys."""
        return self.folder / f"{name}.fault"

    def identity(self, name: str) -> dict[str, Any]:
        """A device's identity file."""
        body: dict[str, Any] = json.loads((self.folder / name / "identity.json").read_text())
        return body

    def change(self, name: str, **fields: object) -> None:
        """Change a device's identity while its process is down."""
        path = self.folder / name / "identity.json"
        path.write_text(json.dumps(self.identity(name) | fields, sort_keys=True, separators=(",", ":")))

    def run_client(self, name: str, **environment: str) -> None:
        """Start a device's process."""
        source = json.dumps({"kind": "npz", "path": str(self.data(name))})
        more = {
            "LEPTON__LIMITS__NICE": "0",
            "LEPTON__CONNECTION__BACKOFF_MIN_S": "0.5",
            "LEPTON__CONNECTION__BACKOFF_MAX_S": "2",
            "LEPTON_FAULT": str(self.fault(name)),
        }
        self.clients[name] = self.start(
            name,
            *("lepton", "client", "run", "--state-dir", self.folder / name),
            *("--task", "_faulty:task", "--data", source),
            **(more | environment),
        )

    def kill_client(self, name: str) -> None:
        """SIGKILL a device's process."""
        process = self.clients[name]
        process.kill()
        process.wait()
        self.running.remove(process)

    def restart_client(self, name: str, **environment: str) -> None:
        """Kill and start again."""
        if self.clients[name].poll() is None:
            self.kill_client(name)
        else:
            self.running.remove(self.clients[name])
        self.run_client(name, **environment)

    # --- the run --------------------------------------------------------------------------------------

    def queue_run(self, rounds: int, epochs: int = 2) -> str:
        """Queue a run; its id."""
        path = self.folder / "run.toml"
        path.write_text(RUN.format(rounds=rounds, epochs=epochs))
        return str(
            json.loads(self.call("lepton", "run", "start", path, "-c", self.config, "--format", "json"))["id"]
        )

    def committed(self, run_id: str) -> int:
        """Rounds."""
        return self.store.run(run_id).committed

    def wrong(self, run_id: str) -> list[dict[str, Any]]:
        """What `lepton run show` says is wrong with devices."""
        run = self.store.run(run_id)
        newest = max((r.round for r in self.store.rounds(run_id)), default=0)
        parts = [
            {"device_id": p.device_id, "attempt": p.attempt, "cause": p.cause, "detail": p.detail}
            for p in self.store.participation(run_id, newest)
        ]
        return troubles(live(self.folder / "state", run), parts, {v: k for k, v in self.ids.items()})

    def waits(self, run_id: str) -> str:
        """The cause for which the run itself waits."""
        return str(live(self.folder / "state", self.store.run(run_id)).row().get("cause", ""))

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> float:
        """Seconds until a condition holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.1)
        return time.monotonic() - began

    def counts(self, run_id: str, name: str, after: int) -> bool:
        """Whether a device has counted in a round after that one."""
        parts = self.store.participation(run_id)
        return any(
            p.device_id == self.ids[name] and p.round > after and p.outcome == "counted" for p in parts
        )

    def trains(self, run_id: str) -> bool:
        """Whether an attempt is open, and has been for a moment."""
        rounds = self.store.rounds(run_id)
        return bool(rounds) and rounds[-1].state == "planned" and time.time() - rounds[-1].planned_at > 0.4


@dataclass(frozen=True)
class Fault:
    """One fault: inject it, take it back."""

    name: str
    cause: Cause
    inject: Callable[[Fleet], None]
    mend: Callable[[Fleet], None] = lambda fleet: None
    device: str = "dev0"  # '' = the coordinator itself
    possible: Callable[[Fleet], bool] = lambda fleet: True
    back: bool = True  # the device counts again afterwards


@dataclass(frozen=True)
class Outcome:
    """What came of a fault."""

    fault: Fault
    named: str
    seconds: float
    outcome: str
    words: str = ""

    def is_good(self, patience: float) -> bool:
        """Whether it was named rightly and in time, and the run went on."""
        if self.named == LEFT_OUT:
            return True
        return self.named == self.fault.cause.value and self.seconds <= patience and "went on" in self.outcome


# --- the faults ---------------------------------------------------------------------------------------


def _dead(fleet: Fleet) -> None:
    fleet.kill_client("dev0")


def _back(fleet: Fleet) -> None:
    fleet.run_client("dev0")


def _hang(fleet: Fleet) -> None:
    fleet.fault("dev0").write_text("hang")


def _calm(fleet: Fleet) -> None:
    fleet.fault("dev0").unlink(missing_ok=True)


def _slow(fleet: Fleet) -> None:
    for proxy in fleet.proxies["dev0"]:
        proxy.rate = 4_000.0


def _fast(fleet: Fleet) -> None:
    for proxy in fleet.proxies["dev0"]:
        proxy.rate = 0.0


def _cut(fleet: Fleet) -> None:
    for proxy in fleet.proxies["dev0"]:
        proxy.held.set()


def _joined(fleet: Fleet) -> None:
    for proxy in fleet.proxies["dev0"]:
        proxy.held.clear()


def _issued(fleet: Fleet, name: str, *, other: bool) -> None:
    """Give a device a certificate of another authority, or one that has ended."""
    from cryptography import x509

    from lepton_fl import crypto
    from lepton_server.authority import Authority

    fleet.kill_client(name)
    key = crypto.load_key(fleet.folder / name / "device.key")
    folder = fleet.folder / "other" if other else fleet.folder / "state" / "keys"
    authority = Authority.open(folder, ["127.0.0.1"])
    now = time.time() - (0 if other else 5 * 86_400)
    made = authority.sign_device(crypto.make_csr(key, name), fleet.ids[name], 1.0, now=now)
    found = x509.load_pem_x509_certificate(made.pem)
    fleet.change(
        name,
        certificate_pem=made.pem.decode(),
        valid_from=found.not_valid_before_utc.timestamp(),
        valid_until=found.not_valid_after_utc.timestamp(),
    )
    fleet.run_client(name)


def _reconnected(name: str) -> Callable[[Fleet], None]:
    def mend(fleet: Fleet) -> None:
        fleet.kill_client(name)
        fleet.proxied(name)
        fleet.run_client(name)

    return mend


def _revoke(fleet: Fleet) -> None:
    fleet.call("lepton", "devices", "revoke", "dev2", "--reason", "lost", "-c", fleet.config)


def _fill(folder: Path) -> None:
    """Leave no byte on a disk."""
    for name, piece in (("filler", 2**20), ("filler2", 512)):
        with contextlib.suppress(OSError), open(folder / name, "wb", buffering=0) as file:
            while True:
                file.write(bytes(piece))


def _freed(folder: Path) -> None:
    for name in ("filler", "filler2"):
        (folder / name).unlink(missing_ok=True)


def _corrupt(fleet: Fleet) -> None:
    path = fleet.data("dev0")
    path.rename(path.with_suffix(".good"))
    path.write_bytes(os.urandom(5000))


def _repaired(fleet: Fleet) -> None:
    fleet.data("dev0").with_suffix(".good").replace(fleet.data("dev0"))


def _evict(fleet: Fleet) -> None:
    fleet.evict.write_text(fleet.ids["dev0"])
    fleet.server.send_signal(signal.SIGUSR2)


_held: list[sqlite3.Connection] = []


def _lock(fleet: Fleet) -> None:
    connection = sqlite3.connect(fleet.folder / "state" / "lepton.db", isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    _held.append(connection)


def _unlock(fleet: Fleet) -> None:
    _held.pop().close()


CGROUP = Path("/sys/fs/cgroup/memory")


def _can_limit(fleet: Fleet) -> bool:
    return os.access(CGROUP / "cgroup.procs", os.W_OK) or os.access(CGROUP.parent / "cgroup.procs", os.W_OK)


def _group() -> tuple[Path, str]:
    """A memory control group of our own, and the name of its limit; versions 1 and 2."""
    root = CGROUP if CGROUP.exists() else CGROUP.parent
    return root / f"lepton-faults-{os.getpid()}", "memory.limit_in_bytes" if CGROUP.exists() else "memory.max"


def _starve(fleet: Fleet) -> None:
    group, limit = _group()
    group.mkdir(exist_ok=True)
    (group / limit).write_text(str(600 * 2**20))
    fleet.undo.append(lambda: group.rmdir() if group.exists() else None)
    (group / "cgroup.procs").write_text(str(fleet.clients["dev0"].pid))
    fleet.fault("dev0").write_text("memory")
    fleet.until(lambda: fleet.clients["dev0"].poll() is not None, "the kernel ends the process")
    _calm(fleet)
    fleet.running.remove(fleet.clients["dev0"])
    fleet.run_client("dev0")  # as a service manager does


def _restart(name: str, **environment: str) -> Callable[[Fleet], None]:
    return lambda fleet: fleet.restart_client(name, **environment)


FAULTS = (
    Fault("dead node", Cause.GONE, _dead, _back),
    Fault("hung training", Cause.HUNG_TRAINING, _hang, _calm),
    Fault("slow link", Cause.SLOW_LINK, _slow, _fast),
    Fault("half-open TCP", Cause.HALF_OPEN, _cut, _joined),
    Fault(
        "wrong certificate",
        Cause.WRONG_CERTIFICATE,
        lambda fleet: _issued(fleet, "dev0", other=True),
        _reconnected("dev0"),
    ),
    Fault(
        "expired certificate",
        Cause.EXPIRED_CERTIFICATE,
        lambda fleet: _issued(fleet, "dev1", other=False),
        _reconnected("dev1"),
        device="dev1",
    ),
    Fault("out of memory in training", Cause.OUT_OF_MEMORY, _starve, possible=_can_limit),
    Fault(
        "full disk on the server",
        Cause.SERVER_DISK_FULL,
        lambda fleet: _fill(fleet.folder / "state"),
        lambda fleet: _freed(fleet.folder / "state"),
        device="",
        possible=lambda fleet: fleet.roomy["state"],
    ),
    Fault(
        "full disk on a client",
        Cause.DISK_FULL,
        lambda fleet: _fill(fleet.folder / "dev0"),
        lambda fleet: _freed(fleet.folder / "dev0"),
        possible=lambda fleet: fleet.roomy["dev0"],
    ),
    Fault("corrupt local data", Cause.DATA_CONTRACT, _corrupt, _repaired),
    Fault("clock 1 h off", Cause.CLOCK_OFF, _restart("dev0", LEPTON_SKEW="3600"), _restart("dev0")),
    Fault("evicted node identity", Cause.EVICTED, _evict),
    Fault("database locked", Cause.DATABASE_LOCKED, _lock, _unlock, device=""),
    Fault(
        "version mismatch",
        Cause.WRONG_VERSION,
        _restart("dev0", LEPTON_TASK_VERSION="2"),
        _restart("dev0"),
    ),
    Fault("revoked device", Cause.REVOKED, _revoke, device="dev2", back=False),
)


def inject(fleet: Fleet, run_id: str, fault: Fault) -> Outcome:
    """One fault from its injection until the fleet is whole again."""
    fleet.until(lambda: fleet.trains(run_id), "a round is under way")
    began, before = time.monotonic(), fleet.committed(run_id)
    fault.inject(fleet)
    named, words = "", ""
    seen: list[str] = []
    while named != fault.cause.value and time.monotonic() - began < PATIENCE_S:
        for cause, detail in _said(fleet, run_id, fault):
            if cause not in seen:
                seen.append(cause)
            if cause == fault.cause.value:
                named, words = cause, detail
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if fault.device:  # the run goes on with the rest; the coordinator's own troubles must end first
        fleet.until(lambda: fleet.committed(run_id) > before, f"a round after {fault.name}")
    fault.mend(fleet)
    fleet.until(lambda: fleet.committed(run_id) > before, f"a round after {fault.name}")
    outcome = "the run went on"
    if fault.back and fault.device:
        mark = fleet.committed(run_id)
        try:
            fleet.until(lambda: fleet.counts(run_id, fault.device, mark), "it is back", LOAD_S)
        except TimeoutError:
            return Outcome(fault, named or ", ".join(seen), seconds, "the device did not come back", words)
        outcome += ", the device counts again"
    return Outcome(fault, named or ", ".join(seen) or "nothing", seconds, outcome, words)


def _said(fleet: Fleet, run_id: str, fault: Fault) -> Iterator[tuple[str, str]]:
    if not fault.device:
        if cause := fleet.waits(run_id):
            yield cause, cause
        return
    for row in fleet.wrong(run_id):
        if row["device"] == fault.device:
            yield row["cause"], row["detail"]


def inject_all(only: list[str], patience: float) -> int:
    """All faults, one after the other, on one fleet and one run."""
    with Fleet() as fleet:
        fleet.begin()
        run_id = fleet.queue_run(1_000_000)
        fleet.until(lambda: fleet.committed(run_id) >= 1, "the first round", LOAD_S)
        found: list[Outcome] = []
        for fault in FAULTS:
            if only and fault.cause.value not in only:
                continue
            if not fault.possible(fleet):
                found.append(Outcome(fault, LEFT_OUT, 0.0, "-"))
                continue
            found.append(inject(fleet, run_id, fault))
            last = found[-1]
            print(f"{fault.name}: {last.named} after {last.seconds:.1f} s; {last.outcome}", flush=True)
        shown = json.loads(
            fleet.call("lepton", "run", "show", run_id, "-c", fleet.config, "--format", "json")
        )
        print(f"lepton run show: {shown['waiting']}; {shown['coverage']['fleet']}")
        fleet.call("lepton", "run", "stop", run_id, "-c", fleet.config)
        fleet.until(lambda: fleet.store.run(run_id).finished, "the run stops")
        assert fleet.store.run(run_id).coverage, "no run ends without saying whom it left out"
        fleet.store.verify_journal()
    table = Table("fault", "named as", "after s", "outcome", "its words")
    for one in found:
        table.add_row(one.fault.name, one.named, f"{one.seconds:.1f}", one.outcome, one.words)
    Console(width=160).print(table)
    return 0 if all(one.is_good(patience) for one in found) else 1


def clean(runs: int) -> int:
    """Runs without a fault: whatever is named is a false alarm."""
    alarms: list[str] = []
    with Fleet() as fleet:
        fleet.begin()
        first = fleet.queue_run(1, epochs=1)
        fleet.until(lambda: fleet.store.run(first).finished, "the devices have loaded all", LOAD_S)
        for number in range(runs):
            run_id = fleet.queue_run(1, epochs=1)
            while not fleet.store.run(run_id).finished:
                alarms += [f"run {number}: {row['device']}: {row['cause']}" for row in fleet.wrong(run_id)]
                time.sleep(0.1)
            run = fleet.store.run(run_id)
            if run.state != "completed" or run.coverage["fleet"] != [3, 3]:
                alarms.append(f"run {number}: {run.state}, {run.coverage}")
    print(f"{runs} clean runs, {len(set(alarms))} false alarms")
    for alarm in sorted(set(alarms)):
        print(alarm)
    return 1 if alarms else 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="causes, with commas between")
    parser.add_argument("--clean", type=int, default=0, help="instead: so many runs without a fault")
    parser.add_argument("--patience", type=float, default=NAMED_S, help="seconds until a fault must be named")
    given = parser.parse_args()
    only = [cause for cause in given.only.split(",") if cause]
    return clean(given.clean) if given.clean else inject_all(only, given.patience)


if __name__ == "__main__":
    sys.exit(main())
