"""Simulate a fleet in a few lines.

    from lepton_simulations import simulate

    result = simulate("digits", clients=20, rounds=10, partition="dirichlet")
    print(result.rows[-1].metric("accuracy"))
    result.plot("digits.png")

Everything above the messages is the code of a real fleet: the same plans, codec, checks, sums and optimisers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import ValidationError

from lepton_fl.errors import ConfigError
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import Best, Campaign, RunState, Verdict
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.federated import FederatedDataset, federated_dataset
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.task import Task, load_task, resolve
from lepton_fl.vector import Layout, Vector
from lepton_simulations.book import FolderBook, MemoryBook, Row
from lepton_simulations.config import DataConfig, EngineConfig, FaultConfig, OutputConfig, SimulationConfig
from lepton_simulations.faults import Faults
from lepton_simulations.fleet import InMemoryExchange, VirtualFleet, VirtualRoster

Progress = Callable[[Row], None]
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

    def state_dict(self) -> dict[str, Vector]:
        """The final model by tensor names; integer buffers, which are never averaged, are not in it."""
        return self.layout.unflatten(self.model)

    def plot(self, path: str | Path) -> Path:
        """Draw metrics against rounds and bytes into a PNG, PDF or SVG file.

        Raises:
            StateError: the file cannot be written.
        """
        from lepton_simulations.plot import plot_rows

        return plot_rows(self.rows, Path(path), title=self.task.rpartition(":")[2])


def simulate(
    task: Task | str,
    *,
    clients: int = 10,
    rounds: int = 10,
    cohort: int | Mapping[str, Any] = 0,
    partition: Literal["natural", "iid", "dirichlet", "shards"] = "iid",
    alpha: float = 0.5,
    data: str | Path = "",
    workers: int = -1,
    seed: int = 0,
    drop_out: float = 0.0,
    corrupt: float = 0.0,
    folder: str | Path = "",
    resume: bool = False,
    on_round: Progress | None = None,
    should_stop: ShouldStop = lambda: False,
    **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
) -> Result:
    """Train a task on a virtual fleet.

    Args:
        task: the task or its name.
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
        folder: where the run is recorded; empty = nowhere.
        resume: continue the run in ``folder`` at its last committed round.
        on_round: called after each round, and again after its evaluation.
        should_stop: asked between rounds.
        **run: further settings of the run, as in the [run] section of a scenario: ``local``, ``server``,
            ``schedule``, ``weighting``, ``early_stop``, ...

    Raises:
        ConfigError: a setting is wrong.
        TaskError, DataError, StateError: see the message.
    """
    try:
        split = PartitionSpec(kind=partition, clients=clients, alpha=alpha)
        spec = _run_spec(task, rounds, cohort, clients if partition != "natural" else 0, seed, run)
        config = SimulationConfig(
            run=spec,
            data=DataConfig(folder=str(data), partition=split, seed=seed),
            engine=EngineConfig(workers=workers, seed=seed),
            faults=FaultConfig(drop_out=drop_out, corrupt=corrupt),
            output=OutputConfig(folder=str(folder)),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}.") from error
    loaded = task if isinstance(task, Task) else None
    return run_scenario(config, task=loaded, resume=resume, on_round=on_round, should_stop=should_stop)


def run_scenario(
    config: SimulationConfig,
    *,
    task: Task | None = None,
    resume: bool = False,
    on_round: Progress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> Result:
    """Run one scenario.

    Args:
        config: the scenario; an empty ``output.folder`` records nothing.
        task: used instead of importing ``config.run.task``.
        resume: continue the run in ``output.folder``.
        on_round: see ``simulate``.
        should_stop: see ``simulate``.
    """
    task = task or load_task(config.run.task)
    _refuse_what_has_no_meaning(config.run, task)
    folder = Path(config.data.folder) if config.data.folder else None
    data = federated_dataset(task, folder, config.data.partition, config.data.seed)
    with _one_thread():
        return _run(_fitted(config, data), data, resume, on_round or (lambda row: None), should_stop)


def _run(
    config: SimulationConfig,
    data: FederatedDataset,
    resume: bool,
    on_round: Progress,
    should_stop: ShouldStop,
) -> Result:
    spec, engine = config.run, config.engine
    faults = Faults(config.faults.drop_out, config.faults.corrupt, engine.seed)
    name = resolve(spec.task)
    fleet = VirtualFleet.build(name, data, faults=faults, seed=engine.seed, device=engine.device)
    rng = Random(engine.seed)  # noqa: S311 - a simulation is to be repeatable; nobody's privacy is at stake
    with ExitStack() as stack:
        exchange = stack.enter_context(
            InMemoryExchange(fleet, engine.workers if engine.workers >= 0 else None)
        )
        book = _book(config, fleet.trainer.layout, rng, on_round, stack)
        state = _start(config, fleet, book, resume)
        work = fleet.work(exchange, on_devices=config.data.evaluate == "devices")
        run_id = f"simulation-{spec.digest()[:16]}"
        campaign = Campaign(spec, run_id, work, exchange, VirtualRoster(fleet), book, rng)
        verdict = campaign.run(state, should_stop)
        final = book.state or state
        if isinstance(book, FolderBook):
            book.finish(final.model)
    place = Path(config.output.folder) if config.output.folder else None
    layout = fleet.trainer.layout
    return Result(name, verdict, book.rows, final.model, layout, final.best, book.best_model, place)


def _book(
    config: SimulationConfig, layout: Layout, rng: Random, on_round: Progress, stack: ExitStack
) -> MemoryBook:
    if not config.output.folder:
        return MemoryBook(on_round)
    return stack.enter_context(FolderBook(Path(config.output.folder), layout, rng, on_round))


def _start(config: SimulationConfig, fleet: VirtualFleet, book: MemoryBook, resume: bool) -> RunState:
    if isinstance(book, FolderBook):
        if resume:
            return book.resume(config)
        book.begin(config)
    elif resume:
        raise ConfigError("There is nothing to resume without a folder.", hint="Name the folder of the run.")
    model = fleet.trainer.initial(config.run.seed)
    return RunState(model, ServerState.initial(config.run.server, fleet.size))


def _refuse_what_has_no_meaning(run: RunSpec, task: Task) -> None:
    """Settings of a run on a real fleet that a simulation would have to ignore."""
    meaningless = {
        "initial_model": run.initial_model,  # no store to take it from
        "central_data": run.central_data,  # the data set's test rows are always used
        "cohort.groups": run.cohort.groups,  # virtual devices carry no labels
        "task_version": run.task_version not in ("", task.version),
    }
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


def _run_spec(
    task: Task | str,
    rounds: int,
    cohort: int | Mapping[str, Any],
    clients: int,
    seed: int,
    run: Mapping[str, Any],
) -> RunSpec:
    everybody = {"size": clients} if clients else {}
    given = cohort if isinstance(cohort, Mapping) else ({"size": cohort} if cohort else {})
    name = task.name if isinstance(task, Task) else task
    fields = {"task": name, "rounds": rounds, "cohort": {**everybody, **given}, "seed": seed}
    return RunSpec.model_validate({**fields, **run})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train with one thread: several fight over the cores with the workers, and fork only the caller."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
