"""A cohort with pinned randomness, driven stage by stage."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy, Prekey
from lepton_fl.secagg.context import RoundContext, Rules
from lepton_fl.secagg.encoding import Exact
from lepton_fl.secagg.identity import Pinned
from lepton_fl.secagg.server import ServerSession, Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool

FAR = 4_000_000_000  # seconds since 1970
NOW = 1_800_000_000.0


class Stream:
    """Bytes that a seed pins: SHA-256 of the seed and a counter."""

    def __init__(self, seed: str) -> None:
        self._seed, self._counter, self._rest = seed.encode(), 0, b""

    def __call__(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += hashlib.sha256(self._seed + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


class Cohort:
    """n devices and a coordinator; every stage can leave devices out or have its messages changed."""

    def __init__(
        self,
        n=5,
        d=12,
        bits=32,
        name="cohort",
        rules=None,
        ledgers=None,
        advertise=True,
        devices=None,
        **context,
    ):
        self.devices = devices or [f"d{i:03}" for i in range(n)]
        encoding = Exact(d, n, 1, 10, bits=bits)
        rules = rules or Rules(min_cohort=min(n, 16))
        fields = {"run": "run", "round": 3, "attempt": 1, "model": bytes(32)} | context
        self.context = RoundContext("lab", request=bytes(range(32)), encoding=encoding, rules=rules, **fields)
        self.streams = {d: Stream(f"{name}/{d}") for d in self.devices}
        self.signing = {
            d: Ed25519PrivateKey.from_private_bytes(Stream(f"sign/{d}")(32)) for d in self.devices
        }
        self.trust = Pinned({d: k.public_key().public_bytes_raw() for d, k in self.signing.items()})
        self.ledgers = ledgers or {d: MemoryLedger() for d in self.devices}
        self.prekeys = {
            d: Prekey.make(d, "lab", self.signing[d], b"", FAR, self.streams[d]) for d in self.devices
        }
        self.sessions = {d: self.session(d) for d in self.devices}
        words = Stream(f"{name}/inputs")(n * self.context.upload_bytes)
        inputs = np.frombuffer(words, f"<u{bits // 8}").reshape(n, -1)
        self.inputs = dict(zip(self.devices, inputs, strict=True))
        self.spool, self.records = MemorySpool(), []
        self.server = ServerSession(self.context, self.trust, Intake(self.context, self.spool))
        self.log: dict[str, object] = {}
        if advertise:
            for d in self.devices:
                self.accept(d, self.prekeys[d].advert)
            self.close()

    def session(self, device, policy=None, context=None, prekey=None):
        return ClientSession(
            context or self.context,
            prekey or self.prekeys[device],
            self.signing[device],
            self.trust,
            self.ledgers[device],
            policy or Policy(self.context.rules.min_cohort, True),
        )

    def accept(self, device, message):
        self.server.accept(device, message, NOW, self.records.append)

    def close(self):
        return self.server.close(self.records.append)

    def share(self, who=None, send=True):
        roster = self.server.roster()
        made = {d: self.sessions[d].share_keys(roster, self.streams[d], NOW) for d in who or self.devices}
        if send:
            for d, message in made.items():
                self.accept(d, message)
        return made

    def deliver(self, who=None):
        made = {d: self.server.delivery(d) for d in who or self.devices}
        for d, message in made.items():
            self.sessions[d].deliver(message)
        return made

    def upload(self, who=None, send=True):
        made = {}
        for d in who or self.devices:
            tail, body = self.sessions[d].mask(self.inputs[d].copy())
            made[d] = (tail, bytes(body))
            if send:
                self.server.chunk(d, 0, bytes(body))
                self.accept(d, tail)
        return made

    def consent(self, who=None):
        made = {d: self.sessions[d].consent(self.server.survivors()) for d in who or self.devices}
        for d, message in made.items():
            self.accept(d, message)
        return made

    def reveal(self, who=None):
        made = {d: self.sessions[d].reveal(self.server.certificate()) for d in who or self.devices}
        for d, message in made.items():
            self.accept(d, message)
        return made

    def to(self, stage):
        """Run until the coordinator is in this stage, everybody answering."""
        while self.server.stage < stage:
            match self.server.stage:
                case Stage.SHARES:
                    self.share()
                case Stage.UPLOADS:
                    self.deliver()
                    self.upload()
                case Stage.CONSENTS:
                    self.consent()
            self.close()
        return self

    def run(self, drops=None):
        """A whole round; ``drops`` maps a device to the first stage for which it does not answer."""
        drops = drops or {}

        def here(stage):
            expected = self.server.expected()
            return [d for d in self.devices if d in expected and drops.get(d, Stage.DONE) > stage]

        self.log["roster"] = self.server.roster()
        self.log["shares"] = self.share(here(Stage.SHARES))
        self.close()
        alive = here(Stage.UPLOADS)
        self.log["deliveries"] = self.deliver(alive)
        self.log["uploads"] = self.upload(alive)
        self.close()
        self.log["survivors"] = self.server.survivors()
        self.log["consents"] = self.consent(here(Stage.CONSENTS))
        self.close()
        self.log["certificate"] = self.server.certificate()
        self.log["reveals"] = self.reveal(here(Stage.REVEALS))
        return self.server.finish()

    def plain_sum(self, devices):
        return sum((self.inputs[d] for d in devices), np.zeros_like(self.inputs[self.devices[0]]))


@pytest.fixture
def make():
    """The class itself: ``make(n=7)`` is a cohort whose roster is closed."""
    return Cohort


@pytest.fixture
def stream():
    return Stream
