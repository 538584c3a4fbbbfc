"""Training and evaluation on one device.

A ``Trainer`` keeps one module whose whole state lies in one flat tensor; rounds load a vector into it,
train, and read the difference. Nothing is built anew between rounds, and a step updates all parameters
with a handful of operations, however many tensors they are.

    trainer = Trainer(task)
    result = trainer.train(model, task.prepare(raw), plan.local, seed=7)
    sums = trainer.evaluate(model, task.prepare(held_out))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from lepton_fl.errors import ConfigError, Rejection, TaskError, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Array, Dataset
from lepton_fl.tasks.losses import loss_of
from lepton_fl.tasks.metrics import Sums
from lepton_fl.tasks.models import initial_model
from lepton_fl.tasks.task import Task
from lepton_fl.training.bridge import check_vector, layout_of, state_tensors
from lepton_fl.training.steps import Step, is_plain, make_step
from lepton_fl.vector import Vector

if TYPE_CHECKING:
    from lepton_fl.privacy.example import Spent

# Libraries choose kernels by where memory begins, and kernels round differently.
_ALIGNED = 64  # bytes; torch's own memory begins so
_AT_ONCE = 512  # rows that a teacher answers

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What local training gave."""

    delta: Vector  # (P,) float32: trained minus start
    num_examples: int  # rows trained on: the weight of this device; 1 where they are not to be told
    sums: Sums  # of TrainingLoss: the loss at each step, before the step
    steps: int  # mini-batches
    seconds: float


class Trainer:
    """One task on one device; not safe for several threads at once."""

    def __init__(self, task: Task, device: Device = "cpu", *, dtype: torch.dtype = torch.float32) -> None:
        """Build the task's model.

        Args:
            task: what is trained.
            device: "auto" takes a GPU where there is one.
            dtype: of weights and inputs. Models are float32; float64 tells, in a check, a wrong formula
                from rounding. The vectors given stay float32, the update is then float64.

        Raises:
            ConfigError: "cuda" was asked for and there is no GPU.
            TaskError: the task's model cannot be used.
        """
        self.task = task
        self.device = _pick_device(device)
        self.dtype = dtype
        module = initial_model(task, 0)
        self.layout = layout_of(module)
        self.module = module.to(self.device, dtype)
        self.loss = loss_of(task)
        self._state, self._grad = _flatten(self.module, dtype)
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self._weights = [p.detach() for p in self._trained]  # the same memory, without a gradient
        self._held: tuple[Dataset, Tensor, Tensor] | None = None  # the rows of the last call, on the device
        self._rows_are_apart = False  # whether the model was found fit for example-level privacy

    @property
    def num_trained(self) -> int:
        """Coordinates P' that are trained; they come first."""
        return len(self._grad)

    def initial(self, seed: int) -> Vector:
        """The task's initial model of this seed, (P,) float32."""
        module = initial_model(self.task, seed)
        trained, others = state_tensors(module)
        return self.layout.flatten({k: t.detach().numpy() for k, t in {**trained, **others}.items()})

    def train(
        self,
        start: Vector,
        data: Dataset,
        local: LocalPlan,
        *,
        seed: int,
        correction: Vector | None = None,
        should_stop: Callable[[], bool] | None = None,
        spent: "Spent | None" = None,
    ) -> LocalResult:
        """Train from ``start`` on this device's rows.

        The same arguments give the same result on the same kind of machine.

        Args:
            start: (P,) float32, the global model.
            data: prepared rows, see ``Task.prepare``; at least one.
            local: how to train.
            seed: of the batch order, of augmentation and of dropout.
            correction: (P',) added to every gradient, over the trained coordinates, which come first.
            should_stop: asked before every step; True ends the training with an error.
            spent: of a plan with example-level privacy: what was charged for it, and its randomness.

        Raises:
            UpdateRejected: NON_FINITE loss, DATA_CONTRACT no rows, WRONG_SHAPE model, or FAILED, stopped.
            TaskError, ConfigError: the model cannot be trained with example-level privacy.
        """
        if local.example_privacy is not None:
            return self._train_privately(start, data, local, seed, should_stop, spent)
        began = perf_counter()
        self._load(start)
        x, y = self._lesson(data)
        rng = np.random.default_rng(seed)
        step = self._stepper(local, correction)
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        seen = steps = 0
        self.module.train()
        with torch.random.fork_rng(devices=_cuda_index(self.device)):
            torch.manual_seed(int(rng.integers(2**63)))
            for rows, size in _batches(len(data), local, rng):
                if should_stop is not None and should_stop():
                    raise stopped(steps)
                losses += size * step(*self._batch(x, y, rows, rng))
                seen, steps = seen + size, steps + 1
                if seen % len(data) == 0:  # once per epoch: reading a value makes a GPU wait
                    self._check_loss(losses, steps)
        total = self._check_loss(losses, steps)
        delta = self._state.cpu().numpy() - start
        sums = {"loss_sum": np.array([total]), "examples": np.array([seen], np.int64)}
        return LocalResult(delta, len(data), sums, steps, perf_counter() - began)

    def refuse_private(self, data: Dataset) -> None:
        """Refuse example-level privacy where this model would break it.

        Args:
            data: prepared rows, of which two are tried; at least one.

        Raises:
            TaskError: names the layers that are in the way.
            ConfigError: Opacus is not installed.
        """
        if not self._rows_are_apart:
            from lepton_fl.training.private import refuse_mixing, refuse_model

            self.module.train()
            refuse_model(self.module, f"The model of task {self.task.name!r}")
            refuse_mixing(self.module, self._tensors(data)[0][:2])
            self._rows_are_apart = True

    def _train_privately(
        self,
        start: Vector,
        data: Dataset,
        local: LocalPlan,
        seed: int,
        should_stop: Callable[[], bool] | None,
        spent: "Spent | None",
    ) -> LocalResult:
        """DP-SGD; nothing but the update is said, since a loss would be one more release."""
        from lepton_fl.privacy.example import poisson_rows
        from lepton_fl.training.allocator import keep_memory
        from lepton_fl.training.private import PrivateGradient

        if spent is None or local.example_privacy is None:
            raise ConfigError("A training with example-level privacy must be charged first.")
        keep_memory()
        self.refuse_private(data)
        began, charge, rng = perf_counter(), spent.charge, np.random.default_rng(seed)
        self._load(start)
        x, y = self._lesson(data)
        gradient = PrivateGradient(self.module, self.loss, self._grad, local.example_privacy.clip_norm, spent)
        step = make_step(local, self._state[: len(self._grad)], self._grad)
        with torch.random.fork_rng(devices=_cuda_index(self.device)), gradient.listening():
            torch.manual_seed(int(rng.integers(2**63)))
            for done in range(charge.steps):
                if should_stop is not None and should_stop():
                    raise stopped(done)
                rows = torch.from_numpy(poisson_rows(len(data), charge.rate, spent.stream))
                gradient.write(*self._batch(x, y, rows, rng), expected=charge.rate * len(data))
                step()
        delta = self._state.cpu().numpy() - start
        sums = {"loss_sum": np.zeros(1), "examples": np.zeros(1, np.int64)}
        return LocalResult(delta, 1, sums, charge.steps, perf_counter() - began)

    def evaluate(self, model: Vector, data: Dataset, *, batch_size: int = 512) -> Sums:
        """The task's metrics of a model on prepared rows; zero sums where there are none.

        Raises:
            UpdateRejected: WRONG_SHAPE model.
        """
        metrics = self.task.metrics
        total = metrics.zero()
        if len(data) == 0:
            return total
        x, _ = self._tensors(data)
        self._load(model)
        self.module.eval()
        with torch.inference_mode():
            for first in range(0, len(data), batch_size):
                outputs = self.module(x[first : first + batch_size])
                batch = metrics.count(outputs.cpu().numpy(), data.y[first : first + batch_size])
                total = metrics.add(total, batch)
        return total

    def _lesson(self, data: Dataset) -> tuple[Tensor, Tensor]:
        """Rows and what is to be answered: their targets or, in a distillation, what the teacher says."""
        x, y = self._tensors(data)
        if self.task.teacher is None:
            return x, y
        answers = cast("Callable[[Tensor], Tensor]", self.module.answers)
        with torch.no_grad():
            y = torch.cat([answers(part) for part in torch.split(x, _AT_ONCE)])
        if not bool(torch.isfinite(y).all()):
            raise UpdateRejected(
                Rejection.NON_FINITE,
                "The teacher's answers are not finite.",
                hint="Name a trained model in run.teacher.",
            )
        return x, y

    def _batch(
        self, x: Tensor, y: Tensor, rows: Tensor | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if rows is not None:
            rows = rows.to(x.device)
            x, y = x.index_select(0, rows), y.index_select(0, rows)
        return (x if self.task.augment is None else self.task.augment(x, rng)), y

    def _stepper(self, local: LocalPlan, correction: Vector | None) -> Callable[[Tensor, Tensor], Tensor]:
        """What does one mini-batch and returns its mean loss before the step."""
        if is_plain(local) and correction is None:
            return partial(
                self._plain_step, local.learning_rate, 1 - local.learning_rate * local.weight_decay
            )
        if correction is not None and correction.shape != self._grad.shape:
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"The correction has shape {correction.shape}, expected {tuple(self._grad.shape)}.",
                hint="It holds one number per trained coordinate.",
            )
        shift = None if correction is None else _tensor(correction).to(self._grad)
        return partial(self._flat_step, make_step(local, self._state[: len(self._grad)], self._grad, shift))

    def _flat_step(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        self._grad.zero_()
        loss = self.loss(self.module(x), y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        step()
        return loss.detach()

    def _plain_step(self, rate: float, keep: float, x: Tensor, y: Tensor) -> Tensor:
        """Without a detour over one gradient vector: a tenth faster on small models."""
        loss = self.loss(self.module(x), y)
        grads = torch.autograd.grad(loss, self._trained, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            if keep != 1:
                torch._foreach_mul_(self._weights, keep)
            torch._foreach_add_(self._weights, grads, alpha=-rate)
        return loss.detach()

    def _check_loss(self, losses: Tensor, steps: int) -> float:
        total = float(losses)
        if not np.isfinite(total):
            raise non_finite(total, steps)
        return total

    def _load(self, flat: Vector) -> None:
        check_vector(self.layout, flat)
        with torch.no_grad():
            self._state.copy_(_tensor(flat))

    def _tensors(self, data: Dataset) -> tuple[Tensor, Tensor]:
        """The rows as tensors on the device, kept for the next call with the same data."""
        if len(data) == 0:
            raise UpdateRejected(
                Rejection.DATA_CONTRACT, "There are no rows to train on.", hint="Check the data source."
            )
        if self._held is None or self._held[0] is not data:
            self._held = data, self._to_device(data.x), self._to_device(data.y)
        return self._held[1], self._held[2]

    def _to_device(self, array: Array) -> Tensor:
        tensor = _tensor(array)
        if tensor.data_ptr() % _ALIGNED:
            tensor = tensor.clone()
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def stopped(steps: int) -> UpdateRejected:
    """The refusal of a training that nobody waits for any more."""
    return UpdateRejected(Rejection.FAILED, f"Training was stopped after {steps} steps.")


def non_finite(loss: float, steps: int) -> UpdateRejected:
    """The refusal of a training whose loss is no number any more."""
    return UpdateRejected(
        Rejection.NON_FINITE,
        f"The training loss is {loss} within {steps} steps.",
        hint="Training diverged; lower the learning rate, set clip_grad_norm, or look at the data.",
    )


def _pick_device(device: Device) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device = 'cuda', but torch finds no GPU here.", hint="Use 'auto' or 'cpu'.")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def _tensor(array: Array) -> Tensor:
    """A tensor of the array's own memory where torch allows it: contiguous and writable."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _cuda_index(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []


def _flatten(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Move the module's state into one tensor, and its gradients into another.

    Returns:
        State (P,) in the order of ``layout_of``, gradients (P',) of its trained first part. The module's
        tensors are views of them from here on.
    """
    trained, others = state_tensors(module, dtype)
    tensors = [*trained.values(), *others.values()]
    if not trained:
        raise TaskError("The model has no trainable parameter.")
    state = torch.cat([t.detach().reshape(-1) for t in tensors])
    grad = torch.zeros_like(state[: sum(t.numel() for t in trained.values())])
    start = 0
    for tensor in tensors:
        stop = start + tensor.numel()
        tensor.data = state[start:stop].view(tensor.shape)
        if tensor.requires_grad:
            tensor.grad = grad[start:stop].view(tensor.shape)
        start = stop
    return state, grad


def _batches(n: int, local: LocalPlan, rng: np.random.Generator) -> Iterator[tuple[Tensor | None, int]]:
    """Row numbers and size of each mini-batch; None = all rows. The last one of an epoch may be smaller."""
    steps = 0
    for _ in range(local.epochs):
        order = None if local.batch_size >= n else torch.from_numpy(rng.permutation(n))
        for first in range(0, n, local.batch_size):
            if local.max_steps and steps >= local.max_steps:
                return
            rows = None if order is None else order[first : first + local.batch_size]
            yield rows, min(local.batch_size, n - first)
            steps += 1
