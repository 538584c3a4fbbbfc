"""Secure aggregation in a simulation: the whole protocol, or what it must compute.

``engine.secure_aggregation = "full"`` gives every virtual device of the cohort a real session: keys, shares,
masks, signatures. ``"ideal"`` adds the same integers plainly. The weights are the same, bit for bit, where
the same integers go in. The protocol needs every update by itself, so devices then train one by one; engines
other than "lean" train a chunk in one matrix product, whose floats round by who is in it, before any integer
is made. ``engine.one_by_one`` lets everybody train alike, with and without secure aggregation. The sessions
of a large cohort are dealt out to helper processes (``seats``).

Devices leave where the world says so, at any stage, and may repeat themselves, be late, or break the
protocol. Keys are the operating system's; the sum does not depend on them. One process sees all its devices,
so nothing here protects anybody.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from lepton_fl.errors import ConfigError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.privacy.noise import Keystream, simulation_key
from lepton_fl.rounds.collect import Brought, Clock, Finish
from lepton_fl.rounds.exchange import Answer, Exchange
from lepton_fl.rounds.secure import SecureRounds, Told, collect_secure
from lepton_fl.rounds.secure_ideal import IdealRounds, read_reply
from lepton_fl.rounds.secure_sum import SumEncoding, context_of, encode_reply, encoding_of, groups_of
from lepton_fl.secagg.agreements import available_cores
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.rehearsal import make_members
from lepton_fl.secagg.server import Stage
from lepton_fl.secagg.uploads import MemorySpool
from lepton_fl.wire.messages import Request
from lepton_simulations.config import SimulationConfig
from lepton_simulations.seats import Crew, Seats
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
        workers = config.engine.workers if config.engine.workers >= 0 else available_cores()
        return FullRounds(random_of, stream_of, world, workers)
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
        workers: int = 0,
    ) -> None:
        """Prepare; see ``IdealRounds``.

        Args:
            random_of: the randomness that a device rounds with, for fewer than 32 bits.
            stream_of: of the noise that a device adds; None = fresh.
            world: says who falls silent, repeats itself or breaks the protocol.
            workers: processes that the sessions of a large cohort are dealt out to; 0 or 1 = none.
        """
        self._random_of, self._stream_of, self._world = random_of, stream_of, world
        self._workers = workers

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
    ) -> Brought:
        """See ``SecureRounds``."""
        members, trust = make_members(plan.cohort, DEPLOYMENT, os.urandom)
        contexts = {
            device: context_of(plan, request, DEPLOYMENT, cohort)
            for cohort, devices in enumerate(groups_of(plan))
            for device in devices
        }
        dealing, lying = self._world.cheats("bad_shares"), self._world.cheats("wrong_shares")
        seats = Seats(members, contexts, trust, dealing, lying)
        with Crew(seats, plan.cohort, self._workers) as crew:
            devices = _Devices(
                plan, request, exchange, clock, self._random_of, self._stream_of, self._world, crew, dealing
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
class _Upload:
    """A device that has been trained: its vector is being masked, or it has none."""

    device: str
    seconds: float = 0.0
    arrived_s: float = 0.0
    refusal: UpdateRejected | None = None


@dataclass
class _Devices:
    """The virtual devices of an attempt."""

    plan: RoundPlan
    request: Request
    exchange: Exchange
    clock: Clock
    random_of: Callable[[RoundPlan, str], Random]
    stream_of: Callable[[RoundPlan, str], Keystream | None]
    world: World
    crew: Crew
    dealing: Collection[str]  # who can be complained about
    spool: MemorySpool = field(default_factory=MemorySpool)

    def __post_init__(self) -> None:
        self._leaves, self._began = self.world.leaves(self.plan), self.clock()
        self._late: dict[tuple[Stage, str], Told] = {}
        self._accepted = 0

    def tell(self, device: str, refusal: UpdateRejected | None) -> None:
        """Pass on what became of a vector; one that is added is kept only where complaints can come."""
        self._accepted += refusal is None
        self.exchange.tell(self.plan, device, refusal)
        if not self.dealing:
            self.spool.discard(device)

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
        with closing(self.crew.answers(stage, messages)) as answers:
            for device, answer in answers:
                size = 0 if isinstance(answer, UpdateRejected) else len(answer)
                told = Told(device, answer, num_bytes=size)
                if self._leaves.get(device) == name:
                    self._late[stage, device] = told
                    continue
                yield told
                if device in repeated:
                    yield told

    def _train(self, deliveries: Mapping[str, bytes]) -> Generator[Told, None, None]:
        """Vectors in the order of arrival; some are masked while others are still trained."""
        encoding, pending = encoding_of(self.plan), deque[_Upload]()
        with closing(self.exchange.ask(self.plan, self.request)) as answers:
            for answer in answers:
                assert isinstance(answer, Answer)  # asked one by one: no sums
                if answer.device_id not in deliveries:  # its sum has failed
                    continue
                pending.append(self._begin(answer, encoding, deliveries[answer.device_id]))
                while len(pending) > self.crew.ahead:
                    yield self._end(pending.popleft())
                if self._accepted + len(pending) >= self.plan.wanted_reports:
                    # The exchange trains no more than are wanted, so it must know who was accepted.
                    while pending:
                        yield self._end(pending.popleft())
        while pending:
            yield self._end(pending.popleft())

    def _begin(self, answer: Answer, encoding: SumEncoding, delivery: bytes) -> _Upload:
        device, arrived_s = answer.device_id, max(0.0, self.clock() - self._began)
        try:
            reply = read_reply(answer, self.plan)
            random, stream = self.random_of(self.plan, device), self.stream_of(self.plan, device)
            vector = encode_reply(self.plan, encoding, reply, random, stream)
        except UpdateRejected as refusal:  # by the device's own software
            return _Upload(device, arrived_s=arrived_s, refusal=refusal)
        self.crew.start(device, delivery, vector)
        return _Upload(device, reply.seconds, arrived_s)

    def _end(self, upload: _Upload) -> Told:
        answer = upload.refusal or self.crew.masked(upload.device)
        if isinstance(answer, UpdateRejected):
            return Told(upload.device, answer, arrived_s=upload.arrived_s)
        tail, masked = answer
        size = len(tail) + len(masked)
        return Told(upload.device, tail, masked, upload.seconds, size, upload.arrived_s)
