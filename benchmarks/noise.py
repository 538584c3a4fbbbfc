"""A million broken inputs at each of a real coordinator's surfaces: gRPC and HTTP.

    python benchmarks/noise.py                                   # hours; --inputs 10000 is a minute
    python benchmarks/noise.py --surfaces http --inputs 100000 --first 400000 --kept noise.jsonl

A coordinator in a process of its own, and admitted devices that send it whatever comes: good messages with
bytes flipped, cut, repeated or made up; headers and methods that do not exist; frames of gRPC and of HTTP/2
that lie; HTTP heads that are broken; and what is no TLS at all. Input number N is the same in every run, so
``--first`` goes on where another run has ended, and an input that breaks something can be sent again.

* grpc: the enrolment port and the device port, from kept connections with several calls under way;
* http: the fleet port, as nodes that are admitted and have a message to answer, and the operator's port.

Checked: the process lives and is ready at the end; no peer is shown a stack trace; no call fails in words
that are not ours, where the frame was sound; nothing happened that nobody foresaw (the log has no reference
number and no 500); and memory does not grow once caches are warm. Exit code 1 if any fails.
"""

import argparse
import asyncio
import base64
import contextlib
import datetime
import json
import multiprocessing
import os
import random
import ssl
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from _calls import Line, frame, head_of
from _fleet import answers
from checkins import populate
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node

from lepton_fl import crypto
from lepton_fl.wire.status import PATIENCE_KEY
from lepton_fl.wire.v1 import device_pb2 as pb

DEVICES: Final = 16
AT_ONCE: Final = 4  # calls under way on a connection
PATIENCE_S: Final = 60.0
OPS_GAP_S: Final = 0.01  # the operator's port is fast, and there is little to it
SILENT_S: Final = 0.3  # what is not finished is waited for; not here
MAX_GROWTH_MB: Final = 40.0  # from a fifth of the inputs to their end
SAMPLES: Final = 20  # of memory
HERE: Final = "127.0.0.1"
SERVICE: Final = "/lepton.v1.DeviceService/"
BROKEN: Final = {2: "UNKNOWN", 4: "DEADLINE_EXCEEDED", 13: "INTERNAL", 14: "UNAVAILABLE", 15: "DATA_LOSS"}
JUNK: Final = (b"", b"\xff", b"\x0a\xff\x7f", b"\x12\xff\x7f", b"\x00", b"\x80" * 10)
NASTY: Final = (
    b"", b"\x00", b"\r\n\r\n", b"\xff", b"transfer-encoding: chunked\r\n", b"content-length: 9" * 9, b"%00",
)  # fmt: skip


# --- the coordinator, in a process of its own -------------------------------------------------------


def serve(folder: str, told: Any) -> None:  # noqa: ANN401 - a pipe's end
    """A coordinator whose nodes have messages to answer, until the pipe closes."""
    output = os.open(f"{folder}/server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from lepton_fl.logs import configure
    from lepton_server.config import ServerConfig
    from lepton_server.coordinator import Coordinator

    configure("warning", "text")
    names = ("enrolment_port", "device_port", "fleet_port", "ops_port")
    settings = {
        "server": {"state_dir": f"{folder}/state"},
        "listen": {"host": HERE, "public_names": [HERE], **dict.fromkeys(names, 0)},
        "limits": {"calls_per_s": 1e5, "call_burst": 10**6, "enrolment_failures": 10**5},
    }
    with Coordinator(ServerConfig.model_validate(settings)) as coordinator:
        assert coordinator._driver is not None
        link, found = coordinator._driver._link, []
        for key_pem, _ in json.loads(Path(folder, "state", "devices.json").read_text()):
            public = crypto.key_from_pem(key_pem.encode()).public_key()
            found.append(link.admit(crypto.public_der(public)))
        threading.Thread(target=_ask, args=(link, found, 1, told), daemon=True).start()
        ends = coordinator.endpoints
        ports = [int(end.rpartition(":")[2]) for end in (ends.enrolment, ends.device_service, ends.fleet)]
        told.send({"ports": [*ports, coordinator.ops_port], "nodes": found, "run": link._state.run_id})
        with contextlib.suppress(EOFError):
            told.recv()


def _ask(link: Any, nodes: list[int], number: int, told: Any) -> None:  # noqa: ANN401 - as above
    """Every node has a message that it has not answered, as long as the process lives."""
    from lepton_fl.wire.records import Records

    box = link.mailbox()
    records = Records({}, {"round": number})
    for node in nodes:
        box.post(node, records, message_type="train", ttl_s=86_400)
    while True:
        reply = box.get(timeout_s=10)
        if reply is not None:
            box.post(reply.node_id, records, message_type="train", ttl_s=86_400)


# --- inputs -----------------------------------------------------------------------------------------


def damaged(seed: bytes, rng: random.Random) -> bytes:
    """Something like a good message."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 1, 2, 8)))
        data[at:end] = rng.choice((*JUNK, rng.randbytes(end - at + 1), bytes(data[at:end]) * 40))
    return bytes(data)


@dataclass
class Seen:
    """What became of the inputs of one surface."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def hear(self, number: int, word: str, *, bad: bool = False) -> None:
        """Count an answer; keep the first bad ones with the number of their input."""
        self.answers[word[:60]] += 1
        if bad and len(self.wrong) < 20:
            self.wrong.append(f"input {number}: {word}")


@dataclass
class Surface(ABC):
    """A way to send inputs: so many connections, each with a few under way."""

    folder: Path
    told: dict[str, Any]
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        self.devices = json.loads((self.folder / "state" / "devices.json").read_text())
        self.ca = (self.folder / "ca.pem").read_text()
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what good messages are made of."""

    async def run(self, numbers: "Numbers") -> None:
        """Send them all."""
        await asyncio.gather(*(self.speak(i, numbers) for i in range(DEVICES)))

    @abstractmethod
    async def speak(self, index: int, numbers: "Numbers") -> None:
        """One connection after another, for one device, until the inputs are used up."""

    def context(self, index: int = -1) -> ssl.SSLContext:
        """To trust the coordinator and, with an index, to be that device."""
        context = ssl.create_default_context(cadata=self.ca)
        if index >= 0:
            pem = self.folder / f"device{index}.pem"
            pem.write_text("".join(self.devices[index]))
            context.load_cert_chain(pem)
        return context

    async def shout(self, port: int, data: bytes) -> None:
        """Bytes that are no TLS."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SILENT_S):
                reader, writer = await asyncio.open_connection(HERE, port)
                with contextlib.closing(writer):
                    writer.write(data)
                    await reader.read(4096)


class Grpc(Surface):
    """The enrolment port and the device port."""

    def prepare(self) -> None:
        """See ``Surface``."""
        key = crypto.key_from_pem(self.devices[0][0].encode())
        csr, device_id = crypto.make_csr(key, "x"), crypto.device_id(key.public_key())
        task = pb.TaskReport(name="pkg.tasks:digits", version="1", ready=True)
        good: dict[str, Any] = {
            "Enroll": pb.EnrollRequest(protocol=1, token_secret=bytes(20), csr_pem=csr, groups=["a"]),
            "Renew": pb.RenewRequest(protocol=1, device_id=device_id, csr_pem=csr),
            "CheckIn": pb.CheckInRequest(
                protocol=1, status=pb.STATUS_IDLE, tasks=[task], client_version="0.1", reason="why",
                desired_digest="ab" * 32, adverts=[b"x" * 40], advert_session=bytes(8), device_time=1.8e9,
                troubles=[pb.Trouble(cause="slow-link", detail="x")],
                engaged=[pb.Engaged(run_id="run", round=1, nonce="ab", failure="x")],
                serving=pb.Serving(task="pkg.tasks:digits", release="ab" * 32, trials=True),
                service=pb.Service(release="ab" * 32, requests=2, errors=1, p95_ms=1.5),
                ledger=pb.LedgerHead(seq=7, hash=bytes(32), key=b"k" * 90, signature=b"s" * 70),
            ),
            "Wait": pb.WaitRequest(protocol=1),
            "Certify": pb.CertifyRequest(protocol=1, request=bytes(200)),
            "FetchMetadata": pb.FetchMetadataRequest(protocol=1, name="timestamp.json"),
            "FetchChunks": pb.FetchChunksRequest(protocol=1, sha256=[bytes(32)]),
        }  # fmt: skip
        self.good = {name: message.SerializeToString() for name, message in good.items()}
        self.names = [*good, "CheckIn", "CheckIn"]  # the one with the most in it
        self.heads = {name: head_of(SERVICE + name, PATIENCE_S) for name in self.names}
        odd = ({":path": SERVICE + "No"}, {":path": "/"}, {":path": "CheckIn"}, {":method": "GET"},
               {"content_type": "text/html"}, {"te": "x"}, {"grpc_timeout": "0n"}, {"grpc_timeout": "x"},
               {"grpc_encoding": "gzip"}, {PATIENCE_KEY: "1e99"}, {PATIENCE_KEY: "nan"}, {PATIENCE_KEY: ""},
               {"y-bin": "\xff"}, {"x": "x" * 9000}, {"content_length": "-1"})  # fmt: skip
        self.odd = [head_of(SERVICE + "CheckIn", PATIENCE_S, **change) for change in odd]
        self.garbled = set[Line]()  # what becomes of the other calls of these is not judged

    async def speak(self, index: int, numbers: "Numbers") -> None:
        """See ``Surface``; every other device at the enrolment port, as anybody."""
        port, here = self.told["ports"][index % 2], index % 2 == 0
        served = [name for name in self.names if (name in ("Enroll", "Renew")) is here]
        context = self.context(-1 if here else index)
        context.set_alpn_protocols(["h2"])

        async def speaker(line: Line) -> None:
            while line.is_open and (number := next(numbers, None)) is not None:
                await self.say(number, line, port, served)

        while numbers.left:
            line = await Line.dial(port, context, SERVICE + "CheckIn", PATIENCE_S)
            await asyncio.gather(*(speaker(line) for _ in range(AT_ONCE)))
            self.garbled.discard(line)
            line.close()

    async def say(self, number: int, line: Line, port: int, served: list[str]) -> None:
        """One input, mostly to a method of this port."""
        rng = random.Random(number)
        dice = rng.random()
        name = rng.choice(served if dice > 0.07 else self.names)
        message = damaged(self.good[name], rng) if dice < 0.97 else self.good[name]
        head, body = self.heads[name], None
        if dice < 0.002:
            await self.shout(port, rng.randbytes(rng.choice((1, 50, 5000))))
            self.seen.hear(number, "no TLS")
            return
        if dice < 0.004:
            self.garbled.add(line)
            kind, flags, stream = rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 9, 2**31 - 1))
            line.send(frame(kind, flags, stream, rng.randbytes(rng.choice((0, 1, 4, 8, 100)))))
        elif dice < 0.02:
            size = rng.choice((0, len(message) - 1, len(message) + 1, 2**32 - 1)) % 2**32
            body = bytes([rng.choice((0, 1, 255))]) + size.to_bytes(4, "big") + message
        elif dice < 0.06:
            head = rng.choice(self.odd)
        sound = dice >= 0.06  # in all but the message
        patient = sound and name != "Wait"  # a good one waits until the next one of its device
        try:
            async with asyncio.timeout(PATIENCE_S if patient else SILENT_S):
                answer = await line.call(message, head, body)
        except TimeoutError:
            self.seen.hear(number, "silence", bad=patient and line not in self.garbled)
            return
        except OSError:
            self.seen.hear(number, "hung up")
            return
        foreign = sound and answer.status in BROKEN and not answer.ours and line not in self.garbled
        trace = "Traceback" in answer.detail or 'File "' in answer.detail or "reference" in answer.detail
        word = "reset" if answer.dropped else f"status {answer.status}"
        bad = trace or foreign
        self.seen.hear(number, f"{word}: {name} {answer.detail}" if bad else word, bad=bad)


class Http(Surface):
    """The fleet port and the operator's port."""

    def prepare(self) -> None:
        """See ``Surface``."""
        self.keys = [crypto.key_from_pem(pem.encode()) for pem, _ in self.devices]
        self.signed = [(0.0, b"")] * len(self.keys)

    async def speak(self, index: int, numbers: "Numbers") -> None:
        """See ``Surface``; the first one at the operator's port, as anybody."""
        fleet, ops = self.told["ports"][2:]
        port, context = (ops, None) if index == 0 else (fleet, self.context())
        good = self.messages(self.told["nodes"][index])
        while numbers.left:
            reader, writer = await asyncio.open_connection(HERE, port, ssl=context)
            for number in numbers:
                if not await self.say(number, reader, writer, index, good):
                    break  # the connection is gone
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SILENT_S):
                    await writer.wait_closed()

    def messages(self, node: int) -> dict[str, bytes]:
        """What a node may say."""
        sender, run, name = Node(node_id=node), self.told["run"], "ab" * 32
        tree = ObjectTree(object_id=name, children=[ObjectTree(object_id="cd" * 32)])
        announced = PushMessagesRequest(node=sender, message_object_trees=[tree])
        metadata = announced.messages_list.add().metadata
        metadata.src_node_id, metadata.run_id, metadata.message_id = node, run, name
        metadata.dst_node_id, metadata.reply_to_message_id = 1, "ef" * 32
        objects = {"node": sender, "run_id": run, "object_id": name}
        return {
            "pull-messages": PullMessagesRequest(node=sender).SerializeToString(),
            "push-messages": announced.SerializeToString(),
            "pull-object": PullObjectRequest(**objects).SerializeToString(),
            "push-object": PushObjectRequest(**objects, object_content=b"x" * 50).SerializeToString(),
            "send-node-heartbeat": PullMessagesRequest(node=sender).SerializeToString(),
            "activate-node": PullMessagesRequest().SerializeToString(),
        }

    def head(self, index: int, rng: random.Random) -> list[bytes]:
        """Flower's headers of a device, signed anew every few seconds; now and then one is odd."""
        at, known = self.signed[index]
        if time.monotonic() - at > 5.0:
            key, stamp = self.keys[index], datetime.datetime.now(datetime.UTC).isoformat()
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            pem = key.public_key().public_bytes(serialization.Encoding.PEM, form)
            signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
            values = base64.b64encode(pem), stamp.encode(), base64.b64encode(signature)
            names = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
            known = b"\r\n".join(b": ".join(pair) for pair in zip(names, values, strict=True))
            self.signed[index] = time.monotonic(), known
        lines = [b"host: x", b"content-type: application/protobuf", *known.split(b"\r\n")]
        if rng.random() < 0.1:
            at_line = rng.randrange(len(lines))
            name = lines[at_line].partition(b":")[0]
            lines[at_line] = (
                name + b": " + rng.choice((b"", b"x" * 500, b"AAAA", b"2026-01-01", b"x" * 40_000))
            )
        return lines

    async def say(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        index: int,
        good: dict[str, bytes],
    ) -> bool:
        """One input; whether the connection is still there."""
        rng = random.Random(number)
        dice, path = rng.random(), rng.choice(list(good))
        if not index:
            await asyncio.sleep(OPS_GAP_S)
        body = damaged(good[path], rng) if dice < 0.95 else good[path]
        if dice < 0.002:
            await self.shout(self.told["ports"][2], rng.randbytes(rng.choice((1, 50, 5000))))
            self.seen.hear(number, "no TLS")
            return True
        others = ("/metrics", "/readyz", "/healthz", "/", "*", "/v1/fleet/no")
        where = f"/v1/fleet/{path}" if index and dice > 0.05 else rng.choice(others)
        first = f"{'POST' if dice > 0.04 else rng.choice(('GET', 'PUT', 'X'))} {where} HTTP/1.1".encode()
        size = b"content-length: %d" % len(body)
        data = b"\r\n".join([first, *self.head(index, rng), size, b"", body])
        broken = dice < 0.03
        if broken:
            raw = bytearray(data)
            for _ in range(rng.choice((1, 2, 4))):
                at = rng.randrange(len(raw) + 1)
                raw[at : at + rng.choice((0, 1, 8))] = rng.choice((*NASTY, rng.randbytes(5)))
            data = bytes(raw)
        status, text, kept = 0, b"", False
        try:
            async with asyncio.timeout(SILENT_S if broken else PATIENCE_S):
                writer.write(data)
                await writer.drain()
                status, text, kept = await _response(reader)
        except TimeoutError:
            self.seen.hear(number, "silence", bad=not broken)
            return False
        except (OSError, ValueError, asyncio.IncompleteReadError):
            self.seen.hear(number, "hung up")
            return False
        trace = b"Traceback" in text or b'File "' in text
        bad = trace or (status >= 500 and status != 503)
        self.seen.hear(number, f"{status} {text[:200]!r}" if bad else str(status), bad=bad)
        return kept and not broken


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection stays."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status, size = int(head.split()[1]), head.partition(b"content-length:")[2].split(b"\r\n")[0]
    kept = b"connection: close" not in head
    if not size:
        return status, await reader.read(65_536), False
    return status, await reader.readexactly(int(size)), kept


# --- all of them ------------------------------------------------------------------------------------


class Numbers:
    """The inputs' numbers, which says what it costs as they go."""

    def __init__(self, first: int, count: int, pid: int) -> None:
        self.first, self.count, self.pid = first, count, pid
        self.given, self.rss = 0, [memory_mb(pid)]

    @property
    def left(self) -> int:
        """How many are still to come."""
        return self.count - self.given

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.given >= self.count:
            raise StopIteration
        if self.given * SAMPLES // self.count >= len(self.rss):
            self.rss.append(memory_mb(self.pid))
        self.given += 1
        return self.first + self.given - 1


def memory_mb(pid: int) -> float:
    """Of the coordinator, now."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def cpu_s(pid: int) -> float:
    """Processor seconds of the coordinator so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def coordinator() -> AsyncIterator[tuple[Path, dict[str, Any], Any]]:
    """One in a folder of its own: the folder, what it has told, its process."""
    from lepton_server.authority import Authority

    with TemporaryDirectory(prefix="lepton-noise-") as name:
        folder = Path(name)
        (folder / "state").mkdir(mode=0o700)
        authority = Authority.open(folder / "state" / "keys", (HERE,))
        populate(folder / "state", DEVICES, DEVICES, "keys")
        (folder / "ca.pem").write_bytes(authority.ca_pem)
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        process = context.Process(target=serve, args=(name, far), daemon=True)
        process.start()
        try:
            if not near.poll(60.0):
                raise SystemExit(f"no coordinator: {(folder / 'server.log').read_text()[-3000:]}")
            yield folder, near.recv(), process
        finally:
            near.close()
            far.close()
            process.join(20.0)
            process.kill()


async def measure(kind: type[Surface], first: int, count: int) -> dict[str, Any]:
    """Inputs ``first`` to ``first + count`` of one surface; what came of them."""
    async with coordinator() as (folder, told, process):
        surface, numbers = kind(folder, told), Numbers(first, count, process.pid)
        began, cpu = time.monotonic(), cpu_s(process.pid)
        await surface.run(numbers)
        seconds, cpu = time.monotonic() - began, cpu_s(process.pid) - cpu
        numbers.rss.append(memory_mb(process.pid))
        warm = numbers.rss[len(numbers.rss) // 5]
        log = (folder / "server.log").read_text(errors="replace")
        ready = answers(f"http://{HERE}:{told['ports'][3]}/readyz")
        wrong = surface.seen.wrong
        wrong += ["the coordinator is dead"] if not process.is_alive() else []
        wrong += ["the coordinator is not ready"] if process.is_alive() and not ready else []
        wrong += [f"the log: {line}" for line in log.splitlines() if "(reference " in line][:5]
        if max(numbers.rss) - warm > MAX_GROWTH_MB:
            wrong.append(f"memory went from {warm:.0f} to {max(numbers.rss):.0f} MB")
    return {
        "surface": kind.__name__.lower(), "first": first, "inputs": numbers.given,
        "seconds": round(seconds, 1), "cpu_s": round(cpu, 1),
        "rss_mb": [round(mb, 1) for mb in numbers.rss], "wrong": wrong,
        "answers": dict(surface.seen.answers.most_common()),
        "traces_in_log": log.count("Traceback"), "first_trace": log.partition("Traceback")[2][:4000],
    }  # fmt: skip


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    surfaces: dict[str, type[Surface]] = {"grpc": Grpc, "http": Http}
    parser.add_argument("--surfaces", nargs="+", default=list(surfaces), choices=list(surfaces))
    parser.add_argument("--inputs", type=int, default=1_000_000, help="at each surface")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--kept", type=Path, help="where a line of JSON is added for each surface")
    chosen = parser.parse_args()
    good = True
    for name in chosen.surfaces:
        found = asyncio.run(measure(surfaces[name], chosen.first, chosen.inputs))
        good &= not found["wrong"]
        rss, took = found["rss_mb"], found["seconds"]
        memory = (
            f"{rss[0]:.0f} MB, {rss[len(rss) // 5]:.0f} warm, {max(rss):.0f} at most, {rss[-1]:.0f} after"
        )
        print(
            f"{name}: {found['inputs']:,} inputs from {chosen.first:,} in {took:.0f} s, "
            f"{found['inputs'] / took:,.0f}/s, coordinator {found['cpu_s']:.0f} s of processor time, "
            f"memory {memory}; " + ("; ".join(found["wrong"]) or "nothing wrong"),
            flush=True,
        )
        print("   " + ", ".join(f"{n:,} {word}" for word, n in found["answers"].items()), flush=True)
        if chosen.kept:
            with chosen.kept.open("a") as file:
                file.write(json.dumps(found) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
