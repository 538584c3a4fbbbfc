"""What needs torch, in a process of its own.

The coordinator itself never loads torch: it would cost memory that belongs to rounds, and a task's model code
must not be able to take the coordinator down. One child process builds initial models and evaluates.

    workshop = Workshop()
    layout, model = workshop.initial_model("lepton_fl.tasks.digits:task", seed=0)
"""

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from lepton_fl.errors import LeptonError, TaskError
from lepton_fl.tasks import Dataset, Sums, load_task
from lepton_fl.vector import Layout, Vector

if TYPE_CHECKING:
    from lepton_fl.training.trainer import Trainer

BUILT_IN: Final = "built-in"  # central_data of a task whose data set comes with an installed package

P = ParamSpec("P")
R = TypeVar("R")


class Workshop:
    """Calls into one spawned child process, started at the first call and again if it dies."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = Lock()

    def initial_model(self, task: str, seed: int) -> tuple[Layout, Vector]:
        """The layout of a task's model and its (P,) float32 weights for a seed.

        Raises:
            TaskError: the task cannot be loaded or its model cannot be built.
        """
        return self._call(_initial_model, task, seed)

    def evaluate(self, task: str, model: Vector, central_data: str) -> Sums:
        """Evaluate a model on the coordinator's test data; see ``RunSpec.central_data``.

        Raises:
            TaskError: the task has no published data set.
            DataError: the data cannot be read, or break the task's contract.
        """
        return self._call(_evaluate, task, model, central_data)

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None

    def _call(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_ignore_interrupt)
            pool = self._pool
        try:
            return pool.submit(work, *args, **kwargs).result()
        except BrokenProcessPool as error:
            with self._lock:
                self._pool = None
            raise TaskError(
                "The process that builds models ended unexpectedly.",
                hint="It may have run out of memory; look at the system's log, then start the run again.",
            ) from error
        except LeptonError:
            raise
        except Exception as error:  # a task's code may raise anything
            raise TaskError(f"The task's code raised {type(error).__name__}: {error}") from error


def _ignore_interrupt() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the coordinator's to handle; it ends this process


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


def _initial_model(task: str, seed: int) -> tuple[Layout, Vector]:
    trainer = _trainer(task)
    return trainer.layout, trainer.initial(seed)


def _evaluate(task: str, model: Vector, central_data: str) -> Sums:
    return _trainer(task).evaluate(model, _test_data(task, central_data))
