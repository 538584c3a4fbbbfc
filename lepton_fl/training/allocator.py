"""How a process that trains takes memory from the system: once.

By default glibc maps each block of some megabytes anew and gives it back at once. Activations and gradients
are such blocks, at every step, and the system clears each page again: measured, a quarter of the time of a
small model under autograd and a twentieth of a convolution's.
"""

import ctypes
import sys

# From malloc.h; they are part of glibc's ABI.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_LARGE = 32 * 2**20  # bytes; only blocks from here on are mapped on their own (glibc's bound)
_KEPT = 64 * 2**20  # bytes that may stay free at the end of the heap


def keep_memory() -> None:
    """Set the allocator of this process, and of those forked from it, up; without glibc nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _KEPT)):
        mallopt(option, value)  # an option that is not known is refused and changes nothing
