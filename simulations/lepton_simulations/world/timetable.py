"""When devices can be reached.

    table = timetable(availability, device_ids, keys)
    there, until = table.at(now, rows)    # (k,) bool, (k,) seconds: when that changes next; inf = never

A window contains its start and not its end. ``until`` is always later than ``now``, so that a clock that
jumps from change to change arrives.
"""

import csv
from bisect import bisect_right
from collections.abc import Sequence
from math import floor, inf
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError
from lepton_simulations.world.config import Availability
from lepton_simulations.world.draws import Floats, Keys, uniform

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]
_COLUMNS = ["device", "start_s", "end_s"]


class Timetable(Protocol):
    """The windows of n devices."""

    def at(self, now: float, rows: Rows) -> tuple[Flags, Floats]:
        """Who of ``rows`` is there at ``now``, and when that changes next."""
        ...


def timetable(spec: Availability, device_ids: Sequence[str], keys: Keys) -> Timetable:
    """The timetable of devices of one class.

    Raises:
        ConfigError: a trace cannot be used.
    """
    if spec.kind == "daily":
        return Daily(spec, keys)
    if spec.kind == "charging":
        return Charging(spec, keys)
    if spec.kind == "trace":
        return Trace(read_trace(Path(spec.trace), spec.repeat_s), device_ids, spec)
    return Always()


class Always:
    """Nobody ever leaves."""

    def at(self, now: float, rows: Rows) -> tuple[Flags, Floats]:
        """Everybody, for ever."""
        return np.ones(len(rows), bool), np.full(len(rows), inf)


class Daily:
    """One window in each period, each device's shifted by a part of the period that is its own."""

    def __init__(self, spec: Availability, keys: Keys) -> None:
        self._period, self._length = spec.period_s, spec.on_fraction * spec.period_s
        self._offset = spec.start_s + spec.phase_spread * spec.period_s * uniform(keys, "phase")

    def at(self, now: float, rows: Rows) -> tuple[Flags, Floats]:
        """See ``Timetable``."""
        if self._length >= self._period:
            return Always().at(now, rows)
        number, begin = _period(now, self._offset[rows], self._period)
        end = begin + self._length
        there = now < end
        return there, np.where(there, end, self._offset[rows] + (number + 1) * self._period)


class Charging:
    """One window in each period; when it opens and how long it lasts is drawn anew for each."""

    def __init__(self, spec: Availability, keys: Keys) -> None:
        self._spec, self._keys = spec, keys
        self._offset = spec.start_s + spec.phase_spread * spec.period_s * uniform(keys, "phase")

    def at(self, now: float, rows: Rows) -> tuple[Flags, Floats]:
        """See ``Timetable``."""
        number, _ = _period(now, self._offset[rows], self._spec.period_s)
        start, end = self._window(rows, number)
        after, _ = self._window(rows, number + 1)
        there = (now >= start) & (now < end)
        return there, np.where(there, end, np.where(now < start, start, after))

    def _window(self, rows: Rows, number: Rows) -> tuple[Floats, Floats]:
        spec, keys = self._spec, self._keys[rows]
        late = spec.jitter_s * uniform(keys, "charging starts", counter=number)
        start = self._offset[rows] + number * spec.period_s + late
        longer = (spec.longest_s - spec.shortest_s) * uniform(keys, "charging lasts", counter=number)
        return start, start + spec.shortest_s + longer


def _period(now: float, offset: Floats, period: float) -> tuple[Rows, Floats]:
    """In which period each device is, and when that began; exact at the borders, whatever was rounded."""
    number = np.floor((now - offset) / period)
    number += now >= offset + (number + 1) * period
    number -= now < offset + number * period
    return number.astype(np.int64), offset + number * period


class Trace:
    """Windows from a file; a device that is not in it is never there."""

    def __init__(
        self, windows: dict[str, list[tuple[float, float]]], device_ids: Sequence[str], spec: Availability
    ) -> None:
        if not windows.keys() & set(device_ids):
            some = ", ".join(list(windows)[:3])
            raise ConfigError(
                f"The trace {spec.trace} is about none of the fleet's devices.",
                hint=f"It names {some}; the devices are {', '.join(list(device_ids)[:3])}, ...",
            )
        self._windows = [windows.get(d, []) for d in device_ids]
        self._starts = [[start for start, _ in w] for w in self._windows]
        self._repeat = spec.repeat_s

    def at(self, now: float, rows: Rows) -> tuple[Flags, Floats]:
        """See ``Timetable``."""
        base = floor(now / self._repeat) * self._repeat if self._repeat else 0.0
        seen = [self._one(int(row), now, base) for row in rows]
        return np.array([there for there, _ in seen], bool), np.array([until for _, until in seen])

    def _one(self, row: int, now: float, base: float) -> tuple[bool, float]:
        windows = self._windows[row]
        place = bisect_right(self._starts[row], now - base)
        if place and now < base + windows[place - 1][1]:
            return True, base + windows[place - 1][1]
        if place < len(windows) and base + windows[place][0] > now:
            return False, base + windows[place][0]
        if self._repeat and windows:
            return False, base + self._repeat + windows[0][0]
        return False, inf


def read_trace(path: Path, repeat_s: float = 0.0) -> dict[str, list[tuple[float, float]]]:
    """Read a CSV file with the columns device, start_s, end_s.

    Args:
        path: of the file.
        repeat_s: no window may end later, if this is not 0.

    Returns:
        device -> its windows in order; windows that touch are one.

    Raises:
        ConfigError: names the first line that is wrong.
    """
    windows: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if [name.strip() for name in header] != _COLUMNS:
                raise ConfigError(f"{path}:1: expected the columns {', '.join(_COLUMNS)}, got {header}.")
            for fields in lines:
                if fields:
                    device, window = _line(fields, f"{path}:{lines.line_num}", repeat_s)
                    windows.setdefault(device, []).append(window)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"The trace {path} cannot be read: {error}.") from error
    if not windows:
        raise ConfigError(f"The trace {path} holds no window.")
    return {device: _in_order(device, found, path) for device, found in windows.items()}


def _line(fields: list[str], where: str, repeat_s: float) -> tuple[str, tuple[float, float]]:
    if len(fields) != len(_COLUMNS):
        raise ConfigError(f"{where}: expected {len(_COLUMNS)} columns, got {len(fields)}.")
    try:
        start, end = float(fields[1]), float(fields[2])
    except ValueError:
        raise ConfigError(f"{where}: {fields[1]!r} and {fields[2]!r} must be numbers.") from None
    if not 0 <= start < end < inf:
        raise ConfigError(f"{where}: expected 0 <= start_s < end_s, got {start:g} and {end:g}.")
    if repeat_s and end > repeat_s:
        raise ConfigError(f"{where}: end_s = {end:g} exceeds repeat_s = {repeat_s:g}.")
    return fields[0].strip(), (start, end)


def _in_order(device: str, found: list[tuple[float, float]], path: Path) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            raise ConfigError(f"{path}: device {device!r} has windows that overlap at {start:g} s.")
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
