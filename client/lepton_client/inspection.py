"""Are the data good for the task? Answered by a short-lived child process.

Loading a task and its data takes numpy and often more, and a file may crash its reader; the agent stays
light and alive. The child is this module run with ``python -m``; it reads one task section as JSON from
standard input and writes one finding as JSON to the descriptor that was standard output.

    finding = inspect(section, timeout_s=600)
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

from lepton_client.config import TaskSection
from lepton_client.fingerprint import fingerprint
from lepton_fl.errors import LeptonError

TIMEOUT_S: Final = 600.0
MAX_REASON: Final = 500  # characters that the coordinator takes


@dataclass(frozen=True)
class Finding:
    """What is known of one allowed task on this device."""

    name: str  # package.module:attribute once it is known, else as configured
    version: str = ""
    ready: bool = False
    reason: str = ""  # why not, with what to do about it
    rows: int = 0
    seconds: float = 0.0
    checked: bool = True  # False: nothing is known yet

    @property
    def short_reason(self) -> str:
        """As it goes to the coordinator."""
        return self.reason[:MAX_REASON]


def inspect(section: TaskSection, timeout_s: float = TIMEOUT_S) -> Finding:
    """Check one task's data in a child process; every failure becomes the finding's reason."""
    unknown = Finding(section.reference)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lepton_client.inspection"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            out, _ = process.communicate(section.model_dump_json().encode(), timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return replace(unknown, reason=f"The contract check took longer than {timeout_s:g} s.")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    try:
        return Finding(**json.loads(out))
    except (ValueError, TypeError):
        return replace(
            unknown, reason=f"The contract check ended with code {process.returncode} and no result."
        )


class Inspector:
    """Keeps a finding for every allowed task up to date, in the background."""

    def __init__(
        self,
        sections: tuple[TaskSection, ...],
        changed: Callable[[], None],
        check: Callable[[TaskSection], Finding] = inspect,
    ) -> None:
        """Nothing is checked yet; ``changed`` is called from another thread after each round of checks."""
        self._sections, self._changed, self._check = sections, changed, check
        self._findings = [
            Finding(s.reference, reason="The data are being checked.", checked=False) for s in sections
        ]
        self._seen: list[tuple[object, ...] | None] = [None] * len(sections)
        self._thread: threading.Thread | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """As last known."""
        return tuple(self._findings)

    @property
    def running(self) -> bool:
        """Whether a check is under way."""
        return self._thread is not None and self._thread.is_alive()

    def refresh(self) -> None:
        """Start a check of whatever changed since the last one; returns at once."""
        if self.running:
            return
        stale = [i for i, section in enumerate(self._sections) if self._seen[i] != fingerprint(section)]
        if stale:
            self._thread = threading.Thread(
                target=self._run, args=(stale,), name="lepton-inspector", daemon=True
            )
            self._thread.start()

    def distrust(self) -> None:
        """Check everything again at the next refresh: a round found something wrong."""
        self._seen = [None] * len(self._sections)

    def _run(self, stale: list[int]) -> None:
        for i in stale:
            section = self._sections[i]
            seen = fingerprint(section)  # taken first: a change while we look is looked at again
            try:
                self._findings[i] = self._check(section)
            except OSError as error:  # no process could be started; the next refresh tries again
                reason = f"The contract check cannot be started: {error.strerror}."
                self._findings[i] = Finding(section.reference, reason=reason)
                continue
            self._seen[i] = seen
        self._changed()


def examine(section: TaskSection) -> Finding:
    """Check one task's data in this process."""
    from time import perf_counter

    began = perf_counter()
    finding = Finding(section.reference)
    try:
        from lepton_client.material import load_material, load_section_task, name_of

        finding = replace(finding, name=name_of(section))
        task = load_section_task(section)
        finding = replace(finding, version=task.version)
        material = load_material(task, section)
    except LeptonError as error:
        reason = f"{error} {error.hint}".strip()
        return replace(finding, reason=reason, seconds=perf_counter() - began)
    except Exception as error:  # noqa: BLE001 - a user's task or reader may raise anything; it is the finding
        reason = f"The task raised {type(error).__name__}: {error}"
        return replace(finding, reason=reason, seconds=perf_counter() - began)
    return replace(finding, ready=True, rows=len(material.train), seconds=perf_counter() - began)


def main() -> None:
    """The child process."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a task prints is not our answer
    section = TaskSection.model_validate_json(sys.stdin.buffer.read())
    with os.fdopen(answer, "wb") as out:
        out.write(json.dumps(asdict(examine(section))).encode())


if __name__ == "__main__":
    main()
