"""The streaming sum of a round.

Updates are integers on a grid, weights are integers, the sum is int64: exact, so the aggregate does not
depend on the order of arrival. An update is added and forgotten; memory does not grow with the cohort.

    accumulator = Accumulator(plan)
    accumulator.add(UpdateBatch(updates, num_examples))   # (K, P) int32, (K,) int64
    mean = accumulator.finalize()                         # (P,) float64
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan

BLOCK = 1 << 16  # coordinates handled at a time, so that temporaries stay in cache


@dataclass(frozen=True)
class UpdateBatch:
    """K devices' updates; a deployed reply is K = 1, a simulation adds a chunk."""

    updates: NDArray[np.int32]  # (K, P), grid steps
    num_examples: NDArray[np.int64]  # (K,)


class Accumulator:
    """Sum of weight times update, weight sum, and the count of reports."""

    def __init__(self, plan: RoundPlan) -> None:
        self._plan = plan
        self._sum = np.zeros(plan.num_coordinates, np.int64)
        self.reports = 0
        self.weight = 0

    def add(self, batch: UpdateBatch) -> None:
        """Add a batch; either all of it is added or, if it raises, nothing.

        Raises:
            UpdateRejected: wrong shape or type, or an example count below 1.
        """
        updates, counts = batch.updates, batch.num_examples
        expected = (len(counts), self._plan.num_coordinates)
        if updates.shape != expected or updates.dtype != np.int32:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"Expected updates of shape {expected} and type int32, got {updates.shape} {updates.dtype}.",
            )
        if len(counts) and int(counts.min()) < 1:
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE, f"num_examples is {int(counts.min())}, expected >= 1."
            )
        weights = self._weights(counts)
        for start in range(0, self._plan.num_coordinates, BLOCK):
            part = slice(start, start + BLOCK)
            for update, weight in zip(updates, weights, strict=True):
                self._sum[part] += np.multiply(update[part], weight, dtype=np.int64)
        self.reports += len(counts)
        self.weight += int(weights.sum())

    def _weights(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._plan.weighting == "equal":
            return np.ones_like(counts)
        return np.minimum(counts, self._plan.max_weight)

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
