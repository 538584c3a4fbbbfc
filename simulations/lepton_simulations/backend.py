"""Who computes: this process, worker processes of this machine, or several machines.

A backend trains the ordinary devices of a cohort in chunks and keeps nothing but their exact sum; devices
that must be looked at one by one answer with records, as on a real fleet. Sums are integers, so the result
is the same whichever backend computes it.

    backend.begin(plan, request)
    for part in backend.train(devices, costs): ...   # in any order
    subtotal = backend.subtotal()                    # of all that was trained since begin
    for device, outcome in backend.answer(others): ...   # in the order asked
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Accumulator, Subtotal
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import AUXILIARY, MODEL, Request
from lepton_fl.wire.records import Records

Outcome = Records | UpdateRejected


class Trained(NamedTuple):
    """What one ordinary device reported; its update is in the sum."""

    device_id: str
    num_examples: int  # its weight
    loss_sum: float
    seen: int  # examples that went through the steps


@dataclass(frozen=True)
class Part:
    """A chunk of devices, trained."""

    trained: Sequence[Trained]
    refused: Mapping[str, UpdateRejected] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a pipe or a network."""
        return {
            "trained": self.trained,
            "refused": {d: refusal_to_json(r) for d, r in self.refused.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read back what ``to_json`` wrote."""
        refused = {d: refusal_from_json(r) for d, r in body["refused"].items()}
        return cls([*map(Trained._make, body["trained"])], refused)


def refusal_to_json(refusal: UpdateRejected) -> dict[str, str]:
    """A refusal as plain strings."""
    return {"reason": refusal.reason.value, "message": str(refusal), "hint": refusal.hint}


def refusal_from_json(body: Mapping[str, str]) -> UpdateRejected:
    """Read back what ``refusal_to_json`` wrote."""
    return UpdateRejected(Rejection(body["reason"]), body["message"], hint=body["hint"])


class Shard(Protocol):
    """The virtual devices as one process holds them; implemented by ``fleet.VirtualFleet``."""

    @property
    def size(self) -> int:
        """Number of coordinates P of the model."""
        ...

    @property
    def update_size(self) -> int:
        """Number of coordinates of an update (``RoundPlan.update_size``)."""
        ...

    @property
    def auxiliary(self) -> int:
        """Number of coordinates that a device is sent besides the model's (``RoundPlan.auxiliary``)."""
        ...

    @property
    def chunk(self) -> int:
        """How many devices are best trained in one call; more are trained in several."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU, which processes would only fight over."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether ``train`` runs none of the task's own code, which could take its process down."""
        ...

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        """Let one device answer with records."""
        ...

    def train(
        self,
        plan: RoundPlan,
        model: Vector,
        auxiliary: Vector | None,
        devices: Sequence[str],
        accumulator: Accumulator,
        should_stop: Callable[[], bool],
    ) -> Part:
        """Train devices and add their updates into the accumulator; ``auxiliary`` as in ``Request``."""
        ...


class Backend(Protocol):
    """See the module."""

    def begin(self, plan: RoundPlan, request: Request) -> None:
        """Tell everybody the model and the settings of an attempt; the sum starts at zero."""
        ...

    def train(self, devices: Sequence[str], costs: Sequence[int]) -> Generator[Part, None, None]:
        """Train ordinary devices; closing the generator stops what still trains.

        Args:
            devices: those that cost the most first.
            costs: of each of them, in examples.
        """
        ...

    def answer(self, devices: Sequence[str]) -> Generator[tuple[str, Outcome], None, None]:
        """Let devices answer one by one, in this order; closing the generator stops what still trains."""
        ...

    def subtotal(self) -> Subtotal:
        """The sum over all devices trained since ``begin``."""
        ...

    def close(self) -> None:
        """End whatever was started; may be called again."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Alone:
    """Everything in this process: for a GPU, for one core, for debugging."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._accumulator: Accumulator | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing was started."""

    def begin(self, plan: RoundPlan, request: Request) -> None:
        """See ``Backend``."""
        self._plan, self._records = plan, request.to_records()
        self._accumulator = None

    def train(self, devices: Sequence[str], costs: Sequence[int]) -> Generator[Part, None, None]:
        """See ``Backend``."""
        self._accumulator = self._accumulator or Accumulator(self._plan)
        for chunk in chunks(devices, costs, self._shard.chunk, 1):
            arrays = self._records.arrays
            yield self._shard.train(
                self._plan, arrays[MODEL], arrays.get(AUXILIARY), chunk, self._accumulator, lambda: False
            )

    def answer(self, devices: Sequence[str]) -> Generator[tuple[str, Outcome], None, None]:
        """See ``Backend``."""
        for device_id in devices:
            yield device_id, self._shard.respond(device_id, self._records, lambda: False)

    def subtotal(self) -> Subtotal:
        """See ``Backend``."""
        return (self._accumulator or Accumulator(self._plan)).subtotal()


def chunks(devices: Sequence[str], costs: Sequence[int], size: int, workers: int) -> list[list[str]]:
    """Cut a cohort into pieces of about the same work, the largest first: those at the end are waited for.

    Args:
        devices: in an order in which neighbours are alike.
        costs: of each of them.
        size: how many devices a piece holds, at most, where all cost the same.
        workers: as many pieces as all of them can work on at a time, again and again.
    """
    if not devices:
        return []
    ends = list(accumulate(cost + 1.0 for cost in costs))
    count = min(workers * -(-len(devices) // (size * workers)), len(devices))
    pieces: list[list[str]] = [[] for _ in range(count)]
    work = [0.0] * count
    for device_id, cost, end in zip(devices, costs, ends, strict=True):
        number = min(int((end - (cost + 1.0) / 2) / ends[-1] * count), count - 1)
        pieces[number].append(device_id)
        work[number] += cost
    order = sorted(range(count), key=lambda number: -work[number])
    return [pieces[number] for number in order if pieces[number]]
