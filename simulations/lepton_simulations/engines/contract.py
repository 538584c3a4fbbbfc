"""What an engine takes and gives: a chunk of virtual devices trained in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.vector import Vector

Stop = Callable[[], bool]


@dataclass(frozen=True, eq=False)
class ClientWork:
    """One virtual device's share of a round."""

    data: Dataset  # prepared rows
    seed: int  # of its batch order
    correction: Vector | None = None  # (P',) added to every gradient (SCAFFOLD: c - c_i)
    start: Vector | None = None  # (P,) its own starting point instead of the common one (personal heads)


class Unwritten(Protocol):
    """The updates of K devices before anybody has asked for their numbers; until the engine's next call."""

    def write(self) -> None:
        """Write them where they belong."""
        ...

    def clear(self, position: int) -> None:
        """Make an update zero."""
        ...

    def norms(self) -> NDArray[np.float64]:
        """(K,) float64, bounds of their L2 norms: no less, and hardly more."""
        ...

    def add(
        self, factors: Vector, limit: float, weights: NDArray[np.int64], total: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Add them without writing them, in whole grid steps.

        Args:
            factors: (K,) float32, what each is multiplied by.
            limit: the magnitude from which on a coordinate does not fit the grid; NaN never does.
            weights: (K,) of the devices, 0 = not added; becomes 0 where an update does not fit.
            total: (P,) the sum.

        Returns:
            (K,) about the squared norms of what was added, before the weights.
        """
        ...


@dataclass(eq=False)
class Trained:
    """What K devices gave, in the caller's order; a device that failed has zeros."""

    rows: Vector  # (K, P) room for the deltas; may be the engine's own buffer, valid until the next call
    steps: NDArray[np.int64]  # (K,) mini-batches
    seen: NDArray[np.int64]  # (K,) examples that went through the steps
    loss_sum: NDArray[np.float64]  # (K,) mean loss before each step times its examples
    failures: dict[int, UpdateRejected] = field(default_factory=dict)  # position -> why
    # (K,) norms of the deltas, as lepton_fl.vector has them, and (K,) their peaks; None = not looked at.
    looked: tuple[NDArray[np.float64], Vector] | None = None
    unwritten: Unwritten | None = None  # what the deltas are to be written from

    @property
    def deltas(self) -> Vector:
        """(K, P) trained minus start."""
        if self.unwritten is not None:
            self.unwritten.write()
            self.unwritten = None
        return self.rows

    @classmethod
    def of(cls, deltas: Vector) -> "Trained":
        """Room for the results of these rows."""
        count = len(deltas)
        steps, seen = np.zeros(count, np.int64), np.zeros(count, np.int64)
        return cls(deltas, steps, seen, np.zeros(count, np.float64))

    def fail(self, position: int, refusal: UpdateRejected) -> None:
        """This device gives nothing."""
        self.failures[position] = refusal
        self.rows[position] = 0
        if self.unwritten is not None:
            self.unwritten.clear(position)
        self.steps[position] = self.seen[position] = 0
        self.loss_sum[position] = 0
        for found in self.looked or ():
            found[position] = 0


class Unsupported(Exception):
    """Why an engine cannot train something; the message ends without a full stop."""


class Elsewhere(Unsupported):
    """The engine is not meant for such a model: another one is the fastest for it."""


class Engine(Protocol):
    """Trains virtual devices, each exactly as ``Trainer.train`` would; not safe for several threads."""

    name: str  # "lean", "vectorised", "compiled", "fused" or "native"
    chunk: int  # the number of devices per call it works best with
    is_plain: bool  # the layers and the loss are its own: no code of the task runs

    def know(self, data: Dataset) -> None:
        """Look at a device's rows in advance: once, before workers are forked, instead of in each of them."""
        ...

    def train(
        self,
        start: Vector,
        clients: Sequence[ClientWork],
        local: LocalPlan,
        *,
        should_stop: Stop | None = None,
    ) -> Trained:
        """Train every device from ``start``, or from its own starting point.

        A device's result depends on its own arguments only: to the bit with "lean", "fused" and "native",
        to rounding with the others. What goes wrong with one device is in ``failures`` and leaves the others
        alone.

        Args:
            start: (P,) float32, the global model.
            clients: at least one.
            local: how to train.
            should_stop: asked before every step, or every few milliseconds; True ends the call, and devices
                not done yet have failed.

        Raises:
            UpdateRejected: WRONG_SHAPE, ``start`` is not a model of this task.
        """
        ...


def stopped(steps: int) -> UpdateRejected:
    """The refusal of a device whose training was told to stop."""
    return UpdateRejected(Rejection.FAILED, f"Training was stopped after {steps} steps.")
