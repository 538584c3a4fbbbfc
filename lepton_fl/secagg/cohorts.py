"""More than 1,000 devices: several cohorts, each with its own secure sum, and the sums added in the clear.

The coordinator then learns every cohort's sum, so a device hides among its cohort, not among all. An edge
gateway that aggregates its own devices is the same operation: its cohort's sum is added to the others'.

    groups = split(devices, pinned(f"{run} {nonce}"))
    total = add_sums([encoding.decode(outcome.total) for outcome in outcomes])
"""

import hashlib
from collections.abc import Sequence
from itertools import count

import numpy as np

from lepton_fl.errors import ConfigError, QuorumError
from lepton_fl.secagg.context import DEFAULT_COHORT, MOST_COHORT
from lepton_fl.secagg.encoding import Sum
from lepton_fl.secagg.field import Random


def pinned(name: str) -> Random:
    """Random bytes that a name pins: who is with whom is then the same after a restart.

    Args:
        name: holds something that nobody could foresee when the devices were drawn, such as a plan's nonce.
    """
    calls = count()

    def random(length: int) -> bytes:
        call = next(calls).to_bytes(8, "big")
        return hashlib.shake_256(b"flsa/1 cohorts\0" + call + name.encode()).digest(length)

    return random


def split(
    devices: Sequence[str], random: Random, least: int = DEFAULT_COHORT, most: int = MOST_COHORT
) -> tuple[tuple[str, ...], ...]:
    """Divide devices at random into as few cohorts as possible, of sizes that differ by at most one.

    Args:
        devices: Distinct ids.
        random: A CSPRNG: who is with whom must not be for anyone to choose.
        least: Smallest cohort.
        most: Largest cohort.

    Raises:
        ConfigError: an id occurs twice, or the bounds allow no division.
        QuorumError: fewer than ``least`` devices.
    """
    if len(set(devices)) != len(devices):
        raise ConfigError("Expected distinct devices.")
    if not 1 <= least <= most <= MOST_COHORT:
        raise ConfigError(f"Expected 1 <= least <= most <= {MOST_COHORT}, got {least} and {most}.")
    if len(devices) < least:
        raise QuorumError(f"{len(devices)} devices, a secure sum needs {least}.")
    groups = -(-len(devices) // most)
    if len(devices) // groups < least:
        raise ConfigError(
            f"{len(devices)} devices cannot be divided into cohorts of {least} to {most}.",
            hint="Widen the bounds or change the number of devices asked.",
        )
    # Sorting by 128 random bits each is a uniform permutation.
    shuffled = [device for _, device in sorted((random(16), device) for device in sorted(devices))]
    return tuple(tuple(sorted(shuffled[i::groups])) for i in range(groups))


def add_sums(sums: Sequence[Sum]) -> Sum:
    """Add the cohorts' sums in 64 bits: exact. One that is alone is returned as it is.

    Raises:
        ConfigError: there are none, or they are not of the same encoding.
    """
    if not sums:
        raise ConfigError("Expected at least one cohort's sum.")
    first = sums[0]
    if any(s.update.shape != first.update.shape or s.counters.keys() != first.counters.keys() for s in sums):
        raise ConfigError("Expected sums of the same shape and counters.")
    if len(sums) == 1:
        return first
    update = np.zeros(first.update.shape, np.int64)
    for part in sums:
        update += part.update
    return Sum(update, {name: sum(part.counters[name] for part in sums) for name in first.counters})
