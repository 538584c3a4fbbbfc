"""Ready distillation tasks: a small convolutional student is taught on the devices (docs/variants.md).

    task = "lepton_fl.compression.taught:mnist_by_writer"      # in a run, with teacher = a trained model

The students are those that a recipe declares by ``student_of`` in its documentation: kind "cnn" with the
width and hidden units below.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from lepton_fl.compression.federated import distillation
from lepton_fl.tasks import images

if TYPE_CHECKING:
    from torch import nn

WIDTH: Final = 8
HIDDEN: Final = 22


def _small(side: int) -> "nn.Module":
    from lepton_fl.tasks.models import CNN

    return CNN((1, side, side), 10, WIDTH, HIDDEN)


digits = distillation(images.digits, partial(_small, 8))
mnist_by_writer = distillation(images.mnist_by_writer, partial(_small, 28))
fashion_mnist = distillation(images.fashion_mnist, partial(_small, 28))
