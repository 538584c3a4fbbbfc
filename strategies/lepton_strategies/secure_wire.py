"""What secure aggregation adds to Flower's messages, and how an update is read out of two kinds of them.

A request is any message with one more record; to the node's own function it is passed on without it. The
request and the model are named by hashes, long before they are sent, so that no node can be given another one
than the others have (``Offer``).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.rounds.secure_sum import SumEncoding, encode_answer
from lepton_fl.secagg.encoding import WEIGHT, Counter, Exact, limit_update
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import malformed
from lepton_strategies.records import from_record_dict

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

RECORD: Final = "lepton.secagg"
MASKED: Final = "masked"
MOST_METRIC: Final = 2**20  # magnitude of a figure that is averaged; larger ones are cut
_METRIC_STEP: Final = 2.0**-20
_METRIC_HALF: Final = 2**40  # steps


def content_digest(content: "RecordDict") -> bytes:
    """SHA-256 of records, whatever their order."""
    from flwr.app import ArrayRecord

    hashed = hashlib.sha256(b"lepton secagg content 1\0")
    for name in sorted(content):
        record = content[name]
        if isinstance(record, ArrayRecord):
            hashed.update(_part(name) + arrays_digest(record))
        else:
            hashed.update(_part(name) + _part(type(record).__name__) + _part(_values(record)))
    return hashed.digest()


def arrays_digest(arrays: "ArrayRecord") -> bytes:
    """SHA-256 of named arrays."""
    hashed = hashlib.sha256(b"lepton secagg arrays 1\0")
    for name in sorted(arrays):
        array = arrays[name]
        hashed.update(_part(name) + _part(f"{array.dtype} {tuple(array.shape)} {array.stype}"))
        hashed.update(hashlib.sha256(array.data).digest())
    return hashed.digest()


def request_digest(content: "RecordDict", settings: "Settings") -> bytes:
    """SHA-256 of what a node is asked, and of how its answer is to be read."""
    return hashlib.sha256(content_digest(content) + settings.to_json().encode()).digest()


def _part(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _values(record: Mapping[str, Any]) -> str:
    plain = {k: {"hex": v.hex()} if isinstance(v, bytes) else v for k, v in record.items()}
    return json.dumps(plain, sort_keys=True)


@dataclass(frozen=True)
class Settings:
    """How a node's answer becomes a vector.

    Attributes:
        lepton: the answer is a reply of our own client app; else it follows Flower's conventions.
        step: of the grid.
        clip_norm: L2 bound of an update; a longer one is scaled down.
        max_weight: larger weights count as this; 1 = all nodes count the same.
        weighted_by: the metric that is a node's weight.
        metrics: figures that are averaged.
    """

    lepton: bool
    step: float = 0.0
    clip_norm: float = 0.0
    max_weight: int = 1
    weighted_by: str = "num-examples"
    metrics: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(vars(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read.

        Raises:
            UpdateRejected: MALFORMED.
        """
        try:
            body = json.loads(text)
            body["metrics"] = tuple(map(str, body["metrics"]))
            found = cls(**body)
            if not (found.lepton or (found.step > 0 and found.clip_norm > 0 and found.max_weight >= 1)):
                raise ValueError("out of range")
            return found
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise malformed("the settings of a secure aggregation do not decode") from error

    @property
    def counters(self) -> tuple[Counter, ...]:
        """Sums that travel with the update."""
        bound = 2 * _METRIC_HALF * self.max_weight
        weight = Counter(WEIGHT, self.max_weight)
        return (weight, *(Counter(f"metric.{name}", bound) for name in self.metrics))


def mean_metrics(settings: Settings, counters: Mapping[str, int]) -> dict[str, float]:
    """The weighted means of the figures, out of their sums."""
    weight = counters[WEIGHT]
    steps = {m: counters[f"metric.{m}"] - weight * _METRIC_HALF for m in settings.metrics}
    return {name: value * _METRIC_STEP / weight for name, value in steps.items()}


# --- a node's answer as a vector --------------------------------------------------------------------


def flatten(arrays: "ArrayRecord") -> NDArray[np.float64]:
    """All arrays of a record behind one another, in the order of their names."""
    parts = [arrays[name].numpy().astype(np.float64).ravel() for name in sorted(arrays)]
    return np.concatenate(parts) if parts else np.empty(0)


def unflatten(flat: NDArray[np.float64], like: "ArrayRecord") -> "ArrayRecord":
    """The reverse, in the types and the order of ``like``; integers are rounded."""
    from flwr.app import Array, ArrayRecord

    made, start = {}, 0
    for name in sorted(like):
        before = like[name].numpy()
        values = flat[start : start + before.size].reshape(before.shape)
        start += before.size
        exact = np.rint(values) if before.dtype.kind in "biu" else values
        made[name] = Array(np.asarray(exact.astype(before.dtype)))
    return ArrayRecord({name: made[name] for name in like})


def vector_of(
    content: "RecordDict", reply: "RecordDict", settings: Settings, encoding: SumEncoding, random: Random
) -> Ring:
    """One node's vector.

    Args:
        content: what it was asked, without our record.
        reply: what its own function has answered.
        settings: how that is to be read.
        encoding: of the sum.
        random: the operating system's.

    Raises:
        UpdateRejected: the answer does not fit, or reports a failure.
    """
    if settings.lepton:
        return encode_answer(from_record_dict(content), from_record_dict(reply), encoding, random)
    before, after = only_arrays(content), only_arrays(reply)
    if {n: tuple(a.shape) for n, a in before.items()} != {n: tuple(a.shape) for n, a in after.items()}:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE, "The node's function returned other arrays than it was given."
        )
    delta = (flatten(after) - flatten(before)).astype(np.float32)
    update = to_grid(delta, settings.step, settings.clip_norm)
    if isinstance(encoding, Exact):
        update = limit_update(update, encoding.coordinate_bound)
    weight, counters = _counts(reply, settings)
    if isinstance(encoding, Exact):
        return encoding.encode(update, weight, counters)
    return encoding.encode(update, weight, random, counters)


def only_arrays(content: "RecordDict") -> "ArrayRecord":
    """The one ArrayRecord of a message.

    Raises:
        UpdateRejected: WRONG_SHAPE: there is none, or several.
    """
    found = list(content.array_records.values())
    if len(found) != 1:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE, f"Expected one ArrayRecord in a message, got {len(found)}."
        )
    return found[0]


def _counts(reply: "RecordDict", settings: Settings) -> tuple[int, dict[str, int]]:
    """The node's weight, and its figures times the weight, in steps from the smallest possible one."""
    found: dict[str, Any] = {}
    for record in reply.metric_records.values():
        found |= record
    weight = 1
    if settings.max_weight > 1:
        weight = _weight(found.get(settings.weighted_by), settings)
    counters = {}
    for name in settings.metrics:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise UpdateRejected(
                Rejection.NON_FINITE, f"The node's function reports {name} = {value}, not a finite number."
            )
        cut = min(max(float(value), -float(MOST_METRIC)), float(MOST_METRIC))
        counters[f"metric.{name}"] = weight * (round(cut / _METRIC_STEP) + _METRIC_HALF)
    return weight, counters


def _weight(value: Any, settings: Settings) -> int:  # noqa: ANN401 - a metric of anybody's
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**53:
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            f"The node's function reports {settings.weighted_by} = {value}, expected a number >= 1.",
        )
    return min(int(value), settings.max_weight)
