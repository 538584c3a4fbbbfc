"""A recorded run as the world of a scenario: ``lepton simulate [SCENARIO] --replay FILE``.

    config = as_recorded(config)             # rounds, cohorts and deadlines as they were
    world = recorded_world(config, devices)  # the same devices at the same times, with the same outcomes

How devices train is the scenario's to say, so that one can ask what other settings would have given on the
very same fleet. Without a scenario the recorded run's own settings are used.
"""

from collections.abc import Sequence
from pathlib import Path

from lepton_fl.errors import NotFound, StateError
from lepton_fl.files import sha256_hex
from lepton_fl.tasks.partition import PartitionSpec
from lepton_simulations.config import DataConfig, ReplayConfig, SimulationConfig
from lepton_simulations.world import Replay, World
from lepton_simulations.world.replay import refuse_buffered

PATIENCE_S = 30 * 86_400.0  # a record may hold any pause, such as a night


def scenario_of(path: Path) -> SimulationConfig:
    """A scenario from nothing but a journal: its settings, and as many devices, with rows dealt at random.

    Raises:
        NotFound, StateCorrupt, StateError: the journal cannot be used.
    """
    replay = Replay.read(path)
    cohort = replay.spec.cohort.model_copy(update={"groups": ()})
    unused = {"initial_model": "", "central_data": "", "task_version": "", "cohort": cohort}
    run = replay.spec.model_copy(update={**unused, "rounds": max(1, replay.rounds)})
    data = DataConfig(partition=PartitionSpec(clients=len(replay.devices)))
    return SimulationConfig(run=run, data=data, replay=ReplayConfig(file=str(path)))


def as_recorded(config: SimulationConfig) -> SimulationConfig:
    """The scenario with the rounds and cohorts of the run that it replays; unchanged if it replays none.

    Raises:
        NotFound, StateCorrupt, StateError: the journal cannot be used.
        ConfigError: the recorded run or the scenario is buffered.
        StateError: it is another file than the one the run was started with.
    """
    if not config.replay.file:
        return config
    path = Path(config.replay.file)
    replay, digest = Replay.read(path), _digest(path)
    if config.replay.sha256 not in ("", digest):
        raise StateError(
            f"{path} has SHA-256 {digest[:12]}…; the run was started with {config.replay.sha256[:12]}….",
            hint="Name the file that the run was started with.",
        )
    spec = replay.spec
    refuse_buffered("The scenario's", config.run.mode)
    cohort = spec.cohort.model_copy(update={"groups": (), "quorum_wait_s": PATIENCE_S})
    update = {
        "cohort": cohort,
        "rounds": min(config.run.rounds, max(1, replay.rounds)),
        "evaluate_every": spec.evaluate_every
        if config.data.evaluate == "devices"
        else config.run.evaluate_every,
        "evaluate_cohort": spec.evaluate_cohort,
    }
    run = config.run.model_copy(update=update)
    return config.model_copy(update={"run": run, "replay": ReplayConfig(file=str(path), sha256=digest)})


def recorded_world(config: SimulationConfig, devices: Sequence[str]) -> World:
    """The world of a scenario that replays a journal.

    Args:
        config: the scenario.
        devices: of the virtual fleet. If the recorded devices are among them each plays itself, else the
            k-th plays the k-th that was asked.

    Raises:
        ConfigError: there are fewer devices than were recorded.
        NotFound, StateCorrupt, StateError: the journal cannot be used.
    """
    replay = Replay.read(Path(config.replay.file))
    if config.data.evaluate == "central":
        replay = replay.without_evaluations()
    recorded = replay.devices
    if set(recorded) <= set(devices):
        others = set(recorded)
        return replay.world([*recorded, *(d for d in devices if d not in others)])
    return replay.world(devices)


def _digest(path: Path) -> str:
    try:
        return sha256_hex(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"There is no journal {path}.") from error
    except OSError as error:
        raise StateError(f"Cannot read {path}: {error.strerror or error}.") from error
