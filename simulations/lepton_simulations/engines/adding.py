"""Updates as whole grid steps, added up in C: the same integers as ``Accumulator.add_deltas``, sooner.

The compiled functions are used only after they have agreed with numpy, to the last bit; else numpy is.
"""

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.contribution import mean_losses
from lepton_fl.errors import RunError
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Accumulator, check_batch
from lepton_fl.vector import (
    GRID_LIMIT,
    Scaling,
    Vector,
    refusal,
    scaling,
    scaling_of,
    unclipped,
    whole_numbers,
)
from lepton_simulations.engines.contract import Trained, Unsupported, Unwritten
from lepton_simulations.engines.library import library

ROUGH = 2.0**-10  # more than float32 rounds in a sum of squares, much less than an error of ours would be


def add_deltas(
    accumulator: Accumulator, plan: RoundPlan, trained: Trained, num_examples: NDArray[np.int64]
) -> Scaling:
    """Add the updates of K devices, but those that failed; see ``Accumulator.add_deltas``.

    Args:
        accumulator: of this plan.
        plan: of the attempt.
        trained: what an engine gave.
        num_examples: (K,) at least 1 each.

    Raises:
        UpdateRejected: wrong shape or type, or an example count below 1.
    """
    functions, rows = compiled(), trained.rows
    if functions is None or plan.private is not None or rows.strides[-1] != rows.itemsize:
        losses = mean_losses(trained.loss_sum, trained.seen)
        return accumulator.add_deltas(trained.deltas, num_examples, trained.failures, losses)
    check_batch(plan, rows, num_examples, np.float32)
    weights, total = accumulator.weights(num_examples), accumulator.subtotal().total
    weights[list(trained.failures)] = 0
    if trained.unwritten is not None and plan.clip_norm / plan.grid_step <= GRID_LIMIT:
        found = _add_unwritten(functions, trained, trained.unwritten, plan, weights, total)
    elif trained.looked is None and not plan.clip_norm:
        found = _add_looking(functions, trained.deltas, plan.grid_step, weights, total)
    else:
        unwritten, deltas = trained.unwritten, trained.deltas
        norms, peaks = trained.looked or _look(functions, deltas)
        if unwritten is not None:  # a device's norm does not depend on whom it was trained with
            norms = _bounds(functions, trained, unwritten)
        found = _scaling(deltas, norms, peaks, plan.grid_step, plan.clip_norm)
        weights[list(found.refused)] = 0
        clipped = bool(plan.clip_norm)
        longest = _add(functions, deltas, found.factors, weights, total, squared=clipped)
        # SLACK is far above what float64 rounds: should this ever fail, the bound is not kept.
        if clipped and longest > (plan.clip_norm / plan.grid_step) ** 2:
            raise RunError(f"An update is longer than clip_norm={plan.clip_norm:g} after clipping.")
    accumulator.reports += int(np.count_nonzero(weights))
    accumulator.weight += int(weights.sum())
    return found


def _add_looking(
    functions: ctypes.CDLL,
    deltas: Vector,
    step: float,
    weights: NDArray[np.int64],
    total: NDArray[np.int64],
) -> Scaling:
    """Add without a bound, in one pass; sets the weights of those refused to zero."""
    count, size = deltas.shape
    asked = np.flatnonzero(weights)
    functions.lepton_add_looking(
        deltas.ctypes.data,
        deltas.strides[0] // 4,
        count,
        size,
        1 / step,
        2.0**31 * step,
        weights.ctypes.data,
        total.ctypes.data,
    )
    found = unclipped(deltas, step)
    refused = {int(row): refusal(deltas[row], step) for row in asked if not weights[row]}
    return Scaling(found.factors, found.norms, refused)


def _bounds(functions: ctypes.CDLL, trained: Trained, unwritten: Unwritten) -> NDArray[np.float64]:
    """Bounds of the norms; where squares left the range of float32, the norms."""
    norms = unwritten.norms()
    if np.isfinite(norms).all():
        return norms
    return np.where(np.isfinite(norms), norms, _look(functions, trained.deltas)[0])


def _add_unwritten(
    functions: ctypes.CDLL,
    trained: Trained,
    unwritten: Unwritten,
    plan: RoundPlan,
    weights: NDArray[np.int64],
    total: NDArray[np.int64],
) -> Scaling:
    """Add updates that nobody has written; sets the weights of those refused to zero."""
    clip, step, asked = plan.clip_norm, plan.grid_step, np.flatnonzero(weights)
    found, limit = unclipped(trained.rows, step), 2.0**31 * step
    if clip:
        norms, limit = _bounds(functions, trained, unwritten), np.inf
        found = scaling_of(trained.rows, norms, np.zeros(len(norms), np.float32), step, clip)
        weights[list(found.refused)] = 0
    squares = unwritten.add(found.factors, limit, weights, total)
    # The norms are bounds, and these squares are sums in float32: no more than a look at what was added.
    if clip and float(squares[weights > 0].max(initial=0.0)) > (1 + ROUGH) * (clip / step) ** 2:
        raise RunError(f"An update is longer than clip_norm={clip:g} after clipping.")
    gone = {int(row): refusal(trained.deltas[row], step) for row in asked if not weights[row]}
    return Scaling(found.factors, found.norms, gone | dict(found.refused))


def _look(functions: ctypes.CDLL, deltas: Vector) -> tuple[NDArray[np.float64], Vector]:
    """Norms and peaks of (K, P) updates."""
    count, size = deltas.shape
    squares, peaks = np.empty(count), np.empty(count, np.float32)
    functions.lepton_look(
        deltas.ctypes.data, deltas.strides[0] // 4, count, size, squares.ctypes.data, peaks.ctypes.data
    )
    return np.sqrt(squares), peaks


def _scaling(
    deltas: Vector, norms: NDArray[np.float64], peaks: Vector, step: float, clip_norm: float
) -> Scaling:
    if not clip_norm and peaks.max(initial=0.0) <= GRID_LIMIT * step:  # nearly always; false of NaN
        return unclipped(deltas, step)
    return scaling_of(deltas, norms if clip_norm else np.full(len(norms), np.nan), peaks, step, clip_norm)


def _add(
    functions: ctypes.CDLL,
    deltas: Vector,
    factors: Vector,
    weights: NDArray[np.int64],
    total: NDArray[np.int64],
    *,
    squared: bool,
) -> float:
    """Add; returns the largest squared L2 norm of what was added, before the weights, if asked."""
    count, size = deltas.shape
    squares = np.zeros(count)
    functions.lepton_add(
        deltas.ctypes.data,
        deltas.strides[0] // 4,
        count,
        size,
        factors.ctypes.data,
        weights.ctypes.data,
        total.ctypes.data,
        squares.ctypes.data if squared else None,
    )
    return float(squares.max(initial=0.0))


@cache
def compiled() -> ctypes.CDLL | None:
    """The functions, if they do what numpy does."""
    try:
        functions = library()
    except Unsupported:
        return None
    return functions if all(_same(functions, clip_norm) for clip_norm in (0.0, 0.5)) else None


def _same(functions: ctypes.CDLL, clip_norm: float) -> bool:
    rng, step = np.random.default_rng(0), 2.0**-24
    deltas = rng.normal(scale=[[1e-4], [0.1], [3.0]], size=(3, 9001)).astype(np.float32)
    weights = np.array([1, 0, 1000], np.int64)
    found = _scaling(deltas, *_look(functions, deltas), step, clip_norm)
    expected = scaling(deltas, step, clip_norm)
    ours, theirs = np.zeros(9001, np.int64), np.zeros(9001, np.int64)
    longest = _add(functions, deltas, found.factors, weights, ours, squared=True)
    for part, whole in whole_numbers(deltas, expected):
        theirs[part] = weights @ whole.astype(np.int64)
    alike = np.array_equal(found.factors, expected.factors)
    alike &= np.array_equal(found.norms, expected.norms, equal_nan=True)
    alike &= np.array_equal(ours, theirs) and longest > 0
    if not clip_norm:
        ours[:] = 0
        _add_looking(functions, deltas, step, weights, ours)
        alike &= np.array_equal(ours, theirs)
    return bool(alike)
