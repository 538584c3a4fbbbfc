"""How often this device takes part in a private run: the contract it signed up for, in its own record.

A private run's guarantee counts on devices that take part at most so often, and so many rounds apart. The
coordinator draws its cohorts accordingly; this is the device's own record, in case it does not: after its
database was restored from an old copy, say.

    contracts = Contracts(state.contracts, told=diary_entry)
    contracts.refusal(records)              # an answer that says no, or None: noted durably as taken part
    contracts.settle(run, round, attempt, taken=False)    # that answer did not count

Rules. The contract of a run is the one of the first request; a laxer one is refused, and so is none. What is
not known to be left out has counted. The ``KEEP_RUNS`` runs last asked for are remembered.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_fl.errors import Rejection, StateCorrupt, UpdateRejected
from lepton_fl.files import canonical_json, write_atomic

if TYPE_CHECKING:
    from lepton_fl.wire.messages import Ticket
    from lepton_fl.wire.records import Records

FORMAT: Final = 1
KEEP_RUNS: Final = 256

Told = Callable[[str, int, str], None]  # run, round, words


@dataclass(frozen=True)
class Contract:
    """One run's, and the attempts in which this device took part."""

    separation: int  # rounds from one participation to the next, at least
    most: int  # participations; 0 = as many as the separation allows
    took: tuple[tuple[int, int], ...] = ()  # (round, attempt)

    def objection(self, asked: "Contract", round_number: int) -> str:
        """Why this device does not take part; '' if it may."""
        if asked.separation < self.separation or (self.most and not 0 < asked.most <= self.most):
            return (
                f"The run asks for another contract (every {asked.separation} rounds, {asked.most or 'any'} "
                f"times) than the one this device signed up for (every {self.separation} rounds, "
                f"{self.most or 'any'} times)."
            )
        rounds = {number for number, _ in self.took if number != round_number}
        if self.most and len(rounds) >= self.most:
            return f"This device took part {len(rounds)} times, and the run's contract allows {self.most}."
        near = [number for number in rounds if abs(round_number - number) < self.separation]
        if near:
            return (
                f"This device took part in round {max(near)}; by the run's contract it rests "
                f"{self.separation} rounds."
            )
        return ""


class Contracts:
    """The contracts of one device, in one file; used by the agent's two threads."""

    def __init__(self, path: Path, told: Told = lambda run_id, round_number, words: None) -> None:
        """Read them.

        Args:
            path: of the file.
            told: called with what is refused.

        Raises:
            StateCorrupt: the file is damaged. Without it a broken contract could not be told.
        """
        self._path, self._told, self._lock = path, told, threading.Lock()
        self._runs = _read(path)

    def refusal(self, records: "Records") -> "Records | None":
        """The answer to a request that breaks its run's contract; None if this device takes part.

        Raises:
            UpdateRejected: there is no readable ticket.
            DiskFull, StateError: it cannot be noted; the work must not start.
        """
        from lepton_fl.wire.messages import Failure, Fields, Ticket

        ticket = Ticket.take(Fields(records.config))
        words = self._enter(ticket, records) if ticket.kind == "train" else ""
        if not words:
            return None
        self._told(ticket.run_id, ticket.round, words)
        return Failure(ticket, Rejection.FAILED, words).to_records()

    def settle(self, run_id: str, round_number: int, attempt: int, taken: bool) -> None:
        """The coordinator has refused an answer, or never got it; raises StateError if it cannot be noted."""
        with self._lock:
            known = self._runs.get(run_id)
            if taken or known is None or (round_number, attempt) not in known.took:
                return
            left = tuple(pair for pair in known.took if pair != (round_number, attempt))
            self._keep(run_id, Contract(known.separation, known.most, left))

    def _enter(self, ticket: "Ticket", records: "Records") -> str:
        """Note that this device takes part, or say why it does not."""
        asked, retried = _asked(records)
        with self._lock:
            known = self._runs.get(ticket.run_id)
            if known is None and asked is None:
                return ""  # not a private run, or one without a contract
            terms = asked or Contract(1, 0)
            known = known or terms
            # Of a round of which another attempt has counted, this device's did not.
            took = tuple(p for p in known.took if retried.get(p[0], p[1]) == p[1])
            if words := Contract(known.separation, known.most, took).objection(terms, ticket.round):
                return words
            mine = (ticket.round, ticket.attempt)
            others = tuple(pair for pair in took if pair[0] != ticket.round)
            self._keep(ticket.run_id, Contract(known.separation, known.most, (*others, mine)))
        return ""

    def _keep(self, run_id: str, contract: Contract) -> None:
        runs = {name: kept for name, kept in self._runs.items() if name != run_id} | {run_id: contract}
        runs = dict(list(runs.items())[-KEEP_RUNS:])
        rows = {name: [c.separation, c.most, [list(pair) for pair in c.took]] for name, c in runs.items()}
        write_atomic(self._path, canonical_json({"format": FORMAT, "runs": rows}), mode=0o600)
        self._runs = runs


def _asked(records: "Records") -> tuple[Contract | None, dict[int, int]]:
    """The contract of a request, None if it has none, and which attempts of its rounds have counted."""
    from pydantic import ValidationError

    from lepton_fl.plan import PrivatePart

    try:
        told = records.config.get("private", "null")
        part = None if told == "null" else PrivatePart.model_validate_json(str(told))
        retried = {
            int(number): int(attempt) for number, attempt in json.loads(str(records.config["retried"]))
        }
    except (ValidationError, ValueError, TypeError, KeyError) as error:
        raise UpdateRejected(Rejection.MALFORMED, "The request's privacy does not decode.") from error
    if part is None or not part.has_contract:
        return None, retried
    return Contract(part.min_separation, part.max_participations), retried


def _read(path: Path) -> dict[str, Contract]:
    try:
        body: Any = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}")
        return {
            str(run_id): Contract(int(b), int(k), tuple((int(r), int(a)) for r, a in took))
            for run_id, (b, k, took) in body["runs"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StateCorrupt(
            f"The contracts of private runs in {path} cannot be read ({error}).",
            hint="Without them this device could take part too often. Remove the file if no private run is "
            "active.",
        ) from error
