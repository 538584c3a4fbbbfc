"""May this device take part now? The owner's rules, each with the value it saw.

Example::

    reason = first_objection(rules, Path(state_dir), datetime.now())   # "" = eligible
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, time
from pathlib import Path
from typing import Protocol

import psutil

from lepton_client.config import EligibilitySection


class Battery(Protocol):
    """What psutil says of a battery."""

    percent: float
    power_plugged: bool | None


class Machine:
    """What the operating system tells; tests pass their own."""

    def load_per_cpu(self) -> float:
        """The 1-minute load average divided by the number of CPUs."""
        return os.getloadavg()[0] / (os.cpu_count() or 1)

    def free_memory(self) -> int:
        """Bytes that could be used without swapping."""
        return int(psutil.virtual_memory().available)

    def free_disk(self, folder: Path) -> int:
        """Bytes left for this user where ``folder`` is."""
        return shutil.disk_usage(folder).free

    def battery(self) -> Battery | None:
        """The battery, or None where there is none (or no way to tell)."""
        reader: Callable[[], Battery | None] | None = getattr(psutil, "sensors_battery", None)
        return reader() if reader else None


def first_objection(
    rules: EligibilitySection, state_dir: Path, now: datetime, machine: Machine | None = None
) -> str:
    """The first rule that forbids taking part, with its value and bound; '' when none does.

    Args:
        rules: The owner's.
        state_dir: Whose file system must have room.
        now: Local time.
        machine: Where values come from; None = this machine.
    """
    return next(_objections(rules, state_dir, now, machine or Machine()), "")


def _objections(rules: EligibilitySection, state_dir: Path, now: datetime, machine: Machine) -> Iterator[str]:
    """Cheap rules first; the owner's command last."""
    if rules.windows and not any(in_window(window, now.time()) for window in rules.windows):
        yield f"time {now:%H:%M} is outside {', '.join(rules.windows)}"
    yield from _power(rules, machine)
    if rules.max_load and (load := machine.load_per_cpu()) > rules.max_load:
        yield f"load per CPU {load:.2f} exceeds max_load {rules.max_load:g}"
    if rules.min_free_memory and (free := machine.free_memory()) < rules.min_free_memory:
        yield f"free memory {_mib(free)} is below min_free_memory {_mib(rules.min_free_memory)}"
    if rules.min_free_disk:
        yield from _disk(rules.min_free_disk, state_dir, machine)
    if rules.command:
        yield from _command(rules.command, rules.command_timeout_s)


def disk_objection(rules: EligibilitySection, state_dir: Path, machine: Machine) -> str:
    """The same of the disk alone, which is a fault rather than a wish of the owner."""
    return next(_disk(rules.min_free_disk, state_dir, machine), "") if rules.min_free_disk else ""


def in_window(window: str, at: time) -> bool:
    """Whether a local time lies in ``HH:MM-HH:MM``; the end is not part of it; midnight may be crossed."""
    start, end = (time.fromisoformat(part) for part in window.split("-"))
    return start <= at < end if start < end else at >= start or at < end


def _power(rules: EligibilitySection, machine: Machine) -> Iterator[str]:
    if not (rules.on_ac_power_only or rules.min_battery):
        return
    battery = machine.battery()
    if battery is None or battery.power_plugged:
        return
    if rules.on_ac_power_only:
        yield f"on battery at {battery.percent:.0f} %, on_ac_power_only is set"
    if battery.percent < rules.min_battery:
        yield f"battery at {battery.percent:.0f} % is below min_battery {rules.min_battery:g} %"


def _disk(least: int, folder: Path, machine: Machine) -> Iterator[str]:
    try:
        free = machine.free_disk(folder)
    except OSError as error:
        yield f"the state folder {folder} cannot be used: {error.strerror}"
        return
    if free < least:
        yield f"{_mib(free)} left on the disk of {folder} is below min_free_disk {_mib(least)}"


def _command(command: tuple[str, ...], timeout_s: float) -> Iterator[str]:
    """Run the owner's program in its own session, so that its children die with it."""
    try:
        process = subprocess.Popen(  # noqa: S603 - the owner's own program, from the owner's own file
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        yield f"the eligibility command {command[0]} cannot be started: {error}"
        return
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        yield f"the eligibility command {command[0]} took longer than {timeout_s:g} s"
        return
    if code != 0:
        yield f"the eligibility command {command[0]} said no (exit code {code})"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
