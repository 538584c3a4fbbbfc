"""One device after the other through the trainer of the edge client: any module, any plan."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from lepton_fl.errors import BudgetRefused, LeptonError, Rejection, UpdateRejected
from lepton_fl.plan import LocalPlan
from lepton_fl.privacy.example import Spent, charge_of
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.bridge import check_vector
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Vector
from lepton_simulations.engines.contract import ClientWork, Stop, Trained
from lepton_strategies.desk import batch_stream

log = logging.getLogger(__name__)


class LeanEngine:
    """What every other engine is held against."""

    name, is_plain = "lean", False
    chunk = 1

    def __init__(self, trainer: Trainer) -> None:
        """Train with this trainer."""
        self._trainer = trainer
        self._deltas = np.zeros((0, trainer.layout.size), torch.zeros((), dtype=trainer.dtype).numpy().dtype)

    def know(self, data: Dataset) -> None:
        """There is nothing to look at."""

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
        for position, client in enumerate(clients):
            self.train_one(start, client, local, trained, position, should_stop)
        return trained

    def train_one(
        self,
        start: Vector,
        client: ClientWork,
        local: LocalPlan,
        trained: Trained,
        position: int,
        should_stop: Stop | None = None,
    ) -> None:
        """Train one device into its row of the results."""
        try:
            result = self._trainer.train(
                start if client.start is None else client.start,
                client.data,
                local,
                seed=client.seed,
                correction=client.correction,
                should_stop=should_stop,
                spent=_spent(client, local),
            )
        except UpdateRejected as refusal:
            trained.fail(position, refusal)
        except BudgetRefused as refusal:
            trained.fail(position, UpdateRejected(Rejection.BUDGET, str(refusal), hint=refusal.hint))
        except LeptonError as error:
            trained.fail(position, UpdateRejected(Rejection.FAILED, str(error), hint=error.hint))
        except Exception as error:
            log.exception("task failed")  # a user's task may raise anything; the other devices go on
            reason = f"The task raised {type(error).__name__}."
            trained.fail(position, UpdateRejected(Rejection.FAILED, reason))
        else:
            trained.deltas[position] = result.delta
            trained.steps[position] = result.steps
            trained.seen[position] = int(result.sums["examples"][0])
            trained.loss_sum[position] = float(result.sums["loss_sum"][0])


def _spent(client: ClientWork, local: LocalPlan) -> Spent | None:
    """As ``training.respond`` has it, with randomness from the seed."""
    if local.example_privacy is None:
        return None
    return Spent(charge_of(local, len(client.data)), batch_stream(client.seed))
