"""Flower's own loop over nodes in this process.

    grid = LocalGrid(exchange, roster, EngineNodes(exchange, "digits", local={"learning_rate": 0.1}))
    lepton_strategies.FedAvg("digits").start(grid, arrays, num_rounds=10)          # one exact sum a round
    flwr.serverapp.strategy.FedAvg().start(grid, arrays, num_rounds=10)            # a message per node

Our strategies hand over a plan (see ``planned``), so they train through the exchange exactly as a campaign
does, chunks, virtual time and all. Any other strategy gets one reply per message: from the exchange, by
Flower's own conventions (``EngineNodes``), or from a client app of yours (``AppNodes``). A node's id is its
device's place in the roster. Time is the exchange's own: a simulation's is virtual, and ``timeout`` does not
apply to it.
"""

import itertools
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import AggregationSpec, LocalPlan, RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Kind, Roster, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.vector import Layout, Vector
from lepton_fl.wire.messages import MODEL, EvaluateReply, Request, TrainReply
from lepton_fl.wire.records import Records
from lepton_strategies.model import trainer_of, work_of
from lepton_strategies.planned import PlannedMessages, PlannedReplies
from lepton_strategies.records import to_array_record, to_record_dict

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

log = logging.getLogger(__name__)

FAILED = 2  # Flower's error code for a client app that raised an exception
UNAVAILABLE = 5  # and for a node that cannot be reached
# What Flower's own strategies and examples call the settings of a device.
SETTINGS = {"lr": "learning_rate", "local-epochs": "epochs", "proximal-mu": "proximal_mu"}
ROUND = "server-round"  # Flower's strategies put it into every message
# A rule that looks at each update: what makes an exchange hand them out one by one.
ONE_BY_ONE = {"aggregation": AggregationSpec(name="median"), "weighting": "equal"}


class Nodes(Protocol):
    """Answers ordinary messages."""

    def answer(self, messages: Sequence[Message], devices: Mapping[int, str]) -> Iterable[Message]:
        """Replies to messages, in any order; who stays silent has none.

        Args:
            messages: to nodes that exist.
            devices: the device behind each node id.
        """
        ...


class LocalGrid(Grid):
    """A grid whose nodes are the devices of an exchange."""

    def __init__(self, exchange: Exchange, roster: Roster, nodes: Nodes | None = None) -> None:
        """Make a grid.

        Args:
            exchange: carries the plans of our strategies.
            roster: who could take part; a node's id is its device's place there.
            nodes: answers the messages of other strategies; None = there are no others.
        """
        self._exchange = exchange
        self._roster = roster
        self._nodes = nodes
        self._devices = {place: c.device_id for place, c in enumerate(roster.candidates())}
        self._pushed: dict[str, Message] = {}
        self._ids = itertools.count(1)
        self._run: Any = None
        self._incomplete = False  # at the last look, some nodes were not there
        self._by_node = {str(node): device_id for node, device_id in self._devices.items()}
        self._by_device = {device_id: node for node, device_id in self._by_node.items()}
        self._known: tuple[Sequence[Candidate], list[int]] = ((), [])

    def set_run(self, run: Any) -> None:  # noqa: ANN401 - its class is not part of Flower's public API
        """Say which run the grid belongs to; it makes no difference here."""
        self._run = run

    @property
    def run(self) -> Any:  # noqa: ANN401 - see ``set_run``
        """The run that was set."""
        if self._run is None:
            raise ConfigError("No run was set.", hint="A grid in this process needs none.")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message; Flower recommends its constructor instead."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there.

        Who looks again because some were missing has slept a while on a real grid: so does the roster.
        """
        if self._incomplete:
            self._roster.wait(1.0)
        found, there = self._roster.candidates(), self._known[1]
        if found is not self._known[0] or not isinstance(found, tuple):  # else they are as they were
            there = [place for place, c in enumerate(found) if c.standing == "eligible"]
            self._known = found, there
        self._incomplete = len(there) < len(self._devices)
        return list(there)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they are answered when their replies are pulled."""
        sent = [_with_id(message, f"{next(self._ids)}") for message in messages]
        self._check(sent)
        self._pushed |= {message.metadata.message_id: message for message in sent}
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to pushed messages; each is answered once."""
        messages = [self._pushed.pop(i) for i in list(message_ids) if i in self._pushed]
        return self._answer(messages)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Ask the nodes.

        Returns:
            For our own strategies, who take an exchange out of them, replies that have not been made yet; for
            others, messages.
        """
        self._incomplete = False
        if isinstance(messages, PlannedMessages):
            named = _Named(self._exchange, self._by_node, self._by_device)
            return PlannedReplies(named, lambda: _singly(named, messages))
        sent = [_with_id(message, f"{next(self._ids)}") for message in messages]
        self._check(sent)
        return self._answer(sent)

    def _answer(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            return []
        if self._nodes is None:
            raise ConfigError(
                "These messages are of another strategy than ours, and nobody here answers them.",
                hint="Give LocalGrid its nodes: EngineNodes(...) or AppNodes(client_app).",
            )
        return list(self._nodes.answer(messages, self._devices))

    def _check(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if (node := message.metadata.dst_node_id) not in self._devices:
                raise ConfigError(f"There is no node {node}; there are {len(self._devices)}, from 0.")


class AppNodes:
    """Nodes that run a client app, one after the other, each with a context of its own that it keeps."""

    def __init__(
        self,
        app: "ClientApp",
        num_partitions: int,
        *,
        node_config: Mapping[str, str | float] | None = None,
        run_config: Mapping[str, str | float] | None = None,
    ) -> None:
        """Prepare the nodes.

        Args:
            app: of whatever origin.
            num_partitions: told to the app, beside ``partition-id``, in its node's configuration.
            node_config: further node configuration, the same for all.
            run_config: the run's.
        """
        self._app = app
        self._node_config = {**(node_config or {}), "num-partitions": num_partitions}
        self._run_config = dict(run_config or {})
        self._contexts: dict[int, Context] = {}

    def answer(self, messages: Sequence[Message], devices: Mapping[int, str]) -> Iterable[Message]:
        """See ``Nodes``; an app that raises counts as a failed node."""
        for message in messages:
            node = message.metadata.dst_node_id
            try:
                yield self._app(message, self._context(node, message.metadata.run_id))
            except Exception as error:  # a user's app may raise anything; Flower reports it to the strategy
                log.exception("the client app of node %d failed", node)
                yield Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)

    def _context(self, node: int, run_id: int) -> Context:
        if node not in self._contexts:
            config = {**self._node_config, "partition-id": node}
            self._contexts[node] = Context(run_id, node, config, RecordDict(), self._run_config)
        return self._contexts[node]


class EngineNodes:
    """Nodes that follow Flower's conventions and train through an exchange.

    A request holds one ArrayRecord, of named tensors as ``state_dict`` gives them or flat as
    ``initial_arrays`` does, and at most one ConfigRecord, whose settings go before those given here: ``lr``,
    ``local-epochs``, ``proximal-mu``, or any field of ``LocalPlan``. A reply to "train" holds the trained
    arrays, ``num-examples`` and ``train_loss``; a reply to "evaluate" holds ``num-examples`` and the task's
    figures on the node's own test rows.
    """

    def __init__(
        self,
        exchange: Exchange,
        task: str,
        *,
        local: LocalPlan | Mapping[str, Any] | None = None,
        work: Work | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Prepare the nodes.

        Args:
            exchange: trains.
            task: its name, short or full.
            local: how a node trains; None = the defaults of ``LocalPlan``.
            work: of the task; None = as the installed task says.
            layout: of its model; None = as the installed task says.
        """
        self._exchange = exchange
        self._work = work or work_of(task)
        self._layout = layout or trainer_of(self._work.task).layout
        self._local = local if isinstance(local, LocalPlan) else LocalPlan.model_validate(dict(local or {}))
        self._calls = itertools.count(1)

    def answer(self, messages: Sequence[Message], devices: Mapping[int, str]) -> Iterable[Message]:
        """See ``Nodes``; messages with the same content are asked together."""
        asked: dict[tuple[int, str], list[Message]] = {}
        for message in messages:
            asked.setdefault((id(message.content), message.metadata.message_type), []).append(message)
        for (_, kind), alike in asked.items():
            if kind not in ("train", "evaluate"):
                reason = f"This node answers 'train' and 'evaluate', not {kind!r}."
                yield from (Message(Error(FAILED, reason), reply_to=message) for message in alike)
                continue
            yield from self._answer(cast(Kind, kind), alike, devices)

    def _answer(
        self, kind: Kind, messages: Sequence[Message], devices: Mapping[int, str]
    ) -> Iterable[Message]:
        content, by_device = messages[0].content, {devices[m.metadata.dst_node_id]: m for m in messages}
        name, arrays = _only(content.array_records, "ArrayRecord")
        model = self._vector(arrays)
        plan = self._plan(kind, content, model, list(by_device))
        make = self._trained if kind == "train" else self._evaluated
        replies = []
        for answer in self._exchange.ask(plan, Request.of(plan, model)):
            device_id, records = _single(answer)
            message = by_device[device_id]
            try:
                if isinstance(records, UpdateRejected):
                    raise records
                reply = make(name, arrays, model, plan, records)
            except UpdateRejected as refusal:
                self._exchange.tell(plan, device_id, refusal)
                replies.append(_refused(message, refusal))
            else:
                self._exchange.tell(plan, device_id, None)
                replies.append(Message(reply, reply_to=message))
        return _consistent(replies)

    def _plan(self, kind: Kind, content: RecordDict, model: Vector, cohort: Sequence[str]) -> RoundPlan:
        given = dict(_only(content.config_records, "ConfigRecord")[1]) if content.config_records else {}
        number = given.pop(ROUND, None)
        local = LocalPlan.model_validate({**self._local.to_json(), **_settings(given)})
        spec = RunSpec(task=self._work.task, local=local, **ONE_BY_ONE)  # type: ignore[arg-type]  # pydantic
        number = number if isinstance(number, int) and number > 0 else next(self._calls)
        plan = plan_round(
            spec, "flower", self._work, kind, number, RunState(model), cohort, len(cohort), "flower"
        )
        return plan.model_copy(update={"min_reports": 1})

    def _trained(
        self,
        name: str,
        arrays: ArrayRecord,
        model: Vector,
        plan: RoundPlan,
        records: Records,
    ) -> RecordDict:
        reply = TrainReply.read(records, plan)
        trained = np.multiply(reply.update, plan.grid_step, dtype=np.float32, casting="unsafe")
        trained += model
        seen = max(1, int(reply.sums["examples"][0]))
        figures = {"train_loss": float(reply.sums["loss_sum"][0]) / seen}
        return _content(name, self._arrays(trained, arrays), reply.num_examples, figures)

    def _evaluated(
        self,
        name: str,
        arrays: ArrayRecord,
        model: Vector,
        plan: RoundPlan,
        records: Records,
    ) -> RecordDict:
        reply = EvaluateReply.read(records, plan)
        return _content("", None, reply.num_examples, self._work.metrics.summarise(reply.sums))

    def _vector(self, arrays: ArrayRecord) -> Vector:
        """The model, as float32 whatever the strategy computes in."""
        try:
            if set(arrays) == {MODEL}:
                return self._layout.flatten(self._layout.unflatten(arrays[MODEL].numpy()))
            return self._layout.flatten({slot.name: arrays[slot.name].numpy() for slot in self._layout.slots})
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"The arrays are not the model of {self._work.task}: {error}.",
                hint="Send lepton_strategies.initial_arrays(task), or ArrayRecord(model.state_dict()).",
            ) from error

    def _arrays(self, trained: Vector, like: ArrayRecord) -> ArrayRecord:
        """In the form of the request; what is no coordinate (integer buffers) goes back as it came."""
        if set(like) == {MODEL}:
            return to_array_record({MODEL: trained})
        own = to_array_record(self._layout.unflatten(trained))
        return ArrayRecord({name: own.get(name, array) for name, array in like.items()})


# --- plans over a grid ------------------------------------------------------------------------------


class _Named:
    """An exchange whose devices are named by their node ids, as a strategy over a grid knows them."""

    def __init__(self, exchange: Exchange, devices: Mapping[str, str], nodes: Mapping[str, str]) -> None:
        self._exchange = exchange
        self._devices, self._nodes = devices, nodes  # by node id, and the other way round

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer | AddedUp, None, None]:
        """Let the devices answer."""
        answers = self._exchange.ask(self._translated(plan), request)
        try:
            for answer in answers:
                yield self._back(answer)
        finally:
            answers.close()

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Pass on what became of an answer."""
        self._exchange.tell(plan, self._devices.get(device_id, device_id), refusal)

    def _translated(self, plan: RoundPlan) -> RoundPlan:
        return plan.model_copy(update={"cohort": tuple(self._devices[node] for node in plan.cohort)})

    def _back(self, answer: Answer | AddedUp) -> Answer | AddedUp:
        if isinstance(answer, Answer):
            return replace(answer, device_id=self._nodes.get(answer.device_id, answer.device_id))
        reports = tuple(r._replace(device_id=self._nodes[r.device_id]) for r in answer.reports)
        return replace(answer, reports=reports)


def _singly(exchange: Exchange, planned: PlannedMessages) -> Iterable[Message]:
    """The replies to a plan as messages, for a wrapper that wants to see each."""
    messages = {str(m.metadata.dst_node_id): m for m in planned}
    plan = planned.plan.model_copy(update={"aggregation": ONE_BY_ONE["aggregation"]})
    for answer in exchange.ask(plan, planned.request):
        device_id, records = _single(answer)
        if isinstance(records, UpdateRejected):
            yield _refused(messages[device_id], records)
        else:
            yield Message(to_record_dict(records), reply_to=messages[device_id])


# --- messages ---------------------------------------------------------------------------------------


def _single(answer: Answer | AddedUp) -> tuple[str, Records | UpdateRejected]:
    if isinstance(answer, AddedUp):
        raise ConfigError("The exchange added up updates that were asked for one by one.")
    return answer.device_id, answer.records


def _with_id(message: Message, message_id: str) -> Message:
    """The same message, with the id that a grid gives it."""
    old = message.metadata
    metadata = Metadata(
        run_id=old.run_id,
        message_id=message_id,
        src_node_id=old.src_node_id,
        dst_node_id=old.dst_node_id,
        reply_to_message_id=old.reply_to_message_id,
        group_id=old.group_id,
        created_at=old.created_at,
        ttl=old.ttl,
        message_type=old.message_type,
        src_task_id=old.src_task_id,
        dst_task_id=old.dst_task_id,
    )
    # What Flower's transports do, too; its published signatures leave it out.
    numbered: Message = Message(content=message.content, metadata=metadata)  # type: ignore[call-overload]  # see above
    return numbered


def _refused(message: Message, refusal: UpdateRejected) -> Message:
    code = UNAVAILABLE if refusal.reason == Rejection.OFFLINE else FAILED
    return Message(Error(code, f"{refusal.reason.value}: {refusal}"), reply_to=message)


def _only(records: Mapping[str, Any], kind: str) -> tuple[str, Any]:
    if len(records) != 1:
        raise ConfigError(f"The message holds {len(records)} records of type {kind}, expected one.")
    return next(iter(records.items()))


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {SETTINGS.get(name, name.replace("-", "_")): value for name, value in given.items()}
    unknown = [name for name in found if name not in LocalPlan.model_fields]
    if unknown:
        raise ConfigError(
            f"The message sets {', '.join(sorted(unknown))}, which no node here reads.",
            hint=f"Settings are {', '.join(sorted((*SETTINGS, *LocalPlan.model_fields)))}; or use AppNodes.",
        )
    return found


def _content(
    name: str, arrays: ArrayRecord | None, num_examples: int, figures: Mapping[str, float]
) -> RecordDict:
    content = RecordDict({name: arrays} if arrays is not None else {})
    content["metrics"] = MetricRecord({"num-examples": num_examples, **figures})
    return content


def _consistent(replies: list[Message]) -> list[Message]:
    """Figures that all nodes have: Flower's strategies refuse replies whose figures differ in name."""
    records = [cast(MetricRecord, m.content["metrics"]) for m in replies if not m.has_error()]
    common = set.intersection(*(set(r) for r in records)) if records else set()
    for record in records:
        for name in set(record) - common:
            del record[name]
    return replies
