"""The client app that answers our strategies on any Flower deployment.

    app = client_app(["digits"])

Where a node finds its rows is its owner's business and said in the node's own configuration:

* ``data-source="/path/source.toml"``: a data source (the keys of ``DataSourceSpec``); or
* ``partition-id=0 num-partitions=10`` and, for tasks that need one, ``data-folder="/path"``: a part of the
  task's published data set, for trying things out. The run's configuration may name the ``partition`` (iid).

Only the tasks that are listed are run, whatever the server asks for.
"""

import os
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_fl.errors import BudgetRefused, ConfigError, Rejection, TaskError, UpdateRejected
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.sources import DataSourceSpec, DeviceData, open_source
from lepton_fl.tasks.task import load_task, resolve
from lepton_fl.wire.messages import Request, Ticket
from lepton_strategies.desk import batch_seed
from lepton_strategies.memory import ContextMemory
from lepton_strategies.model import trainer_of
from lepton_strategies.records import from_record_dict, to_record_dict

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    from lepton_fl.training.trainer import Trainer

DataFor = Callable[["Context", str], DeviceData]  # (context, task reference) -> the node's prepared rows


def client_app(
    tasks: Collection[str], *, data: DataFor | None = None, seed: int = 0, mods: Sequence[Any] = ()
) -> "ClientApp":
    """A client app that runs these tasks and no others.

    Args:
        tasks: names, short or full.
        data: finds a node's rows; None = as its node configuration says, see the module.
        seed: of the batch orders, with the node's name, the round and the attempt.
        mods: Flower's, around every answer; ``secure_mod()`` for secure aggregation.

    Raises:
        TaskError: a name is of no task.
    """
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    allowed = frozenset(resolve(name) for name in tasks)
    app = ClientApp(mods=list(mods))

    def answer(message: "Message", context: "Context") -> "Message":
        from lepton_fl.rounds.quantised import compressed
        from lepton_fl.training.respond import respond

        _one_thread()
        asked = from_record_dict(message.content)
        desk = _Desk(context, allowed, data or configured_data, seed)
        reply = compressed(asked, respond(asked, desk), os.urandom)
        # Salted: a transport that stores equal content once must not take two nodes' replies for one.
        return Message(content=to_record_dict(reply, salt=os.urandom(16)), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    return app


@dataclass(frozen=True, eq=False)
class _Desk:
    """A node's place in a round; implements ``training.respond.Desk``."""

    context: "Context"
    allowed: frozenset[str]
    data_for: DataFor
    base_seed: int

    def trainer(self, task: str) -> "Trainer":
        if task not in self.allowed:
            raise TaskError(
                f"The task {task!r} is not among those this node runs: {', '.join(sorted(self.allowed))}.",
                hint="The node's owner decides which tasks it runs, in client_app([...]).",
            )
        return trainer_of(task)

    def data(self, task: str, kind: str) -> Dataset:
        rows = self.data_for(self.context, task)
        found = rows.train if kind == "train" else rows.held_out
        if not len(found):
            raise UpdateRejected(Rejection.DATA_CONTRACT, f"This node has no rows to {kind} on.")
        return found

    def seed(self, ticket: Ticket) -> int:
        return batch_seed(self.base_seed, node_name(self.context), ticket.round, ticket.attempt)

    def memory(self) -> ContextMemory:
        return ContextMemory(self.context)

    def spend(self, request: Request, rows: int | None) -> None:
        if rows is not None:
            raise BudgetRefused(
                "A node of a stock Flower deployment keeps no privacy budget of its own.",
                hint="Example-level privacy works with `lepton client`, and in `lepton simulate`.",
            )

    def should_stop(self) -> bool:
        return False  # Flower's public API does not tell a node that its round has closed


def node_name(context: "Context") -> str:
    """What the seed of a node's batch order goes by: its partition, or its id."""
    return str(context.node_config.get("partition-id", context.node_id))


def configured_data(context: "Context", task: str) -> DeviceData:
    """The rows that the node's configuration names.

    Raises:
        ConfigError: it names none, or wrongly.
        DataError: they cannot be read.
        DataContractError: they break the task's contract.
    """
    return _open(_source(context), task)


@lru_cache(maxsize=4)
def _open(spec: DataSourceSpec, task: str) -> DeviceData:
    return open_source(spec, load_task(task))


def _source(context: "Context") -> DataSourceSpec:
    node, run = context.node_config, context.run_config
    if "data-source" in node:
        return DataSourceSpec.parse(_read_toml(Path(str(node["data-source"]))))
    if "partition-id" not in node or "num-partitions" not in node:
        raise ConfigError(
            "This node's configuration names no data.",
            hint="Start it with --node-config 'data-source=\"/path/source.toml\"' or "
            "'partition-id=0 num-partitions=10'.",
        )
    partition: dict[str, Any] = {"kind": run.get("partition", "iid"), "clients": node["num-partitions"]}
    if "alpha" in run:
        partition["alpha"] = run["alpha"]
    return DataSourceSpec.parse(
        {
            "kind": "task",
            "path": node.get("data-folder"),
            "partition": PartitionSpec.model_validate(partition),
            "part": node["partition-id"],
        }
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The data source {path} cannot be read: {error}.") from error


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
