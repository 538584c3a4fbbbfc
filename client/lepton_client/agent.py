"""The edge client process: checks in, waits, takes part when selected, and outlives its troubles.

One loop in the main thread owns all decisions. It calls the coordinator, then handles events until the
next call is due: instructions from the Wait stream, the worker getting busy or idle, finished data checks.

    Agent(config).run()            # until ``stop`` (SIGTERM) or the coordinator refuses this device

Rules: one line per change of state, never per attempt; intervals run on the boot clock; only a refusal by
the coordinator (TrustError) or unusable state on disk ends the process.
"""

import logging
import math
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from lepton_client.backoff import Backoff
from lepton_client.clock import Clock, SystemClock, Watch
from lepton_client.config import ClientConfig, TaskSection
from lepton_client.contracts import Contracts
from lepton_client.courier import Courier
from lepton_client.desk import Office
from lepton_client.diary import Diary
from lepton_client.eligibility import Machine, disk_objection, first_objection
from lepton_client.inspection import Finding, Inspector, inspect
from lepton_client.ledger import Ledger
from lepton_client.limits import apply_limits, memory_kills
from lepton_client.link import PROTOCOL, Busy, Cancelled, HungUp, Link, Listener, Refused
from lepton_client.memory import FileMemory
from lepton_client.objects import KeptObjects
from lepton_client.secure import Seat
from lepton_client.spending import Spending, policies_of
from lepton_client.state import Identity, StateDir
from lepton_client.witness import Witness
from lepton_client.worker import Answerer, Key, Node, Selection, Worker
from lepton_fl.errors import Cause, LeptonError, Rejection, StateError, TrustError
from lepton_fl.files import read_private
from lepton_fl.privacy.head import LedgerHead
from lepton_fl.wire.v1 import device_pb2 as pb

if TYPE_CHECKING:
    from lepton_fl.crypto import PrivateKey

log = logging.getLogger("lepton_client")

RENEW_AT: Final = 2 / 3  # of a certificate's life
LEAVE_S: Final = 5.0  # seconds that a training step may take to notice that we stop
RETRY_RENEWAL_S: Final = 600.0  # between two tries to renew while the certificate may still do
SLICE_S: Final = 30.0  # longest nap: after a laptop's sleep the boot clock is looked at again
FALLBACK_S: Final = 60.0  # to the next check-in, when the coordinator's word makes no sense
STEADY_S: Final = 5.0  # a stream that lived so long was a good one
MAX_TASK_S: Final = 7 * 86_400.0  # no round lasts longer
RETRY_PUSH_S: Final = 30.0  # Flower's node repeats an upload so long before the worker joins anew
GIVE_BACK_S: Final = 5.0  # that the message of a round that was cut off is looked for
BUSY_SLICE_S: Final = 2.0  # longest nap while something trains: its steps are looked at
LINK_S: Final = 15.0  # a message that is on its way for longer has a slow link
SCAR_S: Final = 120.0  # how long the coordinator is told of the work that a kill has cut off
MAX_ENGAGED: Final = 8  # attempts in one check-in
SUSPECT_AFTER: Final = 3  # times in a row that the coordinator hung up: our certificate may be why

NodeFactory = Callable[[str, bytes, "PrivateKey"], Node]


@dataclass(frozen=True)
class Ended:
    """A Wait stream is over."""

    stream: int
    error: LeptonError | None


class Poke:
    """Something changed: check in now."""


Event = pb.Instruction | Ended | Poke


class Agent:
    """One device's agent; ``run`` once."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        clock: Clock | None = None,
        machine: Machine | None = None,
        node_factory: NodeFactory | None = None,
        answer: Answerer | None = None,
        check: Callable[[TaskSection], Finding] = inspect,
    ) -> None:
        """Everything but ``config`` is for tests."""
        self._config = config
        self._clock = clock or SystemClock()
        self._machine = machine or Machine()
        self._state = StateDir(config.client.state_dir)
        kept = KeptObjects(self._state.objects, config.connection.keep_bytes)
        self._node_factory = node_factory or partial(flower_node, kept=kept)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()  # put() is safe in a signal handler
        self._inspector = Inspector(config.tasks, self._poke, check)
        self._memory = FileMemory(self._state.memory)
        office = Office(
            config.tasks,
            config.limits,
            self._inspector.distrust,
            self._memory,
            Spending(self._state.spending, policies_of(config.tasks)),
            self._refused,
            secure=config.client.secure_aggregation == "required",
        )
        self._answer: Answerer = answer or office
        self._office = office
        self._courier = Courier(config, self._state, self._clock, self._poke)
        self._watch = Watch(self._clock)
        bounds = config.connection.backoff_min_s, config.connection.backoff_max_s
        self._backoff, self._stream_backoff = Backoff(*bounds), Backoff(*bounds)
        self._stopping = False
        self._poked = False
        self._failures = 0  # since the last answer
        self._rest_until = -math.inf  # the coordinator has asked not to be called before
        self._hung_up = 0  # of these, the last ones in a row in which the other side hung up
        self._renewal_wanted = False
        self._renewal_tried = -math.inf
        self._scar: tuple[Cause, str, float] | None = (
            None  # what ended the process before us, told until then
        )
        self._stalled: Cause | None = None  # what holds the work up, as the coordinator knows it
        self._link: Link | None = None
        self._listener: Listener | None = None
        self._stream = 0  # number of the current Wait stream
        self._stream_began = 0.0

    def stop(self) -> None:
        """Ask the agent to leave; may be called from a signal handler or any thread."""
        self._stopping = True
        self._events.put(Poke())

    def run(self) -> bool:
        """Work until ``stop``.

        Returns:
            Whether every thread ended; False: the process should end without waiting for the task's code.

        Raises:
            NotFound: the device is not enrolled.
            TrustError: the coordinator refuses this device.
            StateError: the state folder is held by another agent, or damaged.
        """
        with self._state.locked():
            self._identity = self._state.identity()
            self._key_pem = read_private(self._state.key)
            ledger = Ledger(self._state.ledger, memory_kills)
            self._seat = Seat(self._state, self._config.client, self._office, wall=self._clock.wall)
            self._seat.belongs_to(self._identity)
            apply_limits(self._config.limits)
            self._diary = Diary(self._state, self._clock, self._facts())
            self._witness = Witness(self._state.witness, self._identity.ca_pem)
            self._office.contracts = Contracts(self._state.contracts, self._broken_contract)
            self._worker = Worker(
                self._new_node,
                self._answer,
                ledger,
                self._clock,
                poll_s=self._config.connection.poll_s,
                changed=self._poke,
                trouble=self._diary.hit,
                settle=self._settle,
                seat=self._seat,
            )
            self._give_back(ledger)
            try:
                self._loop()
                return self._leave("stopped")
            except LeptonError as error:
                self._leave(f"stopped: {error}")
                raise

    def _give_back(self, ledger: Ledger) -> None:
        """Answer what a kill cut off with a failure, so that the round need not wait for its deadline."""
        reason = Rejection.OUT_OF_MEMORY if ledger.killed_for_memory else Rejection.INTERRUPTED
        for entry in ledger.interrupted():
            why = f"round {entry.round} of run {entry.run_id} was cut off when the process ended"
            if ledger.killed_for_memory:
                why += "; meanwhile the machine ended a process for want of memory"
            log.warning("%s; it is not redone", why)
            self._scar = (Cause(reason.value), why, self._clock.now() + SCAR_S)
            key = (entry.run_id, entry.round, entry.nonce)
            deadline = self._clock.now() + GIVE_BACK_S
            self._worker.select(
                Selection(key, deadline, 0.0, f"On this device {why}; it works once only.", reason)
            )
            try:
                ledger.answered(entry)  # once: the next start does not ask again
            except StateError as error:
                self._diary.hit(error)

    # --------------------------------------------------------------------------------------------- the loop

    def _loop(self) -> None:
        while not self._stopping:
            try:
                delay = self._check_in()
                self._diary.flush()
                self._handle_until(self._clock.now() + delay)
            except LeptonError:
                raise
            except Exception:  # a device that is silent for ever holds up others
                log.exception("an error that nobody foresaw; the agent begins anew with a check-in")
                self._hang_up()
                self._rest(self._backoff.next())

    def _rest(self, seconds: float) -> None:
        """Do nothing, unless it is asked to stop."""
        ends = self._clock.now() + seconds
        while not self._stopping and self._clock.now() < ends:
            time.sleep(0.1)

    def _handle_until(self, deadline: float) -> None:
        """Handle events until the deadline, or until one asks for an earlier check-in."""
        while not self._stopping and (left := deadline - self._clock.now()) > 0:
            nap = BUSY_SLICE_S if self._worker.busy else SLICE_S
            try:
                event = self._events.get(timeout=min(left, nap))
            except queue.Empty:
                if self._held_up() != self._stalled:
                    return  # the coordinator should know
                continue
            sooner = self._handle(event)
            self._diary.flush()
            if sooner is not None:
                deadline = max(min(deadline, self._clock.now() + sooner), self._rest_until)

    def _handle(self, event: Event) -> float | None:
        """Returns in how many seconds to check in, if that is to be sooner than planned."""
        if isinstance(event, pb.Instruction):
            self._obey(event)
            return None
        if isinstance(event, Ended):
            return self._stream_ended(event)
        self._poked = False
        return 0.0

    def _poke(self) -> None:
        if not self._poked:
            self._poked = True
            self._events.put(Poke())

    # ----------------------------------------------------------------------------------------- the check-in

    def _check_in(self) -> float:
        """One call; returns the seconds to the next one."""
        if jump := self._watch.jumped():
            log.warning("this machine's clock was moved by %+.0f s", jump)
        self._inspector.refresh()
        self._courier.refresh()
        failures = self._worker.failures
        try:
            self._renew_if_due()
            answer = self._dial().check_in(self._report(failures))
        except Cancelled:
            return 0.0
        except Refused:
            raise
        except Busy as error:  # it is there; a new connection would only cost both sides
            self._diary.say("connection", f"The coordinator is busy: {error}", logging.WARNING, key="busy")
            wait_s = error.wait_s or self._backoff.next()
            self._rest_until = self._clock.now() + wait_s
            return wait_s
        except LeptonError as error:
            return self._offline(error)
        self._worker.heard(failures)
        return self._online(answer)

    def _report(self, failures: Mapping[Key, str]) -> pb.CheckInRequest:
        status, reason = self._status()
        findings = self._inspector.findings
        self._diary.note(
            state=pb.Status.Name(status).removeprefix("STATUS_").lower().replace("_", " "),
            reason=reason,
            tasks=[{"name": f.name, "ready": f.ready, "reason": f.reason, "rows": f.rows} for f in findings],
            delivery=self._courier.status(),
        )
        for finding in findings:
            text = f"{finding.name} sits out: {finding.reason}" if finding.reason and finding.checked else ""
            self._diary.say(f"task {finding.name}", text, logging.WARNING)
        return pb.CheckInRequest(
            protocol=PROTOCOL,
            status=status,
            reason=reason[:500],
            tasks=[
                pb.TaskReport(name=f.name, version=f.version, ready=f.ready, reason=f.short_reason)
                for f in findings
                if f.checked  # a task that cannot be loaded has no version, but a reason
            ],
            client_version=version("lepton-fl"),
            capabilities=_capabilities(),
            device_time=self._clock.wall(),
            credential_ends=self._seat.credential_ends,
            adverts=self._seat.adverts,
            advert_session=self._seat.session,
            troubles=self._troubles(),
            desired_digest=self._courier.acknowledged,
            serving=self._courier.report(),
            service=self._courier.service(),
            trial=self._courier.trial(),
            ledger=_shown(self._witness.seen),
            engaged=_engaged(self._worker.open, failures),
        )

    def _held_up(self) -> Cause | None:
        """Whether the work in hand does not get on."""
        if self._worker.stalled_s >= self._config.limits.stall_s:
            return Cause.HUNG_TRAINING
        return Cause.SLOW_LINK if self._worker.moving_s >= LINK_S else None

    def _troubles(self) -> list[pb.Trouble]:
        """What is wrong here, each with its cause in one word."""
        found: list[tuple[Cause, str]] = []
        self._stalled = self._held_up()
        if self._stalled is Cause.HUNG_TRAINING:
            found.append((Cause.HUNG_TRAINING, f"no step of training for {self._worker.stalled_s:.0f} s"))
        elif self._stalled is Cause.SLOW_LINK:
            words = f"a message of the round has been on its way for {self._worker.moving_s:.0f} s"
            found.append((Cause.SLOW_LINK, words))
        if self._diary.trouble and self._diary.full:
            found.append((Cause.DISK_FULL, self._diary.trouble))
        elif words := disk_objection(self._config.eligibility, self._state.folder, self._machine):
            found.append((Cause.DISK_FULL, words))
        if self._scar is not None and self._clock.now() < self._scar[2]:
            found.append(self._scar[:2])
        return [pb.Trouble(cause=cause.value, detail=words[:500]) for cause, words in found]

    def _status(self) -> tuple[pb.Status, str]:
        if self._worker.busy:
            return pb.STATUS_BUSY, ""
        reason = self._objection()
        self._diary.say("eligible", f"Not taking part now: {reason}." if reason else "")
        return (pb.STATUS_NOT_ELIGIBLE, reason) if reason else (pb.STATUS_IDLE, "")

    def _objection(self) -> str:
        if not self._config.tasks:
            return "no task is allowed on this device"
        findings = self._inspector.findings
        if not any(finding.version for finding in findings):
            return f"{findings[0].name}: {findings[0].reason}"
        if self._diary.trouble:
            return self._diary.trouble
        if self._witness.objection:
            return self._witness.objection
        now = datetime.fromtimestamp(self._clock.wall()).astimezone()
        rules = self._config.eligibility
        return first_objection(rules, self._state.folder, now, self._machine)

    def _online(self, answer: pb.CheckInResponse) -> float:
        self._backoff.reset()
        self._failures = self._hung_up = 0
        self._diary.say("connection", f"Connected to {self._identity.device_service}.")
        if words := self._watch.heard(answer.server_time):
            log.warning("%s", words)
        self._diary.note(connected=True, error="", clock_skew_s=round(self._watch.skew))
        self._renewal_wanted = answer.renew
        self._want(answer.desired_json)
        objects = self._hear_of_ledger(answer)  # before anything is done for this coordinator
        for instruction in answer.instructions:
            self._obey(instruction)
        if answer.wait:
            self._listen()
        else:
            self._hush()
        self._seat.sent()
        if self._prepare(answer) or objects:
            return 0.0
        delay = answer.next_check_in_s
        return delay if 0 < delay <= 86_400 else FALLBACK_S  # NaN compares false

    def _hear_of_ledger(self, answer: pb.CheckInResponse) -> bool:
        """Look at the coordinator's privacy ledger; whether this device sits out from now on, or no more."""
        told = answer.ledger
        head = (
            LedgerHead(told.seq, told.hash, told.key, told.signature) if answer.HasField("ledger") else None
        )
        try:
            changed = self._witness.hear(head)
        except StateError as error:
            self._diary.hit(error)
            return False
        if changed and not self._witness.objection:
            self._diary.say("ledger", "The coordinator shows the privacy ledger again that was seen before.")
        return changed

    def _prepare(self, answer: pb.CheckInResponse) -> bool:
        """Get ready for rounds with secure aggregation; whether there is something to tell at once."""
        try:
            if answer.certify:
                before = self._seat.credential_ends
                self._identity = self._seat.certify(self._identity, self._dial())
                self._seat.belongs_to(self._identity)
                return self._seat.credential_ends != before
            if answer.adverts_wanted:
                self._seat.make_adverts(answer.adverts_wanted)
                return True
        except Cancelled:
            return False
        except StateError as error:
            self._diary.hit(error)
        except LeptonError as error:
            text = f"No secure rounds: {error} {error.hint}".strip()
            self._diary.say("secure", text, logging.WARNING)
        return False

    def _want(self, desired: str) -> None:
        try:
            self._courier.want(desired)
        except StateError as error:
            self._diary.hit(error)
        self._courier.refresh()

    def _offline(self, error: LeptonError) -> float:
        self._failures += 1
        self._hung_up = self._hung_up + 1 if isinstance(error, HungUp) else 0
        self._hang_up()
        text = f"{error} {error.hint}".strip()
        kind = "stranger" if isinstance(error, TrustError) else "away"
        words = f"No contact, trying again by itself: {text}"
        self._diary.say("connection", words, logging.WARNING, key=kind)
        self._diary.note(connected=False, error=text)
        return self._backoff.next()

    def _dial(self) -> Link:
        if self._link is None:
            identity = self._key_pem, self._identity.certificate_pem.encode()
            self._link = self._new_link(self._identity.device_service, identity)
        return self._link

    def _new_link(self, address: str, identity: tuple[bytes, bytes] | None = None) -> Link:
        return Link(
            address,
            self._identity.ca_pem.encode(),
            identity=identity,
            timeout_s=self._config.connection.timeout_s,
            stopping=lambda: self._stopping,
        )

    def _hang_up(self) -> None:
        self._hush()
        if self._link is not None:
            self._link.close()
            self._link = None

    # ---------------------------------------------------------------------------------------------- renewal

    def _renew_if_due(self) -> None:
        """Ask for a new certificate at 2/3 of its life, when told to, or when it may be why calls fail."""
        start, end = self._identity.valid_from, self._identity.valid_until
        now = self._watch.server_now()
        due = now >= start + RENEW_AT * (end - start) or self._renewal_wanted
        if not due and self._hung_up < SUSPECT_AFTER:
            return
        ended = now >= end
        if not ended and self._clock.now() - self._renewal_tried < RETRY_RENEWAL_S:
            return
        self._renewal_tried = self._clock.now()
        cause = Cause.EXPIRED_CERTIFICATE.value if ended else "due" if due else Cause.WRONG_CERTIFICATE.value
        from lepton_client.enrol import renew  # brings cryptography, which an idle agent does without

        try:
            with self._new_link(self._identity.enrolment) as link:
                self._adopt(renew(self._state, self._identity, link, cause))
        except LeptonError as error:
            if ended:  # nothing else can be tried; Refused ends the agent
                raise
            self._diary.say("renewal", f"The certificate could not be renewed yet: {error}", logging.WARNING)

    def _adopt(self, identity: Identity) -> None:
        self._identity = identity
        self._renewal_wanted = False
        self._hang_up()  # the next call shows the new certificate
        self._diary.say("renewal", f"The certificate was renewed; it is good until {identity.ends}.")
        self._diary.note(**self._facts())

    # ----------------------------------------------------------------------------------------- instructions

    def _listen(self) -> None:
        if self._listener is not None or self._link is None:
            return
        self._stream += 1
        self._stream_began = self._clock.now()
        self._listener = self._link.wait()
        reader = threading.Thread(
            target=self._read, args=(self._stream, self._listener), name="lepton-listener", daemon=True
        )
        reader.start()

    def _read(self, stream: int, listener: Listener) -> None:
        error: LeptonError | None = None
        try:
            for instruction in listener:
                self._events.put(instruction)
        except LeptonError as trouble:
            error = trouble
        self._events.put(Ended(stream, error))

    def _hush(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None

    def _stream_ended(self, event: Ended) -> float | None:
        if event.stream != self._stream or self._listener is None:
            return None  # an older one, or one that we ended
        self._listener = None
        if isinstance(event.error, Refused):
            raise event.error
        if isinstance(event.error, Busy) and event.error.wait_s:
            return event.error.wait_s
        if self._clock.now() - self._stream_began >= STEADY_S:
            self._stream_backoff.reset()
        return self._stream_backoff.next()

    def _obey(self, instruction: pb.Instruction) -> None:
        kind = instruction.WhichOneof("kind")
        if kind == "participate":
            self._participate(instruction.participate)
        elif kind == "verdict":
            said = instruction.verdict
            self._diary.verdict(said.run_id, said.round, said.accepted, said.reason, said.detail)
            if said.accepted:
                self._scar = None  # what ended the process before us is over
            if said.kind == "train" and not said.accepted:
                self._settle(said.run_id, said.round, said.attempt, False)
            elif said.kind == "train":
                self._worker.taken(said.run_id, said.round, said.attempt)
        elif kind == "leave":
            told = instruction.leave
            if self._worker.leave((told.run_id, told.round, told.nonce)):
                log.info("round %d of run %s closed without us", told.round, told.run_id)

    def _settle(self, run_id: str, round_number: int, attempt: int, taken: bool) -> None:
        """What an attempt left behind may become effective, or never will; called from both threads."""
        try:
            self._memory.settle(run_id, round_number, attempt, taken)
            if self._office.contracts is not None:
                self._office.contracts.settle(run_id, round_number, attempt, taken)
        except StateError as error:
            self._diary.hit(error)

    def _refused(self, why: str) -> None:
        """A privacy budget has said no, or yes again; called from the worker's thread."""
        self._diary.say("budget", f"Nothing was trained: {why}" if why else "", logging.WARNING)
        self._diary.note(budget_refusal=why)

    def _broken_contract(self, run_id: str, round_number: int, words: str) -> None:
        """The coordinator asks more often than the run's contract allows: told to the owner, too."""
        self._diary.verdict(run_id, round_number, False, "contract", words)

    def _participate(self, call: pb.Participate) -> None:
        reason = self._objection()
        refusal = f"Not taking part: {reason}." if reason else ""
        deadline_s = call.deadline_s if 0 < call.deadline_s <= MAX_TASK_S else MAX_TASK_S
        stay_s = call.stay_s if 0 <= call.stay_s <= MAX_TASK_S else 0.0
        key = (call.run_id, call.round, call.nonce)
        deadline = self._clock.now() + deadline_s
        selection = Selection(key, deadline, stay_s, refusal, resumed=call.resumed, node=call.node_id)
        if self._worker.select(selection):
            log.info(
                "selected to %s in round %d of run %s (%s)", call.kind, call.round, call.run_id, call.task
            )
            self._diary.note(state="busy", reason="")
            if any(other[0] == call.run_id for other in self._worker.open if other != key):
                self._poke()  # one of them is over: the coordinator says which at a check-in

    def _new_node(self) -> Node:
        from lepton_fl.crypto import load_key

        key = load_key(self._state.key)
        return self._node_factory(self._identity.fleet, self._identity.ca_pem.encode(), key)

    # ---------------------------------------------------------------------------------------------- the end

    def _leave(self, reason: str) -> bool:
        self._courier.stop()
        ended = self._worker.stop(LEAVE_S)
        self._hang_up()
        self._diary.note(state="stopped", reason=reason, connected=False)
        self._diary.flush()
        return ended

    def _facts(self) -> dict[str, str | int]:
        identity = self._identity
        return {
            "pid": os.getpid(),
            "device_id": identity.device_id,
            "name": identity.name,
            "coordinator": identity.device_service,
            "certificate_ends": identity.ends,
        }


def _engaged(taking_part: Iterable[Key], failures: Mapping[Key, str]) -> list[pb.Engaged]:
    """What the coordinator is told of attempts; the newest ones, for it takes no more."""
    told = dict.fromkeys(taking_part, "") | dict(failures)
    found = [
        pb.Engaged(run_id=run_id, round=number, nonce=nonce, failure=why)
        for (run_id, number, nonce), why in told.items()
    ]
    return found[-MAX_ENGAGED:]


def _shown(head: LedgerHead | None) -> pb.LedgerHead | None:
    if head is None:
        return None
    return pb.LedgerHead(seq=head.seq, hash=head.hash, key=head.key, signature=head.signature)


def flower_node(address: str, ca_pem: bytes, key: "PrivateKey", kept: KeptObjects | None = None) -> Node:
    """Flower's node; flwr is imported here, at the first selection."""
    from lepton_client.flower import FlowerNode

    return FlowerNode(address, ca_pem, key, retry_for_s=RETRY_PUSH_S, kept=kept)


def _capabilities() -> pb.Capabilities:
    return pb.Capabilities(
        cpus=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        accelerator="cuda" if Path("/dev/nvidiactl").exists() else "",
        os=f"{platform.system()} {platform.release()} {platform.machine()}"[:100],
    )
