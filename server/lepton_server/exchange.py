"""Rounds over the real fleet (``rounds.exchange.Exchange``).

The messages travel through Flower's fleet API, the word that there is one through the device service: a
selected device is told at once if it waits on a stream, else at its next check-in. A device that vanishes in
mid-round is given up after ``GONE_S``; nobody waits for it until the deadline.
"""

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from lepton_fl.errors import LeptonError, NotFound, Rejection, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.exchange import Answer
from lepton_fl.wire.messages import Request
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.fleet import Fleet
from lepton_server.flower import FlowerLink, Mailbox

log = logging.getLogger(__name__)

WAKE_S = 0.5  # how often a waiting round looks for vanished devices and a shutdown
GONE_S = 15.0  # without stream and without a request at the fleet API: the device is gone


class Interrupted(Exception):
    """The coordinator shuts down: the run is left as it is, to be continued."""


@dataclass
class _Attempt:
    """The open messages of one attempt."""

    plan: RoundPlan
    ends: float  # monotonic seconds
    devices: dict[str, str] = field(default_factory=dict)  # message id -> device id, unanswered
    nodes: dict[str, int] = field(default_factory=dict)  # device id -> Flower node id
    streamed: set[str] = field(default_factory=set)  # told through their stream
    missing_since: dict[str, float] = field(default_factory=dict)  # device id -> monotonic seconds


class FleetExchange:
    """One run's way to its devices."""

    def __init__(
        self,
        link: FlowerLink,
        fleet: Fleet,
        public_keys: Callable[[str], bytes],
        *,
        stay_s: float,
        closing: Callable[[], bool],
    ) -> None:
        """Make the exchange of a run.

        Args:
            link: Flower's fleet API.
            fleet: who is there, and the way to tell a device something.
            public_keys: device id -> DER public key; NotFound for a device that is no longer enrolled.
            stay_s: how long a device stays active after its work.
            closing: whether the coordinator shuts down.
        """
        self._link, self._fleet, self._public_keys = link, fleet, public_keys
        self._stay_s, self._closing = stay_s, closing

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        """Send the request and yield answers until all are in, the deadline passes, or the caller closes.

        Raises:
            Interrupted: the coordinator shuts down.
        """
        attempt = _Attempt(plan, time.monotonic() + plan.deadline_s)
        box = self._link.mailbox()
        try:
            yield from self._send(attempt, box, request)
            while attempt.devices and (left := attempt.ends - time.monotonic()) > 0:
                if self._closing():
                    raise Interrupted
                reply = box.get(min(left, WAKE_S))
                if reply is None:
                    yield from self._vanished(attempt, box)
                elif (device_id := attempt.devices.pop(reply.message_id, None)) is not None:
                    yield Answer(device_id, reply.content, reply.num_bytes)
        finally:
            box.close()
            self._release(attempt)

    def tell(self, plan: RoundPlan, device_id: str, refusal: UpdateRejected | None) -> None:
        """Send the verdict through the device service."""
        verdict = pb.Verdict(
            run_id=plan.run_id,
            round=plan.round,
            attempt=plan.attempt,
            kind=plan.kind,
            accepted=refusal is None,
            reason="" if refusal is None else refusal.reason.value,
            detail="" if refusal is None else str(refusal)[:500],
        )
        if refusal is not None:
            log.warning(
                "run %s round %d: %s of %s: %s", plan.run_id, plan.round, refusal.reason, device_id, refusal
            )
        self._instruct(device_id, pb.Instruction(verdict=verdict))

    # --- sending ------------------------------------------------------------------------------------

    def _send(self, attempt: _Attempt, box: Mailbox, request: Request) -> Generator[Answer, None, None]:
        plan, records = attempt.plan, request.to_records()
        for device_id in plan.cohort:
            if not self._fleet.mark_busy(device_id, plan.run_id):
                busy = UpdateRejected(
                    Rejection.OFFLINE, f"Device {device_id} was taken by another run meanwhile."
                )
                yield Answer(device_id, busy)
                continue
            try:
                node_id = self._link.admit(self._public_keys(device_id))
                message_id = box.post(node_id, records, message_type=plan.kind, ttl_s=plan.deadline_s)
            except LeptonError as error:
                yield Answer(device_id, UpdateRejected(Rejection.REVOKED, str(error)))
                continue
            attempt.devices[message_id] = device_id
            attempt.nodes[device_id] = node_id
            if self._instruct(device_id, self._participate(attempt, node_id)):
                attempt.streamed.add(device_id)

    def _participate(self, attempt: _Attempt, node_id: int) -> pb.Instruction:
        plan = attempt.plan
        return pb.Instruction(
            participate=pb.Participate(
                run_id=plan.run_id,
                round=plan.round,
                attempt=plan.attempt,
                kind=plan.kind,
                task=plan.task,
                task_version=plan.task_version,
                deadline_s=max(0.0, attempt.ends - time.monotonic()),
                stay_s=self._stay_s,
                node_id=node_id,
                nonce=plan.nonce,
            )
        )

    def _instruct(self, device_id: str, instruction: pb.Instruction) -> bool:
        try:
            return self._fleet.instruct(device_id, instruction)
        except NotFound:
            return False  # revoked meanwhile; its message fails by itself

    # --- waiting ------------------------------------------------------------------------------------

    def _vanished(self, attempt: _Attempt, box: Mailbox) -> Generator[Answer, None, None]:
        """Give up devices that have neither a stream nor a sign of life at the fleet API."""
        now = time.monotonic()
        for message_id, device_id in list(attempt.devices.items()):
            if self._is_there(attempt, device_id):
                attempt.missing_since.pop(device_id, None)
            elif now - attempt.missing_since.setdefault(device_id, now) >= GONE_S:
                box.withdraw([message_id])
                del attempt.devices[message_id]
                why = f"Device {device_id} has not been heard of for {GONE_S:g} s."
                yield Answer(device_id, UpdateRejected(Rejection.OFFLINE, why))

    def _is_there(self, attempt: _Attempt, device_id: str) -> bool:
        if self._fleet.is_waiting(device_id):
            return True
        idle = self._link.idle_s(attempt.nodes[device_id])
        if idle is not None and idle < GONE_S:
            return True
        return device_id not in attempt.streamed and self._fleet.is_online(device_id)

    def _release(self, attempt: _Attempt) -> None:
        plan = attempt.plan
        leave = pb.Instruction(
            leave=pb.Leave(
                run_id=plan.run_id,
                round=plan.round,
                attempt=plan.attempt,
                kind=plan.kind,
                nonce=plan.nonce,
            )
        )
        unanswered = set(attempt.devices.values())
        for device_id in plan.cohort:
            self._fleet.mark_idle(device_id, plan.run_id)
            if device_id in unanswered:
                self._instruct(device_id, leave)
