"""What a run is looked at by: one row a round, one tally a device, and both as tables.

frame(row_columns(rows))                    # a pandas DataFrame, one line a round
write_parquet(device_columns(tallies), Path("participation.parquet"))
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from lepton_fl.errors import StateCorrupt
from lepton_fl.files import write_atomic
from lepton_fl.rounds.collect import ACCEPTED

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Columns = dict[str, list[Any]]  # name -> one value a line; None where there is none


@dataclass(frozen=True)
class Row:
    """One committed round."""

    round: int
    reports: int
    asked: int
    train_loss: float | None  # None: devices do not tell it, as in a private run
    metrics: Mapping[str, float]  # of the evaluation after it; empty if there was none
    outcomes: Mapping[str, int]  # of all attempts: accepted, surplus or a Rejection, and how often
    bytes_up: int  # from the devices
    bytes_down: int  # to the devices
    seconds: float  # wall time, training and evaluation
    attempts: int = 1
    time_s: float = 0.0  # virtual, from the start of the run to the commit
    round_s: float = 0.0  # virtual, since the commit before
    clipped: float | None = None  # share of the updates that were clipped; None: clipping is off
    clip_norm: float | None = None  # L2 bound of an update in this round
    epsilon: float | None = None  # spent up to and with this round; None: no privacy
    ring_bits: float | None = None  # of a coordinate of an update; None: updates are not quantised
    quantisation_error: float | None = None  # norm of the rounding over that of the sum, as expected
    measured_error: float | None = None  # of the mean, over its norm, as it was

    def metric(self, name: str) -> float | None:
        """The devices' figure if there is one, else the central one."""
        return self.metrics.get(name, self.metrics.get(f"central_{name}"))

    @property
    def traffic(self) -> int:
        """Bytes both ways."""
        return self.bytes_up + self.bytes_down

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read back what ``asdict`` wrote.

        Raises:
            StateCorrupt: it is not a row.
        """
        try:
            return cls(**body)
        except TypeError as error:
            raise StateCorrupt(f"{dict(body)!r:.80} is not a row ({error}).") from error


FIXED: Final = tuple(f.name for f in fields(Row) if f.name not in ("metrics", "outcomes"))


@dataclass
class Tally:
    """One device over a whole run; training only."""

    asked: int = 0  # attempts
    accepted: int = 0
    examples: int = 0  # of accepted updates
    bytes_up: int = 0
    bytes_down: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: str, examples: int, bytes_up: int, bytes_down: int) -> None:
        """Count one attempt."""
        self.asked += 1
        self.outcomes[outcome] += 1
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down
        if outcome == ACCEPTED:
            self.accepted += 1
            self.examples += examples


def row_columns(rows: Sequence[Row]) -> Columns:
    """One line a round: the fields of ``Row``, ``bytes_total`` so far, outcomes, metrics."""
    columns: Columns = {name: [getattr(row, name) for row in rows] for name in FIXED}
    columns["bytes_total"] = list(accumulate(row.traffic for row in rows))
    outcomes = sorted({name for row in rows for name in row.outcomes})
    columns |= {f"outcome_{name}": [row.outcomes.get(name, 0) for row in rows] for name in outcomes}
    names = sorted({name for row in rows for name in row.metrics} - columns.keys())
    return columns | {name: [row.metrics.get(name) for row in rows] for name in names}


def device_columns(tallies: Mapping[str, Tally]) -> Columns:
    """One line a device, by its id."""
    devices = sorted(tallies)
    outcomes = sorted({name for tally in tallies.values() for name in tally.outcomes})
    columns: Columns = {"device": devices}
    for name in ("asked", "accepted", "examples", "bytes_up", "bytes_down"):
        columns[name] = [getattr(tallies[device], name) for device in devices]
    for name in outcomes:
        columns[f"outcome_{name}"] = [tallies[device].outcomes[name] for device in devices]
    return columns


def frame(columns: Columns) -> "pd.DataFrame":
    """Columns as a pandas DataFrame; None becomes NaN in a column of numbers."""
    import pandas as pd

    return pd.DataFrame({name: _numbers(values) for name, values in columns.items()})


def _numbers(values: list[Any]) -> list[Any]:
    """Columns of numbers stay numbers where some, or all, are missing."""
    if all(value is None or isinstance(value, float) for value in values):
        return [float("nan") if value is None else value for value in values]
    return values


def table(columns: Columns) -> "pa.Table":
    """Columns as an Arrow table; a column without any value is one of floats."""
    import pyarrow as pa

    return pa.table(
        {
            name: pa.array(values, pa.float64() if all(v is None for v in values) and values else None)
            for name, values in columns.items()
        }
    )


def write_csv(columns: Columns, path: Path) -> None:
    """Replace a CSV file.

    Raises:
        DiskFull, StateError: it cannot be written; what was there is unchanged.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomic(path, text.getvalue().encode())


def write_parquet(columns: Columns, path: Path) -> None:
    """Replace a Parquet file.

    Raises:
        DiskFull, StateError: it cannot be written; what was there is unchanged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table(columns), sink)
    write_atomic(path, sink.getvalue().to_pybytes())
