"""Secure aggregation on the real fleet: the stages of ``flsa/1`` between this process and the devices.

Everything that the protocol's session has heard and decided is written ahead (``attempts``): records in the
store, a decision synced before anybody hears of it, and masked vectors as devices' updates. None of it is
secret. A coordinator that is started again, here or on another host, goes on at the stage where it was;
devices give the same answers again. It asks for no other survivor set: that decision is recorded before it is
sent. Messages of devices are not synced one by one: a power cut that takes the last of them makes the devices
give them again.

    rounds = SecureFleet(exchange, fleet, signing, attempts, ...)
    collected, mean = rounds.collect(plan, request, exchange, time.monotonic, None)
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Final

from lepton_fl.crashpoints import reached
from lepton_fl.errors import NotFound, Rejection, StateCorrupt, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.collect import Brought, Clock, Collected, Finish, Participation
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.rounds.secure import Told, collect_secure, must_be_synced
from lepton_fl.rounds.secure_device import Offer
from lepton_fl.rounds.secure_sum import context_of, groups_of
from lepton_fl.rounds.secure_wire import StageAnswer, StageRequest
from lepton_fl.secagg.messages import Roster
from lepton_fl.secagg.server import Stage
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_server.attempts import AttemptLog, Attempts, Vectors
from lepton_server.exchange import FleetExchange, Stages
from lepton_server.fleet import Fleet
from lepton_server.patience import PASSING
from lepton_server.signing import Signing
from lepton_server.store import Attempt

log = logging.getLogger(__name__)

STAGES: Final = 4  # besides training
SHOW_AFTER_S: Final = 5.0  # a stage that takes longer is shown in `lepton run show`
SHOW_EVERY_S: Final = 20.0

_PHASES: Final = {Stage.SHARES: "offered", Stage.REVEALS: "unmasking"}
_WORDS: Final = {
    Stage.ADVERTS: "collecting keys",
    Stage.SHARES: "collecting key shares",
    Stage.UPLOADS: "training and collecting masked updates",
    Stage.CONSENTS: "collecting signatures under the list of survivors",
    Stage.REVEALS: "collecting the shares that take the masks off the sum",
}


class SecureFleet:
    """The secure rounds of one run (``rounds.secure.SecureRounds``)."""

    def __init__(
        self,
        exchange: FleetExchange,
        fleet: Fleet,
        signing: Signing,
        attempts: Attempts,
        *,
        stage_s: float,
        show: Callable[[str, float], None],
        insist: Callable[[Callable[[], object]], None],
        unfinished: RoundPlan | None = None,
        name_of: Callable[[str], str] = lambda device_id: device_id,
    ) -> None:
        """Prepare.

        Args:
            exchange: the way to the devices.
            fleet: has the keys that they have made ahead.
            signing: says whose signing keys are whose.
            attempts: keep what has come.
            stage_s: patience with each stage but training.
            show: told, now and then, at which stage a round is and whom it waits for, and for how long yet.
            insist: calls until it works, whatever the disk says (``Patience.insist``).
            unfinished: an attempt that a coordinator before this one has begun.
            name_of: what people call a device.
        """
        self._exchange, self._fleet, self._signing = exchange, fleet, signing
        self._attempts, self._stage_s = attempts, stage_s
        self._show, self._insist, self._name_of = show, insist, name_of
        self._begun = unfinished and attempt_of(unfinished)

    def collect(
        self, plan: RoundPlan, request: Request, exchange: Exchange, clock: Clock, finish: Finish | None
    ) -> Brought:
        """One attempt, new or cut off by a restart; see ``SecureRounds``.

        Raises:
            Interrupted: the coordinator shuts down; call it again with the same plan after the restart.
            StateError: what came could not be kept.
        """
        brought: list[Brought] = []
        self._insist(
            lambda: brought.append(self._collect(plan, request, clock, finish))
        )  # goes on where it was
        return brought[0]

    def _collect(self, plan: RoundPlan, request: Request, clock: Clock, finish: Finish | None) -> Brought:
        try:
            attempt = attempt_of(plan)
            kept, resumed = self._attempts.log(attempt), attempt == self._begun
            self._begun = attempt
            devices = _Devices(self, plan, request, resumed)
            return self._lead(plan, request, clock, finish, devices, kept)
        except StateCorrupt as error:
            # Whether a survivor set had gone out can no longer be told, so none may go out now.
            log.error("round %d: %s; it is given up", plan.round, error)
            return _given_up(plan, str(error)), None

    def _lead(
        self,
        plan: RoundPlan,
        request: Request,
        clock: Clock,
        finish: Finish | None,
        devices: "_Devices",
        kept: AttemptLog,
    ) -> Brought:
        going_on = False
        try:
            return collect_secure(
                plan,
                request,
                devices.ask,
                self._signing.trust,
                self._signing.deployment,
                clock=clock,
                spool=Vectors(lambda device: self._vector(plan, device)),
                journal=lambda record: _keep(kept, record, devices.stage),
                records=kept.found,
                tell=lambda device, refusal: self._exchange.tell(plan, device, refusal),
                finish=finish,
            )
        except PASSING:  # it goes on where it was, and devices must have their secrets then
            going_on = True
            raise
        finally:
            devices.close(going_on=going_on)

    def _vector(self, plan: RoundPlan, device: str) -> bytes | memoryview:
        """A masked vector out of its device's update."""
        try:
            records = self._exchange.kept(plan, device)
            if isinstance(records, UpdateRejected):
                raise records
            return StageAnswer.read(records).vector
        except (NotFound, UpdateRejected) as error:
            raise StateCorrupt(f"The masked vector of device {device} is lost: {error}") from error

    # --- for the devices of an attempt ----------------------------------------------------------------

    def open(self, plan: RoundPlan, resumed: bool) -> Stages:
        """The way to an attempt's devices."""
        seconds = plan.deadline_s + STAGES * self._stage_s
        return self._exchange.stages(plan, seconds, resumed=resumed)

    def offers(self, plan: RoundPlan, request: Request) -> dict[str, Offer]:
        """What each device is invited to."""
        name = self._signing.deployment
        groups = enumerate(groups_of(plan))
        each = ((Offer.of(context_of(plan, request, name, number)), group) for number, group in groups)
        return {device: offer for offer, group in each for device in group}

    def entered(self, plan: RoundPlan, stage: Stage) -> None:
        """An attempt is at a stage."""
        if (phase := _PHASES.get(stage)) is not None:
            self._exchange.moved(plan, phase)
            reached(f"round.{phase}")

    def patience(self, plan: RoundPlan, stage: Stage) -> float:
        """Seconds for a stage."""
        return plan.deadline_s if stage is Stage.UPLOADS else self._stage_s

    def take_advert(self, device_id: str) -> bytes | None:
        """A key that a device has made ahead."""
        return self._fleet.take_advert(device_id)

    def add_advert(self, device_id: str, advert: bytes) -> None:
        """Keep one for a later round."""
        self._fleet.add_advert(device_id, advert)

    def spend_adverts(self, rosters: Iterable[bytes]) -> None:
        """These rosters go out, perhaps again after a restart."""
        self._fleet.spend_adverts(a for roster in rosters for a in Roster.decode(roster).adverts)

    def show(self, stage: Stage, waiting: list[str], left: float) -> None:
        """Say where a round is and whom it waits for."""
        names = ", ".join(self._name_of(d) for d in waiting[:5]) + (", ..." if len(waiting) > 5 else "")
        self._show(f"secure aggregation, {_WORDS[stage]}: waits for {len(waiting)} ({names})", left)

    def moved(self) -> None:
        """It waits no more."""
        self._show("", 0.0)


class _Devices:
    """Asks the devices of one attempt (``rounds.secure.Ask``)."""

    def __init__(self, rounds: SecureFleet, plan: RoundPlan, request: Request, resumed: bool) -> None:
        self._rounds, self._plan, self._request = rounds, plan, request
        self._stages = rounds.open(plan, resumed)
        self._shown_at = float("-inf")
        self.stage = ""  # the last one that was asked for

    def close(self, *, going_on: bool) -> None:
        """End the attempt, or leave it for a moment."""
        self._stages.close(going_on=going_on)
        if self._shown_at > 0:
            self._rounds.moved()

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        """See ``rounds.secure.Ask``."""
        self.stage = stage.name.lower()
        waiting = dict.fromkeys(messages)
        if stage is Stage.ADVERTS:
            for device in list(waiting):
                if (advert := self._rounds.take_advert(device)) is not None:
                    del waiting[device]
                    yield Told(device, advert, num_bytes=len(advert))
        elif stage is Stage.SHARES:
            self._rounds.spend_adverts(set(messages.values()))
        began, patience = time.monotonic(), self._rounds.patience(self._plan, stage)
        asked = _Messages(self._plan, self._request, self._rounds, stage, messages, waiting)
        self._rounds.entered(self._plan, stage)
        for answer in self._stages.ask(asked, patience, durable=stage is Stage.UPLOADS):
            if answer is None:
                self._look(stage, list(waiting), began, patience)
                continue
            waiting.pop(answer.device_id, None)
            yield self._told(stage, answer.device_id, answer.records, answer.num_bytes)
            del answer  # it may be large: not while waiting for the next one

    def _told(self, stage: Stage, device: str, records: Records | UpdateRejected, num_bytes: int) -> Told:
        try:
            if isinstance(records, UpdateRejected):
                raise records
            answer = StageAnswer.read(records)
        except UpdateRejected as refusal:
            return Told(device, refusal, num_bytes=num_bytes)
        if answer.prekey and stage is Stage.CONSENTS:
            self._rounds.add_advert(device, answer.prekey)
        return Told(device, answer.frame, answer.vector, answer.seconds, num_bytes)

    def _look(self, stage: Stage, waiting: list[str], began: float, patience: float) -> None:
        now = time.monotonic()
        if now - began >= SHOW_AFTER_S and now - self._shown_at >= SHOW_EVERY_S:
            self._shown_at = now
            self._rounds.show(stage, waiting, max(0.0, began + patience - now))


class _Messages(Mapping[str, Records]):
    """Every device's message, made when it is sent; equal ones are made once, and so encoded once."""

    def __init__(
        self,
        plan: RoundPlan,
        request: Request,
        rounds: SecureFleet,
        stage: Stage,
        frames: Mapping[str, bytes],
        devices: Mapping[str, None],
    ) -> None:
        self._plan, self._stage, self._frames, self._devices = plan, stage, frames, tuple(devices)
        self._request = request if stage is Stage.SHARES else None
        self._offers = rounds.offers(plan, request) if stage is Stage.SHARES else {}
        self._last: tuple[bytes, Records] | None = None

    def __getitem__(self, device: str) -> Records:
        frame = self._frames[device]
        if self._last is None or self._last[0] is not frame:
            offer = self._offers.get(device)
            asked = StageRequest.of(self._plan, self._stage, frame, offer, self._request)
            self._last = frame, asked.to_records()
        return self._last[1]

    def __iter__(self) -> "Generator[str, None, None]":
        yield from self._devices

    def __len__(self) -> int:
        return len(self._devices)


def _keep(kept: AttemptLog, record: bytes, stage: str) -> None:
    kept.append(record, durable=must_be_synced(record))
    reached(f"secure.{stage}")


def attempt_of(plan: RoundPlan) -> Attempt:
    """The name of a plan's attempt."""
    return Attempt(plan.run_id, plan.round, plan.attempt)


def _given_up(plan: RoundPlan, why: str) -> Collected:
    nobody = {d: Participation(d, Rejection.OFFLINE.value, why) for d in plan.cohort}
    return Collected(plan, nobody, burnt=True)
