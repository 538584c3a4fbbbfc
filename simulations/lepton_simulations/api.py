"""Simulate a fleet in a few lines.

    from lepton_simulations import simulate

    result = simulate("digits", "fedadam", clients=20, rounds=10, partition="dirichlet")
    print(result.to_frame()[["round", "central_accuracy", "bytes_total"]])
    result.plot("digits.png")

Everything above the messages is the code of a real fleet: the same plans, codec, checks, sums and optimisers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from lepton_fl.compression.federated import check_teacher
from lepton_fl.compression.source import start_of
from lepton_fl.errors import ConfigError
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.buffered import BufferedCampaign
from lepton_fl.rounds.campaign import Best, Campaign, RunState, Verdict
from lepton_fl.rounds.coverage import Coverage, coverage
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.federated import FederatedDataset, federated_dataset
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.task import Task, load_task, resolve
from lepton_fl.vector import Layout, Vector, vector_digest
from lepton_simulations.backend import Backend
from lepton_simulations.backends import make_backend
from lepton_simulations.book import FolderBook, MemoryBook
from lepton_simulations.config import DataConfig, EngineConfig, OutputConfig, SimulationConfig, Tier
from lepton_simulations.dispatch import VirtualDispatcher
from lepton_simulations.exchange import CoordinatorCrash, InMemoryExchange, Interrupted
from lepton_simulations.fleet import VirtualFleet, VirtualRoster
from lepton_simulations.labels import simulated
from lepton_simulations.private import Guard, refuse_scenario
from lepton_simulations.replaying import as_recorded, recorded_world
from lepton_simulations.rows import Row, Tally, device_columns, frame, row_columns
from lepton_simulations.secure import one_by_one, refuse_secure, rounding, secure_rounds
from lepton_simulations.settings import Strategy, explicit, refused, run_settings
from lepton_simulations.threads import one_thread
from lepton_simulations.world import DevicesConfig, FaultsConfig, World

if TYPE_CHECKING:
    import pandas as pd

OnRow = Callable[[Row], None]
OnProgress = Callable[[int, int], None]  # devices of this round that have been dealt with, and all of them
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, eq=False)
class Result:
    """What a simulation brought."""

    task: str
    verdict: Verdict
    rows: list[Row]  # one per committed round
    model: Vector  # (P,) float32, after the last committed round
    layout: Layout  # of the model
    best: Best | None  # the best evaluated round, by early_stop.metric
    best_model: Vector | None  # its model
    folder: Path | None
    journal_sha256: str = ""  # the hash of the last event: equal exactly when the same happened
    simulated: tuple[str, ...] = ()  # what is simulated, in words
    tallies: Mapping[str, Tally] = field(default_factory=dict)  # what became of each device
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # device -> the class that it is of
    usual_s: Mapping[str, float] = field(default_factory=dict)  # device -> virtual seconds for an attempt
    coverage_floor: float = 0.0  # as asked for
    engine_note: str = ""  # why not the fastest engine trained, in one sentence; '' = it did, or as asked for

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) of the final model's little-endian float32 bytes."""
        return vector_digest(self.model)

    def state_dict(self) -> dict[str, Vector]:
        """The final model by tensor names; integer buffers, which are never averaged, are not in it."""
        return self.layout.unflatten(self.model)

    def to_frame(self) -> "pd.DataFrame":
        """One line a round: losses, metrics, devices, outcomes, bytes, virtual time, wall seconds."""
        return frame(row_columns(self.rows))

    def devices_frame(self) -> "pd.DataFrame":
        """One line a device: attempts it was asked, accepted, examples, bytes, outcomes."""
        return frame(device_columns(self.tallies))

    def plot(self, path: str | Path) -> Path:
        """Draw metrics and losses against rounds, virtual time and bytes into a PNG, PDF or SVG file.

        Raises:
            ConfigError: there is nothing to draw, or the suffix is unknown.
            StateError: the file cannot be written.
        """
        from lepton_simulations.plot import plot_rows

        return plot_rows(self.rows, Path(path), title=self.title, footer="; ".join(self.simulated))

    def plots(self, folder: str | Path) -> list[Path]:
        """Draw everything there is to draw: learning.png, participation.png and, with privacy, privacy.png.

        Raises:
            StateError: a file cannot be written.
        """
        from lepton_simulations.plot import plot_all

        footer = "; ".join(self.simulated)
        return plot_all(self.rows, self.tallies, Path(folder), title=self.title, footer=footer)

    @property
    def coverage(self) -> Coverage:
        """Whom the model was made of, by class and by speed, and why the others are not in it."""
        counted = [d for d, tally in self.tallies.items() if tally.accepted]
        causes = {
            d: max(tally.outcomes, key=lambda outcome: tally.outcomes[outcome])
            for d, tally in self.tallies.items()
            if tally.asked and not tally.accepted
        }
        return coverage({d: self.groups.get(d, ()) for d in self.tallies}, counted, self.usual_s, causes)

    @property
    def flags(self) -> list[str]:
        """Every part of the fleet of which less than ``cohort.coverage_floor`` contributed."""
        return self.coverage.flags(self.coverage_floor)

    @property
    def title(self) -> str:
        """The task's short name."""
        return self.task.rpartition(":")[2]


def simulate(
    task: Task | str,
    strategy: Strategy = "",
    clients: int = 10,
    rounds: int = 10,
    *,
    cohort: int | Mapping[str, Any] = 0,
    partition: Literal["natural", "iid", "dirichlet", "shards"] = "iid",
    alpha: float = 0.5,
    data: str | Path = "",
    workers: int = -1,
    seed: int = 0,
    drop_out: float = 0.0,
    corrupt: float = 0.0,
    devices: DevicesConfig | Mapping[str, Any] | None = None,
    faults: FaultsConfig | Mapping[str, Any] | None = None,
    tier: Tier = "auto",
    folder: str | Path = "",
    resume: bool = False,
    on_round: OnRow | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
    **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
) -> Result:
    """Train a task on a virtual fleet.

    Args:
        task: the task or its name.
        strategy: ``fedavg``, ``fedavgm``, ``fedadagrad``, ``fedadam``, ``fedyogi``, ``fedprox``, a robust
            rule such as ``median``, or an object of ``lepton_strategies``.
        clients: devices; with the natural partition the data decide.
        rounds: of training.
        cohort: devices per round; 0 = all of them. Or the fields of ``CohortSpec``.
        partition: how the rows are split over devices.
        alpha: of the Dirichlet partition; smaller is more skewed.
        data: the folder of the task's published data set; digits needs none.
        workers: processes; 0 = none besides this one; -1 = one per core. The result does not depend on it.
        seed: of everything random.
        drop_out: the probability that a device stays silent in a round.
        corrupt: the share of devices whose replies arrive damaged.
        devices: speeds, links and availability, as in the [devices] section; None = ideal ones.
        faults: what else goes wrong, as in the [faults] section.
        tier: which engine trains; auto = the fastest that this model allows.
        folder: where the run is recorded; empty = nowhere.
        resume: continue the run in ``folder`` at its last committed round.
        on_round: called after each round, and again after its evaluation.
        on_progress: called within a round with the devices dealt with so far, and all of them.
        should_stop: asked between client steps; what a resumed run then repeats comes out the same.
        **run: further settings of the run, as in the [run] section of a scenario: ``local``, ``server``,
            ``schedule``, ``weighting``, ``early_stop``, ... They win over the strategy's.

    Raises:
        ConfigError: a setting is wrong.
        TaskError, DataError, StateError: see the message.
    """
    try:
        split = PartitionSpec(kind=partition, clients=clients, alpha=alpha)
        known = clients if partition != "natural" else 0
        spec = run_settings(task, strategy, clients=known, rounds=rounds, cohort=cohort, seed=seed, more=run)
        config = SimulationConfig(
            run=spec,
            data=DataConfig(folder=str(data), partition=split, seed=seed),
            engine=EngineConfig(workers=workers, tier=tier, seed=seed),
            devices=DevicesConfig.model_validate(devices or {}),
            faults=FaultsConfig.model_validate(
                {"drop_out": drop_out, "corrupt": corrupt, **explicit(faults or {})}
            ),
            output=OutputConfig(folder=str(folder)),
        )
    except ValidationError as error:
        raise refused(error) from error
    loaded = task if isinstance(task, Task) else None
    return run_scenario(
        config,
        task=loaded,
        resume=resume,
        on_round=on_round,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def run_scenario(
    config: SimulationConfig,
    *,
    task: Task | None = None,
    resume: bool = False,
    on_round: OnRow | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> Result:
    """Run one scenario.

    Args:
        config: the scenario; an empty ``output.folder`` records nothing.
        task: used instead of importing ``config.run.task``.
        resume: continue the run in ``output.folder``.
        on_round: see ``simulate``.
        on_progress: see ``simulate``.
        should_stop: see ``simulate``.
    """
    on_round = on_round or (lambda row: None)
    on_progress = on_progress or (lambda done, total: None)
    config = as_recorded(config)
    with one_thread():
        fleet = build_fleet(config, task)
        fitted = _fitted(config, fleet.data)
        return _run(fitted, fleet, resume, on_round, on_progress, should_stop)


def build_fleet(config: SimulationConfig, task: Task | None = None) -> VirtualFleet:
    """The devices of a scenario.

    Args:
        config: the scenario.
        task: used instead of importing ``config.run.task``.
    """
    task = task or load_task(config.run.task)
    _refuse_what_has_no_meaning(config.run, task)
    folder = Path(config.data.folder) if config.data.folder else None
    data = federated_dataset(task, folder, config.data.partition, config.data.seed)
    refuse_scenario(_fitted(config, data), len(data.clients))
    refuse_secure(config)
    engine = config.engine
    if config.run.local.keeps_state and engine.backend != "local":
        raise ConfigError(
            f"engine.backend = {engine.backend!r} does not go with local.control_variates or local.personal.",
            hint="What devices remember lies in memory that the workers of one machine share; use 'local'.",
        )
    if config.replay.file:
        world = recorded_world(config, data.clients)
    else:
        world = World.build(config.world, data.clients, engine.seed)
    return VirtualFleet.build(
        resolve(config.run.task),
        data,
        config.run.local,
        world=world,
        seed=engine.seed,
        device=engine.device,
        tier=engine.tier,
        tail=config.run.privacy.tail_size if config.run.privacy else 0,
    )


def _run(
    config: SimulationConfig,
    fleet: VirtualFleet,
    resume: bool,
    on_round: OnRow,
    on_progress: OnProgress,
    should_stop: ShouldStop,
) -> Result:
    rng = Random(config.engine.seed)  # noqa: S311 - a simulation is to be repeatable, nobody is protected
    with ExitStack() as stack:
        fleet.remember(Path(config.output.folder) if config.output.folder else None)
        backend = make_backend(fleet, config, stack)
        if backend is None:
            return _followed(config, fleet)
        exchange = InMemoryExchange(
            fleet,
            backend,
            on_progress=on_progress,
            should_stop=should_stop,
            one_by_one=one_by_one(config),
            random_of=rounding(config.engine.seed) if config.run.quantisation else None,
        )
        book = _book(config, fleet, rng, on_round, stack)
        labels = simulated(config, len(fleet.devices), fleet.engine.name)
        state = _start(config, fleet, book, resume, labels)
        if fleet.memory:
            fleet.memory.rewind(state.round)
        verdict = _campaign(config, fleet, exchange, backend, book, rng, state, should_stop)
        final = book.state or state
        result = Result(
            task=fleet.task,
            verdict=verdict,
            rows=book.rows,
            model=final.model,
            layout=fleet.trainer.layout,
            best=final.best,
            best_model=book.best_model,
            folder=Path(config.output.folder) if config.output.folder else None,
            journal_sha256=book.journal_sha256,
            simulated=labels,
            tallies=dict(book.tallies),
            groups=fleet.world.groups(),
            usual_s=fleet.usual_seconds(),
            coverage_floor=config.run.cohort.coverage_floor,
            engine_note=fleet.engine_note,
        )
        if isinstance(book, FolderBook):
            book.finish(final.model, {**result.coverage.to_json(), "flags": result.flags})
            _publish(config, result)
        return result


def _followed(config: SimulationConfig, fleet: VirtualFleet) -> Result:
    """What a process has to show that only computed for another one."""
    verdict = Verdict("completed", "Computed for the first process, which has the results.")
    model = fleet.trainer.initial(config.run.seed)
    return Result(fleet.task, verdict, [], model, fleet.trainer.layout, None, None, None)


def _campaign(
    config: SimulationConfig,
    fleet: VirtualFleet,
    exchange: InMemoryExchange,
    backend: Backend,
    book: MemoryBook,
    rng: Random,
    state: RunState,
    should_stop: ShouldStop,
) -> Verdict:
    """The production's rounds; a coordinator that dies goes on from its last committed state."""
    work = fleet.work(exchange, on_devices=config.data.evaluate == "devices")
    roster, clock = VirtualRoster(fleet), fleet.world.clock
    seams = config.run, config.run_id, work, exchange, roster, book, rng
    guard = Guard(config, fleet.trainer.layout.moving)
    while True:
        if config.run.mode == "buffered":
            dispatcher = VirtualDispatcher(fleet, backend, should_stop)
            campaign: Campaign = BufferedCampaign(*seams, clock=clock, look_s=inf, dispatcher=dispatcher)
        else:
            campaign = Campaign(
                *seams,
                clock=clock,
                look_s=inf,
                private=guard.start(state),
                secure=secure_rounds(config, fleet.world),
                measure=exchange.measure,
                history=deepcopy(book.history),
            )
        try:
            return campaign.run(state, should_stop)
        except CoordinatorCrash as crash:
            state = (book.state or state).on(attempt=crash.plan.attempt, at_work=())
        except Interrupted:
            done = book.state or state
            return Verdict("stopped", f"Stopped on request in round {done.round + 1}.")


def _publish(config: SimulationConfig, result: Result) -> None:
    """What people look at, besides the record: plots, and MLflow unless the run is to be continued."""
    plots: list[Path] = []
    if config.output.plots and result.folder and result.rows:
        plots = result.plots(result.folder / "plots")
    if config.output.mlflow and result.folder and result.verdict.outcome != "stopped":
        from lepton_simulations.sinks import log_to_mlflow

        log_to_mlflow(
            config.output.mlflow,
            config.run.name or result.title,
            config.identity(),
            result.rows,
            {"weights_sha256": result.weights_sha256, "journal_sha256": result.journal_sha256}
            | {"simulated": "; ".join(result.simulated), "verdict": result.verdict.reason},
            [*plots, *(result.folder / name for name in ("scenario.json", "metrics.csv"))],
        )


def _book(
    config: SimulationConfig, fleet: VirtualFleet, rng: Random, on_round: OnRow, stack: ExitStack
) -> MemoryBook:
    clock, layout = fleet.world.clock, fleet.trainer.layout
    if not config.output.folder:
        return MemoryBook(on_round, clock=clock, device_seconds=True)
    folder = Path(config.output.folder)
    return stack.enter_context(FolderBook(folder, layout, rng, on_round, clock=clock, device_seconds=True))


def _start(
    config: SimulationConfig, fleet: VirtualFleet, book: MemoryBook, resume: bool, labels: tuple[str, ...]
) -> RunState:
    book.know(fleet.devices)
    if resume:
        if not isinstance(book, FolderBook):
            hint = "Name the folder of the run."
            raise ConfigError("There is nothing to resume without a folder.", hint=hint)
        if not book.barely_begun:
            state = book.resume(config)
            fleet.world.clock.advance_to(book.time_s)
            return state
        book.check(config)
    book.begin(config, labels)
    model = start_of(fleet.data.task, config.run.teacher, fleet.trainer.initial(config.run.seed))
    return RunState(model, ServerState.initial(config.run.server, fleet.size))


def _refuse_what_has_no_meaning(run: RunSpec, task: Task) -> None:
    """Settings of a run on a real fleet that a simulation would have to ignore."""
    meaningless = {
        "initial_model": run.initial_model,  # no store to take it from
        "central_data": run.central_data,  # the data set's test rows are always used
        "cohort.groups": run.cohort.groups,  # virtual devices carry no labels
        "task_version": run.task_version not in ("", task.version),
    }
    check_teacher(task, run.teacher)
    for name, is_set in meaningless.items():
        if is_set:
            raise ConfigError(
                f"run.{name} cannot be used in a simulation of {task.name} {task.version}.",
                hint="Remove it from the scenario.",
            )


def _fitted(config: SimulationConfig, data: FederatedDataset) -> SimulationConfig:
    """A cohort is at most the fleet: with fewer devices than asked for, waiting would not bring more."""
    run, count = config.run, len(data.clients)
    cohort = run.cohort.model_copy(
        update={
            "size": min(run.cohort.size, count),
            "min_reports": min(run.cohort.min_reports, count),
            "over_selection": min(run.cohort.over_selection, count / min(run.cohort.size, count)),
            "fill_wait_s": 0.0,  # every device is there from the start
        }
    )
    return config.model_copy(update={"run": run.model_copy(update={"cohort": cohort})})
