"""A device's answer to the request of a round.

The edge client, the simulation and the client app on a stock Flower deployment all answer through here.
Whatever goes wrong becomes a ``Failure`` that names the reason: a device reports and sits out, the round
goes on without it.

    records = respond(request_records, desk)
"""

import logging
import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.contribution import contributions, mean_losses
from lepton_fl.errors import (
    BudgetRefused,
    DataContractError,
    DataError,
    DiskFull,
    LeptonError,
    Rejection,
    TaskError,
    UpdateRejected,
)
from lepton_fl.privacy.example import Spent
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.local import LocalState
from lepton_fl.training.memory import Memory
from lepton_fl.training.trainer import LocalResult, Trainer
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import EvaluateReply, Failure, Fields, Request, Ticket, TrainReply, malformed
from lepton_fl.wire.records import Records

log = logging.getLogger(__name__)


class Desk(Protocol):
    """What a device brings to a round: its owner's tasks and data."""

    def trainer(self, task: str) -> Trainer:
        """The trainer of a task that the owner allows; raises TaskError for any other."""
        ...

    def data(self, task: str, kind: str) -> Dataset:
        """Checked data to train on or evaluate with; raises DataContractError or DataError."""
        ...

    def seed(self, ticket: Ticket) -> int:
        """Seeds the order of the batches."""
        ...

    def memory(self) -> Memory | None:
        """What this device remembers of its runs; None = it cannot, and sits out rounds that need it."""
        ...

    def spend(self, request: Request, rows: int | None) -> Spent | None:
        """Charge the device's own budget before its rows are touched.

        Args:
            request: what is asked.
            rows: each of which pays ``charge_of(request.local, rows)``; None = the answer protects none.

        Returns:
            The charge with its coins and noise, to be used once; None where nothing is charged.

        Raises:
            BudgetRefused: the budget, the number of rows, or the device's owner does not allow it.
            StateError: it could not be written down, so nothing may be spent.
        """
        ...

    def should_stop(self) -> bool:
        """Whether the round has closed without this device, or the device must stop."""
        ...


def respond(records: Records, desk: Desk) -> Records:
    """Do what the request asks and return the reply's records; never raises a LeptonError.

    Raises:
        UpdateRejected: the request has no readable ticket, so nothing can be answered.
    """
    ticket = Ticket.take(Fields(records.config))
    try:
        request = Request.read(records)
        reply = _train(request, desk) if ticket.kind == "train" else _evaluate(request, desk)
        return reply.to_records()
    except UpdateRejected as refusal:
        return _failure(ticket, refusal.reason, refusal)
    except BudgetRefused as error:
        return _failure(ticket, Rejection.BUDGET, error)
    except DataContractError as error:
        return _failure(ticket, Rejection.DATA_CONTRACT, error)
    except DiskFull as error:
        return _failure(ticket, Rejection.DISK_FULL, error)
    except LeptonError as error:
        return _failure(ticket, Rejection.FAILED, error)
    except MemoryError:
        return _failure(ticket, Rejection.OUT_OF_MEMORY, DataError("Training ran out of memory."))
    except Exception as error:
        if _is_out_of_memory(error):
            return _failure(ticket, Rejection.OUT_OF_MEMORY, DataError("Training ran out of memory."))
        log.exception("task failed")  # a user's task may raise anything; the round must hear of it
        return _failure(ticket, Rejection.FAILED, TaskError(f"The task raised {type(error).__name__}."))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises a RuntimeError of many words, on the processor and on the accelerator."""
    words = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in words or "not enough memory" in words or "out of memory" in words
    )


def _failure(ticket: Ticket, reason: Rejection, error: LeptonError) -> Records:
    log.warning("sits out %s round %d: %s", ticket.kind, ticket.round, error)
    return Failure(ticket, reason, str(error)).to_records()


def _trainer(request: Request, desk: Desk) -> Trainer:
    trainer = desk.trainer(request.task)
    for name, ours, theirs in (
        ("task version", trainer.task.version, request.task_version),
        ("model layout", trainer.layout.digest, request.layout_digest),
    ):
        if ours != theirs:
            raise UpdateRejected(
                Rejection.WRONG_VERSION,
                f"This device has {name} {ours!r} of {request.task}, the coordinator asks for {theirs!r}.",
                hint="Install the task's current version on the device.",
            )
    if request.model.shape != (trainer.layout.size,):
        raise malformed(f"the model has {request.model.size} coordinates, the layout {trainer.layout.size}")
    if not np.isfinite(request.model).all():
        raise UpdateRejected(Rejection.NON_FINITE, "The model that was sent has non-finite weights.")
    return trainer


def _memory(request: Request, desk: Desk) -> Memory | None:
    """The device's memory, if this run needs one."""
    if not request.local.keeps_state:
        return None
    memory = desk.memory()
    if memory is None:
        raise UpdateRejected(
            Rejection.FAILED,
            "This run needs devices that remember something between rounds, and this one cannot.",
            hint="Train without local.control_variates and local.personal.",
        )
    return memory


def _state(request: Request, trainer: Trainer, memory: Memory | None) -> LocalState:
    held = {} if memory is None else memory.recall(request.ticket.run_id, request.counted)
    if request.auxiliary is not None and request.auxiliary.shape != request.model.shape:
        raise malformed(f"the control has {request.auxiliary.size} coordinates, not {request.model.size}")
    if request.auxiliary is not None and not np.isfinite(request.auxiliary).all():
        raise UpdateRejected(Rejection.NON_FINITE, "The control that was sent is not finite.")
    return LocalState.of(
        request.local, trainer.layout, trainer.num_trained, request.model, request.auxiliary, held
    )


def _train(request: Request, desk: Desk) -> TrainReply:
    began = time.monotonic()
    trainer = _trainer(request, desk)
    data, memory = desk.data(request.task, "train"), _memory(request, desk)
    state = _state(request, trainer, memory)
    result = trainer.train(
        state.start,
        data,
        request.local,
        seed=desk.seed(request.ticket),
        correction=state.correction,
        should_stop=desk.should_stop,
        spent=_spent(request, trainer, data, desk),
    )
    sent = state.outgoing(result.delta, result.steps, request.local.learning_rate)
    update = _encoded(request, sent, result)
    if memory is not None:
        left = state.leaves(result.delta, update[: len(sent)], request.grid_step)
        memory.keep(request.ticket.run_id, request.ticket.round, request.ticket.attempt, left)
    return TrainReply(
        request.ticket,
        request.task_version,
        result.num_examples,
        update,
        result.sums,
        time.monotonic() - began,
    )


def _encoded(request: Request, sent: Vector, result: LocalResult) -> NDArray[np.int32]:
    """The update and its tail on the grid."""
    losses = mean_losses(result.sums["loss_sum"], result.sums["examples"])
    examples = np.array([result.num_examples], np.int64)
    found = contributions(
        request.private, sent[None, :], request.grid_step, request.clip_norm, examples, losses
    )
    for refusal in found.refused.values():
        raise refusal
    update: NDArray[np.int32] = found.updates[0]
    return update


def _spent(request: Request, trainer: Trainer, data: Dataset, desk: Desk) -> Spent | None:
    """What the rows are charged, once nothing else is in the way."""
    if request.local.example_privacy is None:
        desk.spend(request, None)
        return None
    trainer.refuse_private(data)
    return desk.spend(request, len(data))


def _evaluate(request: Request, desk: Desk) -> EvaluateReply:
    began = time.monotonic()
    desk.spend(request, None)
    trainer = _trainer(request, desk)
    data, model = desk.data(request.task, "evaluate"), request.model
    if request.local.personal:
        model = _state(request, trainer, _memory(request, desk)).start
    sums = trainer.evaluate(model, data)
    return EvaluateReply(request.ticket, request.task_version, len(data), sums, time.monotonic() - began)
