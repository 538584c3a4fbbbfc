"""The rows that students learn from: the operator's own, or a generator's; and how far off they are.

In-domain rows decide what a student becomes: 10,000 unlabelled ones give almost what labels give, rows of
another domain or noise give a model that fails. So the distance of the rows from the evaluation set is
measured through the teacher's eyes and goes into the card, and the gate refuses what is too far.

Importing this module imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_fl.compression.card import Transfer
from lepton_fl.compression.fit import OnStep
from lepton_fl.compression.recipe import GeneratorSpec, TransferSpec
from lepton_fl.errors import ConfigError, DataContractError, DataError
from lepton_fl.tasks import Dataset, Task
from lepton_fl.tasks.archive import array_names, read_arrays
from lepton_fl.tasks.data import Array
from lepton_fl.tasks.models import initial_model
from lepton_fl.tasks.sources import DataSourceSpec, read_source

_LATENT = 64  # numbers a generator starts from


@dataclass(frozen=True, eq=False)
class TransferRows:
    """Prepared rows, and true targets where the operator has them."""

    x: Array  # (N, ...)
    labels: Array | None
    seconds: float  # to read or make them


# --- rows the operator owns ---------------------------------------------------------------------------


def proxy_rows(spec: TransferSpec, task: Task) -> TransferRows:
    """Read, check and prepare the operator's rows.

    Raises:
        DataError: they cannot be read.
        DataContractError: they are not what the task takes.
    """
    began = perf_counter()
    if spec.data is None:
        raise ConfigError("transfer.source is 'proxy' and transfer.data names no rows.")
    raw = read_source(spec.data, task) if spec.labelled else _unlabelled(spec.data, task)
    if spec.rows:
        raw = raw.take(np.arange(min(spec.rows, len(raw))))
    if not len(raw):
        raise DataError("The proxy set has no rows.", hint="Name another one in transfer.data.")
    try:
        prepared = task.prepare(raw)
    except DataContractError as error:
        raise DataContractError(f"The proxy rows: {error}", hint=error.hint) from error
    labels = prepared.y if spec.labelled else None
    return TransferRows(prepared.x, labels, perf_counter() - began)


def _unlabelled(source: DataSourceSpec, task: Task) -> Dataset:
    """Rows without their targets, which may be absent; some that the contract allows stand in their place."""
    if source.kind == "npz" and source.path is not None:
        names = array_names(source.path.expanduser())
        if "x" in names and "y" not in names:
            x = read_arrays(source.path.expanduser(), ["x"])["x"]
            return Dataset(x, _targets(task, len(x)))
    raw = read_source(source, task)
    return Dataset(raw.x, _targets(task, len(raw)))


def _targets(task: Task, rows: int) -> Array:
    contract = task.contract
    dtype = np.int64 if contract.num_classes else np.float32
    value = 0 if contract.num_classes else max(contract.target_low, min(0.0, contract.target_high))
    return np.full((rows, *contract.target_shape), value, dtype)


# --- how far off they are -------------------------------------------------------------------------------


def describe(
    rows: TransferRows, spec: TransferSpec, answers: Array, reference: Array, *, classes: bool
) -> Transfer:
    """Hold the teacher's answers to transfer rows against its answers to the evaluation set.

    The shift is the larger Kolmogorov-Smirnov distance of two statistics of an answer: its entropy, and its
    log-sum-exp ("energy", Liu et al. 2020, "Energy-based Out-of-distribution Detection"); of the value itself
    in a regression. Rows of the same source give nearly 0, noise and other domains nearly 1.

    Args:
        rows: that were answered.
        spec: where they come from.
        answers: (N, ..., C) the teacher's, to the rows.
        reference: (M, ..., C) the teacher's, to the evaluation set.
        classes: whether answers are logits.
    """
    if spec.source == "none":
        raise ValueError("no transfer rows to describe")
    here, there = _statistics(answers, classes=classes), _statistics(reference, classes=classes)
    shift = max(_distance(a, b) for a, b in zip(here, there, strict=True))
    return Transfer(
        source=spec.source,
        rows=len(rows.x),
        labelled=rows.labels is not None,
        entropy=float(here[0].mean()) if classes else None,
        reference_entropy=float(there[0].mean()) if classes else None,
        shift=shift,
        seconds=rows.seconds,
    )


def _statistics(outputs: Array, *, classes: bool) -> tuple[Array, ...]:
    if not classes:
        return (outputs.astype(np.float64).ravel(),)
    logits = outputs.reshape(-1, outputs.shape[-1]).astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    exponents = np.exp(logits - peak)
    total = exponents.sum(axis=1, keepdims=True)
    log_shares = logits - peak - np.log(total)
    entropy = np.maximum(0.0, -(exponents / total * log_shares).sum(axis=1))
    return entropy, (peak + np.log(total))[:, 0]


def _distance(a: Array, b: Array) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the largest gap between the distribution functions."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    gaps = np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
    return float(np.abs(gaps).max())


# --- a generator --------------------------------------------------------------------------------------


class _Generator(nn.Module):
    """Noise (N, 64) to rows within the bounds of the task's inputs; images through upsampled convolutions."""

    def __init__(self, shape: tuple[int, ...], low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.shape, self.low, self.high = shape, low, high
        if len(shape) == 3:
            channels, height, width = shape
            self.start = (32, -(-height // 4), -(-width // 4))
            self.layers = nn.Sequential(
                nn.Linear(_LATENT, prod(self.start)),
                nn.Unflatten(1, self.start),
                nn.BatchNorm2d(32),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.LeakyReLU(0.2),
                nn.Upsample(size=(height, width)),
                nn.Conv2d(32, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.LeakyReLU(0.2),
                nn.Conv2d(16, channels, 3, padding=1),
            )
        else:
            self.layers = nn.Sequential(
                nn.Linear(_LATENT, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2), nn.Linear(256, prod(shape)),
                nn.Unflatten(1, shape),
            )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        span: Tensor = self.low + (self.high - self.low) * torch.sigmoid(self.layers(z))
        return span


def generated_rows(
    spec: GeneratorSpec,
    task: Task,
    teachers: Sequence[nn.Module],
    example: Array,
    *,
    seed: int,
    device: torch.device,
    on_step: OnStep = lambda what: None,
) -> TransferRows:
    """Train a generator against the teacher and keep what it made along the way.

    The generator looks for rows of which the teacher is sure (one-hot loss), of all classes alike (entropy;
    both Chen et al. 2019, "Data-Free Learning of Student Networks"), and on which a student that learns
    beside it still differs (Micaelli & Storkey 2019, "Zero-shot Knowledge Transfer via Adversarial Belief
    Matching"). No row of anybody is read: ``example`` gives shape and type. The student is thrown away.

    Raises:
        ConfigError: the task's inputs are tokens or have no bounds, or the task is a regression.
    """
    began = perf_counter()
    low, high = _bounds(task, example)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = _Generator(example.shape[1:], low.to(device), high.to(device)).to(device)
        learner = initial_model(task, seed + 1).to(device)
        kept = _compete(spec, generator, [t.to(device).eval() for t in teachers], learner, device, on_step)
    return TransferRows(kept[-spec.rows :], None, perf_counter() - began)


def _compete(
    spec: GeneratorSpec,
    generator: nn.Module,
    teachers: Sequence[nn.Module],
    learner: nn.Module,
    device: torch.device,
    on_step: OnStep,
) -> Array:
    """Rows (at least spec.rows) from the second half of the training."""
    makes = torch.optim.Adam(generator.parameters(), lr=spec.learning_rate)
    learns = torch.optim.Adam(learner.parameters(), lr=0.002)
    first = spec.steps // 2
    each = -(-spec.rows // (spec.steps - first))  # kept of each batch of the second half
    kept: list[Array] = []
    for step in range(spec.steps):
        x = generator(torch.randn(spec.batch_size, _LATENT, device=device))
        loss = _generator_loss(_mean(teachers, x), learner(x))
        _move(makes, loss)
        for _ in range(2):
            with torch.no_grad():
                x = generator(torch.randn(max(spec.batch_size, each), _LATENT, device=device))
                wanted = _mean(teachers, x)
            _move(learns, functional.l1_loss(learner(x), wanted))
        if step >= first:
            kept.append(x[:each].cpu().numpy())
        if step % 50 == 0:
            on_step(f"generator, step {step} of {spec.steps}")
    return np.concatenate(kept)


def _generator_loss(teacher: Tensor, learner: Tensor) -> Tensor:
    sure = functional.cross_entropy(teacher, teacher.argmax(1))
    shares = functional.softmax(teacher, 1).mean(0)
    alike = (shares * shares.clamp(min=1e-9).log()).sum()
    return sure + 5 * alike - functional.l1_loss(learner, teacher)


def _mean(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([teacher(x) for teacher in teachers]).mean(0)


def _move(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()


def _bounds(task: Task, example: Array) -> tuple[Tensor, Tensor]:
    """Smallest and largest prepared row, (1, ...), from the contract."""
    contract = task.contract
    if example.dtype.kind != "f" or not contract.num_classes or contract.target_shape:
        raise ConfigError(
            f"A generator cannot be trained for {task.name!r}: it makes rows of numbers with one class each.",
            hint="Give a proxy set, or distil on the devices.",
        )
    raw = np.stack([np.broadcast_to(b, contract.shape) for b in (contract.low, contract.high)]).astype(
        np.float64
    )
    if contract.dtype == "uint8":
        raw = raw.clip(0, 255)
    if np.abs(raw).max() > 1e30:
        raise ConfigError(
            f"A generator cannot be trained for {task.name!r}: its contract gives no bounds of the inputs.",
            hint="Set low and high in the task's contract, give a proxy set, or distil on the devices.",
        )
    made = task.transform(Dataset(raw.astype(np.float32), _targets(task, 2))).x
    low, high = torch.from_numpy(made.min(0, keepdims=True)), torch.from_numpy(made.max(0, keepdims=True))
    return low, high
