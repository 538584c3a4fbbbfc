"""The scenario file of a simulation: what is trained, on which data, by which engine.

[run]                                  # exactly the settings of a run on a real fleet
task = "digits"
rounds = 10
[data]
partition = { kind = "dirichlet", clients = 20, alpha = 0.5 }
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from lepton_fl.plan import Frozen, RunSpec
from lepton_fl.tasks.partition import PartitionSpec
from lepton_simulations.world.config import DevicesConfig, FaultsConfig, WorldConfig


class DataConfig(Frozen):
    """The published data set and how it is split over virtual devices."""

    folder: str = ""  # where its file lies; digits needs none
    partition: PartitionSpec = PartitionSpec()
    seed: Annotated[int, Field(ge=0)] = 0  # of the split
    # Evaluate on the whole test set, or also on the devices' own part of it.
    evaluate: Literal["central", "devices"] = "central"


Tier = Literal["auto", "lean", "vectorised", "compiled", "fused", "native"]


class EngineConfig(Frozen):
    """How it is computed; the result is the same whatever ``workers`` and ``backend`` say."""

    # Processes; 0 = none besides this one; -1 = one per core.
    workers: Annotated[int, Field(ge=-1, le=4096)] = -1
    # Several machines: started by torchrun, or the cores of a Ray cluster.
    backend: Literal["local", "torchrun", "ray"] = "local"
    address: str = ""  # of the Ray cluster; empty = one on this machine, for the length of the run
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # what trains and evaluates
    # How devices are trained; "auto" takes the fastest that this model allows, and says which.
    tier: Tier = "auto"
    # Devices train one by one: slower, and no float is rounded by who trains with whom in a chunk. With it a
    # secure run and the same one without give the same bits, whatever the tier ("lean" does so anyway).
    one_by_one: bool = False
    # Of a secure run: every message and mask of the protocol, or the sum that it must bring.
    secure_aggregation: Literal["full", "ideal"] = "ideal"
    seed: Annotated[int, Field(ge=0)] = 0  # of cohorts, batch orders and faults


class OutputConfig(Frozen):
    """Where the run is recorded."""

    folder: str = ""  # journal, metrics, checkpoints, model; empty = runs/NAME
    plots: bool = True  # draw into its plots/ when the run is over
    tensorboard: bool = True  # write events into its tensorboard/, if tensorboardX is installed
    mlflow: str = ""  # tracking URI or folder: log the finished run there, too; needs mlflow


class ReplayConfig(Frozen):
    """A recorded run whose devices, times and outcomes are used instead of [devices] and [faults]."""

    file: str = ""  # a journal: of a simulated run, or exported by `lepton run journal`; empty = none
    sha256: str = ""  # of the file; noted when a run starts


class SimulationConfig(Frozen):
    """One scenario."""

    run: RunSpec
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    devices: DevicesConfig = DevicesConfig()
    faults: FaultsConfig = FaultsConfig()
    replay: ReplayConfig = ReplayConfig()
    output: OutputConfig = OutputConfig()

    @property
    def run_id(self) -> str:
        """The name of the run in its journal."""
        return f"simulation-{self.run.digest()[:16]}"

    @property
    def world(self) -> WorldConfig:
        """What surrounds the devices."""
        return WorldConfig(devices=self.devices, faults=self.faults)

    def identity(self) -> dict[str, Any]:
        """What the result depends on: all but where it is computed and where files lie."""
        body = self.to_json()
        del body["output"], body["data"]["folder"], body["replay"]["file"]
        for name in ("workers", "backend", "address", "device"):
            del body["engine"][name]
        return body
