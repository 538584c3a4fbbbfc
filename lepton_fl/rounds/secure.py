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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, sqrt
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, LeptonError, QuorumError, Rejection, TrustError, UpdateRejected
from lepton_fl.plan import PrivatePart, RoundPlan, RunSpec, SecureSpec
from lepton_fl.privacy.noise import DiscreteGaussian, IntegerNoise, Keystream, Skellam
from lepton_fl.rounds.accumulator import Accumulator, Subtotal, UpdateBatch
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, TRAINING, Clock, Collected, Finish, Participation
from lepton_fl.rounds.collect import collect as collect_answers
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.secagg.cohorts import add_sums, pinned, split
from lepton_fl.secagg.context import RoundContext, Rules, hidden_rules
from lepton_fl.secagg.encoding import WEIGHT, Counter, Exact, Rotated, Sum, noise_room
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Trust
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.server import Journal, Outcome, ServerSession, Stage, is_decision
from lepton_fl.secagg.uploads import Intake, MemorySpool, Spool
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import Fields, Request, Ticket, TrainReply, malformed
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
    seed = hashlib.sha256(f"rotation {_named(plan)}".encode()).hexdigest()
    steps, spec = plan.clip_norm / plan.grid_step, _secure(plan)
    if plan.private is not None:
        return _private_encoding(spec, plan.private, plan.update_size, steps, seed)
    weight = plan.max_weight if plan.weighting == "examples" else 1
    return _encoding(spec, plan.update_size, max(spec.sums(len(plan.cohort))), weight, steps, seed)


def _named(plan: RoundPlan) -> str:
    return f"{plan.run_id} {plan.round} {plan.attempt} {plan.nonce}"


def groups_of(plan: RoundPlan) -> tuple[tuple[str, ...], ...]:
    """Who is with whom: a cohort divided into as few sums as possible, at random, the same way every time."""
    spec = _secure(plan)
    return split(plan.cohort, pinned(_named(plan)), min(spec.sums(len(plan.cohort))), spec.max_cohort)


def _encoding(spec: SecureSpec, size: int, cohort: int, weight: int, steps: float, seed: str) -> SumEncoding:
    counters = (Counter(WEIGHT, weight), _EXAMPLES, _LOSS)
    if spec.bits == 32:
        return Exact(size, cohort, weight, int(steps), counters)
    return Rotated(size, cohort, weight, steps, seed, spec.spread, counters)


def _private_encoding(spec: SecureSpec, part: PrivatePart, size: int, steps: float, seed: str) -> SumEncoding:
    """Room for the noise that was planned; no counters, for nothing would cover them."""
    bound, counters = part.norm_bound(steps), (Counter(WEIGHT, 1),)
    half = 2 ** (spec.bits - 1) - 1
    if spec.bits == 32:
        width = noise_room(sqrt(part.asked * part.share_variance), size) if part.share_variance else 0
        room = min(width, half - part.asked * int(bound))  # four deviations at least, by the plan
        return Exact(size, part.asked, 1, int(bound), counters, max(0, room), survivors=part.survivors)
    return Rotated(
        size,
        part.asked,
        1,
        bound,
        seed,
        spec.spread,
        counters,
        half - part.asked * part.limit,
        survivors=part.survivors,
    )


def prove_fits(spec: RunSpec, coordinates: int) -> None:
    """Refuse a run whose sums could leave the ring, before anybody is asked.

    Args:
        spec: of the run; without secure aggregation there is nothing to refuse.
        coordinates: of one update.

    Raises:
        ConfigError: with the numbers.
    """
    if spec.secure_aggregation == "off" or spec.privacy is not None:  # whose plan proves it
        return
    weight = spec.max_weight if spec.weighting == "examples" else 1
    _encoding(spec.secure, coordinates, spec.largest_sum, weight, spec.clip_norm / spec.grid_step, "0" * 64)


def rules_of(spec: SecureSpec, asked: int) -> Rules:
    """How many of a sum's devices must take part, sign and reveal.

    Args:
        spec: of the plan.
        asked: devices of the sum. A hidden mask graph is made for rosters of nine tenths of them or more.
    """
    if spec.mask_graph == "complete":
        return Rules(spec.min_cohort, spec.per_thousand)
    return hidden_rules(max(spec.min_cohort, ceil(0.9 * asked)), asked, spec.per_thousand)


def context_of(plan: RoundPlan, request: Request, deployment: str, cohort: int = 0) -> RoundContext:
    """What every signature of an attempt is bound to.

    Args:
        plan: of the attempt.
        request: what the devices are asked.
        deployment: the installation's name.
        cohort: which of ``groups_of(plan)``.
    """
    spec = _secure(plan)
    rules = rules_of(spec, spec.sums(len(plan.cohort))[cohort])
    return RoundContext.of(request, deployment, encoding_of(plan), rules, cohort)


def encode_reply(
    plan: RoundPlan | Request,
    encoding: SumEncoding,
    reply: TrainReply,
    random: Random,
    stream: Keystream | None = None,
) -> Ring:
    """One device's vector: its update times its weight, and its counts; of a private run, with its noise.

    Args:
        plan: of the attempt, or the request that a device has got.
        encoding: from ``encoding_of``.
        reply: what the device would send in a plain round.
        random: for the rounding of 16 bits: the operating system's; it hides the fractions.
        stream: of the noise; None = fresh, of the operating system. Only simulations give one.

    Raises:
        UpdateRejected: a value is outside the bounds of the plan.
    """
    if plan.private is not None:
        noise = noise_share(plan.private, encoding, len(reply.update), stream)
        if isinstance(encoding, Exact):
            return encoding.encode(reply.update, 1, {}, noise)
        return encoding.encode(reply.update, 1, random, {}, noise)
    weight = 1 if plan.weighting == "equal" else min(reply.num_examples, plan.max_weight)
    examples = min(int(reply.sums["examples"][0]), _EXAMPLES.bound)
    counters = {"examples": examples, "loss": _loss_steps(reply.sums) + _LOSS_HALF}
    if isinstance(encoding, Exact):
        return encoding.encode(reply.update, weight, counters)
    return encoding.encode(reply.update, weight, random, counters)


def least_multiplier(request: Request, encoding: SumEncoding) -> float:
    """Standard deviation of the noise that devices add to a sum, at least, over the norm of one vector."""
    part = request.private
    if part is None or part.noise == "none":
        return 0.0
    steps = part.norm_bound(request.clip_norm / request.grid_step)
    norm = float(encoding.norm_bound) if isinstance(encoding, Rotated) else steps
    return sqrt(part.share_variance * min(encoding.survivors, part.survivors)) / norm


def noise_share(
    part: PrivatePart, encoding: SumEncoding, size: int, stream: Keystream | None = None
) -> NDArray[np.int64] | None:
    """(length,) what a device adds to its vector: nothing to the counters; None where it adds no noise.

    Raises:
        UpdateRejected: the sum may be learnt of fewer devices than the noise is made for.
    """
    law = share_law(part)
    if law is None:
        return None
    if encoding.survivors < part.survivors:
        raise malformed(
            f"noise made for {part.survivors} devices is asked for, in a sum of {encoding.survivors} or more"
        )
    noise = np.zeros(encoding.length, np.int64)
    law.add_to(noise[:size], stream or Keystream())
    return noise


def share_law(part: PrivatePart) -> IntegerNoise | None:
    """The law of the noise that one device adds; None = none."""
    if part.noise == "none":
        return None
    return (
        Skellam(part.share_variance)
        if part.noise == "skellam"
        else DiscreteGaussian(sqrt(part.share_variance))
    )


def encode_answer(
    asked: Records, answered: Records, encoding: SumEncoding, random: Random, least_noise: float = 0.0
) -> Ring:
    """A device's vector, out of what it was asked and what it would answer in a plain round.

    Args:
        asked: a ``Request``.
        answered: a ``TrainReply`` or a ``Failure``.
        encoding: of the sum.
        random: see ``encode_reply``.
        least_noise: what the device demands of the sum, see ``least_multiplier``.

    Raises:
        UpdateRejected: the answer reports a failure, does not fit, or would not be hidden as demanded.
    """
    if "failed" in answered.config:
        fields = Fields(answered.config)
        Ticket.take(fields)
        reason, detail = fields.text("failed"), fields.text("detail")
        raise UpdateRejected(Rejection(reason), detail)
    request = Request.read(asked)
    if (found := least_multiplier(request, encoding)) < least_noise:
        raise UpdateRejected(
            Rejection.FAILED,
            f"The sum would hold noise of {found:.4g} times an update's norm; this device demands "
            f"{least_noise:g}.",
            hint="Lower least_noise in the device's configuration, or run with more distributed noise.",
        )
    try:
        sums = {name: np.asarray(answered.metrics[f"sum.{name}"]) for name in ("loss_sum", "examples")}
        examples, update = answered.metrics["num-examples"], answered.arrays["update"]
    except KeyError as error:
        raise malformed(f"the device's own answer has no {error}") from error
    count = Fields({"n": examples}).integer("n")
    reply = TrainReply(request.ticket, request.task_version, count, update, sums, 0.0)
    return encode_reply(request, encoding, reply, random)


def decode_total(
    plan: RoundPlan,
    encoding: SumEncoding,
    totals: Sequence[Ring],
    reports: int,
    finish: Finish | None = None,
) -> tuple[NDArray[np.float64], Sums]:
    """The mean update, (P + A,), and the devices' added counts.

    Args:
        plan: of the attempt.
        encoding: from ``encoding_of``.
        totals: the sum of the vectors of each cohort; they may be overwritten.
        reports: how many vectors were added.
        finish: of a private run; makes the update of the sum.
    """
    found = add_sums([encoding.decode(total) for total in totals])
    if finish is not None:
        return finish(_as_aggregate(plan, encoding, found, reports)), {}
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
    return _as_aggregate(plan, encoding, found, reports).finalize()  # the very arithmetic of a plain round


def _as_aggregate(plan: RoundPlan, encoding: SumEncoding, found: Sum, reports: int) -> Accumulator:
    """The sum as an accumulator has it; of a rotated one, rounded to the grid: that is post-processing."""
    if isinstance(encoding, Rotated):
        whole = np.rint(encoding.restore(found)).astype(np.int64)
    else:
        whole = found.update.astype(np.int64, copy=False)
    accumulator = Accumulator(plan)
    accumulator.merge(Subtotal(whole, found.weight, reports))
    return accumulator


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


@dataclass(eq=False)
class Party:
    """One cohort's session on its way to a sum."""

    session: ServerSession
    devices: Sequence[str]  # whom to ask for adverts
    signed: frozenset[str] = frozenset()  # who can reveal; empty = not known, after a restart
    outcome: Outcome | None = None  # at the end
    error: QuorumError | None = None  # why there is no outcome, of a cohort that was lost

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask for."""
        return self.outcome is not None or self.error is not None

    def result(self) -> Outcome:
        """The sum, or none and why; the cohort's devices have revealed nothing then."""
        return self.outcome or Outcome(None, (), self.session.blames, str(self.error))


def lead(
    parties: Sequence[Party],
    ask: Ask,
    *,
    wanted: int = 0,
    hear: Hear = lambda stage, told, refusal: None,
    journal: Callable[[int, bytes], None] = lambda cohort, record: None,
    now: Callable[[], float] = time.time,
    known_as: Callable[[str], str] = lambda device: device,
) -> None:
    """Take sessions from where they are to their outcomes, stage by stage, all cohorts at the same time.

    A cohort that loses too many devices ends with an error, and the others go on.

    Args:
        parties: each new, or resumed.
        ask: sends each device the message of a stage and yields the answers until all have come or time is
            up; closing it withdraws the question. Devices answer the same question again with the same bytes.
        wanted: with so many vectors in all, the uploads close; 0 = wait for all.
        hear: told of every answer.
        journal: keeps the records of each cohort; see ``ServerSession``.
        now: seconds since 1970.
        known_as: the name in ``Party.devices`` of a device that the protocol knows by its key.
    """
    leader = _Leader(parties, ask, hear, journal, now, known_as, wanted)
    while going := [p for p in parties if not p.done and p.session.stage < Stage.REVEALS]:
        stage = min(p.session.stage for p in going)
        leader.pass_stage(stage, [p for p in going if p.session.stage is stage])
    leader.reveal()


class _Deliveries(Mapping[str, bytes]):
    """Every device's delivery, made when it is sent: all together are large."""

    def __init__(self, parties: Sequence[Party]) -> None:
        self._session = {d: p.session for p in parties for d in _waiting(p)}

    def __getitem__(self, device: str) -> bytes:
        return self._session[device].delivery(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._session)

    def __len__(self) -> int:
        return len(self._session)


def _waiting(party: Party) -> list[str]:
    return sorted(party.session.expected() - party.session.heard())


def _messages(parties: Sequence[Party]) -> Mapping[str, bytes]:
    """What the present stage tells each device that has not answered it."""
    if parties[0].session.stage is Stage.UPLOADS:
        return _Deliveries(parties)
    return {device: message for p in parties for device, message in _same_for_all(p).items()}


def _same_for_all(party: Party) -> dict[str, bytes]:
    session = party.session
    message = {
        Stage.SHARES: session.roster,
        Stage.CONSENTS: session.survivors,
        Stage.REVEALS: session.certificate,
    }[session.stage]()
    return dict.fromkeys(_waiting(party), message)


@dataclass
class _Leader:
    parties: Sequence[Party]
    ask: Ask
    hear: Hear
    journal: Callable[[int, bytes], None]
    now: Callable[[], float]
    known_as: Callable[[str], str]
    wanted: int

    def __post_init__(self) -> None:
        self._place = {d: i for i, party in enumerate(self.parties) for d in party.devices}

    def pass_stage(self, stage: Stage, parties: Sequence[Party]) -> None:
        """Ask once, all cohorts together, and close the stage of each."""
        if stage is Stage.ADVERTS:
            self._ask(stage, dict.fromkeys((d for p in parties for d in self._silent(p)), b""), parties)
        else:
            # Who has not signed cannot reveal, so all are waited for, not just a quorum.
            self._ask(stage, _messages(parties), parties)
        if stage is Stage.CONSENTS:
            short = [p for p in parties if len(p.session.heard()) < p.session.needed()]
            if short:
                self._ask(stage, _messages(short), short)
            for party in parties:
                party.signed = party.session.heard()
        for party in parties:
            try:
                party.session.close(partial(self.journal, self._number(party)))
            except QuorumError as error:
                party.error = error

    def _number(self, party: Party) -> int:
        return self.parties.index(party)

    def _silent(self, party: Party) -> list[str]:
        heard = set(map(self.known_as, party.session.heard()))  # before a restart: no second advert counts
        return [device for device in party.devices if device not in heard]

    def _ask(self, stage: Stage, messages: Mapping[str, bytes], parties: Sequence[Party]) -> None:
        """Ask until all have been heard, or time is up, or so many vectors are there as are wanted."""
        if not messages:
            return
        most = sum(len(p.devices) if stage is Stage.ADVERTS else p.session.n for p in parties)
        if stage is Stage.UPLOADS and self.wanted:
            most = self.wanted
        with closing(self.ask(stage, messages)) as answers:
            for told in answers:
                self._take(stage, told)
                del told  # it may be large: not while waiting for the next one
                if sum(len(p.session.heard()) for p in parties) >= most:
                    return

    def reveal(self) -> None:
        """Ask for shares; of all, because with more than are needed a bad one does no harm."""
        for last in [False] * (TRIES - 1) + [True]:
            waiting = [p for p in self.parties if not p.done]
            messages = {
                device: message
                for party in waiting
                for device, message in _messages([party]).items()
                if device in party.signed or not party.signed
            }
            self._ask(Stage.REVEALS, messages, waiting)
            for party in waiting:
                try:
                    party.outcome = party.session.finish()
                except QuorumError as error:  # nothing has changed: more may come
                    log.debug("secure aggregation: %s", error)
                    party.error = error if last else None

    def _take(self, stage: Stage, told: Told) -> None:
        index = 0 if len(self.parties) == 1 else self._place[self.known_as(told.device)]
        session, refusal = self.parties[index].session, None
        try:
            if isinstance(told.message, UpdateRejected):
                raise told.message
            if stage is Stage.UPLOADS and told.device not in session.heard():
                session.intake.restart(told.device)
                session.chunk(told.device, 0, told.vector)
            session.accept(told.device, told.message, self.now(), partial(self.journal, index))
        except UpdateRejected as error:
            refusal = error
        except TrustError as error:
            refusal = UpdateRejected(Rejection.MALFORMED, str(error), hint=error.hint)
        self.hear(stage, told, refusal)


# --- a round ----------------------------------------------------------------------------------------


class SecureRounds(Protocol):
    """How the rounds of a secure run are collected."""

    def collect(
        self,
        plan: RoundPlan,
        request: Request,
        exchange: Exchange,
        clock: Clock,
        finish: Finish | None = None,
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
    finish: Finish | None = None,
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
        finish: makes the update of the sum; None = the mean as it is.

    Returns:
        What happened, and the (P + A,) mean update; None if too few devices came through, and then nothing
        has been revealed.
    """
    encoding, kept = encoding_of(plan), spool or MemorySpool()
    parties = []
    for cohort, devices in enumerate(groups_of(plan)):
        context = context_of(plan, request, deployment, cohort)
        own = [body for number, body in map(_unnumbered, records) if number == cohort]
        session = ServerSession.resume(context, trust, Intake(context, kept), own, workers)
        parties.append(Party(session, devices))
    began = clock()
    collected = Collected(plan, elapsed_s=lambda: max(0.0, clock() - began))
    heard = _Heard(collected, tell, known_as)
    lead(
        parties,
        ask,
        wanted=plan.wanted_reports,
        hear=heard,
        journal=lambda cohort, record: journal(_numbered(cohort, record)),
        now=now,
        known_as=known_as,
    )
    for party in parties:
        if party.error is not None:
            log.warning("round %d, attempt %d: %s", plan.round, plan.attempt, party.error)
    heard.settle(parties)
    totals = [party.outcome.total for party in parties if party.outcome and party.outcome.total is not None]
    if not totals or not collected.enough:
        collected.burnt = any(party.session.stage > Stage.UPLOADS for party in parties)
        return collected, None
    mean, collected.sums = decode_total(plan, encoding, totals, collected.reports, finish)
    return collected, mean


def _numbered(cohort: int, record: bytes) -> bytes:
    """A record of one of an attempt's cohorts."""
    return cohort.to_bytes(2, "big") + record


def must_be_synced(record: bytes) -> bool:
    """Whether a record that the journal is given must outlive a power cut before anybody hears of it."""
    return is_decision(_unnumbered(record)[1])


def _unnumbered(record: bytes) -> tuple[int, bytes]:
    return int.from_bytes(record[:2], "big"), record[2:]


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

    def settle(self, parties: Sequence[Party]) -> None:
        """The participation of the whole attempt, once it is known who is in the sums."""
        uploaded = {p: frozenset(map(self._known_as, p.session.intake.included)) for p in parties}
        full = sum(map(len, uploaded.values())) >= self._collected.plan.wanted_reports
        useful = any(p.result().total is not None for p in parties)
        found: dict[str, Participation] = {}
        for party in parties:
            outcome = party.result()
            self._collected.reports += len(outcome.survivors) if outcome.total is not None else 0
            survivors = set(map(self._known_as, outcome.survivors))
            faults = {self._known_as(blame.device): blame.fault.value for blame in outcome.blames}
            for device in party.devices:
                came = device in survivors or device in uploaded[party]
                entry = self._entry(device, came, device in survivors, faults.get(device, ""), outcome)
                if entry.outcome == ACCEPTED and not came:
                    word = "It left before its vector came."
                    entry = replace(entry, outcome=SURPLUS if full else Rejection.OFFLINE.value)
                    entry = entry if full else replace(entry, detail=word)
                elif entry.outcome == ACCEPTED and useful and outcome.total is None:
                    word = f"The sum of its {len(party.devices)} devices failed: {outcome.reason}"
                    entry = replace(entry, outcome=SURPLUS, detail=word)
                found[device] = entry
        self._collected.participation = {device: found[device] for device in self._collected.plan.cohort}

    def _entry(self, device: str, came: bool, survives: bool, fault: str, outcome: Outcome) -> Participation:
        """What is noted of a device, and its fault."""
        entry = self._entries.get(device) or Participation(  # it came before a restart, perhaps
            device, ACCEPTED if came else Rejection.OFFLINE.value
        )
        if fault and not (survives and outcome.total is not None):
            return replace(entry, outcome=Rejection.BLAMED.value, detail=f"Blamed: {fault}.")
        return replace(entry, detail=f"Blamed: {fault}; its vector counts.") if fault else entry


# --- the ideal functionality ------------------------------------------------------------------------


class IdealRounds:
    """The sum that the protocol would bring, without the protocol; for simulations, which see all anyway."""

    def __init__(
        self,
        random_of: Callable[[RoundPlan, str], Random],
        stream_of: Callable[[RoundPlan, str], Keystream | None] = lambda plan, device: None,
        leaves: Callable[[RoundPlan], Mapping[str, Stage]] = lambda plan: {},
    ) -> None:
        """Prepare.

        Args:
            random_of: the randomness that a device rounds with, for 16 bits.
            stream_of: of the noise that a device adds; None = fresh.
            leaves: who falls silent at which stage of the protocol.
        """
        self._random_of, self._stream_of, self._leaves = random_of, stream_of, leaves

    def collect(
        self,
        plan: RoundPlan,
        request: Request,
        exchange: Exchange,
        clock: Clock,
        finish: Finish | None = None,
    ) -> tuple[Collected, NDArray[np.float64] | None]:
        """See ``SecureRounds``."""
        encoding, groups, left = encoding_of(plan), groups_of(plan), self._leaves(plan)
        if isinstance(encoding, Exact) and len(groups) == 1:
            return self._exact(plan, request, exchange, clock, finish)
        totals: list[Ring] = [np.zeros(encoding.length, ring_type(encoding.bits)) for _ in groups]
        place = {device: i for i, group in enumerate(groups) for device in group}

        def take(answer: Answer) -> TrainReply:
            device = answer.device_id
            reply, total = read_reply(answer, plan), totals[place[device]]
            random, stream = self._random_of(plan, device), self._stream_of(plan, device)
            vector = encode_reply(plan, encoding, reply, random, stream)
            np.add(total, vector, out=total)
            return without_counts(reply)

        collected = collect_answers(plan, request, exchange, TRAINING, take, _refuse_sum, clock)
        _forget_counts(collected)
        good = _settle(plan, groups, collected, left)
        if not collected.enough:
            return collected, None
        chosen = [totals[i] for i in good]
        mean, collected.sums = decode_total(plan, encoding, chosen, collected.reports, finish)
        return collected, mean

    def _exact(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
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
        _settle(plan, [plan.cohort], collected, self._leaves(plan))
        _forget_counts(collected)
        if not collected.enough:
            return collected, None
        if finish is None:
            return collected, accumulator.finalize()
        self._add_shares(plan, collected, accumulator)
        return collected, finish(accumulator)

    def _add_shares(self, plan: RoundPlan, collected: Collected, accumulator: Accumulator) -> None:
        """The noise that the devices of the sum have added, if they do."""
        law = share_law(plan.private) if plan.private else None
        if law is None:
            return
        for device, entry in collected.participation.items():
            if entry.outcome == ACCEPTED:
                law.add_to(accumulator.subtotal().total, self._stream_of(plan, device) or Keystream())


def _settle(
    plan: RoundPlan, groups: Sequence[Sequence[str]], collected: Collected, left: Mapping[str, Stage]
) -> list[int]:
    """Which groups the protocol would bring the sums of; the devices of the others are not counted."""
    ends = [_end_of(plan, group, collected, left) for group in groups]
    devices = [d for group, end in zip(groups, ends, strict=True) if end is not Stage.DONE for d in group]
    lost = [e for e in map(collected.participation.__getitem__, devices) if e.outcome == ACCEPTED]
    collected.reports -= len(lost)
    if collected.reports:  # else the attempt is given up as a whole, and what each device did stays
        word = "The sum of its devices failed."
        collected.participation |= {e.device_id: replace(e, outcome=SURPLUS, detail=word) for e in lost}
    collected.burnt = not collected.enough and any(end > Stage.UPLOADS for end in ends)
    return [i for i, end in enumerate(ends) if end is Stage.DONE]


def _end_of(plan: RoundPlan, group: Sequence[str], collected: Collected, left: Mapping[str, Stage]) -> Stage:
    """The stage that too few of these devices would get through, as ``ServerSession`` counts them."""
    rules = rules_of(_secure(plan), len(group))
    there = [device for device in group if left.get(device) is not Stage.ADVERTS]
    n = len(there)
    if n < rules.min_cohort:
        return Stage.ADVERTS
    survivors = max(rules.least_survivors(n), plan.private.survivors if plan.private else 0)
    needed = {
        Stage.SHARES: survivors,
        Stage.UPLOADS: survivors,
        Stage.CONSENTS: rules.quorum(n),
        Stage.REVEALS: rules.threshold(n),
    }
    for stage, least in needed.items():
        there = [device for device in there if left.get(device) is not stage]
        if stage is Stage.UPLOADS:
            there = [device for device in there if collected.participation[device].outcome == ACCEPTED]
        if len(there) < least:
            return stage
    return Stage.DONE


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
