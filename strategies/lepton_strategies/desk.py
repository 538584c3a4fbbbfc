"""A desk over partitions of one data set: what a virtual device brings to a round.

The simulation engine and the client app on a Flower deployment both answer requests from here, so the same
seeds give the same bits in either.

    desk = PartitionDesk("device-3", trainer, federation_data, seed=0)
    reply = respond(request, desk)
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from lepton_fl.errors import TaskError
from lepton_fl.tasks.data import Dataset
from lepton_fl.training.memory import Memory
from lepton_fl.wire.messages import Request, Ticket

if TYPE_CHECKING:
    from lepton_fl.privacy.example import Spent
    from lepton_fl.privacy.noise import Keystream
    from lepton_fl.training.trainer import Trainer

DataOf = Callable[[str, str], Dataset]  # (device id, "train" or "evaluate") -> prepared rows


class PartitionDesk:
    """One device's place in a virtual fleet; implements ``training.respond.Desk``."""

    def __init__(
        self,
        device_id: str,
        task: str,
        trainer: "Trainer",
        data_of: DataOf,
        *,
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        memory: Memory | None = None,
    ) -> None:
        """Seat a device.

        Args:
            device_id: names the partition, and is part of the batch seed.
            task: the one task that this desk trains, as ``package.module:attribute``.
            trainer: its warm trainer, shared by the devices of a process.
            data_of: finds a device's rows; may raise DataError or DataContractError.
            seed: of the whole simulation.
            should_stop: asked before every training step.
            memory: what the device remembers of its runs; None = nothing.
        """
        self._device_id = device_id
        self._task = task
        self._trainer = trainer
        self._data_of = data_of
        self._seed = seed
        self._should_stop = should_stop
        self._memory = memory

    def trainer(self, task: str) -> "Trainer":
        """The trainer, if the task is the allowed one."""
        if task != self._task:
            raise TaskError(
                f"The coordinator asks for task {task!r}; this device runs {self._task!r} only.",
                hint="Start both sides with the same task.",
            )
        return self._trainer

    def data(self, task: str, kind: str) -> Dataset:
        """The device's rows."""
        return self._data_of(self._device_id, kind)

    def seed(self, ticket: Ticket) -> int:
        """The same for the same device, round and attempt, wherever it runs."""
        return batch_seed(self._seed, self._device_id, ticket.round, ticket.attempt)

    def spend(self, request: Request, rows: int | None) -> "Spent | None":
        """Randomness from the seed, so that a run can be repeated: it protects nobody, and costs nothing."""
        if rows is None:
            return None
        from lepton_fl.privacy.example import Spent, charge_of

        return Spent(charge_of(request.local, rows), batch_stream(self.seed(request.ticket)))

    def memory(self) -> Memory | None:
        """What the device remembers of its runs."""
        return self._memory

    def should_stop(self) -> bool:
        """Whether the round is over."""
        return self._should_stop()


def batch_stream(seed: int) -> "Keystream":
    """The coins and the noise of a virtual device's private training: reproducible, not secret."""
    from lepton_fl.privacy.noise import Keystream, simulation_key

    return Keystream(simulation_key("example", seed))


def batch_seed(seed: int, device_id: str, round_number: int, attempt: int) -> int:
    """The seed of a device's batch order, in [0, 2**63): reproducible, not secret."""
    text = f"lepton-fl batch order v1|{seed}|{device_id}|{round_number}|{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
