"""What the engines for chains of layers share: which models, plans, rows and vectors they know."""

from collections.abc import Sequence
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Slot, Vector
from lepton_simulations.engines.batches import flat_rows
from lepton_simulations.engines.chain import (
    ConvSpec,
    FlattenSpec,
    LinearSpec,
    NormSpec,
    PoolSpec,
    ReluSpec,
    Spec,
    SqueezeSpec,
    chain_of,
)
from lepton_simulations.engines.contract import ClientWork, Unsupported
from lepton_simulations.engines.layers import Rule
from lepton_simulations.engines.lean import LeanEngine


class ChainEngine:
    """A task whose model is a chain of layers known here, with rows of one shape."""

    def __init__(self, trainer: Trainer, sample: Dataset) -> None:
        """Read the chain.

        Args:
            trainer: whose task; trains what does not fit here.
            sample: some device's rows; all have this shape.

        Raises:
            Unsupported: the model, the loss, the device or the rows are none of those known here.
        """
        if trainer.device.type != "cpu":
            raise Unsupported(f"the model is on {trainer.device.type!r}")
        if trainer.task.augment is not None:
            raise Unsupported("the task augments its batches")
        self._lean, self._trainer = LeanEngine(trainer), trainer
        self._specs = chain_of(trainer.module)
        self._slots = {slot.name: slot for slot in trainer.layout.slots}
        self._shape, self._target_shape = sample.x.shape[1:], sample.y.shape[1:]
        self.dense = not any(isinstance(spec, ConvSpec | NormSpec | PoolSpec) for spec in self._specs)
        self._shapes = _shapes(self._specs, self._slots, self._shape)
        self._outputs = self._check_loss()
        self._rows: WeakKeyDictionary[Dataset, Tensor | None] = WeakKeyDictionary()

    def _check_loss(self) -> int:
        """Numbers the model gives per row; refuses a loss that compares them otherwise than row by row."""
        outputs = self._shapes[-1]
        loss = self._trainer.task.loss
        if loss == "cross_entropy":
            if len(outputs) != 1 or self._target_shape != ():
                raise Unsupported(
                    f"outputs {outputs} and labels {self._target_shape} are not one label per row"
                )
            return outputs[0]
        if loss not in ("squared_error", "huber"):
            raise Unsupported("its loss is a function of its own")
        if outputs != self._target_shape:
            raise Unsupported(f"outputs {outputs} and targets {self._target_shape} per row differ in shape")
        return outputs[0] if outputs else 1

    def know(self, data: Dataset) -> None:
        """See ``Engine``."""
        self._rows[data] = flat_rows(data, self._trainer.dtype) if self._rows_fit(data) else None

    def _rows_of(self, client: ClientWork) -> Tensor | None:
        """A device's rows (n, F) if all it brings is what the chain takes; the others are the trainer's."""
        data, size = client.data, self._trainer.layout.size
        for vector in (client.start, client.correction):
            if vector is not None and (vector.shape != (size,) or vector.dtype != np.float32):
                return None
        if data not in self._rows:
            self.know(data)
        return self._rows[data]

    def _rows_fit(self, data: Dataset) -> bool:
        if not len(data) or data.x.shape[1:] != self._shape or data.y.shape[1:] != self._target_shape:
            return False
        if data.x.dtype != np.float32:
            return False
        if self._trainer.task.loss == "cross_entropy":
            return data.y.dtype == np.int64 and bool(data.y.min() >= 0 and data.y.max() < self._outputs)
        return data.y.dtype == np.float32

    def _flat(self, vector: Vector) -> Tensor:
        return torch.from_numpy(np.require(vector, requirements=["C", "W"])).to(self._trainer.dtype)


def rule_of(local: LocalPlan) -> Rule:
    """The plan as numbers.

    Raises:
        Unsupported: it asks for more than SGD.
    """
    if reason := unsupported(local):
        raise Unsupported(reason)
    return Rule.of(local)


def unsupported(local: LocalPlan) -> str:
    """What of a plan is not built in here; empty = nothing."""
    if local.optimizer != "sgd":
        return f"the optimiser is {local.optimizer!r}"
    if local.clip_grad_norm:
        return "gradients are clipped at every step"
    if not local.momentum and Rule.of(local).keep <= 0:
        return "learning rate times weight decay is 1 or more"
    return ""


def _shapes(specs: Sequence[Spec], slots: dict[str, Slot], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of a row after each layer.

    Raises:
        Unsupported: a layer acts on rows of a shape that is not built in here.
    """
    shapes = []
    for spec in specs:
        shape = _shape_after(spec, slots, shape)
        shapes.append(shape)
    return shapes


def _shape_after(spec: Spec, slots: dict[str, Slot], shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(spec, ReluSpec):
        return shape
    if isinstance(spec, FlattenSpec):
        return (prod(shape),)
    if isinstance(spec, SqueezeSpec):
        return shape[:-1] if shape[-1:] == (1,) else shape
    if isinstance(spec, LinearSpec):
        weight = slots[spec.weight].shape
        if shape != weight[1:]:
            raise Unsupported(f"a linear layer for {weight[1]} inputs gets rows of shape {shape}")
        return weight[:1]
    if len(shape) != 3:
        raise Unsupported(f"a layer for images gets rows of shape {shape}")
    channels, *sides = shape
    if isinstance(spec, NormSpec):
        return shape
    if isinstance(spec, PoolSpec):
        sides = [(n - k) // s + 1 for n, k, s in zip(sides, spec.kernel, spec.stride, strict=True)]
    else:
        weight = slots[spec.weight].shape
        kernel = weight[2:]
        steps = zip(sides, kernel, spec.padding, spec.stride, strict=True)
        channels, sides = weight[0], [(n + 2 * p - k) // s + 1 for n, k, p, s in steps]
    if min(sides) < 1:
        raise Unsupported(f"images of shape {shape} are too small")
    return (channels, *sides)
