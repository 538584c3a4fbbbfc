"""What a secure round's plan means for its sum: who is with whom, how updates become ring elements and back.

    encoding = encoding_of(plan)
    vector = encode_reply(plan, encoding, reply, os.urandom)     # a device: its update, its counts, its noise
    mean = decode_total(plan, encoding, totals, collected)       # the coordinator

The mean is bit for bit that of a plain round whose inputs are the same; with ``secure.bits`` below 32 it is
rounded at random. Example counts and losses of single devices travel in the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, UpdateRejected
from lepton_fl.plan import PrivatePart, RoundPlan, RunSpec, SecureSpec
from lepton_fl.privacy.noise import DiscreteGaussian, IntegerNoise, Keystream, Skellam
from lepton_fl.rounds import quantised
from lepton_fl.rounds.accumulator import Accumulator, Subtotal
from lepton_fl.rounds.collect import Collected, Finish
from lepton_fl.rounds.quantised import encoding_for, rotation_seed, weight_of
from lepton_fl.secagg.cohorts import add_sums, pinned, split
from lepton_fl.secagg.context import RoundContext, Rules, hidden_rules
from lepton_fl.secagg.encoding import WEIGHT, Counter, Exact, Rotated, Sum, noise_room
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring
from lepton_fl.secagg.quantised import Quantised
from lepton_fl.tasks.metrics import Sums
from lepton_fl.wire.messages import Fields, Request, Ticket, TrainReply, malformed
from lepton_fl.wire.records import Records

_LOSS_STEP: Final = 2.0**-20  # of a summed loss
_LOSS_HALF: Final = 2**56  # steps; losses beyond +-this are cut
_EXAMPLES: Final = Counter("examples", 2**40)
_LOSS: Final = Counter("loss", 2 * _LOSS_HALF)

SumEncoding = Exact | Rotated | Quantised


@dataclass
class Uploads:
    """How many vectors of one sum are there."""

    heard: int
    possible: int  # are there, or can still come
    needed: int
    n: int  # devices of the roster


def are_in(sums: Sequence[Uploads], wanted: int) -> bool:
    """Whether a round's uploads close: as many are there as are wanted, and no sum lacks any.

    A sum that can no longer come about is waited for by nobody; one that still can would be lost.
    """
    alive = [s for s in sums if s.possible >= s.needed]
    enough = all(s.heard >= s.needed for s in alive)
    return enough and sum(s.heard for s in alive) >= min(wanted, sum(s.n for s in alive))


def encoding_of(plan: RoundPlan) -> SumEncoding:
    """How the updates of an attempt become ring elements.

    Raises:
        ConfigError: a sum could leave the ring; ``RunSpec`` has refused that before.
    """
    seed = rotation_seed(plan.nonce)
    steps, spec = plan.clip_norm / plan.grid_step, secure_part(plan)
    if plan.quantisation is not None:
        return encoding_for(plan, plan.update_size, _counters(weight_of(plan, plan.max_weight)))
    if plan.private is not None:
        return _private_encoding(spec, plan.private, plan.update_size, steps, seed)
    weight = plan.max_weight if plan.weighting == "examples" else 1
    return _encoding(spec, plan.update_size, max(spec.sums(len(plan.cohort))), weight, steps, seed)


def _named(plan: RoundPlan) -> str:
    return f"{plan.run_id} {plan.round} {plan.attempt} {plan.nonce}"


def groups_of(plan: RoundPlan) -> tuple[tuple[str, ...], ...]:
    """Who is with whom: a cohort divided into as few sums as possible, at random, the same way every time."""
    spec = secure_part(plan)
    return split(plan.cohort, pinned(_named(plan)), min(spec.sums(len(plan.cohort))), spec.max_cohort)


def _encoding(spec: SecureSpec, size: int, cohort: int, weight: int, steps: float, seed: str) -> SumEncoding:
    if spec.bits == 32:
        return Exact(size, cohort, weight, int(steps), _counters(weight))
    return Rotated(size, cohort, weight, steps, seed, spec.spread, _counters(weight), bits=spec.bits)


def _counters(weight: int) -> tuple[Counter, ...]:
    return Counter(WEIGHT, weight), _EXAMPLES, _LOSS


def _private_encoding(spec: SecureSpec, part: PrivatePart, size: int, steps: float, seed: str) -> SumEncoding:
    """Room for the noise that was planned; no counters, for nothing would cover them."""
    bound, counters = part.norm_bound(steps), (Counter(WEIGHT, 1),)
    half = 2 ** (spec.bits - 1) - 1
    if spec.bits == 32:
        width = noise_room(sqrt(part.asked * part.share_variance), size) if part.share_variance else 0
        room = min(width, half - part.asked * int(bound))  # four deviations at least, by the plan
        return Exact(size, part.asked, 1, int(bound), counters, max(0, room), survivors=part.survivors)
    return Rotated(
        size,
        part.asked,
        1,
        bound,
        seed,
        spec.spread,
        counters,
        half - part.asked * part.limit,
        spec.bits,
        part.survivors,
    )


def prove_fits(spec: RunSpec, coordinates: int) -> None:
    """Refuse a run whose sums could leave the ring, before anybody is asked.

    Args:
        spec: of the run; without secure aggregation or quantisation there is nothing to refuse.
        coordinates: of one update.

    Raises:
        ConfigError: with the numbers.
    """
    if spec.quantisation is not None:
        quantised.prove_fits(spec, coordinates)
        return
    if spec.secure_aggregation == "off" or (spec.privacy and spec.privacy.unit == "device"):
        return  # a plan of device-level privacy proves it
    weight = spec.max_weight if spec.weighting == "examples" else 1
    _encoding(spec.secure, coordinates, spec.largest_sum, weight, spec.clip_norm / spec.grid_step, "0" * 64)


def rules_of(spec: SecureSpec, asked: int) -> Rules:
    """How many of a sum's devices must take part, sign and reveal.

    Args:
        spec: of the plan.
        asked: devices of the sum. A hidden mask graph is made for rosters of nine tenths of them or more.
    """
    if spec.mask_graph == "complete":
        return Rules(spec.min_cohort, spec.per_thousand)
    return hidden_rules(max(spec.min_cohort, ceil(0.9 * asked)), asked, spec.per_thousand)


def context_of(plan: RoundPlan, request: Request, deployment: str, cohort: int = 0) -> RoundContext:
    """What every signature of an attempt is bound to.

    Args:
        plan: of the attempt.
        request: what the devices are asked.
        deployment: the installation's name.
        cohort: which of ``groups_of(plan)``.
    """
    spec = secure_part(plan)
    rules = rules_of(spec, spec.sums(len(plan.cohort))[cohort])
    return RoundContext.of(request, deployment, encoding_of(plan), rules, cohort)


def encode_reply(
    plan: RoundPlan | Request,
    encoding: SumEncoding,
    reply: TrainReply,
    random: Random,
    stream: Keystream | None = None,
) -> Ring:
    """One device's vector: its update times its weight, and its counts; of a private run, with its noise.

    Args:
        plan: of the attempt, or the request that a device has got.
        encoding: from ``encoding_of``.
        reply: what the device would send in a plain round.
        random: for the rounding of fewer than 32 bits: the operating system's; it hides the fractions.
        stream: of the noise; None = fresh, of the operating system. Only simulations give one.

    Raises:
        UpdateRejected: a value is outside the bounds of the plan.
    """
    if plan.private is not None and isinstance(encoding, Quantised) and plan.private.noise != "none":
        raise malformed("noise of devices is asked for, in an encoding that has no place for it")
    if plan.private is not None and not isinstance(encoding, Quantised):
        noise = noise_share(plan.private, encoding, len(reply.update), stream)
        if isinstance(encoding, Exact):
            return encoding.encode(reply.update, 1, {}, noise)
        return encoding.encode(reply.update, 1, random, {}, noise)
    weight = weight_of(plan, reply.num_examples)
    examples = min(int(reply.sums["examples"][0]), _EXAMPLES.bound)
    counters = {"examples": examples, "loss": _loss_steps(reply.sums) + _LOSS_HALF}
    if isinstance(encoding, Exact):
        return encoding.encode(reply.update, weight, counters)
    return encoding.encode(reply.update, weight, random, counters)


def least_multiplier(request: Request, encoding: SumEncoding) -> float:
    """Standard deviation of the noise that devices add to a sum, at least, over the norm of one vector."""
    part = request.private
    if part is None or part.noise == "none":
        return 0.0
    steps = part.norm_bound(request.clip_norm / request.grid_step)
    norm = float(encoding.norm_bound) if isinstance(encoding, Rotated) else steps
    return sqrt(part.share_variance * min(encoding.survivors, part.survivors)) / norm


def noise_share(
    part: PrivatePart, encoding: SumEncoding, size: int, stream: Keystream | None = None
) -> NDArray[np.int64] | None:
    """(length,) what a device adds to its vector: nothing to the counters; None where it adds no noise.

    Raises:
        UpdateRejected: the sum may be learnt of fewer devices than the noise is made for.
    """
    law = share_law(part)
    if law is None:
        return None
    if encoding.survivors < part.survivors:
        raise malformed(
            f"noise made for {part.survivors} devices is asked for, in a sum of {encoding.survivors} or more"
        )
    noise = np.zeros(encoding.length, np.int64)
    law.add_to(noise[:size], stream or Keystream())
    return noise


def share_law(part: PrivatePart) -> IntegerNoise | None:
    """The law of the noise that one device adds; None = none."""
    if part.noise == "none":
        return None
    return (
        Skellam(part.share_variance)
        if part.noise == "skellam"
        else DiscreteGaussian(sqrt(part.share_variance))
    )


def encode_answer(
    asked: Records, answered: Records, encoding: SumEncoding, random: Random, least_noise: float = 0.0
) -> Ring:
    """A device's vector, out of what it was asked and what it would answer in a plain round.

    Args:
        asked: a ``Request``.
        answered: a ``TrainReply`` or a ``Failure``.
        encoding: of the sum.
        random: see ``encode_reply``.
        least_noise: what the device demands of the sum, see ``least_multiplier``.

    Raises:
        UpdateRejected: the answer reports a failure, does not fit, or would not be hidden as demanded.
    """
    if "failed" in answered.config:
        fields = Fields(answered.config)
        Ticket.take(fields)
        reason, detail = fields.text("failed"), fields.text("detail")
        raise UpdateRejected(Rejection(reason), detail)
    request = Request.read(asked)
    if (found := least_multiplier(request, encoding)) < least_noise:
        raise UpdateRejected(
            Rejection.FAILED,
            f"The sum would hold noise of {found:.4g} times an update's norm; this device demands "
            f"{least_noise:g}.",
            hint="Lower least_noise in the device's configuration, or run with more distributed noise.",
        )
    try:
        sums = {name: np.asarray(answered.metrics[f"sum.{name}"]) for name in ("loss_sum", "examples")}
        examples, update = answered.metrics["num-examples"], answered.arrays["update"]
    except KeyError as error:
        raise malformed(f"the device's own answer has no {error}") from error
    count = Fields({"n": examples}).integer("n")
    reply = TrainReply(request.ticket, request.task_version, count, update, sums, 0.0)
    return encode_reply(request, encoding, reply, random)


def decode_total(
    plan: RoundPlan,
    encoding: SumEncoding,
    totals: Sequence[Ring],
    collected: Collected,
    finish: Finish | None = None,
) -> NDArray[np.float64] | None:
    """The mean update, (P + A,); None if the sum has left its ring.

    Args:
        plan: of the attempt.
        encoding: from ``encoding_of``.
        totals: the sum of the vectors of each cohort; they may be overwritten.
        collected: of the attempt; is told the devices' added counts, and what the sum tells of itself.
        finish: of a private run; makes the update of the sum.
    """
    found, reports = add_sums([encoding.decode(total) for total in totals]), collected.reports
    if finish is not None:
        collected.sums = {}
        return finish(_as_aggregate(plan, encoding, found, reports))
    if found.counters.keys() != {WEIGHT, "examples", "loss"}:
        raise ConfigError("This sum is not one of a plan's updates.")
    loss = found.counters["loss"] - reports * _LOSS_HALF
    collected.sums = {
        "loss_sum": np.array([loss * _LOSS_STEP]),
        "examples": np.array([found.counters["examples"]], np.int64),
    }
    if isinstance(encoding, Quantised):
        return collected.in_few_bits(*quantised.decode(plan, encoding, totals, reports))
    return _mean(plan, encoding, found, reports)


def _mean(plan: RoundPlan, encoding: SumEncoding, found: Sum, reports: int) -> NDArray[np.float64]:
    if isinstance(encoding, Rotated):
        restored = encoding.restore(found)
        restored *= plan.grid_step / found.weight
        return restored
    return _as_aggregate(plan, encoding, found, reports).finalize()  # the very arithmetic of a plain round


def _as_aggregate(plan: RoundPlan, encoding: SumEncoding, found: Sum, reports: int) -> Accumulator:
    """The sum as an accumulator has it; of a rotated one, rounded to the grid: that is post-processing."""
    if isinstance(encoding, Rotated):
        whole = np.rint(encoding.restore(found)).astype(np.int64)
    else:
        whole = found.update.astype(np.int64, copy=False)
    accumulator = Accumulator(plan)
    accumulator.merge(Subtotal(whole, found.weight, reports))
    return accumulator


def _loss_steps(sums: Sums) -> int:
    steps = float(np.clip(float(sums["loss_sum"][0]) / _LOSS_STEP, -float(_LOSS_HALF), float(_LOSS_HALF)))
    return round(steps)


def rounded_loss(loss_sum: float) -> float:
    """A device's summed loss as it travels in a sum."""
    return _loss_steps({"loss_sum": np.array([loss_sum])}) * _LOSS_STEP


def secure_part(plan: RoundPlan) -> SecureSpec:
    """What a plan says of its secure aggregation; ConfigError if it asks for none."""
    if plan.secure is None:
        raise ConfigError("This plan asks for no secure aggregation.")
    return plan.secure
