"""What a device remembers of a run between its rounds: SCAFFOLD's control, a personal head.

A device's memory follows the run, not the device's own work: what an attempt left behind becomes effective
only when a later request says that this very attempt has become part of the model, and only if its answer
got through. An attempt that was refused, lost, abandoned or late leaves no trace, so that the server's
control stays the mean of the devices' controls.

    held = memory.recall("run", request.counted)     # {} at first
    memory.keep("run", 3, 1, {"control": control})    # what round 3, attempt 1, leaves behind

``VolatileMemory`` here is the reference, and what tests use; ``lepton_client.memory`` keeps files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from lepton_fl.errors import StateCorrupt
from lepton_fl.vector import Vector

CONTROL: Final = "control"  # (P,) float32: c_i of SCAFFOLD
PERSONAL: Final = "personal"  # (n,) float32: the personal coordinates, in the order of the layout

Counted = Callable[[int, int], bool]  # (round, attempt) -> whether it became part of the model


class Memory(Protocol):
    """One device's memory of its runs."""

    def recall(self, run_id: str, counted: Counted) -> Mapping[str, Vector]:
        """What is effective now; decides first what becomes of the last attempt's.

        Raises:
            StateError: it cannot be read.
        """
        ...

    def keep(self, run_id: str, round_number: int, attempt: int, vectors: Mapping[str, Vector]) -> None:
        """Keep what an attempt leaves behind, aside from what is effective.

        Raises:
            StateError, DiskFull: it cannot be written; the old memory is unchanged.
        """
        ...


@dataclass
class _Run:
    settled: Mapping[str, Vector] = field(default_factory=dict)
    left: Mapping[str, Vector] = field(default_factory=dict)
    attempt: tuple[int, int] | None = None  # that ``left`` is of


class VolatileMemory:
    """A memory that ends with the process."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def recall(self, run_id: str, counted: Counted) -> Mapping[str, Vector]:
        """See ``Memory``."""
        run = self._runs.setdefault(run_id, _Run())
        if run.attempt is not None and counted(*run.attempt):
            run.settled = run.left
        run.left, run.attempt = {}, None
        return run.settled

    def keep(self, run_id: str, round_number: int, attempt: int, vectors: Mapping[str, Vector]) -> None:
        """See ``Memory``."""
        run = self._runs.setdefault(run_id, _Run())
        run.left = {name: vector.copy() for name, vector in vectors.items()}
        run.attempt = (round_number, attempt)

    def refused(self, run_id: str) -> None:
        """The last answer did not count."""
        if run := self._runs.get(run_id):
            run.left, run.attempt = {}, None


def remembered(held: Mapping[str, Vector], name: str, size: int) -> Vector | None:
    """One vector of a memory, None if it holds none.

    Raises:
        StateCorrupt: it has another size, or holds a number that is not finite.
    """
    vector = held.get(name)
    if vector is None:
        return None
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise StateCorrupt(
            f"The device's {name} is {vector.dtype}{vector.shape}, expected {size} finite numbers.",
            hint="The task changed under a run, or the device's memory was damaged; start a new run.",
        )
    return vector
