"""What this device has said of releases on its own rows, and what that has cost them.

    trials = Trials(state.trials, section)
    trials.word(release, question)            # what was said before; "" = nothing yet
    trials.may_answer(epsilon)                # "" or why not: the owner's bounds
    trials.keep(release, question, epsilon, word)

Rules:

* An answer and its price are on the disk, in one write, before anything is sent. What was said is said again
  and never drawn anew: asking twice tells nothing more.
* Answers are epsilon-differentially private for all rows of the device together, by local randomisation, so
  their prices add up (Dwork and Roth 2014, theorem 3.16). The sum never passes the owner's ``trial.budget``.
* Whether there is an answer depends on configuration, budget and what was asked; never on the rows.
* A damaged file ends all answers until the owner looks at it: what was spent is not known.

Rows that releases are tried on pay here; rows that train pay in ``spending``. They are other rows.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from lepton_client.config import TrialSection
from lepton_fl.errors import NotFound, StateCorrupt
from lepton_fl.files import canonical_json, make_private_folder, read_private, write_private

FORMAT: Final = "lepton device trials 1"
SLACK: Final = 1e-9  # of sums of floats


class Trials:
    """The answers of one device; one process writes."""

    def __init__(self, path: Path, section: TrialSection) -> None:
        """Nothing is read before something is asked."""
        self._path, self._section = path, section

    def word(self, release: str, question: str) -> str:
        """What was said of a release to a question; empty = nothing yet. Raises StateCorrupt."""
        for entry in self._entries():
            if (entry["release"], entry["question"]) == (release, question):
                return str(entry["word"])
        return ""

    @property
    def spent(self) -> float:
        """Epsilon so far. Raises StateCorrupt."""
        return sum(float(entry["epsilon"]) for entry in self._entries())

    def may_answer(self, epsilon: float) -> str:
        """Why an answer of this price is not given; empty = it may be. Raises StateCorrupt."""
        section = self._section
        if section.budget == 0:
            return "the owner allows no answers (trial.budget)"
        if not 0 < epsilon <= section.epsilon:
            return f"it would cost epsilon = {epsilon:g}, trial.epsilon allows {section.epsilon:g}"
        spent = self.spent
        if spent + epsilon > section.budget + SLACK:
            return (
                f"epsilon = {spent:g} is spent, {epsilon:g} more would pass trial.budget = {section.budget:g}"
            )
        return ""

    def keep(self, release: str, question: str, epsilon: float, word: str) -> None:
        """Write an answer and its price down; raises DiskFull or StateError, and then nothing is said."""
        entry = {"release": release, "question": question, "epsilon": epsilon, "word": word}
        make_private_folder(self._path.parent)
        body = {"format": FORMAT, "answers": [*self._entries(), entry]}
        write_private(self._path, canonical_json(body))

    def account(self, task: str) -> dict[str, Any]:
        """A line for ``lepton client status``. Raises StateCorrupt."""
        return {
            "task": f"{task}, trials of releases",
            "unit": "all rows",
            "trust": "local",
            "adjacency": "any",
            "delta": 0.0,
            "spent": self.spent,
            "allowed": self._section.budget,
            "rounds": len(self._entries()),
        }

    def _entries(self) -> list[dict[str, Any]]:
        try:
            body = json.loads(read_private(self._path))
            entries = list(body["answers"])
            whole = body["format"] == FORMAT and all(_is_entry(entry) for entry in entries)
        except NotFound:
            return []
        except (ValueError, KeyError, TypeError, RecursionError):
            whole, entries = False, []
        if not whole:
            raise StateCorrupt(
                f"{self._path} is damaged.",
                hint="What was spent is not known. Restore the file from a copy, or set trial.budget to 0.",
            )
        return entries


class Asked(NamedTuple):
    """What the coordinator asks of a release."""

    release: str
    question: Mapping[str, Any]  # as it came; see ``lepton_fl.delivery.trial.Question``
    digest: str  # SHA-256 (hex) of the question: its name


def asked_about(desired: str) -> Asked | None:
    """The question of a desired state (JSON text); None = nothing is asked."""
    try:
        release = json.loads(desired)["release"]
        question = dict(release["trial"])
        digest = hashlib.sha256(canonical_json(question)).hexdigest()
        return Asked(str(release["manifest"]), question, digest)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"release", "question", "epsilon", "word"}:
        return False
    price = entry["epsilon"]
    return isinstance(price, int | float) and 0 < price < float("inf")
