"""Whole rounds with pinned randomness, byte for byte, reproduced by a second implementation.

``tests/vectors/flsa-1-*.json`` hold every message of a round. ``Reference`` below is written from the
description of the protocol: Python integers, byte concatenation, AES-CTR, one share at a time. It shares
no code with the library but the primitives of ``cryptography``. A change of these files is a new protocol.

    LEPTON_WRITE_VECTORS=1 pytest tests/lepton_fl/secagg/test_secagg_transcripts.py    # writes them anew
"""

import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lepton_fl.secagg.server import Stage

FOLDER = Path(__file__).resolve().parents[2] / "vectors"
PRIME = 65521
STAGES = [None, Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS, Stage.REVEALS]
CASES = {
    f"flsa-1-n{n}-b{bits}-{'all' if stage is None else 'drop-' + stage.name.lower()}": (n, bits, stage)
    for bits in (16, 32)
    for n in (5, 7)
    for stage in STAGES
}


def transcript(make, name):
    n, bits, stage = CASES[name]
    cohort = make(n=n, bits=bits, d=9, name=name)
    outcome = cohort.run({} if stage is None else {"d002": stage})
    log = cohort.log
    hexed = {
        k: {d: m.hex() for d, m in log[k].items()} for k in ("shares", "deliveries", "consents", "reveals")
    }
    return {
        "name": name,
        "n": n,
        "bits": bits,
        "length": cohort.context.length,
        "silent_from": {} if stage is None else {"d002": int(stage)},
        "context": cohort.context.digest.hex(),
        "roster": log["roster"].hex(),
        **hexed,
        "vectors": {d: body.hex() for d, (_, body) in log["uploads"].items()},
        "uploads": {d: tail.hex() for d, (tail, _) in log["uploads"].items()},
        "survivors": log["survivors"].hex(),
        "certificate": log["certificate"].hex(),
        "members": list(outcome.survivors),
        "total": outcome.total.tobytes().hex(),
    }


@pytest.mark.parametrize("name", CASES)
def test_the_library_reproduces_the_transcript(make, name):
    got = transcript(make, name)
    path = FOLDER / f"{name}.json"
    if os.environ.get("LEPTON_WRITE_VECTORS"):
        path.write_text(json.dumps(got, indent=1) + "\n")
    assert got == json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_second_implementation_reproduces_the_transcript(name):
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    got = Reference(expected).run()
    assert got == {key: expected[key] for key in got}


def test_nothing_else_lies_there():
    assert {path.stem for path in FOLDER.glob("flsa-1-*.json")} == set(CASES)


# --- the second implementation ----------------------------------------------------------------------------


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def u16(value):
    return value.to_bytes(2, "big")


def text(value):
    return bytes([len(value)]) + value.encode()


def hkdf(secret, salt, info, length=32):
    key = hmac.new(salt or bytes(32), secret, "sha256").digest()
    out, block, i = b"", b"", 1
    while len(out) < length:
        block = hmac.new(key, block + b"flsa/1 " + info + bytes([i]), "sha256").digest()
        out, i = out + block, i + 1
    return out[:length]


def ctr(seed, count):
    """Masks of less than a segment."""
    start = bytes(12) + (2).to_bytes(4, "big")
    return Cipher(algorithms.AES(seed), modes.CTR(start)).encryptor().update(bytes(count))


def bits_of(members, n):
    return sum(1 << m for m in members).to_bytes((n + 7) // 8, "little")


def frame(number, *parts):
    return b"flsa\x01" + bytes([number]) + b"".join(parts)


class Stream:
    def __init__(self, seed):
        self.seed, self.counter, self.rest = seed.encode(), 0, b""

    def __call__(self, count):
        out = bytearray()
        while len(out) < count:
            if not self.rest:
                self.rest = sha(self.seed, self.counter.to_bytes(8, "big"))
                self.counter += 1
            out.append(self.rest[0])
            self.rest = self.rest[1:]
        return bytes(out)

    def elements(self, count):
        kept = []
        while len(kept) < count:
            missing = count - len(kept)
            words = self(2 * missing)
            values = [int.from_bytes(words[2 * i : 2 * i + 2], "little") for i in range(missing)]
            kept += [v for v in values if v < PRIME]
        return kept


class Device:
    def __init__(self, name, device):
        self.device = device
        self.sign = Ed25519PrivateKey.from_private_bytes(Stream(f"sign/{device}")(32))
        self.random = Stream(f"{name}/{device}")
        self.e = X25519PrivateKey.from_private_bytes(self.random(32))
        self.b, self.m = self.random.elements(16), self.random.elements(16)
        self.bp, mp = packed(self.b), packed(self.m)
        self.k = X25519PrivateKey.from_private_bytes(hkdf(mp, b"", b"mask key"))
        self.pe, self.pk = (k.public_key().public_bytes_raw() for k in (self.e, self.k))
        cb = sha(b"flsa/1 self commitment\0", text("lab"), text(device), self.pe, self.pk, self.bp)
        verify_key = self.sign.public_key().public_bytes_raw()
        expires = (4_000_000_000).to_bytes(8, "big")
        body = text("lab") + text(device) + verify_key + u16(0) + expires + self.pe + self.pk + cb
        self.advert = self.signed(frame(1, body))

    def signed(self, data):
        return data + self.sign.sign(data)


def packed(elements):
    return b"".join(e.to_bytes(2, "little") for e in elements)


def agree(mine, theirs):
    return mine.exchange(X25519PublicKey.from_public_bytes(theirs))


class Reference:
    def __init__(self, case):
        self.case, self.n, self.bits = case, case["n"], case["bits"]
        self.devices = [Device(case["name"], f"d{i:03}") for i in range(self.n)]
        self.quorum, self.threshold = 2 * self.n // 3 + 1, self.n // 2 + 1
        size = case["length"] * self.bits // 8
        words = Stream(case["name"] + "/inputs")(self.n * size)
        self.inputs = [self.numbers(words[i * size : (i + 1) * size]) for i in range(self.n)]

    def numbers(self, data):
        step = self.bits // 8
        return [int.from_bytes(data[i : i + step], "little") for i in range(0, len(data), step)]

    def bytes_of(self, numbers):
        return b"".join(v.to_bytes(self.bits // 8, "little") for v in numbers)

    def here(self, stage):
        silent = self.case["silent_from"]
        return [i for i in range(self.n) if silent.get(f"d{i:03}", 99) > stage]

    def run(self):
        n, devices, context = self.n, self.devices, bytes.fromhex(self.case["context"])
        adverts = b"".join(u16(len(d.advert)) + d.advert for d in devices)
        roster = frame(2, context, u16(n), adverts)
        self.r = r = sha(b"flsa/1 roster\0", roster)
        out = {"roster": roster.hex()}

        dealers = self.here(3)
        shares, sealed, promised = {}, {}, {}
        for i in dealers:
            shares[i] = self.share(devices[i])
            for j in range(n):
                promised[i, j] = b"".join(
                    sha(b"flsa/1 share commitment\0", r, u16(i), u16(j), half, part)[:16]
                    for half, part in zip((b"b", b"m"), shares[i][j], strict=True)
                )
                if j != i:
                    key = hkdf(agree(devices[i].e, devices[j].pe), r, b"seal" + u16(i) + u16(j))
                    plain, extra = b"".join(shares[i][j]), b"share" + r + u16(i) + u16(j)
                    sealed[i, j] = AESGCM(key).encrypt(bytes(12), plain, extra)
        out["shares"] = {
            devices[i].device: devices[i]
            .signed(
                frame(
                    3,
                    r,
                    u16(i),
                    *(sealed[i, j] for j in range(n) if j != i),
                    *(promised[i, j] for j in range(n)),
                )
            )
            .hex()
            for i in dealers
        }

        uploaders = [i for i in self.here(5) if i in dealers]
        r1 = bits_of(dealers, n)
        r1_name = sha(b"flsa/1 dealers\0", r, r1)
        out["deliveries"], out["vectors"], out["uploads"], masked = {}, {}, {}, {}
        for j in uploaders:
            parts = (sealed[i, j] + promised[i, j] for i in dealers if i != j)
            out["deliveries"][devices[j].device] = frame(4, r, u16(j), r1, *parts).hex()
            masked[j] = self.masked(j, dealers)
            body = self.bytes_of(masked[j])
            tail = frame(5, r, u16(j), r1_name, sha(body), bits_of([], n))
            out["vectors"][devices[j].device] = body.hex()
            out["uploads"][devices[j].device] = devices[j].signed(tail).hex()

        survivors = frame(6, r, r1_name, bits_of(uploaders, n))
        name = sha(b"flsa/1 survivors\0", context, survivors)
        consents = {i: devices[i].signed(frame(7, r, u16(i), name)) for i in self.here(7) if i in uploaders}
        first = sorted(consents)[: self.quorum]
        signatures = b"".join(u16(i) + consents[i][-64:] for i in first)
        out["survivors"] = survivors.hex()
        out["consents"] = {devices[i].device: m.hex() for i, m in consents.items()}
        out["certificate"] = frame(8, r, name, u16(len(first)), signatures).hex()

        revealers = [i for i in self.here(9) if i in uploaders]
        out["reveals"] = {}
        for j in revealers:
            parts = (shares[i][j][0 if i in uploaders else 1] for i in dealers)
            body = frame(9, r, u16(j), name, bits_of(dealers, n), *parts)
            out["reveals"][devices[j].device] = devices[j].signed(body).hex()

        out["members"] = [devices[i].device for i in uploaders]
        out["total"] = self.bytes_of(self.unmask(masked, shares, dealers, uploaders, revealers)).hex()
        return out

    def share(self, device):
        secrets = device.b + device.m
        drawn = device.random.elements((self.threshold - 1) * 32)
        higher = [drawn[row * 32 : (row + 1) * 32] for row in range(self.threshold - 1)]
        out = []
        for x in range(1, self.n + 1):
            values = [
                (secrets[limb] + sum(higher[row][limb] * x ** (row + 1) for row in range(self.threshold - 1)))
                % PRIME
                for limb in range(32)
            ]
            out.append((packed(values[:16]), packed(values[16:])))
        return out

    def pair(self, key, theirs, i, j):
        info = b"pair mask" + u16(min(i, j)) + u16(max(i, j))
        return self.numbers(ctr(hkdf(agree(key, theirs), self.r, info, 40)[:32], self.size()))

    def own(self, packed_b):
        return self.numbers(ctr(hkdf(packed_b, self.r, b"self mask"), self.size()))

    def size(self):
        return self.case["length"] * self.bits // 8

    def add(self, a, b, sign):
        return [(x + sign * y) % 2**self.bits for x, y in zip(a, b, strict=True)]

    def masked(self, i, dealers):
        me = self.devices[i]
        y = self.add(self.inputs[i], self.own(me.bp), 1)
        for j in dealers:
            if j != i:
                y = self.add(y, self.pair(me.k, self.devices[j].pk, i, j), 1 if i < j else -1)
        return y

    def recover(self, parts):
        """Lagrange at zero, limb by limb; parts: x -> packed share."""
        points = sorted(parts)[: self.threshold]
        secret = []
        for limb in range(16):
            value = 0
            for x in points:
                term = int.from_bytes(parts[x][2 * limb : 2 * limb + 2], "little")
                for other in points:
                    if other != x:
                        term = term * other * pow(other - x, -1, PRIME) % PRIME
                value += term
            secret.append(value % PRIME)
        return packed(secret)

    def unmask(self, masked, shares, dealers, members, revealers):
        total = [0] * self.case["length"]
        for i in members:
            total = self.add(total, masked[i], 1)
        for i in members:
            b = self.recover({j + 1: shares[i][j][0] for j in revealers})
            total = self.add(total, self.own(b), -1)
        for i in set(dealers) - set(members):
            m = self.recover({j + 1: shares[i][j][1] for j in revealers})
            key = X25519PrivateKey.from_private_bytes(hkdf(m, b"", b"mask key"))
            for j in members:
                total = self.add(total, self.pair(key, self.devices[j].pk, i, j), -1 if j < i else 1)
        assert total == [sum(self.inputs[i][k] for i in members) % 2**self.bits for k in range(len(total))]
        return total
