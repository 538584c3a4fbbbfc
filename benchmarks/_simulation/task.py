"""The benchmark's tasks, importable by name: ``_simulation.task:mlp`` and so on.

Their data set is the folder of prepared work; ``fleet`` needs none.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.data import Corpus, Dataset
from lepton_fl.tasks.images import digits
from lepton_fl.tasks.metrics import Classification
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

DEVICES, ROWS = 10_000, 20  # of the fleet of the endurance row
_SHAPES = {"mlp": (784,), "cnn": (1, 28, 28), "nothing": (1,)}


def _model(name: str) -> "nn.Module":
    from _simulation.work import MODELS

    return MODELS[name]()


def _corpus(folder: Path | None, name: str) -> Corpus:
    """The prepared rows, and one of them for tests, which nobody runs."""
    assert folder is not None
    x = np.load(folder / "x.npy").reshape(-1, *_SHAPES[name])
    y, starts = np.load(folder / "y.npy"), np.load(folder / "starts.npy")
    users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return Corpus(Dataset(x, y), Dataset(x[:1], y[:1]), users)


def _task(name: str, classes: int) -> Task:
    return Task(
        name=f"benchmark_{name}",
        version="1",
        model=partial(_model, name),
        contract=DataContract(_SHAPES[name], num_classes=classes),
        loss="cross_entropy",
        metrics=Classification(classes),
        data=partial(_corpus, name=name),
    )


mlp, cnn, nothing = _task("mlp", 10), _task("cnn", 10), _task("nothing", 2)


def _digits_mlp() -> "nn.Module":
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _many_devices(folder: Path | None) -> Corpus:
    """The bundled digits; every device has drawn rows of its own from them."""
    assert digits.data is not None
    corpus, rng = digits.data(folder), np.random.default_rng(0)
    drawn = rng.integers(0, len(corpus.train), DEVICES * ROWS)
    return Corpus(corpus.train.take(drawn), corpus.test, np.repeat(np.arange(DEVICES), ROWS))


fleet = Task(
    name="benchmark_fleet",
    version="1",
    model=_digits_mlp,
    contract=digits.contract,
    loss="cross_entropy",
    metrics=Classification(10),
    transform=digits.transform,
    data=_many_devices,
    local=LocalPlan(learning_rate=0.1, batch_size=10),
)
