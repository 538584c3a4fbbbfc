"""Shamir's secret sharing over GF(65521), all limbs and all holders in one matrix product.

A secret is 16 uniform field elements (255.99 bits); keys are derived from it, never equal to it. 65521 is
the largest prime below 2**16: a product of two elements summed 2,000,000 times still fits the 53 bits that
float64 holds exactly, so BLAS does the modular arithmetic (Shamir 1979, "How to share a secret").

Holder i of n has the point x = i + 1. Any ``threshold`` shares give the secret; fewer say nothing about it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.wire.messages import malformed

PRIME = 65521
LIMBS = 16  # field elements of one secret
SECRET_BYTES = 2 * LIMBS

Random = Callable[[int], bytes]  # n -> n random bytes: os.urandom, or a pinned stream in a test
Elements = NDArray[np.int64]  # of [0, PRIME)


def draw(random: Random, count: int) -> Elements:
    """``count`` uniform field elements: 16-bit little-endian words, those of 65521 and more thrown away."""
    kept = np.empty(0, np.int64)
    while len(kept) < count:
        words = np.frombuffer(random(2 * (count - len(kept))), "<u2")
        kept = np.concatenate([kept, words[words < PRIME].astype(np.int64)])
    return kept


def pack(elements: Elements) -> bytes:
    """Elements as 16-bit little-endian words."""
    return np.ascontiguousarray(elements, "<u2").tobytes()


def unpack(data: bytes) -> Elements:
    """The elements that :func:`pack` wrote.

    Raises:
        UpdateRejected: MALFORMED, a word is 65521 or more (a second encoding of an element).
    """
    words = np.frombuffer(data, "<u2").astype(np.int64)
    if words.size and int(words.max()) >= PRIME:
        raise malformed(f"a field element is {int(words.max())}, expected less than {PRIME}")
    return words


def share(secrets: Elements, holders: int, threshold: int, random: Random) -> Elements:
    """Split secrets so that any ``threshold`` of ``holders`` recover them.

    Args:
        secrets: (k,) elements; polynomials are independent per element.
        holders: How many shares, at most 65520.
        threshold: At least 1.
        random: Source of the coefficients.

    Returns:
        (holders, k) elements, row i for holder i.
    """
    coefficients = np.empty((threshold, len(secrets)), np.float64)
    coefficients[0] = secrets
    coefficients[1:] = draw(random, (threshold - 1) * len(secrets)).reshape(threshold - 1, len(secrets))
    shares = _modular_product(_powers(holders, threshold), coefficients)
    coefficients.fill(0)
    return shares


def combine(positions: Sequence[int], shares: NDArray[np.int64]) -> Elements:
    """Recover secrets from the shares of these holders, exactly ``threshold`` of them.

    Args:
        positions: Distinct holders, from 0.
        shares: (len(positions), k) elements.

    Returns:
        (k,) elements.
    """
    weights = lagrange_at_zero(tuple(positions))
    secrets = _modular_product(weights[None, :].astype(np.float64), shares.astype(np.float64))
    return secrets.reshape(-1)


@lru_cache(maxsize=8)  # the holders and threshold of a deployment rarely change
def _powers(holders: int, threshold: int) -> NDArray[np.float64]:
    """(holders, threshold) powers of x = 1 .. holders modulo the prime."""
    points = np.arange(1, holders + 1, dtype=np.int64)
    powers = np.empty((holders, threshold), np.float64)
    power = np.ones(holders, np.int64)
    for column in range(threshold):
        powers[:, column] = power
        power = power * points % PRIME
    return powers


@lru_cache(maxsize=64)
def lagrange_at_zero(positions: tuple[int, ...]) -> NDArray[np.int64]:
    """The weights w with ``secret = sum w_i share_i`` modulo the prime.

    Raises:
        ValueError: a position occurs twice.
    """
    points = np.array(positions, np.int64) + 1
    if len(set(positions)) != len(positions):
        raise ValueError("Expected distinct holders.")
    numerator = math.prod((int(x) for x in points), start=1) % PRIME
    differences = (points[None, :] - points[:, None]) % PRIME  # (i, j): x_j - x_i
    np.fill_diagonal(differences, 1)
    denominators = np.ones(len(points), np.int64)
    for column in differences.T:
        denominators = denominators * column % PRIME
    # prod_{j != i} x_j / (x_j - x_i) = (prod_j x_j) / (x_i prod_{j != i} (x_j - x_i))
    inverses = [pow(int(d * x % PRIME), -1, PRIME) for d, x in zip(denominators, points, strict=True)]
    return np.array([numerator * inverse % PRIME for inverse in inverses], np.int64)


def _modular_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> Elements:
    """``a @ b`` modulo the prime; exact, because every sum is below ``n * 2**32 < 2**53``."""
    product: NDArray[np.float64] = a @ b
    return product.astype(np.int64) % PRIME
