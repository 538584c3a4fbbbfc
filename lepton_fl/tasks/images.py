"""Ready tasks on images: ``digits`` (offline), ``mnist_by_writer`` and ``fashion_mnist`` (from a folder)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lepton_fl.errors import TaskError
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.archive import read_corpus
from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.data import Corpus, Dataset
from lepton_fl.tasks.metrics import Classification
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn


def _scale(data: Dataset, peak: float) -> Dataset:
    """Grey values 0..peak (N, H, W) -> 0..1 (N, 1, H, W)."""
    x = data.x.astype(np.float32)[:, None]
    x /= peak
    return Dataset(x, data.y.astype(np.int64))


def _cnn(side: int, width: int, hidden: int) -> "nn.Module":
    from lepton_fl.tasks.models import CNN

    return CNN((1, side, side), 10, width, hidden)


def _mlp(side: int, hidden: int) -> "nn.Module":
    from lepton_fl.tasks.models import MLP

    return MLP(side * side, 10, (hidden,))


def _digits(folder: Path | None) -> Corpus:
    """scikit-learn's bundled 1,797 digits; a fixed 360 of them are the test set. ``folder`` is not used."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise TaskError(
            "The task 'digits' needs scikit-learn.", hint="Install 'lepton-fl[train]'."
        ) from error
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    data = Dataset(bunch.images.astype(np.float32), bunch.target.astype(np.int64))
    return Corpus(data.take(order[360:]), data.take(order[:360]))


digits = Task(
    name="digits",
    version="1",
    model=partial(_cnn, side=8, width=16, hidden=32),
    contract=DataContract((8, 8), low=0, high=16, num_classes=10, target="digit"),
    loss="cross_entropy",
    metrics=Classification(10),
    transform=partial(_scale, peak=16.0),
    data=_digits,
    local=LocalPlan(optimizer="adam", learning_rate=0.004, batch_size=10, epochs=2),
)

mnist_by_writer = Task(
    name="mnist_by_writer",
    version="1",
    model=partial(_cnn, side=28, width=16, hidden=128),
    contract=DataContract((28, 28), "uint8", num_classes=10, target="digit"),
    loss="cross_entropy",
    metrics=Classification(10),
    transform=partial(_scale, peak=255.0),
    data=partial(read_corpus, file="mnist_by_writer.npz", users=True),
    local=LocalPlan(learning_rate=0.1, batch_size=10, epochs=2),
)

# A smaller model than the convolutional one: noise grows with the number of coordinates, 50,890 here.
mnist_by_writer_mlp = Task(
    name="mnist_by_writer_mlp",
    version="1",
    model=partial(_mlp, side=28, hidden=64),
    contract=mnist_by_writer.contract,
    loss="cross_entropy",
    metrics=Classification(10),
    transform=partial(_scale, peak=255.0),
    data=mnist_by_writer.data,
    local=mnist_by_writer.local,
)

_GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"
)  # fmt: skip

fashion_mnist = Task(
    name="fashion_mnist",
    version="1",
    model=partial(_cnn, side=28, width=16, hidden=128),
    contract=DataContract((28, 28), "uint8", num_classes=10, class_names=_GARMENTS, target="garment"),
    loss="cross_entropy",
    metrics=Classification(10),
    transform=partial(_scale, peak=255.0),
    data=partial(read_corpus, file="fashion_mnist.npz", users=False),
)
