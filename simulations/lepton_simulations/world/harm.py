"""What corrupt and malicious devices do to their rows and replies.

Damage happens to a reply on its way, an attack is done on purpose. A label flip changes nothing but the rows
a device trains on; the other attacks change its update.
"""

from collections.abc import Callable, Mapping
from math import nan

import numpy as np

from lepton_fl.tasks.data import Array, Dataset
from lepton_fl.vector import GRID_LIMIT
from lepton_fl.wire.messages import SUM_PREFIX, UPDATE
from lepton_fl.wire.records import Records

UPDATE_ATTACKS = frozenset({"scaled_update", "sign_flip", "nan_update", "random_update"})


# --- damage in transit ------------------------------------------------------------------------------


def _non_finite(reply: Records) -> Records:
    return Records(reply.arrays, reply.config, {**reply.metrics, "seconds": nan})


def _cut_short(reply: Records) -> Records:
    if not reply.arrays:  # an evaluation has nothing else to cut
        return Records({}, reply.config, {})
    return Records({name: array[:-1] for name, array in reply.arrays.items()}, reply.config, reply.metrics)


def _replayed(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "nonce": "0" * 32}, reply.metrics)


def _other_version(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "task-version": "0-other"}, reply.metrics)


def _surplus_field(reply: Records) -> Records:
    return Records(reply.arrays, {**reply.config, "surprise": 1}, reply.metrics)


DAMAGES: Mapping[str, Callable[[Records], Records]] = {
    "non-finite": _non_finite,
    "cut-short": _cut_short,
    "replayed": _replayed,
    "other-version": _other_version,
    "surplus-field": _surplus_field,
}


# --- attacks ----------------------------------------------------------------------------------------


def attacked(reply: Records, attack: str, factor: float, rng: np.random.Generator) -> Records:
    """The reply of a device that attacks.

    Args:
        reply: its honest reply.
        attack: one of ``UPDATE_ATTACKS``; anything else leaves the reply as it is.
        factor: how strong, see ``FaultsConfig.attack_factor``.
        rng: of this device and round; random_update draws from it.
    """
    if UPDATE not in reply.arrays or attack not in UPDATE_ATTACKS:
        return reply
    update = reply.arrays[UPDATE]
    if attack == "nan_update":
        # Integers cannot say NaN: it sends floats, and a loss that is none.
        metrics = {k: [nan] if k == f"{SUM_PREFIX}loss_sum" else v for k, v in reply.metrics.items()}
        return Records({UPDATE: np.full(update.shape, nan, np.float32)}, reply.config, metrics)
    if attack == "random_update":
        noise = rng.standard_normal(len(update))
        norm = float(np.linalg.norm(update.astype(np.float64)))
        changed = noise * (factor * norm / max(float(np.linalg.norm(noise)), 1e-300))
    else:
        changed = update.astype(np.float64) * (factor if attack == "scaled_update" else -factor)
    grid = np.clip(np.rint(changed), -GRID_LIMIT, GRID_LIMIT).astype(np.int32)
    return Records({UPDATE: grid}, reply.config, reply.metrics)


def flipped(data: Dataset, num_classes: int) -> Dataset:
    """Rows with wrong targets: class c becomes the last but c; a number changes its sign."""
    if num_classes:
        return Dataset(data.x, (num_classes - 1 - data.y).astype(data.y.dtype))
    return Dataset(data.x, -data.y)


def broken(raw: Dataset, how: float) -> Dataset:
    """Raw rows that break any data contract.

    Args:
        raw: as the device's owner stores them.
        how: of [0, 1); below a half a missing value in every row, else targets that do not exist.
    """
    return Dataset(_missing(raw.x), raw.y) if how < 0.5 else Dataset(raw.x, _no_targets(raw.y))


def _missing(x: Array) -> Array:
    holes = x.astype(np.float64)
    holes.reshape(len(x), -1)[:, :1] = np.inf  # some tasks allow NaN, none allows infinity
    return holes


def _no_targets(y: Array) -> Array:
    if y.dtype.kind in "iu":
        return np.full(y.shape, -1, np.int64)
    return np.full(y.shape, nan)
