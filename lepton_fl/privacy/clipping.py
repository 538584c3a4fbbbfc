"""Adaptive clipping: the clip norm follows a quantile of the devices' norms (Andrew et al. 2021).

Every device adds one more coordinate to its integers: ``+height`` if its norm was within the clip,
``-height`` if it was cut. The sum of this coordinate gets the same noise as all others, so the quantile costs
nothing extra in the ledger, works under masks, and no single norm is ever seen. The clip of round t scales
the noise of round t; the new clip counts from round t + 1.

    clip = AdaptiveClip(clip_norm=1.0, bit_noise=5.0)
    height = clip.height(grid_norm, noise_multiplier)      # of the extra coordinate, grid steps
    bits = quantile_bits(norms, clip.clip_norm, height)    # (K,) int32, on the devices
    clip = clip.updated(noisy_sum, height, planned=100)    # at the coordinator, after the release
"""

from dataclasses import dataclass, replace
from math import exp, floor, hypot, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError


@dataclass(frozen=True)
class AdaptiveClip:
    """The clip of one round and how it moves.

    Attributes:
        clip_norm: C of this round.
        bit_noise: standard deviation of the noise on the number of devices within the clip; the paper takes a
            twentieth of the cohort.
        target: the quantile to follow.
        rate: how fast; 0.2 changes C by at most 10 % a round at the median.
        lowest: C never falls below this.
        highest: C never rises above this.
    """

    clip_norm: float
    bit_noise: float
    target: float = 0.5
    rate: float = 0.2
    lowest: float = 1e-6
    highest: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.clip_norm <= self.highest < float("inf"):
            raise ConfigError(
                f"Expected 0 < lowest <= clip_norm <= highest, got {self.lowest}, {self.clip_norm}, "
                f"{self.highest}."
            )
        if not (0 < self.target < 1 and 0 < self.rate <= 1 and 0 < self.bit_noise < float("inf")):
            raise ConfigError(
                f"Expected a target within (0, 1), a rate within (0, 1] and bit_noise > 0, got "
                f"{self.target}, {self.rate}, {self.bit_noise}."
            )

    def height(self, grid_norm: float, noise_multiplier: float) -> int:
        """What a device puts into the extra coordinate, grid steps.

        The whole vector then has norm ``hypot(grid_norm, height)`` and noise of ``noise_multiplier`` times
        that: on the count of devices, a standard deviation of ``bit_noise``. (The paper's split of z between
        update and bit, written for one vector.)

        Raises:
            ConfigError: so little noise on the bit would take all of the budget.
        """
        part = noise_multiplier / (2 * self.bit_noise)
        if not part < 1:
            raise ConfigError(
                f"The quantile of so few devices cannot be followed: bit_noise={self.bit_noise:g} must "
                f"exceed {noise_multiplier / 2:g}, half the noise multiplier.",
                hint="Take a larger cohort, or a fixed clip_norm.",
            )
        return max(1, floor(grid_norm * part / sqrt(1 - part**2)))

    def updated(self, noisy_sum: int, height: int, planned: int) -> "AdaptiveClip":
        """The clip of the next round.

        Args:
            noisy_sum: the released extra coordinate, grid steps.
            height: of this round.
            planned: the public size of the cohort; devices that did not answer count as half.
        """
        within = min(1.0, max(0.0, noisy_sum / (2 * height * planned) + 0.5))
        moved = self.clip_norm * exp(-self.rate * (within - self.target))  # more within: a smaller clip
        return replace(self, clip_norm=min(self.highest, max(self.lowest, moved)))


def norm_bound(grid_norm: float, height: int) -> float:
    """The largest norm of update and extra coordinate together, grid steps."""
    return hypot(grid_norm, height)


def quantile_bits(norms: NDArray[np.float64], clip_norm: float, height: int) -> NDArray[np.int32]:
    """(K,) ``+height`` where the norm before clipping is at most the clip, ``-height`` elsewhere.

    Raises:
        ConfigError: a norm is not a finite number; the update should have been refused.
    """
    if not all(isfinite(norm) for norm in norms.tolist()):
        raise ConfigError("Expected finite norms.", hint="Refuse non-finite updates before this.")
    return np.where(norms <= clip_norm, height, -height).astype(np.int32)


def capped_weight(num_examples: int, cap: int) -> float:
    """What a device scales its update by before clipping, if devices with more data are to count more.

    At most one, so the clip stays the sensitivity; the denominator stays the public cohort. 0 = no cap, all
    equal.

    Raises:
        ConfigError: a device without examples, or a negative cap.
    """
    if num_examples < 1 or cap < 0:
        raise ConfigError(f"Expected num_examples >= 1 and a cap >= 0, got {num_examples} and {cap}.")
    return min(num_examples, cap) / cap if cap else 1.0
