"""Releases on their way to devices: signed metadata, and chunks named by their hash.

Rules:

* A device has one download at a time: a newer call ends an older one, whose connection is probably dead.
* A turn is ``TURN`` chunks; then the device stands in line again. The line is first come, first served, and
  ``max_downloads`` devices have their turn at once, so a fast device cannot push a slow one aside.
* What is handed out was checked against its name; hot chunks are read once.
* All of it runs on the event loop but reading a file, which a small pool does.
"""

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from lepton_fl.delivery.repository import is_metadata
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import ConfigError
from lepton_server.config import DeliverySection

MAX_CHUNKS: Final = 32  # in one call
TURN: Final = 4  # 1 MiB


class Downloads:
    """What the device service asks when a device fetches; used on one event loop."""

    def __init__(self, shelf: Shelf, config: DeliverySection) -> None:
        self._shelf, self._config = shelf, config
        self._turn = asyncio.Semaphore(config.max_downloads)
        self._active: dict[str, asyncio.Task[object]] = {}
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached = 0  # bytes
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="releases")
        self.bytes_sent = 0

    def close(self) -> None:
        """End the pool."""
        self._pool.shutdown(wait=False)

    async def metadata(self, name: str) -> bytes:
        """A file of the signed metadata.

        Raises:
            ConfigError: That is no such file's name.
            NotFound: There is none of that name (yet).
        """
        if not is_metadata(name):
            shown = re.sub(r"[^\x20-\x7e]", "?", name[:60])
            raise ConfigError(f"Expected the name of a metadata file, got {shown!r}.")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._shelf.repository.read, name)

    async def chunks(
        self, device_id: str, names: Sequence[bytes], require: Callable[[], None]
    ) -> AsyncGenerator[bytes]:
        """The chunks of one call, in order, in this device's turn.

        Args:
            device_id: Whose turn.
            names: SHA-256, 32 bytes each.
            require: Raises when the device may no longer be served.

        Raises:
            ConfigError: Too many chunks, or names that are no hashes.
            NotFound: There is no such chunk.
        """
        if not 1 <= len(names) <= MAX_CHUNKS or any(len(name) != 32 for name in names):
            raise ConfigError(f"Expected 1 to {MAX_CHUNKS} chunk names of 32 bytes, got {len(names)}.")
        async with self._only_call(device_id):
            for start in range(0, len(names), TURN):
                async with self._turn:
                    for name in names[start : start + TURN]:
                        require()
                        data = await self._chunk(name.hex())
                        self.bytes_sent += len(data)
                        yield data

    @contextlib.asynccontextmanager
    async def _only_call(self, device_id: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None, "called from a task"
        if (older := self._active.get(device_id)) is not None:
            older.cancel()
        self._active[device_id] = task
        try:
            yield
        finally:
            if self._active.get(device_id) is task:
                del self._active[device_id]

    async def _chunk(self, name: str) -> bytes:
        data = self._cache.get(name)
        if data is not None:
            self._cache.move_to_end(name)
            return data
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._pool, self._shelf.blobs.read, name)
        if name not in self._cache:
            self._cache[name] = data
            self._cached += len(data)
        while self._cached > self._config.cache_bytes:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return data
