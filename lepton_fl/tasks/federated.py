"""A published data set as a fleet would hold it: for simulation, benchmarks and the demo.

fleet = federated_dataset("digits", None, PartitionSpec(kind="iid", clients=5), seed=0)
for client in fleet.clients:
    train = fleet.train(client)      # prepared rows of this device only
test = fleet.central_test()
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lepton_fl.errors import DataError, NotFound
from lepton_fl.tasks.data import Array, Corpus, Dataset, Rows
from lepton_fl.tasks.partition import PartitionSpec, partition
from lepton_fl.tasks.task import Task, load_task


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """Who holds which rows. Rows stay raw until a client's are asked for."""

    task: Task
    corpus: Corpus
    train_rows: dict[str, Rows]  # client -> its training rows
    test_rows: dict[str, Rows]  # client -> test rows; clients may be others than those who train

    @property
    def clients(self) -> tuple[str, ...]:
        """Those who train."""
        return tuple(self.train_rows)

    @property
    def test_clients(self) -> tuple[str, ...]:
        """Those with test rows of their own; empty where the data set does not say whose they are."""
        return tuple(self.test_rows)

    def raw(self, client: str) -> Dataset:
        """One client's training rows as its owner would store them."""
        return self.corpus.train.take(_rows_of(self.train_rows, client))

    def train(self, client: str) -> Dataset:
        """One client's training rows, checked and prepared."""
        return self.task.prepare(self.raw(client))

    def test(self, client: str) -> Dataset:
        """One client's test rows, prepared."""
        return self.task.transform(self.corpus.test.take(_rows_of(self.test_rows, client)))

    def central_test(self) -> Dataset:
        """All test rows, prepared."""
        return self.task.transform(self.corpus.test)


def _rows_of(rows: dict[str, Rows], client: str) -> Rows:
    if client not in rows:
        raise NotFound(f"There is no client {client!r} among {len(rows)} clients with such rows.")
    return rows[client]


def federated_dataset(
    task: Task | str, folder: Path | None, spec: PartitionSpec, seed: int
) -> FederatedDataset:
    """Read a task's published data set and split it over devices.

    Args:
        task: the task, or its name.
        folder: where its file lies; ``digits`` needs none.
        spec: how training rows are split; natural clients are named by their user id, others 0, 1, ...
        seed: of the split.

    Raises:
        TaskError: unknown task, or one without a published data set.
        DataError: the folder or file cannot be used.
        ConfigError: the split is impossible.
    """
    task = load_task(task) if isinstance(task, str) else task
    corpus = read(task, folder)
    parts = partition(spec, labels=corpus.train.y, users=corpus.train_users, seed=seed)
    natural = spec.kind == "natural" and corpus.train_users is not None
    names = _names(corpus.train_users) if natural and corpus.train_users is not None else range(len(parts))
    test_rows: dict[str, Rows] = {}
    if natural and corpus.test_users is not None:
        tests = partition(spec, labels=corpus.test.y, users=corpus.test_users, seed=seed)
        test_rows = dict(zip(map(str, _names(corpus.test_users)), tests, strict=True))
    return FederatedDataset(task, corpus, dict(zip(map(str, names), parts, strict=True)), test_rows)


def read(task: Task, folder: Path | None) -> Corpus:
    """The task's published data set; DataError where it has none or it cannot be read."""
    if task.data is None:
        raise DataError(
            f"Task {task.name!r} comes without a data set.", hint="Use a data source of your own instead."
        )
    return task.data(folder)


def _names(users: Array) -> list[int]:
    return [int(u) for u in np.unique(users)]
