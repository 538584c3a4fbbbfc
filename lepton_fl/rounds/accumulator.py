"""The streaming sum of a round.

Updates are integers on a grid, weights are integers, the sum is int64: exact, so the aggregate does not
depend on the order of arrival, nor on where parts of it were added. An update is added and forgotten; memory
does not grow with the cohort.

    accumulator = Accumulator(plan)
    accumulator.add(UpdateBatch(updates, num_examples))   # (K, P) int32, (K,) int64
    accumulator.merge(subtotal)                           # the sum of a part of the cohort
    mean = accumulator.finalize()                         # (P,) float64
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.contribution import shrink, tails
from lepton_fl.errors import Rejection, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.vector import (
    EXACT,
    GRID_LIMIT,
    Scaling,
    Vector,
    encode,
    refusal,
    scaling,
    to_grid,
    unclipped,
    whole_numbers,
)

BLOCK = 1 << 14  # coordinates handled at a time, so that temporaries stay in cache


@dataclass(frozen=True)
class UpdateBatch:
    """K devices' updates; a deployed reply is K = 1, a simulation adds a chunk."""

    updates: NDArray[Any]  # (K, P) int32, grid steps; or uint8, see ``rounds.quantised``
    num_examples: NDArray[np.int64]  # (K,)


@dataclass(frozen=True)
class Subtotal:
    """The sum over a part of the cohort, made where that part is: a worker of a simulation, a gateway."""

    total: NDArray[np.int64]  # (P,) weight times update
    weight: int
    reports: int


class Aggregator(Protocol):
    """Takes the updates of a round one by one, or in batches, and makes one of them."""

    def add(self, batch: UpdateBatch) -> None:
        """Add a batch; either all of it is added or, if it raises, nothing."""
        ...

    def merge(self, subtotal: Subtotal) -> None:
        """Add the sum over a part of the cohort; only a rule that needs no single update can."""
        ...

    def finalize(self) -> NDArray[np.float64]:
        """The aggregate update, (P,) float64; the aggregator is used up."""
        ...


class Accumulator:
    """Sum of weight times update, weight sum, and the count of reports."""

    def __init__(self, plan: RoundPlan, total: NDArray[np.int64] | None = None) -> None:
        """Start at zero.

        Args:
            plan: of the attempt.
            total: (P + A + E,) zeros to add into; None = new memory.
        """
        self._plan = plan
        if total is not None:
            self._sum = total
        self.reports = 0
        self.weight = 0

    @cached_property
    def _sum(self) -> NDArray[np.int64]:
        return np.zeros(self._plan.update_size, np.int64)  # not needed where a subtotal takes its place

    def add(self, batch: UpdateBatch) -> None:
        """Add a batch; either all of it is added or, if it raises, nothing.

        Raises:
            UpdateRejected: wrong shape or type, or an example count below 1.
        """
        check_batch(self._plan, batch.updates, batch.num_examples, np.int32)
        updates, weights = batch.updates, self.weights(batch.num_examples)
        weight = int(weights.sum())
        # int32 times so little stays exact in float64, where a product with a matrix is fastest.
        exact = weight <= EXACT >> 31
        factors = weights.astype(np.float64)
        for start in range(0, self._plan.update_size, BLOCK):
            part = slice(start, start + BLOCK)
            if exact:
                self._sum[part] += _weighted(factors, updates[:, part].astype(np.float64))
            else:
                for update, factor in zip(updates, weights, strict=True):
                    self._sum[part] += np.multiply(update[part], factor, dtype=np.int64)
        self.reports += len(updates)
        self.weight += weight

    def add_deltas(
        self,
        deltas: Vector,
        num_examples: NDArray[np.int64],
        leave_out: Collection[int] = (),
        losses: NDArray[np.float64] | None = None,
    ) -> Scaling:
        """Encode K updates and add them in one pass, without ever holding their integers.

        The same integers and the same sum as ``contribution.contributions`` and ``add``.

        Args:
            deltas: (K, P + A) float32.
            num_examples: (K,) at least 1 each.
            leave_out: rows not to add.
            losses: (K,) mean training losses, for the tail of a private update; None = not known.

        Returns:
            Their norms, and which rows were refused: these are not added.

        Raises:
            UpdateRejected: wrong shape or type, or an example count below 1.
        """
        plan = self._plan
        check_batch(plan, deltas, num_examples, np.float32)
        weights = self.weights(num_examples)
        weights[list(leave_out)] = 0
        if int(weights.sum()) > EXACT >> 31:
            return self._add_heavy(deltas, num_examples, weights)
        if plan.clip_norm:
            found = self._add_clipped(deltas, weights, shrink(plan.private, num_examples))
        else:
            found = self._add_whole(deltas, weights)
        if plan.private and plan.private.tail:
            known = np.full(len(deltas), np.nan) if losses is None else losses
            tail = tails(plan.private, plan.clip_norm, found.norms, num_examples, known)
            self._sum[plan.sent_size :] += weights @ tail.astype(np.int64)
        self.reports += len(deltas) - len({*found.refused, *leave_out})
        self.weight += int(weights.sum())
        return found

    def _add_heavy(
        self, deltas: Vector, num_examples: NDArray[np.int64], weights: NDArray[np.int64]
    ) -> Scaling:
        """Weights beyond what float64 adds exactly: slower."""
        encoded = encode(deltas, self._plan.grid_step, self._plan.clip_norm)
        weights[list(encoded.refused)] = 0
        kept = np.flatnonzero(weights)
        self.add(UpdateBatch(encoded.updates[kept], num_examples[kept]))
        return scaling(deltas, self._plan.grid_step, self._plan.clip_norm)

    def _add_clipped(
        self, deltas: Vector, weights: NDArray[np.int64], factor: NDArray[np.float64] | None
    ) -> Scaling:
        """Look at every update, then add; sets the weights of those refused to zero."""
        step, clip_norm = self._plan.grid_step, self._plan.clip_norm
        found, squares = scaling(deltas, step, clip_norm, factor), np.zeros(len(deltas))
        weights[list(found.refused)] = 0
        factors = weights.astype(np.float64)
        for part, whole in whole_numbers(deltas, found):
            exact = whole.astype(np.float64)
            squares += np.vecdot(exact, exact)
            self._sum[part] += _weighted(factors, exact)
        # SLACK is far above what float64 rounds: should this ever fail, the bound is not kept.
        if float(squares.max(initial=0.0)) > (clip_norm / step) ** 2:
            raise RunError(f"An update is longer than clip_norm={clip_norm:g} after clipping.")
        return found

    def _add_whole(self, deltas: Vector, weights: NDArray[np.int64]) -> Scaling:
        """Look while adding, for almost never is anything wrong; take back what is refused after all."""
        step, refused = self._plan.grid_step, dict[int, UpdateRejected]()
        found = unclipped(deltas, step)
        factors = weights.astype(np.float64)
        for part, whole in whole_numbers(deltas, found):
            if refused:
                whole[list(refused)] = 0
            peak = max(float(whole.max()), -float(whole.min()))  # NaN survives
            if not peak <= GRID_LIMIT:
                for row in np.flatnonzero(~(np.abs(whole).max(axis=1) <= GRID_LIMIT)).tolist():
                    refused[row] = refusal(deltas[row], step)
                    before = to_grid(deltas[row, : part.start], step).astype(np.int64)
                    self._sum[: part.start] -= before * weights[row]
                    whole[row] = weights[row] = factors[row] = 0
            self._sum[part] += _weighted(factors, whole.astype(np.float64))
        return Scaling(found.factors, found.norms, refused)

    def weights(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The weight of devices with so many examples: (K,) to (K,)."""
        if self._plan.weighting == "equal":
            return np.ones_like(counts)
        return np.minimum(counts, self._plan.max_weight)

    def merge(self, subtotal: Subtotal) -> None:
        """Add the sum over a part of the cohort; it is used up, for a first one takes the sum's place.

        Raises:
            UpdateRejected: wrong shape or type.
        """
        expected = (self._plan.update_size,)
        if subtotal.total.shape != expected or subtotal.total.dtype != np.int64:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"Expected a sum of shape {expected} and type int64, got {subtotal.total.shape} "
                f"{subtotal.total.dtype}.",
            )
        if self.reports:
            self._sum += subtotal.total
        else:
            self._sum = subtotal.total
        self.reports += subtotal.reports
        self.weight += subtotal.weight

    def subtotal(self) -> Subtotal:
        """What has been added so far; the sum is not copied."""
        return Subtotal(self._sum, self.weight, self.reports)

    def finalize(self) -> NDArray[np.float64]:
        """The weighted mean update, (P,) float64; the accumulator is used up.

        Raises:
            RunError: nothing was added.
        """
        if not self.weight:
            raise RunError("No update was accepted: there is nothing to average.")
        mean = self._sum.view(np.float64)  # same item size: the result takes the sum's place
        factor = self._plan.grid_step / self.weight
        for start in range(0, len(mean), BLOCK):
            part = slice(start, start + BLOCK)
            mean[part] = self._sum[part] * factor
        del self._sum
        return mean


def _weighted(factors: NDArray[np.float64], updates: NDArray[np.float64]) -> NDArray[np.int64]:
    """The weighted sum over the rows of a piece, exact; ``updates`` is used up."""
    if len(updates) == 1:  # a product with one row is slow
        updates *= factors[0]
        total = updates[0]
    else:
        total = factors @ updates
    whole: NDArray[np.int64] = total.astype(np.int64)
    return whole


def check_batch(
    plan: RoundPlan, updates: NDArray[Any], counts: NDArray[np.int64], dtype: type[np.generic]
) -> None:
    """Refuse a batch that is not of this plan.

    Raises:
        UpdateRejected: wrong shape or type, or an example count below 1.
    """
    size = plan.update_size if dtype is np.int32 else plan.sent_size  # floats have no tail yet
    expected = (len(counts), size)
    if updates.shape != expected or updates.dtype != dtype:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"Expected updates of shape {expected} and type {np.dtype(dtype)}, got {updates.shape} "
            f"{updates.dtype}.",
        )
    if len(counts) and int(counts.min()) < 1:
        raise UpdateRejected(Rejection.OUT_OF_RANGE, f"num_examples is {int(counts.min())}, expected >= 1.")
