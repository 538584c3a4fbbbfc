"""Rounds whose updates travel in few bits: what a plan says, a device's answer, the sum.

The plan of every attempt names a ring and a reach, the norm of the sum that the ring is made for. Nothing is
known of the first sum, so its reach is what the clip norm allows, in 16 bits or more. The reach of later ones
follows the sums that were learnt, which the coordinator sees anyway; nothing else does. A sum that has left
its ring is found out (``secagg.quantised``) and thrown away, and the next attempt begins as the first.

    answer = compressed(asked, answered, os.urandom)      # on the device, of a plain round
    aggregator = QuantisedSum(plan)                       # at the coordinator

With secure aggregation the same integers travel masked (``rounds.secure_sum``), and their sum is decoded by
the same code: bit for bit the same mean.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, Rejection, RunError, UpdateRejected
from lepton_fl.packing import signed
from lepton_fl.plan import Quantisation, QuantisationSpec, RoundPlan, RunSpec
from lepton_fl.rounds.accumulator import Subtotal, UpdateBatch
from lepton_fl.secagg.cohorts import add_sums
from lepton_fl.secagg.encoding import Counter, Sum
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.quantised import (
    SURE,
    TUNED,
    Quantised,
    from_message,
    ring_bits,
    to_message,
)
from lepton_fl.wire.messages import UPDATE, Failure, Fields, Request, Ticket
from lepton_fl.wire.records import Records

FIRST_BITS = 16  # of the ring of a sum of which nothing is known, where all devices count the same
DECAY = 0.9  # what is expected of a sum falls by no more than this from one to the next
LEAST_REACH = 2.0**-24  # over the clip norm: finer steps than the updates' own grid serve nobody
TYPICAL_ROUNDING = 1 / 6  # variance of rounding a number of many steps, once
LEAST_ROUNDING = 1 / 8  # of all but numbers of a fraction of a step


@dataclass(frozen=True)
class FewBits:
    """What a sum in few bits tells of itself."""

    norm: float  # of the longest sum, about, updates of weight 1 counting 1; model units
    error: float  # expected norm of all rounding over that of the sum
    bits: int  # of a coordinate in the ring
    wrapped: bool  # a sum has left its ring: it is not used

    def figures(self) -> dict[str, float]:
        """As a round reports them."""
        return {"sum_norm": self.norm, "quantisation_error": self.error, "ring_bits": float(self.bits)}


# --- the plan ---------------------------------------------------------------------------------------


def planned(
    asked: QuantisationSpec,
    expected: float,
    *,
    clip_norm: float,
    max_weight: int,
    devices: int,
    coordinates: int,
) -> Quantisation:
    """How the updates of an attempt become few bits.

    Args:
        asked: by the operator.
        expected: norm of a sum, from ``next_expected``; 0 = nothing is known.
        clip_norm: of an update.
        max_weight: of a device; such an update counts 1 in a sum's norm.
        devices: of the largest sum.
        coordinates: of an update.

    Raises:
        ConfigError: the ring that the operator has set is too narrow.
    """
    most = devices * clip_norm
    if not expected:
        bits = min(32, FIRST_BITS + (max_weight - 1).bit_length())
        return Quantisation(bits=bits, reach=most, risk=SURE, cohort=devices)
    reach = min(most, max(asked.headroom * expected, LEAST_REACH * clip_norm))
    return Quantisation(bits=_ring(asked, devices, coordinates), reach=reach, risk=TUNED, cohort=devices)


def planned_for(
    spec: RunSpec, number: int, expected: float, devices: int, coordinates: int
) -> Quantisation | None:
    """The same of round ``number`` of a run; None if its updates do not travel in few bits."""
    if spec.quantisation is None:
        return None
    weight = spec.max_weight if spec.weighting == "examples" else 1
    return planned(
        spec.quantisation,
        expected * spec.learning_rate(max(1, number)),
        clip_norm=spec.clip_norm,
        max_weight=weight,
        devices=devices,
        coordinates=coordinates,
    )


def _ring(asked: QuantisationSpec, devices: int, coordinates: int) -> int:
    least = ring_bits(asked.bits, devices, coordinates)
    if not asked.ring:
        return least
    if asked.ring < least or asked.ring in (16, 32):
        raise ConfigError(
            f"quantisation.ring={asked.ring} does not suffice: updates of {devices} devices with "
            f"{coordinates} coordinates of {asked.bits} bits need {least}, and 16 and 32 leave no room for "
            "the elements that tell whether a sum has left its ring.",
            hint="Set ring = 0 for as few as will do, fewer bits, or a smaller cohort.",
        )
    return asked.ring


def prove_fits(spec: RunSpec, coordinates: int) -> None:
    """Refuse a run whose bits do not suffice, before anybody is asked.

    Raises:
        ConfigError: with the numbers.
    """
    devices = spec.largest_sum if spec.secure_aggregation == "required" else spec.most_asked
    for expected in (0.0, spec.clip_norm):
        plan = planned_for(spec, 1, expected, devices, coordinates)
        if plan is not None:
            Quantised(coordinates, devices, 1, plan.reach / spec.grid_step, "0" * 64, plan.bits, plan.risk)


def next_expected(before: float, norm: float, rate: float = 1.0) -> float:
    """What to expect of the next sum, from what was expected and what came.

    Args:
        before: what was expected.
        norm: of the sum that came.
        rate: the devices' learning rate: updates are in proportion to it, so what is expected is per unit.
    """
    return max(norm / rate, DECAY * before)


def encoding_for(asked: RoundPlan | Request, size: int, counters: tuple[Counter, ...] = ()) -> Quantised:
    """How the updates of an attempt become ring elements; the same for the coordinator and all devices.

    Args:
        asked: the plan, or the request that a device has got.
        size: coordinates of an update.
        counters: sums that travel along.

    Raises:
        ConfigError: the numbers contradict each other.
    """
    part = asked.quantisation
    if part is None:
        raise ConfigError("This plan asks for no quantisation.")
    weight = asked.max_weight if asked.weighting == "examples" else 1
    nonce = asked.nonce if isinstance(asked, RoundPlan) else asked.ticket.nonce
    reach = part.reach / asked.grid_step
    return Quantised(size, part.cohort, weight, reach, rotation_seed(nonce), part.bits, part.risk, counters)


def rotation_seed(nonce: str) -> str:
    """Names the rotation of an attempt: public, and not to be foreseen before its nonce was drawn."""
    return hashlib.sha256(f"rotation {nonce}".encode()).hexdigest()


def weight_of(asked: RoundPlan | Request, num_examples: int) -> int:
    """How much a device with so many examples counts."""
    return 1 if asked.weighting == "equal" else min(num_examples, asked.max_weight)


# --- the device -------------------------------------------------------------------------------------


def compressed(asked: Records, answered: Records, random: Random) -> Records:
    """A device's answer as the request wants it: in few bits, if it does.

    Args:
        asked: a ``Request``.
        answered: what a device answers: a ``TrainReply`` on the grid, or anything else, which stays as it is.
        random: for the rounding: the operating system's. Only simulations give another.
    """
    if "quantisation" not in asked.config or UPDATE not in answered.arrays:
        return answered
    ticket = Ticket.take(Fields(asked.config))
    try:
        request, update = Request.read(asked), answered.arrays[UPDATE]
        encoding = encoding_for(request, len(update))
        weight = weight_of(request, answered.metrics["num-examples"])
        message = to_message(encoding, encoding.encode(update, weight, random))
    except UpdateRejected as refusal:
        return Failure(ticket, refusal.reason, str(refusal)).to_records()
    except ConfigError as error:
        return Failure(ticket, Rejection.MALFORMED, str(error)).to_records()
    return Records({UPDATE: message}, answered.config, answered.metrics)


# --- the coordinator --------------------------------------------------------------------------------


class QuantisedSum:
    """Adds the vectors of a plain round in their ring; an ``Aggregator``."""

    def __init__(self, plan: RoundPlan) -> None:
        """Start at zero; ConfigError if the plan asks for something else."""
        self._plan, self._encoding = plan, encoding_for(plan, plan.update_size)
        self._total: Ring = np.zeros(self._encoding.length, ring_type(self._encoding.bits))
        self._reports = 0

    def add(self, batch: UpdateBatch) -> None:
        """Add one device's message.

        Raises:
            UpdateRejected: WRONG_SHAPE; OUT_OF_RANGE: it is longer than the clip norm and rounding make it.
        """
        (message,), (count,) = batch.updates, batch.num_examples.tolist()
        vector = from_message(self._encoding, message)
        self._check_norm(vector, weight_of(self._plan, count))
        np.add(self._total, vector, out=self._total)
        self._reports += 1

    def merge(self, subtotal: Subtotal) -> None:
        """There are no sums of integers on the grid here."""
        raise RunError("Quantised updates are added in their ring, one by one.")

    def decode(self) -> tuple[NDArray[np.float64], FewBits]:
        """The weighted mean update, (P,) float64, and whether it may be used."""
        return decode(self._plan, self._encoding, [self._total], self._reports)

    def finalize(self) -> NDArray[np.float64]:
        """The weighted mean update, (P,) float64.

        Raises:
            RunError: the sum has left its ring.
        """
        mean, found = self.decode()
        if found.wrapped:
            raise RunError(f"The sum has left its ring of {found.bits} bits.")
        return mean

    def _check_norm(self, vector: Ring, weight: int) -> None:
        encoding, plan = self._encoding, self._plan
        size = encoding.num_coordinates
        whole = signed(vector[:size], encoding.bits).astype(np.float64)
        bound = encoding.scale * plan.clip_norm / plan.grid_step * (weight / encoding.max_weight)
        norm, most = sqrt(float(np.dot(whole, whole))), bound * (1 + 2.0**-20) + sqrt(size)
        if norm > most:  # rounding moves no coordinate by more than 1
            raise UpdateRejected(
                Rejection.OUT_OF_RANGE,
                f"The update's L2 norm is {norm:.6g} steps, the clip norm and rounding allow {most:.6g}.",
                hint="The device did not clip; install the version of lepton-fl that the coordinator has.",
            )


def decode(
    plan: RoundPlan, encoding: Quantised, totals: Sequence[Ring], reports: int
) -> tuple[NDArray[np.float64], FewBits]:
    """The mean update, (P + A,), of one or several cohorts' sums, and what they tell of themselves.

    Args:
        plan: of the attempt.
        encoding: of the vectors.
        totals: the sum of each cohort.
        reports: how many vectors were added in all.
    """
    sums = [encoding.decode(total) for total in totals]
    wrapped = any(encoding.has_left_ring(total, found) for total, found in zip(totals, sums, strict=True))
    found = add_sums(sums)
    mean = encoding.restore(found)
    mean *= plan.grid_step / max(1, found.weight)
    norm = max(_norm(encoding, part, reports / len(sums)) for part in sums)
    rounding, whole = sqrt(reports * TYPICAL_ROUNDING * len(mean)), _norm(encoding, found, reports)
    error = rounding / (whole * encoding.scale) if whole else 0.0
    return mean, FewBits(norm * plan.grid_step, error, encoding.bits, wrapped)


def _norm(encoding: Quantised, found: Sum, reports: float) -> float:
    """Of a sum, in grid steps, without the least that rounding has added; a quarter of it at least."""
    whole = encoding.norm(found)
    rounding = LEAST_ROUNDING * reports * encoding.num_coordinates / encoding.scale**2
    return max(sqrt(max(0.0, whole**2 - rounding)), whole / 4)
