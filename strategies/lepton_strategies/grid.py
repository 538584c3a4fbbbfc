"""Our rounds over any Flower ``Grid``, public API only.

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        outcome = run_campaign(grid, RunSpec(task="digits", rounds=10))

``Strategy.start`` waits for every node or its timeout; ``run_campaign`` adds each reply as it arrives, closes
a round once enough have come, and tries an abandoned round again.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Final

from lepton_fl.compression.source import start_of
from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.buffered import BufferedCampaign
from lepton_fl.rounds.campaign import Campaign, Committed, Evaluated, RunState, Verdict
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import Collected
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import Vector
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_strategies.model import trainer_of, work_of
from lepton_strategies.records import from_record_dict, to_array_record, to_record_dict

if TYPE_CHECKING:
    from flwr.app import Error, Message
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)

# Flower's error codes for a reply that will never come: message, reply or node unavailable.
UNAVAILABLE: Final = (3, 4, 5)
MAX_REASON: Final = 500  # characters of a node's own words that are kept


def to_messages(plan: RoundPlan, request: Request) -> "list[Message]":
    """One message per node of the cohort; they share one copy of the arrays."""
    from flwr.app import Message

    records = request.to_records()
    arrays = to_array_record(records.arrays)
    return [
        Message(
            content=to_record_dict(records, arrays=arrays),
            dst_node_id=int(device_id),
            message_type=plan.kind,
            group_id=str(plan.round),
        )
        for device_id in plan.cohort
    ]


def to_answer(device_id: str, reply: "Message") -> Answer:
    """What a node sent, or why it sent nothing that can be used."""
    if reply.has_error():
        return Answer(device_id, _refusal(reply.error))
    try:
        records = from_record_dict(reply.content)
    except UpdateRejected as refusal:
        return Answer(device_id, refusal)
    return Answer(device_id, records, _num_bytes(records))


def _refusal(error: "Error") -> UpdateRejected:
    reason = (error.reason or "no reason given").strip()[-MAX_REASON:]
    kind = Rejection.OFFLINE if error.code in UNAVAILABLE else Rejection.FAILED
    return UpdateRejected(kind, f"Flower reports error {error.code}: {reason}")


def _num_bytes(records: Records) -> int:
    """The payload; Flower's own framing is not counted."""
    arrays = sum(array.nbytes for array in records.arrays.values())
    return arrays + len(repr(records.config)) + len(repr(records.metrics))


class GridExchange:
    """Carries a round over a Grid; a device is a node, named by its id in decimal digits.

    Replies are pulled as they come. A node cannot be told that its round has closed, nor what became of its
    reply: Flower's public API has no message for that. A reply that comes later is never pulled.
    """

    def __init__(
        self,
        grid: "Grid",
        *,
        poll_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Use a grid.

        Args:
            grid: of a server app.
            poll_s: pause between two looks for replies, in seconds.
            clock: monotonic seconds.
            sleep: waits so many seconds.
        """
        self._grid = grid
        self._poll_s = poll_s
        self._clock = clock
        self._sleep = sleep

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        """Push to the cohort and yield replies as they arrive, until the deadline."""
        # An id is missing where the grid did not take the message.
        sent: Sequence[str | None] = list(self._grid.push_messages(to_messages(plan, request)))
        waiting: dict[str, str] = {}
        for place, device_id in enumerate(plan.cohort):
            if place < len(sent) and (message_id := sent[place]):
                waiting[message_id] = device_id
            else:
                yield Answer(
                    device_id, UpdateRejected(Rejection.OFFLINE, "The grid did not take the message.")
                )
        end = self._clock() + plan.deadline_s
        while waiting and self._clock() < end:
            yield from self._pull(waiting)
            if waiting:
                self._sleep(max(0.0, min(self._poll_s, end - self._clock())))

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Log a refusal; Flower cannot carry it to the node."""
        if refusal is not None:
            log.warning("round %d: reply of node %s refused: %s", plan.round, device_id, refusal)

    def _pull(self, waiting: dict[str, str]) -> Generator[Answer, None, None]:
        for reply in self._grid.pull_messages(list(waiting)):
            # The id of the answered message, not the sender's, also tells which node an error is about.
            device_id = waiting.pop(reply.metadata.reply_to_message_id, None)
            if device_id is not None:
                yield to_answer(device_id, reply)


class GridDispatcher:
    """Asks single nodes over a Grid and pulls replies as they come (``rounds.buffered.Dispatcher``)."""

    def __init__(
        self,
        grid: "Grid",
        *,
        poll_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """See ``GridExchange``."""
        self._grid = grid
        self._poll_s = poll_s
        self._clock = clock
        self._sleep = sleep
        self._waiting: dict[str, tuple[str, float]] = {}  # message id -> node, and when it is given up
        self._come: deque[Answer] = deque()

    def start(
        self, plan: RoundPlan, request: Request, device_id: str, started_s: float | None = None
    ) -> None:
        """Push one message; after a restart once more, and all of its time begins anew."""
        alone = plan.model_copy(update={"cohort": (device_id,)})
        sent: Sequence[str | None] = list(self._grid.push_messages(to_messages(alone, request)))
        if sent and (message_id := sent[0]):
            self._waiting[message_id] = (device_id, self._clock() + plan.deadline_s)
            return
        refusal = UpdateRejected(Rejection.OFFLINE, "The grid did not take the message.")
        self._come.append(Answer(device_id, refusal))

    def next(self, timeout_s: float) -> Answer | None:
        """The oldest reply, waiting for one if need be."""
        ends = self._clock() + timeout_s
        while not self._come:
            self._pull()
            self._give_up()
            left = ends - self._clock()
            if self._come or left <= 0:
                break
            self._sleep(min(self._poll_s, left))
        return self._come.popleft() if self._come else None

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Log a refusal; Flower cannot carry it to the node."""
        if refusal is not None:
            log.warning("step %d: reply of node %s refused: %s", plan.round, device_id, refusal)

    def withdraw(self) -> None:
        """Replies that come from now on are never pulled."""
        self._waiting.clear()
        self._come.clear()

    def _pull(self) -> None:
        for reply in self._grid.pull_messages(list(self._waiting)) if self._waiting else ():
            found = self._waiting.pop(reply.metadata.reply_to_message_id, None)
            if found is not None:
                self._come.append(to_answer(found[0], reply))

    def _give_up(self) -> None:
        now = self._clock()
        for message_id, (device_id, ends) in list(self._waiting.items()):
            if now >= ends:
                del self._waiting[message_id]
                silent = UpdateRejected(Rejection.OFFLINE, f"Node {device_id} did not answer in time.")
                self._come.append(Answer(device_id, silent))


class GridRoster:
    """Every connected node is eligible."""

    def __init__(self, grid: "Grid", sleep: Callable[[float], None] = time.sleep) -> None:
        self._grid = grid
        self._sleep = sleep

    def candidates(self) -> Sequence[Candidate]:
        """The connected nodes."""
        return [Candidate(str(node_id), "eligible") for node_id in self._grid.get_node_ids()]

    def wait(self, seconds: float) -> None:
        """Wait; a grid does not say when nodes come."""
        self._sleep(seconds)


class LogBook:
    """Writes what happens to the log and keeps the last state; a stock server app has no journal."""

    def __init__(self) -> None:
        self.state: RunState | None = None
        self.metrics: dict[int, dict[str, float]] = {}  # round -> figures of its evaluation
        self.train_metrics: dict[int, dict[str, float]] = {}  # round -> figures of its training

    def planned(self, plan: RoundPlan) -> None:
        """Log whom a round asks."""
        log.info("%s round %d, attempt %d: %d nodes", plan.kind, plan.round, plan.attempt, len(plan.cohort))

    def abandoned(self, collected: Collected, cause: str) -> None:
        """Log why an attempt does not count."""
        log.warning("round %d abandoned: %s", collected.plan.round, cause)

    def committed(self, round_: Committed) -> None:
        """Keep the state."""
        self.state = round_.state
        self.train_metrics[round_.state.round] = dict(round_.metrics)
        figures = _figures(round_.metrics)
        log.info("round %d: %s; %s", round_.state.round, round_.collected.summary(), figures)

    def evaluated(self, evaluation: Evaluated) -> None:
        """Keep the figures."""
        self.state = evaluation.state
        self.metrics[evaluation.state.round] = dict(evaluation.metrics)
        log.info("round %d evaluated: %s", evaluation.state.round, _figures(evaluation.metrics))

    def waiting(self, cause: str, seconds: float) -> None:
        """Log why the run does not move."""
        if cause:
            log.info("waiting up to %.0f s: %s", seconds, cause)


def _figures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a campaign over a grid ended."""

    verdict: Verdict
    state: RunState  # after the last committed round

    @property
    def model(self) -> Vector:
        """The final model, (P,) float32."""
        return self.state.model


def run_campaign(
    grid: "Grid",
    spec: RunSpec,
    *,
    run_id: str = "flower",
    state: RunState | None = None,
    book: LogBook | None = None,
    rng: Random | None = None,
    poll_s: float = 0.25,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train over a grid with our own round loop.

    Args:
        grid: of a stock server app.
        spec: the run.
        run_id: named in every message.
        state: where to continue; None = a fresh model of ``spec.seed``.
        book: a subclass may record more than the log.
        rng: draws cohorts; None = the operating system's generator.
        poll_s: pause between two looks for replies, in seconds.
        should_stop: asked between rounds.

    Raises:
        TaskError: the task is unknown or cannot be used.
    """
    work = work_of(spec.task)
    if state is None:
        trainer = trainer_of(work.task)
        model = start_of(trainer.task, spec.teacher, trainer.initial(spec.seed))
        state = RunState(model, ServerState.initial(spec.server, work.num_coordinates))
    book = book or LogBook()
    exchange, roster = GridExchange(grid, poll_s=poll_s), GridRoster(grid)
    seams = spec, run_id, work, exchange, roster, book, rng or SystemRandom()
    if spec.mode == "buffered":
        campaign: Campaign = BufferedCampaign(*seams, dispatcher=GridDispatcher(grid, poll_s=poll_s))
    else:
        campaign = Campaign(*seams)
    verdict = campaign.run(state, should_stop)
    return Outcome(verdict, book.state or state)
