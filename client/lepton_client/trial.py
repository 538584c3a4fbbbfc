"""How good is a release on this device's own rows? Answered by a process of its own, and in one word.

Run with ``python -m lepton_client.trial``; it reads one order as JSON from standard input and writes the true
word to standard output. Nobody but the courier reads it, and randomises it before anything leaves the device
(``lepton_fl.delivery.trial``). The release before answers the same rows in the shadow of the one in service;
no caller's request is touched.

Rows that cannot be used are no finding about the release: the word is then ``fine``, and the log says why. A
release that fails on rows that fit, or takes the process down, is ``worse``.
"""

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lepton_client.config import ClientConfig, TaskSection
from lepton_client.state import StateDir
from lepton_client.trials import Trials, asked_about
from lepton_fl.errors import DataError, LeptonError

if TYPE_CHECKING:
    from lepton_client.predictor import Array
    from lepton_fl.delivery.slots import Slots
    from lepton_fl.delivery.trial import Question, Word
    from lepton_fl.tasks import Dataset, Task

log = logging.getLogger("lepton_client")

PATIENCE_S: Final = 600.0  # with one trial


def answer(config: ClientConfig, state: StateDir, slots: "Slots", desired: str) -> None:
    """Try the release in service if that was asked for, allowed and not done yet; what is said is then kept.

    Args:
        config: The device's.
        state: Its folder.
        slots: Its releases.
        desired: What the operator wants, JSON text.

    Raises:
        StateError: What was said before is not readable, or the answer could not be kept; nothing is said.
    """
    from lepton_fl.delivery.trial import said

    record, asked = slots.record(), asked_about(desired)
    if asked is None or record.current is None or record.current != asked.release:
        return
    release, question = asked.release, _question(asked.question)
    trials = Trials(state.trials, config.trial)
    if question is None or trials.word(release, asked.digest):
        return
    if why := trials.may_answer(question.epsilon):
        log.info("release %s is not tried on this device's rows: %s", release[:12], why)
        return
    old = record.previous if record.previous and slots.has(record.previous) else None
    found = _find(config, question, slots.path(release), slots.path(old) if old else None)
    word = said(found, question.epsilon, secrets.SystemRandom())
    trials.keep(release, asked.digest, question.epsilon, word)


def _question(body: Mapping[str, Any]) -> "Question | None":
    """None for one that this version does not understand: nothing is said."""
    from pydantic import ValidationError

    from lepton_fl.delivery.trial import Question

    try:
        return Question.model_validate(body)
    except ValidationError as error:
        log.warning("what is asked of this release is not understood: %s", error.errors()[0]["msg"])
        return None


def _find(config: ClientConfig, question: "Question", new: Path, old: Path | None) -> "Word":
    """The truth, by a child process; one that ends without a word was ended by the release."""
    order = {
        "config": config.model_dump(mode="json"),
        "question": question.to_json(),
        "new": str(new),
        "old": str(old) if old else None,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "lepton_client.trial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            out, _ = process.communicate(json.dumps(order).encode(), timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "worse"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    words: dict[bytes, Word] = {b"fine": "fine", b"drifts": "drifts", b"worse": "worse"}
    return words.get(out.strip(), "worse")


# --- the child process --------------------------------------------------------------------------------


def examine(config: ClientConfig, question: "Question", new: Path, old: Path | None) -> "Word":
    """What this device finds."""
    try:
        task, rows = rows_of(config)
    except LeptonError as error:
        log.warning("releases cannot be tried on this device's rows: %s %s", error, error.hint)
        return "fine"
    if not len(rows):
        log.warning("releases cannot be tried on this device: it keeps no rows for that")
        return "fine"
    from lepton_client.predictor import Model
    from lepton_fl.compression.profiles import SCORES, score_of
    from lepton_fl.delivery.trial import truth

    threads = config.limits.threads
    try:
        outputs = Model(new, threads).predict(rows.x)
        figures = task.metrics.summarise(task.metrics.count(outputs, rows.y))
        name = score_of(figures)
        shadow = Model(old, threads).predict(rows.x) if old else None
    except (LeptonError, ValueError, IndexError) as error:  # it refuses rows that fit, or answers nonsense
        log.warning("the release in service fails on this device's rows: %s", error)
        return "worse"
    before = None
    if shadow is not None:
        before = task.metrics.summarise(task.metrics.count(shadow, rows.y)).get(name)
    drift = _drift(outputs, shadow, rows) if shadow is not None else 0.0
    return truth(
        question, score=figures[name], before=before, drift=drift, lower_is_better=not SCORES.get(name, True)
    )


def rows_of(config: ClientConfig) -> "tuple[Task, Dataset]":
    """The task and the labelled rows that releases are tried on; prepared.

    Raises:
        LeptonError: They cannot be read, or break the task's contract.
    """
    import numpy as np

    from lepton_client.material import load_material, load_section_task, name_of, source_of
    from lepton_fl.tasks.sources import read_source

    wanted = TaskSection(reference=config.delivery.task, data=config.trial.data)
    task = load_section_task(wanted)
    if config.trial.data:
        raw = read_source(source_of(wanted), task)
        task.check(raw)
        found = task.transform(raw)
    else:
        mine = [section for section in config.tasks if name_of(section) == name_of(wanted)]
        if not mine:
            raise DataError("No rows to try releases on are named.", hint="Set trial.data.")
        found = load_material(task, mine[0]).evaluate
    return task, found.take(np.arange(min(len(found), config.trial.rows)))


def _drift(new: "Array", old: "Array", rows: "Dataset") -> float:
    """How much else the new release says: share of decisions, or for numbers in standard deviations."""
    import numpy as np

    if rows.y.dtype.kind in "iu" and new.ndim > 1:
        return float((new.argmax(-1) != old.argmax(-1)).mean())
    before = old.astype(np.float64)
    apart = float(np.sqrt(np.mean((new.astype(np.float64) - before) ** 2)))
    return min(1.0, apart / max(float(before.std()), 1e-12))


def main() -> None:
    """The child process."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a task prints is not our answer
    order = json.loads(sys.stdin.buffer.read())
    config = ClientConfig.model_validate(order["config"])
    from lepton_client.limits import apply_limits
    from lepton_fl.delivery.trial import Question
    from lepton_fl.logs import configure

    configure(config.log.level, config.log.format)
    apply_limits(config.limits)
    old = Path(order["old"]) if order["old"] else None
    word = examine(config, Question.model_validate(order["question"]), Path(order["new"]), old)
    with os.fdopen(out, "wb") as file:
        file.write(word.encode())


if __name__ == "__main__":
    main()
