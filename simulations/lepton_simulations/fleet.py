"""Virtual devices over a published data set, and the exchange that lets them answer.

    fleet = VirtualFleet.build(task, data, seed=0)
    with InMemoryExchange(fleet, workers=2) as exchange:
        Campaign(spec, run_id, fleet.work(exchange), exchange, VirtualRoster(fleet), book, rng).run(state)

The answers of a cohort arrive in the order of the cohort, so floating-point sums, over-selection and faults
come out the same whatever the number of workers.
"""

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from lepton_fl.errors import DataContractError, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import collect_evaluation
from lepton_fl.rounds.exchange import Answer
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.federated import FederatedDataset
from lepton_fl.tasks.metrics import Sums
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_simulations.faults import Faults
from lepton_simulations.workers import Outcome, Pool
from lepton_strategies.desk import PartitionDesk

if TYPE_CHECKING:
    from lepton_fl.training.trainer import Device, Trainer

TRAIN: Final = "train"
EVALUATE: Final = "evaluate"
CENTRAL = "central test rows "  # names the parts of the central test set in a plan
PART_ROWS = 1024  # rows in one of them
MAX_PREPARED = 2**31  # bytes of prepared training rows kept for all devices; above, each call prepares anew


@dataclass(frozen=True, eq=False)
class VirtualFleet:
    """All devices of a simulation: one warm trainer, everybody's rows, and their faults."""

    task: str  # package.module:attribute
    trainer: "Trainer"
    data: FederatedDataset
    faults: Faults = field(default_factory=Faults)
    seed: int = 0  # of the batch orders
    _rows: dict[tuple[str, str], Dataset] = field(default_factory=dict)  # prepared
    unfit: dict[str, str] = field(default_factory=dict)  # device -> how its data break the contract

    @classmethod
    def build(
        cls,
        task: str,
        data: FederatedDataset,
        *,
        faults: Faults | None = None,
        seed: int = 0,
        device: "Device" = "cpu",
    ) -> "VirtualFleet":
        """Build the trainer and prepare the rows; a device whose data break the contract sits out.

        Raises:
            TaskError: the task's model cannot be used.
        """
        from lepton_fl.training.trainer import Trainer

        fleet = cls(task, Trainer(data.task, device), data, faults or Faults(), seed)
        fleet._prepare_tests()
        if 4 * data.corpus.train.x.size <= MAX_PREPARED:
            fleet._prepare_training()
        return fleet

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device's id."""
        return self.data.clients

    @property
    def size(self) -> int:
        """Number of coordinates P of the model."""
        return self.trainer.layout.size

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of the central test set."""
        return tuple(name for name, _ in self._rows if name.startswith(CENTRAL))

    def rows(self, device_id: str, kind: str) -> Dataset:
        """Prepared rows of a device.

        Raises:
            DataContractError: the device's data break the task's contract, or it holds no such rows.
        """
        if device_id in self.unfit:
            raise DataContractError(self.unfit[device_id])
        if found := self._rows.get((device_id, kind)):
            return found
        if kind == TRAIN:
            return self.data.train(device_id)
        raise DataContractError(f"Device {device_id} holds no test rows.")

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        """Let one device answer."""
        from lepton_fl.training.respond import respond

        desk = PartitionDesk(
            device_id, self.task, self.trainer, self.rows, seed=self.seed, should_stop=should_stop
        )
        return respond(request, desk)

    def work(self, exchange: "InMemoryExchange", *, on_devices: bool = False) -> Work:
        """What a campaign must know of the task.

        Args:
            exchange: evaluates the central test set, part by part.
            on_devices: evaluate on the devices' own test rows, too.
        """
        work = Work(
            self.task,
            self.trainer.task.version,
            self.trainer.layout.digest,
            self.size,
            self.trainer.task.metrics,
            evaluate_on_devices=on_devices,
        )
        central = partial(_evaluate_centrally, self, exchange, work) if self.parts else None
        return Work(**{**vars(work), "evaluate_centrally": central})

    def _prepare_training(self) -> None:
        for device_id in self.devices:
            try:
                self._rows[device_id, TRAIN] = self.data.train(device_id)
            except DataContractError as error:
                self.unfit[device_id] = str(error)

    def _prepare_tests(self) -> None:
        test = self.data.central_test()
        parts = np.array_split(np.arange(len(test)), ceil(len(test) / PART_ROWS) or 1)
        for number, rows in enumerate(part for part in parts if len(part)):
            self._rows[f"{CENTRAL}{number}", EVALUATE] = test.take(rows)
        for device_id, rows in self._test_rows(len(test)).items():
            self._rows[device_id, EVALUATE] = test.take(rows)

    def _test_rows(self, count: int) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
        """Each device's test rows: its own where the data set says so, else an even share."""
        own = {c: self.data.test_rows[c] for c in self.devices if c in self.data.test_rows}
        if own:
            return own
        shares = np.array_split(np.arange(count), len(self.devices))
        return {c: rows for c, rows in zip(self.devices, shares, strict=True) if len(rows)}


def _evaluate_centrally(fleet: VirtualFleet, exchange: "InMemoryExchange", work: Work, model: Vector) -> Sums:
    """The sums over the whole test set, as if each of its parts were a device without faults."""
    spec = RunSpec(task=fleet.task)
    plan = plan_round(
        spec, "central", work, EVALUATE, 1, RunState(model), fleet.parts, len(fleet.parts), "central"
    )
    collected = collect_evaluation(plan, model, exchange, work.metrics)
    if collected.reports < len(fleet.parts):
        raise RunError(f"The central test set could not be evaluated: {collected.summary()}.")
    return collected.sums


@dataclass(frozen=True)
class VirtualRoster:
    """Everybody is online, always; those whose data break the contract sit out."""

    fleet: VirtualFleet

    def candidates(self) -> Sequence[Candidate]:
        """Every device with its standing."""
        unfit = self.fleet.unfit
        return [
            Candidate(d, "data-contract", unfit[d]) if d in unfit else Candidate(d, "eligible")
            for d in self.fleet.devices
        ]

    def wait(self, seconds: float) -> None:
        """Return at once: no standing will change, and simulated time costs nothing."""


class InMemoryExchange:
    """Lets the cohort's devices answer in worker processes, or in this one."""

    def __init__(self, fleet: VirtualFleet, workers: int | None = None) -> None:
        """Start the workers.

        Args:
            fleet: the devices.
            workers: processes; 0 = train in this process; None = one per core of this machine, or this
                process if it has one core only or the model is on a GPU.
        """
        self._fleet = fleet
        if workers is None:
            cores = len(os.sched_getaffinity(0))
            workers = cores if cores > 1 and fleet.trainer.device.type == "cpu" else 0
        self._pool = Pool(fleet, workers) if workers else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.close()

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        """Answers in the order of the cohort; a device that drops out is skipped without waiting for it."""
        faults, cohort = self._fleet.faults, plan.cohort
        if not cohort[0].startswith(CENTRAL):
            cohort = tuple(d for d in cohort if not faults.drops(plan, d))
        with closing(self._outcomes(request.to_records(), cohort)) as outcomes:
            for device_id, outcome in outcomes:
                if isinstance(outcome, Records) and not device_id.startswith(CENTRAL):
                    outcome = faults.damage(device_id, outcome)
                yield Answer(device_id, outcome, _num_bytes(outcome))

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Virtual devices do not mind."""

    def _outcomes(
        self, request: Records, cohort: Sequence[str]
    ) -> Generator[tuple[str, Outcome], None, None]:
        if self._pool:
            yield from self._pool.ask(request.config, request.arrays["model"], cohort)
            return
        for device_id in cohort:
            yield device_id, self._fleet.respond(device_id, request, lambda: False)


def _num_bytes(outcome: Outcome) -> int:
    """What the reply would take on the wire, without a transport's own framing."""
    if isinstance(outcome, UpdateRejected):
        return 0
    arrays = sum(array.nbytes for array in outcome.arrays.values())
    return arrays + len(json.dumps([dict(outcome.config), dict(outcome.metrics)]))
