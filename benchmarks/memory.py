"""Memory of an idle device and of a coordinator in a round, against stock Flower 1.41.

    python benchmarks/memory.py                    # about five minutes
    python benchmarks/memory.py --cohorts 100      # one cohort only
    python benchmarks/memory.py --no-stock

Idle device: one enrolled ``lepton client run`` process with a checked task and its open stream; beside it a
stock ``flower-supernode`` with the ``flower-superexec`` that it starts. RSS counts shared pages in full, PSS
shares them out.

Coordinator: a real ``lepton server`` process runs two rounds with 100 and with 500 devices and updates of one
million random int32 each. The devices are threads of a load process that speak the real protocols (enrolment
and streams over mutual TLS, Flower's fleet API) but do not train: what is measured is the coordinator. Its
peak (VmHWM, reset before each round) is held against what it used before the round. The first round is cold:
it also loads code and fills caches, which stay; the second shows what a round itself takes. The process that
builds initial models is not counted: it does not take part in a round.

Stock: Flower's ``FedAvg.aggregate_train`` over as many ready replies, in a process of its own, without any
transport; peak against what it used before the first reply.

Exit code 1 if a bound is missed: 60 MB for a device; 6 models (24 MB) above what the coordinator used
before, in both rounds and for both cohorts.
"""

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _fleet import Lepton, StockFlower, free_ports, tree
from _million import SIZE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lepton_client.state import Identity, StateDir
    from lepton_fl.crypto import PrivateKey

MODEL_MB = SIZE * 4 / 2**20
MAX_IDLE_MB, MAX_MODELS = 60.0, 6.0
SETTLE_S = 10.0  # after the start, before an idle process is measured
WORKERS = 32  # devices of the load process that are at work at the same moment


def status_mb(pid: int, field: str) -> float:
    """A field of ``/proc/PID/status`` in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(field + ":")[2].split()[0]) / 1024


def pss_mb(pid: int) -> float:
    """Proportional set size in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("Pss:")[2].split()[0]) / 1024


# -- an idle device ---------------------------------------------------------------------------------------


def idle_lepton() -> list[tuple[float, float]]:
    """RSS and PSS of each process of our idle device."""
    from lepton_server.store import open_store

    with Lepton() as fleet:
        fleet.serve()
        device = fleet.device(0, fleet.token(1))
        with open_store(fleet.store_url) as store:

            def ready() -> bool:
                return any(t["ready"] for d in store.devices() for t in d.reported.get("tasks", []))

            fleet.wait(ready, 120, "the device's first report")
        time.sleep(SETTLE_S)
        return [(status_mb(p.pid, "VmRSS"), pss_mb(p.pid)) for p in tree(device.pid)]


def idle_stock() -> list[tuple[float, float]]:
    """RSS and PSS of each process of a stock Flower node."""
    with StockFlower() as fleet:
        fleet.serve(0)
        node = fleet.node(0, free_ports(1)[0])
        fleet.wait(lambda: len(tree(node.pid)) >= 2, 60, "the SuperNode's start")
        time.sleep(SETTLE_S)
        return [(status_mb(p.pid, "VmRSS"), pss_mb(p.pid)) for p in tree(node.pid)]


# -- a coordinator in a round -----------------------------------------------------------------------------


def coordinator(devices: int) -> dict[str, float]:
    """MB of a coordinator: at its start, with the fleet connected, at the peaks of two rounds, after each."""
    from lepton_server.store import open_store

    with Lepton() as fleet:
        server = fleet.serve()
        result = {"start": status_mb(server.pid, "VmRSS")}
        token = fleet.token(devices)
        load = subprocess.Popen(
            [sys.executable, __file__, "--role", "load", str(devices), str(fleet.folder / "load")],
            env={**fleet.environment, "TOKEN": token},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        fleet.running.append(load)
        assert load.stdout is not None
        if load.stdout.readline() != b"ready\n":
            raise RuntimeError("the load process did not start")
        time.sleep(2.0)  # the reports are written
        result["connected"] = status_mb(server.pid, "VmRSS")
        for name in ("first", "second"):
            Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak counts from here
            run_id = fleet.queue(devices, 1)
            with open_store(fleet.store_url) as store:
                fleet.wait(lambda store=store, run_id=run_id: store.run(run_id).finished, 600, "the round")
                run, rounds = store.run(run_id), store.rounds(run_id)
                counted = sum(p.outcome == "counted" for p in store.participation(run_id, 1))
            if run.state != "completed" or counted != devices:
                raise RuntimeError(f"the run {run.state} with {counted} of {devices} updates: {run.reason}")
            result[f"{name} peak"] = status_mb(server.pid, "VmHWM")
            time.sleep(2.0)
            result[f"{name} after"] = status_mb(server.pid, "VmRSS")
            result["seconds"] = rounds[0].seconds
        return result


def load(devices: int, folder: Path) -> None:
    """The devices, until the parent goes: enrol, wait on streams, answer what comes with random integers."""
    from lepton_client.enrol import enrol
    from lepton_client.state import StateDir

    soft = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def join(number: int) -> None:
        state = StateDir(folder / str(number))
        with state.locked():
            identity = enrol(state, os.environ["TOKEN"], name=f"virtual{number}")
        _attend(state, identity, calls)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(join, range(devices)))
    for _ in range(WORKERS):
        threading.Thread(target=_work, args=(calls,), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)  # streams are left as they are


def _attend(state: "StateDir", identity: "Identity", calls: queue.SimpleQueue[Callable[[], None]]) -> None:
    """Check in, open the stream, and queue an answer for whatever it brings."""
    from lepton_client.link import PROTOCOL, Link
    from lepton_fl import crypto
    from lepton_fl.wire.v1 import device_pb2 as pb

    key = crypto.load_key(state.key)
    pair = crypto.key_to_pem(key), identity.certificate_pem.encode()
    link = Link(identity.device_service, identity.ca_pem.encode(), identity=pair)
    link.check_in(
        pb.CheckInRequest(
            protocol=PROTOCOL,
            status=pb.STATUS_IDLE,
            tasks=[pb.TaskReport(name="_million:task", version="1", ready=True)],
            device_time=time.time(),
        )
    )
    listener = link.wait()

    def read() -> None:
        for instruction in listener:
            if instruction.HasField("participate"):
                calls.put(lambda: _answer(identity, key))

    threading.Thread(target=read, daemon=True).start()


def _answer(identity: "Identity", key: "PrivateKey") -> None:
    """Take part as a device does, without the training."""
    from lepton_client.flower import FlowerNode
    from lepton_fl.wire.messages import Request, TrainReply

    with FlowerNode(identity.fleet, identity.ca_pem.encode(), key) as node:
        node.activate()
        work = node.pull()
        assert work is not None, "the message is there before the device is told"
        handle, records = work
        request = Request.read(records)
        update = np.random.default_rng().integers(-1000, 1000, request.model.size, np.int32)
        sums = {"loss_sum": np.array([1.0]), "examples": np.array([1])}
        node.push(handle, TrainReply(request.ticket, request.task_version, 1, update, sums, 0.0).to_records())
        node.deactivate()


def _work(calls: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        calls.get()()


# -- stock aggregation ------------------------------------------------------------------------------------


def stock_aggregation(replies: int) -> dict[str, float]:
    """MB of a process that aggregates: before the replies, and at its peak."""
    done = subprocess.run(
        [sys.executable, __file__, "--role", "stock", str(replies)], check=True, capture_output=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def aggregate(replies: int) -> None:
    """Flower's FedAvg over ready replies of one million float32 each."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    rng, strategy = np.random.default_rng(0), FedAvg()
    base = status_mb(os.getpid(), "VmRSS")

    def reply(number: int) -> Message:
        arrays = ArrayRecord([rng.standard_normal(SIZE, np.float32)])
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        request = Message(RecordDict(), dst_node_id=number, message_type="train")
        return Message(content, reply_to=request)

    ready = [reply(number + 2) for number in range(replies)]
    arrays, _ = strategy.aggregate_train(1, ready)
    assert arrays is not None
    print(json.dumps({"connected": base, "peak": status_mb(os.getpid(), "VmHWM")}))


# -- printing ---------------------------------------------------------------------------------------------


def show_idle(console: Console, with_stock: bool) -> bool:
    """Measure and print idle devices; whether ours is within its bound."""
    table = Table(title="An idle device, connected")
    for column in ("", "processes", "RSS MB", "PSS MB"):
        table.add_column(column, justify="right")
    ours = idle_lepton()
    rows = {"lepton client": ours} | ({"stock SuperNode + SuperExec": idle_stock()} if with_stock else {})
    for name, processes in rows.items():
        sums = [sum(column) for column in zip(*processes, strict=True)]
        table.add_row(name, str(len(processes)), *(f"{value:.0f}" for value in sums))
    console.print(table)
    good = len(ours) == 1 and ours[0][0] <= MAX_IDLE_MB
    console.print(f"{'met' if good else 'MISSED'}: at most {MAX_IDLE_MB:g} MB (RSS) in one process")
    return good


def show_round(console: Console, cohorts: list[int], with_stock: bool) -> bool:
    """Measure and print coordinators; whether ours is within its bound."""
    table = Table(title=f"A round of {SIZE:,} coordinates ({MODEL_MB:.1f} MB as float32)")
    for column in ("updates", "", "start MB", "before MB", "peak MB", "growth MB", "models", "s"):
        table.add_column(column, justify="right")
    good = True
    for devices in cohorts:
        ours = coordinator(devices)
        rows = [
            ("ours, first round", ours, "connected", "first peak"),
            ("ours, second round", ours, "first after", "second peak"),
        ]
        if with_stock:
            rows.append(("stock FedAvg", stock_aggregation(devices), "connected", "peak"))
        for name, result, base, peak in rows:
            growth = result[peak] - result[base]
            shown = [f"{result[key]:.0f}" if key in result else "" for key in ("start", base, peak)]
            models, seconds = growth / MODEL_MB, result.get("seconds")
            shown += [f"{growth:.0f}", f"{models:.1f}", f"{seconds:.0f}" if seconds is not None else ""]
            table.add_row(str(devices), name, *shown)
            good &= not name.startswith("ours") or models <= MAX_MODELS
    console.print(table)
    console.print(
        f"{'met' if good else 'MISSED'}: at most {MAX_MODELS:g} models above the base, in both rounds"
    )
    return good


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", type=int, nargs="*", default=[100, 500])
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--idle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, count, *folder = args.role
        _ = load(int(count), Path(folder[0])) if role == "load" else aggregate(int(count))
        return 0
    console = Console()
    console.print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    good = show_idle(console, args.stock) if args.idle else True
    good &= show_round(console, args.cohorts, args.stock) if args.cohorts else True
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
