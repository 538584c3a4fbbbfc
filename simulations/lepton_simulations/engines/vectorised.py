"""The whole step of K devices under ``torch.func.vmap``: any module that is a function of its parameters.

The weights of K devices are the rows of one matrix; one call gives all their gradients. This is the engine
for a GPU, where one device's step is too little work; on a CPU ``fused`` and ``lean`` are faster for most
models. Unlike theirs, a device's result may differ in its last bits with the number of devices in its chunk,
because the libraries choose their kernels by it: the same chunks give the same bits.

``compiled`` sends the gradient through ``torch.compile``, always for K devices: another number would be
compiled anew.
"""

import copy
from collections.abc import Callable, Sequence
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.bridge import check_vector
from lepton_fl.training.trainer import Trainer, non_finite
from lepton_fl.vector import Vector
from lepton_simulations.engines.batches import Chunk, Halted, flat_rows, targets, vectors
from lepton_simulations.engines.contract import ClientWork, Stop, Trained, Unsupported, stopped
from lepton_simulations.engines.lean import LeanEngine
from lepton_simulations.engines.schedule import chunks, schedule

_CACHE = 4 * 2**20  # bytes of weights of a chunk on a CPU
_COPIES = 8  # of the weights that a step holds on a GPU, with room for activations
_MOST = 4096  # devices in a chunk
_FEED = 2**28  # bytes of rows laid out at a time
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam, as in ``lepton_fl.training.steps``

Gradients = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class VectorisedEngine:
    """See the module; made for one task and rows of one shape."""

    def __init__(self, trainer: Trainer, sample: Dataset, *, compiled: bool = False, chunk: int = 0) -> None:
        """Look at the model.

        Args:
            trainer: whose task; trains what does not fit here.
            sample: some device's rows; all have this shape.
            compiled: whether gradients go through ``torch.compile``.
            chunk: devices per call; 0 = as many as the cache, or the GPU's memory, holds.

        Raises:
            Unsupported: the task augments its batches, or the model has state that training changes.
        """
        if trainer.task.augment is not None:
            raise Unsupported("the task augments its batches")
        if any(True for _ in trainer.module.buffers()):
            raise Unsupported("the model has buffers, which training may change")
        self.name, self.is_plain = "compiled" if compiled else "vectorised", False
        self._trainer, self._lean, self._compiled = trainer, LeanEngine(trainer), compiled
        self._module = copy.deepcopy(trainer.module).train()
        self._slots, self._trained = trainer.layout.slots, trainer.num_trained
        trained, others = (
            [s for s in self._slots if (s.stop <= self._trained) == own] for own in (True, False)
        )
        self._sizes = [[s.stop - s.start for s in slots] for slots in (trained, others)]
        self._row, self._target = sample.x[:1], sample.y[:1]
        self.chunk = chunk or _chunk(trainer)
        batched: Gradients = vmap(grad_and_value(self._loss), in_dims=(0, 0, 0, 0, 0))
        self._gradients = torch.compile(batched, dynamic=False) if compiled else batched
        self._fits: WeakKeyDictionary[Dataset, bool] = WeakKeyDictionary()
        self._deltas = np.zeros((0, trainer.layout.size), torch.zeros((), dtype=trainer.dtype).numpy().dtype)

    def know(self, data: Dataset) -> None:
        """See ``Engine``."""
        self._fits[data] = self._rows_fit(data)

    def train(
        self,
        start: Vector,
        clients: Sequence[ClientWork],
        local: LocalPlan,
        *,
        should_stop: Stop | None = None,
    ) -> Trained:
        """See ``Engine.train``."""
        check_vector(self._trainer.layout, start)
        if len(self._deltas) < len(clients):
            self._deltas = np.zeros((len(clients), len(start)), self._deltas.dtype)
        trained = Trained.of(self._deltas[: len(clients)])
        fitting = [i for i, client in enumerate(clients) if self._fit(client)]
        for position in set(range(len(clients))).difference(fitting):
            self._lean.train_one(start, clients[position], local, trained, position, should_stop)
        plans = [schedule(len(clients[i].data), clients[i].seed, local) for i in fitting]
        common = torch.tensor(start, dtype=self._trainer.dtype)[None]
        for group in chunks(plans, self.chunk):
            at = [fitting[i] for i in group]
            chunk = Chunk([clients[i] for i in at], [plans[i] for i in group], at)
            try:
                self._train(common, chunk, local, trained, should_stop)
            except Halted as halt:
                for position in at:
                    trained.fail(position, stopped(halt.steps))
        return trained

    def _fit(self, client: ClientWork) -> bool:
        if client.data not in self._fits:
            self.know(client.data)
        fits = self._fits[client.data]
        sizes = ((client.start, len(self._deltas[0])), (client.correction, self._trained))
        return fits and all(v is None or (v.shape == (n,) and v.dtype == np.float32) for v, n in sizes)

    def _rows_fit(self, data: Dataset) -> bool:
        for array, like in ((data.x, self._row), (data.y, self._target)):
            if not len(array) or array.shape[1:] != like.shape[1:] or array.dtype != like.dtype:
                return False
        # A negative label means "ignore" to the loss, which then is no mean over all rows.
        return self._trainer.task.loss != "cross_entropy" or bool(data.y.min() >= 0)

    def _train(
        self, common: Tensor, chunk: Chunk, local: LocalPlan, trained: Trained, should_stop: Stop | None
    ) -> None:
        device, dtype = self._trainer.device, self._trainer.dtype
        starts, corrections = vectors(common, chunk.clients)
        devices = self.chunk if self._compiled else len(chunk.clients)
        state = starts.to(device).expand(len(chunk.clients), -1)
        state = torch.cat([state, state[:1].expand(devices - len(state), -1)])
        weights, rest = state[:, : self._trained].clone(), state[:, self._trained :]
        shift = None if corrections is None else corrections.to(device)
        steps = np.array([plan.steps for plan in chunk.plans])
        move = _Optimizer(local, weights, shift)
        means = torch.zeros(int(steps[0]), devices, dtype=dtype, device=device)
        stride = self._stride(chunk)
        for low in range(0, len(means), stride):
            high = min(len(means), low + stride)
            y, shares = (t.to(device) for t in targets(chunk, low, high, dtype, devices))
            x = self._feed(chunk, low, high, devices).to(device)
            for step in range(low, high):
                if should_stop is not None and should_stop():
                    raise Halted(step)
                active = int((steps > step).sum())
                count = devices if self._compiled else active
                batch = x[step - low, :count], y[step - low, :count], shares[step - low, :count]
                grads, losses = self._gradients(weights[:count], rest[:count], *batch)
                means[step, :count] = losses
                move(grads[:active])
        moved = weights[: len(chunk.clients)] - state[: len(chunk.clients), : self._trained]
        self._write(chunk, moved.cpu().numpy(), means.double().cpu().numpy(), trained)

    def _write(
        self, chunk: Chunk, moved: NDArray[np.float32], means: NDArray[np.float64], trained: Trained
    ) -> None:
        for k, (at, plan) in enumerate(zip(chunk.at, chunk.plans, strict=True)):
            trained.deltas[at, : self._trained], trained.deltas[at, self._trained :] = moved[k], 0
            trained.steps[at], trained.seen[at] = plan.steps, plan.shape.examples
            trained.loss_sum[at] = means[: plan.steps, k] @ plan.sizes
            if not np.isfinite(trained.loss_sum[at]):
                trained.fail(at, non_finite(trained.loss_sum[at], plan.steps))

    def _loss(self, weights: Tensor, rest: Tensor, x: Tensor, y: Tensor, shares: Tensor) -> Tensor:
        """The mean loss of one device's batch: (P',), (P - P',), (B, ...), (B, ...), (B,)."""
        # split(), not slices: its gradient is one concatenation, that of a slice a whole vector of zeros.
        parts = [
            *torch.split(weights, self._sizes[0]),
            *(torch.split(rest, self._sizes[1]) if len(rest) else ()),
        ]
        named = {s.name: part.view(s.shape) for s, part in zip(self._slots, parts, strict=True)}
        outputs = functional_call(self._module, named, (x,))
        return (self._row_losses(outputs, y) * shares).sum()

    def _row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of each row, (B,)."""
        loss = self._trainer.task.loss
        if loss == "cross_entropy":
            flat = functional.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
            return flat.view(len(y), -1).mean(1)
        if callable(loss) or outputs.shape != y.shape:  # each row for itself; the check tells if that is it
            single: Tensor = vmap(lambda o, t: self._trainer.loss(o[None], t[None]))(outputs, y)
            return single
        make = functional.mse_loss if loss == "squared_error" else functional.smooth_l1_loss
        return make(outputs, y, reduction="none").view(len(y), -1).mean(1)

    def _stride(self, chunk: Chunk) -> int:
        """Steps whose rows are laid out at a time."""
        size = self._row.itemsize * prod(self._row.shape[1:])
        return max(1, _FEED // (size * chunk.plans[0].width * self.chunk))

    def _feed(self, chunk: Chunk, low: int, high: int, devices: int) -> Tensor:
        """The rows of these steps, (T, K, B, ...)."""
        width, shape = chunk.plans[0].width, self._row.shape[1:]
        dtype = self._trainer.dtype if self._row.dtype.kind == "f" else torch.int64
        feed = torch.zeros(high - low, devices, width, prod(shape), dtype=dtype)
        for k, (client, plan) in enumerate(zip(chunk.clients, chunk.plans, strict=True)):
            index = torch.from_numpy(plan.rows[low:high].reshape(-1))
            rows = flat_rows(client.data, dtype).index_select(0, index)
            feed[: len(index) // width, k] = rows.view(-1, width, prod(shape))
        return feed.view(high - low, devices, width, *shape)


def _chunk(trainer: Trainer) -> int:
    weights = 4 * trainer.layout.size
    if trainer.device.type == "cpu":
        return max(1, min(64, _CACHE // weights))
    free, _ = torch.cuda.mem_get_info(trainer.device)
    return max(1, min(_MOST, free // (2 * _COPIES * weights)))


class _Optimizer:
    """``lepton_fl.training.steps`` for the rows of a matrix, of which a prefix takes the step."""

    def __init__(self, local: LocalPlan, weights: Tensor, correction: Tensor | None) -> None:
        """Start anew; weights (K, P') are changed at each step, correction is (k, P')."""
        self._local, self._weights, self._correction = local, weights, correction
        self._start = weights.clone() if local.proximal_mu else None
        kept = 2 if local.optimizer == "adam" else int(local.momentum > 0)
        self._kept = [torch.zeros_like(weights) for _ in range(kept)]
        self._count = 0

    @torch.no_grad()
    def __call__(self, grads: Tensor) -> None:
        """Take one step along (a, P') gradients."""
        local, active = self._local, len(grads)
        weights, kept = self._weights[:active], [t[:active] for t in self._kept]
        self._count += 1
        if self._correction is not None:
            grads = grads + self._correction[:active]
        if self._start is not None:
            grads = grads + local.proximal_mu * (weights - self._start[:active])
        if local.clip_grad_norm:
            norms = grads.norm(dim=1, keepdim=True).clamp(min=1e-12)
            grads = grads * (local.clip_grad_norm / norms).clamp(max=1.0)
        if local.weight_decay:
            grads = grads + local.weight_decay * weights
        if local.optimizer == "adam":
            self._adam(weights, grads, *kept)
        else:
            if kept:
                grads = kept[0].mul_(local.momentum).add_(grads)
            weights.add_(grads, alpha=-local.learning_rate)

    def _adam(self, weights: Tensor, grads: Tensor, mean: Tensor, square: Tensor) -> None:
        beta_1, beta_2 = _BETAS
        mean.lerp_(grads, 1 - beta_1)
        square.mul_(beta_2).addcmul_(grads, grads, value=1 - beta_2)
        scale = (square / (1 - beta_2**self._count)).sqrt_().add_(_EPSILON)
        weights.addcdiv_(mean, scale, value=-self._local.learning_rate / (1 - beta_1**self._count))
