"""The task of the fault injection: a small model whose training goes wrong when a file says so.

``LEPTON_FAULT`` names the file: ``hang`` in it stops the training at its next step, ``memory`` takes memory
without end. Without the file a step takes a tenth of a second, so that there is time to inject something.
``LEPTON_TASK_VERSION`` is the version that a device has installed.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.metrics import Classification
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

STEP_S = 0.1
PIECE = 16 * 2**20  # bytes
_hoard: list[bytes] = []


def _model() -> "nn.Module":
    """64 numbers in, 10 classes, 100 KB of weights."""
    from torch import nn

    return nn.Sequential(nn.Linear(64, 330), nn.ReLU(), nn.Linear(330, 10))


def _obey(batch: "Tensor", _rng: "np.random.Generator") -> "Tensor":
    """Called at every step of training: do what the file says."""
    time.sleep(STEP_S)
    file = Path(os.environ.get("LEPTON_FAULT") or "/nonexistent")
    while _says(file) == "hang":
        time.sleep(0.1)
    while _says(file) == "memory":
        _hoard.append(os.urandom(PIECE))
    return batch


def _says(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


task = Task(
    name="faulty",
    version=os.environ.get("LEPTON_TASK_VERSION", "1"),
    model=_model,
    contract=DataContract((64,), low=-100.0, high=100.0, num_classes=10),
    loss="cross_entropy",
    metrics=Classification(10),
    augment=_obey,
)
