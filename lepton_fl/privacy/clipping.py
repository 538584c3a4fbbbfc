"""Adaptive clipping: the clip norm follows a quantile of the devices' norms (Andrew et al. 2021).

Every device adds one more coordinate to its integers: ``+height`` if its norm was within the clip,
``-height`` if it was cut (``lepton_fl.contribution``). The sum of this coordinate gets the same noise as all
others, so the quantile costs nothing extra in the ledger, works under masks, and no single norm is ever seen.
The clip of round t scales the noise of round t; the new clip counts from round t + 1.

    clip = AdaptiveClip(clip_norm=1.0, bit_noise=5.0)
    clip.part(noise_multiplier)                 # of the whole norm, what the extra coordinate takes
    clip = clip.updated(noisy_sum, height, planned=100)    # at the coordinator, after the release
"""

from dataclasses import dataclass, replace
from math import exp, sqrt

from lepton_fl.errors import ConfigError

LARGEST_PART = 0.5  # of the squared norm: what the extra coordinate may take


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

    def part(self, noise_multiplier: float) -> float:
        """The height of the extra coordinate, as a part of the norm of update and tail together.

        Noise of ``noise_multiplier`` times that norm is then, on the count of devices, a standard deviation
        of ``bit_noise``. (The paper's split of z between update and bit, written for one vector.)

        Raises:
            ConfigError: so little noise on the bit would take half of the budget, or more.
        """
        part = noise_multiplier / (2 * self.bit_noise)
        if not part**2 <= LARGEST_PART:
            least = noise_multiplier / (2 * sqrt(LARGEST_PART))
            raise ConfigError(
                f"The quantile of so few devices cannot be followed: bit_noise={self.bit_noise:g} must be at "
                f"least {least:.4g} where the noise multiplier is {noise_multiplier:.4g}.",
                hint="Raise adaptive_clip.bit_noise, take a larger cohort, or a fixed clip_norm.",
            )
        return part

    def updated(self, noisy_sum: float, height: int, planned: int) -> "AdaptiveClip":
        """The clip of the next round.

        Args:
            noisy_sum: the released extra coordinate, grid steps.
            height: of this round.
            planned: the public size of the cohort; devices that did not answer count as half.
        """
        excess = within(noisy_sum, height, planned) - self.target
        moved = self.clip_norm * exp(-self.rate * excess)  # more within: a smaller clip
        return replace(self, clip_norm=min(self.highest, max(self.lowest, moved)))


def within(noisy_sum: float, height: int, planned: int) -> float:
    """The share of the planned cohort whose norm was within the clip, as far as the noise lets one know."""
    return min(1.0, max(0.0, noisy_sum / (2 * height * planned) + 0.5))
