"""What a task expects of a device's raw data, and the check that runs before any training.

The check looks at the rows as the device's owner stores them, before the task's own preprocessing, so
that a message speaks of values and columns the owner knows. It refuses the first thing it finds, in the
order empty, shape, dtype, missing values, range, targets.

    contract = DataContract(shape=(8, 8), low=0, high=16, num_classes=10)
    report = check(contract, Dataset(x, y))  # or DataContractError
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lepton_fl.errors import DataContractError
from lepton_fl.tasks.data import Array, Dataset

Bound = float | tuple[float, ...]  # one for all values, or one per entry of the last axis

_LARGEST = float(np.finfo(np.float32).max)  # models compute in float32

# Which numpy kinds of array each declared dtype takes: b(ool), i(nt), u(nsigned), f(loat).
_KINDS = {"float": "biuf", "int": "iu", "uint8": "u"}


@dataclass(frozen=True)
class DataContract:
    """What raw rows must look like.

    Raises:
        ValueError: the contract contradicts itself.
    """

    shape: tuple[int, ...]  # of one row of x
    dtype: Literal["float", "int", "uint8"] = "float"
    low: Bound = -_LARGEST  # smallest value allowed; a tuple gives one per entry of the last axis
    high: Bound = _LARGEST
    columns: tuple[str, ...] = ()  # names of the entries of the last axis
    missing: Literal["refuse", "allow"] = "refuse"  # NaN in x; the task's transform must impute them
    num_classes: int = 0  # 0 = the target is a number
    class_names: tuple[str, ...] = ()  # of classes 0, 1, ...; empty = "0", "1", ...
    target: str = "target"  # the target's name
    target_shape: tuple[int, ...] = ()  # of one row of y
    target_low: float = -_LARGEST  # of a number
    target_high: float = _LARGEST
    min_rows: int = 1

    def __post_init__(self) -> None:
        width = self.shape[-1] if self.shape else 0
        for name in ("low", "high", "columns"):
            value = getattr(self, name)
            if isinstance(value, tuple) and value and len(value) != width:
                raise ValueError(f"{name} has {len(value)} entries for a last axis of {width}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if self.missing == "allow" and self.dtype != "float":
            raise ValueError("only float inputs can be missing")
        if self.min_rows < 1:
            raise ValueError(f"min_rows={self.min_rows} must be at least 1")


@dataclass(frozen=True)
class ContractReport:
    """What was seen in data that keep their contract."""

    rows: int
    missing: int  # NaN values in x
    low: float  # smallest value of x that is not missing
    high: float
    class_counts: tuple[int, ...]  # empty for a regression


def check(contract: DataContract, data: Dataset) -> ContractReport:
    """Check raw data against the contract.

    Args:
        contract: what is expected.
        data: raw rows, before the task's transform.

    Raises:
        DataContractError: naming the value, the bound, and the row and column of the first offence.
    """
    if len(data) < contract.min_rows:
        raise DataContractError(
            f"The data have {len(data)} rows, the task needs at least {contract.min_rows}.",
            hint="Collect more data, or point this device at another source.",
        )
    _check_layout("x", data.x, contract.shape, contract.dtype)
    missing, low, high = _check_inputs(contract, data.x)
    counts = _check_classes(contract, data.y) if contract.num_classes else _check_numbers(contract, data.y)
    return ContractReport(len(data), missing, low, high, counts)


def _check_layout(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape[1:] != shape:
        raise DataContractError(
            f"One row of {name} has shape {array.shape[1:]}, the task expects {shape}.",
            hint="Check the columns of the source, or the size of its images.",
        )
    if array.dtype.kind not in _KINDS[dtype] or (dtype == "uint8" and array.dtype != np.uint8):
        raise DataContractError(
            f"{name} has the type {array.dtype}, the task expects {dtype}.",
            hint="Convert the source; a text column read as a number is a usual cause.",
        )


def _check_inputs(contract: DataContract, x: Array) -> tuple[int, float, float]:
    """Missing values and the range; returns the number of missing values, the minimum and the maximum."""
    missing = 0
    if x.dtype.kind == "f":
        missing = _check_finite(contract, x)
        if missing == x.size:
            raise DataContractError("Every value of x is missing.", hint="Check the columns of the source.")
    bounds = np.asarray(contract.low), np.asarray(contract.high)
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    if low < bounds[0].max() or high > bounds[1].min():  # only then can any single value be outside
        _check_range(contract, x, *bounds)
    return missing, low, high


def _check_finite(contract: DataContract, x: Array) -> int:
    if np.isfinite(x).all():
        return 0
    infinite = np.isinf(x)
    if infinite.any():
        _refuse_input(contract, x, infinite, "the task takes finite numbers only")
    absent = np.isnan(x)
    if contract.missing == "refuse":
        _refuse_input(contract, x, absent, "the task takes no missing values")
    return int(absent.sum())


def _check_range(contract: DataContract, x: Array, low: Array, high: Array) -> None:
    outside = (x < low) | (x > high)  # false for NaN
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        column = place[-1]
        floor, ceiling = (float(b[column]) if b.ndim else float(b) for b in (low, high))
        _refuse_input(contract, x, outside, f"the task allows {floor:g} to {ceiling:g}")


def _refuse_input(contract: DataContract, x: Array, bad: Array, rule: str) -> None:
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    where = f"row {place[0]}"
    if contract.columns:
        where += f", column {contract.columns[place[-1]]!r}"
    elif len(place) > 1:
        where += f", position {place[1:]}"
    raise DataContractError(
        f"The value at {where} is {float(x[place]):g}; {rule} ({int(bad.sum())} of {x.size} values fail).",
        hint="Check the unit and the sensor behind this column, and remove or repair such rows.",
    )


def _check_classes(contract: DataContract, y: Array) -> tuple[int, ...]:
    _check_layout(contract.target, y, contract.target_shape, "int")
    outside = (y < 0) | (y >= contract.num_classes)
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise DataContractError(
            f"The target {contract.target!r} of row {place[0]} is {int(y[place])}, "
            f"the task has classes 0 to {contract.num_classes - 1}.",
            hint="Labels must be whole numbers that count from 0.",
        )
    return tuple(np.bincount(y.reshape(-1), minlength=contract.num_classes).tolist())


def _check_numbers(contract: DataContract, y: Array) -> tuple[int, ...]:
    _check_layout(contract.target, y, contract.target_shape, "float")
    inside = (y >= contract.target_low) & (y <= contract.target_high) & np.isfinite(y)  # false for NaN
    if not inside.all():
        place = tuple(int(i) for i in np.argwhere(~inside)[0])
        raise DataContractError(
            f"The target {contract.target!r} of row {place[0]} is {float(y[place]):g}, "
            f"the task allows {contract.target_low:g} to {contract.target_high:g}.",
            hint="A target must be known and in the unit the task asks for; remove rows without one.",
        )
    return ()
