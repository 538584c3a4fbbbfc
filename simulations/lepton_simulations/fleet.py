"""Virtual devices over a published data set, and who of them is there.

fleet = VirtualFleet.build(task, data, local, world=world, seed=0)
with InMemoryExchange(fleet, backend) as exchange:
Campaign(spec, run_id, fleet.work(exchange), exchange, VirtualRoster(fleet), book, rng).run(state)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lepton_fl.contribution import contributions, mean_losses
from lepton_fl.errors import DataContractError, Rejection, RunError, UpdateRejected
from lepton_fl.files import make_private_folder
from lepton_fl.plan import LocalPlan, RoundPlan, RunSpec
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import collect_evaluation
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.federated import FederatedDataset
from lepton_fl.tasks.metrics import Sums
from lepton_fl.vector import Vector
from lepton_fl.wire.records import Records
from lepton_simulations.backend import Outcome, Part, Trained
from lepton_simulations.config import Tier
from lepton_simulations.memory import FleetMemory, outgoing
from lepton_simulations.world import World, WorldConfig
from lepton_strategies.desk import PartitionDesk, batch_seed

if TYPE_CHECKING:
    from lepton_fl.training.local import LocalState
    from lepton_fl.training.trainer import Device, Trainer
    from lepton_simulations import engines
    from lepton_simulations.engines import ClientWork, Engine

TRAIN: Final = "train"
EVALUATE: Final = "evaluate"
CENTRAL = "central test rows "  # names the parts of the central test set in a plan
PART_ROWS = 1024  # rows in one of them
MAX_PREPARED = 2**31  # bytes of prepared training rows kept for all devices; above, each call prepares anew
MOMENT_S = 1e-6  # that waiting takes at least: what is left of a wait may be less than a float can add
SAMPLES = 2  # devices that an engine is checked with


@dataclass(eq=False)
class VirtualFleet:
    """All devices of a simulation: one warm engine, everybody's rows, and the world around them."""

    task: str  # package.module:attribute
    trainer: "Trainer"
    data: FederatedDataset
    world: World
    local: LocalPlan
    seed: int = 0  # of the batch orders
    tier: Tier = "auto"
    unfit: dict[str, str] = field(default_factory=dict)  # device -> how its data break the contract
    engine_note: str = ""  # why it is not the fastest engine; '' = it is
    memory: FleetMemory | None = None  # where the run needs devices that remember something
    tail: int = 0  # coordinates behind an update: see ``PrivatePart``
    _rows: dict[tuple[str, str], Dataset] = field(default_factory=dict)  # prepared
    _engine: "Engine | None" = None

    @classmethod
    def build(
        cls,
        task: str,
        data: FederatedDataset,
        local: LocalPlan | None = None,
        *,
        world: World | None = None,
        seed: int = 0,
        device: "Device" = "cpu",
        tier: Tier = "auto",
        tail: int = 0,
    ) -> "VirtualFleet":
        """Build the engine and prepare the rows; a device whose data break the contract sits out.

        Args:
            task: ``package.module:attribute``.
            data: whose rows are whose.
            local: how devices train; None = as the task says.
            world: around the devices; None = all is ideal.
            seed: of the batch orders.
            device: on which is trained.
            tier: which engine; see ``engines.choose``.
            tail: coordinates behind an update of a private run.

        Raises:
            TaskError: the task's model cannot be used.
            ConfigError: the tier cannot train this.
        """
        from lepton_fl.training.trainer import Trainer

        world = world or World.build(WorldConfig(), data.clients, seed)
        trainer = Trainer(data.task, device)
        fleet = cls(task, trainer, data, world, local or data.task.local, seed, tier, tail=tail)
        fleet._prepare_tests()
        if 4 * data.corpus.train.x.size <= MAX_PREPARED:
            fleet._prepare_training()
        fleet._choose_engine()
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
    def update_size(self) -> int:
        """Number of coordinates of an update, its tail included."""
        return self.trainer.layout.moving + self.auxiliary + self.tail

    @property
    def auxiliary(self) -> int:
        """Number of coordinates that a device is sent besides the model's."""
        return self.size if self.local.control_variates else 0

    def remember(self, folder: Path | None) -> None:
        """Open the devices' memory, if the run needs one: before any worker is started.

        Args:
            folder: of the run, for a file; None = in memory only.

        Raises:
            StateError, StateCorrupt: see ``FleetMemory``.
            ConfigError: ``local.personal`` does not fit the model.
        """
        if self.local.keeps_state:
            if folder:
                make_private_folder(folder)
            self.memory = FleetMemory(self.devices, self.local, self.trainer.layout, folder)

    @property
    def engine(self) -> "Engine":
        """What trains ordinary devices."""
        assert self._engine is not None
        return self._engine

    @property
    def chunk(self) -> int:
        """How many devices are best trained in one call."""
        return self.engine.chunk

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        return self.trainer.device.type != "cpu"

    @property
    def is_plain(self) -> bool:
        """Whether training runs none of the task's own code."""
        return self.engine.is_plain

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
            return self.world.training_rows(device_id, self.data)
        raise DataContractError(f"Device {device_id} holds no test rows.")

    def examples(self, plan: RoundPlan, device_id: str) -> int:
        """How many examples a device works on in an attempt."""
        if plan.kind == EVALUATE:
            found = self._rows.get((device_id, EVALUATE))
            return len(found) if found else 0
        return self._trained(plan.local, device_id)

    def usual_seconds(self) -> dict[str, float]:
        """How long an attempt at a round usually takes each device; see ``World.usual_seconds``."""
        down, up = 4 * (self.size + self.auxiliary), 4 * self.update_size
        return self.world.usual_seconds(partial(self._trained, self.local), down, up)

    def _trained(self, local: LocalPlan, device_id: str) -> int:
        examples = len(self.data.train_rows[device_id]) * local.epochs
        return min(examples, local.max_steps * local.batch_size) if local.max_steps else examples

    def respond(self, device_id: str, request: Records, should_stop: Callable[[], bool]) -> Outcome:
        """Let one device answer with records, through the code of an edge client."""
        from lepton_fl.training.respond import respond

        remembered = self.memory and not device_id.startswith(CENTRAL)
        desk = PartitionDesk(
            device_id,
            self.task,
            self.trainer,
            self.rows,
            seed=self.seed,
            should_stop=should_stop,
            memory=self.memory.of(device_id) if self.memory and remembered else None,
        )
        reply = respond(request, desk)
        if self.memory and self.memory.full:  # the reply says that the device failed, which it has not
            raise self.memory.full
        return reply

    def train(
        self,
        plan: RoundPlan,
        model: Vector,
        auxiliary: Vector | None,
        devices: Sequence[str],
        accumulator: Accumulator,
        should_stop: Callable[[], bool],
    ) -> Part:
        """Train devices and add their updates, a chunk at a time; implements ``backend.Shard``."""
        trained, refused = list[Trained](), dict[str, UpdateRejected]()
        for first in range(0, len(devices), self.chunk):
            chunk = devices[first : first + self.chunk]
            part = self._train_chunk(plan, model, auxiliary, chunk, accumulator, should_stop)
            trained += part.trained
            refused |= part.refused
        return Part(trained, refused)

    def _train_chunk(
        self,
        plan: RoundPlan,
        model: Vector,
        auxiliary: Vector | None,
        devices: Sequence[str],
        accumulator: Accumulator,
        should_stop: Callable[[], bool],
    ) -> Part:
        """Train devices in one call of the engine."""
        names, works, refused = [], list["ClientWork"](), dict[str, UpdateRejected]()
        for device_id in devices:
            try:
                works.append(self._work_of(device_id, plan))
                names.append(device_id)
            except DataContractError as error:
                refused[device_id] = UpdateRejected(Rejection.DATA_CONTRACT, str(error), hint=error.hint)
        if not works:
            return Part([], refused)
        states = self._states(names, plan, model, auxiliary)
        if states:
            works = [_with_state(work, state) for work, state in zip(works, states, strict=True)]
        from lepton_simulations.engines.adding import add_deltas

        result = self.engine.train(model, works, plan.local, should_stop=should_stop)
        told = plan.local.example_privacy is None
        counts = np.array([len(work.data) if told else 1 for work in works], np.int64)
        if states:
            failures = self._add_and_remember(names, plan, states, result, counts, accumulator)
        else:
            layout = self.trainer.layout
            moving = replace(result, rows=result.deltas[:, : layout.moving]) if layout.fixed else result
            added = add_deltas(accumulator, plan, moving, counts)
            failures = {**added.refused, **result.failures}
        refused |= {names[row]: failure for row, failure in failures.items()}
        rows = zip(names, counts.tolist(), result.loss_sum.tolist(), result.seen.tolist(), strict=True)
        return Part([Trained(*told) for row, told in enumerate(rows) if row not in failures], refused)

    def _add_and_remember(
        self,
        names: Sequence[str],
        plan: RoundPlan,
        states: "Sequence[LocalState]",
        result: "engines.Trained",
        counts: NDArray[np.int64],
        accumulator: Accumulator,
    ) -> dict[int, UpdateRejected]:
        """Add what devices with a memory send, and keep what they remember; says who failed."""
        assert self.memory is not None
        sent = outgoing(states, result.deltas, result.steps, plan.local.learning_rate)
        losses = mean_losses(result.loss_sum, result.seen)
        encoded = contributions(plan.private, sent, plan.grid_step, plan.clip_norm, counts, losses)
        failures = {**encoded.refused, **result.failures}
        kept = [row for row in range(len(names)) if row not in failures]
        accumulator.add(UpdateBatch(encoded.updates[kept], counts[kept]))
        for row in kept:
            update = encoded.updates[row, : plan.sent_size]
            left = states[row].leaves(result.deltas[row], update, plan.grid_step)
            self.memory.keep(names[row], plan, left)
        return failures

    def work(self, exchange: Exchange, *, on_devices: bool = False) -> Work:
        """What a campaign must know of the task.

        Args:
            exchange: evaluates the whole test set after a round, if there is one.
            on_devices: evaluate on the devices' own test rows, too.
        """
        task = self.data.task
        work = Work(
            task=self.task,
            version=task.version,
            layout_digest=self.trainer.layout.digest,
            num_coordinates=self.size,
            metrics=task.metrics,
            evaluate_on_devices=on_devices or not self.parts or bool(self.local.personal),
            layout=self.trainer.layout,
        )
        shared = self.parts and not self.local.personal  # nobody uses the shared copy of a personal part
        central = partial(_evaluate_centrally, self, exchange, work) if shared else None
        return Work(**{**vars(work), "evaluate_centrally": central})

    def _states(
        self, names: Sequence[str], plan: RoundPlan, model: Vector, auxiliary: Vector | None
    ) -> "list[LocalState]":
        """What the devices bring besides their data; empty where they remember nothing."""
        if self.memory is None:
            return []
        trained = self.trainer.num_trained
        return [self.memory.state(name, plan, model, auxiliary, trained) for name in names]

    def _work_of(self, device_id: str, plan: RoundPlan) -> "ClientWork":
        from lepton_simulations.engines import ClientWork

        data = self.rows(device_id, TRAIN)
        return ClientWork(data, batch_seed(self.seed, device_id, plan.round, plan.attempt))

    def _choose_engine(self) -> None:
        from lepton_simulations.engines import ClientWork, choose
        from lepton_simulations.engines.adding import compiled

        if self.local.example_privacy is not None:
            from lepton_fl.training.private import refuse_model

            refuse_model(self.trainer.module.train(), f"The model of task {self.data.task.name!r}")
        fit = (d for d in self.devices if d not in self.unfit)
        samples = []
        for device_id in fit:
            try:
                samples.append(ClientWork(self.rows(device_id, TRAIN), self.seed))
            except DataContractError:
                continue
            if len(samples) == SAMPLES:
                break
        if not samples:
            why = next(iter(self.unfit.values()), "none holds training rows")
            raise DataContractError(f"No device can train: {why}", hint="Repair the data of some device.")
        self._engine, self.engine_note = choose(self.trainer, self.local, samples, tier=self.tier)
        compiled()  # once, before workers are forked
        for (_, kind), rows in self._rows.items():
            if kind == TRAIN:
                self._engine.know(rows)

    def _prepare_training(self) -> None:
        for device_id in self.devices:
            try:
                self._rows[device_id, TRAIN] = self.world.training_rows(device_id, self.data).aligned()
            except DataContractError as error:
                self.unfit[device_id] = str(error)

    def _prepare_tests(self) -> None:
        test = self.data.central_test()
        parts = np.array_split(np.arange(len(test)), ceil(len(test) / PART_ROWS) or 1)
        for number, rows in enumerate(part for part in parts if len(part)):
            self._rows[f"{CENTRAL}{number}", EVALUATE] = test.take(rows)
        for device_id, rows in self._test_rows(len(test)).items():
            self._rows[device_id, EVALUATE] = test.take(rows)

    def _test_rows(self, count: int) -> dict[str, NDArray[np.int64]]:
        """Each device's test rows: its own where the data set says so, else an even share."""
        own = {c: self.data.test_rows[c] for c in self.devices if c in self.data.test_rows}
        if own:
            return own
        shares = np.array_split(np.arange(count), len(self.devices))
        return {c: rows for c, rows in zip(self.devices, shares, strict=True) if len(rows)}


def _with_state(work: "ClientWork", state: "LocalState") -> "ClientWork":
    start = state.start if state.personal is not None else None
    return replace(work, correction=state.correction, start=start)


def _evaluate_centrally(fleet: VirtualFleet, exchange: Exchange, work: Work, model: Vector) -> Sums:
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
    """Who can be reached at the moment; those whose data break the contract sit out."""

    fleet: VirtualFleet

    def candidates(self) -> Sequence[Candidate]:
        """Every device with its standing."""
        world = self.fleet.world
        return world.candidates(world.clock(), self.fleet.unfit)

    def wait(self, seconds: float) -> None:
        """Let virtual time pass, to the next moment at which a standing may change."""
        clock = self.fleet.world.clock
        change = self.fleet.world.next_change(clock())
        clock.advance_to(max(min(clock() + seconds, change), clock() + MOMENT_S))
