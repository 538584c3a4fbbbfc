"""Many devices download one release at once: throughput, memory, fairness, resumption; and what deltas save.

    python benchmarks/delivery.py                       # 1,000 devices, 5 MB
    python benchmarks/delivery.py --devices 50 --megabytes 1

A server process with the real device service (mutual TLS), and ``--processes`` processes that hold the
virtual devices: each with a key, a certificate and a connection of its own, each verifying every chunk. Their
disks are left out: what comes is hashed and dropped. Every tenth device hangs up halfway and comes back.

* fairness: Jain's index of the bytes that devices had when half of all bytes were out (1 = all the same);
* sent twice: bytes that left the server beyond what the devices needed, per device that hung up, as a part of
  the release.
"""

import argparse
import asyncio
import bisect
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from checkins import populate
from rich.console import Console
from rich.table import Table

from lepton_fl.delivery.manifest import CHUNK, slices
from lepton_fl.delivery.packs import DIFFERENCES, pack
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.authority import Authority
from lepton_server.config import ServerConfig
from lepton_server.device_service import DeviceService
from lepton_server.downloads import MAX_CHUNKS
from lepton_server.fleet import Fleet
from lepton_server.store import open_store

METHOD = "/lepton.v1.DeviceService/FetchChunks"
RETRY_S = 1.0  # after a call that failed
TRIES = 30  # of one device; a server that is gone ends the measurement
TICK_S = 0.25  # between two notes of who has how much
Result = dict[str, Any]


# -- the server (a process of its own) ---------------------------------------------------------------------


def serve(folder: Path) -> None:
    """The device service, until standard input ends; then what it took."""
    listen = {"host": "127.0.0.1", "public_names": ["127.0.0.1"], "enrolment_port": 0, "device_port": 0}
    state = {"state_dir": str(folder)}
    config = ServerConfig.model_validate({"listen": listen, "server": state})
    with open_store(folder / "lepton.db") as store:
        fleet = Fleet(store, config.check_in)
        fleet.start()
        service = DeviceService(config, store, Authority.open(folder / "tls"), fleet)
        service.start()
        print(json.dumps({"port": service.ports[1], "rss": _rss()}), flush=True)
        began = time.process_time()
        sys.stdin.read()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert service._downloads is not None
        end = {"cpu_s": time.process_time() - began, "peak": peak, "sent": service._downloads.bytes_sent}
        print(json.dumps(end), flush=True)
        service.stop()
        fleet.stop()


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -- the devices (several processes) -----------------------------------------------------------------------


class Devices:
    """A share of the fleet in one process."""

    def __init__(self, folder: Path, port: int, first: int, step: int) -> None:
        self.chunks: list[str] = json.loads((folder / "chunks.json").read_text())
        self.secrets = json.loads((folder / "devices.json").read_text())[first::step]
        self.ca, self.port = Authority.open(folder / "tls").ca_pem, port
        self.had = np.zeros(len(self.secrets))  # bytes, distinct
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.notes: list[tuple[float, list[float]]] = []

    def channel(self, index: int) -> grpc.aio.Channel:
        """A connection of its own."""
        key, certificate = self.secrets[index]
        credentials = grpc.ssl_channel_credentials(self.ca, key.encode(), certificate.encode())
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options)

    async def download(self, index: int, breaks: bool) -> None:
        """All chunks, each once; a device that breaks hangs up in the middle of a chunk's call."""
        began, missing = time.perf_counter(), list(self.chunks)
        half, tries = len(missing) // 2, 0
        while missing:
            stop_at = half if breaks else -1
            try:
                async with self.channel(index) as channel:
                    while missing and len(missing) != stop_at:
                        batch = missing[:MAX_CHUNKS]
                        await self._batch(channel, index, batch, missing, stop_at)
            except grpc.aio.AioRpcError as error:  # as a device does: it goes on where it stopped
                self.failures.append(f"{error.code().name}: {error.details()}")
                tries += 1
                if tries == TRIES:
                    raise SystemExit(f"a device gave up; at last: {self.failures[-1]}") from error
                await asyncio.sleep(RETRY_S)
                continue
            breaks = False
        self.seconds.append(time.perf_counter() - began)

    async def _batch(
        self,
        channel: Any,  # noqa: ANN401 - grpc's published types demand codecs
        index: int,
        batch: list[str],
        missing: list[str],
        stop_at: int,
    ) -> None:
        request = pb.FetchChunksRequest(protocol=1, sha256=[bytes.fromhex(name) for name in batch])
        call = channel.unary_stream(METHOD)(request.SerializeToString())
        async for raw in call:
            data = pb.Chunk.FromString(raw).data
            if hashlib.sha256(data).hexdigest() != missing[0]:
                raise SystemExit("a chunk has another hash")
            missing.pop(0)
            self.had[index] += len(data)
            if len(missing) == stop_at:
                call.cancel()
                return

    async def run(self) -> Result:
        """Everybody at once."""
        noting = asyncio.ensure_future(self._note())
        began = time.time()
        work = [self.download(index, index % 10 == 3) for index in range(len(self.secrets))]
        await asyncio.gather(*work)
        noting.cancel()
        return {
            "began": began,
            "ended": time.time(),
            "seconds": self.seconds,
            "failures": self.failures,
            "notes": self.notes,
        }

    async def _note(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.notes.append((time.time(), self.had.tolist()))


# -- the measurement ---------------------------------------------------------------------------------------


def measure(folder: Path, devices: int, megabytes: float, processes: int) -> Result:
    """One release to all devices at once."""
    data = np.random.default_rng(0).bytes(int(megabytes * 1e6))
    blobs = Shelf(folder / "releases").blobs
    (folder / "chunks.json").write_text(json.dumps([blobs.put(chunk) for chunk in slices(data, CHUNK)]))
    populate(folder, devices, devices)
    server = _start("--role", "serve", "--folder", str(folder))
    assert server.stdout is not None
    hello = json.loads(server.stdout.readline())
    share = ["--folder", str(folder), "--port", str(hello["port"]), "--processes", str(processes)]
    parts = [_start("--role", "devices", "--first", str(i), *share) for i in range(processes)]
    outputs = [part.communicate()[0] for part in parts]
    if not all(outputs):
        raise SystemExit("devices gave up; what they said is above")
    results = [json.loads(output) for output in outputs]
    told = json.loads(server.communicate()[0].splitlines()[-1])
    return _figures(results, hello, told, devices, len(data))


def _start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _figures(results: list[Result], hello: Result, told: Result, devices: int, size: int) -> Result:
    seconds = sorted(s for result in results for s in result["seconds"])
    wall = max(r["ended"] for r in results) - min(r["began"] for r in results)
    for failure in sorted({failure for result in results for failure in result["failures"]}):
        print(failure, file=sys.stderr)
    broken = sum(len(range(3, len(r["seconds"]), 10)) for r in results)
    again = (told["sent"] - devices * size) / max(1, broken) / size
    return {
        "devices": devices,
        "MB each": size / 1e6,
        "seconds": wall,
        "MB/s": devices * size / 1e6 / wall,
        "first s": seconds[0],
        "median s": seconds[len(seconds) // 2],
        "last s": seconds[-1],
        "Jain at half": _jain(results, devices * size / 2),
        "failed calls": sum(len(r["failures"]) for r in results),
        "sent twice": again,
        "server CPU s/GB": told["cpu_s"] / (devices * size / 1e9),
        "server MB before": hello["rss"] / 1e6,
        "server MB peak": told["peak"] / 1e6,
    }


def _jain(results: list[Result], half: float) -> float:
    """Jain's index at the first moment at which half of all bytes were out, over all processes."""
    for rows in _together(results):
        had = np.concatenate(rows)
        if had.sum() >= half:
            return float(had.sum() ** 2 / (len(had) * np.square(had).sum()))
    return float("nan")


def _together(results: list[Result]) -> Iterator[list[np.ndarray]]:
    """What all devices had, process by process, at each moment at which one of the processes took a note."""
    for moment in sorted(at for result in results for at, _ in result["notes"]):
        yield [_had(result, moment) for result in results]


def _had(result: Result, moment: float) -> np.ndarray:
    count = bisect.bisect_right(result["notes"], moment, key=lambda note: note[0])
    return np.array(result["notes"][count - 1][1]) if count else np.zeros(len(result["seconds"]))


def deltas() -> list[Result]:
    """Bytes of the next release as a difference, against the whole, for weights that moved by a little."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.05, 1_200_000).astype(np.float32)
    moved = (weights + rng.normal(0, 0.05 * 0.02, weights.size)).astype(np.float32)
    kinds = {
        "fp32": (weights, moved),
        "int8, frozen scales": tuple(_grid(w, 127) for w in (weights, moved)),
        "int4, frozen scales": tuple(_nibbles(_grid(w, 7)) for w in (weights, moved)),
    }
    rows = []
    for name, (old, new) in kinds.items():
        whole, base = new.tobytes(), old.tobytes()
        sizes = {how: len(pack(whole, base, how)) for how in DIFFERENCES}
        best = min(sizes, key=lambda how: sizes[how])
        full = len(pack(whole, None, "plain"))
        row = {"weights": name, "file": len(whole), "compressed": full, "difference": sizes[best]}
        rows.append(row | {"by": best})
    return rows


def _grid(weights: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.round(weights / 0.2 * most), -most, most).astype(np.int8)


def _nibbles(values: np.ndarray) -> np.ndarray:
    pairs = (values.astype(np.uint8) & 15).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)


def _show(title: str, rows: list[Result]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else f"{v}" for v in row.values()))
    Console(width=180).print(table)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=2)
    for hidden, kind in (("--role", str), ("--folder", Path), ("--port", int), ("--first", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "serve":
        serve(given.folder)
    elif given.role == "devices":
        share = Devices(given.folder, given.port, given.first, given.processes)
        print(json.dumps(asyncio.run(share.run())), flush=True)
    else:
        with tempfile.TemporaryDirectory(prefix="lepton-delivery-") as folder:
            result = measure(Path(folder), given.devices, given.megabytes, given.processes)
        _show(f"One release, all at once; load {os.getloadavg()[0]:.1f}", [result])
        _show("What a difference saves", deltas())


if __name__ == "__main__":
    main()
