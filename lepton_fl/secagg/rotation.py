"""A random rotation that spreads a vector's energy evenly over its coordinates, and back.

Random signs and an orthonormal Walsh-Hadamard transform of the longest power of two that fits, once over the
first coordinates and, when the length is no power of two, once more, with other signs, over the last: that
reaches every coordinate, needs no padding, and keeps the norm (Suresh et al. 2017, "Distributed Mean
Estimation with Limited Communication", for the rotation itself).

    rotated = rotate(x, seed)     # a new (d,) float64
    unrotate(rotated, seed)       # x up to rounding
"""

import numpy as np
from numpy.typing import NDArray

from lepton_fl.secagg.masks import keystream

_RADIX = 64  # columns handled by one small matrix product

Floats = NDArray[np.float64]


def rotation_width(length: int) -> int:
    """The width D of the transform: over so many coordinates a vector's energy is spread."""
    return 1 << (length.bit_length() - 1)


def signs(seed: bytes, length: int) -> Floats:
    """(length,) of +1 and -1 from a 32-byte public seed."""
    bits = np.unpackbits(np.frombuffer(keystream(seed, (length + 7) // 8), np.uint8), count=length)
    return 1.0 - 2.0 * bits.astype(np.float64)


def rotate(x: Floats, seed: bytes) -> Floats:
    """Rotate a (d,) vector, d >= 1; the result is a new array."""
    width = rotation_width(len(x))
    first, second = _signs_of(seed, len(x), width)
    y = x * first
    _transform(y[:width])
    if width < len(x):
        # With signs of its own: without them the overlap of two transforms would undo the first.
        tail = y[len(x) - width :]
        tail *= second
        _transform(tail)
    return y


def unrotate(y: Floats, seed: bytes) -> Floats:
    """The inverse of :func:`rotate`."""
    width = rotation_width(len(y))
    first, second = _signs_of(seed, len(y), width)
    x = y.copy()
    if width < len(x):
        tail = x[len(x) - width :]
        _transform(tail)
        tail *= second
    _transform(x[:width])
    x *= first
    return x


def _signs_of(seed: bytes, length: int, width: int) -> tuple[Floats, Floats]:
    both = signs(seed, length if width == length else length + width)
    return both[:length], both[length:]


def _transform(view: Floats) -> None:
    """Orthonormal Walsh-Hadamard transform in place; its own inverse.

    A transform of size a * b * ... is one small Hadamard matrix along every axis of the reshaped vector.
    """
    size, stride = len(view), 1
    while stride < size:
        radix = min(_RADIX, size // stride)
        block = view.reshape(-1, radix, stride)
        block[...] = np.matmul(hadamard(radix), block)
        stride *= radix


def hadamard(size: int) -> Floats:
    """The symmetric orthonormal Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(size)
    return matrix
