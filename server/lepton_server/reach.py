"""Whom a run was made of, from the store (``lepton_fl.rounds.coverage``)."""

from math import inf
from typing import TYPE_CHECKING

from lepton_fl.rounds.coverage import Coverage, History, coverage

if TYPE_CHECKING:
    from lepton_server.store import Run, Store


def coverage_of(store: "Store", run: "Run") -> Coverage:
    """Who contributed to a run, so far or at its end: of the enrolled devices that it could ask."""
    groups = set(run.spec.get("cohort", {}).get("groups", ()))
    devices = [d for d in store.active_devices() if not groups or groups & set(d.groups)]
    causes, counted = store.last_causes(run.id), store.contributors(run.id)
    usual = store.usual_seconds()
    return coverage(
        {d.id: d.groups for d in devices},
        counted,
        {device_id: seconds or inf for device_id, seconds in usual.items()},
        {device_id: cause or "not-counted" for device_id, cause in causes.items()},
    )


def floor_of(run: "Run") -> float:
    """Below which share a run is flagged; 0 = never."""
    return float(run.spec.get("cohort", {}).get("coverage_floor", 0.0))


def history_of(store: "Store", run_id: str) -> History:
    """Who was asked in a run so far, and whose answer counted."""
    history = History()
    for part in store.participation(run_id):
        history.heard(part.device_id, part.outcome == "counted", 0.0, part.cause or part.reason)
    return history
