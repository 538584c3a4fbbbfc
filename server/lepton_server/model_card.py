"""A run's model card: who took part, by which code, under which promise, and where each model came from.

Everything in it follows from the journal whose head it names, and from the signed list of releases:
`lepton audit verify` checks what it stands on.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from lepton_fl.delivery.shelf import Shelf
from lepton_fl.plan import RunSpec
from lepton_fl.privacy.budget import epsilon_of
from lepton_fl.privacy.record import accounts_of, reads, scope_of
from lepton_fl.rounds.visible import what_is_seen
from lepton_server.store import Event, Head, Model, Run, Store

FORMAT: Final = "lepton model card 1"
_PAGE = 1000  # events read at a time


def model_card(store: Store, run: Run, head: Head, shelf: Shelf | None = None) -> dict[str, Any]:
    """The card of a run, as plain JSON.

    Args:
        store: The coordinator's state.
        run: The run.
        head: The journal's head, read before ``run``.
        shelf: Where releases are signed; None = nothing was ever released.
    """
    spec, events = RunSpec.model_validate_json(json.dumps(dict(run.spec))), _events(store, run)
    models = store.models(run.id)
    return {
        "format": FORMAT,
        "run": {
            "id": run.id,
            "name": run.name,
            "state": run.state,
            "reason": run.reason,
            "rounds_committed": run.committed,
            "queued": _when(run.queued_at),
            "started": _when(run.started_at),
            "finished": _when(run.finished_at),
        },
        "model": _model(store, run, models),
        "task": _task(store, spec, events),
        "code": _code(store, run, events),
        "cohort": _cohort(store, run, spec),
        "secure_aggregation": spec.secure_aggregation,
        "coordinator_sees": list(what_is_seen(spec)),
        "privacy": _privacy(store, run, spec),
        "releases": [] if shelf is None else _releases(shelf, run),
        "lineage": _lineage(models, events),
        "journal": {"seq": head.seq, "hash": head.hash},
        "spec": dict(run.spec),
    }


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    run, model, cohort, privacy = card["run"], card["model"], card["cohort"], card["privacy"]
    parts = [f"# Model card: {_text(run['name'] or run['id'])}\n"]
    parts.append(_list("Run", run))
    parts.append(_list("Model", {k: v for k, v in model.items() if k != "metrics"} | model["metrics"]))
    parts.append(_list("Task", card["task"]))
    parts.append(_list("Code", card["code"]))
    parts.append(_list("Cohort", cohort))
    parts.append("## What the coordinator sees\n\n" + "".join(f"- {s}\n" for s in card["coordinator_sees"]))
    if privacy is None:
        parts.append("## Privacy\n\nNo guarantee of differential privacy was asked for.\n")
    else:
        parts.append(_list("Privacy", {k: v for k, v in privacy.items() if k != "budgets"}))
        parts.append(_table("Budgets", privacy["budgets"]))
    parts.append(_table("Releases", card["releases"]))
    parts.append(_table("Lineage", card["lineage"]))
    journal = card["journal"]
    parts.append(
        f"## Evidence\n\nThe journal's head was `{journal['seq']}:{journal['hash']}` when this was written. "
        f"`lepton audit verify journal.jsonl --head {journal['seq']}:{journal['hash']}` checks it.\n"
    )
    return "\n".join(parts)


# --- parts ------------------------------------------------------------------------------------------


def _model(store: Store, run: Run, models: list[Model]) -> dict[str, Any]:
    newest = [model for model in models if model.sha256 == run.model_sha256]
    evaluated = [row.evaluated for row in store.rounds(run.id) if row.evaluated]
    return {
        "sha256": run.model_sha256,
        "round": newest[-1].round if newest else None,
        "best_sha256": run.best_sha256,
        "best_round": run.best_round,
        "best": None if run.best_metric is None else {run.best_metric: run.best_value},
        "metrics": dict(evaluated[-1]) if evaluated else {},  # of the last evaluation
    }


def _task(store: Store, spec: RunSpec, events: Iterable[Event]) -> dict[str, Any]:
    """The version that was planned, not the one installed now."""
    planned = {str(e.body["plan"].get("task_version", "")) for e in events if e.kind == "round.planned"}
    versions = sorted(planned - {""})
    known = [t for t in store.tasks() if t.reference == spec.task and t.version in versions]
    return {
        "reference": spec.task,
        "versions": versions,
        "layout_sha256": sorted({task.layout_digest for task in known}),
        "parameters": max((task.num_parameters for task in known), default=None),
    }


def _code(store: Store, run: Run, events: list[Event]) -> dict[str, Any]:
    """Versions of the coordinators that served while the run was under way."""
    last = events[-1].seq if run.finished else None
    started = [e for e in store.events(kinds=["server.started"]) if last is None or e.seq < last]
    before = [e for e in started if e.seq < run.queued_seq][-1:]
    during = [e for e in started if e.seq >= run.queued_seq]
    versions = {str(event.body.get("version", "")) for event in before + during}
    return {"coordinator_versions": sorted(versions - {""}), "coordinator_restarts": len(during)}


def _cohort(store: Store, run: Run, spec: RunSpec) -> dict[str, Any]:
    """Counts of devices, no names. They are facts about the fleet that no epsilon covers."""
    parts = store.participation(run.id)
    outcomes = Counter(part.outcome for part in parts)
    counted = Counter(part.device_id for part in parts if part.outcome == "counted")
    return {
        "wanted": spec.cohort.size,
        "min_reports": spec.cohort.min_reports,
        "groups": list(spec.cohort.groups),
        "devices_asked": len({part.device_id for part in parts}),
        "devices_contributed": len(counted),
        "most_rounds_of_one_device": max(counted.values(), default=0),
        "outcomes": dict(sorted(outcomes.items())),
    }


def _privacy(store: Store, run: Run, spec: RunSpec) -> dict[str, Any] | None:
    """The promise, and what is spent of every budget that the run is charged to."""
    if spec.privacy is None:
        return None
    names = ("unit", "trust", "adjacency", "mechanism", "delta", "epsilon", "noise_multiplier", "clip_norm")
    accounts = set(accounts_of(run.id, spec.task, spec.cohort.groups))
    rows = [
        {
            "budget": found.policy.account,
            "version": found.policy.version,
            "unit": found.policy.unit,
            "trust": found.policy.trust,
            "adjacency": found.policy.adjacency,
            "delta": found.policy.delta,
            "epsilon": found.policy.epsilon,
            "spent": epsilon_of(found.policy.budget, counts),
            "scope": scope_of(found.policy.account),
            "releases": sum(counts.values()),
        }
        for found, counts in store.budgets()
        if accounts & set(reads(found.policy.account))
    ]
    own = [row["spent"] for row in rows if row["budget"] == f"run:{run.id}"]
    asked = {name: getattr(spec.privacy, name) for name in names}
    kept = (
        "the coordinator's ledger" if spec.privacy.unit == "device" else "each device, for its own examples"
    )
    return asked | {"spent": own[0] if own else None, "accounted_by": kept, "budgets": rows}


def _releases(shelf: Shelf, run: Run) -> list[dict[str, Any]]:
    """What was signed of this run's models, and for which device profiles it passed the gate."""
    if not shelf.repository.exists:
        return []
    rows = []
    for name, row in shelf.repository.releases().items():
        if row.get("run") == run.id:
            lineage = shelf.manifest(name).lineage
            facts = {"release": name, "variant": row["variant"], "sequence": row["sequence"]}
            gates = {"gate_passed_for": list(row.get("profiles", ())), "model_sha256": lineage.global_sha256}
            rows.append(facts | {"round": row["round"], **gates, "recipe_sha256": lineage.recipe_sha256})
    return rows


def _lineage(models: list[Model], events: Iterable[Event]) -> list[dict[str, Any]]:
    """Every model, the one it came from, and its place in the journal."""
    placed = {(e.body["round"], e.body["model_sha256"]): e for e in events if e.kind == "model.created"}
    rows = []
    for model in models:
        event = placed[model.round, model.sha256]
        place = {"seq": event.seq, "event_hash": event.hash}
        row = {"round": model.round, "model_sha256": model.sha256, "parent_sha256": model.parent_sha256}
        rows.append(row | {"epsilon": model.metrics.get("epsilon")} | place)
    return rows


def _events(store: Store, run: Run) -> list[Event]:
    """The run's own events, without who took part: that is read from the tables."""
    found, seen = list[Event](), 0
    kinds = ("run.queued", "round.planned", "model.created", "run.finished")
    while page := store.events(seen, subject=run.id, kinds=kinds, limit=_PAGE):
        seen = page[-1].seq
        found += page
    return found


# --- words ------------------------------------------------------------------------------------------


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _text(value: object) -> str:
    """A value on one line of Markdown; names come from operators."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _list(title: str, facts: Mapping[str, Any]) -> str:
    lines = [f"- {name.replace('_', ' ')}: {_text(value)}\n" for name, value in facts.items()]
    return f"## {title}\n\n{''.join(lines)}"


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return f"## {title}\n\nNone.\n"
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'--|' * len(names)}"]
    lines += [f"| {' | '.join(_text(row[name]) for name in names)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"
