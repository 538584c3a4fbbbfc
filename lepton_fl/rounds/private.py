"""Device-level privacy in rounds: who may be asked, what is charged, the noise, what is remembered.

    private = PrivateRounds(spec, run_id, prepared(spec, coordinates=P), ledger, sealing_key=key)
    private.resume(state.private, state.round)
    plan = private.shaped(plan)                  # with this round's clip norm, grid, tail and shares of noise
    private.reserve(plan)                        # before anybody is asked; BudgetRefused
    mean = private.release(plan, accumulator)    # noise on the exact sum, then the public denominator
    state = state.on(private=private.commit(plan, accepted))      # or private.void(plan, evidence)

Under central trust the coordinator sees updates, losses and example counts; under secure aggregation only the
sum of the updates, and under distributed trust that sum has the devices' noise in it already. What leaves it
is the noisy mean: losses and counts are neither reported nor journalled in a private run, but as noisy sums
that travel behind the update and are charged with it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.crashpoints import reached
from lepton_fl.errors import RunError, StateCorrupt
from lepton_fl.plan import PrivacySpec, RoundPlan, RunSpec
from lepton_fl.privacy.budget import Budget
from lepton_fl.privacy.clipping import within
from lepton_fl.privacy.distributed import DistributedNoise
from lepton_fl.privacy.events import Event, Gaussian, from_json, to_json
from lepton_fl.privacy.factorization import participations
from lepton_fl.privacy.mechanisms import Correlated, Independent, ReleaseMechanism
from lepton_fl.privacy.noise import KEY_BYTES as NOISE_KEY_BYTES
from lepton_fl.privacy.noise import Keystream
from lepton_fl.privacy.planning import Prepared, Ring, Shape, prepare
from lepton_fl.privacy.sealing import seal, unseal
from lepton_fl.privacy.spec import refuse_conflicts
from lepton_fl.rounds.accumulator import BLOCK, Accumulator, Aggregator
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import Collected
from lepton_fl.rounds.ledger import Ledger
from lepton_fl.secagg.rotation import rotation_width

_STATE_FORMAT = "lepton private rounds 1"


def refuse_run(spec: RunSpec, *, central_evaluation: bool, also: Iterable[str] = ()) -> None:
    """Refuse a run whose guarantee would not be true, or that rounds cannot keep yet.

    Args:
        spec: of the run; without ``privacy`` there is nothing to refuse.
        central_evaluation: whether models are evaluated on public rows, and on no device.
        also: further reasons, which the caller has found.

    Raises:
        ConfigError: names every conflict at once.
    """
    privacy = spec.privacy
    if privacy is None:
        return
    missing = {
        "sampling='poisson' needs cohorts of random size, which are not drawn yet; take mechanism='blt' with "
        "min_separation": privacy.sampling == "poisson",
    }
    refuse_conflicts(
        privacy,
        spec,
        secure_aggregation=spec.secure_aggregation == "required",
        central_evaluation=central_evaluation,
        also=[*also, *(why for why, is_so in missing.items() if is_so)],
    )


def prepared(spec: RunSpec, coordinates: int) -> Prepared:
    """The mechanism of a run; takes seconds for correlated noise.

    Args:
        spec: of the run, with ``privacy``.
        coordinates: P of the model.

    Raises:
        ConfigError: the numbers contradict each other.
    """
    privacy, ring = _privacy(spec), None
    if spec.secure_aggregation == "required":
        width = rotation_width(coordinates + privacy.tail_size)
        flat = spec.secure.spread / sqrt(width) if spec.secure.bits < 32 else 0.0
        ring = Ring(spec.secure.bits, min(spec.most_asked, spec.secure.max_cohort), flat)
    return prepare(
        privacy,
        rounds=spec.rounds,
        cohort=spec.cohort.size,
        coordinates=coordinates,
        grid_step=spec.grid_step,
        survivors=spec.noise_survivors,
        ring=ring,
    )


def budget_of(spec: RunSpec, ready: Prepared, name: str) -> Budget:
    """The budget that a run needs, and no more: its epsilon, or what its noise is worth."""
    privacy = _privacy(spec)
    epsilon = privacy.epsilon or ready.epsilon
    return Budget(name, epsilon, privacy.delta, trust=privacy.trust, adjacency=privacy.adjacency)


@dataclass(frozen=True)
class PrivateState:
    """What the next private round depends on; part of a run's committed state.

    Attributes:
        noise: what the mechanism remembers, sealed; empty if it remembers nothing.
        noise_round: of the release that it remembers; rounds that are left out release nothing.
        took_part: device -> the last round that it counted in, and how many; forgotten when neither matters.
        charged: what the run has cost so far, counted.
        separation: the smallest number of rounds between two participations of a device; the contract's, if
            that was kept.
        times: the most participations of a device; the contract's, if that was kept.
        clip: of the next round, where it moves; 0 = it does not, or there was no round yet.
    """

    noise: bytes = field(default=b"", repr=False)
    noise_round: int = 0
    took_part: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    charged: Mapping[Event, int] = field(default_factory=dict)
    separation: int = 1
    times: int = 0
    clip: float = 0.0

    def to_bytes(self) -> bytes:
        """A line of JSON, and the sealed noise."""
        header = {
            "format": _STATE_FORMAT,
            "noise_round": self.noise_round,
            "took_part": {device: list(pair) for device, pair in self.took_part.items()},
            "charged": [[to_json(event), count] for event, count in self.charged.items()],
            "separation": self.separation,
            "times": self.times,
            "clip": self.clip,
        }
        return json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n" + self.noise

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read back what :meth:`to_bytes` wrote.

        Raises:
            StateCorrupt: it is something else.
        """
        line, _, noise = data.partition(b"\n")
        try:
            header = json.loads(line)
            if header["format"] != _STATE_FORMAT:
                raise ValueError("another format")
            took_part = {str(d): (int(last), int(times)) for d, (last, times) in header["took_part"].items()}
            charged = {from_json(text): int(count) for text, count in header["charged"]}
            contract = int(header["separation"]), int(header["times"])
            clip, noise_round = float(header.get("clip", 0.0)), int(header.get("noise_round", 0))
            return cls(noise, noise_round, took_part, charged, *contract, clip)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StateCorrupt(
                f"Expected the state of private rounds, got bytes that are none ({error})."
            ) from error


class PrivateRounds:
    """Keeps the guarantee of one run; made anew, or resumed, whenever its rounds start."""

    def __init__(
        self,
        spec: RunSpec,
        run_id: str,
        ready: Prepared,
        ledger: Ledger,
        *,
        sealing_key: bytes,
        noise_key: Callable[[RoundPlan], bytes] = lambda plan: os.urandom(NOISE_KEY_BYTES),
    ) -> None:
        """Prepare; nothing is charged yet.

        Args:
            spec: of the run, with ``privacy`` of device level.
            run_id: its name in the ledger.
            ready: see ``prepared``.
            ledger: what is charged.
            sealing_key: 32 bytes; encrypts remembered noise at rest.
            noise_key: of an attempt's noise; fresh from the operating system, but in a simulation.
        """
        self._spec, self._privacy, self._run_id = spec, _privacy(spec), run_id
        self._start: ReleaseMechanism = ready.mechanism
        self._mechanism = self._following = self._start
        self._ready, self._ledger, self._key, self._noise_key = ready, ledger, sealing_key, noise_key
        self._round = 0  # the last committed one
        self._clip = self._next_clip = ready.clip
        self._figures: dict[str, float] = {}  # what the last release told besides the update
        self._pending: list[Event] = []  # what the attempt in hand costs
        self._owed: list[Event] = []  # for broken contracts in rounds that were left out
        self._state = self._fresh()

    def resume(self, state: PrivateState | None, round_number: int) -> None:
        """Go on after a committed round.

        Args:
            state: as it was committed; None before the first round.
            round_number: that round; 0 before the first.

        Raises:
            StateCorrupt: there is no such state, or it belongs to another run, round or key.
        """
        if state is None and round_number:
            raise StateCorrupt(
                f"Round {round_number} of run {self._run_id} is committed without a state of its privacy.",
                hint="What it has spent is not known. Start a new run.",
            )
        self._state, self._round = state or self._fresh(), round_number
        self._mechanism, self._pending, self._clip = self._start, [], self._ready.clip
        if self._clip is not None and self._state.clip:
            self._clip = replace(self._clip, clip_norm=self._state.clip)
        if state is not None and state.noise and isinstance(self._start, Correlated):
            last = min(state.noise_round or round_number, round_number)  # earlier versions did not say
            opened = unseal(state.noise, self._key, run_id=self._run_id, round_number=last)
            self._mechanism = self._start.restored(opened)

    @property
    def state(self) -> PrivateState:
        """As after the last round that was committed, or left out."""
        return self._state

    def _fresh(self) -> PrivateState:
        return PrivateState(separation=self._privacy.min_separation, times=self._privacy.max_participations)

    # --- who may be asked ---------------------------------------------------------------------------

    def rested(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """The same candidates; those who would break the participation contract stand as resting."""
        if not self._privacy.has_contract:
            return candidates
        return [
            replace(c, standing="resting")
            if c.standing == "eligible" and not self.may_ask(c.device_id)
            else c
            for c in candidates
        ]

    def may_ask(self, device_id: str) -> bool:
        """Whether a device may take part in the next round."""
        last, times = self._state.took_part.get(device_id, (-self._privacy.min_separation, 0))
        most = self._privacy.max_participations
        return self._round + 1 - last >= self._privacy.min_separation and not 0 < most <= times

    # --- what devices are told ----------------------------------------------------------------------

    def shaped(self, plan: RoundPlan) -> RoundPlan:
        """The plan of an attempt, with the clip norm of its round and what devices do besides clipping."""
        shape = self._ready.shape(self._clip)
        contract = {
            "min_separation": self._privacy.min_separation,
            "max_participations": self._privacy.max_participations,
        }
        part = shape.part.model_copy(update=contract)
        plain = not (part.tail or part.weight_cap or part.has_contract or plan.secure)
        return plan.model_copy(
            update={
                "clip_norm": shape.clip_norm,
                "grid_step": shape.grid_step,
                "private": None if plain else part,
            }
        )

    # --- what is charged ----------------------------------------------------------------------------

    def reserve(self, plan: RoundPlan) -> None:
        """Set aside what an attempt costs.

        Raises:
            BudgetRefused: it does not fit; nobody may be asked.
        """
        doubts = self._ledger.in_doubt(self._run_id, plan.round)
        event, again = self._mechanism.charge(plan.round), self._mechanism.charge(plan.round, repeat=True)
        # What was charged for an attempt in doubt stays charged; each further one costs a repeated release.
        self._ledger.reserve(self._run_id, plan.round, plan.attempt, again if doubts else event)
        self._pending = [e for e in (event, *[again] * doubts) if e is not None]

    def reopened(self, plan: RoundPlan) -> None:
        """Go on with an attempt that was reserved before a restart, and whose release was not begun here."""
        doubts = self._ledger.in_doubt(self._run_id, plan.round) - 1
        event, again = self._mechanism.charge(plan.round), self._mechanism.charge(plan.round, repeat=True)
        self._pending = [e for e in (event, *[again] * doubts) if e is not None]

    def void(self, plan: RoundPlan, evidence: str) -> None:
        """Give back what was set aside: nothing was released."""
        self._ledger.void(self._run_id, plan.round, plan.attempt, evidence)
        self._pending = []

    def left_out(self, plan: RoundPlan) -> None:
        """Leave charged what was set aside for a burnt round, which is not tried again.

        Devices have agreed on a sum. Under distributed trust the coordinator may have learnt it, if only to
        find that it is of too few; and a charge for the whole run, made in its first round, is made once.
        Whose updates they are nobody can tell after a crash: all that were asked have taken part.
        """
        self._ledger.releasing(self._run_id, plan.round, plan.attempt)
        before = self._state
        self._state = self._spent(self._seen(before, plan.round, sorted(plan.cohort)))
        if (extra := self._violation(before, self._state)) is not None:
            self._owed.append(extra)
        self._round = plan.round

    # --- the release --------------------------------------------------------------------------------

    def release(self, plan: RoundPlan, aggregator: Aggregator) -> NDArray[np.float64]:
        """The private mean update, (P,) float64; the aggregator's sum is used up.

        The denominator is the planned cohort: how many have answered depends on the devices. The noise is
        made for the clip of this attempt; the clip of the next round is found here.

        Raises:
            RunError: the updates were not added exactly.
        """
        if not isinstance(aggregator, Accumulator):
            raise RunError(f"Noise is added to exact sums; {plan.aggregation.name!r} makes none.")
        shape, total = self._ready.shape(self._clip), aggregator.subtotal().total
        if (plan.clip_norm, plan.grid_step) != (shape.clip_norm, shape.grid_step):
            raise RunError("The plan of this attempt was made for another clip norm than its noise.")
        stream, mechanism = self._bound_stream(plan, total), self._mechanism
        reached("noise.bound")
        if isinstance(mechanism, Independent):
            mechanism = replace(mechanism, norm_bound=shape.norm_bound)
        self._following = mechanism.release(total, plan.round, stream).following
        reached("noise.added")
        self._read_tail(shape, total[plan.sent_size :].tolist())
        return scaled(total[: plan.sent_size], plan.grid_step / self._spec.cohort.size)

    def _bound_stream(self, plan: RoundPlan, total: NDArray[np.int64]) -> Keystream:
        """The noise of this attempt, bound to this very sum before any of it is drawn.

        After a crash the same noise may be added once more, but to nothing else: the sum's hash is sealed
        with the key. The release is then the one that was begun, not a second one.

        Raises:
            StateCorrupt: a release of another sum was begun; adding this noise would show the difference.
        """
        digest = hashlib.sha256(total.view(np.uint8).data).digest()
        name = f"{self._run_id}/{plan.attempt}"
        sealed = seal(self._noise_key(plan) + digest, self._key, run_id=name, round_number=plan.round)
        sealed = self._ledger.releasing(self._run_id, plan.round, plan.attempt, sealed)
        begun = unseal(sealed, self._key, run_id=name, round_number=plan.round)
        if begun[NOISE_KEY_BYTES:] != digest:
            raise StateCorrupt(
                f"Round {plan.round} of run {self._run_id}: noise was bound to another sum than this one.",
                hint="Updates were lost or altered on the disk. The release stays charged; start a new run.",
            )
        return Keystream(begun[:NOISE_KEY_BYTES])

    def _read_tail(self, shape: Shape, tail: list[int]) -> None:
        """What the noisy sums behind the update say."""
        planned, part, self._next_clip = self._spec.cohort.size, shape.part, self._clip
        self._figures = {"clip_norm": shape.clip_norm}
        if part.bit and self._clip is not None:
            found = tail.pop(0)
            self._figures["clip_within"] = within(found, part.bit, planned)
            self._next_clip = self._clip.updated(found, part.bit, planned)
        if part.metrics:
            examples, losses = (max(0.0, value / part.metrics) for value in tail)
            self._figures["examples"] = examples * part.most_examples
            if examples:
                self._figures["loss"] = min(1.0, losses / examples) * part.most_loss

    def commit(self, plan: RoundPlan, accepted: Iterable[str]) -> PrivateState:
        """Settle a release.

        Args:
            plan: of the attempt.
            accepted: the devices whose updates are in the sum.

        Returns:
            What is to be committed with the round.
        """
        self._ledger.commit(self._run_id, plan.round, plan.attempt)
        self._mechanism, self._round, self._clip = self._following, plan.round, self._next_clip
        before = self._state
        seen = self._spent(self._seen(before, plan.round, sorted(accepted)))
        if (found := self._violation(before, seen)) is not None:
            self._owed.append(found)
        for extra in self._owed:
            self._ledger.record(self._run_id, plan.round, plan.attempt, extra)
            seen = _charged(seen, extra)
        self._owed = []
        clip = self._clip.clip_norm if self._clip else 0.0
        self._state = replace(seen, noise=self._sealed(plan.round), noise_round=plan.round, clip=clip)
        return self._state

    def _spent(self, state: PrivateState) -> PrivateState:
        """With the costs of the attempt in hand, which is over."""
        for event in self._pending:
            state = _charged(state, event)
        self._pending = []
        return state

    def _sealed(self, round_number: int) -> bytes:
        if not isinstance(self._mechanism, Correlated):
            return b""
        state = self._mechanism.state()
        return seal(state, self._key, run_id=self._run_id, round_number=round_number)

    def _seen(self, state: PrivateState, round_number: int, accepted: Sequence[str]) -> PrivateState:
        """The participations after a round, and how far the contract was kept."""
        if not self._privacy.has_contract:
            return state
        took_part = dict(state.took_part)
        separation, times = state.separation, state.times
        for device_id in accepted:
            last, before = took_part.get(device_id, (round_number - separation, 0))
            separation = min(separation, max(1, round_number - last))
            times = max(times, before + 1) if times else 0
            took_part[device_id] = round_number, before + 1
        if not times:  # only the separation is promised: whoever has rested is as if never asked
            rested = round_number + 1 - self._privacy.min_separation
            took_part = {d: pair for d, pair in took_part.items() if pair[0] > rested}
        return replace(state, took_part=took_part, separation=separation, times=times)

    def _violation(self, before: PrivateState, after: PrivateState) -> Event | None:
        """What a broken contract costs on top, so that all charges together are those of the run as it is."""
        if (before.separation, before.times) == (after.separation, after.times):
            return None
        rounds = self._spec.rounds
        if isinstance(self._start, DistributedNoise) and self._start.participations:
            times = [participations(rounds, s.separation, s.times) for s in (before, after)]
            extra = times[1] - times[0]
            return self._start.event_of(extra) if extra > 0 else None
        planned, actual = self._whole(rounds, before), self._whole(rounds, after)
        if not (isinstance(planned, Gaussian) and isinstance(actual, Gaussian)):
            return None
        more = 1 / actual.noise_multiplier**2 - 1 / planned.noise_multiplier**2
        return Gaussian(1 / sqrt(more)) if more > 0 else None

    def _whole(self, rounds: int, state: PrivateState) -> Event | None:
        """What so many rounds cost together; None where each round is charged by itself."""
        if isinstance(self._start, Correlated):
            return self._start.event_of(rounds, state.separation, state.times)
        if isinstance(self._start, Independent | DistributedNoise) and self._start.participations:
            return self._start.event_of(participations(rounds, state.separation, state.times))
        return None

    # --- what may be told ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Of the last committed round.

        ``epsilon`` is what the rounds so far have cost, ``epsilon_charged`` what is charged for them:
        correlated noise is paid before the first round, for all of them.
        """
        counts, whole = dict(self._state.charged), self._whole(self._spec.rounds, self._fresh())
        if whole is not None and counts.get(whole):
            so_far = self._whole(self._round, self._fresh())
            assert so_far is not None  # as above
            counts[whole] -= 1
            counts[so_far] = counts.get(so_far, 0) + 1
        return {
            "epsilon": self._epsilon(counts),
            "epsilon_charged": self._epsilon(self._state.charged),
            "delta": self._privacy.delta,
            "noise_multiplier": self._ready.noise_multiplier,
            **self._figures,
        }

    def _epsilon(self, counts: Mapping[Event, int]) -> float:
        reader = budget_of(self._spec, self._ready, self._run_id).reader(counts)
        return reader.epsilon(counts, self._privacy.delta)


def example_metrics(privacy: PrivacySpec) -> dict[str, float]:
    """What may be told of a round whose devices protect their own rows: what was asked of them.

    Each device spends its own budget; ``epsilon`` is the most that the run asks of one.
    """
    told = {"delta": privacy.delta, "clip_norm": privacy.clip_norm}
    asked = {"epsilon": privacy.epsilon, "noise_multiplier": privacy.noise_multiplier}
    return told | {name: value for name, value in asked.items() if value}


def redact(collected: Collected) -> None:
    """Forget what devices said of themselves: losses, example counts, seconds, and the words of refusals."""
    collected.sums = {}
    collected.participation = {
        device_id: entry._replace(detail="", num_examples=0, seconds=0.0)
        for device_id, entry in collected.participation.items()
    }


def scaled(total: NDArray[np.int64], factor: float) -> NDArray[np.float64]:
    """``total * factor`` in the place of ``total``, which is used up."""
    mean = total.view(np.float64)  # same item size
    for start in range(0, len(mean), BLOCK):
        part = slice(start, start + BLOCK)
        mean[part] = total[part] * factor
    return mean


def _charged(state: PrivateState, event: Event) -> PrivateState:
    return replace(state, charged={**state.charged, event: state.charged.get(event, 0) + 1})


def _privacy(spec: RunSpec) -> PrivacySpec:
    if spec.privacy is None:
        raise RunError("This run asks for no privacy.")
    return spec.privacy
