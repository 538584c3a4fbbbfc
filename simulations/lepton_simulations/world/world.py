"""The world around a virtual fleet: who is there, how long everything takes, and what goes wrong.

    world = World.build(WorldConfig(devices=..., faults=...), fleet.devices, seed=0)
    for fate in world.fates(plan, rows_times_epochs, bytes_down, bytes_up):   # in the order of arrival
        if fate.answers: ...                                       # train it; it arrives at fate.arrives_s

Rules. Everything is drawn from (seed, device, kind, round, attempt), never from the order of calls, so a run
is the same however it is computed, and can be resumed. Time is virtual: nothing here sleeps or reads a clock
of this machine. What happens to a device in an attempt does not depend on the others, unless all share the
cores of one host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import NotFound, Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.federated import FederatedDataset
from lepton_fl.wire.records import Records
from lepton_simulations.world import harm
from lepton_simulations.world.clock import VirtualClock
from lepton_simulations.world.config import DeviceClass, FaultsConfig, Spread, WorldConfig
from lepton_simulations.world.cores import finished
from lepton_simulations.world.draws import (
    Floats,
    Keys,
    chosen,
    dealt,
    device_keys,
    generator,
    normal,
    uniform,
)
from lepton_simulations.world.timetable import Flags, Rows, Timetable, timetable

Stage = Literal["", "offline", "download", "training", "upload"]
Examples = Mapping[str, int] | Callable[[str], int]
_STAGES: Final[tuple[Stage, ...]] = ("", "offline", "download", "training", "upload")
SECURE_STAGES: Final = ("adverts", "shares", "consents", "reveals")
_OFFLINE, _DOWNLOAD, _TRAINING, _UPLOAD = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one device in one attempt."""

    device_id: str
    arrives_s: float  # virtual seconds after the request was sent; inf = nothing ever comes
    seconds: float = 0.0  # the device's own working time, as it will report it
    stage: Stage = ""  # in which it drops out; "" = it does not
    damage: str = ""  # how its reply is damaged in transit, a key of ``DAMAGES``; "" = not
    attack: str = ""  # what it does on purpose; "" = it is honest
    refusal: str = ""  # a Rejection: at ``arrives_s`` comes not an answer but this word; "" = an answer
    detail: str = ""  # of the refusal

    @property
    def answers(self) -> bool:
        """Whether a reply comes, and so must be computed."""
        return not self.stage and not self.refusal

    @property
    def ordinary(self) -> bool:
        """Whether its reply, if one comes, is what training gave: nobody need look at it singly."""
        return not self.damage and self.attack not in harm.UPDATE_ATTACKS

    def word(self) -> UpdateRejected:
        """What the coordinator hears at ``arrives_s`` where ``refusal`` is set."""
        reason = Rejection(self.refusal or Rejection.OFFLINE)
        return UpdateRejected(reason, self.detail or f"Device {self.device_id}: {reason.value}.")


@dataclass(frozen=True, eq=False)
class _Devices:
    """What is fixed about n devices, in their order."""

    ids: tuple[str, ...]
    keys: Keys  # (n,)
    speed_s: Floats  # seconds per training example
    evaluation: Floats  # seconds per example of an evaluation
    overhead_s: Floats
    down_s: Floats  # seconds per byte
    up_s: Floats
    latency_s: Floats
    jitter: Floats  # sigma
    skew_s: Floats
    corrupt: Flags
    corrupt_data: Flags
    malicious: Flags
    kind: NDArray[np.int64]  # its class
    place: NDArray[np.int64]  # among those of its class
    tables: tuple[Timetable, ...]  # of each class


class World:
    """See the module."""

    def __init__(
        self, config: WorldConfig, devices: _Devices, seed: int, clock: VirtualClock | None = None
    ) -> None:
        self.config = config
        self.clock = clock or VirtualClock()
        self.seed = seed
        self._devices = devices
        self._row = {device_id: row for row, device_id in enumerate(devices.ids)}
        self._eligible = tuple(Candidate(d, "eligible") for d in devices.ids)
        self._offline = [Candidate(d, "offline", "outside its hours") for d in devices.ids]
        self._steady = not _changes(config)
        self._ideal = {d: Fate(d, 0.0) for d in devices.ids} if config == WorldConfig() else None

    @classmethod
    def build(cls, config: WorldConfig, device_ids: Sequence[str], seed: int = 0) -> Self:
        """Draw what is fixed about every device.

        Raises:
            ConfigError: a trace cannot be used.
        """
        return cls(config, draw_devices(config, tuple(device_ids), seed), seed)

    @property
    def faults(self) -> FaultsConfig:
        """What was declared to go wrong."""
        return self.config.faults

    # --- who is there -------------------------------------------------------------------------------

    def standings(self, now: float) -> Flags:
        """Who can be reached at ``now``: (n,) bool, in the order of the devices."""
        return self._state(now)[0]

    def next_change(self, now: float) -> float:
        """When the standing of some device changes next; inf = never."""
        return inf if self._steady else float(self._state(now)[1].min(initial=inf))

    def candidates(self, now: float, unfit: Mapping[str, str] | None = None) -> Sequence[Candidate]:
        """Every device with its standing, for a roster; the very same tuple as long as nothing can change.

        Args:
            now: virtual seconds.
            unfit: device -> how its data break the contract; these sit out.
        """
        if self._steady:
            if not unfit:
                return self._eligible
            found = list(self._eligible)
        else:
            there = self.standings(now).tolist()
            pairs = zip(self._eligible, self._offline, there, strict=True)
            found = [yes if is_there else no for yes, no, is_there in pairs]
        for device_id, why in (unfit or {}).items():
            found[self._row[device_id]] = Candidate(device_id, "data-contract", why)
        return found

    def _state(self, now: float, rows: Rows | None = None) -> tuple[Flags, Floats]:
        """Who of ``rows`` is there, and until when that stays so."""
        devices = self._devices
        count = len(devices.ids) if rows is None else len(rows)
        there, until = np.ones(count, bool), np.full(count, inf)
        if self._steady:
            return there, until
        kind = devices.kind if rows is None else devices.kind[rows]
        place = devices.place if rows is None else devices.place[rows]
        for number, table in enumerate(devices.tables):
            at = np.flatnonzero(kind == number)
            there[at], until[at] = table.at(now, place[at])
        return there, until

    # --- what is declared -------------------------------------------------------------------------

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Every device with the name of its class, if that has one."""
        names = [(c.name,) if c.name else () for c in self.config.devices.classes] or [()]
        kinds = self._devices.kind.tolist()
        return {d: names[kind] for d, kind in zip(self._devices.ids, kinds, strict=True)}

    def usual_seconds(self, examples: Examples, bytes_down: int, bytes_up: int) -> dict[str, float]:
        """How long an attempt takes each device that has a core of its own; empty where nothing takes time.

        Args:
            examples: as in ``fates``.
            bytes_down: of the request, for each device.
            bytes_up: of a reply.
        """
        d = self._devices
        took = d.overhead_s + _counts(d.ids, examples) * d.speed_s
        took += 2 * d.latency_s + bytes_down * d.down_s + bytes_up * d.up_s
        return dict(zip(d.ids, took.tolist(), strict=True)) if took.any() else {}

    # --- one attempt --------------------------------------------------------------------------------

    def fates(
        self,
        plan: RoundPlan,
        examples: Examples,
        bytes_down: int,
        bytes_up: int,
        asked_s: float | None = None,
    ) -> list[Fate]:
        """What becomes of every device of ``plan.cohort``.

        Args:
            plan: the attempt.
            examples: how many examples a device works on: rows * epochs, or steps * batch size.
            bytes_down: of the request, for each device.
            bytes_up: of a reply.
            asked_s: when it is asked, in virtual seconds; None = now.

        Returns:
            In the order of arrival, devices of the same moment in that of the cohort; those of which nothing
            comes last.

        Raises:
            NotFound: a device is not of this fleet.
        """
        rows = self._rows(plan.cohort)
        if self._ideal is not None:
            return [self._ideal[device_id] for device_id in plan.cohort]
        about = (plan.kind, plan.round, plan.attempt)
        count = _counts(plan.cohort, examples)
        now = self.clock.now_s if asked_s is None else asked_s
        course = self._course(rows, about, now, count, bytes_down, bytes_up, self._gone(plan))
        arrives = np.where(course.stage > 0, self._given_up(course.drops_s), course.arrives_s)
        order = np.argsort(arrives, kind="stable").tolist()
        arrives_s, seconds, stages = arrives.tolist(), course.seconds.tolist(), course.stage.tolist()
        damages = self._damages(rows)
        bad = self._devices.malicious[rows].tolist()
        attack, silence = self.faults.attack, self.faults.silence_s
        fates = []
        for i in order:
            device_id, stage = plan.cohort[i], _STAGES[stages[i]]
            if stage:
                word = f"Device {device_id} fell silent ({stage}) and was given up after {silence:g} s."
                refusal, detail = (Rejection.OFFLINE.value, word) if silence else ("", "")
                fates.append(Fate(device_id, arrives_s[i], 0.0, stage, refusal=refusal, detail=detail))
            else:
                does = attack if bad[i] else ""
                fates.append(Fate(device_id, arrives_s[i], seconds[i], "", damages.get(i, ""), does))
        return fates

    def leaves(self, plan: RoundPlan) -> dict[str, str]:
        """Who falls silent at which stage of a secure aggregation, training and its upload apart."""
        if plan.secure is None or plan.kind != "train":
            return {}
        keys, found = self._devices.keys[self._rows(plan.cohort)], dict[str, str]()
        for stage in reversed(SECURE_STAGES):  # the first one counts
            if chance := float(getattr(self.faults, f"drop_{stage}")):
                drawn = uniform(keys, "drop", stage, plan.round, plan.attempt) < chance
                found |= {plan.cohort[int(i)]: stage for i in np.flatnonzero(drawn)}
        return found

    def _gone(self, plan: RoundPlan) -> Flags:
        """Who is not even asked to train, because it has left the protocol before."""
        early = {device for device, stage in self.leaves(plan).items() if stage in ("adverts", "shares")}
        return np.array([device in early for device in plan.cohort], bool)

    def cheats(self, fault: Literal["bad_shares", "wrong_shares"]) -> frozenset[str]:
        """Who does such a thing in every secure round."""
        marked = chosen(self._devices.keys, float(getattr(self.faults, fault)), fault)
        return frozenset(self._devices.ids[int(i)] for i in np.flatnonzero(marked))

    def repeated(self, plan: RoundPlan, stage: str) -> frozenset[str]:
        """Whose message of this stage of a secure aggregation comes twice."""
        if not self.faults.repeats:
            return frozenset()
        keys = self._devices.keys[self._rows(plan.cohort)]
        drawn = uniform(keys, "repeat", stage, plan.round, plan.attempt) < self.faults.repeats
        return frozenset(plan.cohort[int(i)] for i in np.flatnonzero(drawn))

    def crashes(self, plan: RoundPlan) -> bool:
        """Whether the coordinator dies in this attempt: the cohort has been asked, and its work is lost."""
        return plan.kind == "train" and plan.attempt == 1 and plan.round in self.faults.crash_rounds

    def downtime_s(self, plan: RoundPlan) -> float:
        """How long after sending the request a coordinator that ``crashes`` is back."""
        return self.faults.restart_s

    def _rows(self, cohort: Sequence[str]) -> Rows:
        try:
            return np.array([self._row[d] for d in cohort], np.int64)
        except KeyError as error:
            raise NotFound(
                f"Device {error.args[0]!r} is not among the {len(self._row)} of this fleet."
            ) from None

    def _given_up(self, drops_s: Floats) -> Floats:
        return drops_s + self.faults.silence_s if self.faults.silence_s else np.full(len(drops_s), inf)

    def _course(
        self,
        rows: Rows,
        about: tuple[object, ...],
        now: float,
        count: Floats,
        bytes_down: int,
        bytes_up: int,
        gone: Flags,
    ) -> "_Course":
        d = self._devices
        per_example = d.evaluation[rows] if about[0] == "evaluate" else d.speed_s[rows]
        down = d.latency_s[rows] + bytes_down * d.down_s[rows]
        up = d.latency_s[rows] + bytes_up * d.up_s[rows]
        vary = np.exp(d.jitter[rows] * normal(d.keys[rows], "jitter", *about)) if d.jitter.any() else 1.0
        overhead, work = d.overhead_s[rows] * vary, count * per_example * vary
        there, until = self._state(now, rows)
        stage = np.where(there & ~gone, self._drop_stage(d.keys[rows], about), _OFFLINE)
        part = uniform(d.keys[rows], "moment", *about)  # of the stage in which it drops out
        runs = np.where(stage == _TRAINING, part, stage != _OFFLINE) * (stage != _DOWNLOAD)
        phases = np.stack([overhead * (runs > 0), work * runs], axis=1)
        done = finished(down, phases, self.config.devices.shared_cores)
        trained, arrives = done[:, 1], done[:, 1] + up
        drops = np.select(
            [stage == _DOWNLOAD, stage == _TRAINING, stage == _UPLOAD],
            [part * down, trained, trained + part * up],
        )
        left = until - now  # its window ends in mid-round
        leaves = there & (left < np.where(stage > 0, drops, arrives))
        then = np.select([left < down, left < trained], [_DOWNLOAD, _TRAINING], _UPLOAD)
        stage, drops = np.where(leaves, then, stage), np.where(leaves, left, drops)
        seconds = np.maximum(0.0, trained - done[:, 0] + d.skew_s[rows])
        return _Course(stage, drops, arrives, seconds)

    def _drop_stage(self, keys: Keys, about: tuple[object, ...]) -> NDArray[np.int64]:
        """The first stage in which a device falls silent; 0 = none."""
        faults, stage = self.faults, np.zeros(len(keys), np.int64)
        for number, chance in (
            (_UPLOAD, faults.drop_upload),
            (_TRAINING, faults.drop_training),
            (_DOWNLOAD, faults.drop_download),
            (_OFFLINE, faults.drop_out),
        ):
            if chance:
                stage[uniform(keys, "drop", number, *about) < chance] = number
        return stage

    def _damages(self, rows: Rows) -> dict[int, str]:
        """Place in the cohort -> damage, of the corrupt devices."""
        at = np.flatnonzero(self._devices.corrupt[rows])
        names = list(harm.DAMAGES)
        kinds = uniform(self._devices.keys[rows[at]], "damage") * len(names)
        return {int(i): names[int(kind)] for i, kind in zip(at, kinds, strict=True)}

    # --- what corrupt and malicious devices do ------------------------------------------------------

    def spoil(self, fate: Fate, reply: Records) -> Records:
        """A device's reply as it arrives: changed by its attack, then by the damage; else as it is."""
        if fate.attack in harm.UPDATE_ATTACKS:
            about = (reply.config.get("round"), reply.config.get("attempt"))
            rng = generator(int(self._devices.keys[self._row[fate.device_id]]), "attack", *about)
            reply = harm.attacked(reply, fate.attack, self.faults.attack_factor, rng)
        return harm.DAMAGES[fate.damage](reply) if fate.damage else reply

    def poisoned(self, device_id: str, data: Dataset, num_classes: int) -> Dataset:
        """Prepared training rows as a device uses them: with false labels if it is a label flipper.

        Args:
            device_id: whose.
            data: prepared rows.
            num_classes: of the task's contract; 0 = the targets are numbers.
        """
        row = self._row[device_id]
        flips = self.faults.attack == "label_flip" and bool(self._devices.malicious[row])
        return harm.flipped(data, num_classes) if flips else data

    def corrupted(self, device_id: str, raw: Dataset) -> Dataset:
        """Raw rows as a device holds them: breaking the data contract if its data are corrupt."""
        row = self._row[device_id]
        if not self._devices.corrupt_data[row]:
            return raw
        return harm.broken(raw, float(uniform(self._devices.keys[row : row + 1], "broken rows")[0]))

    def training_rows(self, device_id: str, data: FederatedDataset) -> Dataset:
        """A device's prepared training rows, with all that is wrong with them.

        Raises:
            DataContractError: its rows break the contract.
        """
        prepared = data.task.prepare(self.corrupted(device_id, data.raw(device_id)))
        return self.poisoned(device_id, prepared, data.task.contract.num_classes)


@dataclass(frozen=True, eq=False)
class _Course:
    """How an attempt goes for a cohort, (k,) each; seconds since the request was sent."""

    stage: NDArray[np.int64]
    drops_s: Floats  # when it drops out, where it does
    arrives_s: Floats  # where it does not
    seconds: Floats


def _counts(cohort: Sequence[str], examples: Examples) -> Floats:
    one = examples.__getitem__ if isinstance(examples, Mapping) else examples
    return np.array([one(device_id) for device_id in cohort], np.float64)


# --- drawing the fleet ------------------------------------------------------------------------------


def draw_devices(config: WorldConfig, ids: tuple[str, ...], seed: int) -> _Devices:
    """Draw what is fixed about every device."""
    faults, keys = config.faults, device_keys(seed, ids)
    classes = config.devices.classes or (DeviceClass(),)
    if classes[0].part is not None:  # by their place in the fleet
        ends = [c.part[1] for c in classes if c.part is not None]
        kind = np.searchsorted(ends, (np.arange(len(ids)) + 0.5) / len(ids))
    else:
        kind = dealt(keys, [c.share for c in classes], "class")
    slow = np.where(chosen(keys, faults.stragglers, "straggler"), faults.slowdown, 1.0)
    tables, place = [], np.zeros(len(ids), np.int64)
    for number, one in enumerate(classes):
        members = np.flatnonzero(kind == number)
        place[members] = np.arange(len(members))
        tables.append(timetable(one.availability, [ids[m] for m in members], keys[members]))

    def draw(name: str) -> Floats:
        return _draw_spread(keys, kind, [getattr(c, name) for c in classes], name)

    speed_s = _seconds_per(draw("speed")) * slow
    skew = faults.clock_skew_s * (2.0 * uniform(keys, "clock skew") - 1.0)
    return _Devices(
        ids=ids,
        keys=keys,
        speed_s=speed_s,
        evaluation=speed_s / np.array([c.evaluation_factor for c in classes])[kind],
        overhead_s=draw("overhead_s") * slow,
        down_s=_seconds_per(draw("down")) * slow,
        up_s=_seconds_per(draw("up")) * slow,
        latency_s=draw("latency_s"),
        jitter=np.array([c.jitter for c in classes])[kind],
        skew_s=skew,
        corrupt=chosen(keys, faults.corrupt, "corrupt"),
        corrupt_data=chosen(keys, faults.corrupt_data, "corrupt data"),
        malicious=chosen(keys, faults.malicious, "malicious"),
        kind=kind,
        place=place,
        tables=tuple(tables),
    )


def _draw_spread(keys: Keys, kind: NDArray[np.int64], spreads: Sequence[Spread], name: str) -> Floats:
    """One number for each device, by the spread of its class."""
    values = np.empty(len(keys))
    for number, spread in enumerate(spreads):
        at = kind == number
        if spread.kind == "lognormal":
            values[at] = spread.median * np.exp(spread.sigma * normal(keys[at], name))
        elif spread.kind == "uniform":
            values[at] = spread.low + (spread.high - spread.low) * uniform(keys[at], name)
        else:
            values[at] = spread.value
    return values


def _seconds_per(rate: Floats) -> Floats:
    """Seconds per unit; a rate of 0 means that it takes no time."""
    return np.divide(1.0, rate, out=np.zeros_like(rate), where=rate > 0)


def _changes(config: WorldConfig) -> bool:
    return any(c.availability.kind != "always" for c in config.devices.classes)
