"""Devices that fail again and again are left alone for a while: repair with limits, and a way back.

A device whose last ``quarantine_after`` askings all failed by its own fault is not drawn for
``quarantine_s`` seconds; then, or when an operator says so, it is drawn again. Being slow is no fault: who
leaves out the slow ones trains a model of the fast ones. At most a third of the fleet is in quarantine, and
never so many that a round of the run could not get its reports. Every step is an event.
"""

import logging
import time
from collections.abc import Callable

from lepton_fl.errors import Cause, LeptonError
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, Collected
from lepton_server.config import WatchdogSection
from lepton_server.fleet import Fleet
from lepton_server.ops import Meters
from lepton_server.store import Store
from lepton_server.watchdog import cause_of

log = logging.getLogger(__name__)

OWN_FAULTS = frozenset(
    {
        Cause.GONE,
        Cause.OFFLINE,
        Cause.HALF_OPEN,
        Cause.HUNG_TRAINING,
        Cause.OUT_OF_MEMORY,
        Cause.INTERRUPTED,
        Cause.DISK_FULL,
        Cause.DATA_CONTRACT,
        Cause.FAILED,
    }
)
BAD_ANSWER = ""  # an answer came and was refused for what is in it


class Quarantine:
    """Decides who rests, and lets them back in."""

    def __init__(
        self,
        config: WatchdogSection,
        store: Store,
        fleet: Fleet,
        meters: Meters,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Make it; nothing is decided before :meth:`judge`."""
        self._config, self._store, self._fleet = config, store, fleet
        self._meters, self._wall = meters, wall

    def judge(self, collected: Collected) -> None:
        """After an attempt was recorded: who failed in it, and too often before, rests."""
        if not self._config.quarantine_after:
            return
        plan = collected.plan
        for device_id, entry in collected.participation.items():
            if entry.outcome in (ACCEPTED, SURPLUS):
                continue
            cause = cause_of(entry.outcome, entry.cause)
            if cause != BAD_ANSWER and cause not in OWN_FAULTS:
                continue
            try:
                self._consider(device_id, cause or entry.outcome, plan.run_id, plan.min_reports)
            except LeptonError as error:  # no reason to lose a round; the next fault asks again
                log.warning("device %s could not be put into quarantine: %s", device_id, error)

    def _consider(self, device_id: str, cause: str, run_id: str, needed: int) -> None:
        wanted = self._config.quarantine_after
        counting = {BAD_ANSWER, *(c.value for c in OWN_FAULTS)}
        faults = self._store.faults_in_a_row(device_id, counting, wanted)
        if faults < wanted or not self._fleet.is_enrolled(device_id):
            return
        registered, resting = self._fleet.counts().registered, len(self._fleet.quarantined())
        if 3 * (resting + 1) > registered or registered - resting - 1 < needed:
            log.warning(
                "device %s failed %d times in a row (%s); it does not rest, for too few would be left",
                device_id,
                faults,
                cause,
            )
            return
        until = self._wall() + self._config.quarantine_s
        body = {
            "device_id": device_id,
            "cause": cause,
            "faults": faults,
            "until": until,
            "run_id": run_id,
        }
        self._store.record("device.quarantined", device_id, body)
        self._fleet.follow()
        self._meters.repairs.labels("quarantine").inc()
        log.warning(
            "device %s failed %d times in a row (%s): it rests for %.0f s",
            device_id,
            faults,
            cause,
            self._config.quarantine_s,
            extra={"event": "device.quarantined", "device": device_id, "cause": cause, "run": run_id},
        )

    def sweep(self) -> None:
        """Let those back in whose time is over."""
        over = self._fleet.quarantined(over=True)
        for device_id in over:
            body = {"device_id": device_id, "reason": "its time is over"}
            try:
                self._store.record("device.readmitted", device_id, body)
            except LeptonError as error:  # an operator was faster, or the store is away: it is drawn anyway
                log.info("the readmission of device %s is not recorded now: %s", device_id, error)
                continue
            self._meters.repairs.labels("readmit").inc()
            log.info("device %s may be drawn again", device_id, extra={"device": device_id})
        if over:
            self._fleet.follow()
