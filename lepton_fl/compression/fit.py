"""Training on the teacher's answers: what distillation, fine-tuning and quantisation-aware training share.

Importing this module imports torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_fl.compression.recipe import Training
from lepton_fl.compression.source import read_tensors
from lepton_fl.errors import RunError, StateCorrupt
from lepton_fl.files import remove, write_atomic
from lepton_fl.tasks import Task
from lepton_fl.tasks.data import Array
from lepton_fl.tasks.losses import loss_of

OnStep = Callable[[str], None]  # called now and then with what is under way
Masks = Mapping[str, Tensor]  # parameter -> 1 where it may live

_BATCH = 512  # rows of a forward pass without gradients


@dataclass(frozen=True, eq=False)
class Lesson:
    """Rows and what is to be answered to them, on the device that trains."""

    x: Tensor  # (N, ...)
    answers: Tensor  # (N, ..., C) the teacher's logits, or (N,) its values
    labels: Tensor | None = None  # (N, ...) true targets

    @classmethod
    def of(cls, x: Array, answers: Array, labels: Array | None, device: torch.device) -> "Lesson":
        """Move rows and answers onto the device."""
        y = None if labels is None else torch.from_numpy(labels).to(device)
        return cls(torch.from_numpy(x).to(device), torch.from_numpy(answers).to(device), y)


def answers_of(modules: Sequence[nn.Module], x: Array, device: torch.device) -> Array:
    """What teachers answer together: the mean of their outputs on (N, ...) rows, float32."""
    total: Array | None = None
    for module in modules:
        module = module.to(device).eval()
        with torch.inference_mode():
            parts = [
                module(torch.from_numpy(x[i : i + _BATCH]).to(device)).cpu().numpy()
                for i in range(0, len(x), _BATCH)
            ]
        outputs = np.concatenate(parts)
        total = outputs if total is None else total + outputs
    if total is None:
        raise ValueError("no teacher")
    found: Array = np.asarray(total / len(modules), np.float32)
    return found


def teaching_loss(outputs: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """How far a student's outputs are from the teacher's.

    For classes, T^2 KL(teacher || student) of softened outputs (Hinton, Vinyals & Dean 2015, "Distilling the
    Knowledge in a Neural Network"), mean over decisions; for numbers the squared error.
    """
    if outputs.ndim == 1:
        return functional.mse_loss(outputs, answers)
    student = functional.log_softmax(outputs.flatten(0, -2) / temperature, -1)
    teacher = functional.log_softmax(answers.flatten(0, -2) / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def fit(
    module: nn.Module,
    task: Task,
    lesson: Lesson,
    how: Training,
    *,
    seed: int,
    checkpoint: Path,
    masks: Masks | None = None,
    on_step: OnStep = lambda what: None,
) -> None:
    """Train a module in place; killed and called again, it goes on at the last epoch that was finished.

    Called again when it was over, it brings back what came out of it.

    Args:
        module: on the device of the lesson.
        task: whose loss and augmentation are used.
        lesson: rows and answers.
        how: epochs, rate, temperature.
        seed: of the batch order; epoch e draws from (seed, e).
        checkpoint: file that keeps the state after every epoch; of this module and this lesson only.
        masks: parameters that stay zero somewhere.
        on_step: called after every epoch.

    Raises:
        RunError: the loss is no finite number any more; the module is of no use then.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(list(trained.values()), lr=how.learning_rate)
    buffers = dict(module.named_buffers())  # of batch normalisation, say
    begin = _load(checkpoint, trained, buffers, optimizer)
    module.train()
    for epoch in range(begin, how.epochs):
        loss = _epoch(module, task, lesson, how, optimizer, masks or {}, epoch, seed)
        if not np.isfinite(loss):
            remove(checkpoint)
            raise RunError(
                f"The loss is {loss} in epoch {epoch + 1}: training diverged.",
                hint="Lower the step's learning_rate in the recipe.",
            )
        _save(checkpoint, trained, buffers, optimizer, epoch + 1)
        on_step(f"epoch {epoch + 1} of {how.epochs}, loss {loss:.4f}")
    module.eval()


def _epoch(
    module: nn.Module,
    task: Task,
    lesson: Lesson,
    how: Training,
    optimizer: torch.optim.Optimizer,
    masks: Masks,
    epoch: int,
    seed: int,
) -> float:
    rng = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(rng.permutation(len(lesson.x))).to(lesson.x.device)
    batches = torch.split(order, how.batch_size)
    total = torch.zeros((), device=lesson.x.device)
    named = dict(module.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        for number, rows in enumerate(batches):
            share = (epoch + number / len(batches)) / how.epochs
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * (1 + cos(pi * share)) / 2
            loss = _loss(module, task, lesson, how, rows, rng)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    named[name].mul_(mask)
            total += loss.detach()
    return float(total) / len(batches)


def _loss(
    module: nn.Module, task: Task, lesson: Lesson, how: Training, rows: Tensor, rng: np.random.Generator
) -> Tensor:
    x = lesson.x[rows]
    outputs = module(x if task.augment is None else task.augment(x, rng))
    loss = teaching_loss(outputs, lesson.answers[rows], how.temperature)
    if how.labels and lesson.labels is not None:
        loss = (1 - how.labels) * loss + how.labels * loss_of(task)(outputs, lesson.labels[rows])
    return loss


# --- between epochs ---------------------------------------------------------------------------------


def _save(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> None:
    from safetensors.torch import save

    tensors = {f"weight:{name}": p.detach().contiguous() for name, p in trained.items()}
    tensors |= {f"buffer:{name}": b.contiguous() for name, b in buffers.items()}
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        tensors |= {f"{key}:{name}": torch.as_tensor(state[key]) for key in ("exp_avg", "exp_avg_sq", "step")}
    write_atomic(path, save(tensors, {"epoch": str(epoch)}))


def _load(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Set weights, buffers and optimiser back to the last epoch; return how many are done."""
    if not path.exists():
        return 0
    try:
        arrays, said = read_tensors(path)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(torch.from_numpy(arrays[f"buffer:{name}"]))
            for name, parameter in trained.items():
                parameter.copy_(torch.from_numpy(arrays[f"weight:{name}"]))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(arrays[f"step:{name}"])),
                    "exp_avg": torch.from_numpy(arrays[f"exp_avg:{name}"]).to(parameter),
                    "exp_avg_sq": torch.from_numpy(arrays[f"exp_avg_sq:{name}"]).to(parameter),
                }
        return int(said["epoch"])
    except (StateCorrupt, KeyError, ValueError, RuntimeError) as error:
        raise StateCorrupt(
            f"{path} is not the state of this training: {error}.", hint="Delete it; the step begins anew."
        ) from error
