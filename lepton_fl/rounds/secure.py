"""Rounds in which the coordinator learns one sum: ``flsa/1`` led through its stages.

Two layers. ``lead`` takes a ``ServerSession`` from the adverts to the sum over any way of asking devices; it
knows no plan and no transport. ``collect_secure`` puts a round's plan on top and brings what
``collect_training`` brings: who took part, and the mean update, bit for bit that of a plain round whose
inputs are the same (with 32 bits; 16 bits round at random). ``IdealRounds`` is the ideal functionality for
simulations: the same sum without the protocol.

A round that loses too many devices has no result and reveals nothing. Example counts and losses of single
devices are not seen either: they travel in the sum.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, LeptonError, QuorumError, Rejection, TrustError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec, SecureSpec
from lepton_fl.rounds.accumulator import Accumulator, Subtotal, UpdateBatch
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, TRAINING, Clock, Collected, Participation
from lepton_fl.rounds.collect import collect as collect_answers
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.secagg.context import RoundContext, Rules
from lepton_fl.secagg.encoding import WEIGHT, Counter, Exact, Rotated, Sum
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Trust
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.server import Journal, Outcome, ServerSession, Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool, Spool
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import Request, TrainReply
from lepton_fl.wire.records import Records

log = logging.getLogger(__name__)

TRIES: Final = 2  # at the last stage, where nothing but silence stands between a round and its sum
_LOSS_STEP: Final = 2.0**-20  # of a summed loss
_LOSS_HALF: Final = 2**56  # steps; losses beyond +-this are cut
_EXAMPLES: Final = Counter("examples", 2**40)
_LOSS: Final = Counter("loss", 2 * _LOSS_HALF)

SumEncoding = Exact | Rotated


# --- what a plan means for the sum ------------------------------------------------------------------


def encoding_of(plan: RoundPlan) -> SumEncoding:
    """How the updates of an attempt become ring elements.

    Raises:
        ConfigError: a sum could leave the ring; ``RunSpec`` has refused that before.
    """
    weight = plan.max_weight if plan.weighting == "examples" else 1
    named = f"rotation {plan.run_id} {plan.round} {plan.attempt} {plan.nonce}"
    seed = hashlib.sha256(named.encode()).hexdigest()
    steps = plan.clip_norm / plan.grid_step
    return _encoding(_secure(plan), plan.update_size, len(plan.cohort), weight, steps, seed)


def _encoding(spec: SecureSpec, size: int, cohort: int, weight: int, steps: float, seed: str) -> SumEncoding:
    counters = (Counter(WEIGHT, weight), _EXAMPLES, _LOSS)
    if spec.bits == 32:
        return Exact(size, cohort, weight, int(steps), counters)
    return Rotated(size, cohort, weight, steps, seed, spec.spread, counters)


def prove_fits(spec: RunSpec, coordinates: int) -> None:
    """Refuse a run whose sums could leave the ring, before anybody is asked.

    Args:
        spec: of the run; without secure aggregation there is nothing to refuse.
        coordinates: of one update.

    Raises:
        ConfigError: with the numbers.
    """
    if spec.secure_aggregation == "off":
        return
    weight = spec.max_weight if spec.weighting == "examples" else 1
    _encoding(spec.secure, coordinates, spec.most_asked, weight, spec.clip_norm / spec.grid_step, "0" * 64)


def rules_of(spec: SecureSpec) -> Rules:
    """How many must take part, sign and reveal."""
    return Rules(spec.min_cohort, spec.per_thousand)


def context_of(plan: RoundPlan, request: Request, deployment: str) -> RoundContext:
    """What every signature of an attempt is bound to."""
    return RoundContext.of(request, deployment, encoding_of(plan), rules_of(_secure(plan)))


def encode_reply(plan: RoundPlan | Request, encoding: SumEncoding, reply: TrainReply, random: Random) -> Ring:
    """One device's vector: its update times its weight, and its counts.

    Args:
        plan: of the attempt, or the request that a device has got.
        encoding: from ``encoding_of``.
        reply: what the device would send in a plain round.
        random: for the rounding of 16 bits: the operating system's; it hides the fractions.

    Raises:
        UpdateRejected: a value is outside the bounds of the plan.
    """
    weight = 1 if plan.weighting == "equal" else min(reply.num_examples, plan.max_weight)
    examples = min(int(reply.sums["examples"][0]), _EXAMPLES.bound)
    counters = {"examples": examples, "loss": _loss_steps(reply.sums) + _LOSS_HALF}
    if isinstance(encoding, Exact):
        return encoding.encode(reply.update, weight, counters)
    return encoding.encode(reply.update, weight, random, counters)


def decode_total(
    plan: RoundPlan, encoding: SumEncoding, total: Ring, reports: int
) -> tuple[NDArray[np.float64], Sums]:
    """The mean update, (P + A,), and the devices' added counts.

    Args:
        plan: of the attempt.
        encoding: from ``encoding_of``.
        total: the sum of the vectors; it may be overwritten.
        reports: how many were added.
    """
    found = encoding.decode(total)
    if found.counters.keys() != {WEIGHT, "examples", "loss"}:
        raise ConfigError("This sum is not one of a plan's updates.")
    loss = found.counters["loss"] - reports * _LOSS_HALF
    sums: Sums = {
        "loss_sum": np.array([loss * _LOSS_STEP]),
        "examples": np.array([found.counters["examples"]], np.int64),
    }
    return _mean(plan, encoding, found, reports), sums


def _mean(plan: RoundPlan, encoding: SumEncoding, found: Sum, reports: int) -> NDArray[np.float64]:
    if isinstance(encoding, Rotated):
        restored = encoding.restore(found)
        restored *= plan.grid_step / found.weight
        return restored
    # The very arithmetic of a plain round.
    accumulator = Accumulator(plan)
    accumulator.merge(Subtotal(found.update.astype(np.int64), found.weight, reports))
    return accumulator.finalize()


def _loss_steps(sums: Sums) -> int:
    steps = float(np.clip(float(sums["loss_sum"][0]) / _LOSS_STEP, -float(_LOSS_HALF), float(_LOSS_HALF)))
    return round(steps)


def rounded_loss(loss_sum: float) -> float:
    """A device's summed loss as it travels in a sum."""
    return _loss_steps({"loss_sum": np.array([loss_sum])}) * _LOSS_STEP


def _secure(plan: RoundPlan) -> SecureSpec:
    if plan.secure is None:
        raise ConfigError("This plan asks for no secure aggregation.")
    return plan.secure


# --- leading a session through its stages -----------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """One device's answer at one stage, or why there is none."""

    device: str
    message: bytes | UpdateRejected
    vector: bytes | memoryview = b""  # masked; at stage UPLOADS
    seconds: float = 0.0  # the device's own
    num_bytes: int = 0


Ask = Callable[[Stage, Mapping[str, bytes]], Generator[Told, None, None]]
Hear = Callable[[Stage, Told, UpdateRejected | None], None]  # what came, and why it was refused


def lead(
    session: ServerSession,
    devices: Iterable[str],
    ask: Ask,
    *,
    wanted: int = 0,
    hear: Hear = lambda stage, told, refusal: None,
    journal: Journal = lambda record: None,
    now: Callable[[], float] = time.time,
) -> Outcome:
    """Take a session from where it is to its outcome.

    Args:
        session: new, or resumed.
        devices: whom to ask for adverts.
        ask: sends each device the message of a stage and yields the answers until all have come or time is
            up; closing it withdraws the question. Devices answer the same question again with the same bytes.
        wanted: with so many vectors the uploads close; 0 = wait for all.
        hear: told of every answer.
        journal: see ``ServerSession``.
        now: seconds since 1970.

    Returns:
        The sum, or none and who is to blame.

    Raises:
        QuorumError: too many devices have left; nothing is revealed.
    """
    taken = _Taker(session, ask, hear, journal, now)
    while session.stage < Stage.REVEALS:
        stage = session.stage
        if stage is Stage.ADVERTS:
            asked = dict.fromkeys(devices, b"")
            taken.ask_all(asked, len(asked))
        else:
            most = wanted if stage is Stage.UPLOADS and wanted else session.n
            # Who has not signed cannot reveal, so all are waited for, not just a quorum.
            taken.ask_all(_messages(session), most)
            if stage is Stage.CONSENTS:
                if len(session.heard()) < session.needed():
                    taken.ask_all(_messages(session), most)
                taken.signed = session.heard()
        session.close(journal)
    return taken.reveal()


class _Deliveries(Mapping[str, bytes]):
    """Every device's delivery, made when it is sent: all together are large."""

    def __init__(self, session: ServerSession, devices: Sequence[str]) -> None:
        self._session, self._devices = session, dict.fromkeys(devices)

    def __getitem__(self, device: str) -> bytes:
        if device not in self._devices:
            raise KeyError(device)
        return self._session.delivery(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)


def _messages(session: ServerSession) -> Mapping[str, bytes]:
    """What the present stage tells each device that has not answered it."""
    waiting = sorted(session.expected() - session.heard())
    if session.stage is Stage.UPLOADS:
        return _Deliveries(session, waiting)
    same = {
        Stage.SHARES: session.roster,
        Stage.CONSENTS: session.survivors,
        Stage.REVEALS: session.certificate,
    }[session.stage]()
    return dict.fromkeys(waiting, same)


@dataclass
class _Taker:
    session: ServerSession
    ask: Ask
    hear: Hear
    journal: Journal
    now: Callable[[], float]
    signed: frozenset[str] = frozenset()  # who can reveal; empty = not known, after a restart

    def ask_all(self, messages: Mapping[str, bytes], most: int) -> None:
        """Ask until ``most`` devices have been heard, or all have answered, or time is up."""
        if not messages:
            return
        with closing(self.ask(self.session.stage, messages)) as answers:
            for told in answers:
                self._take(told)
                del told  # it may be large: not while waiting for the next one
                if len(self.session.heard()) >= most:
                    return

    def reveal(self) -> Outcome:
        """Ask for shares; of all, because with more than are needed a bad one does no harm."""
        session = self.session
        for _ in range(TRIES):
            messages = {d: m for d, m in _messages(session).items() if d in self.signed or not self.signed}
            self.ask_all(messages, session.n)
            try:
                return session.finish()
            except QuorumError as error:  # nothing has changed: more may come
                log.debug("secure aggregation: %s", error)
        return session.finish()

    def _take(self, told: Told) -> None:
        session, stage, refusal = self.session, self.session.stage, None
        try:
            if isinstance(told.message, UpdateRejected):
                raise told.message
            if stage is Stage.UPLOADS and told.device not in session.heard():
                session.intake.restart(told.device)
                session.chunk(told.device, 0, told.vector)
            session.accept(told.device, told.message, self.now(), self.journal)
        except UpdateRejected as error:
            refusal = error
        except TrustError as error:
            refusal = UpdateRejected(Rejection.MALFORMED, str(error), hint=error.hint)
        self.hear(stage, told, refusal)


# --- a round ----------------------------------------------------------------------------------------


class SecureRounds(Protocol):
    """How the rounds of a secure run are collected."""

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock
    ) -> tuple[Collected, NDArray[np.float64] | None]:
        """One attempt; as ``collect_training``."""
        ...


def collect_secure(
    plan: RoundPlan,
    request: Request,
    ask: Ask,
    trust: Trust,
    deployment: str,
    *,
    clock: Clock = time.monotonic,
    now: Callable[[], float] = time.time,
    spool: Spool | None = None,
    journal: Journal = lambda record: None,
    records: Sequence[bytes] = (),
    tell: Callable[[str, UpdateRejected | None], None] = lambda device, refusal: None,
    known_as: Callable[[str], str] = lambda device: device,
    workers: int = 0,
) -> tuple[Collected, NDArray[np.float64] | None]:
    """One attempt at a training round of which the coordinator sees a sum only.

    Args:
        plan: of the attempt.
        request: what the devices are asked; ``ask`` sends it.
        ask: see ``lead``.
        trust: says whose signing keys are whose.
        deployment: the installation's name.
        clock: says when each answer came.
        now: seconds since 1970.
        spool: keeps masked vectors until they are added; None = in memory.
        journal: keeps the session's records.
        records: what was kept of this very attempt before the coordinator ended: it goes on from there, with
            the same spool.
        tell: says to a device what became of its vector.
        known_as: the name in the cohort of a device that the protocol knows by its key.
        workers: cores to unmask with; 0 = all.

    Returns:
        What happened, and the (P + A,) mean update; None if too few devices came through, and then nothing
        has been revealed.
    """
    encoding, context = encoding_of(plan), context_of(plan, request, deployment)
    intake = Intake(context, spool or MemorySpool())
    session = ServerSession.resume(context, trust, intake, records, workers)
    began = clock()
    collected = Collected(plan, elapsed_s=lambda: max(0.0, clock() - began))
    heard = _Heard(collected, tell, known_as)
    try:
        outcome = lead(
            session, plan.cohort, ask, wanted=plan.wanted_reports, hear=heard, journal=journal, now=now
        )
    except QuorumError as error:
        log.warning("round %d, attempt %d: %s", plan.round, plan.attempt, error)
        outcome = Outcome(None, (), session.blames, str(error))
    heard.settle(outcome, session)
    if outcome.total is None or not collected.enough:
        return collected, None
    mean, collected.sums = decode_total(plan, encoding, outcome.total, collected.reports)
    return collected, mean


class _Heard:
    """Notes what became of each device."""

    def __init__(
        self,
        collected: Collected,
        tell: Callable[[str, UpdateRejected | None], None],
        known_as: Callable[[str], str],
    ) -> None:
        self._collected, self._tell, self._known_as = collected, tell, known_as
        self._entries: dict[str, Participation] = {}

    def __call__(self, stage: Stage, told: Told, refusal: UpdateRejected | None) -> None:
        told = replace(told, device=self._known_as(told.device))
        self._collected.bytes_up += told.num_bytes
        before = self._entries.get(told.device)
        if refusal is not None and refusal.reason in (Rejection.DUPLICATE, Rejection.NOT_SELECTED):
            return
        if stage > Stage.UPLOADS:  # its vector is in the sum; what fails now is noted, no more
            if refusal is not None and before is not None:
                self._entries[told.device] = replace(before, detail=str(refusal))
            return
        self._entries[told.device] = Participation(
            told.device,
            refusal.reason.value if refusal else ACCEPTED,
            str(refusal) if refusal else "",
            seconds=told.seconds,
            num_bytes=told.num_bytes + (before.num_bytes if before else 0),
            arrived_s=self._collected.elapsed_s(),
        )
        if stage is Stage.UPLOADS:
            self._tell(told.device, refusal)

    def settle(self, outcome: Outcome, session: ServerSession) -> None:
        """The participation of the whole cohort, once it is known who is in the sum."""
        collected, survivors = self._collected, set(map(self._known_as, outcome.survivors))
        uploaded = frozenset(map(self._known_as, session.intake.included))
        full = len(uploaded) >= collected.plan.wanted_reports
        faults = {self._known_as(blame.device): blame.fault.value for blame in outcome.blames}
        collected.reports = len(survivors) if outcome.total is not None else 0
        collected.participation = {
            device: self._entry(device, device in survivors, uploaded, full, faults.get(device, ""), outcome)
            for device in collected.plan.cohort
        }

    def _entry(
        self,
        device: str,
        survives: bool,
        uploaded: frozenset[str],
        full: bool,
        fault: str,
        outcome: Outcome,
    ) -> Participation:
        came = survives or device in uploaded  # perhaps before a restart
        entry = self._entries.get(device) or Participation(
            device, ACCEPTED if came else Rejection.OFFLINE.value
        )
        if fault and not (survives and outcome.total is not None):
            return replace(entry, outcome=Rejection.BLAMED.value, detail=f"Blamed: {fault}.")
        if fault:
            return replace(entry, detail=f"Blamed: {fault}; its vector counts.")
        if survives or entry.outcome != ACCEPTED or device in uploaded:
            return entry
        if full:
            return replace(entry, outcome=SURPLUS)
        return replace(entry, outcome=Rejection.OFFLINE.value, detail="It left before its vector came.")


# --- the ideal functionality ------------------------------------------------------------------------


class IdealRounds:
    """The sum that the protocol would bring, without the protocol; for simulations, which see all anyway."""

    def __init__(self, random_of: Callable[[RoundPlan, str], Random]) -> None:
        """Prepare.

        Args:
            random_of: the randomness that a device rounds with, for 16 bits.
        """
        self._random_of = random_of

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock
    ) -> tuple[Collected, NDArray[np.float64] | None]:
        """See ``SecureRounds``."""
        encoding = encoding_of(plan)
        if isinstance(encoding, Exact):
            return self._exact(plan, request, exchange, clock)
        total: Ring = np.zeros(encoding.length, ring_type(encoding.bits))

        def take(answer: Answer) -> TrainReply:
            reply = read_reply(answer, plan)
            vector = encode_reply(plan, encoding, reply, self._random_of(plan, answer.device_id))
            np.add(total, vector, out=total)
            return without_counts(reply)

        collected = collect_answers(plan, request, exchange, TRAINING, take, _refuse_sum, clock)
        _forget_counts(collected)
        if not collected.enough:
            return collected, None
        mean, collected.sums = decode_total(plan, encoding, total, collected.reports)
        return collected, mean

    def _exact(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock
    ) -> tuple[Collected, NDArray[np.float64] | None]:
        """The integers of a plain round, added in 64 bits: the plan proves that 32 would do."""
        accumulator = Accumulator(plan)

        def take(answer: Answer) -> TrainReply:
            reply = read_reply(answer, plan)
            accumulator.add(UpdateBatch(reply.update[None, :], np.array([reply.num_examples], np.int64)))
            return replace(reply, sums=_rounded(reply.sums))

        def take_many(part: AddedUp) -> None:
            TRAINING.validate(part.sums)
            accumulator.merge(part.subtotal)

        collected = collect_answers(plan, request, exchange, TRAINING, take, take_many, clock)
        _forget_counts(collected)
        return collected, accumulator.finalize() if collected.enough else None


def read_reply(answer: Answer, plan: RoundPlan) -> TrainReply:
    """What a device would send in a plain round; raises what is wrong with it."""
    if not isinstance(answer.records, Records):
        raise answer.records
    reply = TrainReply.read(answer.records, plan)
    TRAINING.validate(reply.sums)
    return reply


def without_counts(reply: TrainReply) -> TrainReply:
    """A reply of which only that it came is left; the sums are those of nothing."""
    return replace(
        reply,
        num_examples=0,
        sums={"loss_sum": np.zeros(1), "examples": np.zeros(1, np.int64)},
    )


def _rounded(sums: Sums) -> Sums:
    return {**sums, "loss_sum": np.array([rounded_loss(float(sums["loss_sum"][0]))])}


def _forget_counts(collected: Collected) -> None:
    """Example counts of single devices are in no report of a secure round."""
    if not collected.enough:
        collected.sums = {}
    collected.participation = {
        device: replace(entry, num_examples=0) for device, entry in collected.participation.items()
    }


def _refuse_sum(part: AddedUp) -> None:
    raise LeptonError("An exchange added up updates that are needed one by one.")
