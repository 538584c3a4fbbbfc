"""Worker processes: one warm model each, one training thread each, the data shared.

Workers are forked, so they start in milliseconds, need no second import of the user's script and share the
data with the parent. The model goes out and the updates come back through shared memory; everything else is
JSON over a pipe. Nothing is pickled.

    with Pool(fleet, workers=2) as pool:
        for device_id, answer in pool.ask(config, model, ["device-0", "device-1"]):
            ...   # in the order asked, whatever the order of completion
"""

import json
import logging
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, RunError, UpdateRejected
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import MODEL, UPDATE
from lepton_fl.wire.records import Records

log = logging.getLogger(__name__)

AHEAD = 4  # answers per worker that may wait for an earlier one; bounds the parent's memory
PATIENCE_S = 30.0  # for a worker to notice that its round is over, before it is replaced
PARENT_CHECK_S = 5.0  # how often an idle worker looks whether its parent is alive

Outcome = Records | UpdateRejected


class Fleet(Protocol):
    """Virtual devices that live in one process."""

    @property
    def size(self) -> int:
        """Number of coordinates P of the model."""
        ...

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        """Let one device answer."""
        ...


class Board:
    """Memory that parent and workers share: the model of the round and a stop flag."""

    def __init__(self, size: int) -> None:
        self.model: Vector = _shared(size, np.dtype(np.float32))
        self._stop = _shared(1, np.dtype(np.uint8))

    def stop(self, value: bool) -> None:
        """Ask whoever still trains to leave, or lift that."""
        self._stop[0] = value

    def stopped(self) -> bool:
        """Whether the round is over."""
        return bool(self._stop[0])


def _shared(size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize))  # anonymous and shared with forked children
    return np.frombuffer(memory, dtype, count=size)


@dataclass(eq=False)
class Worker:
    """The parent's handle on one worker process."""

    process: BaseProcess
    pipe: Connection
    update: NDArray[np.int32]  # (P,), written by the worker
    place: int | None = None  # of the device it is busy with; None: idle


class Pool:
    """A fixed number of workers; one that dies is replaced and its device counts as failed."""

    def __init__(self, fleet: Fleet, workers: int) -> None:
        self._fleet = fleet
        self._board = Board(fleet.size)
        self._fork = multiprocessing.get_context("fork")
        self._workers: list[Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; may be called again."""
        self._board.stop(True)
        for worker in self._workers:
            worker.pipe.close()  # an idle worker leaves when its pipe ends
        for worker in self._workers:
            _end(worker.process, patience=2.0)
        self._workers = []

    def ask(
        self, config: Mapping[str, Any], model: Vector, devices: Sequence[str]
    ) -> Generator[tuple[str, Outcome], None, None]:
        """Let devices answer a request; yields in the order of ``devices``.

        Closing the generator early stops what still trains and waits until it has stopped.
        """
        self._board.model[:] = model
        self._board.stop(False)
        done: dict[int, Outcome] = {}
        sent = shown = 0
        try:
            while shown < len(devices):
                for worker in [w for w in self._workers if w.place is None]:
                    if sent < min(len(devices), shown + AHEAD * len(self._workers)):
                        self._send(worker, sent, devices[sent], config)
                        sent += 1
                if shown not in done:
                    self._receive(done, None)
                while shown in done:
                    yield devices[shown], done.pop(shown)
                    shown += 1
        finally:
            self._drain()

    def _send(self, worker: Worker, place: int, device_id: str, config: Mapping[str, Any]) -> None:
        body = json.dumps({"device": device_id, "config": dict(config)}).encode()
        try:
            worker.pipe.send_bytes(body)
        except OSError:  # it died while idle
            worker = self._replace(worker)
            worker.pipe.send_bytes(body)
        worker.place = place

    def _receive(self, done: dict[int, Outcome], timeout: float | None) -> bool:
        """Take what is ready, waiting for at least one; False if the time ran out."""
        busy = {w.pipe: w for w in self._workers if w.place is not None}
        ready = wait(list(busy), timeout)
        for pipe in ready:
            worker = busy[pipe]  # type: ignore[index]  # wait() returns the connections it was given
            place = worker.place
            assert place is not None
            try:
                done[place] = _decode(worker.pipe.recv_bytes(), worker.update)
                worker.place = None
            except (EOFError, OSError):
                done[place] = self._bury(worker)
        return bool(ready)

    def _bury(self, worker: Worker) -> UpdateRejected:
        worker.process.join(1.0)
        code = worker.process.exitcode
        self._replace(worker)
        log.warning("a worker process died (exit code %s) and was replaced", code)
        return UpdateRejected(
            Rejection.FAILED,
            f"The worker process died (exit code {code}) while this device trained.",
            hint="Exit code -9 usually means that memory ran out; use fewer workers.",
        )

    def _drain(self) -> None:
        """Wait until no worker reads the board any more."""
        self._board.stop(True)
        while any(w.place is not None for w in self._workers):
            if not self._receive({}, PATIENCE_S):
                for worker in [w for w in self._workers if w.place is not None]:
                    self._replace(worker)

    def _replace(self, worker: Worker) -> Worker:
        worker.pipe.close()
        _end(worker.process, patience=0.0)
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _start(self) -> Worker:
        ours, theirs = self._fork.Pipe()
        update = _shared(self._fleet.size, np.dtype(np.int32))
        inherited = [ours, *(w.pipe for w in self._workers)]  # a copy of these would keep a pipe from ending
        arguments = (self._fleet, self._board, theirs, update, inherited, os.getpid())
        process = self._fork.Process(target=_serve, args=arguments, daemon=True)
        try:
            process.start()
        except OSError as error:
            raise RunError(
                f"A worker process could not be started: {error.strerror}.",
                hint="Use fewer workers, or 0 to train in this process.",
            ) from error
        theirs.close()
        return Worker(process, ours, update)


def _end(process: BaseProcess, patience: float) -> None:
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def _serve(
    fleet: Fleet,
    board: Board,
    pipe: Connection,
    update: NDArray[np.int32],
    inherited: list[Connection],
    parent: int,
) -> None:
    """A worker's life: answer until the pipe ends or the parent is gone."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _one_thread()
    while os.getppid() == parent:
        try:
            if not pipe.poll(PARENT_CHECK_S):
                continue
            job = json.loads(pipe.recv_bytes())
            request = Records({MODEL: board.model}, job["config"], {})
            pipe.send_bytes(_encode(fleet.respond(job["device"], request, board.stopped), update))
        except (EOFError, OSError):
            return


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _encode(outcome: Outcome, update: NDArray[np.int32]) -> bytes:
    if isinstance(outcome, UpdateRejected):
        body: dict[str, Any] = {
            "refused": outcome.reason.value,
            "message": str(outcome),
            "hint": outcome.hint,
        }
        return json.dumps(body).encode()
    if UPDATE in outcome.arrays:
        update[:] = outcome.arrays[UPDATE]
    body = {
        "config": dict(outcome.config),
        "metrics": dict(outcome.metrics),
        "update": UPDATE in outcome.arrays,
    }
    return json.dumps(body).encode()


def _decode(body: bytes, update: NDArray[np.int32]) -> Outcome:
    reply = json.loads(body)
    if "refused" in reply:
        return UpdateRejected(Rejection(reply["refused"]), reply["message"], hint=reply["hint"])
    # Copied, so that the worker can go on with the next device.
    return Records({UPDATE: update.copy()} if reply["update"] else {}, reply["config"], reply["metrics"])
