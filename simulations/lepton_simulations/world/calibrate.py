"""What a real fleet's devices are like, from the journals of short runs; how long other rounds would take.

    devices = calibrate([Replay.read(path)], shared_cores=2)     # 0: each device is a machine of its own
    world = World.build(WorldConfig(devices=devices), ids, seed=0)
    round_seconds(world, spec, rows)                             # of a run with other settings

Only differences can be told apart: runs that differ in cohort and in local work separate what a round costs
at all, what each device adds to it, and what each example adds. From runs that are all alike the devices' own
seconds say what an example costs, and the rest is taken for work of the devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError
from lepton_fl.plan import LocalPlan, RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.cohort import draw, eligible
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_simulations.world.config import DeviceClass, DevicesConfig, Spread
from lepton_simulations.world.cores import finished
from lepton_simulations.world.replay import Attempt, Replay
from lepton_simulations.world.world import World

Floats = NDArray[np.float64]

WARM_UP = 1  # rounds at the start of a run in which devices load what they need
_OWN_SECONDS = 0.1  # weight of a device's own seconds against those of the round
_STEPS = 30  # of the fit
_EXACT = 0.01  # a relative error that is as good as none


@dataclass(frozen=True)
class Observation:
    """One committed round in which every device of the cohort was counted."""

    seconds: float  # of the round
    ids: tuple[str, ...]
    examples: Floats  # (k,) that each device worked on
    own: Floats  # (k,) seconds of each device
    arrived: Floats  # (k,) seconds since the request; NaN where it is not recorded


def examples_of(local: LocalPlan, rows: int) -> int:
    """How many examples a device with so many rows works on in a training round."""
    examples = rows * local.epochs
    return min(examples, local.max_steps * local.batch_size) if local.max_steps else examples


def calibrate(replays: Sequence[Replay], *, shared_cores: float = 0.0) -> DevicesConfig:
    """Describe the devices of recorded runs.

    Args:
        replays: of one fleet; the first round of each is left out.
        shared_cores: the devices and the coordinator were processes of one host with so many cores; 0 = each
            device had a machine of its own.

    Raises:
        ConfigError: there is no complete round to learn from.
    """
    seen = [o for replay in replays for o in observations(replay)]
    if not seen:
        raise ConfigError(
            f"None of the {len(replays)} journals has a round after round {WARM_UP} in which every device of "
            "the cohort was counted.",
            hint="Record a run of some rounds with over_selection = 1 and nobody missing.",
        )
    one = _of_one_host(seen, shared_cores) if shared_cores else _of_own_machines(seen)
    factor = _evaluation_factor(replays, seen)
    one = one.model_copy(update={"name": "calibrated", "evaluation_factor": factor})
    return DevicesConfig(classes=(one,), shared_cores=shared_cores)


def observations(replay: Replay) -> Iterator[Observation]:
    """The rounds of a run that can be learnt from."""
    for attempt in replay.attempts:
        if attempt.committed and attempt.round > WARM_UP and len(attempt.counted) == len(attempt.cohort):
            yield _observation(attempt, replay.spec.local)


def _observation(attempt: Attempt, local: LocalPlan) -> Observation:
    parts = attempt.counted
    return Observation(
        attempt.seconds,
        tuple(part.device_id for part in parts),
        np.array([examples_of(local, part.examples) for part in parts], np.float64),
        np.array([part.seconds for part in parts]),
        np.array([np.nan if part.arrived_s is None else part.arrived_s for part in parts]),
    )


# --- processes of one host --------------------------------------------------------------------------


def _of_one_host(seen: Sequence[Observation], cores: float) -> DeviceClass:
    """Fit seconds per request, per device and per example to the seconds of rounds and devices.

    The model is the world's own. It is homogeneous: with J its derivatives, J(theta) theta is what it says,
    so solving J theta' = measured again and again converges like Gauss and Newton's method. Relative errors
    count by their size, not by their square (iteratively reweighted): a round in which the host was busy with
    something else spoils nothing.
    """
    theta = np.array([0.0, 1e-3, _plain_cost(seen, cores)])
    measured = np.concatenate([[o.seconds, _OWN_SECONDS * o.own.mean()] for o in seen])
    relative = np.repeat([1.0 / o.seconds for o in seen], 2)
    for _ in range(_STEPS):
        stray = np.abs(_predicted(theta, seen, cores) - measured) * relative
        weight = relative / np.sqrt(np.maximum(stray, _EXACT))
        columns = _derivatives(theta, seen, cores)
        theta = 0.5 * (theta + _non_negative(columns * weight[:, None], measured * weight))
    latency, overhead, cost = map(float, theta)
    return DeviceClass(
        speed=Spread(value=1.0 / cost if cost > 0 else 0.0),
        overhead_s=Spread(value=overhead),
        latency_s=Spread(value=latency / 2),  # of the request and of the reply
    )


def _plain_cost(seen: Sequence[Observation], cores: float) -> float:
    """Seconds per example, if all of the cohort train at the same time."""
    return float(np.mean([o.own.mean() / (o.examples.mean() * max(1.0, len(o.own) / cores)) for o in seen]))


def _predicted(theta: Floats, seen: Sequence[Observation], cores: float) -> Floats:
    latency, overhead, cost = theta
    said = []
    for o in seen:
        work = np.stack([np.full(len(o.examples), overhead), cost * o.examples], axis=1)
        done = finished(np.zeros(len(work)), work, cores)
        said += [latency + done.max(), _OWN_SECONDS * float((done[:, 1] - done[:, 0]).mean())]
    return np.array(said)


def _derivatives(theta: Floats, seen: Sequence[Observation], cores: float) -> Floats:
    columns = []
    for place in range(len(theta)):
        step = np.zeros(len(theta))
        step[place] = max(1e-9, 1e-4 * theta[place])
        up, down = theta + step, np.maximum(0.0, theta - step)
        change = _predicted(up, seen, cores) - _predicted(down, seen, cores)
        columns.append(change / (up - down)[place])
    return np.stack(columns, axis=1)


def _non_negative(columns: Floats, target: Floats) -> Floats:
    """The least-squares solution without negative numbers, by trying which of the few unknowns are 0."""
    count = columns.shape[1]
    best, least = np.zeros(count), float(np.sum(target**2))
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            found, *_ = np.linalg.lstsq(columns[:, chosen], target, rcond=None)
            rest = float(np.sum((columns[:, chosen] @ found - target) ** 2))
            if (found >= 0).all() and rest < least * (1 - 1e-9):  # of equally good ones the simplest
                best, least = np.zeros(count), rest
                best[list(chosen)] = found
    return best


# --- machines of their own --------------------------------------------------------------------------


def _of_own_machines(seen: Sequence[Observation]) -> DeviceClass:
    """Speeds from the devices' own seconds; what is left of the time to their arrival is overhead."""
    costs: dict[str, list[float]] = {}
    for o in seen:
        for device_id, cost in zip(o.ids, o.own / o.examples, strict=True):
            costs.setdefault(device_id, []).append(float(cost))
    typical = np.array([np.median(c) for c in costs.values()])
    if not (typical > 0).all():
        raise ConfigError("A device reports that its work took no time; nothing can be learnt from that.")
    strays = [np.log(np.array(c) / np.median(c)) for c in costs.values()]
    rest = np.concatenate([_rest(o) for o in seen])
    return DeviceClass(
        speed=Spread(
            kind="lognormal",
            median=float(1.0 / np.median(typical)),
            sigma=min(5.0, float(np.std(np.log(typical)))),
        ),
        jitter=min(5.0, float(np.sqrt(np.mean(np.concatenate(strays) ** 2)))),
        overhead_s=Spread(value=max(0.0, float(np.median(rest)))),
    )


def _rest(o: Observation) -> Floats:
    """Seconds of an answer's way that were not the device's own; without arrivals, of the last one."""
    if np.isfinite(o.arrived).all():
        return np.asarray(o.arrived - o.own)
    return np.array([o.seconds - o.own.max()])


def _evaluation_factor(replays: Sequence[Replay], seen: Sequence[Observation]) -> float:
    """How much faster an example is evaluated than trained on, by the devices' own seconds."""
    parts = [p for r in replays for a in r.attempts if a.kind == "evaluate" for p in a.counted]
    evaluation = sum(part.seconds for part in parts)
    if not evaluation:
        return DeviceClass().evaluation_factor
    training = sum(float(o.own.sum()) for o in seen) / sum(float(o.examples.sum()) for o in seen)
    factor = training / (evaluation / sum(part.examples for part in parts))
    return min(1e6, max(1e-3, factor))


# --- prediction -------------------------------------------------------------------------------------


def round_seconds(
    world: World,
    spec: RunSpec,
    rows: Mapping[str, int],
    *,
    num_coordinates: int = 1,
    seed: int = 0,
) -> list[float]:
    """How long the rounds of a run take in a world; nothing is trained.

    Args:
        world: the devices; its clock is moved.
        spec: of the run.
        rows: training rows of each device.
        num_coordinates: P of the model.
        seed: of the cohorts.

    Returns:
        Virtual seconds of each round, abandoned attempts left out.
    """
    rng = Random(seed)  # noqa: S311 - a prediction is to be repeatable
    work = Work(spec.task, "", "0" * 64, num_coordinates, TrainingLoss())
    took = []
    for number in range(1, spec.rounds + 1):
        ids = eligible(world.candidates(world.clock()))
        asked = draw(ids, int(np.ceil(spec.cohort.size * spec.cohort.over_selection)), rng)
        state = RunState(np.zeros(1, np.float32), attempt=1)
        plan = plan_round(spec, "prediction", work, "train", number, state, asked, spec.cohort.size, "0")
        size = 4 * num_coordinates
        fates = world.fates(plan, lambda d: examples_of(spec.local, rows[d]), size, size)
        answers = [fate.arrives_s for fate in fates if fate.answers and not fate.damage]
        in_time = [a for a in answers if a <= plan.deadline_s][: plan.wanted_reports]
        closed = len(in_time) == plan.wanted_reports
        seconds = in_time[-1] if closed else min(plan.deadline_s, fates[-1].arrives_s)
        if len(in_time) >= plan.min_reports:
            took.append(seconds)
        world.clock.advance(seconds)
    return took
