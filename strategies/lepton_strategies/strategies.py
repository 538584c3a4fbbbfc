"""Strategies for any Flower ``ServerApp``: exact sums, named rejections, five server optimisers.

    strategy = FedAdam("digits", learning_rate=0.01, cohort={"size": 10}, local={"epochs": 2})
    result = strategy.start(grid=grid, initial_arrays=initial_arrays("digits"), num_rounds=10)

They speak the messages of ``lepton_fl.wire`` with nodes that run ``lepton_strategies.client_app``. A bad
reply is refused by name and never ends a run; a round that brings too few reports leaves the model as it was.
"""

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from random import Random, SystemRandom
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from lepton_fl.errors import ConfigError, QuorumError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec, ServerOptimizerSpec
from lepton_fl.rounds.campaign import Kind, RunState, plan_round
from lepton_fl.rounds.cohort import draw
from lepton_fl.rounds.collect import ACCEPTED, TRAINING, Collected, collect_evaluation, collect_training
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.optimizers import ServerState, step
from lepton_fl.wire.messages import Request
from lepton_strategies.grid import to_answer, to_messages
from lepton_strategies.model import from_arrays, to_arrays, work_of

log = logging.getLogger(__name__)

POLL_S = 1.0  # between two looks for connected nodes


class LeptonStrategy(Strategy):
    """What all of them share; the server optimiser is the only difference."""

    def __init__(
        self, task: str, server: ServerOptimizerSpec, seed: int | None, run: Mapping[str, Any]
    ) -> None:
        """Prepare a strategy.

        Args:
            task: its name, short or full; it must be installed on both sides.
            server: the server optimiser.
            seed: of the cohorts; None = the operating system's generator, which nobody can predict.
            run: further fields of ``RunSpec``: cohort, local, schedule, weighting, max_weight, grid_step,
                evaluate_every, evaluate_cohort, rounds (used by the cosine schedule only).

        Raises:
            TaskError: the task is unknown or cannot be used.
            ValidationError: a setting is wrong.
        """
        self._work = work_of(task)
        self._spec = RunSpec.model_validate({**run, "task": self._work.task, "server": server})
        self._rng = SystemRandom() if seed is None else Random(seed)  # noqa: S311 - asked to be repeatable
        self._run_id = f"{self._rng.getrandbits(64):016x}"
        self._state: RunState | None = None
        self._asked: _Asked | None = None

    @property
    def spec(self) -> RunSpec:
        """The settings of the run."""
        return self._spec

    def summary(self) -> None:
        """Log the settings."""
        log.info("%s: %s", type(self).__name__, self._spec.to_json())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw a cohort and ask it to train."""
        _refuse_config(config, "train_config")
        self._state = self._next_state(server_round, arrays)
        return self._ask("train", server_round, self._spec.cohort.size, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the replies exactly and make one step of the server optimiser."""
        asked, state = self._take_asked(), self._known_state()
        collected, mean = collect_training(asked.plan, state.model, _Replies(asked, replies))
        if mean is None:
            log.warning("round %d does not count: %s", server_round, collected.summary())
            return None, _metrics({}, collected)
        model, server = step(self._spec.server, state.model, mean, state.server)
        self._state = RunState(model, server, round=server_round)
        figures = TRAINING.summarise(collected.sums)
        return to_arrays(model), _metrics(figures, collected)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw a cohort and ask it to evaluate; nobody, in rounds without evaluation."""
        _refuse_config(config, "evaluate_config")
        every = self._spec.evaluate_every
        self._asked = None
        if not every or server_round % every:
            return []
        return self._ask("evaluate", server_round, self._spec.evaluate_cohort or self._spec.cohort.size, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add the nodes' counts and compute the figures from the sums."""
        if self._asked is None:
            return None
        asked, metrics = self._take_asked(), self._work.metrics
        collected = collect_evaluation(
            asked.plan, self._known_state().model, _Replies(asked, replies), metrics
        )
        figures = metrics.summarise(collected.sums) if collected.reports else {}
        return _metrics(figures, collected)

    def _next_state(self, server_round: int, arrays: ArrayRecord) -> RunState:
        """The optimiser's memory goes on as long as the rounds do; the model is the one that was given."""
        model = from_arrays(arrays)
        if model.size != self._work.num_coordinates:
            raise ConfigError(
                f"The initial arrays have {model.size} coordinates, {self._work.task} has "
                f"{self._work.num_coordinates}.",
                hint="Make them with lepton_strategies.initial_arrays for the same task.",
            )
        if self._state is None or server_round == 1:
            return RunState(model, ServerState.initial(self._spec.server, model.size))
        return RunState(model, self._state.server, round=server_round - 1)

    def _known_state(self) -> RunState:
        if self._state is None:
            raise ConfigError("Nothing was configured before it was aggregated.", hint="Call start().")
        return self._state

    def _ask(self, kind: Kind, number: int, size: int, grid: Grid) -> list[Message]:
        cohort = draw(self._nodes(grid, size), size, self._rng)
        state, nonce = self._known_state(), f"{self._rng.getrandbits(128):032x}"
        # All replies arrive together, so there is nothing to gain from closing a round early.
        plan = plan_round(
            self._spec, self._run_id, self._work, kind, number, state, cohort, len(cohort), nonce
        )
        messages = to_messages(plan, Request.of(plan, state.model))
        self._asked = _Asked(plan, messages)
        return messages

    def _nodes(self, grid: Grid, size: int) -> list[str]:
        """Connected nodes, sorted: all wanted ones, or after a while as many as are needed."""
        spec, began = self._spec.cohort, time.monotonic()
        while True:
            nodes, waited = sorted(map(str, grid.get_node_ids())), time.monotonic() - began
            if len(nodes) >= size or (len(nodes) >= spec.min_reports and waited >= spec.fill_wait_s):
                return nodes
            if waited >= spec.quorum_wait_s:
                raise QuorumError(
                    f"{len(nodes)} nodes connected within {spec.quorum_wait_s:g} s, "
                    f"{spec.min_reports} are needed.",
                    hint="Start more nodes, or lower cohort.min_reports.",
                )
            time.sleep(POLL_S)

    def _take_asked(self) -> "_Asked":
        if self._asked is None:
            raise ConfigError("Replies came to a question that was not asked.", hint="Call start().")
        asked, self._asked = self._asked, None
        return asked


class _Asked:
    """What was asked of whom; kept until the replies are in."""

    def __init__(self, plan: RoundPlan, messages: Iterable[Message]) -> None:
        self.plan = plan
        # A message gets its id when the grid sends it; its content need not be kept for that.
        self._sent = [message.metadata for message in messages]

    def devices(self) -> dict[str, str]:
        """The node that was asked, by the id of the message: an error's sender may be the server itself."""
        ids = [sent.message_id for sent in self._sent]
        return {i: device_id for i, device_id in zip(ids, self.plan.cohort, strict=True) if i}


class _Replies:
    """Replies that Flower collected, as an exchange."""

    def __init__(self, asked: _Asked, replies: Iterable[Message]) -> None:
        self._asked = asked
        self._replies = replies

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        """The messages have been sent already."""
        devices = self._asked.devices()
        for reply in self._replies:
            sender = str(reply.metadata.src_node_id)
            yield to_answer(devices.get(reply.metadata.reply_to_message_id, sender), reply)

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Log a refusal; Flower cannot carry it to the node."""
        if refusal is not None:
            log.warning("round %d: reply of node %s refused: %s", plan.round, device_id, refusal)


def _metrics(figures: Mapping[str, float], collected: Collected) -> MetricRecord:
    """The figures, how many replies counted, and why the others did not."""
    outcomes = Counter(entry.outcome for entry in collected.participation.values())
    refused = {f"rejected.{name}": count for name, count in outcomes.items() if name != ACCEPTED}
    return MetricRecord(
        {**figures, "reports": collected.reports, "asked": len(collected.plan.cohort), **refused}
    )


def _refuse_config(config: ConfigRecord, name: str) -> None:
    if config:
        raise ConfigError(
            f"{name} sets {', '.join(sorted(config))}, which no node would read.",
            hint="Give such settings to the strategy: FedAvg(task, local={...}, cohort={...}).",
        )


class FedAvg(LeptonStrategy):
    """Federated averaging (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks")."""

    def __init__(
        self,
        task: str,
        *,
        learning_rate: float = 1.0,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - RunSpec checks it
    ) -> None:
        """See ``LeptonStrategy``; ``learning_rate`` is the server's."""
        super().__init__(task, ServerOptimizerSpec(name="fedavg", learning_rate=learning_rate), seed, run)


class FedProx(FedAvg):
    """Federated averaging with a proximal term on the device.

    Li et al. 2020, "Federated Optimization in Heterogeneous Networks".
    """

    def __init__(
        self,
        task: str,
        *,
        proximal_mu: float,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - RunSpec checks it
    ) -> None:
        """See ``LeptonStrategy``; ``proximal_mu`` pulls local models towards the global one."""
        local = run.pop("local", {})
        fields = local if isinstance(local, Mapping) else local.model_dump()
        super().__init__(task, seed=seed, local={**fields, "proximal_mu": proximal_mu}, **run)


class FedAvgM(LeptonStrategy):
    """Federated averaging with server momentum.

    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification".
    """

    def __init__(
        self,
        task: str,
        *,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> None:
        """See ``LeptonStrategy``; ``learning_rate`` is the server's, ``momentum`` is beta of the paper."""
        server = ServerOptimizerSpec(name="fedavgm", learning_rate=learning_rate, momentum=momentum)
        super().__init__(task, server, seed, run)


class FedAdagrad(LeptonStrategy):
    """Adagrad on the server (Reddi et al. 2021, "Adaptive Federated Optimization")."""

    def __init__(
        self,
        task: str,
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        tau: float = 1e-3,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> None:
        """See ``LeptonStrategy``; ``learning_rate`` is the server's, ``momentum`` is beta_1 of the paper."""
        server = ServerOptimizerSpec(
            name="fedadagrad", learning_rate=learning_rate, momentum=momentum, tau=tau
        )
        super().__init__(task, server, seed, run)


class FedAdam(LeptonStrategy):
    """Adam on the server, without bias correction (Reddi et al. 2021, "Adaptive Federated Optimization")."""

    def __init__(
        self,
        task: str,
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> None:
        """See ``LeptonStrategy``; ``learning_rate`` is the server's, ``momentum`` is beta_1 of the paper."""
        server = ServerOptimizerSpec(
            name="fedadam", learning_rate=learning_rate, momentum=momentum, beta_2=beta_2, tau=tau
        )
        super().__init__(task, server, seed, run)


class FedYogi(LeptonStrategy):
    """Yogi on the server (Reddi et al. 2021, "Adaptive Federated Optimization")."""

    def __init__(
        self,
        task: str,
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        seed: int | None = None,
        **run: Any,  # noqa: ANN401 - the fields of RunSpec, which checks them
    ) -> None:
        """See ``LeptonStrategy``; ``learning_rate`` is the server's, ``momentum`` is beta_1 of the paper."""
        server = ServerOptimizerSpec(
            name="fedyogi", learning_rate=learning_rate, momentum=momentum, beta_2=beta_2, tau=tau
        )
        super().__init__(task, server, seed, run)
