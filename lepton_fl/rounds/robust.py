"""Aggregation rules that a minority of bad updates cannot steer.

A mean follows whoever shouts loudest: one device that sends a huge update decides the round. These rules look
at all updates of a round together, so they keep them: ``wanted_reports * P`` int32.

    aggregator = RobustAggregator(plan)                    # plan.aggregation names the rule
    aggregator.add(UpdateBatch(updates, num_examples))     # (K, P) int32, grid steps
    update = aggregator.finalize()                         # (P,) float64, on the scale of a mean update

=================  =====================================================  ==============================
rule               the update is                                          withstands, of n reports
=================  =====================================================  ==============================
median             the median of every coordinate                         fewer than n / 2
trimmed_mean       every coordinate's mean without its extremes           the share ``trim``
krum               the one whose n - f - 2 nearest others are nearest     f = the share ``malicious``
multi_krum         the mean of the n - f best by that score               f = the share ``malicious``
geometric_median   the point with the smallest sum of distances to all    fewer than n / 2
=================  =====================================================  ==============================

Rules of this module. Every report counts the same: an example count is a device's own claim, and who may lie
about an update may lie about it, too. The result does not depend on the order of arrival, to the last bit:
what is added are integers, or floats in an order that follows from the updates' content. A share is rounded
up to whole reports. Fewer reports than ``AggregationSpec.least_reports`` cannot outvote anybody; a plan asks
for that many, so such a round is abandoned by the usual way.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import RunError
from lepton_fl.plan import AggregationSpec, RoundPlan
from lepton_fl.rounds.accumulator import Subtotal, UpdateBatch, check_batch
from lepton_fl.vector import EXACT

MEMORY_SHARE: Final = 0.5  # of the machine; the rest is for models, optimiser state and messages under way
SMOOTHING: Final = 1e-6  # in model units; distances below count as this (Pillutla et al. 2022, nu)
MAX_STEPS: Final = 200  # of Weiszfeld's iteration; a dozen are usual
SETTLED: Final = 1e-9  # a change of all weights below this ends it

_ELEMENTS = 1 << 20  # of a temporary
_HALF = float(1 << 16)  # splits an int32 into two parts whose products are exact in float64

Rows = NDArray[np.int32]  # (n, P), grid steps, in order of arrival
Update = NDArray[np.float64]  # (P,), grid steps


class RobustAggregator:
    """Keeps the updates of a round and applies the plan's rule to them; implements ``Aggregator``."""

    def __init__(self, plan: RoundPlan) -> None:
        """Make room for the reports that the plan wants.

        Raises:
            RunError: they would take more than half of this machine's memory.
        """
        _check_memory(plan, machine_memory())
        self._plan = plan
        try:  # taken from the system only as rows are written
            self._rows: Rows = np.empty((plan.wanted_reports, plan.update_size), np.int32)
        except MemoryError as error:
            raise _too_large(plan, memory_needed(plan), "the system does not give so much") from error
        self.reports = 0

    def add(self, batch: UpdateBatch) -> None:
        """Add a batch; either all of it is added or, if it raises, nothing.

        Raises:
            UpdateRejected: wrong shape or type, or an example count below 1.
            RunError: more reports than the plan wants.
        """
        check_batch(self._plan, batch.updates, batch.num_examples, np.int32)
        after = self.reports + len(batch.updates)
        if after > len(self._rows):
            raise RunError(f"{after} reports came, the plan wants {len(self._rows)}.")
        self._rows[self.reports : after] = batch.updates
        self.reports = after

    def merge(self, subtotal: Subtotal) -> None:
        """Refuse: a sum hides the updates that it is made of.

        Raises:
            RunError: always.
        """
        raise RunError(
            f"A sum of {subtotal.reports} updates came, but {self._plan.aggregation.name!r} needs each one.",
            hint="Use aggregation.name = 'mean' where updates are added before they can be seen.",
        )

    def finalize(self) -> NDArray[np.float64]:
        """The aggregate update, (P,) float64, in model units; the aggregator is used up.

        Raises:
            RunError: fewer reports than the rule needs.
        """
        spec = self._plan.aggregation
        rows = self._rows[: self.reports]
        del self._rows
        if len(rows) < spec.least_reports:
            raise RunError(
                f"{len(rows)} reports came, {spec.name!r} needs at least {spec.least_reports}.",
                hint="Ask more devices, or lower the share that is to be withstood.",
            )
        update = RULES[spec.name](rows, spec, self._plan.grid_step)
        update *= self._plan.grid_step  # a power of two: exact
        return update


def median(rows: Rows, spec: AggregationSpec, step: float) -> Update:
    """The median of each coordinate; of an even number, the mean of the middle two.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", section 4.
    """
    low, high = (len(rows) - 1) // 2, len(rows) // 2

    def middle(columns: NDArray[np.int32]) -> NDArray[np.float64]:
        columns.partition((low, high), axis=1)
        return (columns[:, low].astype(np.float64) + columns[:, high]) / 2

    return _per_coordinate(rows, middle)


def trimmed_mean(rows: Rows, spec: AggregationSpec, step: float) -> Update:
    """The mean of each coordinate without the share ``spec.trim`` at either end.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", section 4.
    """
    cut = spec.withstands(len(rows))
    kept = slice(cut, len(rows) - cut)

    def inner(columns: NDArray[np.int32]) -> NDArray[np.float64]:
        if cut:
            columns.partition((cut, len(rows) - cut - 1), axis=1)
        total: NDArray[np.float64] = columns[:, kept].sum(axis=1, dtype=np.int64) / (kept.stop - kept.start)
        return total

    return _per_coordinate(rows, inner)


def krum(rows: Rows, spec: AggregationSpec, step: float) -> Update:
    """The update whose n - f - 2 nearest others are nearest, by the sum of squared distances.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".
    """
    best: Update = rows[_by_score(rows, spec)[0]].astype(np.float64)
    return best


def multi_krum(rows: Rows, spec: AggregationSpec, step: float) -> Update:
    """The mean of the n - f updates with the best scores of Krum.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".
    """
    best = sorted(_by_score(rows, spec)[: len(rows) - spec.withstands(len(rows))])

    def mean(columns: NDArray[np.int32]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = columns[:, best].sum(axis=1, dtype=np.int64) / len(best)
        return total

    return _per_coordinate(rows, mean)


def geometric_median(rows: Rows, spec: AggregationSpec, step: float) -> Update:
    """The point with the smallest sum of L2 distances to all updates, by the smoothed Weiszfeld iteration.

    Every iterate is a weighted mean of the updates, so it is given by its n weights, and its distances follow
    from the updates' inner products: one pass over the coordinates, then n * n numbers.
    Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning", Algorithm 2.
    """
    order = _by_content(rows)
    weights = _weiszfeld(_inner_products(rows)[np.ix_(order, order)], SMOOTHING / step)
    point = np.zeros(rows.shape[1])
    for part in _parts(rows.shape[1], 1):
        for row, weight in zip(order, weights, strict=True):
            point[part] += weight * rows[row, part]
    return point


RULES: Final[dict[str, Callable[[Rows, AggregationSpec, float], Update]]] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
}
_PAIRWISE = ("krum", "multi_krum", "geometric_median")


# --- distances --------------------------------------------------------------------------------------


def _by_score(rows: Rows, spec: AggregationSpec) -> list[int]:
    """Rows by their score in Krum, best first."""
    square = _square_distances(_inner_products(rows))
    np.fill_diagonal(square, np.inf)
    square.sort(axis=1)
    scores = square[:, : len(rows) - spec.withstands(len(rows)) - 2].sum(axis=1)
    return sorted(_by_content(rows), key=scores.__getitem__)  # stable: equal scores stay in content order


def _by_content(rows: Rows) -> list[int]:
    """Row numbers in an order that does not depend on the order of arrival."""
    digests = [hashlib.sha256(row.data).digest() for row in rows]
    return sorted(range(len(rows)), key=digests.__getitem__)


def _square_distances(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared L2 distances from inner products, (n, n)."""
    squares = products.diagonal().copy()
    distances = squares[:, None] + squares[None, :] - 2 * products
    return np.maximum(distances, 0, out=distances)


def _inner_products(rows: Rows) -> NDArray[np.float64]:
    """Inner products of all pairs, (n, n).

    Products of matrices are taken of integers so small, or so few, that they are exact whatever order the
    linear algebra library adds in: an entry depends on its two rows alone.
    """
    products = np.zeros((len(rows), len(rows)))
    for part in _parts(rows.shape[1], len(rows)):
        block = rows[:, part].astype(np.float64)
        peak = max(float(block.max()), -float(block.min()))
        if peak * peak * block.shape[1] <= EXACT:
            products += block @ block.T
            continue
        high = np.floor(block / _HALF)
        low = block - high * _HALF
        mixed = high @ low.T
        products += (high @ high.T) * _HALF**2 + (mixed + mixed.T) * _HALF + low @ low.T
    return products


def _weiszfeld(products: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """The weights of the geometric median, (n,), from inner products; plain sums, in the order given."""
    count = len(products)
    squares = products.diagonal()
    weights = np.full(count, 1 / count)
    for _ in range(MAX_STEPS):
        along = (products * weights).sum(axis=1)
        distances = np.sqrt(np.maximum((weights * along).sum() - 2 * along + squares, 0))
        pull = 1 / np.maximum(distances, smoothing)
        moved = pull / pull.sum()
        change = float(np.abs(moved - weights).max())
        weights = moved
        if change < SETTLED:
            break
    return weights


# --- blocks and memory ------------------------------------------------------------------------------


def _per_coordinate(rows: Rows, rule: Callable[[NDArray[np.int32]], NDArray[np.float64]]) -> Update:
    """Apply a rule to (width, n) blocks; it may reorder what it is given."""
    update = np.empty(rows.shape[1])
    for part in _parts(rows.shape[1], len(rows)):
        update[part] = rule(rows[:, part].T.copy())
    return update


def _parts(size: int, count: int) -> Sequence[slice]:
    """Blocks of coordinates of which ``count`` rows make a small temporary."""
    width = min(1 << 14, max(64, _ELEMENTS // count))
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def memory_needed(plan: RoundPlan) -> int:
    """Bytes that the plan's rule needs at its peak."""
    rows = 4 * plan.wanted_reports * plan.update_size
    pairs = 3 * 8 * plan.wanted_reports**2 if plan.aggregation.name in _PAIRWISE else 0
    return rows + pairs + 8 * plan.update_size


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():  # "max" = no limit
            return min(installed, int(limit))
    return installed


def _check_memory(plan: RoundPlan, memory: int) -> None:
    needed = memory_needed(plan)
    if needed > memory * MEMORY_SHARE:
        bound = f"half of this machine's memory is {memory * MEMORY_SHARE / 2**20:,.0f} MiB"
        raise _too_large(plan, needed, bound)


def _too_large(plan: RoundPlan, needed: int, bound: str) -> RunError:
    return RunError(
        f"{plan.aggregation.name!r} keeps {plan.wanted_reports} updates of {plan.update_size} coordinates: "
        f"{needed / 2**20:,.0f} MiB; {bound}.",
        hint="Lower cohort.size, or use aggregation.name = 'mean' with a clip_norm, which keeps no update.",
    )
