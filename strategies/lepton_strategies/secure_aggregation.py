"""Secure aggregation for any strategy that needs only the mean, in any Flower app on the Message API.

    keys = load_list(Path("keys.txt"))
    strategy = SecureAggregation(FedAdam(min_train_nodes=20), keys=keys, clip_norm=10.0)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=10)

The nodes run ``secure_mod``. Their updates leave them masked; the server learns one sum a round, of at least
70 % of the nodes that began it, or nothing (``docs/secure_aggregation.md``). The wrapped strategy draws the
nodes and is given one reply: the mean model. It may be Flower's own or one of ours.
"""

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from lepton_fl.errors import ConfigError, QuorumError, Rejection, UpdateRejected
from lepton_fl.plan import LEAST_STEPS, QuantisationSpec, RunSpec, SecureSpec
from lepton_fl.rounds.quantised import next_expected, planned
from lepton_fl.rounds.secure import Party, Told, collect_secure, lead
from lepton_fl.rounds.secure_device import Offer
from lepton_fl.rounds.secure_sum import SumEncoding, context_of, groups_of, rules_of
from lepton_fl.rounds.spool import FolderSpool
from lepton_fl.secagg.cohorts import add_sums, split
from lepton_fl.secagg.context import MOST_COHORT, RoundContext
from lepton_fl.secagg.encoding import Exact, Rotated, Sum, fit
from lepton_fl.secagg.masks import Ring
from lepton_fl.secagg.messages import MAX_ADVERT, Advert
from lepton_fl.secagg.quantised import Quantised
from lepton_fl.secagg.server import ServerSession, Stage
from lepton_fl.secagg.uploads import Intake
from lepton_fl.wire.messages import Fields, Request
from lepton_fl.wire.records import Records
from lepton_strategies.base import LeptonStrategy, SecureReplies
from lepton_strategies.grid import UNAVAILABLE
from lepton_strategies.planned import PlannedMessages
from lepton_strategies.records import from_record_dict, to_record_dict
from lepton_strategies.secure_keys import load_list, pinned
from lepton_strategies.secure_wire import (
    MASKED,
    RECORD,
    Settings,
    arrays_digest,
    flatten,
    mean_metrics,
    request_digest,
    unflatten,
)

log = logging.getLogger(__name__)

# They look at single updates, or at something else than one mean of models.
UNFIT: Final = (
    flower.Bulyan,
    flower.FedMedian,
    flower.FedTrimmedAvg,
    flower.FedXgbBagging,
    flower.FedXgbCyclic,
    flower.Krum,
    flower.MultiKrum,
    flower.QFedAvg,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
)
_FINE: Final = 2.0**-24
_FRESH_S: Final = 1800.0  # for which an advert made ahead is used: half of what a node's keeper waits


@dataclass(frozen=True)
class _Ahead:
    """An advert that a node has made ahead."""

    advert: bytes
    at: float


@dataclass
class _Round:
    """What a round of Flower's own strategies has brought."""

    arrays: ArrayRecord | None
    metrics: dict[str, float]
    weight: int
    reports: int
    asked: Sequence[Message]
    blamed: int = 0


class SecureAggregation(Strategy):
    """Wraps a strategy; see the module."""

    def __init__(
        self,
        strategy: Strategy,
        *,
        keys: Collection[bytes | str] | Path | str,
        clip_norm: float = 0.0,
        max_weight: int = 1,
        metrics: Sequence[str] = (),
        bits: int = 32,
        quantise: Literal[0, 2, 4, 8] = 0,
        min_cohort: int = 16,
        max_dropout: float = 0.3,
        max_cohort: int = MOST_COHORT,
        mask_graph: Literal["complete", "hidden"] = "complete",
        deployment: str = "flower",
        deadline_s: float = 3600.0,
        stage_s: float = 120.0,
        poll_s: float = 0.25,
    ) -> None:
        """Wrap.

        Args:
            strategy: Flower's own or one of ours; one that only needs the mean of the nodes' models.
            keys: the public keys of all nodes, or the path of their list (``secure_keys.load_list``).
            clip_norm: L2 bound of a node's update, its model minus the one it got; needed, but for a
                strategy of ours that has one.
            max_weight: of a node, by the strategy's ``weighted_by_key``; 1 = all nodes count the same. More
                make the grid coarser: nodes * max_weight * clip_norm / step has to fit the bits.
            metrics: figures of the nodes to average; others are not told.
            bits: of a coordinate, 8 to 32; fewer than 32 round the sum.
            quantise: bits that every update is rounded to, in a ring that just holds the sum
                (``docs/wire.md``); 0 = off. A strategy of ours may say it in its own settings.
            min_cohort: the fewest nodes of a sum; a node may demand more.
            max_dropout: the share of the nodes asked that may fall silent.
            max_cohort: more nodes make several sums, which are added.
            mask_graph: "hidden" is EXPERIMENTAL and not reviewed: it leaves out most masks of a large cohort.
                Nodes refuse unless their configuration allows it (secagg-hidden-graph = true).
            deployment: the installation's name, as the nodes have it in their configuration.
            deadline_s: for training.
            stage_s: for every other stage.
            poll_s: between two looks for replies.

        Raises:
            ConfigError: the strategy cannot work with a mean alone, or a setting is wrong.
        """
        if isinstance(strategy, UNFIT):
            raise ConfigError(
                f"{type(strategy).__name__} needs more than one mean of the nodes' models, and secure "
                "aggregation tells nothing else.",
                hint="Wrap FedAvg, FedAvgM, FedProx, FedAdagrad, FedAdam or FedYogi.",
            )
        if quantise and bits < 32:
            raise ConfigError(
                f"bits={bits} and quantise={quantise} are two ways to few bits.", hint="Take one."
            )
        self._inner = strategy
        self._trust = pinned(load_list(Path(keys)) if isinstance(keys, str | Path) else keys)
        self._secure = SecureSpec(
            bits=bits,
            min_cohort=min_cohort,
            max_dropout=max_dropout,
            max_cohort=max_cohort,
            mask_graph=mask_graph,
        )
        self._clip_norm, self._max_weight = clip_norm, max_weight
        self._metrics, self._bits = tuple(metrics), bits
        self._quantise = QuantisationSpec(bits=quantise) if quantise else None
        self._expected = 0.0  # norm of the next sum, of quantised updates
        self._deployment, self._poll_s = deployment, poll_s
        self._deadline_s, self._stage_s = deadline_s, stage_s
        self._key = getattr(strategy, "weighted_by_key", "num-examples")
        self._rounds, self._tag = 0, secrets.token_hex(4)
        self._last: _Round | SecureReplies | None = None
        self._ahead: dict[int, _Ahead] = {}  # node -> its advert for a later round; each is used once
        if isinstance(strategy, LeptonStrategy):
            self._demand(strategy)
        elif clip_norm <= 0:
            raise ConfigError(
                f"clip_norm is {clip_norm:g}: without a bound on updates a sum could leave its {bits} bits.",
                hint="Give the L2 norm that no honest update exceeds; longer ones are scaled down to it.",
            )

    def _demand(self, strategy: LeptonStrategy) -> None:
        """Our own strategies have the setting; it implies their grid."""
        given = strategy.spec.model_dump(exclude_unset=True)
        clip = {"clip_norm": self._clip_norm} if self._clip_norm else {}
        weights = {"weighting": "equal"} if self._max_weight == 1 else {"max_weight": self._max_weight}
        secure = {"secure_aggregation": "required", "secure": self._secure}
        if self._quantise:
            secure["quantisation"] = self._quantise
        strategy.require(RunSpec.model_validate({**weights, **given, **clip, **secure}))

    @property
    def strategy(self) -> Strategy:
        """The wrapped one."""
        return self._inner

    def summary(self) -> None:
        """Log what is hidden, and the wrapped strategy's settings."""
        log.info(
            "SecureAggregation: the server learns one sum a round, of at least %d nodes, %d bits; it cannot "
            "see any node's update, if fewer than a third of the nodes side with it and it has not written "
            "the list of keys; evaluations are not hidden",
            self._secure.least_survivors(self._secure.min_cohort),
            self._bits,
        )
        if self._secure.mask_graph == "hidden":
            log.warning("SecureAggregation: the hidden mask graph is EXPERIMENTAL, nobody has reviewed it")
        self._inner.summary()

    # --- Flower's loop ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose the nodes, and take them through the protocol; nothing is left to send."""
        asked = self._inner.configure_train(server_round, arrays, config, grid)
        self._last, self._rounds = None, self._rounds + 1
        if isinstance(asked, PlannedMessages):
            self._last = self._planned(asked, grid)
            return []
        messages = list(asked)
        if messages:
            self._last = self._mean(messages, grid)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the strategy the mean as if one node had answered."""
        last, self._last = self._last, None
        if isinstance(last, SecureReplies):
            return self._inner.aggregate_train(server_round, last)
        if last is None:
            return None, None
        counts: dict[str, Any] = {"reports": last.reports, "asked": len(last.asked), "blamed": last.blamed}
        if last.arrays is None:
            log.warning("round %d does not count: too few nodes came through", server_round)
            return None, MetricRecord(counts)
        figures = MetricRecord({self._key: last.weight, **last.metrics})
        content = RecordDict({"arrays": last.arrays, "metrics": figures})
        made = Message(content=content, dst_node_id=last.asked[0].metadata.dst_node_id, message_type="train")
        new, found = self._inner.aggregate_train(server_round, [made])
        return new, MetricRecord({**(found or {}), **counts})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy does it: evaluations are not hidden."""
        return self._inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy does it."""
        return self._inner.aggregate_evaluate(server_round, replies)

    # --- a round ------------------------------------------------------------------------------------

    def _planned(self, asked: PlannedMessages, grid: Grid) -> SecureReplies:
        """A round of one of our own strategies."""
        messages = list(asked)
        plan = asked.plan.model_copy(update={"run_id": self._run(messages)})
        request = Request.of(plan, asked.request.model, asked.request.auxiliary)
        records = to_record_dict(request.to_records())
        offers = {
            device: Offer.of(context_of(plan, request, self._deployment, cohort))
            for cohort, devices in enumerate(groups_of(plan))
            for device in devices
        }
        nodes = _Nodes(grid, messages, records, offers, Settings(True), self._times(), self._ahead)
        with tempfile.TemporaryDirectory(prefix="lepton-secagg-") as folder:
            collected, mean = collect_secure(
                plan,
                request,
                nodes.ask,
                self._trust,
                self._deployment,
                spool=FolderSpool(Path(folder)),
                known_as=nodes.node_of,
            )
        return SecureReplies(collected, mean)

    def _mean(self, messages: list[Message], grid: Grid) -> _Round:
        """A round of any other strategy."""
        content = messages[0].content
        if any(message.content is not content and message.content != content for message in messages):
            raise ConfigError(
                f"{type(self._inner).__name__} sends different content to different nodes.",
                hint="Secure aggregation needs a strategy that asks all nodes the same.",
            )
        if len(messages) < self._secure.min_cohort:
            raise QuorumError(
                f"{len(messages)} nodes are asked, a sum needs {self._secure.min_cohort}.",
                hint="Set min_train_nodes of the strategy, or lower min_cohort here and on the nodes.",
            )
        if len(content.array_records) != 1:
            raise ConfigError(f"Expected one ArrayRecord in a message, got {len(content.array_records)}.")
        asked = next(iter(content.array_records.values()))
        model = flatten(asked)
        names = [str(message.metadata.dst_node_id) for message in messages]
        groups = split(names, secrets.token_bytes, self._secure.min_cohort, self._secure.max_cohort)
        contexts, settings = self._contexts(messages, content, model.size, groups)
        offers = {
            name: Offer.of(context) for group, context in zip(groups, contexts, strict=True) for name in group
        }
        nodes = _Nodes(grid, messages, content, offers, settings, self._times(), self._ahead)
        with tempfile.TemporaryDirectory(prefix="lepton-secagg-") as folder:
            spool = FolderSpool(Path(folder))
            parties = [
                Party(ServerSession(context, self._trust, Intake(context, spool)), group)
                for group, context in zip(groups, contexts, strict=True)
            ]
            lead(parties, nodes.ask, hear=_log_refusal, known_as=nodes.node_of)
        return self._decoded(parties, settings, model, asked, messages)

    def _contexts(
        self, messages: list[Message], content: RecordDict, size: int, groups: Sequence[Sequence[str]]
    ) -> tuple[list[RoundContext], Settings]:
        cohort, weight, clip = max(map(len, groups)), self._max_weight, self._clip_norm
        draft = Settings(False, _FINE, clip, weight, self._key, self._metrics)
        encoding: SumEncoding
        step, seed = _FINE, secrets.token_hex(32)
        if self._quantise:
            few = planned(
                self._quantise,
                self._expected,
                clip_norm=clip,
                max_weight=weight,
                devices=cohort,
                coordinates=size,
            )
            encoding = Quantised(
                size, cohort, weight, few.reach / step, seed, few.bits, few.risk, draft.counters
            )
        elif self._bits == 32:
            encoding, step = fit(size, cohort, weight, clip, draft.counters)
        else:
            encoding = Rotated(
                size, cohort, weight, clip / step, seed, counters=draft.counters, bits=self._bits
            )
        if clip / step < LEAST_STEPS:
            raise ConfigError(
                f"{cohort} nodes with weights of up to {weight} leave an update of {clip:g} only "
                f"{clip / step:g} steps.",
                hint=f"Lower max_weight to {2**31 // (cohort * LEAST_STEPS)}, or leave it at 1.",
            )
        settings = Settings(False, step, clip, weight, self._key, self._metrics)
        [arrays] = content.array_records.values()
        request, model = request_digest(content, settings), arrays_digest(arrays)
        about = self._deployment, self._run(messages), self._rounds, 1, request, model, encoding
        return [
            RoundContext(*about, rules_of(self._secure, len(group)), number)
            for number, group in enumerate(groups)
        ], settings

    def _decoded(
        self,
        parties: Sequence[Party],
        settings: Settings,
        model: np.ndarray[tuple[int], np.dtype[np.float64]],
        arrays: ArrayRecord,
        asked: Sequence[Message],
    ) -> _Round:
        outcomes = [party.result() for party in parties]
        blames = {blame for outcome in outcomes for blame in outcome.blames}
        for blame in blames:
            log.warning("secure aggregation: device %s is to blame: %s", blame.device, blame.fault.value)
        for party in parties:
            if party.error:
                log.warning("secure aggregation: %s", party.error)
        blamed = len({blame.device for blame in blames})
        encoding = parties[0].session.context.encoding
        assert isinstance(encoding, SumEncoding)  # made above
        totals = [outcome.total for outcome in outcomes if outcome.total is not None]
        sums = [encoding.decode(total) for total in totals]
        if not sums or not self._in_range(encoding, totals, sums, settings.step):
            return _Round(None, {}, 0, 0, asked, blamed)
        found = add_sums(sums)
        summed = found.update.astype(np.float64) if isinstance(encoding, Exact) else encoding.restore(found)
        mean = model + summed * (settings.step / found.weight)
        figures = mean_metrics(settings, found.counters)
        reports = sum(len(outcome.survivors) for outcome in outcomes if outcome.total is not None)
        return _Round(unflatten(mean, arrays), figures, found.weight, reports, asked, blamed)

    def _in_range(
        self, encoding: SumEncoding, totals: Sequence[Ring], sums: Sequence[Sum], step: float
    ) -> bool:
        """Whether no sum of quantised updates has left its ring; what to expect of the next follows."""
        if not isinstance(encoding, Quantised):
            return True
        if any(encoding.has_left_ring(total, found) for total, found in zip(totals, sums, strict=True)):
            log.warning("secure aggregation: a sum has left its ring of %d bits; not used", encoding.bits)
            self._expected = 0.0
            return False
        self._expected = next_expected(self._expected, step * max(map(encoding.norm, sums)))
        return True

    def _run(self, messages: Sequence[Message]) -> str:
        """The run's name in the protocol: two strategies in one run of Flower's are two."""
        return f"{messages[0].metadata.run_id}.{self._tag}"

    def _times(self) -> "_Times":
        return _Times(self._deadline_s, self._stage_s, self._poll_s)


def _log_refusal(stage: Stage, told: Told, refusal: UpdateRejected | None) -> None:
    if refusal is not None:
        log.warning("secure aggregation, %s: %s: %s", stage.name.lower(), told.device, refusal)


# --- nodes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times:
    deadline_s: float
    stage_s: float
    poll_s: float


class _Nodes:
    """The nodes of a round, asked over a grid; a device is named by its key, once it has shown it."""

    def __init__(
        self,
        grid: Grid,
        messages: Sequence[Message],
        content: RecordDict,
        offers: Mapping[str, Offer],
        settings: Settings,
        times: _Times,
        ahead: dict[int, _Ahead],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._content, self._offers, self._settings = grid, content, offers, settings
        self._ahead = ahead
        self._times, self._clock, self._sleep = times, clock, sleep
        self._group = messages[0].metadata.group_id
        self._node = {str(m.metadata.dst_node_id): m.metadata.dst_node_id for m in messages}
        self.names = tuple(self._node)
        self._known: set[str] = set()  # nodes whose advert was there already
        offer = next(iter(offers.values()))  # they differ in their cohort only
        self.name_of_round = f"{offer.run}/{offer.round}/{offer.attempt}"

    def node_of(self, device: str) -> str:
        """The node's id, in decimal digits, of a device."""
        return str(self._node[device])

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        """See ``rounds.secure.Ask``; replies are pulled as they come."""
        if stage is Stage.ADVERTS:
            yield from self._made_ahead(messages)
        devices = [d for d in messages if d not in self._known]
        if not devices:
            return
        # A list: Flower's own grid goes through it twice.
        sent = list(self._grid.push_messages([self._message(stage, d, messages[d]) for d in devices]))
        waiting = {i: d for i, d in zip(sent, devices, strict=False) if i}
        limit = self._times.deadline_s if stage is Stage.UPLOADS else self._times.stage_s
        end = self._clock() + limit
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                device = waiting.pop(reply.metadata.reply_to_message_id, None)
                if device is not None:
                    yield self._told(stage, device, reply)
            left = end - self._clock()
            if left <= 0:
                return
            if waiting:
                self._sleep(min(self._times.poll_s, left))

    def _made_ahead(self, nodes: Iterable[str]) -> Generator[Told, None, None]:
        """What nodes have sent with an earlier round: one exchange less to wait for."""
        for node in nodes:
            found = self._ahead.pop(self._node[node], None)
            if found is not None and self._clock() - found.at < _FRESH_S:
                self._known.add(node)
                yield Told(self._renamed(node, found.advert), found.advert)

    def _message(self, stage: Stage, device: str, frame: bytes) -> Message:
        fields: dict[str, Any] = {
            "stage": stage.name.lower(),
            "name": self.name_of_round,
            "frame": frame,
        }
        content = RecordDict()
        if stage is Stage.SHARES:
            fields["offer"] = self._offers[self.node_of(device)].to_json()
        elif stage is Stage.UPLOADS:
            content = RecordDict(dict(self._content.items()))
            fields["settings"] = self._settings.to_json()
        content[RECORD] = ConfigRecord(fields)
        return Message(
            content=content, dst_node_id=self._node[device], message_type="train", group_id=self._group
        )

    def _told(self, stage: Stage, device: str, reply: Message) -> Told:
        try:
            records = _records(reply)
        except UpdateRejected as refusal:
            return Told(device, refusal)
        frame = records.config["frame"]
        assert isinstance(frame, bytes)  # checked above
        if stage is Stage.ADVERTS:
            device = self._renamed(device, frame)
        prekey = records.config.get("prekey")
        if stage is Stage.CONSENTS and isinstance(prekey, bytes) and 0 < len(prekey) <= MAX_ADVERT:
            self._ahead[self._node[device]] = _Ahead(prekey, self._clock())
        masked = records.arrays.get(MASKED)
        vector = b"" if masked is None else masked.reshape(-1).view(np.uint8).data
        seconds = Fields(records.metrics).number("seconds")
        return Told(device, frame, vector, seconds, len(frame) + len(vector))

    def _renamed(self, node: str, advert: bytes) -> str:
        """A node is known by its key from here; a key that is not its own does it no good."""
        try:
            device = Advert.decode_unverified(advert).device
        except UpdateRejected:
            return node
        if device in self._node:
            return node
        self._node[device] = self._node[node]
        return device


def _records(reply: Message) -> Records:
    """A node's answer; what is wrong with it is raised as UpdateRejected."""
    if reply.has_error():
        kind = Rejection.OFFLINE if reply.error.code in UNAVAILABLE else Rejection.FAILED
        raise UpdateRejected(kind, f"Flower reports error {reply.error.code}: {reply.error.reason}")
    records = from_record_dict(reply.content)
    if "refused" in records.config:
        fields = Fields(records.config)
        try:
            raise UpdateRejected(Rejection(fields.text("refused")), fields.text("text"))
        except ValueError as error:
            raise UpdateRejected(Rejection.MALFORMED, "A node gave an unknown reason.") from error
    if not isinstance(records.config.get("frame"), bytes) or set(records.arrays) - {MASKED}:
        raise UpdateRejected(Rejection.MALFORMED, "A node's answer is not one of a secure aggregation.")
    Fields(records.metrics).number("seconds")  # raises where it is none
    return records
