"""A real coordinator under load and overload: check-ins of 10,000 devices, 500 at a time, over mutual TLS.

    python benchmarks/load.py                               # about three minutes
    python benchmarks/load.py --devices 1000 --concurrent 100 --seconds 5

One ``lepton server`` process with a fleet in its store, alone on one core, and on the others a load process
that speaks as devices do, each with a key and a certificate of its own, but with little work (``_calls``), so
that more than the coordinator can do is really asked of it. In turn:

* sweep: every device dials, checks in and hangs up, so many at a time; from the dial to the answer;
* kept: kept connections, each with one call under way: what is sustainable here;
* half: calls at half of that rate, whatever the answers do (Poisson); latency counts from when one was due;
* double: calls at twice that rate, by devices that do not listen when they are put off; meanwhile a run
  trains with updates of 4 MB, from devices that take part as real ones do;
* rude: the same, by devices that do not keep to what HTTP/2 tells them either;
* polite: all connections call eight times at once and stay away for as long as they are told.

"Held back" are calls that were due while the device had as many under way as the coordinator lets it know
(HTTP/2's back-pressure); "dropped", those that found gRPC's own line full; devices back off then.

Exit code 1 unless: twice the sustainable rate was asked for; every call was answered, put off or dropped (no
other error) while a device has patience; the run under overload committed every update that was acknowledged;
the polite herd was served; memory kept its bound; and the coordinator was well afterwards.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _calls import Line
from _fleet import Lepton, answers
from checkins import METHOD, populate
from rich.console import Console
from rich.table import Table

from lepton_fl.wire.v1 import device_pb2 as pb

TRAINING = 10  # devices of the run under overload
ROUNDS = 3
MAX_GROWTH_MB = 200.0  # of the coordinator, from idle with the fleet to its peak
AT_ONCE = 8  # calls of one connection, where all come at once; a device has two
PATIENCE_S = 20.0  # of one call, as a device has it
CANCELLED, RESOURCE_EXHAUSTED = 1, 8  # gRPC's numbers of what its own line says when it is full
LEAST_SHARE = 0.95  # of the rate that is aimed at
Result = dict[str, Any]


@dataclass
class Seen:
    """What became of calls."""

    served: int = 0
    put_off: int = 0  # with a time to come again
    dropped: int = 0  # by gRPC itself, whose line is full: without a word, and a device then backs off
    held_back: int = 0  # by the stack of a device that has as many under way as the coordinator wants
    sent: int = 0  # where calls come at a rate, ...
    sending_s: float = 0.0  # ... within so long
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those served

    def result(self, elapsed: float) -> Result:
        """Figures of a phase that took so long."""
        ordered = sorted(self.seconds) or [float("nan")]
        at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 for share in (0.5, 0.99)]
        asked = self.served + self.put_off + self.dropped + sum(self.errors.values())
        return {
            "offered": (self.sent + self.held_back) / self.sending_s if self.sending_s else asked / elapsed,
            "held_back": self.held_back / elapsed,
            "served": self.served / elapsed,
            "put_off": self.put_off / elapsed,
            "dropped": self.dropped / elapsed,
            "errors": dict(self.errors),
            "p50_ms": at[0],
            "p99_ms": at[1],
        }


# -- the devices (one process) ------------------------------------------------------------------------------


class Herd:
    """Virtual devices and their calls."""

    def __init__(self, folder: Path, port: int, seconds: float, concurrent: int) -> None:
        self.secrets = json.loads((folder / "devices.json").read_text())
        self.ca, self.pem = (folder / "ca.pem").read_text(), folder / "device.pem"
        self.port, self.seconds, self.concurrent = port, seconds, concurrent
        task = pb.TaskReport(name="pkg.tasks:digits", version="1", layout_digest="ab" * 32, ready=True)
        self.request = pb.CheckInRequest(
            protocol=1, status=pb.STATUS_IDLE, tasks=[task], client_version="0.1.0"
        )

    async def dial(self, index: int) -> Line:
        """A connection of its own for one device."""
        context = ssl.create_default_context(cadata=self.ca)
        context.set_alpn_protocols(["h2"])
        self.pem.write_text("".join(self.secrets[index]))
        context.load_cert_chain(self.pem)
        return await Line.dial(self.port, context, METHOD, PATIENCE_S)

    async def call(self, line: Line, seen: Seen, due: float) -> float:
        """One check-in; returns after how many seconds to come again if it was put off, else 0."""
        self.request.device_time = time.time()
        begin = time.perf_counter()
        try:
            answer = await line.call(self.request.SerializeToString())
        except OSError as error:
            seen.errors[repr(error)[:80]] += 1
            return 0.0
        if answer.retry_s:
            seen.put_off += 1
        elif time.perf_counter() - begin > PATIENCE_S:
            seen.errors["a call was not answered while its device had patience"] += 1
        elif answer.dropped or answer.status in (CANCELLED, RESOURCE_EXHAUSTED):
            seen.dropped += 1
            return random.uniform(0.5, 5.0)
        elif answer.status:
            seen.errors[f"status {answer.status}: {answer.detail[:60]}"] += 1
        else:
            seen.served += 1
            seen.seconds.append(time.perf_counter() - due)
        return answer.retry_s

    async def sweep(self, seen: Seen) -> None:
        """Every device once, each on a connection of its own."""
        waiting = iter(range(len(self.secrets)))

        async def worker() -> None:
            for index in waiting:
                due = time.perf_counter()
                try:
                    line = await self.dial(index)
                except OSError as error:
                    seen.errors[repr(error)[:80]] += 1
                    continue
                await self.call(line, seen, due)
                line.close()

        await asyncio.gather(*(worker() for _ in range(self.concurrent)))

    async def kept(self, seen: Seen, lines: list[Line]) -> None:
        """As fast as it goes, one call of each connection at a time."""
        ends = time.perf_counter() + self.seconds

        async def worker(line: Line) -> None:
            while (begin := time.perf_counter()) < ends:
                await self.call(line, seen, begin)

        await asyncio.gather(*map(worker, lines))

    async def open(self, seen: Seen, lines: list[Line], rate: float, *, rude: bool = False) -> None:
        """So many calls a second, whatever becomes of them; ``rude``: more than HTTP/2 allows, too."""
        tasks: set[asyncio.Task[float]] = set()
        begin = due = time.perf_counter()
        while (due := due + random.expovariate(rate)) - begin < self.seconds:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            elif seen.sent % 64 == 0:
                await asyncio.sleep(0)  # this process is behind: answers must be read all the same
            line = random.choice(lines)
            if not rude and line.under_way >= line.most:
                seen.held_back += 1
                continue
            seen.sent += 1
            task = asyncio.ensure_future(self.call(line, seen, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        seen.sending_s = time.perf_counter() - begin
        await asyncio.gather(*tasks)

    async def polite(self, seen: Seen, lines: list[Line]) -> None:
        """Eight calls of each connection at once; whoever is put off comes when it was told to."""

        async def worker(line: Line) -> None:
            while wait_s := await self.call(line, seen, time.perf_counter()):
                await asyncio.sleep(wait_s)

        await asyncio.gather(*(worker(line) for line in lines for _ in range(AT_ONCE)))

    async def run(self, phase: str, rate: float) -> Result:
        """One phase."""
        seen, lines = Seen(), list[Line]()
        if phase != "sweep":
            for first in range(0, self.concurrent, 50):  # connect
                some = range(first, min(first + 50, self.concurrent))
                lines += await asyncio.gather(*map(self.dial, some))
        phases: dict[str, Callable[[], Awaitable[None]]] = {
            "sweep": lambda: self.sweep(seen),
            "kept": lambda: self.kept(seen, lines),
            "half": lambda: self.open(seen, lines, rate),
            "double": lambda: self.open(seen, lines, rate),
            "rude": lambda: self.open(seen, lines, rate, rude=True),
            "polite": lambda: self.polite(seen, lines),
        }
        print("ready", flush=True)
        begin = time.perf_counter()
        await phases[phase]()
        result = seen.result(time.perf_counter() - begin)
        for line in lines:
            line.close()
        return result


# -- measuring ----------------------------------------------------------------------------------------------


class Measurement:
    """The coordinator, its fleet, and the phases."""

    def __init__(self, fleet: Lepton, args: argparse.Namespace) -> None:
        self.fleet, self.args = fleet, args
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])  # inherited by the coordinator, ...
        self.server = fleet.serve()
        os.sched_setaffinity(0, cores[1:] or cores)  # ... and not by what asks it
        self.state = fleet.folder / "state"
        self.port = int(fleet.config.read_text().partition("device_port = ")[2].split()[0])
        self.results: dict[str, Result] = {}

    def mb(self, name: str) -> float:
        """Memory of the coordinator: VmRSS now, or VmHWM, its peak."""
        text = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(text.partition(name + ":")[2].split()[0]) / 1024

    def phase(self, name: str, rate: float = 0.0, meanwhile: Callable[[], None] = lambda: None) -> Result:
        """One phase in a load process of its own; ``meanwhile`` runs beside it."""
        settings = [self.state, self.port, self.args.seconds, self.args.concurrent, rate]
        command = [sys.executable, __file__, "--role", name, *map(str, settings)]
        load = subprocess.Popen(command, stdout=subprocess.PIPE, env=self.fleet.environment)
        self.fleet.running.append(load)
        assert load.stdout is not None
        if load.stdout.readline() != b"ready\n":
            raise SystemExit(f"the load process of {name!r} has failed")
        meanwhile()
        result: Result = json.loads(load.stdout.readline())
        load.wait()
        self.fleet.running.remove(load)
        result |= {"rate": rate, "peak_mb": self.mb("VmHWM")}
        print(
            f"{name}: " + ", ".join(f"{k} {v:,.4g}" for k, v in result.items() if k != "errors"), flush=True
        )
        self.results[name] = result
        return result

    def training(self) -> subprocess.Popen[bytes]:
        """Devices that take part in rounds."""
        folder = self.fleet.folder / "training"
        command = [sys.executable, Path(__file__).with_name("memory.py"), "--role", "load", TRAINING, folder]
        load = subprocess.Popen(
            [str(word) for word in command],
            env={**self.fleet.environment, "TOKEN": self.fleet.token(TRAINING)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.fleet.running.append(load)
        assert load.stdout is not None
        if load.stdout.readline() != b"ready\n":
            raise SystemExit("the devices that train did not start")
        return load


def measure(args: argparse.Namespace, console: Console) -> bool:
    """All phases; whether all was well."""
    from lepton_server.authority import Authority
    from lepton_server.store import open_store

    with Lepton() as fleet:
        state = fleet.folder / "state"
        Authority.open(state / "keys", ("127.0.0.1",))
        console.print(f"registering {args.devices:,} devices …")
        populate(state, args.devices, args.devices, "keys")
        (state / "ca.pem").write_bytes(Authority.open(state / "keys").ca_pem)
        made = Measurement(fleet, args)
        made.training()
        idle = made.mb("VmRSS")
        runs: list[str] = []
        made.phase("sweep")
        rate = made.phase("kept")["served"]
        made.phase("half", rate / 2)
        made.phase("double", 2 * rate, lambda: runs.append(fleet.queue(TRAINING, ROUNDS)))
        made.phase("rude", 2 * rate)
        made.phase("polite")
        with open_store(fleet.store_url) as store:
            fleet.wait(lambda: store.run(runs[0]).finished, 300, "the run under overload")
            run = store.run(runs[0])
            counted = [
                sum(p.outcome == "counted" for p in store.participation(runs[0], number))
                for number in range(1, ROUNDS + 1)
            ]
        well = answers(fleet.ops + "/readyz")
        show(console, made.results, args)
        return judge(console, made.results, idle, f"{run.state} with {counted} updates", well, args) and (
            run.state == "completed" and counted == [TRAINING] * ROUNDS
        )


def show(console: Console, results: dict[str, Result], args: argparse.Namespace) -> None:
    """The table."""
    title = (
        f"{args.devices:,} devices, {args.concurrent} connections, coordinator on 1 of {os.cpu_count()} cores"
    )
    table = Table(title=f"{title}, load {os.getloadavg()[0]:.1f}")
    for column in (
        "",
        "aim/s",
        "asked/s",
        "held back/s",
        "served/s",
        "put off/s",
        "dropped/s",
        "errors",
        "p50 ms",
        "p99 ms",
        "MB",
    ):
        table.add_column(column, justify="right")
    for name, r in results.items():
        figures = [
            r["offered"],
            r["held_back"],
            r["served"],
            r["put_off"],
            r["dropped"],
            sum(r["errors"].values()),
        ]
        wanted = f"{r['rate']:,.0f}" if r["rate"] else ""
        times = f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['peak_mb']:.0f}"
        table.add_row(name, wanted, *(f"{f:,.0f}" for f in figures), *times)
    console.print(table)
    for name, r in results.items():
        for error, count in r["errors"].items():
            console.print(f"{name}: {count} x {error}")


def judge(
    console: Console, results: dict[str, Result], idle: float, run: str, well: bool, args: argparse.Namespace
) -> bool:
    """Say what is well and what is not."""
    growth = max(r["peak_mb"] for r in results.values()) - idle
    polite = results["polite"]
    wants = AT_ONCE * args.concurrent
    asked = min(r["offered"] / r["rate"] for r in (results["double"], results["rude"]))
    checks = {
        f"{asked:.0%} of twice the sustainable rate was asked for": asked >= LEAST_SHARE,
        "no call ended otherwise than answered, put off or dropped": not any(
            r["errors"] for r in results.values()
        ),
        f"the polite herd was served in the end, {wants:,} calls": not polite["errors"],
        f"memory grew by {growth:.0f} MB, at most {MAX_GROWTH_MB:.0f}": growth <= MAX_GROWTH_MB,
        f"the run under overload: {run}": True,
        "the coordinator is ready afterwards": well,
    }
    for words, good in checks.items():
        console.print(f"{'met' if good else 'MISSED'}: {words}")
    return all(checks.values())


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--role", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    soft = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    if args.role:
        phase, folder, port, seconds, concurrent, rate = args.role
        herd = Herd(Path(folder), int(port), float(seconds), int(concurrent))
        print(json.dumps(asyncio.run(herd.run(phase, float(rate)))), flush=True)
        return 0
    return 0 if measure(args, Console(width=120)) else 1


if __name__ == "__main__":
    sys.exit(main())
