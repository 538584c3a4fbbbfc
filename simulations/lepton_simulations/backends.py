"""The backend that a scenario asks for."""

import os
from contextlib import ExitStack

from lepton_simulations.backend import Alone, Backend, Shard
from lepton_simulations.cluster import Cluster, Follower, RayLink, TorchLink
from lepton_simulations.config import SimulationConfig
from lepton_simulations.workers import Pool


def make_backend(shard: Shard, config: SimulationConfig, stack: ExitStack) -> Backend | None:
    """Start what ``config.engine`` asks for.

    Args:
        shard: the devices, as this process holds them.
        config: the scenario.
        stack: closes the backend.

    Returns:
        The backend; None where this process was to compute for another one, and has.

    Raises:
        ConfigError: the backend is not there.
        ConnectionFailed: the cluster cannot be joined.
    """
    engine = config.engine
    if engine.backend == "ray":
        return stack.enter_context(Cluster(RayLink(config.to_json(), engine.address, engine.workers)))
    # Before a process group is joined: its threads do not survive the workers' fork.
    own: Backend = local_backend(shard, engine.workers)
    stack.enter_context(own)
    if engine.backend == "local":
        return own
    link = TorchLink()
    if link.rank == 0:
        return stack.enter_context(Cluster(link, own))
    link.follow(Follower(own))
    return None


def local_backend(shard: Shard, workers: int) -> Backend:
    """This machine's.

    Args:
        shard: the devices.
        workers: processes; 0 = train in this process; -1 = an even share of the cores of this machine, or
            this process if that is one core or the devices train on a GPU.
    """
    if workers < 0:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
        cores = len(os.sched_getaffinity(0)) // max(1, processes)
        workers = cores if cores > 1 and not shard.on_gpu else 0
    return Pool(shard, workers) if workers else Alone(shard)
