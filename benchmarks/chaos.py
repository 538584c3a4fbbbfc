"""Kill the coordinator with SIGKILL at every crash point, and compare the final model's bits.

    python benchmarks/chaos.py                       # 3 seeds, all modes, all points
    python benchmarks/chaos.py --modes plain --seeds 0 2 --points update.kept round.committed
    python benchmarks/chaos.py --jobs 2 --json result.json     # so many cases side by side

Four real devices (threads of this process, with their keys, TLS and torch) and a coordinator process of its
own. For each mode and seed one run is left alone; then, for each point, the same run is started anew, the
coordinator kills itself there, is started again, and nobody intervenes. What is pinned: data, the order of
batches, the noise of an attempt. Everything else (keys, nonces, cohorts, timing) is as in production.

Checked after each case: the run completed; the model of every round has the SHA-256 of the undisturbed run;
no attempt was abandoned; no device trained twice into one round; everybody's update counts in every round;
the journal's chain holds, and all tables are what it says; nothing is left of an attempt on the disk. With
privacy: the charges are those of the undisturbed run, and noise was only ever added to one sum.

Exit code 1 if any case fails.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update(OMP_NUM_THREADS="1", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
from lepton_fl import crashpoints
from lepton_simulations.demo_fleet import free_ports

DEVICES, ROUNDS, ROWS = 4, 3, 24
PATIENCE_S = 600.0  # with one case, on a machine that does other things as well
MODES = ("plain", "secure", "central", "distributed")
HERE = "127.0.0.1"


def points_of(mode: str) -> list[str]:
    """The points that a run of this mode passes."""
    secure, private = mode in ("secure", "distributed"), mode in ("central", "distributed")
    left_out = {
        "round.unmasking": not secure,
        "noise.bound": not private,
        "noise.added": not private,
        "update.added": secure,
        "round.aggregating": secure,
        "round.aggregated": secure,
        "round.evaluated": mode != "plain",
    }
    left_out |= {point: not secure for point in crashpoints.COORDINATOR if point.startswith("secure.")}
    return [point for point in crashpoints.COORDINATOR if not left_out.get(point)]


def when(point: str, seed: int) -> int:
    """The how manieth time: another round for another seed; of what each device does, another device."""
    if point in ("run.finishing",):
        return 1
    if point.startswith(("update.", "secure.")) or point == "round.offering":
        return DEVICES * seed + seed % DEVICES + 1
    return seed % ROUNDS + 1


# --- the coordinator, in a process of its own -------------------------------------------------------


def serve(folder: str, ports: Sequence[int], seed: int, point: str, log: str) -> None:
    """A coordinator that kills itself at ``point``; of what is random, only noise is pinned."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[crashpoints.VARIABLE] = point
    __import__("importlib").reload(crashpoints)
    import lepton_server.privacy
    import lepton_server.runs
    from lepton_fl.logs import configure
    from lepton_fl.rounds.private import PrivateRounds
    from lepton_server.config import ServerConfig
    from lepton_server.coordinator import Coordinator
    from lepton_server.workshop import Workshop

    class Here(Workshop):
        """The same work in this process: a child takes seconds to start."""

        def _call(self, work: Any, *args: Any) -> Any:  # noqa: ANN401 - as its parent's
            return work(*args)

    class Pinned(PrivateRounds):
        """Noise by round and attempt; says which noise was added to which sum."""

        def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - as its parent's
            super().__init__(*args, **settings, noise_key=lambda p: _key("noise", seed, p.round, p.attempt))

        def _bound_stream(self, plan: Any, total: Any) -> Any:  # noqa: ANN401 - as its parent's
            stream = super()._bound_stream(plan, total)
            line = [plan.round, plan.attempt, hashlib.sha256(total.tobytes()).hexdigest()]
            with open(Path(folder) / "noise.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            return stream

    lepton_server.runs.Workshop = Here
    lepton_server.runs.LOOK_S = 0.05
    lepton_server.privacy.PrivateRounds = Pinned
    configure("info", "text")
    names = ("enrolment_port", "device_port", "fleet_port", "ops_port")
    listen = {"host": HERE, "public_names": [HERE], **dict(zip(names, ports, strict=True))}
    settings = {
        "server": {"state_dir": f"{folder}/server"},
        "listen": listen,
        "check_in": {"interval_s": 0.5},
        "authority": {"key_file": f"{folder}/authority.key"},
    }
    with Coordinator(ServerConfig.model_validate(settings)) as coordinator:
        coordinator.wait()


def _end_with_parent() -> None:
    """A benchmark that is killed leaves no coordinator behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it is a child"
    parent.join()
    os._exit(1)


def _key(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


# --- the devices, in this process -------------------------------------------------------------------


class Device:
    """A real agent in a thread; the order of its batches and its noise are pinned."""

    def __init__(self, folder: Path, number: int, seed: int, token: str, secure: bool) -> None:
        from lepton_client.agent import Agent
        from lepton_client.config import ClientConfig
        from lepton_client.enrol import enrol
        from lepton_client.inspection import examine
        from lepton_client.state import StateDir

        home = folder / f"dev{number}"
        with (state := StateDir(home)).locked():
            enrol(state, token, name=f"dev{number}")
        section = {
            "client": {"state_dir": str(home), "secure_aggregation": "required" if secure else "off"},
            "tasks": [{"reference": "digits", "data": {"kind": "npz", "path": str(rows(folder, number))}}],
            "limits": {"nice": 0},
            "connection": {"backoff_min_s": 0.1, "backoff_max_s": 0.5, "poll_s": 0.05},
        }
        if secure:
            section["client"]["least_cohort"] = DEVICES
        self.trained: list[tuple[str, int]] = []
        self.failure: Exception | None = None  # why its agent has ended by itself
        self.agent = Agent(ClientConfig.model_validate(section), check=examine)  # a process takes seconds
        self._number, self._seed = number, seed
        self._office = self.agent._office
        respond = self._office.respond

        def counted(records: Any, should_stop: Any) -> Any:  # noqa: ANN401 - as what it stands for
            _at_work.device = self
            if records.config["kind"] == "train":
                self.trained.append((str(records.config["run-id"]), int(records.config["round"])))
            return respond(records, should_stop)

        self._office.respond = counted
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def random(self, what: str, *parts: object) -> bytes:
        """32 bytes that depend on the device, the seed, and what they are for."""
        return _key(what, self._seed, self._number, *parts)

    def _run(self) -> None:
        try:
            self.agent.run()
        except Exception as error:  # noqa: BLE001 - told by ``Case.run``
            self.failure = error

    def stands(self) -> str:
        """What it is doing, as far as its agent knows."""
        worker, status = self.agent._worker, self.agent._state.status()
        told = {name: status.get(name) for name in ("state", "reason", "connected", "error")}
        return f"open {worker._open}, finished {list(worker._finished)[-3:]}, {told}"

    def stop(self) -> None:
        """End it."""
        self.agent.stop()
        self.thread.join(30)


_at_work = threading.local()  # .device, of a worker's thread


def pin_devices() -> None:
    """The order of batches and the noise of devices follow from the seed and the round."""
    import torch

    import lepton_client.desk
    from lepton_fl.privacy.noise import Keystream
    from lepton_fl.rounds import secure_sum

    torch.set_num_threads(1)

    def seed_of(desk: Any, ticket: Any) -> int:  # noqa: ANN401 - as what it stands for
        return int.from_bytes(_at_work.device.random("order", ticket.round)[:7], "big")

    lepton_client.desk._Desk.seed = seed_of
    secure_sum.Keystream = lambda: Keystream(_at_work.device.random("noise", len(_at_work.device.trained)))


def rows(folder: Path, number: int) -> Path:
    """A few real digits of a device's own."""
    from sklearn.datasets import load_digits

    path, digits = folder / f"{number}.npz", load_digits()
    if not path.exists():
        mine = slice(number * ROWS, (number + 1) * ROWS)
        np.savez(path, x=digits.images[mine].astype(np.uint8), y=digits.target[mine])
    return path


# --- one case ---------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run came to."""

    state: str = ""
    models: list[str] = field(default_factory=list)  # SHA-256 by round
    rounds: list[tuple[int, int, str]] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)  # devices by round
    charges: list[tuple[int, int, str, tuple[str, ...]]] = field(default_factory=list)
    noise: dict[str, set[str]] = field(default_factory=dict)  # attempt -> sums that it was added to
    twice: int = 0  # times that a device trained again in a round
    left: int = 0  # files of attempts that are over
    seconds: float = 0.0
    resumed_s: float = 0.0  # from the second start to ready


class Case:
    """A coordinator and its devices in one folder."""

    def __init__(self, folder: Path, mode: str, seed: int) -> None:
        self.folder, self.mode, self.seed = folder, mode, seed
        self.secure = mode in ("secure", "distributed")
        self.ports = free_ports(4)
        self.log = folder / "server.log"
        self.process: Any = None
        self.devices: list[Device] = []
        self._stack = contextlib.ExitStack()

    def start(self, point: str = "") -> float:
        """Start the coordinator; seconds until it is ready."""
        began = time.monotonic()
        arguments = (str(self.folder), self.ports, self.seed, point, str(self.log))
        self.process = _processes().Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        while not self._answers():
            if not self.process.is_alive() or time.monotonic() - began > PATIENCE_S:
                raise RuntimeError(f"the coordinator did not come up: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HERE, self.ports[3])) == 0

    def run(self, point: str = "") -> Result:
        """The whole run, with a kill at ``point``."""
        from lepton_server.store import open_store

        began, result = time.monotonic(), Result()
        make_authority(self.folder / "authority.key")
        self.start(point)
        token = make_token(self.folder, self.ports)
        self.devices = [Device(self.folder, i, self.seed, token, self.secure) for i in range(DEVICES)]
        run_id = queue_run(self.folder, self.mode)
        looking = self._stack.enter_context(open_store(self.folder / "server" / "lepton.db"))
        while not looking.run(run_id).finished:
            if not self.process.is_alive():
                if not point:
                    raise RuntimeError(f"the coordinator died: {self.log.read_text()[-3000:]}")
                point = ""
                result.resumed_s = self.start()
            for device in self.devices:
                if device.failure is not None:
                    raise RuntimeError("an agent has ended by itself") from device.failure
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError(f"not finished: {self.stand()}")
            time.sleep(0.1)
        if point and self.process.is_alive():
            self.process.join(60.0)  # at the very end
            if self.process.is_alive():
                raise RuntimeError(f"{point} was never reached")
        self.look(run_id, result)
        result.seconds = time.monotonic() - began
        return result

    def stand(self) -> str:
        """Where everybody is, for somebody who looks for what hangs."""
        told = [f"{d.agent._config.client.state_dir.name}: {d.stands()}" for d in self.devices]
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return "\n".join([self.log.read_text()[-6000:], *told, file.read()])

    def look(self, run_id: str, result: Result) -> None:
        """Read what came of it."""
        from lepton_server.store import open_store

        with open_store(self.folder / "server" / "lepton.db") as store:
            store.verify_journal()
            if not store.rebuild().equal:
                raise RuntimeError("the tables are not what the journal says")
            run = store.run(run_id)
            result.state = f"{run.state}: {run.reason}" if run.state == "failed" else run.state
            result.models = [m.sha256 for m in store.models(run_id)]
            result.rounds = [(r.round, r.attempt, r.state) for r in store.rounds(run_id)]
            parts = [p for p in store.participation(run_id) if p.outcome == "counted"]
            result.counted = [sum(p.round == n for p in parts) for n in range(1, ROUNDS + 1)]
            result.charges = [(c.round, c.attempt, c.state, c.events) for c in store.charges(run_id)]
        for device in self.devices:
            result.twice += len(device.trained) - len(set(device.trained))
        attempts = self.folder / "server" / "blobs" / "attempts"
        result.left = sum(path.is_file() for path in attempts.rglob("*"))
        noise = self.folder / "noise.jsonl"
        for line in noise.read_text().splitlines() if noise.exists() else ():
            number, attempt, digest = json.loads(line)
            result.noise.setdefault(f"{number}/{attempt}", set()).add(digest)

    def close(self) -> None:
        """End everything."""
        self._stack.close()
        for device in self.devices:
            device.agent.stop()
        for device in self.devices:
            device.stop()
        if self.process is not None:
            self.process.kill()
            self.process.join()


def faults(result: Result, calm: Result) -> list[str]:
    """What a disturbed run did wrong, in words."""
    wrong = {
        f"the run is {result.state}": result.state != "completed",
        f"other models: {result.models} instead of {calm.models}": result.models != calm.models,
        f"rounds {result.rounds}": result.rounds != [(n, 1, "committed") for n in range(1, ROUNDS + 1)],
        f"{result.counted} devices counted": result.counted != [DEVICES] * ROUNDS,
        f"a device trained {result.twice} times too often": result.twice > 0,
        f"{result.left} files are left": result.left > 0,
        f"charges {result.charges} instead of {calm.charges}": result.charges != calm.charges,
        f"noise added to several sums: {result.noise}": any(len(s) > 1 for s in result.noise.values()),
    }
    return [words for words, is_so in wrong.items() if is_so]


def _processes() -> Any:  # noqa: ANN401 - a context of multiprocessing
    """Coordinators are forked from a clean process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "lepton_server.coordinator",
            "lepton_fl.training.trainer",
            "lepton_fl.privacy.distributed",
            "dp_accounting",
            "scipy.special",
            "sklearn.datasets",
        ]
    )
    return context


def make_authority(path: Path) -> None:
    """An enrolment authority on the coordinator's machine."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lepton_fl.crypto import save_signing_key

    save_signing_key(path, Ed25519PrivateKey.generate())


def make_token(folder: Path, ports: Sequence[int]) -> str:
    """A join token for all devices, as `lepton token create` makes it."""
    from lepton_fl import crypto
    from lepton_fl.crypto import load_signing_key
    from lepton_server.authority import Authority
    from lepton_server.store import open_store

    authority, secret = Authority.open(folder / "server" / "keys", [HERE]), crypto.new_secret()
    certifier = load_signing_key(folder / "authority.key").public_key().public_bytes_raw()
    body = {"token_id": "t-chaos", "secret_sha256": crypto.secret_sha256(secret), "uses": DEVICES}
    with open_store(folder / "server" / "lepton.db") as store:
        store.record("token.created", body | {"expires_at": time.time() + 3600})
    return crypto.make_join_token(f"{HERE}:{ports[0]}", authority.ca_der, secret, certifier)


def queue_run(folder: Path, mode: str, rounds: int = ROUNDS) -> str:
    """Ask for the run."""
    from lepton_fl.plan import RunSpec
    from lepton_server.store import open_store

    fields: dict[str, Any] = {
        "task": "digits",
        "rounds": rounds,
        "clip_norm": 1.0,
        "weighting": "equal",
        "evaluate_every": 1 if mode == "plain" else 0,
        "cohort": {"size": DEVICES, "min_reports": DEVICES, "fill_wait_s": 60.0, "deadline_s": 300.0},
        "local": {"epochs": 1, "batch_size": 8, "learning_rate": 0.1},
    }
    if mode in ("secure", "distributed"):
        fields |= {"secure_aggregation": "required", "secure": {"min_cohort": DEVICES}}
    if mode == "central":
        fields["privacy"] = {
            "mechanism": "independent",
            "noise_multiplier": 3.0,
            "delta": 1e-3,
            "clip_norm": 1.0,
        }
        del fields["clip_norm"]
    if mode == "distributed":
        fields["privacy"] = {
            "mechanism": "skellam",
            "trust": "distributed",
            "epsilon": 20.0,
            "delta": 1e-3,
            "clip_norm": 1.0,
        }
        del fields["clip_norm"]
    spec = RunSpec.model_validate(fields).to_json()
    with open_store(folder / "server" / "lepton.db") as store:
        store.record("run.queued", {"run_id": "chaos", "name": mode, "spec": spec})
    return "chaos"


def finished(folder: Path, run_id: str) -> bool:
    """Whether the run has its verdict."""
    from lepton_server.store import open_store

    with open_store(folder / "server" / "lepton.db") as store:
        return store.run(run_id).finished


@contextlib.contextmanager
def case(mode: str, seed: int) -> Iterator[Case]:
    """A fresh one in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="lepton-chaos-"))
    made = Case(folder, mode, seed)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


# --- all of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Cases of one mode and seed, for one process: they share the undisturbed run."""

    mode: str
    seed: int
    points: tuple[str, ...]
    verbose: bool = False


def carry_out(task: Task) -> list[tuple[str, str]]:
    """Run the cases; (point, what went wrong or '')."""
    if not task.verbose:
        __import__("logging").disable(50)
    pin_devices()
    mode, seed = task.mode, task.seed
    with case(mode, seed) as quiet:
        calm = quiet.run()
    bad = "; ".join(faults(calm, calm))
    say(f"{mode} {seed}: undisturbed {calm.models[-1][:12]}, {calm.seconds:.1f} s {bad}")
    return [(point, bad or disturb(mode, seed, point, calm)) for point in task.points]


def disturb(mode: str, seed: int, point: str, calm: Result) -> str:
    """One case; what went wrong, or ''."""
    result, log = Result(), ""
    try:
        with case(mode, seed) as disturbed:
            result = disturbed.run(f"{point}:{when(point, seed)}")
            log = disturbed.log.read_text()
        if wrong := "; ".join(faults(result, calm)):
            wrong += f"\n{log}"
    except Exception as error:  # noqa: BLE001 - the other cases go on
        wrong = f"{type(error).__name__}: {error} {error.__cause__ or ''}".rstrip()
    took = f"({result.seconds:.1f} s, up again in {result.resumed_s:.1f} s)"
    say(f"{mode} {seed} {point}: {wrong or 'the same bits'} {took}")
    return wrong


def say(text: str) -> None:
    """Print a line as a whole, beside others that do so."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tasks_of(chosen: argparse.Namespace) -> list[Task]:
    """What is to be done, the longest first; seed by seed, so that one that is cut short has all modes."""
    tasks = []
    for seed in chosen.seeds:
        for mode in chosen.modes:
            points = tuple(p for p in points_of(mode) if not chosen.points or p in chosen.points)
            tasks.append(Task(mode, seed, points, chosen.verbose))
    return tasks


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--points", nargs="+", default=(), help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases side by side")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    report = {mode: {"points": 0, "seeds": len(chosen.seeds), "good": 0, "cases": 0} for mode in chosen.modes}
    tasks = tasks_of(chosen)
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        for task, outcomes in zip(tasks, pool.map(carry_out, tasks), strict=True):
            row = report[task.mode]
            row["points"] = len(task.points)
            row["cases"] += len(outcomes)
            row["good"] += sum(not wrong for _, wrong in outcomes)
    for mode, row in report.items():
        print(f"--- {mode}: {row['good']} of {row['cases']}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(report))
    return 0 if all(row["good"] == row["cases"] for row in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
