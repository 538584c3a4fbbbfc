"""The fleet as it is now, in memory: who is enrolled, who is there, who could train what.

Rules:

* The journal is the truth about enrolment. This view follows it, so that what another process writes (a
  revocation by the command line) takes effect here within ``journal_poll_s``.
* Presence is soft: after a restart every device is offline until it calls again. It is written to the store
  in batches, for people to look at; an idle check-in writes nothing else, and the journal does not grow.
* What a device says of itself is journalled when it has changed, at most once per ``REPORT_GAP_S``.
* A device says at each check-in which attempts it takes part in, and is told to leave those that are not
  open. So neither a ``Leave`` that is lost with its connection nor a coordinator that was restored from an
  older state keeps it busy until a deadline.
* Nothing here waits: every method takes one lock for microseconds. ``candidates`` reads without it.

Example::

    fleet = Fleet(store, config)
    fleet.start()                                   # loads, then follows the journal and writes batches
    candidates = fleet.candidates("pkg.tasks:digits", "1", groups=())
    if fleet.mark_busy(device_id, run_id):          # False: another run was faster
        fleet.instruct(device_id, instruction)      # at once if it waits, else at its next check-in
"""

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol

from lepton_fl.delivery.rollout import Service
from lepton_fl.errors import Cause, LeptonError, NotFound, TrustError
from lepton_fl.files import canonical_json
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.config import CheckInSection
from lepton_server.store import Store

log = logging.getLogger(__name__)

REPORT_GAP_S = 60.0  # a device's report is journalled at most so often, however often it changes
MAX_PENDING = 16  # instructions kept for a device that is away
KEEP_S = 3600.0  # how long an instruction without a deadline is kept for it
NOTE_S = 120.0  # how long what a call has shown is remembered
CLOCK_NAMED_S = 60.0  # a clock that is further off is named
CLOCK_TOLERANCE_S = 5.0  # Flower refuses signatures from further ahead than this; older than 300 s, too
IDLE, BUSY, NOT_ELIGIBLE = "idle", "busy", "not-eligible"
_SIGNING = ("device.signing", "device.certified")
_FOLLOWED = (
    "device.enrolled",
    "device.renewed",
    "device.revoked",
    "device.desired",
    "device.quarantined",
    "device.readmitted",
    *_SIGNING,
)
STOCK = 2  # keys for secure rounds that a device has made ahead, at most
MOST_SPENT = 8192  # of those that rosters have named are known: no device sends one again after so many
_PAGE = 1000  # events read at a time
_REPORTS = 500  # journalled in one transaction: other writers wait for its end
_EMPTY = hashlib.sha256(b"{}").hexdigest()


@dataclass(frozen=True, slots=True)
class TaskState:
    """What a device reported about one of its tasks."""

    name: str
    version: str
    layout_digest: str
    ready: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A release that a device does not take."""

    release: str
    fault: str  # one of errors.Fault
    detail: str
    final: bool  # given up; else it is tried again


@dataclass(frozen=True, slots=True)
class Serving:
    """What a device makes of releases."""

    task: str  # empty: it takes none
    profile: str
    release: str  # SHA-256 of the manifest in service; empty = none
    failed: tuple[Failed, ...]
    trials: bool = False  # it may say what it makes of a release on its own rows

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "task": self.task,
            "profile": self.profile,
            "release": self.release,
            **({"trials": True} if self.trials else {}),  # absent in reports of before there were any
            "failed": [
                {"release": f.release, "fault": f.fault, "detail": f.detail, "final": f.final}
                for f in self.failed
            ],
        }


@dataclass(frozen=True, slots=True)
class Tried:
    """What a device says of a release on its own rows; randomised there, see ``lepton_fl.delivery.trial``."""

    release: str = ""
    question: str = ""  # SHA-256 (hex)
    word: str = ""


class Engaged(NamedTuple):
    """An attempt at a round that a device takes part in, by its own word."""

    run_id: str
    round: int
    nonce: str
    failure: str = ""  # why it has given the attempt up


class Heard(NamedTuple):
    """What a device said last, as far as rollouts are concerned."""

    serving: dict[str, Any] | None = None  # None: nothing since this process began
    counted_for: str = ""  # the release that ``service`` is about
    service: Service = Service()
    tried: Tried = Tried()


@dataclass(frozen=True, slots=True)
class Report:
    """What a device says of itself and what seldom changes; equal reports share one object."""

    tasks: tuple[TaskState, ...]
    client_version: str
    capabilities: tuple[tuple[str, int | str], ...]
    serving: Serving | None = None  # older clients do not say

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as journalled."""
        told = {} if self.serving is None else {"serving": self.serving.to_json()}
        return told | {
            "tasks": [
                {
                    "name": t.name,
                    "version": t.version,
                    "layout_digest": t.layout_digest,
                    "ready": t.ready,
                    "reason": t.reason,
                }
                for t in self.tasks
            ],
            "client_version": self.client_version,
            "capabilities": dict(self.capabilities),
        }

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a device, by its own word or by what a call of it showed."""

    cause: Cause
    detail: str
    since: float  # monotonic, s


@dataclass(frozen=True, slots=True)
class Vitals:
    """What is known of one device at this moment."""

    enrolled: bool
    online: bool
    streaming: bool
    clock_offset: float  # device minus server, s
    troubles: tuple[Trouble, ...]


_NO_REPORT = Report((), "", ())
_NO_SERVICE = Service()
_NO_TRIAL = Tried()


@dataclass(slots=True)
class _Pending:
    """An instruction that its device has not acted upon yet."""

    instruction: pb.Instruction
    key: tuple[str, str]  # kind and run: a newer one replaces it
    until: float  # monotonic, s
    sent: bool = False  # only a Participate outlives being sent: it is offered to an idle device again


@dataclass(slots=True)
class _Device:
    device_id: str
    groups: tuple[str, ...]
    revoked: bool = False
    due: float = 0.0  # monotonic, s: offline after this; 0 = not seen by this process
    status: str = IDLE
    reason: str = ""
    report: Report = _NO_REPORT
    digest: str = _EMPTY  # of the report that is in the journal
    journalled_at: float = -REPORT_GAP_S  # monotonic, s
    renewed_at: float = float("-inf")  # monotonic, s
    clock_offset: float = 0.0  # device minus server, s
    desired: str = ""  # canonical JSON; empty = nothing is wanted
    desired_digest: str = ""
    resting: float = 0.0  # monotonic, s: in quarantine until then; 0 = it is not
    resting_cause: str = ""
    run: str = ""  # the run that it was drawn into
    requested: bool = False  # the enrolment authority has its request for a signing certificate
    certified_until: float = 0.0  # UTC, s: of the last signing certificate that was issued
    credential_ends: float = 0.0  # UTC, s: of the one that the device says it has
    adverts: tuple[bytes, ...] = ()  # made ahead, each to be given out once
    advert_session: bytes = b""  # of the process that has their secrets
    troubles: tuple["Trouble", ...] = ()  # soft: as of its last check-in
    noted: "Trouble | None" = None  # soft: what the coordinator found wrong with it at a call
    serves: str = ""  # the release that ``service`` is about
    service: Service = _NO_SERVICE  # soft: what the device counted, as of its last check-in
    tried: Tried = _NO_TRIAL  # soft, too: it says the same again at every check-in
    stream: "Stream | None" = None
    pending: list[_Pending] | None = None


class Stream(Protocol):
    """A device that waits: what the fleet needs of the open call. Any thread may call both methods."""

    def wake(self) -> None:
        """There is something to take."""

    def close(self, error: LeptonError | None) -> None:
        """End the call: with an error, or because a newer stream of the device has replaced it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a device that checked in is told.

    Attributes:
        next_s: Seconds until its next check-in, jitter included.
        wait: Whether it should open a waiting stream now.
        instructions: To act upon, in order.
        desired: Canonical JSON of what the operator wants of it, or empty.
        certify: Whether it should ask for, or fetch, a certificate of its signing key.
        adverts: How many keys for secure rounds it should make ahead and send.
    """

    next_s: float
    wait: bool
    instructions: tuple[pb.Instruction, ...]
    desired: str
    certify: bool = False
    adverts: int = 0


@dataclass(frozen=True, slots=True)
class Secrecy:
    """What a device that checks in says about secure aggregation."""

    credential_ends: float = 0.0  # UTC, s
    adverts: tuple[bytes, ...] = ()  # new ones
    advert_session: bytes = b""


_NO_SECRECY = Secrecy()
_NOBODY = Vitals(False, False, False, 0.0, ())


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """The fleet at a glance, for /metrics."""

    registered: int
    online: int
    waiting: int
    busy: int


@dataclass(slots=True)
class _Batch:
    """What the next write takes to the store."""

    presence: dict[str, tuple[float, str]] = field(default_factory=dict)  # id -> wall clock s, status
    reports: set[str] = field(default_factory=set)


class Fleet:
    """The registered devices; see the module for its rules. Safe for any number of threads."""

    def __init__(
        self,
        store: Store,
        config: CheckInSection | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rng: Random | None = None,
    ) -> None:
        """Make an empty view; :meth:`start` or :meth:`load` fills it.

        Args:
            store: The coordinator's state.
            config: Intervals and bounds; None = the defaults.
            clock: Monotonic seconds.
            wall: UTC seconds.
            rng: For jitter only.
        """
        self._store = store
        self._config = config or CheckInSection()
        self._clock, self._wall, self._rng = clock, wall, rng or Random()  # noqa: S311 - jitter
        self._lock = threading.Lock()
        self.on_change = threading.Condition(self._lock)
        self._generation = 0
        self._devices: dict[str, _Device] = {}
        self._registered = 0
        self._streams = 0
        self._run_active = False
        self._secure_active = False
        self._spent: dict[bytes, None] = {}  # keys that rosters have named, oldest first
        self._attempts: dict[str, str] = {}  # run -> the nonce of its open attempt
        self._given_up: dict[tuple[str, str], str] = {}  # (device, nonce of an open attempt) -> why
        self._renew_s: float | None = None  # None: there is no enrolment authority
        self.store_error: LeptonError | None = None  # why the store cannot be used, now
        self._batch = _Batch()
        self._said = 0
        self._seq = self._told_seq = 0
        self._revocation: list[Callable[[str], None]] = []
        self._grown: list[Callable[[], None]] = []
        self._follow_lock = threading.Lock()  # one thread at a time follows the journal
        self._flush_lock = threading.Lock()  # and one writes
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    # -- life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the fleet, then follow the journal and write batches in the background until :meth:`stop`."""
        self.load()
        self._stop.clear()
        for name, work, period in (
            ("fleet-journal", self._follow_and_tell, self._config.journal_poll_s),
            ("fleet-writer", self.flush, self._config.batch_window_s),
        ):
            thread = threading.Thread(target=self._repeat, args=(work, period), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop the background work and write what is left."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        try:
            self.flush(everything=True)
        except LeptonError as error:
            log.warning("the last presence batch could not be written: %s", error)

    def _repeat(self, work: Callable[[], None], period: float) -> None:
        failing = False
        while not self._stop.wait(period):
            try:
                work()
            except LeptonError as error:
                self.store_error = error
                if not failing:  # said once, not twice a second
                    log.error("%s: %s; trying again", threading.current_thread().name, error)
                failing = True
            except Exception:  # this thread enforces revocation: it must not die of a surprise
                log.exception("%s: unexpected error; trying again", threading.current_thread().name)
            else:
                if failing:
                    log.info("%s: works again", threading.current_thread().name)
                    self.store_error = None
                failing = False

    def load(self) -> None:
        """Read the registered devices from the store."""
        with self._follow_lock:
            seq = self._store.head_seq()  # first: what is written meanwhile is then seen twice, not never
            devices: dict[str, _Device] = {}
            groups: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal ones share one object
            digests: dict[str, str] = {}
            for row in self._store.active_devices():
                device = _Device(row.id, groups.setdefault(row.groups, row.groups))
                if row.reported:
                    digest = _digest(row.reported)
                    device.digest = digests.setdefault(digest, digest)
                if row.desired:
                    _want(device, row.desired)
                if row.quarantined_until:
                    self._rest(device, row.quarantined_until, row.quarantine_cause)
                devices[row.id] = device
            attempts = self._open_attempts()
            with self._lock:
                self._devices, self._attempts = devices, attempts
                self._registered = len(devices)
                self._changed()
            self._read(0, seq, _SIGNING)
            self._seq = seq

    def _open_attempts(self) -> dict[str, str]:
        """Attempts that a coordinator before this one has begun, and that may go on."""
        runs = [run.id for run in self._store.runs() if not run.finished]
        last = [row for run_id in runs for row in self._store.rounds(run_id)[-1:]]
        return {row.run_id: str(row.plan.get("nonce", "")) for row in last if row.state == "planned"}

    # -- the journal --------------------------------------------------------------------------------

    def follow(self) -> None:
        """Apply the events that were journalled since the last call, by this process or another."""
        with self._follow_lock:
            self._seq = self._read(self._seq, self._store.head_seq(), _FOLLOWED)

    def _follow_and_tell(self) -> None:
        before = self._told_seq
        self.follow()
        self._told_seq = self._seq
        for callback in self._grown if self._told_seq != before else ():
            callback()

    def on_grown(self, callback: Callable[[], None]) -> None:
        """Have ``callback()`` called in the thread that follows the journal, when it has grown."""
        self._grown.append(callback)

    def _read(self, seen: int, head: int, kinds: Sequence[str]) -> int:
        while seen < head:
            events = self._store.events(seen, kinds=kinds, limit=_PAGE)
            for event in events:
                self._apply(event.kind, event.body)
            # A short page has shown everything up to the head, also when that is of other kinds.
            seen = events[-1].seq if len(events) == _PAGE else max(head, *(e.seq for e in events), 0)
        return seen

    def _apply(self, kind: str, body: Mapping[str, Any]) -> None:
        device_id = str(body["device_id"])
        if kind == "device.revoked":
            self._revoke(device_id, str(body.get("reason", "")))
            return
        with self._lock:
            device = self._devices.get(device_id)
            if kind == "device.enrolled":
                if device is None:
                    device = self._devices[device_id] = _Device(device_id, ())
                    self._registered += 1
                elif device.revoked:
                    device.revoked = False
                    self._registered += 1
                device.groups = tuple(body.get("groups", ()))
                self._changed()
            elif device is not None and kind == "device.desired":
                _want(device, body["desired"])
                if device.stream is not None:
                    device.stream.close(None)  # so that it checks in and is told
            elif device is not None and kind == "device.quarantined":
                self._rest(device, float(body["until"]), str(body["cause"]))
                self._changed()
            elif device is not None and kind == "device.readmitted":
                device.resting, device.resting_cause = 0.0, ""
                self._changed()
            elif device is not None and kind == "device.renewed":
                device.renewed_at = self._clock()
            elif device is not None and kind == "device.signing":
                device.requested, device.certified_until = True, 0.0
            elif device is not None and kind == "device.certified":
                device.requested, device.certified_until = False, float(body["not_after"])

    def _rest(self, device: _Device, until: float, cause: str) -> None:
        """Note a quarantine by the monotonic clock: a jump of the other one must not end it."""
        device.resting = max(1e-9, self._clock() + until - self._wall())
        device.resting_cause = cause

    def quarantined(self, *, over: bool = False) -> list[str]:
        """Who is in quarantine, or, with ``over``, of those whose time is over."""
        now = self._clock()
        with self._lock:
            devices = list(self._devices.values())
        resting = [d for d in devices if d.resting and not d.revoked]
        return [d.device_id for d in resting if not over or d.resting <= now]

    def _revoke(self, device_id: str, reason: str) -> None:
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.revoked:
                return
            device.revoked, device.reason = True, reason
            device.pending = None
            self._registered -= 1
            self._batch.reports.discard(device_id)
            self._batch.presence.pop(device_id, None)
            stream, device.stream = device.stream, None
            self._streams -= stream is not None
            self._changed()
        if stream is not None:
            stream.close(_revoked(device_id))
        log.warning("device %s is revoked", device_id, extra={"event": "device.revoked", "device": device_id})
        for callback in self._revocation:
            callback(device_id)

    def on_revoked(self, callback: Callable[[str], None]) -> None:
        """Have ``callback(device_id)`` called, in any thread, when a device loses its enrolment."""
        self._revocation.append(callback)

    # -- what the device service asks -----------------------------------------------------------------

    def require(self, device_id: str) -> None:
        """Check that a device may talk to this coordinator.

        Raises:
            TrustError: It is not enrolled, or revoked.
        """
        with self._lock:
            self._require(device_id)

    def _require(self, device_id: str) -> _Device:
        device = self._devices.get(device_id)
        if device is None:
            raise TrustError(
                f"Device {device_id} is not enrolled at this coordinator.",
                hint="Ask the operator for a join token and enrol.",
            )
        if device.revoked:
            raise _revoked(device_id)
        return device

    def check_in(
        self,
        device_id: str,
        report: Report,
        status: str = IDLE,
        reason: str = "",
        *,
        device_time: float = 0.0,
        desired_digest: str = "",
        secrecy: Secrecy = _NO_SECRECY,
        troubles: Sequence[tuple[Cause, str]] = (),
        serves: str = "",
        service: Service = _NO_SERVICE,
        tried: Tried = _NO_TRIAL,
        engaged: Sequence[Engaged] = (),
    ) -> Answer:
        """Note that a device is there, and say what it should do.

        Args:
            device_id: Verified by its certificate.
            report: What it says of itself.
            status: ``idle``, ``busy`` or ``not-eligible``.
            reason: With ``not-eligible``: the rule and the value.
            device_time: Its clock, UTC seconds; 0 = it did not say.
            desired_digest: SHA-256 (hex) of the desired state that it acted upon last.
            secrecy: What it brings to secure rounds.
            troubles: What it finds wrong with itself.
            serves: The release that ``service`` is about; empty = none.
            service: What it counted of its predictions.
            tried: What it says of a release on its own rows.
            engaged: What it takes part in.

        Raises:
            TrustError: It is not enrolled, or revoked.
        """
        now, wall = self._clock(), self._wall()
        with self._lock:
            device = self._require(device_id)
            room = device.stream is not None or self._streams < self._config.max_waiting
            next_s = self.next_turn_s()
            if self._note(device, report, status, reason, now) | self._note_secrecy(device, secrecy, wall):
                self._changed()
            if device.stream is None:
                device.due = now + next_s * self._config.offline_after
            self._note_clock(device, device_time - wall if device_time else 0.0)
            self._note_troubles(device, troubles, now)
            said = serves, service, tried
            self._said += said != (device.serves, device.service, device.tried)
            device.serves, device.service, device.tried = said
            self._batch.presence[device_id] = (wall, status)
            # A device that is at work has its offer; one that is not has lost it, or was started again.
            instructions = self._take(device, now, unsent=status == BUSY) if device.pending else ()
            if engaged:
                instructions = (*instructions, *self._sort_out(device_id, engaged))
            desired = device.desired if device.desired_digest != desired_digest else ""
            # A fleet that fits waits always, so that a run starts at once; a larger one only during a run.
            wanted = self._run_active or self._registered <= self._config.max_waiting
            certify = self._should_certify(device, wall)
            has_key = device.credential_ends > wall
            adverts = STOCK - len(device.adverts) if self._secure_active and has_key else 0
        return Answer(next_s, wanted and room, instructions, desired, certify, max(0, adverts))

    def _sort_out(self, device_id: str, engaged: Sequence[Engaged]) -> Iterator[pb.Instruction]:
        """Hear what has become of attempts; the device leaves those that are not open (the lock is held)."""
        for each in engaged:
            if self._attempts.get(each.run_id) != each.nonce:
                leave = pb.Leave(run_id=each.run_id, round=each.round, nonce=each.nonce)
                yield pb.Instruction(leave=leave)
            elif each.failure:
                self._given_up[device_id, each.nonce] = each.failure

    def _note_secrecy(self, device: _Device, secrecy: Secrecy, wall: float) -> bool:
        """Take in keys made ahead; returns whether the device has become fit for secure rounds, or unfit."""
        if secrecy.advert_session != device.advert_session:  # another process: the old ones' secrets are gone
            device.advert_session, device.adverts = secrecy.advert_session, ()
        self._stock(device, secrecy.adverts)
        was, device.credential_ends = device.credential_ends, secrecy.credential_ends
        return (was > wall) != (device.credential_ends > wall)

    def _should_certify(self, device: _Device, wall: float) -> bool:
        if self._renew_s is None:
            return False
        if device.certified_until > max(wall, device.credential_ends + 1):
            return True  # there is a newer one than it has
        return not device.requested and device.credential_ends - wall < self._renew_s

    def set_authority(self, renew_s: float) -> None:
        """There is an enrolment authority; devices renew their certificates so long before the end."""
        self._renew_s = renew_s

    def set_secure_active(self, active: bool) -> None:
        """Say whether a run with secure aggregation is under way: then devices make keys ahead."""
        with self._lock:
            self._secure_active = active

    def take_advert(self, device_id: str) -> bytes | None:
        """Take a key that a device has made ahead; each is given out once."""
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or not device.adverts:
                return None
            first, *rest = device.adverts
            device.adverts = tuple(rest)
            return first

    def add_advert(self, device_id: str, advert: bytes) -> None:
        """Keep a key that a device has sent along with a message of a round."""
        with self._lock:
            device = self._devices.get(device_id)
            if device is not None and not device.revoked:
                self._stock(device, (advert,))

    def _stock(self, device: _Device, adverts: Sequence[bytes]) -> None:
        """Keep new ones; a device that was not told that they have come sends them again."""
        fresh = [a for a in adverts if a not in self._spent and a not in device.adverts]
        device.adverts = (*device.adverts, *fresh)[-STOCK:]

    def spend_adverts(self, adverts: Iterable[bytes]) -> None:
        """A roster has gone out with these keys: they are of no use again, whoever sends them once more."""
        with self._lock:
            self._spent |= dict.fromkeys(adverts)
            while len(self._spent) > MOST_SPENT:
                del self._spent[next(iter(self._spent))]
            for device in self._devices.values():
                if device.adverts:
                    device.adverts = tuple(a for a in device.adverts if a not in self._spent)

    def _note(self, device: _Device, report: Report, status: str, reason: str, now: float) -> bool:
        """Take in what a device says; returns whether that may change who is eligible."""
        changed = device.due <= now or device.status != status or device.reason != reason
        device.status, device.reason = status, reason
        if report is not device.report and report != device.report:
            self._said += report.serving != device.report.serving
            device.report = report
            self._batch.reports.add(device.device_id)
            changed = True
        return changed

    def _note_clock(self, device: _Device, offset: float) -> None:
        was, device.clock_offset = device.clock_offset, offset
        if abs(offset) > CLOCK_TOLERANCE_S >= abs(was):
            log.warning(
                "the clock of device %s is %+.0f s off; Flower refuses signatures with a wrong time",
                device.device_id,
                offset,
                extra={"event": "device.clock", "device": device.device_id, "offset_s": offset},
            )

    def _note_troubles(self, device: _Device, troubles: Sequence[tuple[Cause, str]], now: float) -> None:
        since = {known.cause: known.since for known in device.troubles}
        device.troubles = tuple(Trouble(cause, words, since.get(cause, now)) for cause, words in troubles)
        for trouble in device.troubles:
            if trouble.cause not in since:
                _warn(device.device_id, trouble)
        if device.noted is not None and device.noted.cause is Cause.WRONG_VERSION:
            device.noted = None  # this call was in order

    def note(self, device_id: str, cause: Cause, detail: str) -> None:
        """Remember what a call of a device showed to be wrong with it, for ``NOTE_S``."""
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.revoked:
                return
            device.noted = Trouble(cause, detail, self._clock())
        _warn(device_id, device.noted)

    def vitals(self, device_id: str) -> Vitals:
        """What is known of a device; reads single attributes only, so no lock is needed."""
        device, now = self._devices.get(device_id), self._clock()
        if device is None or device.revoked:
            return _NOBODY
        return _vitals(device, now)

    def troubled(self) -> list[tuple[str, Vitals]]:
        """Every enrolled device with something wrong that it said or that a call of it showed."""
        now = self._clock()
        with self._lock:
            devices = list(self._devices.values())
        found = [
            (d.device_id, _vitals(d, now))
            for d in devices
            if not d.revoked and (d.troubles or d.noted or abs(d.clock_offset) > CLOCK_NAMED_S)
        ]
        return [(device_id, v) for device_id, v in found if v.troubles or v.online]

    def next_turn_s(self) -> float:
        """Draw after how many seconds a device should check in again; all together keep to the rate."""
        mean = max(self._config.interval_s, self._registered / self._config.max_rate)
        return mean * (1 + self._config.jitter * (2 * self._rng.random() - 1))

    def may_renew(self, device_id: str, gap_s: float) -> float:
        """After how many seconds a device may have a new certificate; 0 = now, which counts as its renewal.

        Raises:
            TrustError: It is not enrolled, or revoked.
        """
        now = self._clock()
        with self._lock:
            device = self._require(device_id)
            if (wait := device.renewed_at + gap_s - now) > 0:
                return wait
            device.renewed_at = now
            return 0.0

    # -- waiting streams ------------------------------------------------------------------------------

    def open_stream(self, device_id: str, stream: Stream) -> bool:
        """Register a waiting device; a stream that it had before is closed.

        Returns:
            Whether there is room; if not, the device should come back at its next check-in.

        Raises:
            TrustError: It is not enrolled, or revoked.
        """
        now = self._clock()
        with self._lock:
            device = self._require(device_id)
            old, device.stream = device.stream, stream
            if old is None and self._streams >= self._config.max_waiting:
                device.stream = None
                return False
            self._streams += old is None
            changed = device.due <= now
            device.due = float("inf")
            self._batch.presence[device_id] = (self._wall(), device.status)
            if device.pending:
                stream.wake()
            if changed:
                self._changed()
        if old is not None:
            old.close(None)
        return True

    def close_stream(
        self, device_id: str, stream: Stream, *, undelivered: Sequence[pb.Instruction] = ()
    ) -> None:
        """Forget a stream that has ended; what it could not deliver is kept for the next check-in."""
        now = self._clock()
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.revoked:
                return
            for instruction in undelivered:
                self._keep(device, instruction, now)
            if device.stream is stream:
                device.stream = None
                self._streams -= 1
                # It was here until now: one interval to check in again.
                device.due = now + self.next_turn_s() * self._config.offline_after
                self._batch.presence[device_id] = (self._wall(), device.status)

    def close_streams(self) -> None:
        """End all waiting streams in good order, as before a restart."""
        with self._lock:
            streams = [d.stream for d in self._devices.values() if d.stream is not None]
        for stream in streams:
            stream.close(None)

    def take(self, device_id: str, stream: Stream) -> tuple[pb.Instruction, ...]:
        """Return what a waiting device should be told now.

        Raises:
            TrustError: It was revoked.
        """
        with self._lock:
            device = self._require(device_id)
            if device.stream is not stream or not device.pending:
                return ()
            return self._take(device, self._clock(), unsent=True)

    # -- what a round driver asks -----------------------------------------------------------------------

    def candidates(
        self, task: str, version: str, groups: Sequence[str] = (), *, secure: bool = False
    ) -> list[Candidate]:
        """How every registered device stands towards a task.

        A device that is unfit in several ways is counted once, by the first of: revoked, other group,
        quarantined, offline, task missing, wrong version, data contract, the owner's rule, busy.

        Args:
            task: ``package.module:attribute``.
            version: Of the task.
            groups: Only devices with one of these labels; empty = all.
            secure: Only devices whose signing key is certified.
        """
        now, wanted = self._clock(), frozenset(groups)
        with self._lock:
            devices = list(self._devices.values())
        found = [_standing(device, task, version, wanted, now) for device in devices]
        if secure:
            wall = self._wall()
            found = [_certified(d, c, wall) for d, c in zip(devices, found, strict=True)]
        return found

    def wait_for_change(self, seen: int, timeout: float) -> int:
        """Wait until something that decides eligibility has changed since generation ``seen``.

        Returns:
            The generation now; pass it to the next call. Equal to ``seen`` when the time ran out.
        """
        with self.on_change:
            self.on_change.wait_for(lambda: self._generation != seen, timeout)
            return self._generation

    @property
    def generation(self) -> int:
        """Grows whenever somebody's eligibility may have changed by an event (not by mere silence)."""
        return self._generation

    def instruct(self, device_id: str, instruction: pb.Instruction) -> bool:
        """Tell a device something: at once when it waits, else at its next check-in.

        A newer instruction of the same kind and run replaces an older one that is still kept. A
        ``Participate`` is kept until its deadline, and its ``deadline_s`` is what remains of it when it is
        delivered; until its verdict or :meth:`mark_idle`, a device that does not report itself busy is
        offered it again at a check-in (the connection may have died under it, or its process), so a device
        must ignore an attempt that it knows.

        Returns:
            Whether the device waits, so that it is told now.

        Raises:
            NotFound: It is not enrolled, or revoked.
        """
        now = self._clock()
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.revoked:
                raise NotFound(f"There is no enrolled device {device_id}.")
            self._keep(device, instruction, now)
            return self._wake(device)

    def mark_busy(self, device_id: str, run_id: str) -> bool:
        """Claim a device for a run; False when another run has it, or it is gone."""
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.revoked or device.run not in ("", run_id):
                return False
            device.run = run_id
            return True

    def claim(self, device_ids: Sequence[str], run_id: str) -> bool:
        """Claim a whole cohort for a run, or none of it if another run has one of them.

        One lock for all: two runs that draw the same devices at the same moment cannot each get half of them.
        """
        with self._lock:
            devices = [self._devices.get(device_id) for device_id in device_ids]
            if any(d is not None and d.run not in ("", run_id) for d in devices):
                return False
            for device in devices:
                if device is not None and not device.revoked:
                    device.run = run_id
            return True

    def open_attempt(self, run_id: str, nonce: str) -> None:
        """From now on devices of a run work on this attempt; they leave any other."""
        with self._lock:
            self._attempts[run_id] = nonce

    def close_attempt(self, run_id: str, nonce: str = "") -> None:
        """An attempt is over, or with no nonce the run is: whoever still works on it is told to leave."""
        with self._lock:
            if nonce in ("", self._attempts.get(run_id)):
                over = self._attempts.pop(run_id, "")
                self._given_up = {key: why for key, why in self._given_up.items() if key[1] != over}

    def gave_up(self, device_id: str, nonce: str) -> str:
        """Why a device has given up an open attempt, by its own word; '' = it has not."""
        return self._given_up.get((device_id, nonce), "")

    def release(self, run_id: str) -> None:
        """Let go of every device that a run still claims."""
        with self._lock:
            for device in self._devices.values():
                if device.run == run_id:
                    device.run = ""
            self._changed()

    def mark_idle(self, device_id: str, run_id: str) -> None:
        """Release a device that this run had claimed, and withdraw what the run still offers it."""
        with self._lock:
            device = self._devices.get(device_id)
            if device is None or device.run != run_id:
                return
            device.run = ""
            if device.status == BUSY:
                device.status = IDLE  # until it says otherwise: the next round need not wait for its check-in
            if device.pending:
                device.pending = [p for p in device.pending if p.key != ("participate", run_id)] or None
            self._changed()

    def set_run_active(self, active: bool) -> None:
        """Say whether a run is under way: then a fleet of any size is asked to wait on streams."""
        with self._lock:
            self._run_active = active

    def is_enrolled(self, device_id: str) -> bool:
        """Whether a device is known here and not revoked."""
        device = self._devices.get(device_id)
        return device is not None and not device.revoked

    def is_online(self, device_id: str) -> bool:
        """Whether a device waits, or is not overdue with its check-in, and is not revoked."""
        device = self._devices.get(device_id)
        return device is not None and not device.revoked and device.due > self._clock()

    def is_waiting(self, device_id: str) -> bool:
        """Whether a device holds its stream open now."""
        device = self._devices.get(device_id)
        return device is not None and device.stream is not None

    def releases(self) -> dict[str, int]:
        """How many enrolled devices serve each release, by SHA-256 of its manifest."""
        with self._lock:
            devices = list(self._devices.values())
        served = (d.report.serving.release for d in devices if d.report.serving and not d.revoked)
        return dict(Counter(name for name in served if name))

    def said(self) -> int:
        """Grows whenever a device says something else about releases than before; see :meth:`heard`."""
        return self._said

    def heard(self, device_id: str) -> Heard:
        """What a device said last of releases, what it counted, and what it makes of one."""
        device = self._devices.get(device_id)
        if device is None:
            return Heard()
        told = device.report.serving
        return Heard(told.to_json() if told else None, device.serves, device.service, device.tried)

    def counts(self) -> FleetCounts:
        """Count the fleet."""
        now = self._clock()
        with self._lock:
            devices, registered, streams = list(self._devices.values()), self._registered, self._streams
        online = sum(not d.revoked and d.due > now for d in devices)
        return FleetCounts(registered, online, streams, sum(bool(d.run) for d in devices))

    # -- instructions that are kept (the lock is held) ------------------------------------------------------

    def _keep(self, device: _Device, instruction: pb.Instruction, now: float) -> None:
        kind = instruction.WhichOneof("kind") or "ping"
        body = getattr(instruction, kind)
        run_id = "" if kind == "ping" else body.run_id
        until = now + (body.deadline_s if kind == "participate" else KEEP_S)
        key = (kind, run_id)
        kept = [
            p
            for p in device.pending or ()
            if p.key != key and p.until > now and not _is_over(p.instruction, kind, body)
        ]
        kept.append(_Pending(instruction, key, until))
        device.pending = kept[-MAX_PENDING:]

    def _take(self, device: _Device, now: float, *, unsent: bool = False) -> tuple[pb.Instruction, ...]:
        """Hand out what is kept; only a Participate stays, marked as sent."""
        out, stay = [], []
        for pending in device.pending or ():
            if pending.until <= now:
                continue
            if pending.key[0] == "participate":
                stay.append(pending)
            if not (unsent and pending.sent):
                out.append(_with_time_left(pending, now))
            pending.sent = True
        device.pending = stay or None
        return tuple(out)

    def _wake(self, device: _Device) -> bool:
        if device.stream is not None:
            device.stream.wake()
        return device.stream is not None

    def _changed(self) -> None:
        self._generation += 1
        self.on_change.notify_all()

    # -- writing ------------------------------------------------------------------------------------

    def flush(self, *, everything: bool = False) -> None:
        """Write presence and changed reports; what cannot be written now is kept for the next time.

        Args:
            everything: Also reports that were journalled less than ``REPORT_GAP_S`` ago.
        """
        with self._flush_lock:
            self._flush_presence()
            self._flush_reports(everything)

    def _flush_presence(self) -> None:
        with self._lock:
            presence, self._batch.presence = self._batch.presence, {}
        if not presence:
            return
        try:
            self._store.note_presence([(i, seen, status) for i, (seen, status) in presence.items()])
        except LeptonError:
            with self._lock:  # newer entries win
                self._batch.presence = presence | self._batch.presence
            raise

    def _flush_reports(self, everything: bool) -> None:
        now = self._clock()
        with self._lock:
            ready = [
                (device, device.report)
                for device_id in self._batch.reports
                if (device := self._devices.get(device_id)) is not None
                and (everything or now - device.journalled_at >= REPORT_GAP_S)
            ]
            self._batch.reports.difference_update(d.device_id for d, _ in ready)
        changed = [(d, r.to_json(), r.digest()) for d, r in ready]
        changed = [(d, body, digest) for d, body, digest in changed if digest != d.digest]
        if not changed:
            return
        for start in range(0, len(changed), _REPORTS):
            part = changed[start : start + _REPORTS]
            try:
                self._journal_reports(part)
            except LeptonError:
                with self._lock:
                    self._batch.reports.update(d.device_id for d, _, _ in changed[start:])
                raise
            for device, _, digest in part:
                device.digest, device.journalled_at = digest, now

    def _journal_reports(self, reports: Iterable[tuple[_Device, Mapping[str, Any], str]]) -> None:
        """Write reports together; one that the journal refuses does not keep the others from it."""
        with self._store.transaction() as transaction:
            for device, reported, _ in reports:
                body = {"device_id": device.device_id, "reported": reported}
                try:
                    transaction.record("device.reported", device.device_id, body)
                except (
                    LeptonError
                ) as refusal:  # revoked meanwhile, or already there; never worth a second try
                    log.info("the report of device %s is not journalled: %s", device.device_id, refusal)


def _vitals(device: _Device, now: float) -> Vitals:
    noted = device.noted
    told = device.troubles
    if noted is not None and now - noted.since <= NOTE_S:
        told = (*told, noted)
    return Vitals(True, device.due > now, device.stream is not None, device.clock_offset, told)


def _warn(device_id: str, trouble: Trouble) -> None:
    log.warning(
        "device %s: %s: %s",
        device_id,
        trouble.cause.value,
        trouble.detail,
        extra={"event": "device.trouble", "device": device_id, "cause": trouble.cause.value},
    )


def _standing(device: _Device, task: str, version: str, groups: frozenset[str], now: float) -> Candidate:
    """How one device stands; reads single attributes only, so no lock is needed."""
    device_id = device.device_id
    if device.revoked:
        return Candidate(device_id, "revoked", device.reason)
    if groups and groups.isdisjoint(device.groups):
        return Candidate(device_id, "other-group")
    if device.resting > now:
        return Candidate(
            device_id, "quarantined", f"{device.resting_cause}, {device.resting - now:.0f} s more"
        )
    if device.due <= now:
        return Candidate(device_id, "offline")
    state = _best_state(device.report.tasks, task, version)
    if state is None:
        return Candidate(device_id, "task-missing")
    if not state.version:  # allowed by the owner, but it could not be loaded there
        return Candidate(device_id, "task-missing", state.reason)
    if state.version != version:
        return Candidate(device_id, "wrong-version", f"has {state.version}")
    if not state.ready:
        return Candidate(device_id, "data-contract", state.reason)
    if device.status == NOT_ELIGIBLE:
        return Candidate(device_id, "not-eligible", device.reason)
    if device.run or device.status == BUSY:
        return Candidate(device_id, "busy", device.run)
    return Candidate(device_id, "eligible")


def _certified(device: _Device, standing: Candidate, wall: float) -> Candidate:
    """The same, unless only a certificate is missing."""
    if standing.standing not in ("eligible", "busy") or device.credential_ends > wall:
        return standing
    waits = "the enrolment authority has not answered yet" if device.requested else "it has not asked yet"
    return Candidate(standing.device_id, "not-certified", f"no certified signing key: {waits}")


def _best_state(tasks: Iterable[TaskState], task: str, version: str) -> TaskState | None:
    found = None
    for state in tasks:
        if state.name == task:
            if state.version == version:
                return state
            found = state
    return found


def _is_over(offer: pb.Instruction, kind: str, body: pb.Verdict | pb.Leave) -> bool:
    """Whether a verdict or a leave ends what a kept ``Participate`` offers."""
    if kind not in ("verdict", "leave") or not offer.HasField("participate"):
        return False
    offered = offer.participate
    same_run = offered.run_id == body.run_id
    return same_run and (offered.round, offered.attempt) <= (body.round, body.attempt)


def _with_time_left(pending: _Pending, now: float) -> pb.Instruction:
    if pending.key[0] != "participate":
        return pending.instruction
    copy = pb.Instruction()
    copy.CopyFrom(pending.instruction)
    copy.participate.deadline_s = pending.until - now
    return copy


def _want(device: _Device, desired: Mapping[str, Any]) -> None:
    device.desired = canonical_json(dict(desired)).decode() if desired else ""
    device.desired_digest = hashlib.sha256(device.desired.encode()).hexdigest() if desired else ""


def _digest(reported: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(reported))).hexdigest()


def _revoked(device_id: str) -> TrustError:
    return TrustError(
        f"Device {device_id} has been revoked by the operator.",
        hint="Ask the operator why; to come back, remove the key and enrol with a new token.",
    )
