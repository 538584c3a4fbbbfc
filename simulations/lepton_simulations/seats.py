"""The sessions of a simulated cohort: in this process, or dealt out to forked helpers.

Each device's session is the one that a real device runs. Helpers are forked for one attempt, so they have the
sessions without being sent them; each keeps those of its own devices. Messages go through pipes as bytes;
nothing is pickled. What is the same for a whole cohort is verified once per process (``SharedChecks``).

    with Crew(Seats(...), devices, workers=2) as crew:
        for device, answer in crew.answers(Stage.SHARES, messages): ...
        crew.start("device-0", delivery, vector)
        tail, masked = crew.masked("device-0")
"""

import gc
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar

import numpy as np

from lepton_fl.errors import Rejection, RunError, TrustError, UpdateRejected
from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy
from lepton_fl.secagg.context import LEAST_COHORT, RoundContext
from lepton_fl.secagg.identity import Pinned
from lepton_fl.secagg.keys import SEALED_BYTES
from lepton_fl.secagg.masks import Ring
from lepton_fl.secagg.messages import Reveal, Roster, Shares
from lepton_fl.secagg.rehearsal import Member
from lepton_fl.secagg.server import Stage

WORTH_HELP: Final = 64  # devices; of fewer, all their sessions take less than starting a process
AHEAD: Final = 4  # vectors per helper that may wait for an earlier one; bounds the parent's memory

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")
Masked = tuple[bytes, bytes | memoryview]  # message 5, and the vector


class Seats:
    """The sessions of an attempt's devices, some of which do not follow the protocol."""

    def __init__(
        self,
        members: Sequence[Member],
        contexts: Mapping[str, RoundContext],
        trust: Pinned,
        dealing: Collection[str] = (),
        lying: Collection[str] = (),
    ) -> None:
        """Begin.

        Args:
            members: every device's keys.
            contexts: what each takes part in.
            trust: whose keys are whose.
            dealing: devices whose shares cannot be opened.
            lying: devices that reveal other shares than they were dealt.
        """
        policy = Policy(LEAST_COHORT, hidden_graph=True)  # nobody is protected here
        self._members = {member.device: member for member in members}
        self._sessions = {
            d: ClientSession(contexts[d], m.prekey, m.signing, trust, MemoryLedger(), policy, checks=m.checks)
            for d, m in self._members.items()
        }
        self._dealing, self._lying = frozenset(dealing), frozenset(lying)
        self._sizes: dict[str, int] = {}  # of a device's roster, where it will be needed

    def answer(self, stage: Stage, device: str, message: bytes) -> bytes:
        """What a device says at a stage other than UPLOADS.

        Raises:
            TrustError: it refuses.
        """
        session = self._sessions[device]
        if stage is Stage.ADVERTS:
            return self._members[device].prekey.advert
        if stage is Stage.SHARES:
            if device in self._dealing | self._lying:
                self._sizes[device] = len(Roster.decode(message).adverts)
            shares = session.share_keys(message, os.urandom, 0.0)
            return self._garbled(device, shares) if device in self._dealing else shares
        if stage is Stage.CONSENTS:
            return session.consent(message)
        revealed = session.reveal(message)
        return self._falsified(device, revealed) if device in self._lying else revealed

    def mask(self, device: str, delivery: bytes, vector: Ring) -> Masked:
        """What a device uploads; it forgets the vector, for here nothing is lost on the way.

        Raises:
            TrustError: it refuses.
        """
        session = self._sessions[device]
        session.deliver(delivery)
        masked = session.mask(vector)
        session.release()
        return masked

    def _garbled(self, device: str, message: bytes) -> bytes:
        """Shares that a third and one more cannot open, rightly signed: enough to be found out."""
        n = self._sizes[device]
        honest = Shares.decode(message, n)
        bad = SEALED_BYTES * (n // 3 + 1)
        garbage = replace(honest, sealed=os.urandom(bad) + honest.sealed[bad:])
        return garbage.encode(self._members[device].signing)

    def _falsified(self, device: str, message: bytes) -> bytes:
        """Shares that are not those that were dealt, rightly signed."""
        n = self._sizes[device]
        honest = Reveal.decode(message, n)
        false = {dealer: bytes(len(part)) for dealer, part in honest.shares.items()}
        return replace(honest, shares=false).encode(n, self._members[device].signing)


Answered = tuple[str, bytes | UpdateRejected]


@dataclass(eq=False)
class _Helper:
    """A process that has some of the sessions."""

    process: BaseProcess
    pipe: Connection
    waiting: deque[tuple[str, bytes, Ring]] = field(default_factory=deque)  # to be masked
    busy: str = ""  # the device whose vector it masks


class Crew:
    """Lets the devices of an attempt answer, on as many cores as there are helpers."""

    def __init__(self, seats: Seats, devices: Sequence[str], workers: int) -> None:
        """Start helpers.

        Args:
            seats: the sessions of all devices.
            devices: all of them.
            workers: processes; fewer than two, or a small cohort: none, all is done here.
        """
        self._seats, self._done = seats, dict[str, Masked | UpdateRejected]()
        self._helpers: list[_Helper] = []
        fork = multiprocessing.get_context("fork")
        for _ in range(workers if workers > 1 and len(devices) >= WORTH_HELP else 0):
            ours, theirs = fork.Pipe()
            others = [ours, *(helper.pipe for helper in self._helpers)]
            process = fork.Process(target=_serve, args=(seats, theirs, others), daemon=True)
            process.start()
            theirs.close()
            self._helpers.append(_Helper(process, ours))
        count = max(1, len(self._helpers))
        self._place = {device: i % count for i, device in enumerate(devices)}
        self.ahead = AHEAD * len(self._helpers)  # vectors that may be started before the first is taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the helpers; may be called again."""
        while self._helpers:
            helper = self._helpers.pop()
            helper.pipe.close()
            helper.process.kill()
            helper.process.join()
            helper.process.close()

    def answers(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Answered, None, None]:
        """What each device says to its message, in this order; at any stage but UPLOADS."""
        if not self._helpers:
            for device, message in messages.items():
                yield device, _refusable(self._seats.answer, stage, device, message)
            return
        self._settle()
        for i, helper in enumerate(self._helpers):
            own = {d: m for d, m in messages.items() if self._place[d] == i}
            distinct = list(dict.fromkeys(own.values()))
            number = {message: k for k, message in enumerate(distinct)}
            asked = {"stage": stage.name, "devices": {d: number[m] for d, m in own.items()}}
            _tell(helper, asked, *distinct)
        owed = deque(messages)
        try:
            while owed:
                device = owed.popleft()
                told, parts = _receive(self._helpers[self._place[device]])
                yield device, _refused(told) if "refused" in told else parts[0]
        finally:
            for device in owed if self._helpers else ():  # of a generator that was closed
                _receive(self._helpers[self._place[device]])

    def start(self, device: str, delivery: bytes, vector: Ring) -> None:
        """Have a vector masked; its session gets the others' shares first. The vector is used up."""
        if not self._helpers:
            self._done[device] = _refusable(self._seats.mask, device, delivery, vector)
            return
        helper = self._helpers[self._place[device]]
        helper.waiting.append((device, delivery, vector))
        self._feed(helper)

    def masked(self, device: str) -> Masked | UpdateRejected:
        """What ``start`` has begun; or why the device refuses."""
        while device not in self._done:
            self._take(self._helpers[self._place[device]])
        return self._done.pop(device)

    def _feed(self, helper: _Helper) -> None:
        """Give an idle helper its next vector: it reads all of it before it writes."""
        if not helper.busy and helper.waiting:
            helper.busy, delivery, vector = helper.waiting.popleft()
            told = {"mask": helper.busy, "type": vector.dtype.str}
            _tell(helper, told, delivery, vector.view(np.uint8).data)

    def _take(self, helper: _Helper) -> None:
        told, parts = _receive(helper)
        device, helper.busy = helper.busy, ""
        self._feed(helper)
        self._done[device] = _refused(told) if "refused" in told else (parts[0], parts[1])

    def _settle(self) -> None:
        """Forget vectors that nobody has taken: the stage was closed without them."""
        for helper in self._helpers:
            helper.waiting.clear()
            if helper.busy:
                self._take(helper)
        self._done.clear()


def _refusable(
    answer: Callable[_Asked, _Answer], *args: _Asked.args, **more: _Asked.kwargs
) -> _Answer | UpdateRejected:
    """What a device answers, or its refusal."""
    try:
        return answer(*args, **more)
    except TrustError as refusal:
        return UpdateRejected(Rejection.FAILED, str(refusal))


def _refused(told: Mapping[str, Any]) -> UpdateRejected:
    return UpdateRejected(Rejection.FAILED, told["refused"])


def _send(pipe: Connection, told: Mapping[str, Any], *parts: bytes | memoryview) -> None:
    pipe.send_bytes(json.dumps({**told, "parts": len(parts)}).encode())
    for part in parts:
        pipe.send_bytes(part)


def _tell(helper: _Helper, told: Mapping[str, Any], *parts: bytes | memoryview) -> None:
    try:
        _send(helper.pipe, told, *parts)
    except OSError as error:
        raise _died() from error


def _receive(helper: _Helper) -> tuple[dict[str, Any], list[bytes]]:
    try:
        return _read(helper.pipe)
    except (EOFError, OSError) as error:
        raise _died() from error


def _died() -> RunError:
    return RunError(
        "A process that ran devices' sessions died.",
        hint="Memory may have run out; use fewer workers or a smaller cohort.",
    )


def _read(pipe: Connection) -> tuple[dict[str, Any], list[bytes]]:
    told: dict[str, Any] = json.loads(pipe.recv_bytes())
    return told, [pipe.recv_bytes() for _ in range(told["parts"])]


def _serve(seats: Seats, pipe: Connection, others: Sequence[Connection]) -> None:
    """A helper's life: answer for its devices until the pipe ends."""
    for other in others:  # a copy of these would keep a pipe from ending
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # nothing inherited is searched for garbage, which would also copy its pages
    try:
        while True:
            told, parts = _read(pipe)
            if "mask" in told:
                vector = np.frombuffer(bytearray(parts[1]), told["type"])
                _reply(pipe, _refusable(seats.mask, told["mask"], parts[0], vector))
                continue
            stage = Stage[told["stage"]]
            for device, number in told["devices"].items():
                answer = _refusable(seats.answer, stage, device, parts[number])
                _reply(pipe, answer if isinstance(answer, UpdateRejected) else (answer,))
    except (EOFError, OSError):
        return


def _reply(pipe: Connection, answer: Sequence[bytes | memoryview] | UpdateRejected) -> None:
    if isinstance(answer, UpdateRejected):
        _send(pipe, {"refused": str(answer)})
    else:
        _send(pipe, {}, *answer)
