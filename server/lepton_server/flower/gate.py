"""A counting gate between an asyncio server and the threads that run rounds.

Requests wait on the event loop; a thread opens the gate. Each slot has one owner and is given back once.
"""

import asyncio
import threading
from collections import deque

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Gate:
    """At most ``slots`` owners at a time; first come, first served."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"Expected slots={slots} >= 1.")
        self._lock = threading.Lock()
        self._free = slots
        self._waiters: deque[_Waiter] = deque()

    async def acquire(self, timeout_s: float) -> bool:
        """Take a slot, waiting at most ``timeout_s`` seconds; False when none became free."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            waiter = (loop, loop.create_future())
            self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter[1]
        except TimeoutError:
            self._give_up(waiter)
            return False
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise
        return True

    def release(self) -> None:
        """Give a slot back, from any thread; the longest waiting request gets it."""
        with self._lock:
            while self._waiters:
                loop, future = self._waiters.popleft()
                try:
                    loop.call_soon_threadsafe(_grant, future)
                except RuntimeError:  # that server's loop has been closed
                    continue
                return
            self._free += 1

    def _give_up(self, waiter: _Waiter) -> None:
        """Leave the queue; a slot that was handed over in the same moment goes to the next."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return
        self.release()


def _grant(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
