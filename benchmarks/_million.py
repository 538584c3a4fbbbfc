"""The task of the coordination benchmarks: one million float32 parameters and next to no work.

Processes find it by ``PYTHONPATH`` and as ``_million:task``.
"""

from typing import TYPE_CHECKING

from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.metrics import Classification
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

SIDE = 1000
SIZE = SIDE * SIDE  # parameters; 4 MB as float32


def _model() -> "nn.Module":
    """One row through it gives a gradient in all its weights, for a millisecond of work."""
    from torch import nn

    return nn.Linear(SIDE, SIDE, bias=False)


task = Task(
    name="million",
    version="1",
    model=_model,
    contract=DataContract((SIDE,), num_classes=SIDE),
    loss="cross_entropy",
    metrics=Classification(SIDE),
)
