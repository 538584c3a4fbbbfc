"""A private run in a simulation: the real mechanisms and arithmetic, and a seed instead of secrets.

Noise and sealing keys come from the seed, so that a run can be repeated bit by bit; it protects nobody, and
its label says so. Epsilon is what a real fleet with these settings would spend.
"""

from lepton_fl.errors import ConfigError
from lepton_fl.plan import RunSpec
from lepton_fl.privacy.noise import simulation_key
from lepton_fl.privacy.planning import Prepared
from lepton_fl.rounds.campaign import RunState
from lepton_fl.rounds.ledger import MemoryLedger
from lepton_fl.rounds.private import PrivateRounds, budget_of, prepared, refuse_run
from lepton_simulations.config import SimulationConfig


def refuse_scenario(config: SimulationConfig, devices: int) -> None:
    """Refuse a scenario whose guarantee would not be true.

    Args:
        config: the scenario, fitted to the fleet.
        devices: how many there are.

    Raises:
        ConfigError: names every conflict at once.
    """
    privacy = config.run.privacy
    if privacy is None:
        return
    also = []
    if privacy.unit == "example":
        if privacy.max_participations:
            also.append("privacy.max_participations is kept by real devices, each in its own budget")
        refuse_run(config.run, central_evaluation=config.data.evaluate == "central", also=also)
        return
    if privacy.population not in (0, devices):
        also.append(f"privacy.population={privacy.population}, and the fleet has {devices} devices")
    if devices * privacy.delta > 1:
        also.append(f"privacy.delta={privacy.delta:g} is above 1/{devices}, one over the devices")
    known = privacy.model_copy(update={"population": devices})
    run = config.run.model_copy(update={"privacy": known})
    refuse_run(run, central_evaluation=config.data.evaluate == "central", also=also)


class Guard:
    """Makes what keeps a run's guarantee whenever its coordinator starts; noise is searched for once."""

    def __init__(self, config: SimulationConfig, coordinates: int) -> None:
        """Prepare the mechanism, if the run asks for one.

        Args:
            config: the scenario.
            coordinates: P of the model.
        """
        self._run, self._run_id, self._seed = config.run, config.run_id, config.engine.seed
        self._ready = _ready(config.run, coordinates)

    def start(self, state: RunState) -> PrivateRounds | None:
        """For a coordinator that goes on from ``state``; None if the run is not private."""
        if self._ready is None:
            return None
        # What an attempt that a crash cut short had set aside is gone with it: nothing was released.
        charged = state.private.charged if state.private else {}
        seed = self._seed
        return PrivateRounds(
            self._run,
            self._run_id,
            self._ready,
            MemoryLedger(budget_of(self._run, self._ready, self._run_id), charged),
            sealing_key=simulation_key("sealed noise", seed),
            noise_key=lambda plan: simulation_key(seed, plan.round, plan.attempt),
        )


def _ready(run: RunSpec, coordinates: int) -> Prepared | None:
    if run.privacy is None or run.privacy.unit == "example":
        return None
    try:
        return prepared(run, coordinates)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"run.privacy needs {error.name}, which is not installed.",
            hint="pip install 'lepton-fl[privacy]'",
        ) from error
