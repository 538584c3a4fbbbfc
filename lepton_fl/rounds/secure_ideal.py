"""The ideal functionality of secure aggregation, for simulations: the same sum without the protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from lepton_fl.errors import LeptonError
from lepton_fl.plan import RoundPlan
from lepton_fl.privacy.noise import Keystream
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, TRAINING, Brought, Clock, Collected, Finish
from lepton_fl.rounds.collect import collect as collect_answers
from lepton_fl.rounds.exchange import AddedUp, Answer, Exchange
from lepton_fl.rounds.secure_sum import (
    SumEncoding,
    Uploads,
    are_in,
    decode_total,
    encode_reply,
    encoding_of,
    groups_of,
    rounded_loss,
    rules_of,
    secure_part,
    share_law,
)
from lepton_fl.secagg.encoding import Exact, wire_bytes
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.server import Stage
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import Request, TrainReply
from lepton_fl.wire.records import Records


class IdealRounds:
    """The sum that the protocol would bring, without the protocol; for simulations, which see all anyway."""

    def __init__(
        self,
        random_of: Callable[[RoundPlan, str], Random],
        stream_of: Callable[[RoundPlan, str], Keystream | None] = lambda plan, device: None,
        leaves: Callable[[RoundPlan], Mapping[str, Stage]] = lambda plan: {},
    ) -> None:
        """Prepare.

        Args:
            random_of: the randomness that a device rounds with, for fewer than 32 bits.
            stream_of: of the noise that a device adds; None = fresh.
            leaves: who falls silent at which stage of the protocol.
        """
        self._random_of, self._stream_of, self._leaves = random_of, stream_of, leaves

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
    ) -> Brought:
        """See ``SecureRounds``."""
        encoding, groups, left = encoding_of(plan), groups_of(plan), self._leaves(plan)
        if isinstance(encoding, Exact) and len(groups) == 1:
            return self._exact(plan, request, exchange, clock, finish)
        totals: list[Ring] = [np.zeros(encoding.length, ring_type(encoding.bits)) for _ in groups]
        place = {device: i for i, group in enumerate(groups) for device in group}

        def take(answer: Answer) -> TrainReply:
            device = answer.device_id
            reply, total = read_reply(answer, plan), totals[place[device]]
            random, stream = self._random_of(plan, device), self._stream_of(plan, device)
            vector = encode_reply(plan, encoding, reply, random, stream)
            np.add(total, vector, out=total)
            return without_counts(reply)

        full = _Sums(plan, groups, left).are_in
        collected = collect_answers(plan, request, exchange, TRAINING, take, _refuse_sum, clock, full)
        _forget_counts(collected)
        _count_bytes(collected, encoding, groups)
        good = _settle(plan, groups, collected, left)
        if not collected.enough:
            return collected, None
        chosen = [totals[i] for i in good]
        mean = decode_total(plan, encoding, chosen, collected, finish)
        collected.burnt = mean is None
        return collected, mean

    def _exact(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
    ) -> Brought:
        """The integers of a plain round, added in 64 bits: the plan proves that 32 would do."""
        accumulator = Accumulator(plan)

        def take(answer: Answer) -> TrainReply:
            reply = read_reply(answer, plan)
            accumulator.add(UpdateBatch(reply.update[None, :], np.array([reply.num_examples], np.int64)))
            return replace(reply, sums=_rounded(reply.sums))

        def take_many(part: AddedUp) -> None:
            TRAINING.validate(part.sums)
            accumulator.merge(part.subtotal)

        collected = collect_answers(plan, request, exchange, TRAINING, take, take_many, clock)
        _count_bytes(collected, encoding_of(plan), [plan.cohort])
        _settle(plan, [plan.cohort], collected, self._leaves(plan))
        _forget_counts(collected)
        if not collected.enough:
            return collected, None
        if finish is None:
            return collected, accumulator.finalize()
        self._add_shares(plan, collected, accumulator)
        return collected, finish(accumulator)

    def _add_shares(self, plan: RoundPlan, collected: Collected, accumulator: Accumulator) -> None:
        """The noise that the devices of the sum have added, if they do."""
        law = share_law(plan.private) if plan.private else None
        if law is None:
            return
        for device, entry in collected.participation.items():
            if entry.outcome == ACCEPTED:
                law.add_to(accumulator.subtotal().total, self._stream_of(plan, device) or Keystream())


def _settle(
    plan: RoundPlan, groups: Sequence[Sequence[str]], collected: Collected, left: Mapping[str, Stage]
) -> list[int]:
    """Which groups the protocol would bring the sums of; the devices of the others are not counted."""
    ends = [_end_of(plan, group, collected, left) for group in groups]
    devices = [d for group, end in zip(groups, ends, strict=True) if end is not Stage.DONE for d in group]
    lost = [e for e in map(collected.participation.__getitem__, devices) if e.outcome == ACCEPTED]
    collected.reports -= len(lost)
    if collected.reports:  # else the attempt is given up as a whole, and what each device did stays
        word = "The sum of its devices failed."
        collected.participation |= {e.device_id: e._replace(outcome=SURPLUS, detail=word) for e in lost}
    collected.burnt = not collected.enough and any(end > Stage.UPLOADS for end in ends)
    return [i for i, end in enumerate(ends) if end is Stage.DONE]


def _end_of(plan: RoundPlan, group: Sequence[str], collected: Collected, left: Mapping[str, Stage]) -> Stage:
    """The stage that too few of these devices would get through, as ``ServerSession`` counts them."""
    there = [device for device in group if left.get(device) is not Stage.ADVERTS]
    for stage, least in _needed(plan, group, len(there)).items():
        there = [device for device in there if left.get(device) is not stage]
        if stage is Stage.UPLOADS:
            there = [device for device in there if collected.participation[device].outcome == ACCEPTED]
        if len(there) < least:
            return stage
    return Stage.DONE


def _needed(plan: RoundPlan, group: Sequence[str], n: int) -> dict[Stage, int]:
    """How many must get through each stage, of a group of which n are in the roster."""
    rules = rules_of(secure_part(plan), len(group))
    survivors = max(rules.least_survivors(n), plan.private.survivors if plan.private else 0)
    return {
        Stage.ADVERTS: rules.min_cohort,
        Stage.SHARES: survivors,
        Stage.UPLOADS: survivors,
        Stage.CONSENTS: rules.quorum(n),
        Stage.REVEALS: rules.threshold(n),
    }


class _Sums:
    """How many vectors of each sum are there, as the protocol would have it."""

    def __init__(self, plan: RoundPlan, groups: Sequence[Sequence[str]], left: Mapping[str, Stage]) -> None:
        self._wanted, self._seen, self._sums = plan.wanted_reports, 0, list[Uploads]()
        self._of = dict[str, Uploads]()  # of the devices that are asked for one
        for group in groups:
            roster = [device for device in group if left.get(device) is not Stage.ADVERTS]
            dealers = [device for device in roster if left.get(device) is not Stage.SHARES]
            needed = _needed(plan, group, len(roster))
            if len(roster) >= needed[Stage.ADVERTS] and len(dealers) >= needed[Stage.SHARES]:
                sum_ = Uploads(0, len(dealers), needed[Stage.UPLOADS], len(roster))
                self._sums.append(sum_)
                self._of |= dict.fromkeys(dealers, sum_)

    def are_in(self, collected: Collected) -> bool:
        """Whether the uploads close."""
        for entry in islice(collected.participation.values(), self._seen, None):
            if (sum_ := self._of.get(entry.device_id)) is not None:
                sum_.heard += entry.outcome == ACCEPTED
                sum_.possible -= entry.outcome != ACCEPTED
        self._seen = len(collected.participation)
        return are_in(self._sums, self._wanted)


def protocol_bytes(devices: int) -> int:
    """What a device of a sum of so many sends besides its vector, about."""
    return 144 * devices + 700


def _count_bytes(collected: Collected, encoding: SumEncoding, groups: Sequence[Sequence[str]]) -> None:
    """What those who have answered would have sent in the protocol."""
    size = {d: wire_bytes(encoding) + protocol_bytes(len(group)) for group in groups for d in group}
    collected.participation = {
        device: entry._replace(num_bytes=size[device]) if entry.num_bytes else entry
        for device, entry in collected.participation.items()
    }
    collected.bytes_up = sum(entry.num_bytes for entry in collected.participation.values())


def read_reply(answer: Answer, plan: RoundPlan) -> TrainReply:
    """What a device would send in a plain round; raises what is wrong with it."""
    if not isinstance(answer.records, Records):
        raise answer.records
    reply = TrainReply.read(answer.records, plan)
    TRAINING.validate(reply.sums)
    return reply


def without_counts(reply: TrainReply) -> TrainReply:
    """A reply of which only that it came is left; the sums are those of nothing."""
    return replace(
        reply,
        num_examples=0,
        sums={"loss_sum": np.zeros(1), "examples": np.zeros(1, np.int64)},
    )


def _rounded(sums: Sums) -> Sums:
    return {**sums, "loss_sum": np.array([rounded_loss(float(sums["loss_sum"][0]))])}


def _forget_counts(collected: Collected) -> None:
    """Example counts of single devices are in no report of a secure round."""
    if not collected.enough:
        collected.sums = {}
    collected.participation = {
        device: entry._replace(num_examples=0) for device, entry in collected.participation.items()
    }


def _refuse_sum(part: AddedUp) -> None:
    raise LeptonError("An exchange added up updates that are needed one by one.")
