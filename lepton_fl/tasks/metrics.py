"""Metrics as sums that add up over devices.

A device counts; the coordinator adds the counts and only then divides. The result is that of one
evaluation over all rows together, whatever the number of devices, and no device's own accuracy is
needed. Pure numpy: the coordinator imports no torch for it.

    metrics = Classification(10)
    total = metrics.add(metrics.count(logits_a, labels_a), metrics.count(logits_b, labels_b))
    metrics.summarise(total)["accuracy"]
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.tasks.data import Array

Sums = dict[str, NDArray[Any]]  # name -> (n,) int64 or float64

_COUNT = "int64"
_REAL = "float64"
# A sum of a million such values still fits its type.
_MAX_COUNT = 2**43
_MAX_REAL = 1e290


class Metrics(ABC):
    """A family of sums, and the figures computed from them."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, tuple[str, int]]:
        """Name -> (dtype, length) of each sum; integers are counts and never negative."""

    @abstractmethod
    def count(self, outputs: Array, targets: Array) -> Sums:
        """The sums of one batch.

        Args:
            outputs: (N, ...) what the model returned.
            targets: (N, ...) the truth, as the task prepared it.
        """

    @abstractmethod
    def summarise(self, sums: Sums) -> dict[str, float]:
        """Figures from sums, all finite; one that is undefined (no rows, no variance) is left out."""

    def zero(self) -> Sums:
        """The sums of no rows."""
        return {name: np.zeros(length, dtype) for name, (dtype, length) in self.fields.items()}

    def add(self, a: Sums, b: Sums) -> Sums:
        """Both together."""
        return {name: a[name] + b[name] for name in self.fields}

    def validate(self, sums: Mapping[str, Array]) -> None:
        """Refuse sums that no honest count can give.

        Raises:
            UpdateRejected: MALFORMED for a missing or unknown name, WRONG_SHAPE for another length or type,
                NON_FINITE for NaN or infinity, OUT_OF_RANGE for a negative or absurdly large count.
        """
        if sums.keys() != self.fields.keys():
            raise UpdateRejected(
                Rejection.MALFORMED,
                f"The metrics are named {sorted(sums)}, expected {sorted(self.fields)}.",
                hint="The device may run another version of the task.",
            )
        for name, (dtype, length) in self.fields.items():
            _validate_one(name, sums[name], dtype, length)


def _validate_one(name: str, values: Array, dtype: str, length: int) -> None:
    if values.shape != (length,) or values.dtype != dtype:
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"Metric {name!r} is {values.dtype}{values.shape}, expected {dtype}{(length,)}.",
        )
    if not np.isfinite(values).all():
        raise UpdateRejected(
            Rejection.NON_FINITE,
            f"Metric {name!r} is not finite.",
            hint="The model diverged on this device's data; lower the learning rate or look at the data.",
        )
    low, high = (0, _MAX_COUNT) if dtype == _COUNT else (-_MAX_REAL, _MAX_REAL)
    if values.size and (values.min() < low or values.max() > high):
        raise UpdateRejected(
            Rejection.OUT_OF_RANGE,
            f"Metric {name!r} reaches from {values.min()} to {values.max()}, allowed are {low} to {high}.",
        )


def _inconsistent(message: str) -> UpdateRejected:
    return UpdateRejected(Rejection.MALFORMED, message, hint="The device's counts contradict each other.")


def _one(value: float, dtype: str = _REAL) -> NDArray[Any]:
    return np.array([value], dtype)


def cross_entropy_sum(logits: Array, labels: Array) -> float:
    """The sum over rows of the negative log-likelihood in nats; logits (N, C), labels (N,).

    Logits that are not finite give a sum that is not.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(wide, labels.reshape(-1, 1), axis=1)[:, 0]
        return float((np.log(np.exp(wide).sum(axis=1)) - chosen).sum())


@dataclass(frozen=True)
class Classification(Metrics):
    """Cross-entropy and the confusion matrix: accuracy, precision, recall, F1."""

    num_classes: int

    @property
    def fields(self) -> Mapping[str, tuple[str, int]]:
        """One flat confusion matrix: entry ``truth * num_classes + predicted``."""
        return {"loss_sum": (_REAL, 1), "examples": (_COUNT, 1), "confusion": (_COUNT, self.num_classes**2)}

    def count(self, outputs: Array, targets: Array) -> Sums:
        """From logits (N, C) and labels (N,)."""
        pairs = targets.astype(np.int64) * self.num_classes + outputs.argmax(axis=1)
        return {
            "loss_sum": _one(cross_entropy_sum(outputs, targets)),
            "examples": _one(len(outputs), _COUNT),
            "confusion": np.bincount(pairs, minlength=self.num_classes**2).astype(np.int64),
        }

    def validate(self, sums: Mapping[str, Array]) -> None:
        """As for every metric; also, the matrix must hold every example once and the loss be >= 0."""
        super().validate(sums)
        if sums["confusion"].sum() != sums["examples"][0] or sums["loss_sum"][0] < 0:
            raise _inconsistent(
                f"{int(sums['examples'][0])} examples, {int(sums['confusion'].sum())} in the matrix, "
                f"loss {float(sums['loss_sum'][0]):g}."
            )

    def summarise(self, sums: Sums) -> dict[str, float]:
        """Loss, accuracy, balanced accuracy; precision, recall and F1 as plain means over classes.

        A class takes part in the means once it occurs among the labels or the predictions; balanced
        accuracy is the mean recall of the classes that have labels.
        """
        n = int(sums["examples"][0])
        if n == 0:
            return {"examples": 0.0}
        matrix = self._matrix(sums)
        truth, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
        present = truth + predicted > 0
        per_class = self.per_class(sums)
        figures = {name: float(values[present].mean()) for name, values in per_class.items()}
        return {
            "loss": float(sums["loss_sum"][0]) / n,
            "examples": float(n),
            "accuracy": float(matrix.trace() / n),
            "balanced_accuracy": float(per_class["recall"][truth > 0].mean()),
            **figures,
        }

    def per_class(self, sums: Sums) -> dict[str, NDArray[np.float64]]:
        """Precision, recall and F1 of each class, (num_classes,); 0 where nothing was counted."""
        matrix = self._matrix(sums)
        hits, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        return {
            "precision": hits / np.maximum(predicted, 1),
            "recall": hits / np.maximum(truth, 1),
            "f1": 2 * hits / np.maximum(truth + predicted, 1),
        }

    def _matrix(self, sums: Sums) -> NDArray[np.int64]:
        matrix: NDArray[np.int64] = sums["confusion"].reshape(self.num_classes, self.num_classes)
        return matrix


@dataclass(frozen=True)
class Regression(Metrics):
    """Squared and absolute error, in the target's own unit: R², RMSE, MAE.

    The model works on ``(target - offset) / scale``.
    """

    scale: float = 1.0
    offset: float = 0.0

    @property
    def fields(self) -> Mapping[str, tuple[str, int]]:
        """Errors, and what the variance of the target needs."""
        reals = ("squared_error", "absolute_error", "target_sum", "target_squares")
        return {"examples": (_COUNT, 1), **dict.fromkeys(reals, (_REAL, 1))}

    def count(self, outputs: Array, targets: Array) -> Sums:
        """From predictions (N,) and targets (N,), both as the model sees them."""
        truth = targets.astype(np.float64) * self.scale + self.offset
        error = (outputs.astype(np.float64) - targets) * self.scale
        return {
            "examples": _one(len(outputs), _COUNT),
            "squared_error": _one(float((error**2).sum())),
            "absolute_error": _one(float(np.abs(error).sum())),
            "target_sum": _one(float(truth.sum())),
            "target_squares": _one(float((truth**2).sum())),
        }

    def validate(self, sums: Mapping[str, Array]) -> None:
        """As for every metric; also, errors and squares must not be negative."""
        super().validate(sums)
        for name in ("squared_error", "absolute_error", "target_squares"):
            if sums[name][0] < 0:
                raise _inconsistent(f"{name} is {float(sums[name][0]):g}, below 0.")

    def summarise(self, sums: Sums) -> dict[str, float]:
        """Loss (mean squared error), RMSE, MAE and, where the target varies, R²."""
        n = int(sums["examples"][0])
        if n == 0:
            return {"examples": 0.0}
        mse = float(sums["squared_error"][0]) / n
        figures = {
            "loss": mse,
            "examples": float(n),
            "rmse": mse**0.5,
            "mae": float(sums["absolute_error"][0]) / n,
        }
        squares = float(sums["target_squares"][0])
        variance = squares / n - (float(sums["target_sum"][0]) / n) ** 2
        if variance > 1e-12 * squares / n:  # below that, only rounding is left
            figures["r2"] = 1 - mse / variance
        return figures


@dataclass(frozen=True)
class NextToken(Metrics):
    """Next-character prediction at every position: accuracy, cross-entropy, perplexity."""

    @property
    def fields(self) -> Mapping[str, tuple[str, int]]:
        """Examples are sequences; the loss is summed over tokens."""
        return {
            "loss_sum": (_REAL, 1),
            "examples": (_COUNT, 1),
            "tokens": (_COUNT, 1),
            "correct": (_COUNT, 1),
        }

    def count(self, outputs: Array, targets: Array) -> Sums:
        """From logits (N, T, V) and tokens (N, T)."""
        logits, tokens = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)
        return {
            "loss_sum": _one(cross_entropy_sum(logits, tokens)),
            "examples": _one(len(outputs), _COUNT),
            "tokens": _one(tokens.size, _COUNT),
            "correct": _one(int((logits.argmax(axis=1) == tokens).sum()), _COUNT),
        }

    def validate(self, sums: Mapping[str, Array]) -> None:
        """As for every metric; also, no more correct tokens than tokens, and a loss >= 0."""
        super().validate(sums)
        if sums["correct"][0] > sums["tokens"][0] or sums["loss_sum"][0] < 0:
            raise _inconsistent(
                f"{int(sums['correct'][0])} of {int(sums['tokens'][0])} tokens correct, "
                f"loss {float(sums['loss_sum'][0]):g}."
            )

    def summarise(self, sums: Sums) -> dict[str, float]:
        """Loss per token in nats, accuracy, perplexity."""
        tokens = int(sums["tokens"][0])
        if tokens == 0:
            return {"examples": float(sums["examples"][0])}
        loss = float(sums["loss_sum"][0]) / tokens
        return {
            "loss": loss,
            "examples": float(sums["examples"][0]),
            "accuracy": float(sums["correct"][0]) / tokens,
            "perplexity": float(np.exp(min(loss, 700.0))),  # exp(710) overflows
        }


@dataclass(frozen=True)
class TrainingLoss(Metrics):
    """What local training reports: its mean loss, in the unit of the task's loss function."""

    @property
    def fields(self) -> Mapping[str, tuple[str, int]]:
        """The loss is summed over the examples seen, once per epoch."""
        return {"loss_sum": (_REAL, 1), "examples": (_COUNT, 1)}

    def count(self, outputs: Array, targets: Array) -> Sums:
        """From losses (N,); ``targets`` is not looked at."""
        return {
            "loss_sum": _one(float(outputs.sum(dtype=np.float64))),
            "examples": _one(len(outputs), _COUNT),
        }

    def summarise(self, sums: Sums) -> dict[str, float]:
        """The mean loss."""
        n = int(sums["examples"][0])
        return {"loss": float(sums["loss_sum"][0]) / n, "examples": float(n)} if n else {"examples": 0.0}
