"""Secure aggregation in a simulation: the whole protocol, or what it must compute.

``engine.secure_aggregation = "full"`` gives every virtual device of the cohort a real session: keys, shares,
masks, signatures. ``"ideal"`` adds the same integers plainly. The weights are the same, bit for bit, if
devices are trained alike (``engine.tier = "lean"``, or 16 bits): the protocol needs every update by itself,
so devices train one by one, and other engines round differently in chunks.

Devices leave where the world says so, before their vector has come. Keys are the operating system's; the
sum does not depend on them. One process sees all its devices, so nothing here protects anybody.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.privacy.noise import Keystream, simulation_key
from lepton_fl.rounds.collect import Clock, Collected, Finish
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.secure import (
    IdealRounds,
    SecureRounds,
    Told,
    collect_secure,
    context_of,
    encode_reply,
    encoding_of,
    groups_of,
    read_reply,
)
from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy
from lepton_fl.secagg.context import LEAST_COHORT
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Pinned
from lepton_fl.secagg.rehearsal import Member, make_members
from lepton_fl.secagg.server import Stage
from lepton_fl.secagg.uploads import MemorySpool
from lepton_fl.wire.messages import Request
from lepton_simulations.config import SimulationConfig

DEPLOYMENT = "simulation"


def secure_rounds(config: SimulationConfig) -> SecureRounds | None:
    """How a scenario's secure rounds are collected; None where nothing is to be hidden.

    Raises:
        ConfigError: the scenario has attackers, whom the protocol would not stop and this simulation would.
    """
    if config.run.secure_aggregation == "off":
        return None
    if config.faults.malicious:
        raise ConfigError(
            "faults.malicious does not go with run.secure_aggregation = 'required' in a simulation.",
            hint="A masked vector cannot be checked: show attacks with secure_aggregation = 'off'.",
        )
    seed = config.engine.seed

    def random_of(plan: RoundPlan, device: str) -> Random:
        name = f"rounding {seed} {plan.round} {plan.attempt} {device}"
        return np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).bytes

    def stream_of(plan: RoundPlan, device: str) -> Keystream:
        return Keystream(simulation_key("share", seed, plan.round, plan.attempt, device))

    kind = IdealRounds if config.engine.secure_aggregation == "ideal" else FullRounds
    return kind(random_of, stream_of)


def one_by_one(config: SimulationConfig) -> bool:
    """Whether every device's update is needed by itself."""
    run = config.run
    if run.secure_aggregation == "off":
        return False
    return config.engine.secure_aggregation == "full" or run.secure.bits == 16


class FullRounds:
    """Rounds with a real session for every device and for the coordinator."""

    def __init__(
        self,
        random_of: Callable[[RoundPlan, str], Random],
        stream_of: Callable[[RoundPlan, str], Keystream | None] = lambda plan, device: None,
    ) -> None:
        """Prepare; see ``IdealRounds``."""
        self._random_of, self._stream_of = random_of, stream_of

    def collect(
        self,
        plan: RoundPlan,
        request: Request,
        exchange: Exchange,
        clock: Clock,
        finish: Finish | None = None,
    ) -> tuple[Collected, NDArray[np.float64] | None]:
        """See ``SecureRounds``."""
        members, trust = make_members(plan.cohort, DEPLOYMENT, os.urandom)
        devices = _Devices(plan, request, exchange, self._random_of, self._stream_of, members, trust)
        return collect_secure(
            plan,
            request,
            devices.ask,
            trust,
            DEPLOYMENT,
            clock=clock,
            now=lambda: 0.0,  # nothing expires
            spool=devices.spool,
            tell=devices.tell,
            finish=finish,
        )


@dataclass
class _Devices:
    """The virtual devices of an attempt, and their sessions."""

    plan: RoundPlan
    request: Request
    exchange: Exchange
    random_of: Callable[[RoundPlan, str], Random]
    stream_of: Callable[[RoundPlan, str], Keystream | None]
    members: list[Member]
    trust: Pinned
    spool: MemorySpool = field(default_factory=MemorySpool)

    def __post_init__(self) -> None:
        contexts = {
            device: context_of(self.plan, self.request, DEPLOYMENT, cohort)
            for cohort, devices in enumerate(groups_of(self.plan))
            for device in devices
        }
        policy = Policy(LEAST_COHORT, hidden_graph=True)  # nobody is protected here
        self._sessions = {
            m.device: ClientSession(
                contexts[m.device], m.prekey, m.signing, self.trust, MemoryLedger(), policy
            )
            for m in self.members
        }

    def tell(self, device: str, refusal: UpdateRejected | None) -> None:
        """Pass on what became of a vector; the added are needed no more, for nobody complains here."""
        self.exchange.tell(self.plan, device, refusal)
        self.spool.discard(device)
        self._sessions[device].release()

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        """All devices answer at once, but with their vectors: these come when the world says so."""
        if stage is Stage.ADVERTS:
            yield from (Told(m.device, m.prekey.advert) for m in self.members if m.device in messages)
            return
        if stage is Stage.UPLOADS:
            yield from self._train(messages)
            return
        for device, message in messages.items():
            session = self._sessions[device]
            if stage is Stage.SHARES:
                yield Told(device, session.share_keys(message, os.urandom, 0.0))
            elif stage is Stage.CONSENTS:
                yield Told(device, session.consent(message))
            else:
                yield Told(device, session.reveal(message))

    def _train(self, deliveries: Mapping[str, bytes]) -> Generator[Told, None, None]:
        encoding = encoding_of(self.plan)
        for device, delivery in deliveries.items():
            self._sessions[device].deliver(delivery)
        with closing(self.exchange.ask(self.plan, self.request)) as answers:
            for answer in answers:
                device = answer.device_id  # type: ignore[union-attr]  # asked one by one: no sums
                try:
                    reply = read_reply(answer, self.plan)  # type: ignore[arg-type]  # as above
                    random, stream = self.random_of(self.plan, device), self.stream_of(self.plan, device)
                    vector = encode_reply(self.plan, encoding, reply, random, stream)
                except UpdateRejected as refusal:  # by the device's own software
                    yield Told(device, refusal)
                    continue
                tail, masked = self._sessions[device].mask(vector)
                yield Told(device, tail, masked, reply.seconds, len(tail) + len(masked))
