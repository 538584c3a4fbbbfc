"""Writes the work: rows, initial models, cohorts and orders. The cohorts are those that our engine draws."""

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from _simulation import task
from _simulation.ours import scenario
from lepton_fl.tasks.images import mnist_by_writer
from lepton_fl.tasks.models import initial_model
from lepton_simulations.api import run_scenario
from lepton_simulations.config import SimulationConfig
from lepton_simulations.journal import read_journal
from lepton_strategies.desk import batch_seed

CLIENTS, ROWS = 1000, 60
SIGMA, SMALLEST, LARGEST = 0.8, 5, 600  # of the lognormal sizes
Kind = Literal["equal", "lognormal", "nothing"]
MODELS: dict[Kind, tuple[str, ...]] = {
    "equal": ("mlp", "cnn"),
    "lognormal": ("mlp",),
    "nothing": ("nothing",),
}


def prepare(data: Path, folder: Path, kind: Kind) -> None:
    """Write the rows and initial models of one kind of work.

    Args:
        data: the folder with ``mnist_by_writer.npz``.
        folder: is made, and filled.
        kind: 60 rows of MNIST per client, lognormal numbers of them, or one row of one number.
    """
    folder.mkdir()
    sizes = _sizes(kind)
    x, y = _rows(data, kind, int(sizes.sum()))
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(sizes)]))
    for name in MODELS[kind]:
        state = initial_model(getattr(task, name), 0).state_dict()
        np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})


def plan(folder: Path, kind: Kind, cohort: int, rounds: int) -> float:
    """Write who trains in which round and in which order of rows; the mean number of rows per client."""
    sizes = _sizes(kind)
    cohorts = _cohorts(folder, MODELS[kind][0], cohort, rounds)
    orders, starts, done = [], [], 0
    for number, clients in enumerate(cohorts):
        starts.append(done)
        for client in clients:
            orders.append(_order(int(client), number + 1, int(sizes[client])))
            done += len(orders[-1])
    np.savez(folder / f"plan_{cohort}.npz", cohorts=cohorts, starts=starts, orders=np.concatenate(orders))
    return done / cohorts.size


def _sizes(kind: Kind) -> NDArray[np.int64]:
    if kind == "lognormal":  # of mean 60
        drawn = np.random.default_rng(1).lognormal(np.log(ROWS) - SIGMA**2 / 2, SIGMA, CLIENTS)
        return np.clip(drawn.round(), SMALLEST, LARGEST).astype(np.int64)
    return np.full(CLIENTS, 1 if kind == "nothing" else ROWS)


def _rows(data: Path, kind: Kind, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows in the order of the clients; where more are needed than there are, some come twice."""
    if kind == "nothing":
        return np.ones((count, 1), np.float32), np.zeros(count, np.int64)
    assert mnist_by_writer.data is not None
    digits = mnist_by_writer.data(data).train
    order = np.resize(np.random.default_rng(0).permutation(len(digits)), count)
    x = digits.x[order].reshape(count, -1).astype(np.float32)
    x /= 255
    return x, digits.y[order].astype(np.int64)


def _cohorts(folder: Path, model: str, cohort: int, rounds: int) -> NDArray[np.int32]:
    """Whom our engine asks, (rounds, cohort): from the journal of a run with one step per client."""
    with tempfile.TemporaryDirectory() as place:
        body = scenario(model, folder, cohort, rounds, 0, {})
        body["run"]["local"]["max_steps"] = 1
        body["output"] = {"folder": f"{place}/run", "plots": False, "tensorboard": False}
        run_scenario(SimulationConfig.model_validate(body))
        events = list(read_journal(Path(place) / "run" / "journal.jsonl"))
    plans = [event.body["plan"] for event in events if event.kind == "round.planned"]
    return np.array([[int(device) for device in plan["cohort"]] for plan in plans], np.int32)


def _order(client: int, round_number: int, size: int) -> NDArray[np.int16]:
    """The order of a client's rows in a round, as the trainer draws it."""
    rng = np.random.default_rng(batch_seed(0, str(client), round_number, 1))
    rng.integers(2**63)  # seeds dropout and augmentation
    return rng.permutation(size).astype(np.int16)
