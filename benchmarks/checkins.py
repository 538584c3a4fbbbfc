"""Check-ins per second on one core, with 50,000 registered devices, mTLS and a real store.

    python benchmarks/checkins.py                    # about six minutes, most of them registering
    python benchmarks/checkins.py --devices 5000 --seconds 3

A server process is pinned to one core, the devices (one process, distinct keys and certificates) to another.
Closed loop: as fast as it goes. Open loop: at a fixed rate, and latency counts from the moment at which a
call was due, so a stall is not hidden. Cold: a new connection, with its handshake, for each check-in.
The limit of the stack is measured in the same run: a bare grpc.aio server that echoes the same bytes under
the same TLS. Both are compared per second of processor time, so that a busy machine does not decide.

Exit code 1 if the targets (1,000 check-ins/s; 99 % of them within 50 ms at 1,000/s) are missed.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from lepton_fl import crypto
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.authority import Authority
from lepton_server.config import ServerConfig
from lepton_server.device_service import DeviceService
from lepton_server.fleet import Fleet
from lepton_server.store import Store, open_store

PER_TOKEN = 250  # devices that join with one token
METHOD = "/lepton.v1.DeviceService/CheckIn"
TARGET_RATE, TARGET_P99_MS = 1000, 50.0
Result = dict[str, Any]


# -- state --------------------------------------------------------------------------------------------


def populate(folder: Path, devices: int, connections: int, keys_in: str = "tls") -> None:
    """Register ``devices`` devices; the first ``connections`` of them get keys and certificates.

    Args:
        folder: Of the state; ``devices.json`` is left there.
        devices: To register.
        connections: So many get a certificate.
        keys_in: Folder of the authority, there.
    """
    authority = Authority.open(folder / keys_in)
    secrets: list[tuple[str, str]] = []
    with open_store(folder / "lepton.db") as store:
        for start in range(0, devices, PER_TOKEN):
            keys = [crypto.new_key() for _ in range(min(PER_TOKEN, devices - start))]
            _enrol(store, f"t{start}", keys)
            for key in keys[: max(0, connections - start)]:
                device_id = crypto.device_id(key.public_key())
                issued = authority.sign_device(crypto.make_csr(key, "bench"), device_id)
                secrets.append((crypto.key_to_pem(key).decode(), issued.pem.decode()))
    (folder / "devices.json").write_text(json.dumps(secrets))


def _enrol(store: Store, token_id: str, keys: list[crypto.PrivateKey]) -> None:
    with store.transaction() as change:
        token = {
            "token_id": token_id,
            "secret_sha256": os.urandom(32).hex(),
            "expires_at": time.time() + 3600,
            "uses": len(keys),
        }
        change.record("token.created", token_id, token)
        for key in keys:
            public = key.public_key()
            device_id = crypto.device_id(public)
            change.record("token.used", token_id, {"token_id": token_id, "device_id": device_id})
            body = {
                "device_id": device_id,
                "name": "bench",
                "public_key": base64.b64encode(crypto.public_der(public)).decode(),
                "cert_serial": "1",
                "cert_not_after": time.time() + 86_400,
                "token_id": token_id,
                "groups": ["bench"],
            }
            change.record("device.enrolled", device_id, body)


# -- the servers (each a process of its own) ------------------------------------------------------------


def _config() -> ServerConfig:
    listen = {"host": "127.0.0.1", "public_names": ["127.0.0.1"], "enrolment_port": 0, "device_port": 0}
    limits = {"calls_per_s": 10_000, "call_burst": 1_000_000}  # few devices stand for many
    return ServerConfig.model_validate({"listen": listen, "limits": limits})


def serve(folder: Path) -> None:
    """The coordinator's device service, until standard input ends."""
    config = _config()
    with open_store(folder / "lepton.db") as store:
        fleet = Fleet(store, config.check_in)
        begin = time.process_time()
        fleet.start()
        loaded = time.process_time() - begin
        service = DeviceService(config, store, Authority.open(folder / "tls"), fleet)
        service.start()
        begin = time.process_time()
        fleet.candidates("pkg.tasks:digits", "1")
        candidates = time.process_time() - begin
        print(
            json.dumps({"port": service.ports[1], "load_s": loaded, "candidates_s": candidates}), flush=True
        )
        sys.stdin.read()
        service.stop()
        fleet.stop()


def echo(folder: Path) -> None:
    """A bare server: the limit of grpc.aio under the same TLS."""
    asyncio.run(_echo(Authority.open(folder / "tls")))


async def _echo(authority: Authority) -> None:
    async def same(request: bytes, _context: object) -> bytes:
        return request

    handlers: dict[str, Any] = {"CheckIn": grpc.unary_unary_rpc_method_handler(same)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("lepton.v1.DeviceService", handlers),)
    )
    pair = [(authority.server_key_pem, authority.server_cert_pem)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, authority.ca_pem, True))
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


# -- the devices (one process) --------------------------------------------------------------------------


@dataclass
class Devices:
    """Connections of distinct devices, and what they say."""

    folder: Path
    port: int
    count: int

    def __post_init__(self) -> None:
        self.secrets = json.loads((self.folder / "devices.json").read_text())[: self.count]
        self.ca = Authority.open(self.folder / "tls").ca_pem
        self.request = pb.CheckInRequest(
            protocol=1,
            status=pb.STATUS_IDLE,
            tasks=[pb.TaskReport(name="pkg.tasks:digits", version="1", layout_digest="ab" * 32, ready=True)],
            client_version="0.1.0",
            capabilities=pb.Capabilities(cpus=4, memory_bytes=4 << 30, os="Linux 6.1 aarch64"),
        )

    def channel(self, index: int) -> grpc.aio.Channel:
        """A connection of its own for one device."""
        key, certificate = self.secrets[index]
        credentials = grpc.ssl_channel_credentials(self.ca, key.encode(), certificate.encode())
        options = [("grpc.use_local_subchannel_pool", 1)]  # one connection per device, as in life
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options)

    def message(self) -> bytes:
        """An idle check-in."""
        self.request.device_time = time.time()
        return self.request.SerializeToString()

    async def cold(self, seconds: float) -> Result:
        """Connect, check in, hang up; eight at a time."""
        end, done = time.perf_counter() + seconds, 0

        async def worker(offset: int) -> None:
            nonlocal done
            while time.perf_counter() < end:
                async with self.channel((offset + 8 * done) % self.count) as channel:
                    await _check_in(channel)(self.message())
                done += 1

        begin = time.perf_counter()
        await asyncio.gather(*(worker(i) for i in range(8)))
        return {"per_s": done / (time.perf_counter() - begin)}

    async def closed(self, calls: list[Any], seconds: float, workers: int = 32) -> Result:
        """As fast as it goes with ``workers`` calls under way."""
        end = time.perf_counter() + seconds
        latencies: list[float] = []

        async def worker(mine: list[Any]) -> None:
            while True:
                for call in mine:
                    begin = time.perf_counter()
                    if begin >= end:
                        return
                    await call(self.message())
                    latencies.append(time.perf_counter() - begin)

        begin = time.perf_counter()
        await asyncio.gather(*(worker(calls[i::workers]) for i in range(workers)))
        return {"per_s": len(latencies) / (time.perf_counter() - begin), **_quantiles(latencies)}

    async def open(self, calls: list[Any], seconds: float, rate: float) -> Result:
        """At ``rate`` per second (Poisson arrivals), latency from the moment a call was due."""
        latencies: list[float] = []
        tasks: set[asyncio.Task[None]] = set()

        async def one(call: Callable[[bytes], Awaitable[bytes]], due: float) -> None:
            await call(self.message())
            latencies.append(time.perf_counter() - due)

        begin = due = time.perf_counter()
        while due - begin < seconds:
            due += random.expovariate(rate)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.ensure_future(one(random.choice(calls), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return {"per_s": len(latencies) / (time.perf_counter() - begin), **_quantiles(latencies)}

    async def run(self, mode: str, seconds: float, rate: float) -> Result:
        """One measurement over kept connections, or over fresh ones."""
        if mode == "cold":
            _ready()
            return await self.cold(seconds)
        channels = [self.channel(i) for i in range(self.count)]
        calls = [_check_in(channel) for channel in channels]
        for begin in range(0, len(calls), 50):  # connect
            await asyncio.gather(*(call(self.message()) for call in calls[begin : begin + 50]))
        await self.closed(calls, 1.0)  # warm
        _ready()
        result = await (self.open(calls, seconds, rate) if mode == "open" else self.closed(calls, seconds))
        print(json.dumps(result), flush=True)  # measured: the parent reads the server's use of the core now
        sys.stdin.readline()
        await asyncio.gather(*(channel.close(None) for channel in channels))
        return result


def _check_in(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - grpc's published types demand codecs
    plain: Any = channel
    return plain.unary_unary(METHOD)


def _ready() -> None:
    print("ready", flush=True)


def _quantiles(latencies: list[float]) -> Result:
    cuts = statistics.quantiles(latencies, n=1000)
    return {"p50_ms": cuts[499] * 1e3, "p99_ms": cuts[989] * 1e3, "max_ms": max(latencies) * 1e3}


# -- measuring --------------------------------------------------------------------------------------------


class Process:
    """A part of this script in a process of its own, on one core."""

    def __init__(self, role: str, core: int, *arguments: object) -> None:
        command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
        # stdin is how it is told to end: it ends with us, whatever happens to us.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(self.process.pid, {core})

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with code {self.process.wait()}")
        return line.strip()

    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def close(self) -> None:
        """Tell it to end, and wait."""
        self.process.communicate(timeout=30)


def measure(
    folder: Path, server: Process, port: int, core: int, mode: str, args: argparse.Namespace
) -> Result:
    """One measurement against a running server."""
    load = Process(
        "load", core, "--folder", folder, "--port", port, "--mode", mode,
        "--connections", args.connections, "--seconds", args.seconds, "--rate", args.rate,
    )  # fmt: skip
    assert load.line() == "ready"
    cpu, begin = server.cpu_s(), time.perf_counter()
    result: Result = json.loads(load.line())
    elapsed = time.perf_counter() - begin
    result |= {"cpu": (server.cpu_s() - cpu) / elapsed, "rss_mb": server.rss_mb()}
    load.close()
    return result


def journal_size(folder: Path) -> tuple[int, int]:
    """Events in the journal, and those that are reports."""
    with open_store(folder / "lepton.db") as store:
        return store.head_seq(), len(store.events(kinds=("device.reported",)))


def bench(args: argparse.Namespace, folder: Path) -> int:
    """Measure, print, and judge."""
    console = Console()
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = cores[0], cores[-1]
    console.print(
        f"{len(cores)} cores, load average {os.getloadavg()[0]:.1f}; registering {args.devices:,} devices …"
    )
    populate(folder, args.devices, args.connections)
    table = Table(
        title=f"Check-ins on one core, {args.devices:,} registered, {args.connections:,} connections"
    )
    table.add_column("")
    for column in ("per s", "p50 ms", "p99 ms", "max ms", "CPU", "MB"):
        table.add_column(column, justify="right")

    results: dict[tuple[str, str], Result] = {}
    for role in ("echo", "serve"):
        server = Process(role, server_core, "--folder", folder)
        hello = json.loads(server.line())
        if role == "serve":
            load_s, all_ms = hello["load_s"], hello["candidates_s"] * 1e3
            console.print(
                f"fleet loaded in {load_s:.2f} s, candidates() of all in {all_ms:.0f} ms (processor time); "
                f"{server.rss_mb():.0f} MB"
            )
        for mode in ("cold", "closed", "open"):
            if (role, mode) == ("serve", "open"):
                before = journal_size(folder)
            result = results[role, mode] = measure(folder, server, hello["port"], load_core, mode, args)
            _row(table, role, mode, args, result)
        server.close()
    after = journal_size(folder)
    console.print(table)
    return _judge(console, results, after[0] - before[0])


def _row(table: Table, role: str, mode: str, args: argparse.Namespace, result: Result) -> None:
    who = {"echo": "echo", "serve": "lepton"}[role]
    how = {"cold": "cold", "closed": "closed loop", "open": f"open loop {args.rate:g}/s"}[mode]
    times = [f"{result[key]:.1f}" if key in result else "" for key in ("p50_ms", "p99_ms", "max_ms")]
    cpu, rss = f"{result['cpu']:.0%}", f"{result['rss_mb']:.0f}"
    table.add_row(f"{who}: {how}", f"{result['per_s']:,.0f}", *times, cpu, rss)


def _judge(console: Console, results: dict[tuple[str, str], Result], grown: int) -> int:
    for mode in ("cold", "closed"):
        ours, bare = (results[who, mode]["per_s"] / results[who, mode]["cpu"] for who in ("serve", "echo"))
        ratio = ours / bare
        console.print(f"{mode}: {ratio:.0%} of the limit of the stack, per processor second")
    console.print(f"the journal grew by {grown} events during the open loop")
    rate, p99 = results["serve", "closed"]["per_s"], results["serve", "open"]["p99_ms"]
    good = rate >= TARGET_RATE and p99 <= TARGET_P99_MS
    console.print(
        f"{'met' if good else 'MISSED'}: {rate:,.0f}/s (>= {TARGET_RATE:,}), p99 {p99:.1f} ms (<= 50)"
    )
    return 0 if good else 1


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=50_000)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate", type=float, default=1000.0)
    for hidden in ("--role", "--folder", "--port", "--mode"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role is None:
        with tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder:
            return bench(args, Path(folder))
    if args.role == "load":
        devices = Devices(Path(args.folder), int(args.port), args.connections)
        result = asyncio.run(devices.run(args.mode, args.seconds, args.rate))
        if args.mode == "cold":
            print(json.dumps(result), flush=True)
        return 0
    {"serve": serve, "echo": echo}[args.role](Path(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
