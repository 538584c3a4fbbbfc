"""What each event does to the tables, and when it is allowed: the state machine of the coordinator.

Rules:

* Every check comes before every change, so a refused event leaves its transaction as it was.
* An event is judged by its own time and by earlier events only. A replay therefore gives the same rows.

::

    token:  created ──used──> … ──used──> spent        revoked or expired: never used again
    device: active ──revoked──> revoked                for good
    run:    queued ──> running ──> stopping ──> completed | stopped | failed | exhausted
            exhausted ──resumed──> queued
    round:  planned ──> committed                      once per round
                   └──> abandoned ──> planned again as the next attempt, unless the round is burnt
            by phases: planned, offered, collecting, (unmasking,) aggregated, (noised,) committed, released
    charge: reserved ──> (releasing) ──> committed     counts as spent throughout
                └──> voided                            with evidence that nothing was released
    rollout: planned ──> running <──> paused           each may begin to roll back
             running ──> done
             rolling-back ──> rolled-back | aborted    when no device is left that was told
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, and_, delete, func, select, update

from lepton_fl.errors import NotFound, StateConflict, TrustError
from lepton_fl.files import canonical_json
from lepton_server.store import events as ev
from lepton_server.store.statements import adding, changes, changing, finding
from lepton_server.store.tables import (
    BUDGET,
    CHARGE,
    DEVICE,
    MODEL,
    PARTICIPATION,
    ROLLOUT,
    ROUND,
    RUN,
    TASK,
    TOKEN,
    TOKEN_USE,
    TOLD,
)

_CHUNK = 500  # ids in one IN (…)


@dataclass(frozen=True)
class When:
    """Where in the journal an event stands."""

    seq: int
    time: float


def apply(connection: Connection, when: When, body: ev.Body) -> None:
    """Apply one event to the projections.

    Args:
        connection: In a transaction that holds the write lock.
        when: Sequence number and time of the event.
        body: Its checked body.

    Raises:
        TrustError: A token or device is not, or no longer, accepted.
        NotFound: The event is about something unknown.
        StateConflict: The event does not follow from the recorded state.
    """
    _RULES[type(body)](connection, when, body)


def _json(value: object) -> str:
    return canonical_json(value).decode("utf-8")


def _one(connection: Connection, table: Table, **key: object) -> RowMapping | None:
    return connection.execute(finding(table, *key), key).mappings().first()


def _change(connection: Connection, table: Table, key: dict[str, object], **values: object) -> None:
    connection.execute(changing(table, tuple(key), tuple(values)), changes(key, values))


# -------------------------------------------------------------------------------------------------- tokens


def _token_created(connection: Connection, when: When, body: ev.TokenCreated) -> None:
    if body.expires_at <= when.time:
        raise StateConflict(
            f"Expected a token that expires after {when.time:.0f}, got {body.expires_at:.0f}."
        )
    if _one(connection, TOKEN, id=body.token_id):
        raise StateConflict(f"There is a token {body.token_id} already.")
    if _one(connection, TOKEN, secret_sha256=body.secret_sha256):
        raise StateConflict(f"The secret of token {body.token_id} belongs to another token already.")
    row = {
        "id": body.token_id,
        "secret_sha256": body.secret_sha256,
        "created_at": when.time,
        "expires_at": body.expires_at,
        "note": body.note,
        "uses": body.uses,
        "used": 0,
        "revoked": 0,
    }
    connection.execute(adding(TOKEN), row)


def _token_used(connection: Connection, when: When, body: ev.TokenUsed) -> None:
    token = _one(connection, TOKEN, id=body.token_id)
    if token is None:
        raise _token_refused("This coordinator did not make the token")
    if token["revoked"]:
        raise _token_refused(f"Token {body.token_id} was revoked")
    if when.time >= token["expires_at"]:
        late = when.time - token["expires_at"]
        raise _token_refused(f"Token {body.token_id} expired {late:.0f} s ago")
    if _one(connection, TOKEN_USE, token_id=body.token_id, device_id=body.device_id):
        raise _token_refused(f"Token {body.token_id} was used by this device already")
    if token["used"] >= token["uses"]:
        raise _token_refused(
            f"Token {body.token_id} was used {token['used']} of {token['uses']} times already"
        )
    _change(connection, TOKEN, {"id": body.token_id}, used=token["used"] + 1)
    use = {"token_id": body.token_id, "device_id": body.device_id, "used_at": when.time, "enrolled_seq": 0}
    connection.execute(adding(TOKEN_USE), use)


def _token_refused(message: str) -> TrustError:
    return TrustError(message + ".", hint="Ask the operator for a new one (`lepton token create`).")


def _token_revoked(connection: Connection, when: When, body: ev.TokenRevoked) -> None:
    token = _one(connection, TOKEN, id=body.token_id)
    if token is None:
        raise NotFound(f"There is no token {body.token_id}.")
    if token["revoked"]:
        raise StateConflict(f"Token {body.token_id} is revoked already.")
    _change(connection, TOKEN, {"id": body.token_id}, revoked=1)


# ------------------------------------------------------------------------------------------------- devices


def _device_enrolled(connection: Connection, when: When, body: ev.DeviceEnrolled) -> None:
    spent: dict[str, object] = {"token_id": body.token_id, "device_id": body.device_id}
    use = _one(connection, TOKEN_USE, **spent)
    if use is None or use["enrolled_seq"]:
        raise TrustError(f"Device {body.device_id} did not spend token {body.token_id} for this enrolment.")
    known = _one(connection, DEVICE, id=body.device_id)
    holder = _one(connection, DEVICE, public_key=body.public_key)
    if holder is not None and holder["id"] != body.device_id:
        raise StateConflict(f"The key of device {body.device_id} belongs to device {holder['id']}.")
    if known is not None and known["state"] != "active":
        raise _device_revoked_error(body.device_id)
    if known is not None and known["public_key"] != body.public_key:
        raise StateConflict(f"Device {body.device_id} is enrolled with another key.")
    _change(connection, TOKEN_USE, spent, enrolled_seq=when.seq)
    values = {
        "name": body.name,
        "cert_serial": body.cert_serial,
        "cert_not_after": body.cert_not_after,
        "token_id": body.token_id,
        "groups": _json(sorted(set(body.groups))),
        "enrolled_at": when.time,
    }
    if known is not None:
        _change(connection, DEVICE, {"id": body.device_id}, **values)
        return
    fresh = {
        "id": body.device_id,
        "public_key": body.public_key,
        "state": "active",
        "state_reason": "",
        "desired": "{}",
        "reported": "{}",
        "reported_at": None,
        "quarantined_until": 0.0,
        "quarantine_cause": "",
    }
    connection.execute(adding(DEVICE), {**values, **fresh})


def _active(connection: Connection, device_id: str) -> RowMapping:
    device = _one(connection, DEVICE, id=device_id)
    if device is None:
        raise NotFound(f"There is no device {device_id}.")
    if device["state"] != "active":
        raise _device_revoked_error(device_id)
    return device


def _device_revoked_error(device_id: str) -> TrustError:
    return TrustError(
        f"Device {device_id} was revoked.",
        hint="To bring it back, remove its key and enrol it with a new token.",
    )


def _device_renewed(connection: Connection, when: When, body: ev.DeviceRenewed) -> None:
    _active(connection, body.device_id)
    _change(
        connection,
        DEVICE,
        {"id": body.device_id},
        cert_serial=body.cert_serial,
        cert_not_after=body.cert_not_after,
    )


def _device_revoked(connection: Connection, when: When, body: ev.DeviceRevoked) -> None:
    device = _one(connection, DEVICE, id=body.device_id)
    if device is None:
        raise NotFound(f"There is no device {body.device_id}.")
    if device["state"] == "revoked":
        raise StateConflict(f"Device {body.device_id} is revoked already.")
    _change(connection, DEVICE, {"id": body.device_id}, state="revoked", state_reason=body.reason)


def _device_signing(connection: Connection, when: When, body: ev.DeviceSigning | ev.DeviceCertified) -> None:
    _active(connection, body.device_id)  # the newest one counts; whoever wants it reads the journal


def _device_reported(connection: Connection, when: When, body: ev.DeviceReported) -> None:
    device = _active(connection, body.device_id)
    reported = _json(body.reported)
    if device["reported"] == reported:
        raise StateConflict(f"Device {body.device_id} reported nothing new.")
    _change(connection, DEVICE, {"id": body.device_id}, reported=reported, reported_at=when.time)


def _device_quarantined(connection: Connection, when: When, body: ev.DeviceQuarantined) -> None:
    _active(connection, body.device_id)
    values = {"quarantined_until": body.until, "quarantine_cause": body.cause}
    _change(connection, DEVICE, {"id": body.device_id}, **values)


def _device_readmitted(connection: Connection, when: When, body: ev.DeviceReadmitted) -> None:
    device = _one(connection, DEVICE, id=body.device_id)
    if device is None:
        raise NotFound(f"There is no device {body.device_id}.")
    if not device["quarantined_until"]:
        raise StateConflict(f"Device {body.device_id} is not in quarantine.")
    values = {"quarantined_until": 0.0, "quarantine_cause": ""}
    _change(connection, DEVICE, {"id": body.device_id}, **values)


def _device_desired(connection: Connection, when: When, body: ev.DeviceDesired) -> None:
    _active(connection, body.device_id)
    _change(connection, DEVICE, {"id": body.device_id}, desired=_json(body.desired))


# ------------------------------------------------------------------------------------------------ rollouts


_MOVES = {  # from -> to
    "planned": ("running", "aborted"),
    "running": ("running", "paused", "rolling-back", "done"),
    "paused": ("running", "rolling-back"),
    "rolling-back": ("rolled-back", "aborted"),
}


def _rollout(connection: Connection, rollout_id: str) -> RowMapping:
    found = _one(connection, ROLLOUT, id=rollout_id)
    if found is None:
        raise NotFound(f"There is no rollout {rollout_id}.", hint="`lepton rollout list` shows them.")
    return found


def _rollout_planned(connection: Connection, when: When, body: ev.RolloutPlanned) -> None:
    if _one(connection, ROLLOUT, id=body.rollout_id):
        raise StateConflict(f"There is a rollout {body.rollout_id} already.", hint="Give it another id.")
    row = {"id": body.rollout_id, "task": body.task, "plan": _json(body.plan), "phase": "planned", "stage": 0}
    row |= {"since": when.time, "cause": "", "suspect": "", "suspect_since": 0.0, "suspect_requests": 0}
    connection.execute(adding(ROLLOUT), row | {"planned_at": when.time, "aborting": 0})


def _rollout_moved(connection: Connection, when: When, body: ev.RolloutMoved) -> None:
    was = _rollout(connection, body.rollout_id)
    if body.phase not in _MOVES.get(was["phase"], ()):
        raise StateConflict(f"Rollout {body.rollout_id} is {was['phase']} and cannot be {body.phase}.")
    stages = len(json.loads(was["plan"]).get("stages", [None]))
    onward = was["phase"] == body.phase == "running"
    if body.stage != was["stage"] + onward or body.stage >= stages:
        raise StateConflict(f"Rollout {body.rollout_id} is at stage {was['stage']}, not {body.stage}.")
    if body.phase == "running" and was["phase"] == "planned":
        _alone(connection, was)
    if body.phase in ("rolled-back", "aborted") and _one(connection, TOLD, rollout_id=body.rollout_id):
        raise StateConflict(f"Devices still have releases of rollout {body.rollout_id}.")
    change: dict[str, object] = {"phase": body.phase, "stage": body.stage, "cause": body.cause}
    if body.phase == "running":
        change |= {"since": when.time, "suspect": "", "suspect_since": 0.0, "suspect_requests": 0}
    _change(
        connection, ROLLOUT, {"id": body.rollout_id}, **change, aborting=int(body.aborting or was["aborting"])
    )


def _alone(connection: Connection, asked: RowMapping) -> None:
    """No other open rollout gives releases to the same kind of device: two must not fight over one."""
    profiles = set(json.loads(asked["plan"])["releases"])
    is_open = ROLLOUT.c.phase.in_(("running", "paused", "rolling-back"))
    for other in connection.execute(
        select(ROLLOUT).where(is_open, ROLLOUT.c.task == asked["task"])
    ).mappings():
        if both := sorted(profiles & set(json.loads(other["plan"])["releases"])):
            raise StateConflict(
                f"Rollout {other['id']} of {asked['task']} is {other['phase']} for {', '.join(both)}.",
                hint=f"Let it end, or `lepton rollout abort {other['id']}`.",
            )


def _rollout_told(connection: Connection, when: When, body: ev.RolloutTold) -> None:
    was = _rollout(connection, body.rollout_id)
    if (was["phase"], was["stage"]) != ("running", body.stage):
        raise StateConflict(f"Rollout {body.rollout_id} is {was['phase']} at stage {was['stage']}.")
    rows = [
        {"rollout_id": body.rollout_id, "stage": body.stage, **told.model_dump()} for told in body.devices
    ]
    for told in body.devices:
        _active(connection, told.device_id)
        if _one(connection, TOLD, rollout_id=body.rollout_id, device_id=told.device_id):
            raise StateConflict(f"Device {told.device_id} was told in rollout {body.rollout_id} already.")
    connection.execute(adding(TOLD), rows)


def _rollout_reverted(connection: Connection, when: When, body: ev.RolloutReverted) -> None:
    was = _rollout(connection, body.rollout_id)
    if was["phase"] != "rolling-back":
        raise StateConflict(f"Rollout {body.rollout_id} is {was['phase']}, nothing is taken back.")
    here = and_(TOLD.c.rollout_id == body.rollout_id, TOLD.c.device_id.in_(body.devices))
    if connection.execute(delete(TOLD).where(here)).rowcount != len(set(body.devices)):
        raise StateConflict(f"Not all of these devices were told in rollout {body.rollout_id}.")


def _rollout_suspected(connection: Connection, when: When, body: ev.RolloutSuspected) -> None:
    was = _rollout(connection, body.rollout_id)
    if was["phase"] != "running":
        raise StateConflict(f"Rollout {body.rollout_id} is {was['phase']}.")
    change = {"suspect": body.cause, "suspect_since": when.time, "suspect_requests": body.requests}
    _change(connection, ROLLOUT, {"id": body.rollout_id}, **change)


# --------------------------------------------------------------------------------------------------- tasks


def _task_registered(connection: Connection, when: When, body: ev.TaskRegistered) -> None:
    known = _one(connection, TASK, name=body.name, version=body.version)
    if known is not None:
        raise StateConflict(
            f"Task {body.name} {body.version} is registered already (layout {known['layout_digest'][:12]}…).",
            hint="Give the changed task a new version.",
        )
    connection.execute(adding(TASK), body.model_dump() | {"registered_at": when.time})


# ---------------------------------------------------------------------------------------------------- runs


def _run(connection: Connection, run_id: str, states: Sequence[str]) -> RowMapping:
    run = _one(connection, RUN, id=run_id)
    if run is None:
        raise NotFound(f"There is no run {run_id}.", hint="`lepton run list` shows them.")
    if run["state"] not in states:
        raise StateConflict(f"Run {run_id} is {run['state']}; expected {' or '.join(states)}.")
    return run


_OPEN = ("queued", "running", "stopping")


def _run_queued(connection: Connection, when: When, body: ev.RunQueued) -> None:
    if _one(connection, RUN, id=body.run_id):
        raise StateConflict(f"There is a run {body.run_id} already.")
    row = {
        "id": body.run_id,
        "name": body.name,
        "spec": _json(body.spec),
        "state": "queued",
        "reason": "",
        "queued_seq": when.seq,
        "queued_at": when.time,
        "committed": 0,
        "waiting": "",
        "waiting_until": 0.0,
        "coverage": "{}",
        "flags": "[]",
    }
    connection.execute(adding(RUN), row)


def _run_started(connection: Connection, when: When, body: ev.RunStarted) -> None:
    run = _run(connection, body.run_id, ("queued", "running"))
    if run["state"] == "queued":  # else a restarted coordinator goes on with it
        _change(connection, RUN, {"id": body.run_id}, state="running", started_at=when.time)


def _run_stopping(connection: Connection, when: When, body: ev.RunStopping) -> None:
    _run(connection, body.run_id, ("queued", "running"))
    _change(connection, RUN, {"id": body.run_id}, state="stopping", reason=body.reason)


def _run_finished(connection: Connection, when: When, body: ev.RunFinished) -> None:
    run = _run(connection, body.run_id, _OPEN)
    still_open = and_(ROUND.c.run_id == body.run_id, ROUND.c.state == "planned")
    closed: dict[str, object] = {"state": "abandoned", "phase": "abandoned", "cause": "the run finished"}
    closed["closed_at"] = when.time
    connection.execute(update(ROUND).where(still_open).values(closed))
    _change(
        connection,
        RUN,
        {"id": body.run_id},
        state=body.verdict,
        reason=body.reason,
        finished_at=when.time,
        waiting="",
        waiting_until=0.0,
        rounds=body.rounds,
        coverage=_json(body.coverage),
        flags=_json(body.flags),
        model_sha256=body.model_sha256 or run["model_sha256"],
    )


def _run_resumed(connection: Connection, when: When, body: ev.RunResumed) -> None:
    _run(connection, body.run_id, ("exhausted",))
    back = {"state": "queued", "reason": "", "finished_at": None, "rounds": None}
    _change(connection, RUN, {"id": body.run_id}, **back)


def _run_waiting(connection: Connection, when: When, body: ev.RunWaiting) -> None:
    _run(connection, body.run_id, _OPEN)
    _change(connection, RUN, {"id": body.run_id}, waiting=body.cause, waiting_until=body.until)


def _run_best(connection: Connection, when: When, body: ev.RunBest) -> None:
    _run(connection, body.run_id, _OPEN)
    best = {
        "best_round": body.round,
        "best_sha256": body.model_sha256,
        "best_metric": body.metric,
        "best_value": body.value,
    }
    _change(connection, RUN, {"id": body.run_id}, **best)


# -------------------------------------------------------------------------------------------------- rounds


def _newest_attempt(connection: Connection, run_id: str, number: int) -> RowMapping | None:
    newest = (
        select(ROUND)
        .where(ROUND.c.run_id == run_id, ROUND.c.round == number)
        .order_by(ROUND.c.attempt.desc())
        .limit(1)
    )
    return connection.execute(newest).mappings().first()


def _round_planned(connection: Connection, when: When, body: ev.RoundPlanned) -> None:
    run = _run(connection, body.run_id, ("running",))
    if body.round != run["committed"] + 1:
        raise StateConflict(
            f"Expected round {run['committed'] + 1} of run {body.run_id} as the next, got {body.round}."
        )
    newest = _newest_attempt(connection, body.run_id, body.round)
    if newest is not None and newest["state"] != "abandoned":
        raise StateConflict(
            f"Attempt {newest['attempt']} of round {body.round} of run {body.run_id} is {newest['state']}.",
            hint="Abandon it before planning another.",
        )
    expected = 1 if newest is None else newest["attempt"] + 1
    if body.attempt != expected:
        raise StateConflict(
            f"Expected attempt {expected} of round {body.round} of run {body.run_id}, got {body.attempt}."
        )
    row = {
        "run_id": body.run_id,
        "round": body.round,
        "attempt": body.attempt,
        "state": "planned",
        "phase": "planned",
        "plan": _json(body.plan),
        "start_sha256": body.model_sha256,
        "metrics": "{}",
        "evaluated": "{}",
        "cause": "",
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.0,
        "planned_at": when.time,
    }
    connection.execute(adding(ROUND), row)


def _round_moved(connection: Connection, when: When, body: ev.RoundMoved) -> None:
    _run(connection, body.run_id, ("running", "stopping"))
    key: dict[str, object] = {"run_id": body.run_id, "round": body.round, "attempt": body.attempt}
    row = _one(connection, ROUND, **key)
    was = row["phase"] if row is not None else ""
    state = "committed" if body.phase == "released" else "planned"
    if row is None or row["state"] != state or ev.PHASES.index(was) >= ev.PHASES.index(body.phase):
        raise StateConflict(
            f"Attempt {body.attempt} of round {body.round} of run {body.run_id} is {was or 'unplanned'}: it "
            f"cannot be {body.phase}."
        )
    _change(connection, ROUND, key, phase=body.phase)


def _current(connection: Connection, body: ev.RoundCommitted | ev.RoundAbandoned) -> dict[str, object]:
    """Check that the event is about the open attempt, and return the attempt's key."""
    _run(connection, body.run_id, ("running", "stopping"))
    newest = _newest_attempt(connection, body.run_id, body.round)
    if newest is None:
        raise StateConflict(f"Round {body.round} of run {body.run_id} was never planned.")
    if newest["state"] != "planned" or newest["attempt"] != body.attempt:
        raise StateConflict(
            f"Attempt {body.attempt} of round {body.round} of run {body.run_id} is not open: "
            f"attempt {newest['attempt']} is {newest['state']}."
        )
    _check_devices(connection, body.participation)
    return {"run_id": body.run_id, "round": body.round, "attempt": body.attempt}


def _check_devices(connection: Connection, entries: Sequence[ev.Participation]) -> None:
    wanted = [entry.device_id for entry in entries]
    found: set[str] = set()
    for start in range(0, len(wanted), _CHUNK):
        chunk = select(DEVICE.c.id).where(DEVICE.c.id.in_(wanted[start : start + _CHUNK]))
        found.update(connection.execute(chunk).scalars())
    missing = [name for name in wanted if name not in found]
    if missing:
        raise NotFound(f"There is no device {missing[0]} ({len(missing)} of {len(wanted)} are unknown).")


def _add_participation(
    connection: Connection, key: dict[str, object], entries: Sequence[ev.Participation]
) -> None:
    if entries:
        connection.execute(adding(PARTICIPATION), [{**key, **entry.model_dump()} for entry in entries])


def _round_committed(connection: Connection, when: When, body: ev.RoundCommitted) -> None:
    key = _current(connection, body)
    _change(
        connection,
        ROUND,
        key,
        state="committed",
        phase="committed",
        model_sha256=body.model_sha256,
        state_sha256=body.state_sha256,
        metrics=_json(body.metrics),
        bytes_up=body.bytes_up,
        bytes_down=body.bytes_down,
        seconds=body.seconds,
        closed_at=when.time,
    )
    _add_participation(connection, key, body.participation)
    _change(connection, RUN, {"id": body.run_id}, committed=body.round, model_sha256=body.model_sha256)


def _round_abandoned(connection: Connection, when: When, body: ev.RoundAbandoned) -> None:
    key = _current(connection, body)
    _change(
        connection, ROUND, key, state="abandoned", phase="abandoned", cause=body.cause, closed_at=when.time
    )
    _add_participation(connection, key, body.participation)
    if body.burnt:
        _change(connection, RUN, {"id": body.run_id}, committed=body.round)


def _round_evaluated(connection: Connection, when: When, body: ev.RoundEvaluated) -> None:
    _run(connection, body.run_id, ("running", "stopping"))
    newest = _newest_attempt(connection, body.run_id, body.round)
    if newest is None or newest["state"] != "committed":
        raise StateConflict(f"Round {body.round} of run {body.run_id} is not committed.")
    if newest["evaluated"] != "{}":
        raise StateConflict(f"Round {body.round} of run {body.run_id} is evaluated already.")
    _check_devices(connection, body.participation)
    key: dict[str, object] = {"run_id": body.run_id, "round": body.round, "attempt": newest["attempt"]}
    _change(connection, ROUND, key, evaluated=_json(body.metrics))


def _round_reoffered(connection: Connection, when: When, body: ev.RoundReoffered) -> None:
    _run(connection, body.run_id, ("running", "stopping"))
    newest = _newest_attempt(connection, body.run_id, body.round)
    if newest is None or newest["state"] != "planned" or newest["attempt"] != body.attempt:
        raise StateConflict(f"Attempt {body.attempt} of round {body.round} of run {body.run_id} is not open.")


# -------------------------------------------------------------------------------------------------- models


def _model_created(connection: Connection, when: When, body: ev.ModelCreated) -> None:
    run = _run(connection, body.run_id, _OPEN)
    if _one(connection, MODEL, run_id=body.run_id, round=body.round):
        raise StateConflict(f"Run {body.run_id} has a model of round {body.round} already.")
    if body.round > run["committed"]:
        raise StateConflict(
            f"Round {body.round} of run {body.run_id} is not committed: {run['committed']} rounds are."
        )
    parent = body.parent_sha256
    if parent and not connection.execute(select(MODEL.c.run_id).where(MODEL.c.sha256 == parent)).first():
        raise NotFound(f"There is no model {parent}, the parent of {body.model_sha256}.")
    row = {
        "run_id": body.run_id,
        "round": body.round,
        "sha256": body.model_sha256,
        "parent_sha256": parent,
        "metrics": _json(body.metrics),
        "created_at": when.time,
    }
    connection.execute(adding(MODEL), row)


# -------------------------------------------------------------------------------------------------- privacy


def _budget_set(connection: Connection, when: When, body: ev.BudgetSet) -> None:
    place = and_(BUDGET.c.account == body.account, BUDGET.c.unit == body.unit, BUDGET.c.trust == body.trust)
    newest = connection.execute(select(func.max(BUDGET.c.version)).where(place)).scalar() or 0
    if body.version != newest + 1:
        raise StateConflict(
            f"Expected version {newest + 1} of the budget {body.account!r}, got {body.version}.",
            hint="Somebody else has changed it meanwhile; look at it again.",
        )
    values = body.model_dump(exclude={"previous"}) | {"set_at": when.time}
    connection.execute(adding(BUDGET), values)


def _charge(
    connection: Connection, body: ev.LedgerBody, states: Sequence[str]
) -> tuple[dict[str, object], RowMapping]:
    """The key and the row of the attempt that an event is about."""
    key = body.model_dump(include={"run_id", "round", "attempt"})
    row = _one(connection, CHARGE, **key)
    shown = f"round {key['round']}, attempt {key['attempt']} of run {key['run_id']}"
    if row is None:
        raise NotFound(f"Nothing is reserved for {shown}.")
    if row["state"] not in states:
        raise StateConflict(f"The charge of {shown} is {row['state']}; expected {' or '.join(states)}.")
    return key, row


def _privacy_reserved(connection: Connection, when: When, body: ev.PrivacyReserved) -> None:
    _run(connection, body.run_id, ("running",))
    key = body.model_dump(include={"run_id", "round", "attempt"})
    if _one(connection, CHARGE, **key):
        raise StateConflict(
            f"Round {body.round}, attempt {body.attempt} of run {body.run_id} is reserved already."
        )
    row = {
        **key,
        "state": "reserved",
        "events": _json(body.events),
        "extra": "[]",
        "accounts": _json(body.accounts),
        "unit": body.unit,
        "trust": body.trust,
        "evidence": "",
        "reserved_at": when.time,
    }
    connection.execute(adding(CHARGE), row)
    _count(connection, body.accounts, body.unit, body.trust, body.events, 1)


def _privacy_releasing(connection: Connection, when: When, body: ev.PrivacyReleasing) -> None:
    key, _ = _charge(connection, body, ("reserved",))
    _change(connection, CHARGE, key, state="releasing", state_sha256=body.noise_sha256)


def _privacy_committed(connection: Connection, when: When, body: ev.PrivacyCommitted) -> None:
    key, row = _charge(connection, body, ("releasing",))
    _change(
        connection,
        CHARGE,
        key,
        state="committed",
        extra=_json(body.extra),
        model_sha256=body.model_sha256,
        state_sha256=body.state_sha256,
        settled_at=when.time,
    )
    _count(connection, json.loads(row["accounts"]), row["unit"], row["trust"], body.extra, 1)


def _privacy_voided(connection: Connection, when: When, body: ev.PrivacyVoided) -> None:
    key, row = _charge(connection, body, ("reserved", "releasing"))
    if not body.evidence.strip():
        raise StateConflict("Expected evidence that nothing was released; without it, it was.")
    _change(connection, CHARGE, key, state="voided", evidence=body.evidence, settled_at=when.time)
    accounts, events = json.loads(row["accounts"]), json.loads(row["events"])
    _count(connection, accounts, row["unit"], row["trust"], events, -1)


def _count(
    connection: Connection, accounts: Sequence[str], unit: str, trust: str, events: Sequence[str], by: int
) -> None:
    """Add to the totals of every account that pays."""
    found = Counter(events)
    rows = [(a, unit, trust, event, by * n) for event, n in found.items() for a in dict.fromkeys(accounts)]
    if rows:
        marks = ", ".join(["?" if connection.dialect.name == "sqlite" else "%s"] * 5)
        connection.exec_driver_sql(_ADD_TO_TOTALS.format(marks=marks), rows)


_ADD_TO_TOTALS = """
    INSERT INTO privacy_total (account, unit, trust, event, count) VALUES ({marks})
    ON CONFLICT (account, unit, trust, event) DO UPDATE SET count = privacy_total.count + excluded.count
"""


def _nothing(connection: Connection, when: When, body: ev.Body) -> None:
    """Some facts are for the record only."""


_Rule = Callable[[Connection, When, Any], None]  # Any: each rule takes the body it is filed under

_RULES: dict[type[ev.Body], _Rule] = {
    ev.TokenCreated: _token_created,
    ev.TokenUsed: _token_used,
    ev.TokenRevoked: _token_revoked,
    ev.DeviceEnrolled: _device_enrolled,
    ev.DeviceRenewed: _device_renewed,
    ev.DeviceRevoked: _device_revoked,
    ev.DeviceSigning: _device_signing,
    ev.DeviceCertified: _device_signing,
    ev.DeviceReported: _device_reported,
    ev.DeviceDesired: _device_desired,
    ev.DeviceQuarantined: _device_quarantined,
    ev.DeviceReadmitted: _device_readmitted,
    ev.TaskRegistered: _task_registered,
    ev.RunQueued: _run_queued,
    ev.RunStarted: _run_started,
    ev.RunStopping: _run_stopping,
    ev.RunFinished: _run_finished,
    ev.RunResumed: _run_resumed,
    ev.RunBest: _run_best,
    ev.RoundPlanned: _round_planned,
    ev.RoundMoved: _round_moved,
    ev.RoundCommitted: _round_committed,
    ev.RoundAbandoned: _round_abandoned,
    ev.RunWaiting: _run_waiting,
    ev.RoundEvaluated: _round_evaluated,
    ev.RoundReoffered: _round_reoffered,
    ev.ModelCreated: _model_created,
    ev.ReleasePublished: _nothing,
    ev.ReleaseWithdrawn: _nothing,
    ev.RolloutPlanned: _rollout_planned,
    ev.RolloutTold: _rollout_told,
    ev.RolloutReverted: _rollout_reverted,
    ev.RolloutSuspected: _rollout_suspected,
    ev.RolloutMoved: _rollout_moved,
    ev.BudgetSet: _budget_set,
    ev.PrivacyReserved: _privacy_reserved,
    ev.PrivacyReleasing: _privacy_releasing,
    ev.PrivacyCommitted: _privacy_committed,
    ev.PrivacyVoided: _privacy_voided,
    ev.LedgerMissed: _nothing,
    ev.ServerStarted: _nothing,
    ev.ServerStopped: _nothing,
}
