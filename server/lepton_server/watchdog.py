"""Why a run does not move: every wait has a cause in one word, an owner, a bound, and advice.

    found = diagnose(facts)                    # pure: what is wrong with a device that has not answered
    watch = Watchdog(fleet, meters, state_dir)
    watch.waits("r1", Wait("the disk", Cause.SERVER_DISK_FULL, "No space was left.", until))
    watch.attends("r1", attempt)               # an attempt is open: its devices are looked at

Rules:

* The journal has what happened and what was done about it. What is so *now* changes every second and must be
  told while the disk is full and the database is held; so it goes to a board: one small file, its room taken
  at the start, rewritten in place. ``lepton run show`` reads it, and believes it while the coordinator lives.
* A diagnosis is a function of facts; nothing is ended because of a diagnosis alone.
* A fault is named as soon as the facts leave no other reading, not before: on a fleet without faults nothing
  is named.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from lepton_fl.errors import Cause, ConnectionFailed, DiskFull, LeptonError, Rejection, StateLocked
from lepton_fl.rounds.cohort import Candidate, Standing
from lepton_server.fleet import CLOCK_NAMED_S, Fleet, Trouble, Vitals
from lepton_server.ops import Meters

log = logging.getLogger(__name__)

BOARD_FILE: Final = "watch.board"  # in the state folder
BOARD_BYTES: Final = 256 * 1024
TICK_S: Final = 1.0  # between two looks at open attempts
STANDINGS_EVERY: Final = 5  # ticks between two looks at the whole fleet
LEAST_ROOM: Final = 2 * 2**20  # bytes on the disk of the state; with less the disk counts as full
STALE_S: Final = 15.0  # a board that was not written for so long is not believed
MOST_DEVICES: Final = 20  # shown by name for each run; the others are counted
SILENT_S: Final = 22.0  # two heartbeats of the fleet port were missed
NO_SHOW_S: Final = 25.0  # it was told, and has not come: importing Flower takes a slow device seconds
LOST_S: Final = 8.0  # its connection has ended, and it did not call again

ADVICE: Final[Mapping[Cause, str]] = {
    Cause.GONE: "See whether the device is on and `lepton client run` runs there; the round goes on "
    "without it.",
    Cause.HALF_OPEN: "Look at the network between (a cable, a NAT or a firewall that forgets connections); "
    "the device connects anew by itself.",
    Cause.SLOW_LINK: "Give its round more time (cohort.deadline_s) or ask for a smaller model; "
    "over_selection lets the round close without it.",
    Cause.HUNG_TRAINING: "Restart the client there (`systemctl restart lepton-client`) if it does not move; "
    "limits.stall_s is what counts as long.",
    Cause.OUT_OF_MEMORY: "Give it more memory (MemoryMax, limits.memory_bytes) or train with a smaller "
    "batch_size; it takes part again by itself.",
    Cause.INTERRUPTED: "Its log says why it ended; the service starts it again, and it takes part in the "
    "next round.",
    Cause.DISK_FULL: "Make room on the device's disk; it takes part again by itself.",
    Cause.DATA_CONTRACT: "Repair the device's data; `lepton client status` there names the rule. It is "
    "checked again by itself.",
    Cause.WRONG_CERTIFICATE: "Nothing, if the device has a new one; else enrol it anew with a new token.",
    Cause.EXPIRED_CERTIFICATE: "Nothing, it has renewed it; look at its clock if this comes back.",
    Cause.REVOKED: "Nothing; to let it in again, remove its key there and enrol it with a new token.",
    Cause.EVICTED: "Nothing: it is let in again and asked once more.",
    Cause.CLOCK_OFF: "Set the device's clock right (NTP); it trains meanwhile by the coordinator's clock.",
    Cause.WRONG_VERSION: "Install on the device the version that the coordinator has.",
    Cause.TASK_MISSING: "Let the owner allow the task, and install it there.",
    Cause.NOT_ELIGIBLE: "Wait: a rule of the device's owner says not now.",
    Cause.NOT_CERTIFIED: "Sign its request: `lepton authority requests|sign|install`.",
    Cause.FAILED: "The device's log has the whole error.",
    Cause.SIGNED_BEFORE: "Nothing: the coordinator was restored from an older state, and the run passes over "
    "this round.",
    Cause.SLOW: "Raise cohort.deadline_s, or weigh by cohort.correction = 'inverse-probability'.",
    Cause.QUARANTINED: "Wait, or `lepton devices readmit NAME` once it is mended.",
    Cause.OFFLINE: "See whether the device is on and reaches this machine.",
    Cause.SERVER_DISK_FULL: "Make room on the coordinator's disk; the run goes on by itself.",
    Cause.DATABASE_LOCKED: "End what holds the database (a backup, a shell); the run goes on by itself.",
    Cause.DATABASE_LOST: "Start the database, or see to the way there; the run goes on by itself.",
    Cause.COORDINATOR_DOWN: "Start it: `lepton server`. The run goes on at its last committed round.",
    Cause.NO_QUORUM: "See each device's cause below, or lower cohort.min_reports.",
    Cause.AT_WORK: "Nothing.",
    Cause.BUILDING: "Nothing.",
    Cause.QUEUE: "Nothing; rounds.max_concurrent_runs says how many go at once.",
}
_OF_STANDING: Final[Mapping[Standing, Cause]] = {
    "offline": Cause.OFFLINE,
    "not-eligible": Cause.NOT_ELIGIBLE,
    "data-contract": Cause.DATA_CONTRACT,
    "task-missing": Cause.TASK_MISSING,
    "wrong-version": Cause.WRONG_VERSION,
    "not-certified": Cause.NOT_CERTIFIED,
    "quarantined": Cause.QUARANTINED,
    "revoked": Cause.REVOKED,
}
_OF_REJECTION: Final[Mapping[str, Cause]] = {
    Rejection.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    Rejection.DISK_FULL: Cause.DISK_FULL,
    Rejection.INTERRUPTED: Cause.INTERRUPTED,
    Rejection.DATA_CONTRACT: Cause.DATA_CONTRACT,
    Rejection.WRONG_VERSION: Cause.WRONG_VERSION,
    Rejection.REVOKED: Cause.REVOKED,
    Rejection.OFFLINE: Cause.OFFLINE,
    Rejection.FAILED: Cause.FAILED,
    Rejection.SIGNED_BEFORE: Cause.SIGNED_BEFORE,
}
# Named for a while, though the device is fit again.
_HEALED: Final = (Cause.WRONG_CERTIFICATE, Cause.EXPIRED_CERTIFICATE, Cause.EVICTED)
_PAST: Final = (*_HEALED, Cause.INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with one device, or that nothing is (``AT_WORK``)."""

    cause: Cause
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether anything is wrong."""
        return self.cause is not Cause.AT_WORK


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one device that was asked and has not answered; times in seconds."""

    vitals: Vitals
    asked_s: float  # since it was asked
    idle_s: float | None  # since it called at the fleet port; None = never
    lost_s: float = 0.0  # since its connection ended; 0 = it is there

    @property
    def came(self) -> bool:
        """Whether it has called at the fleet port since it was asked."""
        return self.idle_s is not None and self.idle_s <= self.asked_s


_WORKING = Diagnosis(Cause.AT_WORK)


def diagnose(facts: Facts) -> Diagnosis:
    """Why a device has not answered yet.

    The device's own word comes first, then its silence: a waiting stream that looks open proves nothing, for
    a cut cable ends no connection. A device in a round calls at the fleet port at least every ten seconds.
    """
    vitals = facts.vitals
    if not vitals.enrolled:
        return Diagnosis(Cause.REVOKED, "it lost its enrolment")
    silent = _silent(facts)
    if silent is not None:
        return silent
    if (trouble := _foremost(vitals.troubles)) is not None:
        return Diagnosis(trouble.cause, trouble.detail)
    return _clock(vitals) or _WORKING


def _silent(facts: Facts) -> Diagnosis | None:
    quiet = facts.idle_s if facts.came and facts.idle_s is not None else facts.asked_s
    if facts.vitals.streaming:
        if quiet < (SILENT_S if facts.came else NO_SHOW_S):
            return None
        return Diagnosis(
            Cause.HALF_OPEN, f"its waiting stream looks open, but nothing has come for {quiet:.0f} s"
        )
    beat = SILENT_S / 2 if facts.came else LOST_S  # one heartbeat must have been missed
    if facts.lost_s < LOST_S or quiet < beat:
        return None
    return Diagnosis(Cause.GONE, f"its connection ended {facts.lost_s:.0f} s ago and it has not called since")


def _foremost(troubles: Iterable[Trouble]) -> Trouble | None:
    """The newest of those that are so at this moment."""
    open_ = [t for t in troubles if t.cause not in _PAST]
    return max(open_, key=lambda t: t.since, default=None)


def _past(vitals: Vitals) -> Diagnosis | None:
    """What is over and worth knowing: what was mended before a process that has ended."""
    found = [t for t in vitals.troubles if t.cause in _PAST]
    last = max(found, key=lambda t: (t.cause in _HEALED, t.since), default=None)
    return None if last is None else Diagnosis(last.cause, last.detail)


def _clock(vitals: Vitals) -> Diagnosis | None:
    offset = vitals.clock_offset
    if abs(offset) <= CLOCK_NAMED_S:
        return None
    side = "ahead of" if offset > 0 else "behind"
    return Diagnosis(Cause.CLOCK_OFF, f"its clock is {abs(offset):.0f} s {side} the coordinator's")


def standing(candidate: Candidate, vitals: Vitals) -> Diagnosis:
    """What is wrong with a device that is not under way in a round."""
    trouble, place = _foremost(vitals.troubles), candidate.standing
    if trouble is not None and place not in ("revoked", "quarantined", "wrong-version", "data-contract"):
        return Diagnosis(trouble.cause, trouble.detail)
    if (cause := _OF_STANDING.get(place)) is not None:
        return Diagnosis(cause, candidate.reason)
    return _clock(vitals) or _past(vitals) or _WORKING


def cause_of(outcome: str, given: Cause | None = None) -> str:
    """The cause of an answer that does not count; '' where the answer itself was wrong."""
    if given is not None:
        return given.value
    found = _OF_REJECTION.get(outcome)
    return "" if found is None else found.value


@dataclass(frozen=True, slots=True)
class Wait:
    """A run waits for ``what`` because of ``cause``, at most until then."""

    what: str
    cause: Cause
    why: str
    until: float = 0.0  # UTC, s; 0 = until that is over

    def __str__(self) -> str:
        """As in 'waiting for 2 of 4 devices because at-work: ..., until 12:03:20 UTC'."""
        ends = f", until {time.strftime('%H:%M:%S', time.gmtime(self.until))} UTC" if self.until else ""
        return f"waiting for {self.what} because {self.why or self.cause.value}{ends}"

    def to_json(self) -> dict[str, Any]:
        """As on the board."""
        return {
            "what": self.what,
            "cause": self.cause.value,
            "why": self.why,
            "until": self.until,
            "words": str(self),
            "advice": ADVICE[self.cause],
        }


def wait_of(error: LeptonError, until: float) -> Wait:
    """The wait for trouble of the coordinator's own machine to pass."""
    if isinstance(error, DiskFull):
        return Wait("room on the coordinator's disk", Cause.SERVER_DISK_FULL, str(error), until)
    if isinstance(error, StateLocked):
        return Wait("the database", Cause.DATABASE_LOCKED, str(error), until)
    assert isinstance(error, ConnectionFailed)
    return Wait("the database", Cause.DATABASE_LOST, str(error), until)


class Attended(Protocol):
    """An open attempt, as the watchdog looks at it; any thread may call."""

    @property
    def round(self) -> int:
        """Its round."""
        ...

    @property
    def attempt(self) -> int:
        """Its number."""
        ...

    @property
    def asked(self) -> int:
        """How many devices were asked."""
        ...

    @property
    def until(self) -> float:
        """When it closes, UTC seconds."""
        ...

    def open(self) -> Mapping[str, Facts]:
        """The devices that have not answered."""
        ...


@dataclass
class _Watched:
    """What is known of one run."""

    candidates: Callable[[], Sequence[Candidate]] | None = None
    wait: Wait | None = None  # what the run itself waits for
    attempt: Attended | None = None
    standings: dict[str, Diagnosis] = field(default_factory=dict)
    named: dict[str, Cause] = field(default_factory=dict)  # device -> the fault that the log has


class Watchdog:
    """Looks at all runs under way, keeps the board, and says in log and metrics what has changed."""

    def __init__(
        self,
        fleet: Fleet,
        meters: Meters,
        state_dir: Path | None = None,
        *,
        wall: Callable[[], float] = time.time,
        rollouts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Nothing is watched before :meth:`start`.

        Args:
            fleet: The devices.
            meters: For /metrics.
            state_dir: Where the board is; None = there is none.
            wall: UTC seconds.
            rollouts: What the board says of each rollout, as JSON types.
        """
        self._fleet, self._meters, self._wall, self._rollouts = fleet, meters, wall, rollouts
        self._folder = state_dir
        self._board = Board(state_dir / BOARD_FILE) if state_dir else None
        self._runs: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._look_now = threading.Event()
        self._ticks = 0
        self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        if self._board is not None:
            self._board.open()
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._look_now.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._board is not None:
            self._board.close()

    # --- what is watched ------------------------------------------------------------------------------

    def begins(self, run_id: str) -> None:
        """A run is under way."""
        with self._lock:
            self._runs.setdefault(run_id, _Watched())

    def ends(self, run_id: str) -> None:
        """A run is over, or waits in the queue again."""
        with self._lock:
            self._runs.pop(run_id, None)
        self._meters.forget_faults(run_id)
        self._look_now.set()

    def chooses_from(self, run_id: str, candidates: Callable[[], Sequence[Candidate]]) -> None:
        """Where a run's devices stand."""
        self._run(run_id).candidates = candidates

    def waits(self, run_id: str, wait: Wait | None) -> None:
        """A run waits for something; None = it moves again."""
        run = self._run(run_id)
        was, run.wait = run.wait, wait
        if wait is not None and (was is None or was.cause is not wait.cause):
            log.warning("run %s: %s", run_id, wait, extra=_extra(run_id, run.attempt, wait.cause))
        self._look_now.set()

    def attends(self, run_id: str, attempt: Attended | None) -> None:
        """An attempt is open; None = it is closed."""
        run = self._run(run_id)
        run.attempt = attempt
        self._look_now.set()

    def _run(self, run_id: str) -> _Watched:
        with self._lock:
            return self._runs.setdefault(run_id, _Watched())

    # --- looking --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:  # the watch must outlive what it looks at
                log.exception("the watchdog stumbled; it goes on")
            self._look_now.wait(TICK_S)
            self._look_now.clear()
            self._stop.wait(TICK_S / 5)  # however fast things change

    def look(self) -> dict[str, Any]:
        """Look once at everything, and write the board."""
        with self._lock:
            runs = dict(self._runs)
        whole = self._ticks % STANDINGS_EVERY == 0
        self._ticks += 1
        told = {run_id: self._told(run_id, run, whole) for run_id, run in runs.items()}
        body = {"time": self._wall(), "pid": os.getpid(), "runs": told, "rollouts": self._rollouts()}
        if self._board is not None:
            self._board.write(body)
        return body

    def _told(self, run_id: str, run: _Watched, whole: bool) -> dict[str, Any]:
        attempt = run.attempt
        facts = attempt.open() if attempt is not None else {}
        found = {device_id: diagnose(known) for device_id, known in facts.items()}
        if whole and run.candidates is not None:
            run.standings = self._standings(run.candidates())
        faults = {d: s for d, s in run.standings.items() if d not in found or s.cause in _HEALED}
        faults |= {d: s for d, s in found.items() if s.is_fault}
        shown = sorted(faults.items(), key=lambda item: (item[0] not in found, item[1].cause.value, item[0]))
        self._say(run_id, run, shown)
        wait = run.wait or self._wait_for_store()
        if wait is None and attempt is not None:
            wait = _wait_for_devices(attempt, found)
        return {
            "round": attempt.round if attempt else None,
            "attempt": attempt.attempt if attempt else None,
            "wait": wait.to_json() if wait else None,
            "devices": [
                {
                    "device_id": device_id,
                    "cause": fault.cause.value,
                    "detail": fault.detail[:300],
                    "advice": ADVICE[fault.cause],
                    "asked": device_id in found,
                }
                for device_id, fault in shown[:MOST_DEVICES]
            ],
            "more": max(0, len(shown) - MOST_DEVICES),
        }

    def _wait_for_store(self) -> Wait | None:
        """What keeps others from writing will keep a run, too, as soon as it has something to record."""
        error = self._fleet.store_error
        if isinstance(error, DiskFull | StateLocked | ConnectionFailed):
            return wait_of(error, 0.0)
        free = self._free_bytes()
        if free is None or free >= LEAST_ROOM:
            return None
        why = f"{free // 1024} KiB are left on the disk of {self._folder}; the next record may not fit"
        return Wait("room on the coordinator's disk", Cause.SERVER_DISK_FULL, why)

    def _free_bytes(self) -> int | None:
        """What is left where the state is; a full disk may not be felt for a while, as old files go."""
        if self._folder is None:
            return None
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize

    def _standings(self, candidates: Sequence[Candidate]) -> dict[str, Diagnosis]:
        fit = ("eligible", "busy", "resting")
        found = {
            c.device_id: standing(c, self._fleet.vitals(c.device_id))
            for c in candidates
            if c.standing not in (*fit, "other-group")
        }
        usual = {c.device_id: c for c in candidates if c.standing in fit}
        for device_id, vitals in self._fleet.troubled():
            if device_id in usual:
                found[device_id] = standing(usual[device_id], vitals)
        return {d: s for d, s in found.items() if s.is_fault}

    def _say(self, run_id: str, run: _Watched, faults: Sequence[tuple[str, Diagnosis]]) -> None:
        """A line for each fault that is new, the foremost first and of a crowd only some, and the gauges."""
        new = [(d, fault) for d, fault in faults if run.named.get(d) is not fault.cause]
        for device_id, fault in new[:MOST_DEVICES]:
            log.warning(
                "run %s: device %s: %s%s",
                run_id,
                device_id,
                fault.cause.value,
                f": {fault.detail}" if fault.detail else "",
                extra=_extra(run_id, run.attempt, fault.cause) | {"device": device_id},
            )
        if (more := len(new) - MOST_DEVICES) > 0:
            log.warning("run %s: %d more devices have faults; `lepton devices list` shows them", run_id, more)
        run.named = {device_id: fault.cause for device_id, fault in faults}
        counts: dict[str, int] = {}
        for _, fault in faults:
            counts[fault.cause.value] = counts.get(fault.cause.value, 0) + 1
        self._meters.show_faults(run_id, counts, run.wait.cause.value if run.wait else "")


def _wait_for_devices(attempt: Attended, found: Mapping[str, Diagnosis]) -> Wait | None:
    if not found:
        return None
    counts: dict[str, int] = {}
    for one in found.values():
        counts[one.cause.value] = counts.get(one.cause.value, 0) + 1
    why = ", ".join(f"{n} {name.replace('-', ' ')}" for name, n in sorted(counts.items()))
    causes = {one.cause for one in found.values() if one.is_fault}
    cause = causes.pop() if len(causes) == 1 else Cause.FAILED if causes else Cause.AT_WORK
    return Wait(f"{len(found)} of {attempt.asked} devices", cause, why, attempt.until)


def _extra(run_id: str, attempt: Attended | None, cause: Cause) -> dict[str, Any]:
    known: dict[str, Any] = {"event": "run.wait", "run": run_id, "cause": cause.value}
    if attempt is not None:
        known |= {"round": attempt.round, "attempt": attempt.attempt}
    return known


# --- the board ----------------------------------------------------------------------------------------


class Board:
    """One file of fixed size, rewritten in place: it needs no room on a full disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def open(self) -> None:
        """Take the room; without it there is no board, which the log says."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._file, 0, BOARD_BYTES)
        except OSError as error:
            log.warning("there is no board of what runs wait for: %s: %s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """Close the file; it stays, and grows stale."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def write(self, body: Mapping[str, Any]) -> None:
        """Replace what it says."""
        if self._file < 0:
            return
        text = json.dumps(body, separators=(",", ":")).encode()
        line = f"{len(text)} {hashlib.sha256(text).hexdigest()}\n".encode()
        if len(line) + len(text) > BOARD_BYTES:
            return
        try:
            os.pwrite(self._file, line + text, 0)
        except OSError as error:
            log.warning("the board cannot be written: %s", error.strerror)


def read_board(
    state_dir: Path, *, about: Literal["runs", "rollouts"] = "runs", wall: Callable[[], float] = time.time
) -> dict[str, Any]:
    """What the board says of each run, or rollout; empty when it says nothing that can be believed."""
    for _ in range(5):  # it may be in the midst of a change
        try:
            head, _, rest = (state_dir / BOARD_FILE).read_bytes().partition(b"\n")
            size, digest = head.split()
            text = rest[: int(size)]
        except (OSError, ValueError):
            return {}
        if hashlib.sha256(text).hexdigest().encode() == digest:
            body = json.loads(text)
            fresh = abs(wall() - float(body["time"])) <= STALE_S
            return dict(body[about]) if fresh else {}
        time.sleep(0.01)
    return {}
