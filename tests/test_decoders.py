"""Whatever bytes come in, a decoder gives a value or one of the errors that it names, and keeps its memory.

Hypothesis tries some hundred inputs of each decoder here. `make nightly` runs this file as a program with a
million of them, guided by coverage where atheris is installed, and with an end to the memory it may take:

    python tests/test_decoders.py --inputs 1000000
"""

import argparse
import base64
import hashlib
import importlib.util
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lepton_fl.errors import LeptonError

MEMORY = 2**30  # bytes that a run of this file may take beyond what its libraries took
KINDS = ("|b1", "|u1", "<i4", "<i8", "<f2", "<f4")  # of arrays that are tried
LONGEST = 4096  # bytes of an input that mutations make
NASTY = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, float("nan"), float("inf"), -0.0, "",
    "x" * 600, "\x00", "ü\u202e", "-1", "1e9", "..", "/", [], {}, [[]], [None], {"": 0}, [0] * 100,
]  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """Something that reads what others wrote."""

    name: str
    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...] = (b"",)
    allowed: tuple[type[Exception], ...] = (LeptonError,)

    def try_one(self, data: bytes) -> None:
        """Read; only an error that is not allowed comes out."""
        try:
            self.read(data)
        except self.allowed:
            return


# --- the decoders ---------------------------------------------------------------------------------------


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Of a decoder of text."""
    return lambda data: read(data.decode("utf-8", "replace"))


def tree(read: Callable[[Any], object]) -> Callable[[bytes], object]:
    """Of a decoder of what JSON can say, which something else has decoded before."""

    def call(data: bytes) -> object:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return read(found)

    return call


def of_records(read: Callable[[Any], object]) -> Callable[[bytes], object]:
    """Of a decoder of records; arrays are told as [type, shape, numbers], bytes as {"hex": ...}."""
    from lepton_fl.wire.records import Records

    def value(found: Any) -> Any:
        if isinstance(found, dict):
            try:
                return bytes.fromhex(str(found.get("hex")))
            except ValueError:
                return b""
        return [value(item) for item in found] if isinstance(found, list) else found

    def call(found: Any) -> object:
        if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
            return None
        arrays = {}
        for name, told in found.get("arrays", {}).items():
            try:
                kind, shape, numbers = told
                with np.errstate(all="ignore"):
                    flat = np.array(numbers, kind if kind in KINDS else "<f8")
                arrays[name] = np.resize(flat, [min(int(n), 64) for n in shape])
            except (ValueError, TypeError, OverflowError):
                continue
        families = [{k: value(v) for k, v in found.get(f, {}).items()} for f in ("config", "metrics")]
        return read(Records(arrays, *families))

    return tree(call)


def told(records: Any) -> bytes:
    """Records as ``of_records`` reads them."""

    def plain(found: Any) -> Any:
        if isinstance(found, bytes):
            return {"hex": found.hex()}
        return [plain(item) for item in found] if isinstance(found, list) else found

    arrays = {n: [a.dtype.str, list(a.shape), a.reshape(-1).tolist()] for n, a in records.arrays.items()}
    families = {f: {k: plain(v) for k, v in getattr(records, f).items()} for f in ("config", "metrics")}
    return json.dumps({"arrays": arrays, **families}).encode()


def messages() -> list[Decoder]:
    """Of a round."""
    from lepton_fl.plan import RoundPlan
    from lepton_fl.rounds.secure_wire import Stage, StageAnswer, StageRequest
    from lepton_fl.vector import vector_digest
    from lepton_fl.wire.messages import EvaluateReply, Failure, Request, Ticket, TrainReply

    model = np.array([1.0, -2.0, 0.5], np.float32)
    fields: dict[str, Any] = {
        "run_id": "run", "round": 3, "attempt": 2, "kind": "train", "task": "pkg:task", "task_version": "7",
        "layout_digest": "ab" * 32, "num_coordinates": 3, "model_sha256": vector_digest(model),
        "cohort": ["a", "b"], "wanted_reports": 2, "min_reports": 1, "deadline_s": 10.0, "local": {},
        "weighting": "examples", "max_weight": 100, "grid_step": 2.0**-20, "nonce": "cd" * 16,
    }  # fmt: skip
    plan = RoundPlan.from_json(fields)
    looked = RoundPlan.from_json(fields | {"kind": "evaluate"})
    sums = {"loss_sum": np.array([2.5]), "examples": np.array([4])}
    reply = TrainReply(Ticket.of(plan), "7", 4, np.array([1, -2, 3], np.int32), sums, 0.25)
    judged = EvaluateReply(Ticket.of(looked), "7", 4, {"hits": np.array([3, 1])}, 0.25)
    request = Request.of(plan, model).to_records()
    first = StageRequest(Ticket.of(plan), Stage.SHARES, b"frame", "{}", request)
    failure = Failure(Ticket.of(plan), next(iter(type(_rejection()))), "why").to_records()
    train, evaluate = told(reply.to_records()), told(judged.to_records())
    return [
        Decoder("plan", tree(RoundPlan.from_json), (plan.model_dump_json().encode(),), (ValidationError,)),
        Decoder("request", of_records(Request.read), (told(request),)),
        Decoder("training reply", of_records(lambda r: TrainReply.read(r, plan)), (train, told(failure))),
        Decoder("evaluation", of_records(lambda r: EvaluateReply.read(r, looked)), (evaluate, told(failure))),
        Decoder("stage", of_records(StageRequest.read), (told(first.to_records()),)),
        Decoder(
            "stage answer",
            of_records(StageAnswer.read),
            (told(StageAnswer(b"frame", b"vector", b"key").to_records()),),
        ),
    ]


def _rejection() -> Any:
    from lepton_fl.errors import Rejection

    return Rejection.FAILED


def secure() -> list[Decoder]:
    """Of secure aggregation."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from lepton_fl.rounds.secure_device import Offer
    from lepton_fl.secagg import messages as m
    from lepton_fl.secagg.codec import Reader, read_bitmap
    from lepton_fl.secagg.field import unpack
    from lepton_fl.secagg.identity import read_request
    from lepton_strategies.secure_wire import Settings

    n, key, digest = 3, Ed25519PrivateKey.from_private_bytes(bytes(32)), bytes(range(32))
    mine, yours = (X25519PrivateKey.from_private_bytes(bytes([b] * 32)).public_key() for b in (1, 2))
    advert = m.Advert(
        "here", "device", key.public_key().public_bytes_raw(), b"c" * 72, 2**31,
        mine.public_bytes_raw(), yours.public_bytes_raw(), digest,
    ).encode(key)  # fmt: skip
    sealed, committed = m.SEALED_BYTES, 2 * m.COMMITMENT_BYTES
    parts = {d: (bytes(sealed), bytes(committed)) for d in (1, 2)}
    shares = dict.fromkeys((0, 2), bytes(m.SECRET_BYTES))
    seeds = {
        m.Roster: m.Roster(digest, (advert, advert)).encode(),
        m.Shares: m.Shares(digest, 1, bytes((n - 1) * sealed), bytes(n * committed)).encode(key),
        m.Delivery: m.Delivery(digest, 0, frozenset({0, 1, 2}), parts).encode(n),
        m.Upload: m.Upload(digest, 1, digest, digest, frozenset({2})).encode(n, key),
        m.Survivors: m.Survivors(digest, digest, frozenset({0, 2})).encode(n),
        m.Consent: m.Consent(digest, 1, digest).encode(key),
        m.Certificate: m.Certificate(digest, digest, ((0, bytes(64)), (2, bytes(64)))).encode(),
        m.Reveal: m.Reveal(digest, 1, digest, shares).encode(n, key),
    }
    found = [
        Decoder("advert", m.Advert.decode, (advert,)),
        Decoder("advert, unverified", m.Advert.decode_unverified, (advert,)),
        Decoder("roster", m.Roster.decode, (seeds.pop(m.Roster),)),
        Decoder("codec", lambda d: (Reader(d).text(), Reader(d).bitmap(9), read_bitmap(d, 12)), (b"\x02ab",)),
        Decoder("field elements", lambda d: unpack(d[: len(d) // 2 * 2]), (bytes(64),)),
        Decoder("signing request", lambda d: read_request(d, "here"), (bytes(300),)),
        Decoder("offer", text(Offer.from_json), (b'{"run": "r", "encoding": {"kind": "exact"}}',)),
        Decoder("secure settings", text(Settings.from_json), (Settings(True).to_json().encode(),)),
    ]  # fmt: skip
    return found + [
        Decoder(kind.__name__.lower(), lambda data, kind=kind: kind.decode(data, n), (seed,))
        for kind, seed in seeds.items()
    ]


def records() -> list[Decoder]:
    """Of what is kept, exported or delivered."""
    from lepton_fl.compression.card import Card
    from lepton_fl.delivery.manifest import Manifest, parse_desired
    from lepton_fl.delivery.packs import pack, unpack
    from lepton_fl.delivery.trust import check_root
    from lepton_fl.privacy.events import from_json
    from lepton_fl.privacy.head import LedgerHead
    from lepton_fl.privacy.record import read_export
    from lepton_fl.rounds.private import PrivateState
    from lepton_server.audit import parse_head
    from lepton_server.store.events import KINDS, decode_body

    sha, at, bomb = "ab" * 32, b"x" * 300, lzma.compress(bytes(2**20))
    part = {"bytes": 300, "sha256": sha, "chunks": [sha], "packs": []}
    files = [{"name": name, **part} for name in ("card.json", "model.onnx", "parity.safetensors")]
    manifest = {
        "format": "lepton-release/1",
        "task": "t:t",
        "task_version": "1",
        "variant": "v",
        "sequence": 1,
    }
    manifest |= {
        "sequence": 1,
        "published": "2026",
        "profiles": [],
        "lineage": {},
        "chunk_bytes": 1024,
        "files": files,
    }
    state = PrivateState(b"noise", 3, {"a": (1, 2)}).to_bytes()
    head = {"seq": 1, "hash": sha, "key": sha, "signature": sha}
    event = json.dumps({"!": "gaussian", "noise_multiplier": 1.0}).encode()
    body = {"device_id": "a", "run_id": "r", "round": 1, "token_id": "t", "reason": "", "participation": []}

    def decode_all(found: str) -> None:
        for kind in KINDS:
            try:
                decode_body(kind, found)
            except LeptonError:
                continue

    return [
        Decoder("manifest", Manifest.from_bytes, (json.dumps(manifest).encode(),)),
        Decoder("desired state", text(parse_desired), (b"{}", b"")),
        Decoder("pack", lambda d: unpack(d, at, "sub8", 300), (pack(b"y" * 300, at, "sub8"), bomb)),
        Decoder("root of trust", check_root, (b'{"signed": {"_type": "root"}, "signatures": []}',)),
        Decoder("card", Card.from_bytes, (b'{"format": "lepton-variant/1"}',)),
        Decoder("private state", PrivateState.from_bytes, (state,)),
        Decoder("ledger head", tree(LedgerHead.from_json), (json.dumps(head).encode(),)),
        Decoder("privacy event", text(from_json), (event,)),
        Decoder("ledger export", read_export, (b'{"a": 1}\n{"b": 2}\n', b'[{"a": 1}]')),
        Decoder("head", text(parse_head), (b"812:" + sha.encode(),)),
        Decoder("event bodies", text(decode_all), (json.dumps(body).encode(),)),
    ]  # fmt: skip


def peers() -> list[Decoder]:
    """Of what devices and operators send."""
    from google.protobuf.message import DecodeError

    from lepton_fl import crypto
    from lepton_fl.wire import downlink
    from lepton_fl.wire.status import error_from, retry_after, waited_s
    from lepton_fl.wire.v1 import device_pb2 as pb
    from lepton_server import device_service as service
    from lepton_server.flower.frames import cut_content

    key = crypto.new_key()
    csr = crypto.make_csr(key, "x")
    failed = pb.FailedRelease(release="ab" * 32, fault="tampered", detail="why")
    check_in = pb.CheckInRequest(
        protocol=1, status=1, reason="why", client_version="1", adverts=[b"x"], advert_session=b"12345678",
        tasks=[pb.TaskReport(name="t:t", version="1", layout_digest="ab" * 32, ready=True, reason="r")],
        capabilities=pb.Capabilities(cpus=4, memory_bytes=1, os="linux"), desired_digest="ab" * 32,
        serving=pb.Serving(task="t:t", profile="p", release="ab" * 32, failed=[failed]),
        service=pb.Service(release="ab" * 32, requests=5, errors=1, p95_ms=2.0), device_time=1.0,
    )  # fmt: skip
    enroll = pb.EnrollRequest(protocol=1, token_secret=bytes(20), csr_pem=csr, name="n", groups=["a", "b"])

    def read_check_in(data: bytes) -> object:
        request = service._parse(pb.CheckInRequest(), data)
        return (
            service._secrecy(request),
            service._service(request.service),
            service._words("reason", request.reason, 500),
            service._checked_report(request),
        )

    def read_enrolment(data: bytes) -> object:
        request = service._parse(pb.EnrollRequest(), data)
        return service._words("name", request.name, 100), service._labels(request.groups)

    def read_status(found: Any) -> object:
        if not isinstance(found, list) or not all(isinstance(i, list) and len(i) == 2 for i in found):
            return None
        metadata = [(str(k), v if isinstance(v, str) else repr(v).encode()) for k, v in found]
        return error_from("INTERNAL", str(found), metadata), retry_after(metadata), waited_s(metadata, 1.0)

    told_status = json.dumps([["lepton-code", "trust"], ["retry-after", "1.5"], ["lepton-patience", "20"]])
    token = "lepton1." + base64.urlsafe_b64encode(b'{"addr":"a:1","ca":"","check":"","secret":""}').decode()
    sha, rows = hashlib.sha256(bytes(300)).hexdigest(), bytes(300)
    packed = downlink.pack(rows), downlink.pack(rows, sha, rows), downlink.pack(bytes(2**20))
    push = b"\x0a\x04\x08\x01\x10\x02\x12\x05hello"
    return [
        Decoder("check-in", read_check_in, (check_in.SerializeToString(),)),
        Decoder("enrolment", read_enrolment, (enroll.SerializeToString(),)),
        Decoder("certificate request", crypto.verify_csr, (csr,)),
        Decoder("private key", crypto.key_from_pem, (crypto.key_to_pem(key),)),
        Decoder("public key", crypto.public_from_der, (crypto.public_der(key.public_key()),)),
        Decoder("join token", text(crypto.parse_join_token), (token.encode(),)),
        Decoder("status", tree(read_status), (told_status.encode(),)),
        Decoder("packed object", lambda data: downlink.unpack(data, sha, {sha: bytes(300)}.get), packed),
        Decoder("object frame", lambda data: cut_content(bytearray(data)), (push,), (DecodeError,)),
    ]


@cache
def decoders() -> dict[str, Decoder]:
    """All of them by name."""
    found = [*messages(), *secure(), *records(), *peers()]
    return {decoder.name: decoder for decoder in found}


NAMES = [
    "plan", "request", "training reply", "evaluation", "stage", "stage answer", "advert",
    "advert, unverified", "roster", "codec", "field elements", "signing request", "offer", "secure settings",
    "shares", "delivery", "upload", "survivors", "consent", "certificate", "reveal", "manifest",
    "desired state", "pack", "root of trust", "card", "private state", "ledger head", "privacy event",
    "ledger export", "head", "event bodies", "check-in", "enrolment", "certificate request", "private key",
    "public key", "join token", "status", "packed object", "object frame",
]  # fmt: skip


# --- mutations ------------------------------------------------------------------------------------------


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Something like a good input: a few places of its JSON, or of its bytes, are others."""
    if seed[:1] in (b"{", b"[") and rng.random() < 0.7:
        try:
            found = json.loads(seed)
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                found = _other_tree(found, rng)
            return json.dumps(found).encode("utf-8", "surrogatepass")[: 8 * LONGEST]
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data = _other_bytes(data, rng)
    return bytes(data[: 2 * LONGEST])


def _other_tree(found: Any, rng: random.Random) -> Any:
    inside = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    keys = [key for key, _ in inside]
    act = rng.random()
    if not keys or act < 0.15:
        return rng.choice(NASTY)
    copy, key = (dict(found) if isinstance(found, dict) else list(found)), rng.choice(keys)
    if act < 0.25:
        del copy[key]
    elif act < 0.35 and isinstance(copy, dict):
        copy[rng.choice(("", "x", "format", "__class__", str(key) + "x"))] = rng.choice(NASTY)
    elif act < 0.35:
        copy.insert(rng.randrange(len(copy) + 1), rng.choice(NASTY))
    else:
        copy[key] = _other_tree(copy[key], rng)
    return copy


def _other_bytes(data: bytearray, rng: random.Random) -> bytearray:
    at, act = rng.randrange(len(data) + 1), rng.randrange(7)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 32)))
    if act == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif act == 1:
        data[at:end] = rng.randbytes(end - at)
    elif act == 2:
        del data[at:end]
    elif act == 3:
        data[at:at] = data[at:end] * rng.choice((1, 2, 50))
    elif act == 4:
        data[at:end] = rng.choice((b"\xff", b"\x00", b"\x7f\xff\xff\xff", b"[", b'"', b"-1", b"1e999"))
    elif act == 5:
        del data[at:]
    else:
        data[at:at] = rng.choice((b"[", b"(", b"\x0a", b"\xff")) * rng.choice((1, 10, 3000))
    return data


# --- in the suite ---------------------------------------------------------------------------------------


def test_the_names_are_those_of_all_decoders():
    assert list(decoders()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_gives_a_value_or_an_error_that_it_names(name):
    decoder = decoders()[name]
    inputs = st.one_of(
        st.binary(max_size=300),
        st.builds(mutated, st.sampled_from(decoder.seeds), st.randoms(use_true_random=False)),
    )

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def holds(data: bytes) -> None:
        decoder.try_one(data)

    for seed in decoder.seeds:
        decoder.try_one(seed)
    holds()


def test_a_run_in_a_process_with_little_memory():
    run = [sys.executable, __file__, "--inputs", "2000", "--unguided"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_found_is_shown_with_its_input(capsys):
    broken = Decoder("broken", lambda data: data[10], (b"0123456789a",))
    with pytest.raises(IndexError):
        fuzz(broken, 200, 0)
    assert "broken: IndexError" in capsys.readouterr().err


# --- a long run -----------------------------------------------------------------------------------------


def fuzz(decoder: Decoder, inputs: int, seed: int) -> None:
    """Many inputs; the first that brings another error than those allowed is printed, and raises."""
    rng = random.Random(f"{seed} {decoder.name}")
    for number in range(inputs):
        data = (
            rng.randbytes(rng.randrange(64)) if number % 20 == 0 else mutated(rng.choice(decoder.seeds), rng)
        )
        try:
            decoder.try_one(data)
        except Exception as error:
            print(f"{decoder.name}: {type(error).__name__}: {error}\ninput: {data.hex()}", file=sys.stderr)
            raise


def guided(name: str, inputs: int, seed: int, corpus: str) -> None:
    """The same by atheris, which looks for inputs that reach more of the code; ends the process."""
    import atheris  # only where it is installed

    with atheris.instrument_imports(include=["lepton_fl", "lepton_server", "lepton_strategies"]):
        decoder = decoders()[name]
    bound_memory()
    rng = random.Random(seed)

    def mutate(data: bytes, most: int, _: int) -> bytes:
        return (mutated(data, rng) if rng.random() < 0.5 else bytes(atheris.Mutate(data, len(data))))[:most]

    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={LONGEST}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, corpus], decoder.try_one, custom_mutator=mutate)
    atheris.Fuzz()


def guided_apart(name: str, inputs: int, seed: int) -> int:
    """``guided`` in a process of its own; returns its exit code, 0 if nothing was found."""
    with tempfile.TemporaryDirectory() as folder:
        for number, good in enumerate(decoders()[name].seeds):
            Path(folder, str(number)).write_bytes(good)
        own = ["--only", name, "--inputs", str(inputs), "--seed", str(seed), "--corpus", folder]
        done = subprocess.run(
            [sys.executable, __file__, *own], stderr=subprocess.PIPE, cwd=folder, check=False
        )
        if done.returncode:
            sys.stderr.write(done.stderr.decode(errors="replace")[-5000:])
        return done.returncode


def bound_memory() -> None:
    """An allocation that a few bytes ask for fails, and so the run."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all decoders together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--unguided", action="store_true", help="mutations only, even where atheris is")
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only or NAMES
    each = -(-options.inputs // len(names))
    if options.corpus:
        guided(names[0], each, options.seed, options.corpus)
    follow = not options.unguided and importlib.util.find_spec("atheris") is not None
    decoders()
    bound_memory()
    for name in names:
        began = time.monotonic()
        if follow:
            if code := guided_apart(name, each, options.seed):
                return code
        else:
            fuzz(decoders()[name], each, options.seed)
        how = "guided by coverage" if follow else "mutated"
        print(f"{name}: {each:,} inputs, {how}, in {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
