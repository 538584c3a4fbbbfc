"""The scenario of ``lepton demo``: small enough for a few seconds, uneven enough to be worth watching."""

from lepton_fl.plan import CohortSpec, EarlyStop, LocalPlan, RunSpec
from lepton_fl.tasks.partition import PartitionSpec
from lepton_simulations.config import DataConfig, EngineConfig, SimulationConfig


def demo_config(workers: int | None = None) -> SimulationConfig:
    """Digits over 20 devices by Dirichlet(0.5), ten of them per round."""
    run = RunSpec(
        task="digits",
        rounds=12,
        cohort=CohortSpec(size=10),
        local=LocalPlan(optimizer="adam", learning_rate=0.004, batch_size=10, epochs=2),
        early_stop=EarlyStop(metric="accuracy", mode="max"),
    )
    return SimulationConfig(
        run=run,
        data=DataConfig(partition=PartitionSpec(kind="dirichlet", clients=20, alpha=0.5)),
        engine=EngineConfig(workers=-1 if workers is None else workers),
    )
