"""The messages of a round and their strict codec.

One request goes to every device of a cohort, byte for byte the same (so a transport can store it once).
A reply carries the integers of an update, never floats; counts and sums are its only metrics. Decoders refuse
what they do not recognise, left-over fields included, and say why in one word (``Rejection``).

    request = Request.of(plan, model)
    records = request.to_records()              # what a transport carries
    reply = TrainReply(...).to_records()
    accepted = TrainReply.read(reply, plan)     # raises UpdateRejected
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, isfinite
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from lepton_fl.contribution import check_tail
from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import (
    MAX_RETRIED,
    PROTOCOL_VERSION,
    LocalPlan,
    PrivatePart,
    Quantisation,
    RoundPlan,
    attempt_counted,
)
from lepton_fl.vector import Vector, check_norm, vector_digest
from lepton_fl.wire.records import Records

Sums = dict[str, NDArray[Any]]  # additive counts: (n,) int64 or float64 each

MODEL: Final = "model"
AUXILIARY: Final = "auxiliary"  # SCAFFOLD's control of the server
UPDATE: Final = "update"
SUM_PREFIX: Final = "sum."
MAX_DETAIL: Final = 500  # characters
MAX_SUMS: Final = 32  # named sums in one reply
MAX_SUM_LENGTH: Final = 1_000_000  # numbers in one of them
MAX_EXAMPLES: Final = 2**53  # used for one answer; what a journal and its readers can hold exactly
MAX_SECONDS: Final = 1e9  # that a device says it has worked

Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Ticket:
    """Which attempt at which round a message belongs to."""

    kind: Kind
    run_id: str
    round: int
    attempt: int
    nonce: str

    @classmethod
    def of(cls, plan: RoundPlan) -> "Ticket":
        """The ticket of a plan."""
        return cls(plan.kind, plan.run_id, plan.round, plan.attempt, plan.nonce)

    def to_config(self) -> dict[str, int | str]:
        """As fields of a message."""
        return {
            "protocol": PROTOCOL_VERSION,
            "kind": self.kind,
            "run-id": self.run_id,
            "round": self.round,
            "attempt": self.attempt,
            "nonce": self.nonce,
        }

    @classmethod
    def take(cls, fields: "Fields") -> "Ticket":
        """Read and consume the ticket's fields."""
        protocol = fields.integer("protocol")
        if protocol != PROTOCOL_VERSION:
            raise UpdateRejected(
                Rejection.WRONG_VERSION,
                f"The message speaks protocol {protocol}, this side speaks {PROTOCOL_VERSION}.",
                hint="Install the same minor version of lepton-fl on both sides.",
            )
        kind = fields.text("kind")
        if kind not in ("train", "evaluate"):
            raise malformed(f"kind is {kind!r}, expected 'train' or 'evaluate'")
        return cls(
            cast(Kind, kind),
            fields.text("run-id"),
            fields.integer("round"),
            fields.integer("attempt"),
            fields.text("nonce"),
        )


@dataclass(frozen=True)
class Request:
    """What a device is asked: train from, or evaluate, this model."""

    ticket: Ticket
    task: str
    task_version: str
    layout_digest: str
    model_sha256: str
    local: LocalPlan
    weighting: Literal["examples", "equal"]
    max_weight: int
    grid_step: float
    clip_norm: float  # 0 = no clipping
    model: Vector  # (P,)
    auxiliary: Vector | None = None  # (A,) what else is needed: SCAFFOLD's control of the server
    auxiliary_sha256: str = ""
    retried: tuple[tuple[int, int], ...] = ()  # see RoundPlan
    private: PrivatePart | None = None  # see RoundPlan
    quantisation: Quantisation | None = None  # see RoundPlan

    @classmethod
    def of(cls, plan: RoundPlan, model: Vector, auxiliary: Vector | None = None) -> "Request":
        """The request of a plan; the cohort stays with the coordinator."""
        return cls(
            Ticket.of(plan),
            plan.task,
            plan.task_version,
            plan.layout_digest,
            plan.model_sha256,
            plan.local,
            plan.weighting,
            plan.max_weight,
            plan.grid_step,
            plan.clip_norm,
            model,
            auxiliary,
            plan.auxiliary_sha256,
            plan.retried,
            plan.private,
            None if plan.secure else plan.quantisation,  # there, it is part of the offer
        )

    def counted(self, round_number: int, attempt: int) -> bool:
        """Whether that training attempt of this run has become part of the model."""
        return attempt_counted(self.ticket.kind, self.ticket.round, self.retried, round_number, attempt)

    def to_records(self) -> Records:
        """As a transport carries it; the model is not copied."""
        config = self.ticket.to_config() | {
            "task": self.task,
            "task-version": self.task_version,
            "layout": self.layout_digest,
            "model-sha256": self.model_sha256,
            "local": json.dumps(self.local.to_json(), sort_keys=True),
            "weighting": self.weighting,
            "max-weight": self.max_weight,
            "grid-step": self.grid_step,
            "clip-norm": self.clip_norm,
            "auxiliary-sha256": self.auxiliary_sha256,
            "retried": json.dumps(self.retried),
        }
        if self.private is not None:
            config["private"] = json.dumps(self.private.to_json(), sort_keys=True)
        if self.quantisation is not None:
            config["quantisation"] = json.dumps(self.quantisation.to_json(), sort_keys=True)
        arrays = {MODEL: self.model}
        if self.auxiliary is not None:
            arrays[AUXILIARY] = self.auxiliary
        return Records(arrays=arrays, config=config, metrics={})

    @classmethod
    def read(cls, records: Records) -> "Request":
        """Decode on the device, and verify that the arrays are those that were named.

        Raises:
            UpdateRejected: MALFORMED, WRONG_VERSION or WRONG_SHAPE.
        """
        fields = Fields(records.config)
        ticket = Ticket.take(fields)
        task, version = fields.text("task"), fields.text("task-version")
        layout, sha256 = fields.text("layout"), fields.text("model-sha256")
        try:
            local = LocalPlan.model_validate_json(fields.text("local"))
            told = fields.text("private") if fields.has("private") else "null"
            private = None if told == "null" else PrivatePart.model_validate_json(told)
            told = fields.text("quantisation") if fields.has("quantisation") else "null"
            quantisation = None if told == "null" else Quantisation.model_validate_json(told)
        except ValidationError as error:
            raise malformed(f"the plan does not validate: {error.errors()[0]['msg']}") from error
        weighting = fields.text("weighting")
        if weighting not in ("examples", "equal"):
            raise malformed(f"weighting is {weighting!r}")
        max_weight, grid_step = fields.integer("max-weight"), fields.number("grid-step")
        clip_norm = fields.number("clip-norm")
        auxiliary_sha256, retried = fields.text("auxiliary-sha256"), _read_retried(fields.text("retried"))
        fields.finish()
        if not (grid_step > 0 and frexp(grid_step)[0] == 0.5 and max_weight >= 1 and clip_norm >= 0):
            raise malformed(
                f"grid-step is {grid_step} (a power of two), max-weight {max_weight} (>= 1), "
                f"clip-norm {clip_norm} (>= 0)"
            )
        names = (MODEL, AUXILIARY) if auxiliary_sha256 else (MODEL,)
        model, *more = _arrays(records, names, np.dtype(np.float32))
        if vector_digest(model) != sha256:
            raise malformed("the model's SHA-256 is not the one announced")
        if more and vector_digest(more[0]) != auxiliary_sha256:
            raise malformed("the auxiliary array's SHA-256 is not the one announced")
        if local.control_variates and ticket.kind == "train" and not more:
            raise malformed("control variates are asked for, and the server's control is missing")
        weight = cast(Literal["examples", "equal"], weighting)
        return cls(
            ticket,
            task,
            version,
            layout,
            sha256,
            local,
            weight,
            max_weight,
            grid_step,
            clip_norm,
            model,
            more[0] if more else None,
            auxiliary_sha256,
            retried,
            private,
            quantisation,
        )


@dataclass(frozen=True)
class TrainReply:
    """One device's update, in grid steps, with its weight; in few bits, weighted already, as it travels."""

    ticket: Ticket
    task_version: str
    num_examples: int
    update: NDArray[Any]  # (P + A + E,) int32; or uint8, see ``rounds.quantised``
    sums: Sums  # training loss and what else the task counts
    seconds: float  # the device's own time for the work

    def to_records(self) -> Records:
        """As a transport carries it; the update is not copied."""
        return Records({UPDATE: self.update}, _reply_config(self), _reply_metrics(self))

    @classmethod
    def read(cls, records: Records, plan: RoundPlan) -> "TrainReply":
        """Decode at the coordinator and hold against the plan.

        Raises:
            UpdateRejected: the reason says what is wrong; a device's own report of failure is raised, too.
        """
        version, num_examples, sums, seconds, ticket = _read_reply(records, plan)
        if plan.quantisation and not plan.secure:  # who adds it up reads it
            (update,) = _arrays(records, (UPDATE,), np.dtype(np.uint8))
            return cls(ticket, version, num_examples, update, sums, seconds)
        (update,) = _arrays(records, (UPDATE,), np.dtype(np.int32))
        if update.shape != (plan.update_size,):
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"The update has shape {update.shape}, the plan says ({plan.update_size},).",
            )
        if plan.clip_norm:
            check_norm(update[: plan.sent_size], plan.grid_step, plan.clip_norm)
        if plan.private:
            check_tail(plan.private, update[plan.sent_size :])
        return cls(ticket, version, num_examples, update, sums, seconds)


@dataclass(frozen=True)
class EvaluateReply:
    """One device's additive evaluation counts."""

    ticket: Ticket
    task_version: str
    num_examples: int
    sums: Sums
    seconds: float

    def to_records(self) -> Records:
        """As a transport carries it."""
        return Records({}, _reply_config(self), _reply_metrics(self))

    @classmethod
    def read(cls, records: Records, plan: RoundPlan) -> "EvaluateReply":
        """Decode at the coordinator; see ``TrainReply.read``."""
        version, num_examples, sums, seconds, ticket = _read_reply(records, plan)
        if records.arrays:
            raise malformed(f"an evaluation carries arrays: {sorted(records.arrays)}")
        return cls(ticket, version, num_examples, sums, seconds)


@dataclass(frozen=True)
class Failure:
    """A device's report that it could not do what was asked."""

    ticket: Ticket
    reason: Rejection
    detail: str

    def to_records(self) -> Records:
        """As a transport carries it."""
        config = self.ticket.to_config() | {"failed": self.reason.value, "detail": self.detail[:MAX_DETAIL]}
        return Records({}, config, {})


# --- reading ----------------------------------------------------------------------------------------


def malformed(what: str) -> UpdateRejected:
    """A message that does not decode."""
    return UpdateRejected(Rejection.MALFORMED, f"Malformed message: {what}.")


class Fields:
    """Reads a message's scalar fields one by one; ``finish`` refuses what is left over."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = dict(values)

    def take(self, name: str) -> Any:  # noqa: ANN401 - a field has any of the wire's types
        """The raw value."""
        if name not in self._left:
            raise malformed(f"field {name!r} is missing")
        return self._left.pop(name)

    def has(self, name: str) -> bool:
        """Whether the field is there and not yet read."""
        return name in self._left

    def text(self, name: str) -> str:
        """A string of at most 10,000 characters."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) > 10_000:
            raise malformed(f"field {name!r} is not a string of at most 10000 characters")
        return value

    def integer(self, name: str) -> int:
        """A non-negative integer below 2**63."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise malformed(f"field {name!r} is not an integer of [0, 2**63)")
        return value

    def number(self, name: str) -> float:
        """A finite float."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise malformed(f"field {name!r} is not a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise malformed(f"field {name!r} is an integer of more than 64 bits")
        if not isfinite(value):
            raise UpdateRejected(Rejection.NON_FINITE, f"Field {name!r} is {value}, not a finite number.")
        return float(value)

    def finish(self) -> None:
        """Refuse unread fields."""
        if self._left:
            raise malformed(f"unknown fields {sorted(self._left)}")


def _arrays(records: Records, names: tuple[str, ...], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    """The arrays of these names; no other may be there."""
    if set(records.arrays) != set(names):
        raise malformed(f"expected the arrays {sorted(names)}, got {sorted(records.arrays)}")
    for name in names:
        array = records.arrays[name]
        if array.dtype != dtype or array.ndim != 1:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"Array {name!r} has type {array.dtype} and {array.ndim} dimensions, expected {dtype} and 1.",
            )
    return [records.arrays[name] for name in names]


def _read_retried(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = json.loads(text)
        retried = tuple((round_number, attempt) for round_number, attempt in pairs)
    except (ValueError, TypeError, RecursionError) as error:
        raise malformed("'retried' is not a list of pairs") from error
    if len(retried) > MAX_RETRIED or not all(type(n) is int and n >= 0 for pair in retried for n in pair):
        raise malformed(f"'retried' is not a list of at most {MAX_RETRIED} pairs of non-negative integers")
    return retried


def _reply_config(reply: TrainReply | EvaluateReply) -> dict[str, int | str]:
    return reply.ticket.to_config() | {"task-version": reply.task_version}


def _reply_metrics(reply: TrainReply | EvaluateReply) -> dict[str, Any]:
    sums = {SUM_PREFIX + k: np.atleast_1d(v).ravel().tolist() for k, v in reply.sums.items()}
    return {"num-examples": reply.num_examples, "seconds": float(reply.seconds)} | sums


def _read_reply(records: Records, plan: RoundPlan) -> tuple[str, int, Sums, float, Ticket]:
    fields = Fields(records.config)
    ticket = Ticket.take(fields)
    _check_ticket(ticket, Ticket.of(plan))
    if fields.has("failed"):
        _raise_failure(fields)
    version = fields.text("task-version")
    fields.finish()
    if version != plan.task_version:
        raise UpdateRejected(
            Rejection.WRONG_VERSION,
            f"The device used version {version!r} of {plan.task}, the plan says {plan.task_version!r}.",
            hint="Install the task's current version on the device.",
        )
    metrics = Fields(records.metrics)
    num_examples, seconds = metrics.integer("num-examples"), metrics.number("seconds")
    if num_examples < 1:
        raise UpdateRejected(Rejection.OUT_OF_RANGE, f"num-examples is {num_examples}, expected >= 1.")
    if num_examples > MAX_EXAMPLES or not 0 <= seconds <= MAX_SECONDS:
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            f"Expected num-examples <= {MAX_EXAMPLES} and 0 <= seconds <= {MAX_SECONDS:g}, "
            f"got {num_examples} and {seconds:g}.",
        )
    return version, num_examples, _read_sums(metrics), seconds, ticket


def _check_ticket(ticket: Ticket, expected: Ticket) -> None:
    if ticket != expected:
        raise UpdateRejected(
            Rejection.REPLAYED,
            f"The reply belongs to {ticket.kind} round {ticket.round} attempt {ticket.attempt} of run "
            f"{ticket.run_id}, expected {expected.kind} round {expected.round} attempt {expected.attempt} of "
            f"{expected.run_id}.",
        )


def _raise_failure(fields: Fields) -> None:
    try:
        reason = Rejection(fields.text("failed"))
    except ValueError as error:
        raise malformed("unknown reason of failure") from error
    raise UpdateRejected(reason, fields.text("detail")[:MAX_DETAIL])


def _read_sums(metrics: Fields) -> Sums:
    names = [n for n in metrics._left if n.startswith(SUM_PREFIX)]
    if len(names) > MAX_SUMS:
        raise malformed(f"{len(names)} sums, at most {MAX_SUMS}")
    sums: Sums = {}
    for name in names:
        values = metrics.take(name)
        if not isinstance(values, list) or not 1 <= len(values) <= MAX_SUM_LENGTH:
            raise malformed(f"{name!r} is not a list of 1 to {MAX_SUM_LENGTH} numbers")
        array = _numbers(name, values)
        if not np.isfinite(array).all():
            raise UpdateRejected(Rejection.NON_FINITE, f"{name!r} contains a number that is not finite.")
        sums[name.removeprefix(SUM_PREFIX)] = array
    metrics.finish()
    return sums


def _numbers(name: str, values: list[Any]) -> NDArray[Any]:
    """Integers stay integers; a list of anything else but numbers is refused."""
    kinds = {type(value) for value in values}
    if not kinds <= {int, float}:
        raise malformed(f"{name!r} is not a list of numbers")
    try:
        return np.asarray(values, np.int64 if kinds == {int} else np.float64)
    except OverflowError as error:
        raise malformed(f"{name!r} contains an integer of more than 64 bits") from error
