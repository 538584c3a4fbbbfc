"""Worker processes: one warm model each, one training thread each, the data shared.

Workers are forked, so they start in milliseconds, need no second import of the user's script and share the
data with the parent. The model goes out, and updates and sums come back, through shared memory; everything
else is JSON over a pipe. Nothing is pickled.

Where training runs no code of the task's own (``Shard.is_plain``), the parent does not sleep while the others
train: it takes the place of one of them. Its core is awake, and has in its cache what a round needs.

    with Pool(fleet, workers=2) as pool:
        pool.begin(plan, request)
        for part in pool.train(["device-0", "device-1"], [60, 60]): ...
        subtotal = pool.subtotal()

A worker that dies while it trains takes its part of the sum with it: what it had trained is trained again by
the others. Only a device that kills its worker again and again when it is alone counts as failed, so a death
that no device has caused (memory ran out, somebody killed it) changes no result.
"""

import ctypes
import gc
import json
import logging
import mmap
import multiprocessing
import os
import select
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import DiskFull, Rejection, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Accumulator, Subtotal
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import AUXILIARY, MODEL, UPDATE, Request
from lepton_fl.wire.records import Records
from lepton_simulations.backend import Outcome, Part, Shard, chunks, refusal_from_json, refusal_to_json
from lepton_simulations.threads import one_thread

log = logging.getLogger(__name__)

AHEAD = 4  # answers per worker that may wait for an earlier one; bounds the parent's memory
DEATHS = 2  # of its worker, when it was alone, until a device counts as failed
QUEUED = 2  # chunks given to a worker at a time, so that it need not wait for the next one
AWAKE_S = 5e-4  # that a process looks for what is about to come before it sleeps, which costs a wake-up
PATIENCE_S = 30.0  # for a worker to notice that its round is over, before it is replaced
PARENT_CHECK_S = 5.0  # how often an idle worker looks whether its parent is alive

Chunk = Sequence[str]
Cores = frozenset[int]


class Board:
    """Memory that parent and workers share: the model of the round and a stop flag."""

    def __init__(self, size: int, auxiliary: int) -> None:
        self.model: Vector = _shared(size, np.dtype(np.float32))
        self.auxiliary: Vector = _shared(auxiliary, np.dtype(np.float32))  # empty where nothing needs it
        self._stop = _shared(1, np.dtype(np.uint8))

    def stop(self, value: bool) -> None:
        """Ask whoever still trains to leave, or lift that."""
        self._stop[0] = value

    def stopped(self) -> bool:
        """Whether the round is over."""
        return bool(self._stop[0])


def cores_of(workers: int) -> list[Cores]:
    """The cores of each worker, in turn: its own where there are as many workers as cores, else any.

    Workers are woken in short succession; a scheduler may then put two of them onto one core and leave
    them there for milliseconds, while another core is idle.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [frozenset()]
    allowed = sorted(os.sched_getaffinity(0))
    return [frozenset({core}) for core in allowed] if workers >= len(allowed) else [frozenset()]


def current_core() -> int:
    """The one that this process runs on just now; -1 where the system does not say."""
    return _getcpu() if _getcpu else -1


def _find_getcpu() -> Callable[[], int] | None:
    try:
        return ctypes.PyDLL(None).sched_getcpu  # too short to let go of the GIL
    except (AttributeError, OSError):
        return None


_getcpu = _find_getcpu()


def _shared(size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize))  # anonymous and shared with forked children
    return np.frombuffer(memory, dtype, count=size)


@dataclass(eq=False)
class Desk:
    """Memory that the parent shares with one worker; pages that nothing touches cost nothing."""

    update: NDArray[np.int32]  # (P,) of one device
    totals: NDArray[np.int64]  # (2, P): the sum of all devices that it has trained, of every other attempt

    @classmethod
    def of(cls, size: int) -> Self:
        """For a model of ``size`` coordinates."""
        return cls(_shared(size, np.dtype(np.int32)), _shared(2 * size, np.dtype(np.int64)).reshape(2, size))


@dataclass(eq=False)
class Worker:
    """The parent's handle on one worker process."""

    process: BaseProcess
    pipe: Connection
    desk: Desk
    cores: Cores  # that it runs on; empty = any
    attempt: int = -1  # the last one it was told of
    place: int | None = None  # of the device that it lets answer
    queue: deque[Chunk] = field(default_factory=deque)  # that it was given and has not returned
    done: list[Chunk] = field(default_factory=list)  # that are in its sum
    side: int = 0  # which of its sums is that of this attempt
    weight: int = 0  # of its sum
    reports: int = 0

    @property
    def busy(self) -> bool:
        """Whether it owes an answer."""
        return self.place is not None or bool(self.queue)


class Pool:
    """A fixed number of workers on this machine; implements ``backend.Backend``."""

    def __init__(self, shard: Shard, workers: int) -> None:
        self._shard = shard
        self._board = Board(shard.size, shard.auxiliary)
        self._fork = multiprocessing.get_context("fork")
        self._attempt = 0
        self._opening: dict[str, Any] = {}
        self._helps = shard.is_plain  # whether the parent trains, too
        self._own: Accumulator | None = None  # of what it has trained
        self._done: list[Chunk] = []  # that are in there
        self._kept: list[Subtotal] = []  # of workers that died after they had trained
        self._deaths: Counter[str] = Counter()  # of workers, by the device that was alone with them
        self._told: set[str] = set()  # whose part was yielded; they may be trained again after a death
        self._workers: list[Worker] = []
        cores = cores_of(workers)
        for number in range(workers):
            self._workers.append(self._start(cores[number % len(cores)]))

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

    def begin(self, plan: RoundPlan, request: Request) -> None:
        """See ``Backend``."""
        self._attempt += 1
        self._board.model[:] = request.model
        if request.auxiliary is not None:
            self._board.auxiliary[:] = request.auxiliary
        self._board.stop(False)
        settings = plan.model_copy(update={"cohort": ()})  # a device need not know the others
        self._plan, self._own, self._done = settings, None, []
        self._helps = self._shard.is_plain
        self._kept, self._deaths, self._told = [], Counter(), set()
        self._opening, self._request = {"plan": settings.model_dump_json()}, request
        for worker in self._workers:
            worker.done, worker.weight, worker.reports = [], 0, 0
        if self._helps:
            self._announce()

    def _announce(self) -> None:
        """Wake those who will train: they read the attempt's settings while we see who trains what."""
        absent = self._absent()
        for worker in self._workers:
            if worker is not absent:
                with suppress(OSError):  # it died while idle, which is seen to when it is needed
                    self._send(worker, {})

    # --- training in chunks -------------------------------------------------------------------------

    def train(self, devices: Sequence[str], costs: Sequence[int]) -> Generator[Part, None, None]:
        """See ``Backend``; the parts come as they are ready."""
        waiting = deque[Chunk](chunks(devices, costs, self._shard.chunk, len(self._workers)))
        told = self._told
        self._board.stop(False)
        try:
            while waiting or any(worker.queue for worker in self._workers):
                own = self._hand_out(waiting, self._absent())
                parts = [self._train_here(own, waiting)] if own else []
                parts += [self._take_part(w, waiting) for w in self._ready(0.0 if own else None)]
                for part in parts:
                    news = [t for t in part.trained if t.device_id not in told]
                    refused = {d: r for d, r in part.refused.items() if d not in told}
                    told.update(t.device_id for t in news)
                    told.update(refused)
                    yield Part(news, refused)
        finally:
            self._drain()

    def _absent(self) -> Worker | None:
        """The worker whose place the parent takes: that of the core which it runs on, or any."""
        if not self._helps:
            return None
        here = current_core()
        return next((worker for worker in self._workers if here in worker.cores), self._workers[-1])

    def _train_here(self, chunk: Chunk, waiting: deque[Chunk]) -> Part:
        """Train in the parent; what goes wrong here is left to the workers, who can die of it."""
        self._own = self._own or Accumulator(self._plan)
        auxiliary = self._board.auxiliary if self._plan.auxiliary else None
        try:
            part = self._shard.train(
                self._plan, self._board.model, auxiliary, chunk, self._own, self._board.stopped
            )
        except DiskFull:
            raise
        except Exception:
            log.warning("training failed in the main process, and goes on in the others", exc_info=True)
            waiting.extend([*self._done, *([device_id] for device_id in chunk)])
            self._helps, self._own, self._done = False, None, []
            return Part([])
        self._done.append(chunk)
        return part

    def subtotal(self) -> Subtotal:
        """See ``Backend``."""
        parts = [*self._kept, *(_sum_of(worker) for worker in self._workers if worker.reports)]
        parts += [self._own.subtotal()] if self._own else []
        total = parts[0].total if parts else np.zeros(self._shard.update_size, np.int64)
        for part in parts[1:]:
            total = total + part.total
        if len(parts) == 1:  # whoever takes the sum may change it, and that memory is the worker's
            total = total.copy()
        return Subtotal(total, sum(p.weight for p in parts), sum(p.reports for p in parts))

    def _hand_out(self, waiting: deque[Chunk], absent: Worker | None = None) -> Chunk | None:
        """Give chunks to the workers; and one to the parent, in place of the absent one."""
        here, own = current_core(), None
        for depth in range(QUEUED):
            # A worker that wakes on this very core takes it from us: by then the others shall be at work.
            for worker in sorted(self._workers, key=lambda worker: here in worker.cores):
                if worker is not absent and waiting and len(worker.queue) <= depth:
                    self._hand_to(worker, waiting)
            if absent is not None and own is None and waiting:
                own = waiting.popleft()
        return own

    def _hand_to(self, worker: Worker, waiting: deque[Chunk]) -> None:
        message = {"train": list(waiting[0])}
        if not worker.queue:
            worker = self._tell(worker, message)
        else:
            try:
                self._send(worker, message)
            except OSError:  # it died at work, which is seen to where its answer is waited for
                return
        worker.queue.append(waiting.popleft())

    def _take_part(self, worker: Worker, waiting: deque[Chunk]) -> Part:
        try:
            body = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            return self._lost(worker, waiting)
        worker.done.append(worker.queue.popleft())
        reply = _read(body)
        worker.weight, worker.reports, worker.side = reply["weight"], reply["reports"], reply["side"]
        return Part.from_json(reply)

    def _lost(self, worker: Worker, waiting: deque[Chunk]) -> Part:
        """Give a dead worker's chunks to the others; who was being trained then trains alone."""
        code = self._bury(worker)
        suspects, others = worker.queue.popleft(), [*worker.done, *worker.queue]
        waiting.extend(others)
        if len(suspects) > 1 or not self._blamed(suspects[0]):
            waiting.extend([device_id] for device_id in suspects)
            return Part([])
        return Part([], {suspects[0]: _died(code)})

    def _blamed(self, device_id: str) -> bool:
        """Count a death of the worker that was alone with a device; whether it is held to be its cause."""
        self._deaths[device_id] += 1
        return self._deaths[device_id] >= DEATHS

    # --- one by one ---------------------------------------------------------------------------------

    def answer(self, devices: Sequence[str]) -> Generator[tuple[str, Outcome], None, None]:
        """See ``Backend``."""
        self._board.stop(False)
        config = self._request.to_records().config
        done: dict[int, Outcome] = {}
        again = deque[int]()  # places whose worker died
        sent = shown = 0
        try:
            while shown < len(devices):
                for worker in [w for w in self._workers if not w.busy]:
                    if again:
                        place = again.popleft()
                    elif sent < min(len(devices), shown + AHEAD * len(self._workers)):
                        place, sent = sent, sent + 1
                    else:
                        break
                    self._tell(worker, {"device": devices[place], "config": config}).place = place
                if shown not in done:
                    for worker in self._ready(None):
                        self._take_answer(worker, devices, done, again)
                while shown in done:
                    yield devices[shown], done.pop(shown)
                    shown += 1
        finally:
            self._drain()

    def _take_answer(
        self, worker: Worker, devices: Sequence[str], done: dict[int, Outcome], again: deque[int]
    ) -> None:
        place, worker.place = worker.place, None
        assert place is not None
        try:
            done[place] = _decode(worker.pipe.recv_bytes(), worker.desk.update)
        except (EOFError, OSError):
            code = self._bury(worker)
            if self._blamed(devices[place]):
                done[place] = _died(code)
            else:
                again.append(place)

    # --- processes ----------------------------------------------------------------------------------

    def _tell(self, worker: Worker, message: dict[str, Any]) -> Worker:
        """Send a message, after the attempt's settings if they are new to the worker."""
        try:
            self._send(worker, message)
        except OSError:  # it died while idle
            worker = self._replace(worker)
            self._send(worker, message)
        return worker

    def _send(self, worker: Worker, message: dict[str, Any]) -> None:
        opening = {} if worker.attempt == self._attempt else self._opening
        worker.pipe.send_bytes(json.dumps(opening | message).encode())
        worker.attempt = self._attempt

    def _ready(self, timeout: float | None) -> list[Worker]:
        """The workers that have something to say, or have died; waits for one."""
        busy = {worker.pipe.fileno(): worker for worker in self._workers if worker.busy}
        poll = select.poll()  # the bare one: multiprocessing's wait() takes twice as long
        for pipe in busy:
            poll.register(pipe, select.POLLIN)
        ready = _soon(lambda: poll.poll(0)) if timeout is None and self._own else []
        ready = ready or poll.poll(None if timeout is None else 1e3 * timeout)
        return [busy[pipe] for pipe, _ in ready]

    def _bury(self, worker: Worker) -> int | None:
        worker.process.join(1.0)
        code = worker.process.exitcode
        self._replace(worker)
        log.warning("a worker process died (exit code %s) and was replaced", code)
        return code

    def _drain(self) -> None:
        """Wait until no worker reads the board any more."""
        self._board.stop(True)
        while late := [worker for worker in self._workers if worker.busy]:
            ready = self._ready(PATIENCE_S)
            for worker in late if not ready else []:
                self._replace(worker)
            for worker in ready:
                self._hear(worker)

    def _hear(self, worker: Worker) -> None:
        """Take an answer that nobody wants any more."""
        try:
            worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if worker.place is not None:
            worker.place = None
        else:
            worker.done.append(worker.queue.popleft())

    def _replace(self, worker: Worker) -> Worker:
        if worker.reports and not worker.queue:  # its sum was whole, and the parent has that memory, too
            self._kept.append(_sum_of(worker))
        worker.pipe.close()
        _end(worker.process, patience=0.0)
        fresh = self._start(worker.cores)
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _start(self, cores: Cores) -> Worker:
        ours, theirs = self._fork.Pipe()
        desk = Desk.of(self._shard.update_size)
        inherited = [ours, *(w.pipe for w in self._workers)]  # a copy of these would keep a pipe from ending
        arguments = (self._shard, self._board, theirs, desk, inherited, os.getpid(), cores)
        process = self._fork.Process(target=_serve, args=arguments, daemon=True)
        try:
            process.start()
        except OSError as error:
            raise RunError(
                f"A worker process could not be started: {error.strerror}.",
                hint="Use fewer workers, or 0 to train in this process.",
            ) from error
        theirs.close()
        return Worker(process, ours, desk, cores)


def _sum_of(worker: Worker) -> Subtotal:
    return Subtotal(worker.desk.totals[worker.side], worker.weight, worker.reports)


def _died(code: int | None) -> UpdateRejected:
    return UpdateRejected(
        Rejection.FAILED,
        f"The worker process died (exit code {code}) each time this device worked.",
        hint="Exit code -9 usually means that memory ran out; use fewer workers.",
    )


def _end(process: BaseProcess, patience: float) -> None:
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def _serve(
    shard: Shard,
    board: Board,
    pipe: Connection,
    desk: Desk,
    inherited: list[Connection],
    parent: int,
    cores: Cores,
) -> None:
    """A worker's life: answer until the pipe ends or the parent is gone."""
    if cores:
        with suppress(OSError):  # one of them may just have been taken away
            os.sched_setaffinity(0, cores)
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server = _Server(shard, board, desk)
    gc.freeze()  # nothing inherited is searched for garbage, which would also copy its pages
    announced = False
    with one_thread():
        while os.getppid() == parent:
            try:
                if not (announced and _soon(pipe.poll)) and not pipe.poll(PARENT_CHECK_S):
                    continue
                answer = server.answer(json.loads(pipe.recv_bytes()))
                announced = answer is None
                if answer is not None:
                    pipe.send_bytes(json.dumps(answer).encode())
                server.prepare()
            except (EOFError, OSError):
                return


_Found = TypeVar("_Found")


def _soon(look: Callable[[], _Found]) -> _Found:
    """What ``look`` finds once it finds something, or ``AWAKE_S`` have passed."""
    end = time.perf_counter() + AWAKE_S
    while not (found := look()) and time.perf_counter() < end:
        pass
    return found


@dataclass(eq=False)
class _Server:
    """What a worker knows of the attempt."""

    shard: Shard
    board: Board
    desk: Desk
    plan: RoundPlan | None = None
    accumulator: Accumulator | None = None
    side: int = 0  # of the attempt in hand
    clean: bool = True  # the other side is zero

    def prepare(self) -> None:
        """Clear the memory of the next attempt's sum, while nobody waits."""
        if not self.clean:
            self.desk.totals[1 - self.side] = 0
            self.clean = True

    def answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The reply; None to an announcement, which needs none."""
        try:
            return self._handle(message)
        except DiskFull as error:  # nobody's fault, so it is the parent's to raise
            return {"full": {"message": str(error), "hint": error.hint}}

    def _handle(self, message: dict[str, Any]) -> dict[str, Any] | None:
        if "plan" in message:
            self.plan, self.accumulator = RoundPlan.model_validate_json(message["plan"]), None
        if "train" in message:
            return self._train(message["train"])
        if "device" not in message:
            return None
        arrays, config = {MODEL: self.board.model}, message["config"]
        if config["auxiliary-sha256"]:
            arrays[AUXILIARY] = self.board.auxiliary
        request = Records(arrays, config, {})
        return _encode(self.shard.respond(message["device"], request, self.board.stopped), self.desk.update)

    def _train(self, devices: Chunk) -> dict[str, Any]:
        assert self.plan is not None
        if self.accumulator is None:
            self.prepare()
            self.side, self.clean = 1 - self.side, False
            self.accumulator = Accumulator(self.plan, self.desk.totals[self.side])
        auxiliary = self.board.auxiliary if self.plan.auxiliary else None
        part = self.shard.train(
            self.plan, self.board.model, auxiliary, devices, self.accumulator, self.board.stopped
        )
        sums = {"weight": self.accumulator.weight, "reports": self.accumulator.reports, "side": self.side}
        return part.to_json() | sums


def _read(body: bytes) -> dict[str, Any]:
    """A worker's reply; raises the DiskFull that it met."""
    reply: dict[str, Any] = json.loads(body)
    if "full" in reply:
        raise DiskFull(reply["full"]["message"], hint=reply["full"]["hint"])
    return reply


def _encode(outcome: Outcome, update: NDArray[np.int32]) -> dict[str, Any]:
    if isinstance(outcome, UpdateRejected):
        return {"refused": refusal_to_json(outcome)}
    if UPDATE in outcome.arrays:
        update[:] = outcome.arrays[UPDATE]
    return {
        "config": dict(outcome.config),
        "metrics": dict(outcome.metrics),
        "update": UPDATE in outcome.arrays,
    }


def _decode(body: bytes, update: NDArray[np.int32]) -> Outcome:
    reply = _read(body)
    if "refused" in reply:
        return refusal_from_json(reply["refused"])
    # Copied, so that the worker can go on with the next device.
    return Records({UPDATE: update.copy()} if reply["update"] else {}, reply["config"], reply["metrics"])
