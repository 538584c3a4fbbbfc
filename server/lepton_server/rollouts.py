"""The coordinator's side of staged rollouts: it looks, decides, and does, one transaction an act.

``lepton_fl.delivery.rollout`` decides; here the decision meets the journal. An act and its consequence for
the devices are one transaction, so that a coordinator killed at any moment goes on where it was. A command
given meanwhile is heard: an act that does not follow any more is refused by the journal and decided anew.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.delivery.rollout import (
    OPEN,
    Act,
    Known,
    RolloutPlan,
    Service,
    Standing,
    Told,
    Wish,
    decide,
    members,
    reaches,
    stages_of,
)
from lepton_fl.delivery.trial import needed
from lepton_fl.errors import ConfigError, LeptonError, NotFound, StateConflict
from lepton_server.fleet import Heard
from lepton_server.releases import assigned_release, wish

if TYPE_CHECKING:
    from lepton_fl.delivery.shelf import Shelf
    from lepton_server.store import Device, Rollout, Store, Transaction

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0  # between two looks
IDLE_S: Final = 60.0  # everything is looked at again, should an event ever be missed
_FOLLOWED: Final = (
    *("device.enrolled", "device.revoked", "device.reported", "device.desired"),
    *("rollout.planned", "rollout.told", "rollout.reverted", "rollout.suspected", "rollout.moved"),
)
AT_ONCE: Final = 1000  # devices in one event
STEPS: Final = 100  # acts of one look

Hearing = Callable[[str], Heard]  # device id -> what it said last


def _from_the_journal(device_id: str) -> Heard:
    """Nothing newer than the journal: where there is no coordinator's memory to ask."""
    return Heard()


def known(device: "Device", hearing: Hearing = _from_the_journal, question: str = "") -> Known:
    """A device as a rollout sees it: its last report, and what the operator wants of it.

    Args:
        device: As recorded.
        hearing: What it said last.
        question: SHA-256 of what the rollout asks; answers to another question say nothing.
    """
    heard = hearing(device.id)
    told, tried = heard.serving or device.reported.get("serving") or {}, heard.tried
    serving = str(told.get("release", ""))
    return Known(
        id=device.id,
        profile=str(told.get("profile", "")),
        groups=device.groups,
        wanted=assigned_release(device.desired) or "",
        serving=serving,
        failed={f["release"]: f["fault"] for f in told.get("failed", []) if f.get("final")},
        service=heard.service if heard.counted_for == serving else Service(),
        trials=bool(told.get("trials")),
        answer=tried.word if (tried.release, tried.question) == (serving, question) else "",
    )


def plan_of(row: "Rollout") -> RolloutPlan:
    """The frozen plan of a rollout."""
    return RolloutPlan.model_validate({**row.plan, "id": row.id, "task": row.task})


def standing_of(store: "Store", row: "Rollout") -> Standing:
    """Where a rollout is."""
    told = {t.device_id: Told(t.stage, t.before, t.p95_ms) for t in store.told(row.id)}
    return Standing(
        phase=row.phase,  # type: ignore[arg-type]  # the journal knows no other
        stage=row.stage,
        since=row.since,
        told=told,
        suspect=row.suspect,
        suspect_since=row.suspect_since,
        suspect_requests=row.suspect_requests,
    )


def candidates(
    store: "Store",
    row: "Rollout",
    told: Mapping[str, Told],
    hearing: Hearing,
    devices: "Iterable[Device] | None" = None,
) -> list[Known]:
    """The enrolled devices that a rollout decides by: of its task and in no other one, or told by it.

    Args:
        store: The coordinator's state.
        row: The rollout.
        told: Whom it has told.
        hearing: What devices said last.
        devices: Those to choose from; None = all that the store has.
    """
    trial = plan_of(row).health.trial
    question = trial.question.digest() if trial else ""
    elsewhere = {device for device, other in store.told_in().items() if other != row.id}
    return [
        known(device, hearing, question)
        for device in (store.devices() if devices is None else devices)
        if device.state == "active"  # one that is revoked answers no more: nothing waits for it
        and device.id not in elsewhere
        and (device.id in told or _task_of(device) == row.task)
    ]


def _task_of(device: "Device") -> str:
    return str((device.reported.get("serving") or {}).get("task", ""))


# --- commands ---------------------------------------------------------------------------------------


def create(store: "Store", shelf: "Shelf", wish: Wish) -> RolloutPlan:
    """Check and journal a wish; no device hears of it yet.

    Args:
        store: The coordinator's state.
        shelf: The signed releases.
        wish: What the operator wants.

    Raises:
        ConfigError: The releases are of several tasks, or one did not pass the gate of its profile.
            Or too few devices of the first stage answer what the plan wants to ask them.
        NotFound: There is no such release.
    """
    full = {profile: shelf.find(name) for profile, name in wish.releases.items()}
    manifests = {profile: shelf.manifest(name) for profile, name in full.items()}
    tasks = sorted({manifest.task for manifest in manifests.values()})
    if len(tasks) > 1:
        raise ConfigError(f"A rollout is for one task, these releases are of {', '.join(tasks)}.")
    for profile, manifest in manifests.items():
        if manifest.profiles and profile not in manifest.profiles:
            raise ConfigError(
                f"{manifest.variant}@{manifest.sequence} did not pass the gate of {profile}, "
                f"only of {', '.join(manifest.profiles)}.",
                hint="`lepton variants compare` shows why; choose another variant for this profile.",
            )
    made = RolloutPlan(id=wish.id, task=tasks[0], releases=full, stages=wish.stages, health=wish.health)
    check_trial(store, made)
    store.record("rollout.planned", {"rollout_id": made.id, "task": made.task, "plan": made.to_json()})
    return made


def check_trial(store: "Store", plan: RolloutPlan) -> None:
    """Refuse a trial that the first stage could never answer: the rollout would wait for ever."""
    if (trial := plan.health.trial) is None:
        return
    fleet = [known(d) for d in store.devices() if d.state == "active" and _task_of(d) == plan.task]
    first = members(plan, 0, fleet)
    able = sum(device.trials for device in first)
    if able < needed(trial):
        raise ConfigError(
            f"The first stage has {len(first)} devices, and {able} of them answer trials; with epsilon = "
            f"{trial.epsilon:g} and max_bad = {trial.max_bad:g} it needs {needed(trial)} answers.",
            hint="Make the stage larger, or ask for more epsilon; owners allow it by trial.budget.",
        )


def move(store: "Store", rollout_id: str, phase: str, cause: str = "", *, aborting: bool = False) -> None:
    """An operator's word: another phase, the stage stays; raises StateConflict where it does not follow."""
    row = store.rollout(rollout_id)
    body = {"rollout_id": rollout_id, "phase": phase, "stage": row.stage, "cause": cause}
    store.record("rollout.moved", body | {"aborting": aborting})


@dataclass(frozen=True, slots=True)
class View:
    """What a rollout does now, by what is known of its devices; JSON types but for ``at``.

    Attributes:
        act: The kind of the next act; ``wait`` most of the time.
        cause: Why, in words.
        until: Wall clock s until which nothing can change by itself; 0 = not known.
        stages: A line for each: how many devices it has, how many were told, serve, and gave up.
        at: Wall clock s as of which that is known; 0 = as the journal has devices' reports, which is up to
            ``REPORT_GAP_S`` behind, without what they counted and answered.
    """

    act: str
    cause: str
    until: float
    stages: list[dict[str, Any]]
    at: float = 0.0


def view(store: "Store", row: "Rollout", now: float) -> View:
    """A rollout by the journal alone."""
    standing, plan = standing_of(store, row), plan_of(row)
    devices = candidates(store, row, standing.told, _from_the_journal)
    act = decide(plan, standing, devices, now)
    stages = progress(plan, stages_of(plan, devices), standing.told, devices)
    return View(act.kind, act.cause, act.until, stages)


def progress(
    plan: RolloutPlan, stage_of: Mapping[str, int], told: Collection[str], devices: Iterable[Known]
) -> list[dict[str, Any]]:
    """A line for each stage.

    Args:
        plan: The plan.
        stage_of: See :func:`lepton_fl.delivery.rollout.stages_of`.
        told: Whom the rollout has told.
        devices: Of which something is known; those that were told at least.
    """
    names = ("told", "serving", "gave up")
    sizes = Counter(stage_of.values())
    lines: list[dict[str, Any]] = [
        {"stage": str(stage), "devices": sizes[index]} | dict.fromkeys(names, 0)
        for index, stage in enumerate(plan.stages)
    ]
    for device in devices:
        if (index := stage_of.get(device.id)) is not None:
            release = plan.releases.get(device.profile, "")
            found = (device.id in told, device.serving == release, release in device.failed)
            for name, counts in zip(names, found, strict=True):
                lines[index][name] += counts
    return lines


# --- the thread -------------------------------------------------------------------------------------


class _Followed:
    """The devices as recorded: read once, and then as the journal goes on."""

    def __init__(self, store: "Store") -> None:
        self._store, self._seq = store, -1
        self.devices: dict[str, Device] = {}
        self.version = 0  # of who could take part, and in which place
        self.news = 0  # events of devices and rollouts so far

    def refresh(self) -> None:
        """Read what was journalled since the last call."""
        if self._seq < 0:
            self._seq = self._store.head_seq()  # first: what is written meanwhile is then seen twice
            self.devices = {device.id: device for device in self._store.devices()}
            self.news += 1
            return
        head = self._store.head_seq()
        events = self._store.events(self._seq, kinds=_FOLLOWED)
        for event in events:
            if event.kind.startswith("device."):
                self._apply(event.kind, event.body)
        self._seq = max(head, *(event.seq for event in events)) if events else head
        self.news += len(events)

    def _apply(self, kind: str, body: Mapping[str, Any]) -> None:
        name = str(body["device_id"])
        was = self.devices.get(name)
        if was is not None and kind == "device.desired":
            self.devices[name] = replace(was, desired=body["desired"])
            return
        self.version += 1
        if was is not None and kind == "device.reported":
            self.devices[name] = replace(was, reported=body["reported"])
        else:
            self.devices[name] = self._store.device(name)


class RolloutKeeper:
    """Carries the open rollouts on, and gives devices that enrol later what their profile has in service.

    Looks often and does little: as long as the journal says nothing of devices and rollouts, no device says
    anything else than before, and no time is up, nothing is decided anew. All devices are gone through only
    when others could take part or a stage begins; else those that were told.
    """

    def __init__(
        self,
        store: "Store",
        hearing: Hearing = _from_the_journal,
        clock: Callable[[], float] = time.time,
        said: Callable[[], int] | None = None,
    ) -> None:
        """Nothing begins yet.

        Args:
            store: The coordinator's state.
            hearing: What devices said last.
            clock: Wall clock s.
            said: Grows when one of them says something else; None = look every time.
        """
        self._store, self._hearing, self._clock, self._said = store, hearing, clock, said
        self._followed = _Followed(store)
        self._all_told: dict[str, tuple[int, int]] = {}  # rollout -> stage, version at which nobody was left
        self._stages: dict[str, dict[str, int]] = {}  # of that version
        self._views: dict[str, View] = {}  # as of the last look at which something was decided
        self._looked = 0.0
        self._heard = -1, -1  # news of the journal, and what devices had said, at the last look
        self._quiet = 0.0, 0.0  # from when and until when nothing can change by itself
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollout-keeper", daemon=True)

    def start(self) -> None:
        """Begin; what an earlier coordinator began goes on."""
        self._thread.start()

    def close(self) -> None:
        """End; rollouts stay where they are."""
        self._stop.set()
        self._thread.join()

    def views(self) -> dict[str, dict[str, Any]]:
        """What each running rollout does, as of the last look; plain JSON types."""
        return {name: asdict(found) | {"at": self._looked} for name, found in self._views.copy().items()}

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except LeptonError as error:  # a locked database, a full disk: the next look may be luckier
                log.error("the rollouts cannot be looked at: %s %s", error, error.hint)
            except Exception:  # this thread guards devices against a bad release: it must not die
                log.exception("the rollouts cannot be looked at")

    def look(self) -> None:
        """Once: every open rollout does all it can do now."""
        now, said = self._clock(), self._said() if self._said else 0
        self._followed.refresh()
        heard, (begins, ends) = (self._followed.news, said), self._quiet
        if self._said is not None and heard == self._heard and begins <= now < ends:
            self._looked = now  # nothing has changed
            return
        self._quiet = 0.0, 0.0  # should this look be cut short, the next one looks again
        self._welcome()
        until, rows = now + IDLE_S, self._store.rollouts(phases=("running", "rolling-back"))
        for name in self._views.keys() - {row.id for row in rows}:  # it is over, or paused
            for kept in (self._views, self._stages, self._all_told):
                kept.pop(name, None)
        for row in rows:
            until = min(until, self._carry_on(row.id))
        self._heard, self._quiet, self._looked = heard, (now, until), now

    def _carry_on(self, rollout_id: str) -> float:
        """All that one rollout can do now; wall clock s at which it is to be looked at again."""
        for _ in range(STEPS):
            if self._stop.is_set():
                break
            act = self._step(rollout_id)
            if act is None:
                break
            if act.kind == "wait":
                return act.until or math.inf
        return 0.0

    def _step(self, rollout_id: str) -> Act | None:
        """One act, done; None = it did not follow any more."""
        self._followed.refresh()
        row = self._store.rollout(rollout_id)
        standing, here = standing_of(self._store, row), self._followed
        place = row.stage, here.version
        some = self._all_told.get(row.id) == place
        chosen = [here.devices[name] for name in standing.told] if some else here.devices.values()
        devices = candidates(self._store, row, standing.told, self._hearing, chosen)
        plan = plan_of(row)
        act = decide(plan, standing, devices, self._clock())
        if act.kind != "tell" and not some:
            self._all_told[row.id], self._stages[row.id] = place, stages_of(plan, devices)
        if act.kind == "wait":
            stages = progress(plan, self._stages[row.id], standing.told, devices)
            self._views[row.id] = View(act.kind, act.cause, act.until, stages)
            return act
        try:
            with self._store.transaction() as change:
                self._carry_out(change, row, act, {d.id: d for d in devices})
        except StateConflict as error:  # somebody gave a command meanwhile, or a device was revoked
            log.info("rollout %s is looked at again: %s", rollout_id, error)
            return None
        _tell(row, act)
        return act

    def _welcome(self) -> None:
        """Assign what their profile has in service to devices that nobody ever assigned anything to."""
        fresh = [
            d for d in self._followed.devices.values() if d.state == "active" and "release" not in d.desired
        ]
        plans = in_service(self._store) if fresh else {}
        chosen = []
        for device in fresh:
            told = self._hearing(device.id).serving or device.reported.get("serving") or {}
            plan = plans.get((str(told.get("task", "")), str(told.get("profile", ""))))
            if plan is not None and reaches(plan, found := known(device, self._hearing)):
                chosen.append((device, plan.releases[found.profile]))
        for start in range(0, len(chosen), AT_ONCE):
            with self._store.transaction() as change:
                for device, name in chosen[start : start + AT_ONCE]:
                    wish(change, device, name)
        if chosen:
            log.info("%d devices that enrolled later get what their profile has in service", len(chosen))
            self._followed.refresh()

    def _carry_out(
        self, change: "Transaction", row: "Rollout", act: Act, devices: Mapping[str, Known]
    ) -> None:
        body: dict[str, Any] = {"rollout_id": row.id}
        if act.kind == "tell":
            self._tell_devices(change, row, [devices[name] for name in act.devices[:AT_ONCE]])
        elif act.kind == "revert":
            names = act.devices[:AT_ONCE]
            self._take_back(change, row, names)
            change.record("rollout.reverted", body | {"devices": list(names)})
        elif act.kind == "suspect":
            change.record("rollout.suspected", body | {"cause": act.cause, "requests": act.requests})
        else:
            ends = "aborted" if row.aborting else "rolled-back"
            phase = {
                "breach": "rolling-back",
                "promote": "running",
                "finish": ends if row.phase == "rolling-back" else "done",
            }[act.kind]
            stage = row.stage + (act.kind == "promote")
            cause = row.cause if row.phase == "rolling-back" else act.cause  # why it was taken back stays
            change.record("rollout.moved", body | {"phase": phase, "stage": stage, "cause": cause})

    def _tell_devices(self, change: "Transaction", row: "Rollout", chosen: list[Known]) -> None:
        plan = plan_of(row)
        trial = plan.health.trial
        question = trial.question.to_json() if trial else None
        told = [
            {"device_id": d.id, "before": d.wanted or d.serving, "p95_ms": d.service.p95_ms} for d in chosen
        ]
        change.record("rollout.told", {"rollout_id": row.id, "stage": row.stage, "devices": told})
        for device in chosen:
            wish(change, self._store.device(device.id), plan.releases[device.profile], question)

    def _take_back(self, change: "Transaction", row: "Rollout", names: tuple[str, ...]) -> None:
        before = {t.device_id: t.before for t in self._store.told(row.id)}
        for name in names:
            device = self._store.device(name)
            if device.state == "active":
                wish(change, device, before[name] or None)


def _tell(row: "Rollout", act: Act) -> None:
    where = {"event": f"rollout.{act.kind}", "rollout": row.id, "cause": act.cause}
    if act.kind == "breach":
        log.error("rollout %s is taken back: %s", row.id, act.cause, extra=where)
    elif act.kind in ("promote", "finish"):
        log.info("rollout %s: stage %d is left: %s", row.id, row.stage + 1, act.cause, extra=where)
    else:
        log.info("rollout %s: %s %d devices %s", row.id, act.kind, len(act.devices), act.cause, extra=where)


def in_service(store: "Store") -> dict[tuple[str, str], RolloutPlan]:
    """The rollout that was done last, by task and profile; none whose release was withdrawn since."""
    withdrawn = {event.subject for event in store.events(kinds=("release.withdrawn",))}
    found: dict[tuple[str, str], RolloutPlan] = {}
    for row in sorted(store.rollouts(phases=("done",)), key=lambda row: row.since):
        plan = plan_of(row)
        found |= {(row.task, profile): plan for profile in plan.releases}
    return {place: plan for place, plan in found.items() if plan.releases[place[1]] not in withdrawn}


def check_free(store: "Store", device_ids: set[str]) -> None:
    """Raise StateConflict if an open rollout has told one of these devices."""
    for device_id, rollout in store.told_in().items():
        if device_id in device_ids:
            raise StateConflict(
                f"Device {device_id} has its release from rollout {rollout}.",
                hint=f"Let it end, or `lepton rollout abort {rollout}`.",
            )


def find(store: "Store", wanted: str) -> "Rollout":
    """The rollout of that id, or the only one that is open when ``wanted`` is empty; raises NotFound."""
    if wanted:
        return store.rollout(wanted)
    rows = store.rollouts(phases=OPEN)
    if len(rows) != 1:
        raise NotFound(f"{len(rows)} rollouts are open.", hint="Name one; `lepton rollout list` shows them.")
    return rows[0]
