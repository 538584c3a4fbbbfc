"""Which engine: by capability, and only after it has agreed with autograd.

A candidate trains two of the caller's devices in float64, where only a wrong formula differs, and must
come to the update of the sequential trainer within 1e-9 of its size; then the next candidate is tried.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lepton_fl.errors import ConfigError
from lepton_fl.plan import LocalPlan
from lepton_fl.training.allocator import keep_memory
from lepton_fl.training.trainer import Device, Trainer
from lepton_fl.vector import Vector
from lepton_simulations.config import Tier
from lepton_simulations.engines.chained import unsupported
from lepton_simulations.engines.contract import ClientWork, Elsewhere, Engine, Unsupported
from lepton_simulations.engines.fused import FusedEngine
from lepton_simulations.engines.lean import LeanEngine
from lepton_simulations.engines.native import NativeEngine
from lepton_simulations.engines.vectorised import VectorisedEngine

log = logging.getLogger(__name__)

TOLERANCE = 1e-9  # of the size of the update, in float64
ROUGHLY = 0.1  # in float32: rounding may turn a ReLU or a pooling window another way
_SAMPLES = 2
_BATCH, _ROWS, _STEPS = 4, 10, 4  # of a check, at most: full batches, a partial one, a second epoch


def choose(
    trainer: Trainer, local: LocalPlan, samples: Sequence[ClientWork], *, tier: Tier = "auto"
) -> tuple[Engine, str]:
    """The fastest engine that computes what the trainer computes.

    Also sets the memory allocator of this process up for training, see ``training.allocator``.

    Args:
        trainer: whose task, on the device to train on.
        local: how the devices train; an engine is used with this plan, at any learning rate.
        samples: some devices' work, for the check; two are enough.
        tier: the only one wanted, or "auto".

    Returns:
        The engine, and in one sentence why it is not the fastest tier; empty where it is.

    Raises:
        ConfigError: the tier asked for cannot be used here, or there is no sample.
    """
    if not samples:
        raise ConfigError("There is no device to check an engine with.", hint="Give at least one sample.")
    keep_memory()
    wanted = _order(trainer, local) if tier == "auto" else (tier,)
    reasons: dict[str, list[str]] = {}
    for name in wanted:
        try:
            return _make_checked(name, trainer, local, samples[:_SAMPLES]), _sentences(reasons)
        except Elsewhere as error:
            reason = str(error)
        except Unsupported as error:
            reason = str(error)
            reasons.setdefault(reason, []).append(name)
    raise ConfigError(
        f"The engine {tier!r} cannot train {trainer.task.name!r}: {reason}.",
        hint="Use 'auto', which takes the fastest engine that can, or 'lean', which trains anything.",
    )


def _order(trainer: Trainer, local: LocalPlan) -> tuple[Tier, ...]:
    if local.example_privacy is not None or trainer.task.teacher is not None:
        return ("lean",)
    return ("vectorised", "lean") if trainer.device.type == "cuda" else ("native", "fused", "lean")


def _sentences(reasons: Mapping[str, Sequence[str]]) -> str:
    """Why not these engines; those of one reason together."""
    found = []
    for reason, names in reasons.items():
        are = "engine is" if len(names) == 1 else "engines are"
        found.append(f"The {' and '.join(names)} {are} not used: {reason}.")
    return " ".join(found)


def _make_checked(name: Tier, trainer: Trainer, local: LocalPlan, samples: Sequence[ClientWork]) -> Engine:
    """The engine; Unsupported where it cannot, or computes something else."""
    if name != "lean" and local.example_privacy is not None:
        raise Unsupported("it does not clip the gradients of single rows")
    if name != "lean" and trainer.task.teacher is not None:
        raise Unsupported("it does not ask a teacher")
    if name in ("native", "fused") and (reason := unsupported(local)):
        raise Unsupported(reason)
    [engine, *_] = _make(name, trainer, samples)
    if name != "lean":
        _check(name, trainer, local, samples)
    return engine


def _make(name: Tier, trainer: Trainer, samples: Sequence[ClientWork]) -> list[Engine]:
    """The engine, and others that take different ways through the same code."""
    if name == "native":
        return [NativeEngine(trainer, samples[0].data, spare=spare) for spare in (True, False)]
    if name == "fused":
        engine = FusedEngine(trainer, samples[0].data)
        return [engine, FusedEngine(trainer, samples[0].data, dual=False)]
    if name in ("vectorised", "compiled"):
        compiled = name == "compiled" and trainer.dtype == torch.float32  # once is enough: it takes its time
        return [VectorisedEngine(trainer, samples[0].data, compiled=compiled)]
    return [LeanEngine(trainer)]


def _check(name: Tier, trainer: Trainer, local: LocalPlan, samples: Sequence[ClientWork]) -> None:
    """Train a little with the engine and with plain autograd, in both precisions.

    Raises:
        Unsupported: they disagree, or the engine cannot.
    """
    works = [replace(s, data=s.data.take(np.arange(min(len(s.data), _ROWS))).aligned()) for s in samples]
    plan = local.model_copy(
        update={"epochs": 2, "max_steps": _STEPS, "batch_size": min(local.batch_size, _BATCH)}
    )
    start = trainer.initial(0)
    start += np.random.default_rng(0).normal(scale=0.01, size=start.shape).astype(np.float32)
    device: Device = "cpu" if trainer.device.type == "cpu" else "cuda"
    double = Trainer(trainer.task, device, dtype=torch.float64)
    for checked, tolerance in ((double, TOLERANCE), (trainer, ROUGHLY)):
        reference = LeanEngine(checked)
        for engine in _make(name, checked, works):
            _agree(engine, reference, start, works, plan, tolerance)


def _agree(
    engine: Engine,
    reference: Engine,
    start: Vector,
    works: Sequence[ClientWork],
    plan: LocalPlan,
    tolerance: float,
) -> None:
    try:
        ours = engine.train(start, works, plan)
    except Unsupported:
        raise
    except Exception as error:
        log.debug("the %s engine failed its check", engine.name, exc_info=True)
        raise Unsupported(f"it failed on this model ({type(error).__name__})") from error
    theirs = reference.train(start, works, plan)
    if ours.failures.keys() != theirs.failures.keys():
        raise Unsupported("devices fail in it that do not in the trainer, or the reverse")
    size = np.linalg.norm(theirs.deltas, axis=1) + np.finfo(np.float32).tiny
    apart = float((np.linalg.norm(ours.deltas - theirs.deltas, axis=1) / size).max())
    losses = np.abs(ours.loss_sum - theirs.loss_sum) / (np.abs(theirs.loss_sum) + 1e-6)
    apart = max(apart, float(losses.max()))
    if not apart <= tolerance:
        kind = ours.deltas.dtype
        raise Unsupported(f"it differs from autograd by {apart:.1e} of the update in {kind}")
