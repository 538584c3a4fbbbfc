"""Rounds in which the coordinator learns one sum: ``flsa/1`` led through its stages.

Two layers. ``lead`` takes a ``ServerSession`` from the adverts to the sum over any way of asking devices; it
knows no plan and no transport. ``collect_secure`` puts a round's plan on top and brings what
``collect_training`` brings: who took part, and the mean update (``rounds.secure_sum``).

A round that loses too many devices has no result and reveals nothing. Example counts and losses of single
devices are not seen either: they travel in the sum.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from lepton_fl.errors import QuorumError, Rejection, TrustError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, Brought, Clock, Collected, Finish, Participation
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.secure_sum import Uploads, are_in, context_of, decode_total, encoding_of, groups_of
from lepton_fl.secagg.identity import Trust
from lepton_fl.secagg.server import Journal, Outcome, ServerSession, Stage, is_decision
from lepton_fl.secagg.uploads import Intake, MemorySpool, Spool
from lepton_fl.wire.messages import Request

log = logging.getLogger(__name__)

TRIES: Final = 2  # at the last stage, where nothing but silence stands between a round and its sum


@dataclass(frozen=True)
class Told:
    """One device's answer at one stage, or why there is none."""

    device: str
    message: bytes | UpdateRejected
    vector: bytes | memoryview = b""  # masked; at stage UPLOADS
    seconds: float = 0.0  # the device's own
    num_bytes: int = 0
    arrived_s: float | None = None  # since the attempt began; None = this very moment


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
        wanted: with so many vectors in all, and enough of each cohort that can still have them, the uploads
            close; 0 = wait for all.
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
        self._refused: set[str] = set()  # who brings no vector, as the protocol knows them

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
        """Ask until all have been heard, or time is up, or the uploads are in."""
        if not messages:
            return
        most = sum(len(p.devices) if stage is Stage.ADVERTS else p.session.n for p in parties)
        if stage is Stage.UPLOADS and self.wanted:
            most = self.wanted
        with closing(self.ask(stage, messages)) as answers:
            for told in answers:
                self._take(stage, told)
                del told  # it may be large: not while waiting for the next one
                if self._full(stage, parties, most):
                    return

    def _full(self, stage: Stage, parties: Sequence[Party], most: int) -> bool:
        if stage is Stage.UPLOADS:
            return are_in([self._uploads(p.session) for p in parties], most)
        return sum(len(p.session.heard()) for p in parties) >= most

    def _uploads(self, session: ServerSession) -> Uploads:
        heard = session.heard()
        possible = session.expected() - (self._refused - heard)
        return Uploads(len(heard), len(possible), session.needed(), session.n)

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
        if refusal is not None and stage is Stage.UPLOADS:
            self._refused.add(told.device)
        self.hear(stage, told, refusal)


# --- a round ----------------------------------------------------------------------------------------


class SecureRounds(Protocol):
    """How the rounds of a secure run are collected."""

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
    ) -> Brought:
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
) -> Brought:
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
        collected.burnt = collected.forgotten or any(p.session.stage > Stage.UPLOADS for p in parties)
        return collected, None
    mean = decode_total(plan, encoding, totals, collected, finish)
    collected.burnt = mean is None
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
                self._entries[told.device] = before._replace(detail=str(refusal))
            return
        self._entries[told.device] = Participation(
            told.device,
            refusal.reason.value if refusal else ACCEPTED,
            str(refusal) if refusal else "",
            seconds=told.seconds,
            num_bytes=told.num_bytes + (before.num_bytes if before else 0),
            arrived_s=self._collected.elapsed_s() if told.arrived_s is None else told.arrived_s,
            cause=refusal.cause if refusal else None,
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
                    entry = entry._replace(outcome=SURPLUS if full else Rejection.OFFLINE.value)
                    entry = entry if full else entry._replace(detail=word)
                elif entry.outcome == ACCEPTED and useful and outcome.total is None:
                    word = f"The sum of its {len(party.devices)} devices failed: {outcome.reason}"
                    entry = entry._replace(outcome=SURPLUS, detail=word)
                found[device] = entry
        self._collected.participation = {device: found[device] for device in self._collected.plan.cohort}

    def _entry(self, device: str, came: bool, survives: bool, fault: str, outcome: Outcome) -> Participation:
        """What is noted of a device, and its fault."""
        entry = self._entries.get(device) or Participation(  # it came before a restart, perhaps
            device, ACCEPTED if came else Rejection.OFFLINE.value
        )
        if fault and not (survives and outcome.total is not None):
            return entry._replace(outcome=Rejection.BLAMED.value, detail=f"Blamed: {fault}.")
        return entry._replace(detail=f"Blamed: {fault}; its vector counts.") if fault else entry
