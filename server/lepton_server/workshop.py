"""What needs torch, or much time, in a process of its own.

The coordinator itself never loads torch: it would cost memory that belongs to rounds, and a task's model code
must not be able to take the coordinator down. One child process builds initial models, evaluates, and
searches for correlated noise.

    workshop = Workshop()
    layout, model = workshop.initial_model("lepton_fl.tasks.digits:task", seed=0)
"""

import math
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

from lepton_fl.compression.federated import with_teacher
from lepton_fl.errors import LeptonError, TaskError
from lepton_fl.plan import RunSpec
from lepton_fl.privacy.planning import Prepared
from lepton_fl.rounds.private import prepared
from lepton_fl.tasks import Dataset, Sums, load_task
from lepton_fl.vector import Layout, Vector
from lepton_server.patience import Interrupted

if TYPE_CHECKING:
    from lepton_fl.training.trainer import Trainer

BUILT_IN: Final = "built-in"  # central_data of a task whose data set comes with an installed package
LOOK_S: Final = 0.2  # how often a waiting caller asks whether it should give up
END_S: Final = 5.0  # for a child process to end before it is killed

P = ParamSpec("P")
R = TypeVar("R")


class Workshop:
    """Calls into one spawned child process, started at the first call and again if it dies.

    The child ends with this process, however that ends: the pipe between them is all that keeps it.
    """

    def __init__(self, give_up: Callable[[], bool] = lambda: False, *, patience_s: float = math.inf) -> None:
        """Prepare; nothing is started.

        Args:
            give_up: whether a caller that waits should leave; asked every ``LOOK_S`` seconds.
            patience_s: the longest that one call may take.
        """
        self.give_up, self._patience_s = give_up, patience_s
        self._turn = Lock()  # held by the one call that is under way
        self._process: SpawnProcess | None = None
        self._pipe: Connection[Any, Any] | None = None

    def warm_up(self) -> None:
        """Start the child and its imports, which take seconds, while the caller does other things."""
        Thread(target=self._warm_up, name="workshop-start", daemon=True).start()

    def _warm_up(self) -> None:
        with suppress(LeptonError, Interrupted):  # whoever needs the child meets it again
            self._call(_import)

    def initial_model(self, task: str, seed: int, *, rows_apart: bool = False) -> tuple[Layout, Vector]:
        """The layout of a task's model and its (P,) float32 weights for a seed.

        Args:
            task: ``package.module:attribute``.
            seed: of the weights.
            rows_apart: refuse a model that cannot be trained with example-level privacy.

        Raises:
            TaskError: the task cannot be loaded, or its model cannot be built or trained so.
            Interrupted: ``give_up`` said so.
        """
        return self._call(_initial_model, task, seed, rows_apart)

    def with_teacher(self, task: str, start: Vector, teacher: Vector) -> Vector:
        """The initial model of a distillation run, see ``compression.federated.with_teacher``.

        Raises:
            TaskError: the teacher is no model of the task that it is for.
            StateCorrupt: its numbers are not finite.
            Interrupted: ``give_up`` said so.
        """
        return self._call(_with_teacher, task, start, teacher)

    def evaluate(self, task: str, model: Vector, central_data: str) -> Sums:
        """Evaluate a model on the coordinator's test data; see ``RunSpec.central_data``.

        Raises:
            TaskError: the task has no published data set.
            DataError: the data cannot be read, or break the task's contract.
            Interrupted: ``give_up`` said so.
        """
        return self._call(_evaluate, task, model, central_data)

    def prepared(self, spec: RunSpec, coordinates: int) -> Prepared:
        """The mechanism of a private run: for correlated noise, a search of seconds.

        Raises:
            ConfigError: its numbers contradict each other.
            Interrupted: ``give_up`` said so.
        """
        return self._call(prepared, spec, coordinates)

    def close(self) -> None:
        """End the child process."""
        with self._turn:
            self._end()

    def _call(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            try:
                return cast("R", self._ask(work, args))
            except (EOFError, OSError) as error:
                self._end()
                raise TaskError(
                    "The process that builds models ended unexpectedly.",
                    hint="It may have run out of memory; look at the system's log, then start the run again.",
                ) from error
            except Interrupted:
                self._end()  # nobody wants its answer any more
                raise

    def _ask(self, work: Callable[..., object], args: tuple[object, ...]) -> object:
        if self.give_up():
            raise Interrupted
        pipe = self._started()
        pipe.send((work, args))
        ends = time.monotonic() + self._patience_s
        while not pipe.poll(LOOK_S):  # true as well when the child has died
            if self.give_up():
                raise Interrupted
            if time.monotonic() > ends:
                self._end()
                raise TaskError(
                    f"Making or evaluating the model took longer than {self._patience_s:g} s.",
                    hint="Raise rounds.build_s, or look at the task: its code may hang.",
                )
        outcome = pipe.recv()
        if isinstance(outcome, LeptonError):
            raise outcome
        return outcome

    def _started(self) -> "Connection[Any, Any]":
        if self._pipe is not None and self._process is not None and self._process.is_alive():
            return self._pipe
        self._end()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="workshop", daemon=True)
        self._process.start()
        theirs.close()  # so that its death is the end of the pipe
        self._pipe = ours
        return ours

    def _end(self) -> None:
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.terminate()
            process.join(END_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


# --- in the child -----------------------------------------------------------------------------------


def _serve(pipe: "Connection[Any, Any]") -> None:
    """Answer one call after the other until the coordinator is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the coordinator's to handle; it ends this process
    while True:
        try:
            work, args = pipe.recv()
            outcome = _outcome(work, args)
            pipe.send_bytes(outcome)
        except (EOFError, OSError):
            return


def _outcome(work: Callable[..., object], args: tuple[object, ...]) -> bytes:
    """The pickled result or error: a task's code may raise anything, and return what cannot be sent."""
    try:
        return pickle.dumps(work(*args))
    except LeptonError as error:
        return pickle.dumps(error)
    except Exception as error:  # noqa: BLE001 - whatever it was, the run gets its verdict
        return pickle.dumps(TaskError(f"The task's code raised {type(error).__name__}: {error}"))


def _import() -> None:
    from lepton_fl.training import trainer  # noqa: F401 - torch comes with it


@cache
def _trainer(task: str) -> "Trainer":
    import torch

    from lepton_fl.training.trainer import Trainer

    torch.set_num_threads(1)
    return Trainer(load_task(task))


@cache
def _test_data(task: str, central_data: str) -> "Dataset":
    from lepton_fl.tasks.federated import read

    loaded = load_task(task)
    corpus = read(loaded, None if central_data == BUILT_IN else Path(central_data))
    return loaded.prepare(corpus.test)


def _initial_model(task: str, seed: int, rows_apart: bool) -> tuple[Layout, Vector]:
    trainer = _trainer(task)
    if rows_apart:
        from lepton_fl.training.private import refuse_model

        refuse_model(trainer.module.train(), f"The model of task {trainer.task.name!r}")
    return trainer.layout, trainer.initial(seed)


def _with_teacher(task: str, start: Vector, teacher: Vector) -> Vector:
    return with_teacher(load_task(task), start, teacher)


def _evaluate(task: str, model: Vector, central_data: str) -> Sums:
    return _trainer(task).evaluate(model, _test_data(task, central_data))
