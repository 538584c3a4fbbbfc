"""Flower's ``run_simulation`` on Ray: FedAvg as it comes, one CPU and one actor per core.

    python -m _simulation.peer_flower WORK MODEL COHORT ROUNDS CLIP OUT ACTORS

All clients of the fleet are registered as nodes, as they would be by ``flwr run``. Which client a node plays
stands in its message, so that cohorts are those of the plan.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from _simulation.peer_flower_client import app
from _simulation.work import Record, Work, flat


class Planned(FedAvg):
    """FedAvg that asks the planned clients and notes when each round is over."""

    def __init__(self, work: Work, cohort: int, rounds: int, clip: float, record: Record) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=cohort)
        self._work, self._cohort, self._rounds, self._clip = work, cohort, rounds, clip
        self._record = record
        self._nodes: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client of the cohort; a round ends when the next begins."""
        self._nodes = self._nodes or sorted(grid.get_node_ids())
        for place, (client, _) in enumerate(self._work.round(self._cohort, server_round - 1)):
            job = ConfigRecord(
                {
                    "work": str(self._work.folder),
                    "model": self._work.model,
                    "cohort": self._cohort,
                    "round": server_round - 1,
                    "place": place,
                    "clip": self._clip,
                }
            )
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: job})
            node = self._nodes[client % len(self._nodes)]
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple:
        """As FedAvg does; nobody may be missing."""
        replies = list(replies)
        answered = sum(not reply.has_error() for reply in replies)
        if answered != self._cohort:
            errors = {reply.error.reason for reply in replies if reply.has_error()}
            raise RuntimeError(f"{answered} of {self._cohort} clients answered: {errors}")
        result = super().aggregate_train(server_round, replies)
        self._record.commit()
        return result


def main(folder: str, model: str, cohort: str, rounds: str, clip: str, out: str, actors: str) -> None:
    """Train and write the record."""
    record = Record()
    work = Work(Path(folder), model)
    module = work.initial()
    strategy = Planned(work, int(cohort), int(rounds), float(clip), record)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        """The unchanged loop of a Flower strategy."""
        while len(list(grid.get_node_ids())) < work.clients:  # they register one by one
            time.sleep(0.01)
        arrays = ArrayRecord(module.state_dict())
        result = strategy.start(grid, arrays, num_rounds=int(rounds))
        module.load_state_dict(result.arrays.to_torch_state_dict())
        record.save(Path(out), flat(module))

    run_simulation(
        server,
        app,
        num_supernodes=work.clients,
        backend_config={
            "init_args": {"num_cpus": int(actors), "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
