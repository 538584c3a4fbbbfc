"""Random numbers that depend on what they are about, and on nothing else.

A number is a hash of (seed, device, what it is about, counter): it is the same whoever asks, in whatever
order and in whatever process, and asking for 10,000 devices at once costs half a millisecond.

    keys = device_keys(seed, ["a", "b"])
    uniform(keys, "drop-out", "train", 3, 1)     # (2,) in [0, 1)

Not for anything that protects someone: the mixing function (Stafford's variant 13, as in SplitMix64, Steele
et al. 2014, "Fast splittable pseudorandom number generators") is no cipher.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]

_CONTEXT = "lepton-fl world v1"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def device_keys(seed: int, device_ids: Sequence[str]) -> Keys:
    """A 64-bit key for each device."""
    return np.array([_hash(_CONTEXT, "device", seed, d) for d in device_ids], np.uint64)


def uniform(keys: Keys, *about: object, counter: NDArray[np.int64] | int = 0) -> Floats:
    """Numbers of [0, 1), one for each key.

    Args:
        keys: (n,).
        about: what they are for; another purpose, round or attempt gives independent numbers.
        counter: (n,) or one for all; each count gives another number.
    """
    base = np.uint64(_hash(_CONTEXT, *about))
    counts = np.broadcast_to(np.asarray(counter, np.int64), keys.shape).astype(np.uint64)
    mixed = _mix(_mix(keys ^ base) + counts * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(keys: Keys, *about: object) -> Floats:
    """Standard normal numbers, one for each key (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(keys, *about, "radius")))
    return np.asarray(radius * np.cos(2.0 * np.pi * uniform(keys, *about, "angle")))


def chosen(keys: Keys, share: float, *about: object) -> NDArray[np.bool_]:
    """Mark this share of the devices: exactly so many, rounded to the nearest."""
    marked = np.zeros(len(keys), bool)
    count = int(share * len(keys) + 0.5)
    if count:
        marked[np.argsort(uniform(keys, *about), kind="stable")[:count]] = True
    return marked


def dealt(keys: Keys, shares: Sequence[float], *about: object) -> NDArray[np.int64]:
    """Deal the devices out to classes in proportion to their shares; (n,) class numbers."""
    ends = np.cumsum(shares) / np.sum(shares) * len(keys)
    place = np.empty(len(keys), np.int64)
    place[np.argsort(uniform(keys, *about), kind="stable")] = np.arange(len(keys))
    return np.minimum(np.searchsorted(np.rint(ends), place, side="right"), len(shares) - 1)


def generator(key: int, *about: object) -> np.random.Generator:
    """A generator for many numbers about one device."""
    return np.random.Generator(np.random.Philox(key=[key, _hash(_CONTEXT, *about)]))


def _hash(*about: object) -> int:
    text = "|".join(map(str, about))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)
