"""``lepton client serve``: predictions for programs on this device, over a Unix socket or loopback HTTP.

========================  ==================================================================================
``POST /v1/predict``      ``application/json``: ``{"row": …}`` or ``{"rows": [ …, … ]}``, answered by
                          ``{"output": …}`` or ``{"outputs": [ … ]}`` and the name of the release.
                          ``application/vnd.safetensors``: a tensor ``input`` (n, …), answered by ``output``
``GET /v1/model``         what answers: release, variant, lineage, types and shapes
``GET /healthz``          ``ok``
========================  ==================================================================================

An error is ``{"error": code, "message": …, "hint": …}`` and never ends the process. Every request is bounded
in bytes, rows and company. A Unix socket has mode 0600. Over HTTP only this machine is answered, and only
callers that name it: a web page in a browser cannot ask.

HTTP is uvicorn's; an application that needs no HTTP uses ``lepton_client.predictor`` in its own process.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvicorn

from lepton_client.config import ClientConfig, ServeSection
from lepton_client.predictor import Array, Model, Predictor, describe
from lepton_client.state import COUNTED, GIVEN_UP, StateDir, given_up
from lepton_fl.delivery.slots import Slots, served
from lepton_fl.errors import (
    ConfigError,
    ConnectionFailed,
    DataError,
    Fault,
    LeptonError,
    NotFound,
    ReleaseRefused,
    StateLocked,
)
from lepton_fl.files import canonical_json, make_private_folder, read_private, write_private

log = logging.getLogger("lepton_client")

STARTS: Final = 2  # of a release that ends this process
SETTLED_S: Final = 60.0  # alive for so long: what is served is good
TELL_S: Final = 5.0  # between two writes of what was counted
LATEST: Final = 1000  # requests whose latency is remembered
WAIT_S: Final = 1.0  # between two looks for a first release
GRACE_S: Final = 5  # for requests under way at a shutdown
MAX_PATH: Final = 107  # bytes of a Unix socket's path
JSON: Final = "application/json"
TENSORS: Final = "application/vnd.safetensors"
_LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Refusal(Exception):
    """A request that is not answered; becomes the answer's status and error."""

    def __init__(self, status: int, error: LeptonError) -> None:
        super().__init__(str(error))
        self.status, self.error = status, error


class _BadAnswer(DataError):
    """The model's fault, not the caller's."""


class Counted:
    """What the release in service has done: sums for the coordinator, nothing of any one request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._release, self._requests, self._errors = "", 0, 0
        self._latest: deque[float] = deque(maxlen=LATEST)  # ms
        self._saved = 0

    def note(self, release: str, ms: float | None) -> None:
        """One request was answered in ``ms``, or the model failed (None)."""
        with self._lock:
            if release != self._release:
                self._release, self._requests, self._errors, self._saved = release, 0, 0, 0
                self._latest.clear()
            self._requests += 1
            if ms is None:
                self._errors += 1
            else:
                self._latest.append(ms)

    def save(self, folder: Path) -> None:
        """Write the sums where the agent looks, if there is something new; a full disk costs nothing else."""
        with self._lock:
            if self._requests == self._saved:
                return
            p95 = round(float(np.percentile(self._latest, 95)), 3) if self._latest else 0.0
            told = {"release": self._release, "requests": self._requests, "errors": self._errors}
            self._saved = self._requests
        try:
            write_private(folder / COUNTED, canonical_json(told | {"p95_ms": p95}))
        except LeptonError as error:
            log.warning("the counters of predictions could not be kept: %s", error)


class Endpoint:
    """The ASGI application."""

    def __init__(self, predictor: Predictor, limits: ServeSection, *, threads: int = 1) -> None:
        """Answer with ``predictor``; ``threads`` predictions run at once."""
        self._predictor, self._limits = predictor, limits
        self.counted = Counted()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predict")
        self._busy = 0

    def close(self) -> None:
        """End the pool."""
        self._pool.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        try:
            status, kind, body = await self._answer(scope, receive)
        except _Refusal as refusal:
            status, kind, body = refusal.status, JSON, _error(refusal.error)
        except asyncio.CancelledError:  # a shutdown whose patience is over; the task ends with this answer
            leaving = ConnectionFailed("The endpoint is being stopped.", hint="Try again in a moment.")
            status, kind, body = 503, JSON, _error(leaving)
        except Exception:  # the edge of the process: a caller gets a status, the log the cause
            log.exception("a request failed")
            status, kind, body = 500, JSON, _error(LeptonError("The endpoint failed; its log has the cause."))
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, str, bytes]:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        _check_host(scope, headers)
        asked = scope["method"], scope["path"]
        if asked == ("GET", "/healthz"):
            return 200, "text/plain", b"ok\n"
        if asked == ("GET", "/v1/model"):
            return 200, JSON, json.dumps(describe(self._predictor.model)).encode()
        if asked == ("POST", "/v1/predict"):
            return await self._predict(headers, receive)
        known = {"/healthz": "GET", "/v1/model": "GET", "/v1/predict": "POST"}
        if scope["path"] in known:
            wanted = known[scope["path"]]
            raise _Refusal(405, ConfigError(f"{scope['path']} is asked with {wanted}."))
        raise _Refusal(404, NotFound("There is no such address.", hint="POST /v1/predict"))

    async def _predict(self, headers: dict[str, str], receive: Receive) -> tuple[int, str, bytes]:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        work = {JSON: self._from_json, TENSORS: self._from_tensors}.get(kind)
        if work is None:
            raise _Refusal(415, ConfigError(f"Expected {JSON} or {TENSORS}, got {kind[:60]!r}."))
        if self._busy >= self._limits.max_concurrent:
            words = f"{self._limits.max_concurrent} requests are in hand already."
            raise _Refusal(503, ConnectionFailed(words, hint="Try again, or raise serve.max_concurrent."))
        self._busy += 1
        try:
            body = await _body(headers, receive, self._limits.max_body_bytes)
            loop = asyncio.get_running_loop()
            return 200, kind, await loop.run_in_executor(self._pool, self._timed, work, body)
        except DataError as error:
            raise _Refusal(400, error) from error
        finally:
            self._busy -= 1

    def _timed(self, work: Callable[[bytes], bytes], body: bytes) -> bytes:
        release, began = self._predictor.model.release, time.perf_counter()
        try:
            answer = work(body)
        except Exception as error:
            if not isinstance(error, DataError) or isinstance(error, _BadAnswer):
                self.counted.note(release, None)
            raise
        self.counted.note(release, 1000 * (time.perf_counter() - began))
        return answer

    def _from_json(self, body: bytes) -> bytes:
        model = self._predictor.model
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise DataError(f"The body is not JSON: {str(error)[:200]}.") from error
        if not isinstance(asked, dict) or set(asked) not in ({"row"}, {"rows"}):
            raise DataError('Expected {"row": …} for one row or {"rows": [ … ]} for several.')
        single = "row" in asked
        rows = _array([asked["row"]] if single else asked["rows"], model)
        found = self._run(model, rows).tolist()
        answer = {"output": found[0]} if single else {"outputs": found}
        try:
            return json.dumps(answer | {"release": model.release}, allow_nan=False).encode()
        except ValueError as error:
            raise _BadAnswer("The model answers with NaN or infinity, which JSON cannot say.") from error

    def _from_tensors(self, body: bytes) -> bytes:
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        try:
            tensors = load(body)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The body is not safetensors: {str(error)[:200]}.") from error
        if set(tensors) != {"input"}:
            raise DataError(f"Expected one tensor named 'input', got {sorted(tensors)[:5]}.")
        found = self._run(self._predictor.model, tensors["input"])
        return save({"output": np.ascontiguousarray(found)})

    def _run(self, model: Model, rows: Array) -> Array:
        if rows.ndim and len(rows) > self._limits.max_batch:
            raise DataError(
                f"Expected at most {self._limits.max_batch} rows, got {len(rows)}.",
                hint="Ask in parts, or raise serve.max_batch.",
            )
        return model.predict(rows)


def _array(values: object, model: Model) -> Array:
    """Nested lists as the model's input; nothing is rounded or guessed."""
    wanted = model.card.input.dtype
    try:
        found: Array = np.array(values)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError("The rows are not numbers in equal shapes.") from error
    if found.dtype.kind not in ("iu" if wanted == "int64" else "iuf"):
        raise DataError(f"Expected rows of {wanted}, got {found.dtype}.")
    with np.errstate(over="ignore"):  # infinity is named by the model's own check
        return found.astype(wanted)


def _check_host(scope: Scope, headers: dict[str, str]) -> None:
    """Over HTTP only callers that name this machine: a page in a browser has another name for it."""
    if scope.get("server") is None or not isinstance(scope["server"][1], int):
        return  # a Unix socket: who may open it may ask
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name not in _LOCAL:
        raise _Refusal(403, ConfigError(f"Expected the host localhost or 127.0.0.1, got {host[:60]!r}."))


async def _body(headers: dict[str, str], receive: Receive, most: int) -> bytes:
    too_long = _Refusal(
        413, DataError(f"Expected at most {most} bytes.", hint="Ask in parts, or raise serve.max_body_bytes.")
    )
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_long
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refusal(400, DataError("The caller hung up before its request was complete."))
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_long
        if not message.get("more_body", False):
            return b"".join(parts)


def _error(error: LeptonError) -> bytes:
    return json.dumps({"error": error.code, "message": str(error), "hint": error.hint}).encode()


# --- the process --------------------------------------------------------------------------------------


class Probation:
    """Notices a release that cannot be served, and serves the one before instead.

    ``serve.json`` counts the starts of a release; it is written before the release is loaded, and forgotten
    when it has served for a while or was stopped in good order. One that has ended this process again and
    again, or does not load, is named in ``given_up.json``: the agent takes it out of service and reports it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "serve.json"
        self._lock = threading.Lock()
        try:
            self._state: dict[str, Any] = dict(json.loads(read_private(self._path)))
        except (NotFound, ValueError):
            self._state = {}

    def chosen(self, slots: Slots) -> str:
        """The release to serve: the current one, or the one before if the current one is given up."""
        record = slots.record()
        current = record.current or ""
        if current and self._state.get("release") == current and int(self._state.get("starts", 0)) >= STARTS:
            words = f"It has ended the serving process {STARTS} times."
            self.give_up(current, ReleaseRefused(Fault.CRASHED, words))
        if not current or given_up(self._folder).get("release") != current:
            return current
        if record.previous is None:
            raise ReleaseRefused(
                Fault.CRASHED,
                f"Release {current[:12]} cannot be served, and there is no other.",
                hint=f"Have another release assigned; this one is tried again when {GIVEN_UP} is removed.",
            )
        return record.previous

    def give_up(self, name: str, error: ReleaseRefused) -> None:
        """A release cannot be served; for the agent to know."""
        if error.fault is Fault.RUNTIME:
            return  # of this installation, not of the release
        told = {"release": name, "fault": error.fault, "detail": str(error)}
        with self._lock:
            write_private(self._folder / GIVEN_UP, canonical_json(told))
            self._save({})

    def loading(self, name: str) -> None:
        """Before a release is loaded."""
        with self._lock:
            same = self._state.get("release") == name
            starts = int(self._state.get("starts", 0)) + 1 if same else 1
            self._save({"release": name, "starts": starts})

    def settled(self) -> None:
        """It has served for a while, or was stopped in good order."""
        with self._lock:
            if self._state.get("starts"):
                self._save({})

    def _save(self, state: dict[str, Any]) -> None:
        write_private(self._path, canonical_json(state))
        self._state = state


def serve(config: ClientConfig, stop: threading.Event, ready: Callable[[str], None]) -> None:
    """Answer until ``stop``.

    Args:
        config: The device's.
        stop: Set by a signal.
        ready: Called with the address once requests are answered.

    Raises:
        StateLocked: Another process serves at this socket.
        ConnectionFailed: The port is taken.
        ReleaseRefused: The only release on this device ends this process, or was altered.
    """
    folder = StateDir(config.client.state_dir).delivery
    make_private_folder(folder)
    with _listener(config) as (listener, address):  # first: a socket that is taken says nothing of a release
        _wait_for_release(folder, stop)
        if stop.is_set():
            return
        probation = Probation(folder)
        with _predictor(config, probation, Slots(folder)) as predictor:
            endpoint = Endpoint(predictor, config.serve, threads=config.limits.threads)
            _run(endpoint, listener, stop, lambda: ready(address), probation, folder)
        probation.settled()


def _predictor(config: ClientConfig, probation: Probation, slots: Slots) -> Predictor:
    """With the release to serve loaded; the one before, if that cannot be."""

    def loaded(first: str) -> Predictor:
        return Predictor(
            config.client.state_dir,
            threads=config.limits.threads,
            loading=probation.loading,
            refused=probation.give_up,
            first=first,
        )

    first = probation.chosen(slots)
    try:
        return loaded(first)
    except ReleaseRefused as error:
        if first != slots.record().current:
            raise
        probation.give_up(first, error)
        other = probation.chosen(slots)
        if other == first:
            raise
        log.error("release %s is in service and cannot be loaded, serving the one before: %s", first, error)
        return loaded(other)


def _run(
    endpoint: Endpoint,
    listener: socket.socket,
    stop: threading.Event,
    ready: Callable[[], None],
    probation: Probation,
    folder: Path,
) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            endpoint,
            lifespan="off",
            interface="asgi3",
            loop="asyncio",
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), name="lepton-serve", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    ready()
    settles, tells = time.monotonic() + SETTLED_S, 0.0
    while thread.is_alive() and not stop.wait(0.5):
        if time.monotonic() > tells:
            endpoint.counted.save(folder)
            tells = time.monotonic() + TELL_S
        if time.monotonic() > settles:
            probation.settled()
            settles = float("inf")
    server.should_exit = True
    thread.join()
    endpoint.close()
    endpoint.counted.save(folder)


def _wait_for_release(folder: Path, stop: threading.Event) -> None:
    said = False
    while not served(folder) and not stop.is_set():
        if not said:
            log.info("no release is in service yet, waiting for one")
            said = True
        stop.wait(WAIT_S)


@contextlib.contextmanager
def _listener(config: ClientConfig) -> Iterator[tuple[socket.socket, str]]:
    """The bound socket and its address."""
    if config.serve.port is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", config.serve.port))
            except OSError as error:
                raise ConnectionFailed(
                    f"Cannot listen at 127.0.0.1:{config.serve.port}: {error.strerror}.",
                    hint="Set serve.port to a free one, or use the Unix socket.",
                ) from error
            yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"
        return
    path = config.serve.socket or config.client.state_dir / "serve.sock"
    with _unix_listener(path.absolute()) as listener:
        yield listener, f"unix:{path.absolute()}"


@contextlib.contextmanager
def _unix_listener(path: Path) -> Iterator[socket.socket]:
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigError(
            f"The socket's path {path} has more than {MAX_PATH} bytes.",
            hint="Set serve.socket to a shorter one.",
        )
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"{path} is there and no socket.", hint="Set serve.socket to another path.")
        with socket.socket(socket.AF_UNIX) as other:
            if other.connect_ex(str(path)) == 0:
                raise StateLocked(f"Another process serves at {path}.", hint="Stop it, or set serve.socket.")
        path.unlink()  # left by a killed process
    with socket.socket(socket.AF_UNIX) as listener:
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ConnectionFailed(f"Cannot listen at {path}: {error.strerror}.") from error
        finally:
            os.umask(mask)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
