"""What our strategies for any Flower ``ServerApp`` share: exact sums, named rejections.

    strategy = FedAdam("digits", learning_rate=0.01, cohort={"size": 10}, local={"epochs": 2})
    result = strategy.start(grid=grid, initial_arrays=initial_arrays("digits"), num_rounds=10)

They speak the messages of ``lepton_fl.wire`` with nodes that run ``lepton_strategies.client_app``. A bad
reply is refused by name and never ends a run; a round that brings too few reports leaves the model as it was.
"""

import logging
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, QuorumError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Kind, RunState, advance, after_attempt, learnt, plan_round
from lepton_fl.rounds.cohort import draw
from lepton_fl.rounds.collect import ACCEPTED, TRAINING, Collected, collect_evaluation, collect_training
from lepton_fl.rounds.exchange import Answer, Exchange
from lepton_fl.rounds.local import control_of, personal_of
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import Request
from lepton_strategies.grid import to_answer
from lepton_strategies.model import from_arrays, to_arrays, work_of
from lepton_strategies.planned import PlannedMessages, PlannedReplies

log = logging.getLogger(__name__)

POLL_S = 1.0  # between two looks for connected nodes

Settings = dict[str, Any]  # fields of RunSpec


@dataclass(frozen=True, eq=False)
class SecureReplies:
    """What a round with secure aggregation has brought, in the place of replies: a sum, and no messages."""

    collected: Collected
    mean: NDArray[np.float64] | None  # (P + A,)

    def __iter__(self) -> Iterator[Message]:
        """There are none."""
        return iter(())


class LeptonStrategy(Strategy):
    """What all of them share; they differ in ``settings`` only, what a ``RunSpec`` says."""

    def __init__(
        self,
        task: str,
        *,
        seed: int | None = None,
        **settings: Any,  # noqa: ANN401 - checked by ``settings`` and RunSpec
    ) -> None:
        """Prepare a strategy.

        Args:
            task: its name, short or full; it must be installed on both sides.
            seed: of the cohorts; None = the operating system's generator, which nobody can predict.
            **settings: see the strategy's ``settings``, and the fields of ``RunSpec``: cohort, local,
                schedule, weighting, max_weight, grid_step, clip_norm, evaluate_every, evaluate_cohort,
                rounds (used by the cosine schedule only).

        Raises:
            TaskError: the task is unknown or cannot be used.
            ConfigError: ``local.personal`` does not fit the task's model.
            ValidationError: a setting is wrong.
        """
        self._work = work_of(task)
        self._spec = RunSpec.model_validate({**self.settings(**settings), "task": self._work.task})
        personal_of(self._spec.local, self._work.layout)
        self._rng = SystemRandom() if seed is None else Random(seed)  # noqa: S311 - asked to be repeatable
        # Apart from the cohorts' generator, so that a seed draws those that it draws in a simulation.
        self._run_id = f"{SystemRandom().getrandbits(64):016x}" if seed is None else self._spec.digest()[:16]
        self._state: RunState | None = None
        self._asked: PlannedMessages | None = None
        self._wrapped = False

    @staticmethod
    @abstractmethod
    def settings(**run: Any) -> Settings:  # noqa: ANN401 - as given
        """The fields of ``RunSpec`` that make this strategy, from its own parameters and further fields."""

    @property
    def spec(self) -> RunSpec:
        """The settings of the run."""
        return self._spec

    def require(self, spec: RunSpec) -> None:
        """Take other settings, of a run with secure aggregation; only its wrapper calls it."""
        self._spec, self._wrapped = spec, True

    def summary(self) -> None:
        """Log the settings."""
        log.info("%s: %s", type(self).__name__, self._spec.to_json())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw a cohort and ask it to train."""
        _refuse_config(config, "train_config")
        if self._spec.mode == "buffered":
            raise ConfigError(
                "Flower's loop waits for all replies of a round; it cannot run mode = 'buffered'.",
                hint="Use lepton_strategies.run_campaign in the server app, or a simulation.",
            )
        if self._spec.privacy is not None:
            raise ConfigError(
                "Flower's loop charges no privacy and adds no noise; it cannot run a spec with privacy.",
                hint="Private runs work in `lepton simulate`.",
            )
        if self._spec.secure_aggregation == "required" and not self._wrapped:
            raise ConfigError(
                "This strategy alone would see every update; secure_aggregation is 'required'.",
                hint=f"Wrap it: SecureAggregation({type(self).__name__}(...), keys=...).",
            )
        self._state = self._next_state(server_round, arrays)
        return self._ask("train", server_round, self._spec.cohort.size, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the replies exactly and make one step of the server optimiser."""
        asked, state = self._take_asked(), self._known_state()
        control = self._control(asked.plan.kind)
        if isinstance(replies, SecureReplies):
            collected, mean = replies.collected, replies.mean
        else:
            collected, mean = collect_training(asked.plan, state.model, _exchange(asked, replies), control)
        if mean is None:
            log.warning("round %d does not count: %s", server_round, collected.summary())
            expected = 0.0 if collected.wrapped else state.expected
            retried = after_attempt(state.retried, server_round, 0)
            self._state = replace(state, retried=retried, expected=expected)
            return None, _metrics({}, collected)
        after = advance(self._spec, self._work, asked.plan, state, mean, collected.reports)
        self._state = learnt(after, collected)
        figures = TRAINING.summarise(collected.sums) | collected.figures()
        return to_arrays(self._state.model), _metrics(figures, collected)

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
            asked.plan, self._known_state().model, _exchange(asked, replies), metrics
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
        return replace(self._state, model=model, round=server_round - 1)

    def _known_state(self) -> RunState:
        if self._state is None:
            raise ConfigError("Nothing was configured before it was aggregated.", hint="Call start().")
        return self._state

    def _ask(self, kind: Kind, number: int, size: int, grid: Grid) -> Iterable[Message]:
        nodes = self._nodes(grid, size)
        cohort = draw(nodes, size, self._rng)
        state, nonce = self._known_state(), f"{self._rng.getrandbits(128):032x}"
        # All replies arrive together, so there is nothing to gain from closing a round early.
        plan = plan_round(
            self._spec, self._run_id, self._work, kind, number, state, cohort, len(cohort), nonce
        )
        plan = plan.model_copy(update={"population": len(nodes) if plan.auxiliary else 0})
        self._asked = PlannedMessages(plan, Request.of(plan, state.model, self._control(kind)))
        return self._asked

    def _control(self, kind: Kind) -> Vector | None:
        """The server's control, where the devices need one."""
        state = self._known_state()
        if kind == "evaluate":
            return None
        return control_of(self._spec.local, state.server, len(state.model))

    def _nodes(self, grid: Grid, size: int) -> list[str]:
        """Connected nodes, sorted: all wanted ones, or after a while as many as are needed."""
        spec, needed, began = self._spec.cohort, self._spec.min_reports, time.monotonic()
        while True:
            nodes, waited = sorted(map(str, grid.get_node_ids())), time.monotonic() - began
            if len(nodes) >= size or (len(nodes) >= needed and waited >= spec.fill_wait_s):
                return nodes
            if waited >= spec.quorum_wait_s:
                raise QuorumError(
                    f"{len(nodes)} nodes connected within {spec.quorum_wait_s:g} s, {needed} are needed.",
                    hint="Start more nodes, or lower cohort.min_reports.",
                )
            time.sleep(POLL_S)

    def _take_asked(self) -> PlannedMessages:
        if self._asked is None:
            raise ConfigError("Replies came to a question that was not asked.", hint="Call start().")
        asked, self._asked = self._asked, None
        return asked


def _exchange(asked: PlannedMessages, replies: Iterable[Message]) -> Exchange:
    """Where the answers come from: nodes in this process, or replies that Flower collected."""
    return replies.exchange if isinstance(replies, PlannedReplies) else _Replies(asked, replies)


class _Replies:
    """Replies that Flower collected, as an exchange."""

    def __init__(self, asked: PlannedMessages, replies: Iterable[Message]) -> None:
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
