"""Secure aggregation in a simulation: the whole protocol, or what it must compute.

``engine.secure_aggregation = "full"`` gives every virtual device of the cohort a real session: keys, shares,
masks, signatures. ``"ideal"`` adds the same integers plainly. The weights are the same, bit for bit, where
the same integers go in. The protocol needs every update by itself, so devices then train one by one; engines
other than "lean" train a chunk in one matrix product, whose floats round by who is in it, before any integer
is made. ``engine.one_by_one`` lets everybody train alike, with and without secure aggregation.

Devices leave where the world says so, at any stage, and may repeat themselves, be late, or break the
protocol. Keys are the operating system's; the sum does not depend on them. One process sees all its devices,
so nothing here protects anybody.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, TrustError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.privacy.noise import Keystream, simulation_key
from lepton_fl.rounds.collect import Clock, Collected, Finish
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.secure import SecureRounds, Told, collect_secure
from lepton_fl.rounds.secure_ideal import IdealRounds, read_reply
from lepton_fl.rounds.secure_sum import context_of, encode_reply, encoding_of, groups_of
from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy
from lepton_fl.secagg.context import LEAST_COHORT
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Pinned
from lepton_fl.secagg.keys import SEALED_BYTES
from lepton_fl.secagg.messages import Reveal, Roster, Shares
from lepton_fl.secagg.rehearsal import Member, make_members
from lepton_fl.secagg.server import Stage
from lepton_fl.secagg.uploads import MemorySpool
from lepton_fl.wire.messages import Request
from lepton_simulations.config import SimulationConfig
from lepton_simulations.world import World

DEPLOYMENT = "simulation"


def refuse_secure(config: SimulationConfig) -> None:
    """Refuse what this simulation of secure rounds cannot show.

    Raises:
        ConfigError: the scenario has attackers, whom the protocol would not stop and this simulation would;
            or devices that break the protocol, where only its result is computed.
    """
    if config.run.secure_aggregation == "off":
        return
    faults = config.faults
    if faults.malicious:
        raise ConfigError(
            "faults.malicious does not go with run.secure_aggregation = 'required' in a simulation.",
            hint="A masked vector cannot be checked: show attacks with secure_aggregation = 'off'.",
        )
    if config.engine.secure_aggregation == "ideal" and (faults.bad_shares or faults.wrong_shares):
        raise ConfigError(
            "faults.bad_shares and faults.wrong_shares need engine.secure_aggregation = 'full'.",
            hint="The ideal functionality has no messages that could be wrong.",
        )


def secure_rounds(config: SimulationConfig, world: World) -> SecureRounds | None:
    """How a scenario's secure rounds are collected; None where nothing is to be hidden."""
    if config.run.secure_aggregation == "off":
        return None
    seed, random_of = config.engine.seed, rounding(config.engine.seed)

    def stream_of(plan: RoundPlan, device: str) -> Keystream:
        return Keystream(simulation_key("share", seed, plan.round, plan.attempt, device))

    def leaves(plan: RoundPlan) -> dict[str, Stage]:
        return {device: Stage[stage.upper()] for device, stage in world.leaves(plan).items()}

    if config.engine.secure_aggregation == "full":
        return FullRounds(random_of, stream_of, world)
    return IdealRounds(random_of, stream_of, leaves)


def rounding(seed: int) -> Callable[[RoundPlan, str], Random]:
    """What every device of a scenario rounds its updates with: the same, whoever adds them up."""

    def random_of(plan: RoundPlan, device: str) -> Random:
        name = f"rounding {seed} {plan.round} {plan.attempt} {device}"
        return np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).bytes

    return random_of


def one_by_one(config: SimulationConfig) -> bool:
    """Whether every device's update is needed by itself."""
    run = config.run
    if config.engine.one_by_one or run.quantisation or run.cohort.is_corrected:
        return True
    if run.secure_aggregation == "off":
        return False
    several = len(run.secure.sums(run.most_asked)) > 1
    return config.engine.secure_aggregation == "full" or run.secure.bits < 32 or several


class FullRounds:
    """Rounds with a real session for every device and for the coordinator."""

    def __init__(
        self,
        random_of: Callable[[RoundPlan, str], Random],
        stream_of: Callable[[RoundPlan, str], Keystream | None],
        world: World,
    ) -> None:
        """Prepare; see ``IdealRounds``.

        Args:
            random_of: the randomness that a device rounds with, for fewer than 32 bits.
            stream_of: of the noise that a device adds; None = fresh.
            world: says who falls silent, repeats itself or breaks the protocol.
        """
        self._random_of, self._stream_of, self._world = random_of, stream_of, world

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
        devices = _Devices(
            plan, request, exchange, self._random_of, self._stream_of, self._world, members, trust
        )
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
    world: World
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
        self._leaves = self.world.leaves(self.plan)
        self._dealing, self._lying = self.world.cheats("bad_shares"), self.world.cheats("wrong_shares")
        self._late: dict[tuple[Stage, str], Told] = {}
        self._adverts = {m.device: m.prekey.advert for m in self.members}
        self._signing = {m.device: m.signing for m in self.members}
        self._sizes: dict[str, int] = {}  # of a device's roster

    def tell(self, device: str, refusal: UpdateRejected | None) -> None:
        """Pass on what became of a vector; one that is added is kept only where complaints can come."""
        self.exchange.tell(self.plan, device, refusal)
        if not self._dealing:
            self.spool.discard(device)
        self._sessions[device].release()

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        """All devices answer at once, but with their vectors: these come when the world says so.

        Who falls silent at a stage may answer when it is over: that must change nothing.
        """
        late, self._late = self._late, {}
        yield from (told for (before, _), told in late.items() if before < stage)
        if stage is Stage.UPLOADS:
            yield from self._train(messages)
            return
        name, repeated = stage.name.lower(), self.world.repeated(self.plan, stage.name)
        for device, message in messages.items():
            told = self._answer(stage, device, message)
            if self._leaves.get(device) == name:
                self._late[stage, device] = told
                continue
            yield told
            if device in repeated:
                yield told

    def _answer(self, stage: Stage, device: str, message: bytes) -> Told:
        session = self._sessions[device]
        try:
            if stage is Stage.ADVERTS:
                return _told(device, self._adverts[device])
            if stage is Stage.SHARES:
                self._sizes[device] = len(Roster.decode(message).adverts)
                shares = session.share_keys(message, os.urandom, 0.0)
                return _told(device, self._garbled(device, shares) if device in self._dealing else shares)
            if stage is Stage.CONSENTS:
                return _told(device, session.consent(message))
            revealed = session.reveal(message)
            return _told(device, self._falsified(device, revealed) if device in self._lying else revealed)
        except TrustError as refusal:
            return Told(device, UpdateRejected(Rejection.FAILED, str(refusal)))

    def _garbled(self, device: str, message: bytes) -> bytes:
        """Shares that a third and one more cannot open, rightly signed: enough to be found out."""
        n = self._sizes[device]
        honest = Shares.decode(message, n)
        bad = SEALED_BYTES * (n // 3 + 1)
        garbage = replace(honest, sealed=os.urandom(bad) + honest.sealed[bad:])
        return garbage.encode(self._signing[device])

    def _falsified(self, device: str, message: bytes) -> bytes:
        """Shares that are not those that were dealt, rightly signed."""
        n = self._sizes[device]
        honest = Reveal.decode(message, n)
        false = {dealer: bytes(len(part)) for dealer, part in honest.shares.items()}
        return replace(honest, shares=false).encode(n, self._signing[device])

    def _train(self, deliveries: Mapping[str, bytes]) -> Generator[Told, None, None]:
        encoding = encoding_of(self.plan)
        refused: dict[str, UpdateRejected] = {}
        for device, delivery in deliveries.items():
            try:
                self._sessions[device].deliver(delivery)
            except TrustError as error:
                refused[device] = UpdateRejected(Rejection.FAILED, str(error))
        with closing(self.exchange.ask(self.plan, self.request)) as answers:
            for answer in answers:
                device = answer.device_id  # type: ignore[union-attr]  # asked one by one: no sums
                if device not in deliveries:  # its sum has failed
                    continue
                try:
                    if device in refused:
                        raise refused[device]
                    reply = read_reply(answer, self.plan)  # type: ignore[arg-type]  # as above
                    random, stream = self.random_of(self.plan, device), self.stream_of(self.plan, device)
                    vector = encode_reply(self.plan, encoding, reply, random, stream)
                except UpdateRejected as refusal:  # by the device's own software
                    yield Told(device, refusal)
                    continue
                tail, masked = self._sessions[device].mask(vector)
                yield Told(device, tail, masked, reply.seconds, len(tail) + len(masked))


def _told(device: str, message: bytes) -> Told:
    return Told(device, message, num_bytes=len(message))
