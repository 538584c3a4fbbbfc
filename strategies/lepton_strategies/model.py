"""A task's model as Flower carries it: one flat array.

arrays = initial_arrays("digits")
result = FedAvg("digits").start(grid, arrays, num_rounds=10)
torch.save(to_state_dict("digits", result.arrays), "digits.pt")
"""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.rounds.campaign import Work
from lepton_fl.tasks.task import load_task, resolve
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import MODEL
from lepton_fl.wire.records import Records
from lepton_strategies.records import from_record_dict, to_array_record

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from torch import Tensor

    from lepton_fl.training.trainer import Trainer


@cache
def trainer_of(reference: str) -> "Trainer":
    """The warm trainer of a task, one per process; for the coordinator's side and for a device's."""
    from lepton_fl.training.trainer import Trainer

    return Trainer(load_task(reference))


def work_of(task: str, trainer: "Trainer | None" = None) -> Work:
    """What a coordinator must know of a task.

    Args:
        task: its name, short or full.
        trainer: its trainer, if there is one already.

    Raises:
        TaskError: there is no such task, or it cannot be used.
    """
    reference = resolve(task)
    trainer = trainer or trainer_of(reference)
    layout = trainer.layout
    version, metrics = trainer.task.version, trainer.task.metrics
    return Work(reference, version, layout.digest, layout.size, metrics, layout=layout)


def initial_arrays(task: str, seed: int = 0) -> "ArrayRecord":
    """The task's initial model of this seed, as ``Strategy.start`` takes it."""
    return to_arrays(trainer_of(resolve(task)).initial(seed))


def to_arrays(model: Vector) -> "ArrayRecord":
    """A model, (P,) float32, as one array."""
    return to_array_record({MODEL: model})


def from_arrays(arrays: "ArrayRecord") -> Vector:
    """The model, (P,) float32; a read-only view.

    Raises:
        UpdateRejected: MALFORMED or WRONG_SHAPE: not one flat float32 array.
    """
    from flwr.app import RecordDict

    decoded: Records = from_record_dict(RecordDict({"arrays": arrays}))
    model = decoded.arrays.get(MODEL)
    if model is None or len(decoded.arrays) != 1 or model.dtype != np.float32 or model.ndim != 1:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"Expected one flat float32 array {MODEL!r}, got {sorted(decoded.arrays)}.",
            hint="Make the initial arrays with lepton_strategies.initial_arrays.",
        )
    return model


def to_state_dict(task: str, arrays: "ArrayRecord") -> "dict[str, Tensor]":
    """The model by tensor names, for ``module.load_state_dict(..., strict=False)``.

    Integer buffers belong to one device and are not in it.
    """
    import torch

    named = trainer_of(resolve(task)).layout.unflatten(from_arrays(arrays))
    return {name: torch.tensor(array) for name, array in named.items()}
