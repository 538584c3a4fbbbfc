"""The scenario file of a simulation: what is trained, on which data, by which engine.

[run]                                  # exactly the settings of a run on a real fleet
task = "digits"
rounds = 10
[data]
partition = { kind = "dirichlet", clients = 20, alpha = 0.5 }
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from lepton_fl.plan import Fraction, Frozen, RunSpec
from lepton_fl.tasks.partition import PartitionSpec


class DataConfig(Frozen):
    """The published data set and how it is split over virtual devices."""

    folder: str = ""  # where its file lies; digits needs none
    partition: PartitionSpec = PartitionSpec()
    seed: Annotated[int, Field(ge=0)] = 0  # of the split
    # Evaluate on the whole test set, or also on the devices' own part of it.
    evaluate: Literal["central", "devices"] = "central"


class EngineConfig(Frozen):
    """How it is computed; the result is the same whatever ``workers`` says."""

    workers: Annotated[
        int, Field(ge=-1, le=4096)
    ] = -1  # processes; 0 = none besides this one; -1 = one per core
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    seed: Annotated[int, Field(ge=0)] = 0  # of cohorts, batch orders and faults


class FaultConfig(Frozen):
    """How often virtual devices misbehave."""

    drop_out: Fraction = 0.0  # probability that a device stays silent in an attempt
    corrupt: Fraction = 0.0  # share of devices whose replies arrive damaged


class OutputConfig(Frozen):
    """Where the run is recorded."""

    folder: str = ""  # journal, metrics, checkpoints, model; empty = runs/NAME


class SimulationConfig(Frozen):
    """One scenario."""

    run: RunSpec
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    faults: FaultConfig = FaultConfig()
    output: OutputConfig = OutputConfig()

    def identity(self) -> dict[str, Any]:
        """What the result depends on: all but the number of workers and where files lie."""
        body = self.to_json()
        del body["output"], body["engine"]["workers"], body["engine"]["device"], body["data"]["folder"]
        return body
