"""How this process takes memory from the system and gives it back.

glibc keeps what was freed: an arena for every few threads, and, once a large block has been freed, all blocks
up to its size. A server that moves models of megabytes on many threads then holds dozens of them for nothing.
"""

import asyncio.sslproto
import ctypes
import sys

# From malloc.h; they are part of glibc's ABI.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

LARGE = 256 * 1024  # bytes; blocks from here on go back to the system as soon as they are freed
KEPT = 1024 * 1024  # bytes that may stay free at the end of the heap
ARENAS = 2
# Read from a TLS connection at a time; asyncio keeps this buffer, 256 KiB by default, for each connection.
TLS_READ = 32 * 1024  # bytes


def give_back_early() -> None:
    """Set allocator and TLS buffers of this process up; call it before threads are started.

    Without glibc nothing happens to the allocator: musl and others give large blocks back anyway.
    """
    asyncio.sslproto.SSLProtocol.max_size = TLS_READ
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, LARGE), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, ARENAS)):
        mallopt(option, value)  # an option that is not known is refused and changes nothing
