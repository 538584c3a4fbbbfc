"""Flower's own loop over a virtual fleet, in this process: no server, no Ray, no packaged app.

    from flwr.serverapp.strategy import FedAvg
    from lepton_simulations.flower import local_grid
    from lepton_strategies import initial_arrays

    with local_grid("digits", clients=100, local={"learning_rate": 0.1}) as grid:
        result = FedAvg(fraction_evaluate=0.1).start(grid, initial_arrays("digits"), num_rounds=10)

Any strategy runs, ours at the speed of the engine: see ``lepton_strategies.local_grid``. A client app of your
own trains in place of the engine with ``app=``. This module is the simulation's only one that touches Flower;
``TaskIdentity``, which says on whose behalf a process makes messages, is the only part of it that Flower does
not publish.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flwr.supercore.task_identity import TaskIdentity
from pydantic import ValidationError

from lepton_fl.errors import ConfigError
from lepton_fl.plan import LocalPlan, RoundPlan, RunSpec
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.task import Task
from lepton_fl.wire.messages import Request
from lepton_simulations.api import build_fleet
from lepton_simulations.backends import local_backend
from lepton_simulations.config import DataConfig, EngineConfig, SimulationConfig, Tier
from lepton_simulations.exchange import InMemoryExchange
from lepton_simulations.fleet import VirtualFleet, VirtualRoster
from lepton_simulations.settings import refused
from lepton_simulations.threads import one_thread
from lepton_simulations.world.config import DevicesConfig, FaultsConfig
from lepton_strategies.local_grid import AppNodes, EngineNodes, LocalGrid, Nodes

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


@contextmanager
def local_grid(
    task: Task | str,
    *,
    clients: int = 10,
    partition: Literal["natural", "iid", "dirichlet", "shards"] = "iid",
    alpha: float = 0.5,
    data: str | Path = "",
    local: LocalPlan | Mapping[str, Any] | None = None,
    app: "ClientApp | None" = None,
    workers: int = -1,
    seed: int = 0,
    devices: DevicesConfig | Mapping[str, Any] | None = None,
    faults: FaultsConfig | Mapping[str, Any] | None = None,
    tier: Tier = "auto",
) -> Iterator[LocalGrid]:
    """A Flower grid whose nodes are virtual devices; it works inside the ``with`` block.

    Args:
        task: the task or its name.
        clients: devices; with the natural partition the data decide.
        partition: how the rows are split over devices.
        alpha: of the Dirichlet partition; smaller is more skewed.
        data: the folder of the task's published data set; digits needs none.
        local: how devices train; one of our strategies must be given the same, at any learning rate.
        app: answers the messages of other strategies than ours, told ``partition-id`` and
            ``num-partitions``; None = the engine does, by Flower's conventions.
        workers: processes; 0 = none besides this one; -1 = one per core.
        seed: of the batch orders and of whatever else is drawn.
        devices: speeds, links and availability, as in the [devices] section; None = ideal ones.
        faults: what goes wrong, as in the [faults] section.
        tier: which engine trains.

    Raises:
        ConfigError: a setting is wrong.
        TaskError, DataError: see the message.
    """
    try:
        plan = local if isinstance(local, LocalPlan) else LocalPlan.model_validate(dict(local or {}))
        config = SimulationConfig(
            run=RunSpec(task=task.name if isinstance(task, Task) else task, local=plan),
            data=DataConfig(
                folder=str(data),
                partition=PartitionSpec(kind=partition, clients=clients, alpha=alpha),
                seed=seed,
            ),
            engine=EngineConfig(workers=workers, tier=tier, seed=seed),
            devices=DevicesConfig.model_validate(devices or {}),
            faults=FaultsConfig.model_validate(faults or {}),
        )
    except ValidationError as error:
        raise refused(error) from error
    with ExitStack() as stack:
        stack.enter_context(flower_process())
        stack.enter_context(one_thread())
        fleet = build_fleet(config, task if isinstance(task, Task) else None)
        backend = stack.enter_context(local_backend(fleet, workers))
        exchange = _Checked(InMemoryExchange(fleet, backend), plan)
        nodes: Nodes = AppNodes(app, len(fleet.devices)) if app else _engine_nodes(exchange, fleet, plan)
        yield LocalGrid(exchange, VirtualRoster(fleet), nodes)


def _engine_nodes(exchange: Exchange, fleet: VirtualFleet, local: LocalPlan) -> EngineNodes:
    work, layout = fleet.work(exchange), fleet.trainer.layout
    return EngineNodes(exchange, fleet.task, local=local, work=work, layout=layout)


class _Checked:
    """Refuses a way of training that the engine was not chosen, and checked, for."""

    def __init__(self, exchange: Exchange, local: LocalPlan) -> None:
        self._exchange = exchange
        self._local = local

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        """See ``Exchange``."""
        rate = {"learning_rate": plan.local.learning_rate}
        if plan.kind == "train" and plan.local != self._local.model_copy(update=rate):
            theirs, ours = plan.local.to_json(), self._local.to_json()
            differ = {k: v for k, v in theirs.items() if v != ours[k] and k not in rate}
            raise ConfigError(
                f"The strategy trains with {differ}, the grid's engine was chosen without it.",
                hint=f"Give it to the grid, too: local_grid(..., local={differ}).",
            )
        return self._exchange.ask(plan, request)

    def tell(self, plan: RoundPlan, device_id: str, refusal: Any) -> None:  # noqa: ANN401 - passed on
        """See ``Exchange``."""
        self._exchange.tell(plan, device_id, refusal)


@contextmanager
def flower_process() -> Iterator[None]:
    """Say on whose behalf this process makes messages, as Flower's runtime does; nothing if it has."""
    try:
        known = TaskIdentity.run_id
    except RuntimeError:
        known = None
    if known is not None:
        yield
        return
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    try:
        yield
    finally:
        for name in ("_task_id", "_run_id", "_node_id"):
            setattr(TaskIdentity, name, None)
