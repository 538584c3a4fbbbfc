"""A node's memory of a run on any Flower deployment: the ``state`` of its ``Context``, which stays local.

Flower keeps it for as long as the node is connected. A node that is restarted begins anew: with SCAFFOLD its
control is then zero, and the server's control no longer exactly the mean of the nodes'; ``lepton client``
keeps files instead.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from lepton_fl.errors import StateCorrupt, UpdateRejected
from lepton_fl.training.memory import Counted
from lepton_fl.vector import Vector
from lepton_strategies.records import from_record_dict, to_array_record

if TYPE_CHECKING:
    from flwr.app import Context

RUN: Final = "lepton.run"  # which run the other records are of
SETTLED: Final = "lepton.settled"
LEFT: Final = "lepton.left"  # by the last attempt, aside
ATTEMPT: Final = "lepton.attempt"  # that it was


class ContextMemory:
    """Implements ``training.memory.Memory``; a reply that Flower loses is taken for one that counted."""

    def __init__(self, context: "Context") -> None:
        self._state = context.state

    def recall(self, run_id: str, counted: Counted) -> Mapping[str, Vector]:
        """See ``Memory``."""
        self._begin(run_id)
        attempt = self._state.config_records.get(ATTEMPT)
        if attempt is not None and counted(_integer(attempt["round"]), _integer(attempt["attempt"])):
            self._state[SETTLED] = self._state[LEFT]
        self._forget(LEFT, ATTEMPT)
        return self._vectors(SETTLED)

    def keep(self, run_id: str, round_number: int, attempt: int, vectors: Mapping[str, Vector]) -> None:
        """See ``Memory``."""
        from flwr.app import ConfigRecord

        self._begin(run_id)
        self._state[LEFT] = to_array_record(vectors)
        self._state[ATTEMPT] = ConfigRecord({"round": round_number, "attempt": attempt})

    def _begin(self, run_id: str) -> None:
        """A Flower run may hold several of ours, one after the other."""
        from flwr.app import ConfigRecord

        known = self._state.config_records.get(RUN)
        if known is None or known["id"] != run_id:
            self._forget(SETTLED, LEFT, ATTEMPT)
            self._state[RUN] = ConfigRecord({"id": run_id})

    def _forget(self, *names: str) -> None:
        for name in names:
            self._state.pop(name, None)

    def _vectors(self, name: str) -> Mapping[str, Vector]:
        from flwr.app import RecordDict

        if name not in self._state:
            return {}
        try:
            return from_record_dict(RecordDict({"arrays": self._state[name]})).arrays
        except UpdateRejected as error:
            raise StateCorrupt(f"This node's memory of the run does not decode: {error}") from error


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0  # 0 is no round: it has never counted
