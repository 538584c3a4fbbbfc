"""Local optimisers on flat tensors: one call is one step.

They compute what ``torch.optim.SGD`` and ``torch.optim.Adam`` compute, for one vector instead of a list
of tensors. Order of a step: SCAFFOLD's correction and FedProx's term, gradient clipping, weight decay,
momentum or Adam.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lepton_fl.plan import LocalPlan

Step = Callable[[], None]  # moves the weights along the gradient that lies ready

_BETAS = (0.9, 0.999)  # Kingma & Ba 2015
_EPSILON = 1e-8


def is_plain(local: LocalPlan) -> bool:
    """Whether a step is w <- w - rate * (gradient + decay * w), and needs no gradient as one vector."""
    special = local.momentum or local.proximal_mu or local.clip_grad_norm
    return local.optimizer == "sgd" and not special


def make_step(local: LocalPlan, weights: Tensor, grad: Tensor, correction: Tensor | None = None) -> Step:
    """A fresh optimiser.

    Args:
        local: which, and how.
        weights: (P',) changed in place at each step; now at the global model.
        grad: (P',) read, and overwritten, at each step.
        correction: (P',) added to every gradient (SCAFFOLD, Karimireddy et al. 2020: c - c_i).
    """
    move = _adam(local, weights, grad) if local.optimizer == "adam" else _sgd(local, weights, grad)
    start = weights.clone() if local.proximal_mu else None

    @torch.no_grad()
    def step() -> None:
        if correction is not None:
            grad.add_(correction)
        if start is not None:  # the gradient of mu/2 * |w - start|^2
            grad.add_(weights - start, alpha=local.proximal_mu)
        if local.clip_grad_norm:
            grad.mul_((local.clip_grad_norm / grad.norm().clamp(min=1e-12)).clamp(max=1.0))
        if local.weight_decay:
            grad.add_(weights, alpha=local.weight_decay)
        move()

    return step


def _sgd(local: LocalPlan, weights: Tensor, grad: Tensor) -> Step:
    if not local.momentum:

        def plain() -> None:
            weights.add_(grad, alpha=-local.learning_rate)

        return plain
    velocity = torch.zeros_like(grad)

    def heavy_ball() -> None:
        velocity.mul_(local.momentum).add_(grad)
        weights.add_(velocity, alpha=-local.learning_rate)

    return heavy_ball


def _adam(local: LocalPlan, weights: Tensor, grad: Tensor) -> Step:
    beta_1, beta_2 = _BETAS
    mean, square = torch.zeros_like(grad), torch.zeros_like(grad)
    count = 0

    def adam() -> None:
        nonlocal count
        count += 1
        mean.lerp_(grad, 1 - beta_1)
        square.mul_(beta_2).addcmul_(grad, grad, value=1 - beta_2)
        scale = (square / (1 - beta_2**count)).sqrt_().add_(_EPSILON)
        weights.addcdiv_(mean, scale, value=-local.learning_rate / (1 - beta_1**count))

    return adam
