"""One device, one desired release: everything between hearing of it and serving it.

    wanted -> trusted? -> allowed? -> fetched -> self-test -> in service
                 no          no         broken      no
                 └── reported; what was served is served still ──┘

Rules:

* **Forward.** A release must not be older than the floor, and no round of one run older than the floor's.
  The floor is the release that served before the present one and never falls: a coordinator can take a
  device back one step, and never further.
* **Two starts.** The start of a self-test is on the disk before it begins. One that ends its process twice,
  or the machine, is given up.
* What was given up is not tried again until the operator asks again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from lepton_fl.delivery.fetch import Limits, Paused, Tally, fetch
from lepton_fl.delivery.manifest import Manifest, parse_desired
from lepton_fl.delivery.slots import Failure, Place, Record, Slots
from lepton_fl.delivery.trust import Source, TrustStore
from lepton_fl.errors import ConnectionFailed, DiskFull, Fault, ReleaseRefused
from lepton_fl.files import remove_tree, sha256_hex

log = logging.getLogger(__name__)

STARTS: Final = 2  # of a self-test that ends its process
# What says something about the release itself: given up. Everything else may pass, and is tried again.
FINAL: Final = frozenset({Fault.OLDER, Fault.FOREIGN, Fault.SELF_TEST, Fault.CRASHED})
MAX_DETAIL: Final = 500  # characters of a failure
State = Literal["none", "serving", "waiting", "refused"]


class SelfTestCrashed(Exception):
    """The self-test ended its process; ``str`` says how."""


SelfTest = Callable[[Path], None]  # of a slot's folder; raises ReleaseRefused or SelfTestCrashed


@dataclass(frozen=True)
class Outcome:
    """What one call came to.

    Attributes:
        state: ``none``: no release is wanted. ``serving``: the wanted one is in service. ``waiting``: not
            yet, to be tried again. ``refused``: given up.
        serving: The release in service, empty = none.
        wanted: The release asked for, empty = none.
        fault: Why it is refused, also with ``waiting``; None where nothing is wrong with what came.
        detail: In words.
        tally: What was fetched.
    """

    state: State
    serving: str
    wanted: str
    fault: Fault | None = None
    detail: str = ""
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Device:
    """What a delivery depends on.

    Attributes:
        slots: What this device keeps.
        trust: What it believes.
        source: The coordinator.
        task: The only task whose releases it takes, ``package.module:attribute``.
        limits: The owner's.
        self_test: Tries a release before it serves.
        profile: What kind of device it is; empty = the owner does not say.
    """

    slots: Slots
    trust: TrustStore
    source: Source
    task: str
    limits: Limits
    self_test: SelfTest
    profile: str = ""


def deliver(device: Device, desired: str) -> Outcome:
    """Bring the desired release into service, as far as that is possible now.

    Args:
        device: Where and how.
        desired: The twin's desired state, JSON text; empty = nothing is wanted.

    Raises:
        StateError: This device's own state cannot be used; a full disk is waited out.
    """
    slots = device.slots
    slots.open()
    record = slots.record()
    serving, asking = record.current or "", sha256_hex(desired.encode())
    try:
        wanted = parse_desired(desired)
    except ReleaseRefused as error:
        return Outcome("refused", serving, "", error.fault, str(error))
    slots.tidy(record, wanted)
    if not wanted or wanted == serving:
        return Outcome("serving" if wanted else "none", serving, wanted)
    if known := record.failed(wanted, asking):
        return Outcome("refused", serving, wanted, known.fault, known.detail)
    tally = Tally()
    try:
        manifest = _obtain(device, record, wanted, tally)
        _try(device, slots.record(), manifest)
    except (Paused, ConnectionFailed, DiskFull) as error:
        return Outcome("waiting", serving, wanted, None, str(error), tally)
    except ReleaseRefused as error:
        if error.fault in FINAL:
            _give_up(slots, wanted, error, asking)
        state: State = "refused" if error.fault in FINAL else "waiting"
        return Outcome(state, serving, wanted, error.fault, str(error)[:MAX_DETAIL], tally)
    slots.tidy(slots.record(), "")
    return Outcome("serving", wanted, wanted, tally=tally)


def retreat(slots: Slots, name: str, fault: Fault, detail: str, desired: str) -> bool:
    """The release ``name`` cannot be served: note that, and go back to the last known good one.

    Args:
        slots: What this device keeps.
        name: The release.
        fault: Why.
        detail: What happened, in words.
        desired: The twin's desired state now: the same asking does not bring it back.

    Returns:
        Whether there was one to go back to, and ``name`` is in service no more.
    """
    record = slots.record()
    if record.current != name:
        return False
    failure = Failure(
        manifest=name, fault=fault, detail=detail[:MAX_DETAIL], desired=sha256_hex(desired.encode())
    )
    if record.previous is None or not slots.has(record.previous):
        slots.save(record.give_up(failure))
        return False
    place = _place(slots.manifest(record.previous))
    back = {"current": record.previous, "standing": place, "previous": None}
    slots.save(record.model_copy(update=back).give_up(failure))
    return True


def _obtain(device: Device, record: Record, wanted: str, tally: Tally) -> Manifest:
    """The release in its slot, whole and verified; its manifest."""
    slots = device.slots
    if slots.has(wanted):  # the one before, or one whose self-test was cut off
        try:
            manifest = slots.verified(wanted)
        except ReleaseRefused as error:
            log.warning("the slot of release %s is damaged, fetching it again: %s", wanted[:12], error)
            remove_tree(slots.path(wanted))
        else:
            _check_allowed(device, record.floor, manifest)
            return manifest
    manifest = device.trust.manifest(wanted, device.source)
    _check_allowed(device, record.floor, manifest)
    have = slots.path(record.current) if record.current else None
    fetch(manifest, slots.staging(wanted), device.source, device.limits, have=have, tally=tally)
    slots.adopt(manifest)
    return manifest


def _check_allowed(device: Device, floor: Place, manifest: Manifest) -> None:
    if manifest.task != device.task:
        raise ReleaseRefused(
            Fault.FOREIGN,
            f"The release is of the task {manifest.task}; the owner of this device allows {device.task}.",
            hint="Set delivery.task, or assign a release of that task.",
        )
    if device.profile and manifest.profiles and device.profile not in manifest.profiles:
        raise ReleaseRefused(
            Fault.FOREIGN,
            f"The release is for {', '.join(manifest.profiles)}; this device is a {device.profile}.",
            hint="Assign a variant that passed the gate of its profile.",
        )
    place = _place(manifest)
    same_run = place.run == floor.run and place.round is not None and floor.round is not None
    if place.sequence < floor.sequence or (same_run and (place.round or 0) < (floor.round or 0)):
        raise ReleaseRefused(
            Fault.OLDER,
            f"Release {place.sequence} (round {place.round} of run {place.run}) is before release "
            f"{floor.sequence} (round {floor.round} of run {floor.run}), to which this device may go back.",
            hint="A device goes forward, and back by one step only.",
        )


def _try(device: Device, record: Record, manifest: Manifest) -> None:
    """The self-test and the switch."""
    slots, name = device.slots, manifest.name
    starts, last = record.starts if record.trying == name else 0, "it was cut off"
    while True:
        if starts >= STARTS:
            raise ReleaseRefused(Fault.CRASHED, f"The self-test did not survive {starts} starts: {last}.")
        starts += 1
        record = slots.save(record.model_copy(update={"trying": name, "starts": starts}))
        try:
            device.self_test(slots.path(name))
            break
        except SelfTestCrashed as error:
            last = str(error)
        except BaseException:  # a verdict, or an orderly stop: neither is a crash
            slots.save(record.model_copy(update={"trying": None, "starts": 0}))
            raise
    slots.save(_switched(record, manifest))


def _switched(record: Record, manifest: Manifest) -> Record:
    place = _place(manifest)
    forward = record.current is not None and place.sequence > record.standing.sequence
    floor = max(record.floor, record.standing, key=lambda p: p.sequence) if forward else record.floor
    others = tuple(f for f in record.failures if f.manifest != manifest.name)
    return Record(
        current=manifest.name, standing=place, previous=record.current, floor=floor, failures=others
    )


def _give_up(slots: Slots, name: str, error: ReleaseRefused, asking: str) -> None:
    failure = Failure(manifest=name, fault=error.fault, detail=str(error)[:MAX_DETAIL], desired=asking)
    slots.tidy(slots.save(slots.record().give_up(failure)), "")


def _place(manifest: Manifest) -> Place:
    return Place(sequence=manifest.sequence, run=manifest.lineage.run, round=manifest.lineage.round)
