"""The part of the agent that takes part in rounds: one thread, alive only while this device is selected.

The main thread tells it ``select`` and ``leave``; it joins Flower, pulls the round's message, has the task
answer it, pushes the answer and stays a while for the next round. Rules:

* Nothing is trained that the ledger does not first hold as begun; what it holds is not trained again.
* An answer is pushed until it is taken, refused, or too late; a coordinator that restarted is joined anew.
* What was trained and not taken is kept until its round is over: a coordinator that was restarted in between
  asks again, and gets that answer.
* ``leave`` and ``stop`` end training before its next step; what was left is not answered.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from lepton_client.backoff import Backoff
from lepton_client.clock import Clock
from lepton_client.ledger import Ledger
from lepton_client.secure import Seat
from lepton_fl.crashpoints import reached
from lepton_fl.errors import (
    ConnectionFailed,
    DiskFull,
    LeptonError,
    Rejection,
    StateError,
    TrustError,
    UpdateRejected,
)

if TYPE_CHECKING:
    from lepton_fl.rounds.secure_wire import StageRequest
    from lepton_fl.wire.messages import Ticket
    from lepton_fl.wire.records import Records

log = logging.getLogger(__name__)

CALM_S: Final = 1.0  # between two looks for the next stage's message, which the coordinator announces
LOAD_S: Final = 120.0  # what a first training may take to load before it counts as hung
KEEP_DONE: Final = 64  # attempts that are over for this device and are remembered
KEEP_S: Final = 300.0  # that an answer is kept for a coordinator that was restarted, at least
GRACE: Final = 5.0  # seconds after a deadline in which an answer may still be taken


class Node(Protocol):
    """What carries the messages of a round; ``lepton_client.flower.FlowerNode`` in production.

    Every method raises TrustError (not admitted) or ConnectionFailed (try later).
    """

    def activate(self) -> int:
        """Join; the number under which the coordinator knows this node, another one after its restart."""
        ...

    def pull(self) -> "tuple[Any, Records] | None":
        """The oldest message that was not answered, with a handle; raises UpdateRejected if unreadable."""
        ...

    def push(self, handle: Any, records: "Records") -> None:  # noqa: ANN401 - what ``pull`` gave
        """Answer; raises UpdateRejected when the answer does not count."""
        ...

    def push_error(self, handle: Any, reason: Rejection, message: str) -> None:  # noqa: ANN401 - as above
        """Answer that there will be no result; raises like ``push``."""
        ...

    @property
    def moving_s(self) -> float:
        """Seconds since the message or the answer under way began to move; 0 when none does."""
        ...

    def deactivate(self) -> None:
        """Leave."""
        ...

    def close(self) -> None:
        """Hang up; from another thread it ends the waits of a running call."""
        ...


class Answerer(Protocol):
    """Does what a request asks; ``lepton_client.desk.Office`` in production."""

    def __call__(self, records: "Records", should_stop: Callable[[], bool]) -> "Records":
        """The answer; raises UpdateRejected only when the request has no readable ticket."""
        ...


Key = tuple[str, int, str]  # run, round, and the nonce of the attempt, which is never used again


@dataclass(frozen=True)
class Selection:
    """One Participate."""

    key: Key
    deadline: float  # clock seconds
    stay_s: float
    refusal: str = ""  # why this device will not do it, when that is so
    reason: Rejection = Rejection.FAILED  # the same in a word
    resumed: bool = False  # the coordinator goes on after a restart with what this device may have finished
    node: int = 0  # the number of this device's node, of that coordinator
    refused: bool = False  # the fleet API did not know this device since it was selected


@dataclass
class _Trained:
    """An answer that the coordinator does not have yet."""

    ticket: "Ticket"
    answer: "Records | str"  # the latter: what went wrong
    until: float  # clock seconds; nobody asks for it later


class Worker:
    """Takes part in rounds in a thread of its own."""

    def __init__(
        self,
        node_factory: Callable[[], Node],
        answer: Answerer,
        ledger: Ledger,
        clock: Clock,
        *,
        poll_s: float,
        changed: Callable[[], None],
        trouble: Callable[[LeptonError], None],
        settle: Callable[[str, int, int, bool], None] = lambda run_id, round_number, attempt, taken: None,
        seat: Seat | None = None,
    ) -> None:
        """Nothing starts yet.

        Args:
            node_factory: Makes what carries messages; called in the worker's thread.
            answer: Does the work.
            ledger: What was begun.
            clock: For deadlines.
            poll_s: Pause between two looks for a message.
            changed: Called from the thread when it gets busy or idle.
            trouble: Called from the thread when this machine's own state fails (full disk).
            settle: Called from the thread with (run, round, attempt, whether the answer was taken).
            seat: Answers rounds with secure aggregation; None = they are refused.
        """
        self._seat = seat
        self._nudged = False  # a message is there, or was a moment ago
        self._pace_s = poll_s  # between two looks; longer where a message is announced
        self._node_factory, self._answer, self._ledger = node_factory, answer, ledger
        self._clock, self._poll_s = clock, poll_s
        self._changed, self._trouble, self._settle = changed, trouble, settle
        self._lock = threading.Condition()
        self._open: dict[Key, Selection] = {}
        self._left: set[Key] = set()
        self._finished: OrderedDict[Key, int] = OrderedDict()  # and the number that our node had
        self._number = 0  # that our node has, or had last
        self._answers: dict[Key, _Trained] = {}
        self._failures: dict[Key, str] = {}  # what it has given up, until the coordinator knows
        self._stay_until = 0.0
        self._beat: float | None = None  # clock seconds of the last step of the work in hand; None = none is
        self._stepped = False  # whether anything was ever trained by this process
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._node: Node | None = None
        self._backoff = Backoff(0.2, 5.0)

    # -------------------------------------------------------------------------------------- main thread

    @property
    def busy(self) -> bool:
        """Whether a selection is open."""
        with self._lock:
            return bool(self._open)

    @property
    def open(self) -> list[Key]:
        """The attempts that this device takes part in."""
        with self._lock:
            return list(self._open)

    @property
    def failures(self) -> dict[Key, str]:
        """The attempts that this device has given up without an answer, and why."""
        with self._lock:
            return dict(self._failures)

    def heard(self, failures: Iterable[Key]) -> None:
        """The coordinator knows of these."""
        with self._lock:
            for key in failures:
                self._failures.pop(key, None)

    @property
    def stalled_s(self) -> float:
        """Seconds since the work in hand made a step; 0 when nothing is in hand.

        Before the first step of this process, ``LOAD_S`` less: it loads torch, the task and the data.
        """
        beat = self._beat
        if beat is None:
            return 0.0
        return max(0.0, self._clock.now() - beat - (0.0 if self._stepped else LOAD_S))

    @property
    def moving_s(self) -> float:
        """Seconds that a message of a round, or the answer to it, has been on its way; 0 when none is."""
        node = self._node
        return 0.0 if node is None else node.moving_s

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        with self._lock:
            return self._thread is not None and self._thread.is_alive()

    def select(self, selection: Selection) -> bool:
        """This device is in a cohort; False when it knew that."""
        with self._lock:
            if self._stopping or self._is_done(selection):
                return False  # told twice, by the stream and by a check-in
            self._finished.pop(selection.key, None)
            if selection.key in self._open:  # so was this, or there is the next of several messages
                self._open[selection.key] = selection
                self._nudged = True
                self._lock.notify_all()
                return False
            self._left.discard(selection.key)
            self._open[selection.key] = selection
            self._pace_s = self._poll_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lepton-worker", daemon=True)
                self._thread.start()
            self._lock.notify_all()
            return True

    def _is_done(self, selection: Selection) -> bool:
        """Whether nothing is left to do for it; the lock is held.

        Of a coordinator that was restarted, only what was done since it asked again: the word that it asks
        may come after the work, and who then waits for more is busy until the round's deadline.
        """
        number = self._finished.get(selection.key)
        return number is not None and (not selection.resumed or number == selection.node)

    def taken(self, run_id: str, round_number: int, attempt: int) -> None:
        """The coordinator says that it has the answer of an attempt."""
        with self._lock:
            found = [t.ticket for t in self._answers.values() if t.ticket.kind == "train"]
        for ticket in found:
            if (ticket.run_id, ticket.round, ticket.attempt) == (run_id, round_number, attempt):
                self._forget(ticket, taken=True)
                self._done((ticket.run_id, ticket.round, ticket.nonce))

    def leave(self, key: Key) -> bool:
        """The round closed without this device; False when it was not at work on it."""
        trained = self._answers.get(key)
        if trained is not None:
            self._forget(trained.ticket, taken=False)
        with self._lock:
            if self._open.pop(key, None) is None:
                if self._seat is not None:
                    self._seat.leave(_name(key))  # nobody works on it any more
                return False
            self._left.add(key)
            self._stay_until = 0.0
            self._lock.notify_all()
            return True

    def stop(self, timeout_s: float) -> bool:
        """Leave everything; returns whether the thread ended within ``timeout_s``."""
        with self._lock:
            self._stopping = True
            self._open.clear()
            self._lock.notify_all()
            thread, node = self._thread, self._node
        if thread is None:
            return True
        if node is not None:
            with contextlib.suppress(LeptonError):
                node.close()  # an upload that is under way need not end first
        thread.join(timeout_s)
        return not thread.is_alive()

    # ------------------------------------------------------------------------------------------- thread

    def _run(self) -> None:
        try:
            while self._wanted():
                self._engage()
        except BaseException as error:
            log.exception("the worker failed; the agent goes on without this round")
            with self._lock:
                for key, selection in self._open.items():
                    self._over_with(key, selection.node)  # it would fail again at the next check-in
                    self._failures[key] = f"The device failed with {type(error).__name__}."
                self._open.clear()
                self._thread = None
        finally:
            self._changed()

    def _wanted(self) -> bool:
        """Whether to join (again); when not, the thread ends, and no selection can slip in between."""
        with self._lock:
            self._expire()
            if self._open and not self._stopping:
                return True
            left = list(self._left)
            self._left.clear()
            self._thread = None
        if self._seat is not None:
            for key in left:
                self._seat.leave(_name(key))
        return False

    def _engage(self) -> None:
        """Join Flower once and work until nobody waits for this device, or the connection breaks."""
        try:
            node = self._node = self._node_factory()
        except LeptonError as error:
            self._broken(error)
            return
        try:
            self._number = node.activate()
            while self._attend():
                self._look(node)
                self._backoff.reset()
        except LeptonError as error:
            self._broken(error)
        finally:
            with contextlib.suppress(LeptonError):  # it may be the coordinator that went away
                node.deactivate()
            node.close()
            self._node = None

    def _look(self, node: Node) -> None:
        """Pull once; work on what came or pause."""
        try:
            pulled = node.pull()
        except UpdateRejected as error:
            log.warning("a message that cannot be read was put aside: %s", error)
            pulled = None
        if pulled is None:
            self._pause(self._pace_s)
        else:
            self._work(node, *pulled)

    def _broken(self, error: LeptonError) -> None:
        log.warning("lost the round's connection: %s", error)
        if isinstance(error, TrustError):
            with self._lock:
                # Not ours to insist; the next check-in says why. A coordinator that was restarted lets us in
                # when it selects us, perhaps after the call that failed: so once more.
                again = {key: s for key, s in self._open.items() if not s.refused}
                self._open = {key: replace(s, refused=True) for key, s in again.items()}
            if not again:
                return
        self._pause(self._backoff.next())

    def _attend(self) -> bool:
        """Wait while there is nothing to pull; False when it is time to leave Flower."""
        with self._lock:
            while True:
                self._expire()
                if self._stopping:
                    return False
                if self._open:
                    return True
                left = self._stay_until - self._clock.now()
                if left <= 0:
                    return False
                self._lock.wait(min(left, 1.0))

    def _pause(self, seconds: float) -> None:
        with self._lock:
            if not (self._stopping or self._nudged):
                self._lock.wait(seconds)
            self._nudged = False

    def _expire(self) -> None:
        """Forget selections whose round is over; the lock is held."""
        now = self._clock.now()
        for key in [k for k, s in self._open.items() if now > s.deadline + GRACE]:
            del self._open[key]
            log.warning("round %d of run %s: no message came before its deadline", key[1], key[0])

    def _work(self, node: Node, handle: Any, records: "Records") -> None:  # noqa: ANN401 - the node's own
        from lepton_fl.rounds.secure_wire import is_stage
        from lepton_fl.wire.messages import Fields, Ticket

        if is_stage(records):
            self._work_stage(node, handle, records)
            return
        try:
            ticket = Ticket.take(Fields(records.config))
        except UpdateRejected as error:
            reason, text = error.reason, str(error)
            self._push(lambda: node.push_error(handle, reason, text), node, None)
            self._pause(self._poll_s)
            return
        key = (ticket.run_id, ticket.round, ticket.nonce)
        reached("train.downloaded")
        trained = self._trained(key)
        if trained is None and (refused := self._refusal(ticket, key)) is not None:
            why, text = refused
            log.warning("%s round %d of run %s is not done: %s", ticket.kind, key[1], key[0], text)
            self._push(lambda: node.push_error(handle, why, text), node, key)
            self._pause(self._poll_s)  # the same message may come again until the round is over
        else:
            if trained is None:
                reached("train.begun")
                log.info("%s round %d of run %s begins", ticket.kind, ticket.round, ticket.run_id)
                trained = self._train(ticket, records, key)
                reached("train.trained")
            if self._gone(key):
                self._forget(ticket, taken=False)
            elif not self._hand_over(node, handle, trained, key):
                # Its question was a coordinator's that is gone, or our node was shut out: join anew.
                raise ConnectionFailed("The round's question is not known any more; it may be asked again.")
        self._done(key)

    def _hand_over(
        self,
        node: Node,
        handle: Any,  # noqa: ANN401 - the node's own
        trained: "_Trained",
        key: Key,
    ) -> bool:
        """Push an answer; False if it is kept, for it may be asked for again until its round is over."""
        answer, ticket = trained.answer, trained.ticket

        def push() -> None:
            if isinstance(answer, str):
                node.push_error(handle, Rejection.FAILED, answer)
            else:
                node.push(handle, answer)

        refusal = self._hand(push, node, key)
        if refusal is None:
            reached("train.sent")
        elif refusal.reason in (Rejection.LATE, Rejection.NOT_SELECTED) and ticket.kind == "train":
            return False  # the question, or the number of our node, is not known any more
        self._forget(ticket, taken=refusal is None)
        return True

    def _trained(self, key: Key) -> "_Trained | None":
        """What this attempt has brought, if the coordinator does not have it yet."""
        self._forget_old()
        with self._lock:
            return self._answers.get(key)

    def _train(self, ticket: "Ticket", records: "Records", key: Key) -> "_Trained":
        """Do the work, and keep what came of it."""
        trained = _Trained(ticket, self._do(records, key), self._clock.now() + KEEP_S)
        with self._lock:
            selection = self._open.get(key)
            if selection is not None:
                trained.until = max(trained.until, selection.deadline + GRACE)
            self._answers[key] = trained
        return trained

    def _forget(self, ticket: "Ticket", taken: bool) -> None:
        """The coordinator has an answer, or never will."""
        with self._lock:
            self._answers.pop((ticket.run_id, ticket.round, ticket.nonce), None)
        if ticket.kind == "train":
            self._settle(ticket.run_id, ticket.round, ticket.attempt, taken)
        if taken:
            self._note(ticket)

    def _forget_old(self) -> None:
        """Answers that nobody has asked for in time."""
        now = self._clock.now()
        with self._lock:
            old = [t.ticket for t in self._answers.values() if now > t.until]
        for ticket in old:
            self._forget(ticket, taken=False)

    def _work_stage(self, node: Node, handle: Any, records: "Records") -> None:  # noqa: ANN401 - the node's
        """Answer one stage of a round with secure aggregation; after the roster, train."""
        from lepton_fl.rounds.secure_wire import StageRequest
        from lepton_fl.secagg.server import Stage

        try:
            asked = StageRequest.read(records)
        except UpdateRejected as error:
            reason, text = error.reason, str(error)
            self._push(lambda: node.push_error(handle, reason, text), node, None)
            self._pause(self._poll_s)
            return
        ticket = asked.ticket
        key = (ticket.run_id, ticket.round, ticket.nonce)
        answer, is_out = self._answer_stage(asked, key)
        if isinstance(answer, UpdateRejected):
            reason, why = answer.reason, str(answer)
            log.warning("round %d of run %s, %s: %s", key[1], key[0], asked.stage.name.lower(), why)
            self._push(lambda: node.push_error(handle, reason, why), node, key)
            if is_out:
                self._give_up(ticket, key)
            self._pause(self._poll_s)  # the same message may come again until the round is over
            return
        if not self._push(lambda: node.push(handle, answer), node, key):
            return  # too late for this stage; perhaps not for the round
        self._pace_s = max(self._poll_s, CALM_S)
        if asked.stage is Stage.SHARES and self._seat is not None:
            reached("secure.keyed")
            self._train_seat(self._seat, asked, key)
        elif asked.stage is Stage.CONSENTS:
            self._settle(ticket.run_id, ticket.round, ticket.attempt, True)
        elif asked.stage is Stage.REVEALS:
            self._note(ticket)
            self._done(key)

    def _train_seat(self, seat: Seat, asked: "StageRequest", key: Key) -> None:
        log.info("train round %d of run %s begins", key[1], key[0])
        self._beat = self._clock.now()
        try:
            seat.train(asked, _name(key), lambda: self._step(key))
        finally:
            self._beat = None

    def _answer_stage(self, asked: "StageRequest", key: Key) -> "tuple[Records | UpdateRejected, bool]":
        """The answer; or why there is none, and whether this device is out of the round."""
        from lepton_fl.secagg.server import Stage

        name = _name(key)
        try:
            if self._seat is None:
                raise TrustError("This device cannot aggregate securely.")
            if not self._seat.knows(name):
                self._begin_stage(self._seat, asked, key)
            late = self._seat.untrained(name) if asked.stage is Stage.UPLOADS else None
            if late is not None:  # a restarted coordinator has the key shares, and we were never told
                self._train_seat(self._seat, late, key)
            return self._seat.answer(asked, name).to_records(), False
        except UpdateRejected as refusal:
            return refusal, True
        except TrustError as error:
            return UpdateRejected(Rejection.FAILED, str(error)), True
        except StateError as error:
            self._trouble(error)
            return UpdateRejected(Rejection.FAILED, str(error)), False
        except Exception as error:  # whatever is wrong with this machine, the round must hear of it
            log.exception("round %d of run %s could not be worked on", key[1], key[0])
            return UpdateRejected(Rejection.FAILED, f"The device failed with {type(error).__name__}."), True

    def _begin_stage(self, seat: Seat, asked: "StageRequest", key: Key) -> None:
        """Raise UpdateRejected where this device must not begin; from the roster on it counts as begun."""
        from lepton_fl.secagg.server import Stage

        if asked.stage is Stage.SHARES:
            seat.refuse_if_signed(asked)
            refused = self._refusal(asked.ticket, key)
        else:
            with self._lock:
                selection = self._open.get(key)
            refused = None if selection is None else (selection.reason, selection.refusal)
        if refused is not None and refused[1]:
            raise UpdateRejected(*refused)

    def _give_up(self, ticket: "Ticket", key: Key) -> None:
        if self._seat is not None:
            self._seat.leave(_name(key))
        self._note(ticket)
        self._done(key)

    def _do(self, records: "Records", key: Key) -> "Records | str":
        """Do the work; what came of it, or what went wrong."""
        self._beat = self._clock.now()
        try:
            return self._answer(records, lambda: self._step(key))
        except Exception as error:  # whatever is wrong with this machine, the round must hear of it
            log.exception("round %d of run %s could not be worked on", key[1], key[0])
            return f"The device failed with {type(error).__name__}."
        finally:
            self._beat = None

    def _step(self, key: Key) -> bool:
        """A sign that the work moves; whether it is to end."""
        self._beat, self._stepped = self._clock.now(), True
        return self._gone(key)

    def _refusal(self, ticket: "Ticket", key: Key) -> tuple[Rejection, str] | None:
        """Why the work must not start; None after the ledger has it as begun."""
        if self._gone(key):
            return Rejection.FAILED, "The round is over for this device."
        with self._lock:
            selection = self._open.get(key)
        if selection is not None and selection.refusal:
            return selection.reason, selection.refusal
        try:
            fresh = self._ledger.begin(ticket)
        except StateError as error:
            self._trouble(error)
            return Rejection.DISK_FULL if isinstance(error, DiskFull) else Rejection.FAILED, str(error)
        if fresh:
            return None
        text = "This device had begun it before, perhaps before a restart; it works once only."
        return Rejection.INTERRUPTED, text

    def _push(self, push: Callable[[], None], node: Node, key: Key | None) -> bool:
        """Hand an answer over; a broken connection is tried again until the round is over.

        Returns:
            Whether the coordinator has it; False when it refused it by reason.
        """
        return self._hand(push, node, key) is None

    def _hand(self, push: Callable[[], None], node: Node, key: Key | None) -> UpdateRejected | None:
        """The same; returns why the coordinator has refused it."""
        backoff = Backoff(0.2, 5.0)
        while True:
            try:
                push()
                return None
            except UpdateRejected as refusal:
                log.warning("the answer was refused (%s): %s", refusal.reason, refusal)
                return refusal
            except LeptonError as error:
                if isinstance(error, TrustError) or key is None or self._over(key):
                    raise
                log.warning("the answer did not get through, trying again: %s", error)
            self._pause(backoff.next())
            with contextlib.suppress(LeptonError):  # then the next push says what is wrong
                self._number = node.activate()

    def _over(self, key: Key) -> bool:
        with self._lock:
            self._expire()
            return self._stopping or key not in self._open

    def _gone(self, key: Key) -> bool:
        """Whether nobody waits for this answer any more: training stops at its next step."""
        with self._lock:
            selection = self._open.get(key)
            late = selection is not None and self._clock.now() > selection.deadline + GRACE
            return self._stopping or late or key in self._left

    def _note(self, ticket: "Ticket") -> None:
        try:
            self._ledger.answered(ticket)
        except StateError as error:  # "begun" is on disk, and that is what matters
            self._trouble(error)

    def _done(self, key: Key) -> None:
        with self._lock:
            selection = self._open.pop(key, None)
            self._left.discard(key)
            self._over_with(key, self._number)
            if selection is not None:
                self._stay_until = self._clock.now() + selection.stay_s
        self._changed()

    def _over_with(self, key: Key, number: int) -> None:
        """Remember that nothing is left to do for an attempt; the lock is held."""
        self._finished[key] = number
        while len(self._finished) > KEEP_DONE:
            self._finished.popitem(last=False)


def _name(key: Key) -> str:
    """What the device's sessions call an attempt."""
    return f"{key[0]}/{key[1]}/{key[2]}"
