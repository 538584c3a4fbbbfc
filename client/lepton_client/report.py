"""What ``lepton client status`` shows: the identity, and what the agent last wrote down."""

from datetime import UTC, datetime
from typing import Any

from lepton_client.config import ClientConfig
from lepton_client.spending import Spending, policies_of
from lepton_client.state import Identity, StateDir
from lepton_client.trials import Trials


def describe(state: StateDir, identity: Identity) -> dict[str, Any]:
    """One record about the device; an agent that was killed is told from one that runs by its lock."""
    known = state.status()
    pid = state.holder()
    return {
        "device_id": identity.device_id,
        "name": identity.name,
        "coordinator": identity.device_service,
        "certificate_ends": identity.ends,
        "running": pid != 0,
        "pid": pid or None,
        "state": known.get("state", "never ran") if pid else "not running",
        "since": _time(known.get("since")),
        "connected": bool(known.get("connected")) and pid != 0,
        "reason": known.get("reason", ""),
        "error": known.get("error", ""),
        "budget_refusal": known.get("budget_refusal", ""),
        "clock_skew_s": known.get("clock_skew_s"),
        "tasks": [_task(task) for task in known.get("tasks", [])],
        "release": _release(known.get("delivery") or {}),
    }


def verdict_rows(state: StateDir) -> list[dict[str, Any]]:
    """The last verdicts, oldest first."""
    return [row | {"at": _time(row.get("at"))} for row in state.status().get("verdicts", [])]


def budget_rows(state: StateDir, config: ClientConfig) -> list[dict[str, Any]]:
    """What rows have paid of their budgets; empty where there is none and nothing was charged."""
    rows, policies = [], policies_of(config.tasks)
    if policies or state.spending.exists():
        rows = Spending(state.spending, policies).accounts()
    if config.trial.budget or state.trials.exists():
        rows.append(Trials(state.trials, config.trial).account(config.delivery.task))
    return rows


def _task(task: dict[str, Any]) -> str:
    return f"{task['name']}: {'ready' if task['ready'] else task['reason']}"


def _release(delivery: dict[str, Any]) -> str:
    """What is served, and what became of the release that is wanted."""
    if not delivery.get("task"):
        return "none is taken: delivery.task is not set"
    serving, wanted = delivery.get("serving", ""), delivery.get("wanted", "")
    text = f"{serving[:12] or 'none'} in service"
    if wanted and wanted != serving:
        why = ": ".join(part for part in (delivery.get("fault"), delivery.get("detail")) if part)
        text += f"; {wanted[:12]} is {delivery.get('state') or 'not begun'}" + (f" ({why})" if why else "")
    return text


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
