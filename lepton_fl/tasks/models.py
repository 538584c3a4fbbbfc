"""Small models that average well: no running statistics, every state tensor a float32 parameter.

Importing this module imports torch. Models for a number instead of classes take ``num_classes=0`` and
return shape (N,); all others return logits (N, num_classes).
"""

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor, nn

from lepton_fl.errors import TaskError
from lepton_fl.tasks.task import Task


def initial_model(task: Task, seed: int) -> nn.Module:
    """A fresh model whose weights depend on the task and the seed only.

    The global random state of torch is left as it was.

    Args:
        task: whose model.
        seed: any integer >= 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"The model of task {task.name!r} is a {type(model).__name__}, not a torch module.")
    return model


class Head(nn.Linear):
    """The last layer: logits (N, num_classes), or one number (N,) where there are no classes."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(features, max(1, num_classes))
        self.squeeze = num_classes == 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., features) -> (N, ..., classes), or without the last dimension."""
        out = super().forward(x)
        return out.squeeze(-1) if self.squeeze else out


class Linear(nn.Module):
    """Logistic regression, or ridge regression (with weight decay) where ``num_classes`` is 0.

    It starts at zero, the optimum of an infinite weight decay, so it needs no random start.
    """

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.head = Head(inputs, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> logits or values."""
        out: Tensor = self.head(x.flatten(1))
        return out


class MLP(nn.Module):
    """Fully connected layers with ReLU between them."""

    def __init__(self, inputs: int, num_classes: int, hidden: Sequence[int] = (128,)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, Head(inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> logits or values."""
        out: Tensor = self.layers(x.flatten(1))
        return out


class CNN(nn.Module):
    """Two 3x3 convolutions, each with pooling and then group normalisation, and one hidden layer.

    Group normalisation (Wu & He 2018) keeps no running statistics, so there is nothing in its state that
    averaging over devices with different data would spoil. It comes after pooling, where it has a quarter
    of the values to work on and each next layer gets inputs of one scale.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, width: int = 16, hidden: int = 128
    ) -> None:
        """Make the model.

        Args:
            input_shape: channels, height, width of one image; both sides at least 4.
            num_classes: 0 for a number.
            width: channels of the first convolution; the second has twice as many.
            hidden: width of the hidden layer.
        """
        super().__init__()
        channels, height, breadth = input_shape
        if min(height, breadth) < 4:
            raise ValueError(f"input_shape={input_shape}: both sides must be at least 4")
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.GroupNorm(gcd(4, width), width),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.GroupNorm(gcd(4, 2 * width), 2 * width),
        )
        self.classifier = MLP(prod((2 * width, height // 4, breadth // 4)), num_classes, (hidden,))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits or values."""
        out: Tensor = self.classifier(self.features(x))
        return out


class _Recurrent(nn.Module):
    """What GRU and LSTM share.

    With ``vocabulary``, inputs are tokens (N, T) and go through an embedding; without, they are numbers
    (N, T, inputs). With ``every_step``, there is one output per position (N, T, ...), else one per sequence.
    """

    cell: type[nn.GRU] | type[nn.LSTM]

    def __init__(
        self,
        num_classes: int,
        *,
        inputs: int = 0,
        vocabulary: int = 0,
        embedding: int = 16,
        hidden: int = 128,
        layers: int = 1,
        every_step: bool = False,
    ) -> None:
        super().__init__()
        if bool(inputs) == bool(vocabulary):
            raise ValueError(f"give either inputs={inputs} or vocabulary={vocabulary}")
        self.embedding = nn.Embedding(vocabulary, embedding) if vocabulary else nn.Identity()
        self.recurrent = self.cell(embedding if vocabulary else inputs, hidden, layers, batch_first=True)
        self.head = Head(hidden, num_classes)
        self.every_step = every_step

    def forward(self, x: Tensor) -> Tensor:
        """Sequences -> logits or values, of each step or of the last one."""
        states, _ = self.recurrent(self.embedding(x))  # (N, T, hidden)
        out: Tensor = self.head(states if self.every_step else states[:, -1])
        return out


class GRU(_Recurrent):
    """Gated recurrent units."""

    cell = nn.GRU


class LSTM(_Recurrent):
    """Long short-term memory."""

    cell = nn.LSTM
