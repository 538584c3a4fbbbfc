"""Rounds over the real fleet (``rounds.exchange.Exchange``).

The messages travel through Flower's fleet API, the word that there is one through the device service: a
selected device is told at once if it waits on a stream, else at its next check-in. A device that vanishes in
mid-round is given up after ``GONE_S`` of silence; nobody waits for it until the deadline. A run that is asked
to stop waits ``STOP_S`` for the answers that are on their way.

Updates are durable before their devices hear that they have come (``attempts``). An attempt that a restart
cut off goes on: what had come is there again, the other devices are asked again, and give what they have.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_fl.crashpoints import reached
from lepton_fl.errors import Cause, LeptonError, NotFound, Rejection, TrustError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.exchange import Answer
from lepton_fl.wire.messages import MODEL, Request
from lepton_fl.wire.records import Records
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.attempts import Attempts, Update
from lepton_server.fleet import Fleet
from lepton_server.flower import FlowerLink, Keep, Mailbox, Reply
from lepton_server.patience import Interrupted
from lepton_server.watchdog import Facts, diagnose

log = logging.getLogger(__name__)

WAKE_S = 0.5  # how often a waiting round looks for vanished devices and a shutdown
GONE_S = 20.0  # a device that had a stream, lost it, and is silent at the fleet API for so long, is gone
SILENT_S = 40.0  # one that never had a stream; one that works sends a heartbeat to the fleet API every 10 s
BACK_S = 120.0  # after a restart devices come back spread out
STOP_S = 10.0  # how long an attempt goes on after a request to stop


@dataclass
class _Attempt:
    """The open messages of one attempt."""

    plan: RoundPlan
    ends: float  # monotonic seconds; of a stage, if there are several
    leaves: float = 0.0  # when devices stop waiting for more; 0 = at the end
    resumed: bool = False  # it was begun before a restart
    durable: bool = False  # its answers are kept before they are acknowledged
    hurried: bool = False  # the run was asked to stop, and the end is set accordingly
    devices: dict[str, str] = field(default_factory=dict)  # message id -> device id, unanswered
    nodes: dict[str, int] = field(default_factory=dict)  # device id -> Flower node id
    streamed: set[str] = field(default_factory=set)  # told through their stream
    missing_since: dict[str, float] = field(default_factory=dict)  # device id -> monotonic seconds
    asked_at: dict[str, float] = field(default_factory=dict)  # device id -> monotonic seconds
    messages: Mapping[str, Records] = field(default_factory=dict)  # device id -> what it was asked last
    again: set[str] = field(default_factory=set)  # asked once more, after their node was shut out
    posted: dict[str, str] = field(default_factory=dict)  # message id -> device id, all that were sent


@dataclass(frozen=True)
class _Look:
    """An open attempt for the watchdog (``watchdog.Attended``)."""

    exchange: "FleetExchange"
    under_way: _Attempt
    round: int
    attempt: int
    asked: int

    @property
    def until(self) -> float:
        """When it closes, UTC seconds."""
        return time.time() + self.under_way.ends - time.monotonic()

    def open(self) -> dict[str, Facts]:
        """The devices that have not answered."""
        now, waiting = time.monotonic(), dict(self.under_way.devices)
        return {d: self.exchange.facts(self.under_way, d, now) for d in waiting.values()}


class FleetExchange:
    """One run's way to its devices."""

    def __init__(
        self,
        link: FlowerLink,
        fleet: Fleet,
        public_keys: Callable[[str], bytes],
        *,
        stay_s: float,
        closing: Callable[[], bool],
        stopping: Callable[[], bool] = lambda: False,
        attends: Callable[[_Look | None], None] = lambda attempt: None,
        reoffered: Callable[[RoundPlan, str], None] = lambda plan, device_id: None,
        attempts: Attempts | None = None,
        moved: Callable[[RoundPlan, str], None] = lambda plan, phase: None,
        unfinished: RoundPlan | None = None,
        packs: bool = True,
    ) -> None:
        """Make the exchange of a run.

        Args:
            link: Flower's fleet API.
            fleet: who is there, and the way to tell a device something.
            public_keys: device id -> DER public key; NotFound for a device that is no longer enrolled.
            stay_s: how long a device stays active after its work.
            closing: whether the coordinator shuts down.
            stopping: whether the run was asked to stop.
            attends: told of the attempt that is open; None = it is closed.
            reoffered: told of a device that is asked once more, because its node had been shut out.
            attempts: keep updates; None = they are in memory only.
            moved: told that an attempt has come to a phase.
            unfinished: an attempt that a restart has cut off: its devices take part in it again.
            packs: whether models are packed for devices that can unpack them.
        """
        self._attempts, self.moved, self._unfinished = attempts, moved, unfinished
        self._packs, self._down = packs, ("", dict[str, int]())
        self._link, self._fleet, self._public_keys = link, fleet, public_keys
        self._attends, self._reoffered = attends, reoffered
        self._stay_s, self._closing, self._stopping = stay_s, closing, stopping

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        """Send the request and yield answers until all are in, the deadline passes, or the caller closes.

        Raises:
            Interrupted: the coordinator shuts down.
        """
        again = self._unfinished is not None and self._unfinished.nonce == plan.nonce
        attempt = _Attempt(plan, time.monotonic() + plan.deadline_s, resumed=again)
        waits, box = list(plan.cohort) if again else [], self._mailbox(plan)
        self._fleet.open_attempt(plan.run_id, plan.nonce)
        try:
            for kept in self._known(attempt, durable=True):
                waits.remove(kept.device_id)
                yield Answer(kept.device_id, self._link.reread(kept.read), kept.num_bytes)
            if self._attempts and again and self._attempts.is_closed(plan):
                return  # it is fixed whose updates count
            self._attend(attempt)
            asked = waits if again else plan.cohort
            attempt.durable = plan.kind == "train"
            yield from self._send(attempt, box, dict.fromkeys(asked, request.to_records()))
            waits = []
            if plan.kind == "train":
                self.moved(plan, "offered")
                reached("round.offered")
            yield from self._answers(attempt, box)
            yield from self._silent(attempt, plan.deadline_s)
        finally:
            self._close(attempt, box)
            # At a shutdown the devices go on working: the attempt goes on after the restart.
            going_on = self._attempts is not None and plan.kind == "train" and self._closing()
            self._release(attempt, {*waits, *attempt.devices.values()}, going_on=going_on)

    def _known(self, attempt: _Attempt, durable: bool) -> list[Update]:
        """What an attempt had been sent before a restart."""
        return self._attempts.of(attempt.plan) if self._attempts and durable and attempt.resumed else []

    def _keep(self, plan: RoundPlan, device_id: str) -> Keep:
        """What makes a device's update durable."""
        attempts = self._attempts
        assert attempts is not None  # asked before
        return lambda contents, num_bytes: attempts.keep(plan, device_id, contents, num_bytes).read

    def kept(self, plan: RoundPlan, device_id: str) -> Records | UpdateRejected:
        """A durable answer to an attempt, read again.

        Raises:
            NotFound: the device has not given one.
        """
        assert self._attempts is not None  # it has made the answer durable
        return self._link.reread(self._attempts.one(plan, device_id).read)

    def stages(self, plan: RoundPlan, seconds: float, *, resumed: bool = False) -> "Stages":
        """Open an attempt whose devices are asked several times; close it.

        Args:
            plan: of the attempt.
            seconds: the longest that all of it takes.
            resumed: devices that have taken part before a restart do so again.
        """
        leaves = time.monotonic() + seconds
        self._fleet.open_attempt(plan.run_id, plan.nonce)
        return Stages(self, _Attempt(plan, leaves, leaves, resumed), self._mailbox(plan))

    def ask_stage(
        self,
        attempt: _Attempt,
        box: Mailbox,
        messages: Mapping[str, Records],
        seconds: float,
        durable: bool = False,
    ) -> Generator[Answer | None, None, None]:
        """See ``Stages.ask``."""
        attempt.ends, attempt.hurried = time.monotonic() + seconds, False
        try:
            self._attend(attempt)
            attempt.durable = durable
            known = [k for k in self._known(attempt, durable) if k.device_id in messages]
            for kept in known:
                yield Answer(kept.device_id, self._link.reread(kept.read), kept.num_bytes)
            rest = messages
            if known:
                rest = _Some(messages, {k.device_id for k in known})
            yield from self._send(attempt, box, rest)
            yield from self._answers(attempt, box, idle=True)
            yield from self._silent(attempt, seconds)
        finally:
            box.withdraw(list(attempt.devices))
            attempt.devices.clear()

    def end_stages(self, attempt: _Attempt, box: Mailbox, *, going_on: bool) -> None:
        """See ``Stages.close``."""
        self._close(attempt, box)
        # At a shutdown the devices keep what they have: the attempt goes on after the restart.
        self._release(attempt, set(attempt.plan.cohort), going_on=going_on or self._closing())

    def _answers(
        self, attempt: _Attempt, box: Mailbox, *, idle: bool = False
    ) -> Generator[Any, None, None]:  # of Answer, and with ``idle`` of None
        while attempt.devices:
            if self._closing():
                raise Interrupted
            left = self._left(attempt)
            reply = box.get(min(left, WAKE_S))
            if reply is not None and self._was_evicted(attempt, reply):
                yield from self._ask_again(attempt, box, attempt.devices.pop(reply.message_id))
            elif reply is not None:
                if (device_id := attempt.devices.pop(reply.message_id, None)) is not None:
                    yield Answer(device_id, reply.content, reply.num_bytes)
                    del reply  # it may be large: not while waiting for the next one
            elif left <= 0:  # only now: an answer that was complete in time counts
                break
            else:
                yield from self._vanished(attempt, box)
                if idle:
                    yield None

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Send the verdict through the device service."""
        verdict = pb.Verdict(
            run_id=plan.run_id,
            round=plan.round,
            attempt=plan.attempt,
            kind=plan.kind,
            accepted=refusal is None,
            reason="" if refusal is None else refusal.reason.value,
            detail="" if refusal is None else str(refusal)[:500],
        )
        if refusal is not None:
            cause = refusal.reason.value if refusal.cause is None else refusal.cause.value
            where = {"run": plan.run_id, "round": plan.round, "attempt": plan.attempt}
            log.warning(
                "run %s round %d: %s of %s: %s",
                plan.run_id,
                plan.round,
                refusal.reason,
                device_id,
                refusal,
                extra={"event": "answer.refused", **where, "device": device_id, "cause": cause},
            )
        self._instruct(device_id, pb.Instruction(verdict=verdict))

    def down(self, plan: RoundPlan) -> Mapping[str, int] | None:
        """Bytes that each device was sent in an attempt, if it is the last one that was closed."""
        nonce, sent = self._down
        return sent if nonce == plan.nonce else None

    # --- sending ------------------------------------------------------------------------------------

    def _mailbox(self, plan: RoundPlan) -> Mailbox:
        """Of an attempt; frozen parameters go in parts of their own, which devices keep."""
        seams = {MODEL: plan.num_coordinates - plan.fixed} if plan.fixed else {}
        return self._link.mailbox(packs_for=plan.run_id if self._packs else "", seams=seams)

    def _close(self, attempt: _Attempt, box: Mailbox) -> None:
        """Nobody is asked any more; what was sent is known now."""
        self._attends(None)
        box.close()
        sent = dict.fromkeys(attempt.plan.cohort, 0)
        for message_id, num_bytes in box.sent.items():
            sent[attempt.posted[message_id]] += num_bytes
        self._down = attempt.plan.nonce, sent

    def _send(
        self, attempt: _Attempt, box: Mailbox, messages: Mapping[str, Records]
    ) -> Generator[Answer, None, None]:
        plan, ttl_s = attempt.plan, max(1.0, attempt.ends - time.monotonic())
        attempt.messages = messages
        for device_id in messages:
            if not self._fleet.mark_busy(device_id, plan.run_id):
                busy = UpdateRejected(
                    Rejection.OFFLINE, f"Device {device_id} was taken by another run meanwhile."
                )
                yield Answer(device_id, busy)
                continue
            try:
                node_id = self._admit(device_id)
                keep = self._keep(plan, device_id) if attempt.durable and self._attempts else None
                message_id = box.post(
                    node_id, messages[device_id], message_type=plan.kind, ttl_s=ttl_s, keep=keep
                )
            except (TrustError, NotFound) as error:
                yield Answer(device_id, UpdateRejected(Rejection.REVOKED, str(error)))
                continue
            except LeptonError as error:  # the device has done nothing wrong
                yield Answer(device_id, UpdateRejected(Rejection.OFFLINE, f"It could not be asked: {error}"))
                continue
            attempt.nodes[device_id] = node_id
            attempt.asked_at[device_id] = time.monotonic()
            attempt.devices[message_id] = attempt.posted[message_id] = device_id
            if self._instruct(device_id, self._participate(attempt, node_id)):
                attempt.streamed.add(device_id)
            reached("round.offering")

    def _was_evicted(self, attempt: _Attempt, reply: Reply) -> bool:
        """Whether a message failed because the device's node was shut out, though the device is enrolled."""
        device_id = attempt.devices.get(reply.message_id)
        return (
            device_id is not None
            and isinstance(reply.content, UpdateRejected)
            and reply.content.reason is Rejection.REVOKED
            and self._fleet.is_enrolled(device_id)
        )

    def _ask_again(self, attempt: _Attempt, box: Mailbox, device_id: str) -> Generator[Answer, None, None]:
        """Let the device in again and ask it once more; a second time is one too many."""
        why = f"The node of device {device_id} was shut out of the fleet port, though it is enrolled."
        self._fleet.note(device_id, Cause.EVICTED, "its node was shut out of the fleet port")
        if device_id in attempt.again:
            yield Answer(device_id, UpdateRejected(Rejection.OFFLINE, why, cause=Cause.EVICTED))
            return
        attempt.again.add(device_id)
        log.warning("run %s round %d: %s It is asked again.", attempt.plan.run_id, attempt.plan.round, why)
        self._reoffered(attempt.plan, device_id)
        messages = attempt.messages
        yield from self._send(attempt, box, {device_id: messages[device_id]})
        attempt.messages = messages

    def _admit(self, device_id: str) -> int:
        key = self._public_keys(device_id)
        node_id = self._link.admit(key)
        if not self._fleet.is_enrolled(device_id):  # revoked in this very moment: nobody else shuts it out
            self._link.expel(key)
            raise TrustError(f"Device {device_id} was revoked.")
        return node_id

    def _participate(self, attempt: _Attempt, node_id: int) -> pb.Instruction:
        plan = attempt.plan
        return pb.Instruction(
            participate=pb.Participate(
                run_id=plan.run_id,
                round=plan.round,
                attempt=plan.attempt,
                kind=plan.kind,
                task=plan.task,
                task_version=plan.task_version,
                deadline_s=max(0.0, (attempt.leaves or attempt.ends) - time.monotonic()),
                stay_s=self._stay_s,
                node_id=node_id,
                nonce=plan.nonce,
                resumed=attempt.resumed,
            )
        )

    def _instruct(self, device_id: str, instruction: pb.Instruction) -> bool:
        try:
            return self._fleet.instruct(device_id, instruction)
        except NotFound:
            return False  # revoked meanwhile; its message fails by itself

    # --- waiting ------------------------------------------------------------------------------------

    def _left(self, attempt: _Attempt) -> float:
        """Seconds until the attempt closes, at least 0; a request to stop brings the end near."""
        now = time.monotonic()
        if not attempt.hurried and self._stopping():
            attempt.hurried, attempt.ends = True, min(attempt.ends, now + STOP_S)
        return max(0.0, attempt.ends - now)

    def _vanished(self, attempt: _Attempt, box: Mailbox) -> Generator[Answer, None, None]:
        """Give up devices that say so, or show no sign of life, however alive their stream looks."""
        now, nonce = time.monotonic(), attempt.plan.nonce
        for message_id, device_id in list(attempt.devices.items()):
            if why := self._fleet.gave_up(device_id, nonce):
                box.withdraw([message_id])
                del attempt.devices[message_id]
                yield Answer(device_id, UpdateRejected(Rejection.FAILED, why))
                continue
            if self._is_there(attempt, device_id):
                attempt.missing_since.pop(device_id, None)
            else:
                attempt.missing_since.setdefault(device_id, now)
            facts = self.facts(attempt, device_id, now)
            silent_s = BACK_S if attempt.resumed else SILENT_S
            limit = GONE_S if device_id in attempt.streamed and facts.lost_s else silent_s
            idle = facts.idle_s
            lost = facts.lost_s >= limit and (idle is None or idle >= limit)
            cut = facts.vitals.streaming and facts.came and idle is not None and idle >= limit
            if lost or cut:
                box.withdraw([message_id])
                del attempt.devices[message_id]
                why = f"Device {device_id} has not been heard of for {limit:g} s."
                cause = Cause.HALF_OPEN if cut else Cause.GONE
                yield Answer(device_id, UpdateRejected(Rejection.OFFLINE, why, cause=cause))

    def _silent(self, attempt: _Attempt, seconds: float) -> Generator[Answer, None, None]:
        """Name what kept those from answering whom the deadline cut off; they are told to leave later."""
        if attempt.hurried:
            return
        now = time.monotonic()
        for device_id in list(attempt.devices.values()):
            found = diagnose(self.facts(attempt, device_id, now))
            cause = found.cause if found.is_fault else Cause.SLOW
            why = f"No answer of device {device_id} within {seconds:g} s: " + (
                found.detail or "it was still at work"
            )
            yield Answer(device_id, UpdateRejected(Rejection.OFFLINE, why, cause=cause))

    def _attend(self, attempt: _Attempt) -> None:
        plan = attempt.plan
        self._attends(_Look(self, attempt, plan.round, plan.attempt, len(plan.cohort)))

    def facts(self, attempt: _Attempt, device_id: str, now: float) -> Facts:
        """What is known of a device that has not answered; any thread may ask."""
        missing = attempt.missing_since.get(device_id)
        return Facts(
            self._fleet.vitals(device_id),
            asked_s=now - attempt.asked_at.get(device_id, now),
            idle_s=self._link.idle_s(attempt.nodes[device_id]),
            lost_s=0.0 if missing is None else max(1e-3, now - missing),
        )

    def _is_there(self, attempt: _Attempt, device_id: str) -> bool:
        if self._fleet.is_waiting(device_id):
            return True
        return device_id not in attempt.streamed and self._fleet.is_online(device_id)

    def _release(self, attempt: _Attempt, leaving: set[str], *, going_on: bool) -> None:
        """Let the cohort go; unless the attempt goes on after a restart, those at work on it leave it."""
        plan = attempt.plan
        if not going_on:
            self._fleet.close_attempt(plan.run_id, plan.nonce)
        leave = pb.Instruction(
            leave=pb.Leave(
                run_id=plan.run_id,
                round=plan.round,
                attempt=plan.attempt,
                kind=plan.kind,
                nonce=plan.nonce,
            )
        )
        for device_id in plan.cohort:
            self._fleet.mark_idle(device_id, plan.run_id)
            if device_id in leaving and not going_on:
                self._instruct(device_id, leave)


class _Some(Mapping[str, Records]):
    """A mapping without some of its keys; its values are made when they are needed."""

    def __init__(self, all_: Mapping[str, Records], without: set[str]) -> None:
        self._all, self._keys = all_, [key for key in all_ if key not in without]

    def __getitem__(self, key: str) -> Records:
        return self._all[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Stages:
    """One attempt whose devices are asked several times, as secure aggregation does it."""

    def __init__(self, exchange: FleetExchange, attempt: _Attempt, box: Mailbox) -> None:
        self._exchange, self._attempt, self._box = exchange, attempt, box

    def ask(
        self, messages: Mapping[str, Records], seconds: float, *, durable: bool = False
    ) -> Generator[Answer | None, None, None]:
        """Send each device its message and yield answers, and None now and then while none comes.

        With ``durable`` an answer is on the disk before its device hears that it has come, and there again
        after a restart; one stage of an attempt can have that.

        Ends when all have answered or ``seconds`` have passed. Closing it withdraws what is open; devices
        stay in the attempt.

        Raises:
            Interrupted: the coordinator shuts down.
        """
        yield from self._exchange.ask_stage(self._attempt, self._box, messages, seconds, durable)

    def close(self, *, going_on: bool = False) -> None:
        """End the attempt: devices are told to leave, unless it goes on or the coordinator shuts down."""
        self._exchange.end_stages(self._attempt, self._box, going_on=going_on)
