"""Has releases brought into service, by a child process that lives as long as a download.

What verifies, fetches and tries a release takes memory, and a release may crash what loads it; the agent
stays light and alive. The child is this module run with ``python -m``; it reads one order as JSON from
standard input, does one ``deliver``, and writes one outcome as JSON to the descriptor that was standard
output. It ends when its standard input does: no agent, no download.

    courier.want(answer.desired_json)     # kept on disk, then acknowledged
    courier.refresh()                     # starts the child if there is something to do; returns at once
    request.serving.CopyFrom(courier.report())

A kill at any moment harms nothing: see ``lepton_fl.delivery.slots``.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from lepton_client.backoff import Backoff
from lepton_client.clock import Clock
from lepton_client.config import ClientConfig
from lepton_client.eligibility import in_window
from lepton_client.link import Link
from lepton_client.state import COUNTED, GIVEN_UP, StateDir, given_up
from lepton_client.trials import Trials, asked_about
from lepton_fl.errors import LeptonError, StateError
from lepton_fl.files import make_private_folder, remove, write_private
from lepton_fl.wire.v1 import device_pb2 as pb

if TYPE_CHECKING:
    from lepton_fl.delivery.deliver import Outcome
    from lepton_fl.delivery.slots import Slots

log = logging.getLogger(__name__)

MAX_DESIRED: Final = 64 * 1024  # bytes of a desired state
RETRY_MAX_S: Final = 3600.0  # between two tries of a delivery that may still succeed
SELF_TEST_S: Final = 300.0  # patience with a self-test
STOP_S: Final = 5.0  # patience with a child that was asked to end

Outcomes = dict[str, Any]


class Courier:
    """The agent's side; its methods are called by one thread, but for ``_run``."""

    def __init__(
        self, config: ClientConfig, state: StateDir, clock: Clock, changed: Callable[[], None]
    ) -> None:
        """Nothing starts yet; ``changed`` is called from another thread when a delivery has ended."""
        self._config, self._folder, self._clock, self._changed = config, state.delivery, clock, changed
        self._desired = _read_text(self._folder / "desired.json")
        self._task = _full_name(config.delivery.task)
        self._trials = Trials(state.trials, config.trial)
        self._backoff = Backoff(config.delivery.retry_min_s, RETRY_MAX_S)
        self._due = 0.0  # clock seconds
        self._outcome: Outcomes = {}
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def acknowledged(self) -> str:
        """SHA-256 (hex) of the desired state that is kept here; empty = none."""
        return hashlib.sha256(self._desired.encode()).hexdigest() if self._desired else ""

    def want(self, desired: str) -> None:
        """Take in what the operator wants.

        Raises:
            DiskFull, StateError: It could not be kept; it is told again.
        """
        if not self._task or not desired or desired == self._desired or len(desired) > MAX_DESIRED:
            return
        make_private_folder(self._folder)
        write_private(self._folder / "desired.json", desired.encode())
        self._desired, self._outcome, self._due = desired, {}, 0.0
        self._backoff.reset()

    def refresh(self) -> None:
        """Start a delivery if one is due; returns at once."""
        if self._stopping or (self._thread is not None and self._thread.is_alive()):
            return
        if not self._task or self._clock.now() < self._due or not self._has_work():
            return
        if windows_objection(self._config.delivery.windows, self._clock.wall()):
            return
        self._thread = threading.Thread(target=self._run, name="lepton-courier", daemon=True)
        self._thread.start()

    def _has_work(self) -> bool:
        wanted = _release(self._desired)
        record = _read_json(self._folder / "record.json")
        bad = given_up(self._folder).get("release")
        if bad and bad == record.get("current") and not _is_noted(record, bad):
            return True
        if not wanted:
            return False
        if wanted == self.serving:
            return self._is_asked() and not self._outcome.get("tried")
        refused = self._outcome.get("state") == "refused" and self._outcome.get("wanted") == wanted
        return not refused

    def _is_asked(self) -> bool:
        """Whether something is asked of the release in service that was not answered."""
        return self._may_try and asked_about(self._desired) is not None and not self._said().word

    @property
    def _may_try(self) -> bool:
        return bool(self._task) and self._config.trial.budget > 0

    def _said(self) -> pb.Trial:
        """What this device says of the release in service; empty where nothing is asked or said."""
        asked = asked_about(self._desired)
        if not self._may_try or asked is None or asked.release != self.serving:
            return pb.Trial()
        try:
            word = self._trials.word(asked.release, asked.digest)
        except StateError as error:
            log.error("%s %s", error, error.hint)
            return pb.Trial()
        return pb.Trial(release=asked.release, question=asked.digest, word=word) if word else pb.Trial()

    @property
    def serving(self) -> str:
        """The release in service; empty = none."""
        return str(_read_json(self._folder / "record.json").get("current") or "")

    def report(self) -> pb.Serving:
        """What the coordinator is told."""
        failures = _read_json(self._folder / "record.json").get("failures") or []
        failed = [
            pb.FailedRelease(release=f["manifest"], fault=f["fault"], detail=f["detail"][:500], final=True)
            for f in failures
        ]
        out = self._outcome
        if out.get("state") == "waiting" and out.get("fault"):
            failed.append(
                pb.FailedRelease(release=out["wanted"], fault=out["fault"], detail=out["detail"][:500])
            )
        return pb.Serving(
            task=self._task,
            profile=self._config.delivery.profile,
            release=self.serving,
            failed=failed,
            trials=self._may_try,
        )

    def trial(self) -> pb.Trial | None:
        """What the coordinator is told of the release in service; randomised. None = nothing."""
        said = self._said()
        return said if said.word else None

    def service(self) -> pb.Service:
        """What the serving process counted for the release in service."""
        told = _read_json(self._folder / COUNTED)
        if not self._task or not told or told.get("release") != self.serving:
            return pb.Service()
        return pb.Service(
            release=told["release"],
            requests=told["requests"],
            errors=told["errors"],
            p95_ms=told["p95_ms"],
        )

    def status(self) -> dict[str, Any]:
        """What ``lepton client status`` shows."""
        out = self._outcome
        running = self._thread is not None and self._thread.is_alive()
        return {
            "task": self._task,
            "serving": self.serving,
            "wanted": _release(self._desired),
            "state": "at work" if running else out.get("state", ""),
            "fault": out.get("fault") or "",
            "detail": out.get("detail", ""),
        }

    def stop(self) -> None:
        """End a delivery that is under way; what was fetched stays."""
        self._stopping = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if self._thread is not None:
            self._thread.join(STOP_S + 1)

    # --- the delivery's thread --------------------------------------------------------------------

    def _run(self) -> None:
        order = json.dumps({"config": self._config.model_dump(mode="json"), "desired": self._desired})
        try:
            outcome = self._deliver(order)
        except OSError as error:
            outcome = _trouble(f"The delivery cannot be started: {error.strerror}.")
        self._outcome = outcome | {"wanted": outcome.get("wanted") or _release(self._desired)}
        self._due = 0.0
        if outcome["state"] == "waiting":
            self._due = self._clock.now() + self._backoff.next()
        else:
            self._backoff.reset()
        if not self._stopping:
            _tell(self._outcome)
            self._changed()

    def _deliver(self, order: str) -> Outcomes:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._config.limits.threads)}
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "lepton_client.courier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        if self._stopping:
            process.terminate()
        with process:
            assert process.stdin is not None, "it was asked for"
            assert process.stdout is not None, "it was asked for"
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(order.encode() + b"\n")
                process.stdin.flush()  # and it stays open: that is how the child knows that we live
            out = process.stdout.read()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._process = None
        try:
            return dict(json.loads(out))
        except (ValueError, TypeError):
            return _trouble(f"The delivery ended with code {process.returncode} and no result.")


def windows_objection(windows: Sequence[str], wall: float) -> str:
    """'' while downloads are allowed, else why not."""
    at = datetime.fromtimestamp(wall).astimezone().time()
    if not windows or any(in_window(window, at) for window in windows):
        return ""
    return f"time {at:%H:%M} is outside {', '.join(windows)}"


def _is_noted(record: dict[str, Any], release: str) -> bool:
    return any(failure["manifest"] == release for failure in record.get("failures") or [])


def _trouble(detail: str) -> Outcomes:
    return {"state": "waiting", "fault": None, "detail": detail}


def _tell(outcome: Outcomes) -> None:
    name, state, detail = outcome["wanted"][:12], outcome["state"], outcome["detail"]
    if state == "serving":
        fetched, kept = outcome.get("fetched", 0), outcome.get("kept", 0)
        log.info("release %s is in service (%d bytes fetched, %d were here)", name, fetched, kept)
    elif state == "refused":
        log.error("release %s is given up (%s): %s", name, outcome["fault"], detail)
    elif state == "waiting":
        log.warning("release %s is not in service yet (%s): %s", name, outcome["fault"] or "waiting", detail)


def _full_name(task: str) -> str:
    """``package.module:attribute`` of a task; nothing is imported."""
    found = entry_points(group="lepton.tasks", name=task) if task else ()
    return next((entry.value for entry in found), task)


def _release(desired: str) -> str:
    """The release that a desired state names; what is none is found out by the child."""
    try:
        return str(json.loads(desired)["release"]["manifest"]) if desired else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # it is told again


def _read_json(path: Path) -> dict[str, Any]:
    """One of the small files of a delivery; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- the child process --------------------------------------------------------------------------------


class Stopped(BaseException):
    """Somebody wants this process to end."""


class _Coordinator:
    """``lepton_fl.delivery.trust.Source`` over the device service."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def metadata(self, name: str) -> bytes:
        return self._link.fetch_metadata(name)

    def chunks(self, names: Sequence[str]) -> Iterator[bytes]:
        return self._link.fetch_chunks(names)


def carry_out(config: ClientConfig, desired: str) -> "Outcome":
    """One delivery in this process.

    Raises:
        LeptonError: This device's own state cannot be used.
    """
    from lepton_client.trial import answer
    from lepton_fl.delivery.deliver import Device, deliver
    from lepton_fl.delivery.fetch import Limits
    from lepton_fl.delivery.slots import Slots
    from lepton_fl.delivery.trust import TrustStore
    from lepton_fl.files import read_private
    from lepton_fl.tasks import resolve

    state, section = StateDir(config.client.state_dir), config.delivery
    slots = Slots(state.delivery)
    _retreat_if_needed(slots, desired)
    identity = state.identity()
    limits = Limits(
        bytes_per_s=section.bytes_per_s,
        quota_bytes=section.quota_bytes,
        min_free_bytes=section.min_free_bytes,
        objection=lambda: windows_objection(section.windows, datetime.now().timestamp()),
    )
    pair = read_private(state.key), identity.certificate_pem.encode()
    timeout_s = config.connection.timeout_s
    with Link(identity.device_service, identity.ca_pem.encode(), identity=pair, timeout_s=timeout_s) as link:
        source = _Coordinator(link)
        trust = TrustStore(state.delivery / "metadata", lambda: _pinned(config, state, source))
        device = Device(slots, trust, source, resolve(section.task), limits, self_test, section.profile)
        outcome = deliver(device, desired)
    if outcome.state == "serving":
        answer(config, state, slots, desired)
    return outcome


def _retreat_if_needed(slots: "Slots", desired: str) -> None:
    """Take a release out of service that the serving process has given up; what is told once is forgotten."""
    from lepton_fl.delivery.deliver import retreat
    from lepton_fl.errors import Fault

    told = given_up(slots.folder)
    if not told:
        return
    name, words = str(told.get("release")), str(told.get("detail"))
    fault = Fault(told["fault"]) if told.get("fault") in list(Fault) else Fault.CRASHED
    alone = name == slots.record().current and not retreat(slots, name, fault, words, desired)
    log.warning("release %s cannot be served: %s", name[:12], words)
    if not alone:  # else the serving process must not try it for ever
        remove(slots.folder / GIVEN_UP)


def _pinned(config: ClientConfig, state: StateDir, source: _Coordinator) -> bytes:
    """The first root: the owner's file, or the one that was pinned when this device first asked."""
    if (given := config.delivery.root) is not None:
        try:
            return given.read_bytes()
        except OSError as error:
            from lepton_fl.errors import ConfigError

            raise ConfigError(f"delivery.root: {given} cannot be read: {error.strerror}.") from error
    path = state.delivery / "root.json"
    if not path.exists():
        from lepton_fl.delivery.trust import check_root

        first = source.metadata("1.root.json")
        check_root(first)
        write_private(path, first)
        digest = hashlib.sha256(first).hexdigest()
        log.warning("pinned the root of releases that the coordinator shows, SHA-256 %s", digest)
    return path.read_bytes()


def self_test(folder: Path) -> None:
    """Try a release in a process of its own; raises ReleaseRefused or SelfTestCrashed."""
    from lepton_fl.delivery.deliver import SelfTestCrashed
    from lepton_fl.errors import Fault, ReleaseRefused

    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "lepton_client.selftest", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            out, _ = process.communicate(timeout=SELF_TEST_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SelfTestCrashed(f"it took longer than {SELF_TEST_S:g} s") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    try:
        verdict = json.loads(out)
        fault = Fault(verdict["fault"]) if verdict["fault"] else None
    except (ValueError, KeyError, TypeError):
        raise SelfTestCrashed(f"its process ended with code {process.returncode}") from None
    if fault is not None:
        raise ReleaseRefused(fault, str(verdict["detail"]))


def _end(*_: object) -> NoReturn:
    raise Stopped


def _watch_parent() -> None:
    """End when the agent does: its end of our standard input then closes."""
    sys.stdin.buffer.read()
    threading.Timer(STOP_S, os._exit, [1]).start()  # also when the main thread is deep in a call
    signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """The child process."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the agent decides
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not our answer
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_watch_parent, daemon=True).start()
    config = ClientConfig.model_validate(order["config"])
    from lepton_client.limits import apply_limits
    from lepton_fl.logs import configure

    configure(config.log.level, config.log.format)
    apply_limits(config.limits)
    try:
        made = carry_out(config, order["desired"])
    except LeptonError as error:
        text = f"{error} {error.hint}".strip()
        outcome = _trouble(text)
    except Stopped:
        os._exit(0)
    else:
        outcome = {
            "state": made.state,
            "wanted": made.wanted,
            "fault": made.fault,
            "detail": made.detail,
            "fetched": made.tally.fetched,
            "kept": made.tally.kept,
            "tried": made.state == "serving",
        }
    with os.fdopen(answer, "wb") as out:
        out.write(json.dumps(outcome).encode())
    sys.stderr.flush()
    os._exit(0)  # the watching thread must not keep us


if __name__ == "__main__":
    main()
