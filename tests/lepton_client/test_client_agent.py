"""The agent against a coordinator on real sockets: what comes and goes, and what must not be lost."""

import itertools
import threading
import time
import types

import grpc
import pytest

from lepton_client.agent import Agent
from lepton_client.enrol import enrol
from lepton_client.ledger import Ledger
from lepton_client.state import StateDir
from lepton_fl import crypto
from lepton_fl.errors import (
    ConnectionFailed,
    DiskFull,
    NotFound,
    Rejection,
    StateLocked,
    TrustError,
    UpdateRejected,
)
from lepton_fl.wire.messages import Failure, Fields, Ticket
from lepton_fl.wire.records import Records
from lepton_fl.wire.v1 import device_pb2 as pb

pytestmark = pytest.mark.network

PATIENCE = 60.0  # seconds, on a machine that does other things as well


class SystemLike:
    """Real intervals, a wall clock that can be moved."""

    def __init__(self):
        self.shift = 0.0

    def now(self):
        return time.monotonic()

    def wall(self):
        return time.time() + self.shift


class Post:
    """Flower's place, in memory: messages wait until they are answered."""

    def __init__(self):
        self.lock = threading.Lock()
        self.waiting = {}
        self.answers, self.errors = [], []
        self.joined = self.left = self.number = 0
        self.refusal = None
        self.broken = 0  # so many of the next calls fail

    def send(self, number=1, attempt=1):
        ticket = Ticket("train", "run", number, attempt, "00")
        with self.lock:
            self.waiting[number, attempt] = Records(config=ticket.to_config())

    def node(self, address, ca_pem, key):
        return PostNode(self)


class PostNode:
    def __init__(self, post):
        self.post = post

    def _fail(self):
        with self.post.lock:
            if self.post.broken:
                self.post.broken -= 1
                raise ConnectionFailed("the coordinator is away")

    def activate(self):
        self._fail()
        self.post.joined += 1
        return self.post.number

    def pull(self):
        self._fail()
        with self.post.lock:
            return next(iter(self.post.waiting.items()), None)

    def push(self, handle, records):
        self._fail()
        refusal, self.post.refusal = self.post.refusal, None
        if refusal is not None:
            raise refusal
        with self.post.lock:
            self.post.waiting.pop(handle, None)
            self.post.answers.append((handle, records))

    def push_error(self, handle, reason, message):
        self._fail()
        with self.post.lock:
            self.post.waiting.pop(handle, None)
            self.post.errors.append((handle, reason, message))

    moving_s = 0.0

    def deactivate(self):
        self.post.left += 1

    def close(self):
        pass


class Answer:
    """Trains until told to finish."""

    def __init__(self):
        self.began, self.finish, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self.count = 0

    def __call__(self, records, should_stop):
        self.count += 1
        self.began.set()
        while not self.finish.wait(0.005):
            if should_stop():
                self.stopped.set()
                break
        return Failure(Ticket.take(Fields(records.config)), Rejection.FAILED, "").to_records()


@pytest.fixture
def post():
    return Post()


@pytest.fixture
def work():
    return Answer()


@pytest.fixture
def enrolled(coordinator, config):
    state = StateDir(config.client.state_dir)
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    return state


@pytest.fixture
def agent(config, enrolled, post, work, good_data):
    return Agent(config, node_factory=post.node, answer=work, check=good_data, clock=SystemLike())


def participate(number=1, attempt=1, deadline_s=30.0, stay_s=0.0):
    call = pb.Participate(
        run_id="run",
        round=number,
        attempt=attempt,
        nonce="00",
        kind="train",
        deadline_s=deadline_s,
        stay_s=stay_s,
    )
    return pb.Instruction(participate=call)


def until(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)


def is_idle(request):
    return request.status == pb.STATUS_IDLE and bool(request.tasks) and request.tasks[0].ready


def test_without_enrolment_it_says_what_to_do(config):
    with pytest.raises(NotFound, match="not enrolled") as caught:
        Agent(config).run()
    assert "enroll" in caught.value.hint


def test_it_reports_itself_and_stops_cleanly(coordinator, agent, running, enrolled):
    box = running(agent)
    request = coordinator.heard(is_idle)
    assert request.tasks[0].name == "lepton_fl.tasks.images:digits"
    assert request.tasks[0].version == "1"
    assert request.capabilities.cpus > 0
    assert abs(request.device_time - time.time()) < 60
    agent.stop()
    box["thread"].join(PATIENCE)
    assert box["ended"] is True
    assert enrolled.status()["state"] == "stopped"
    assert enrolled.holder() == 0


def test_a_second_agent_is_told_who_holds_the_folder(coordinator, agent, running, config):
    running(agent)
    coordinator.heard()
    with pytest.raises(StateLocked, match="pid"):
        Agent(config).run()


def test_the_coordinator_may_come_later_and_go_and_return(coordinator, agent, running, caplog):
    def said():
        words = [r.message.split()[0] for r in caplog.records]
        return [word for word in words if word in ("No", "Connected")]

    coordinator.stop()
    caplog.set_level("INFO", "lepton_client")
    running(agent)
    until(lambda: agent._failures >= 3)
    coordinator.start()
    until(lambda: said() == ["No", "Connected"])
    coordinator.stop()
    until(lambda: agent._failures >= 3)
    coordinator.start()
    until(lambda: len(said()) >= 4)
    assert said() == ["No", "Connected", "No", "Connected"]  # by change, not by attempt
    assert coordinator.renewals == []  # a restart of the coordinator is no reason to ask for certificates


def test_a_busy_coordinator_is_left_alone_for_as_long_as_it_asks(coordinator, agent, running, caplog):
    coordinator.refusal, coordinator.retry_s = ConnectionFailed("too much to do"), 0.5  # the back-off is 0.1
    running(agent)
    until(lambda: len(coordinator.refused_at) >= 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(coordinator.refused_at)]
    assert min(gaps) >= 0.45
    coordinator.refusal = None
    coordinator.heard()
    assert "is busy: too much to do" in caplog.text


def test_what_grpc_itself_puts_off_is_no_lost_connection(coordinator, agent, running, monkeypatch):
    def full(request, context):
        coordinator.refused_at.append(time.monotonic())
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many pending requests for this server")

    monkeypatch.setattr(coordinator, "CheckIn", full)
    coordinator.stop()
    coordinator.start()
    link = []
    running(agent)
    until(lambda: len(coordinator.refused_at) >= 2 and link.append(agent._link) is None)
    until(lambda: len(coordinator.refused_at) >= 5)
    assert agent._link is link[0]  # no new handshakes


def test_revoked_means_the_end_with_a_clear_text(coordinator, agent, running, enrolled):
    box = running(agent)
    coordinator.heard()
    coordinator.refusal = TrustError("This device was revoked.", hint="Ask your operator.")
    box["thread"].join(PATIENCE)
    assert isinstance(box["error"], TrustError)
    assert box["error"].exit_code == 6
    assert "revoked" in str(box["error"])
    assert "revoked" in enrolled.status()["reason"]


def test_a_stranger_at_the_address_is_not_talked_to_and_not_the_end(coordinator, agent, running, enrolled):
    coordinator.stop()
    real = coordinator.authority
    coordinator.authority = type(real)("stranger")
    coordinator.start()
    running(agent)
    until(lambda: "does not trust" in enrolled.status().get("error", ""))
    assert coordinator.check_ins.empty()
    coordinator.stop()
    coordinator.authority = real
    coordinator.start()
    coordinator.heard(is_idle)


def test_selected_it_trains_answers_and_leaves(coordinator, agent, running, post, work, enrolled):
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    coordinator.heard(lambda r: r.status == pb.STATUS_BUSY)
    work.finish.set()
    until(lambda: post.answers and post.left)
    coordinator.instructions.put(
        pb.Instruction(verdict=pb.Verdict(run_id="run", round=1, attempt=1, reason="late", detail="too late"))
    )
    until(lambda: enrolled.status().get("verdicts"))
    assert enrolled.status()["verdicts"][0]["reason"] == "late"
    assert '"run",1,1,"00",true' in enrolled.ledger.read_text()
    while not coordinator.check_ins.empty():
        coordinator.check_ins.get()
    coordinator.heard(is_idle)


def test_it_stays_for_the_next_round_without_joining_again(coordinator, agent, running, post, work):
    coordinator.wait = True
    work.finish.set()
    running(agent)
    coordinator.heard(is_idle)
    for number in (1, 2, 3):
        post.send(number)
        coordinator.instructions.put(participate(number, stay_s=30))
        until(lambda n=number: len(post.answers) == n)
    assert post.joined == 1


def test_told_twice_it_works_once(coordinator, agent, running, post, work):
    coordinator.wait = True
    work.finish.set()
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    until(lambda: post.answers)
    until(lambda: not agent._worker.busy)
    coordinator.instructions.put(participate())
    coordinator.instructions.put(participate(2, deadline_s=0.001))  # a marker: handled after it
    until(lambda: ("run", 2, "00") not in agent._worker._open and not agent._worker.alive)
    assert work.count == 1


def test_leave_stops_the_training_and_nothing_is_sent(coordinator, agent, running, post, work):
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    coordinator.instructions.put(pb.Instruction(leave=pb.Leave(run_id="run", round=1, nonce="00")))
    assert work.stopped.wait(PATIENCE)
    until(lambda: post.left)
    assert post.answers == []


def test_it_says_what_it_takes_part_in_and_leaves_what_a_check_in_tells_it_to(
    coordinator, agent, running, post, work
):
    """The coordinator's word on the stream was lost, or it knows nothing of the attempt any more."""
    coordinator.wait = True
    running(agent)
    assert not coordinator.heard(is_idle).engaged
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    (engaged,) = coordinator.heard(lambda r: r.engaged).engaged
    assert (engaged.run_id, engaged.round, engaged.nonce, engaged.failure) == ("run", 1, "00", "")
    coordinator.tells = [pb.Instruction(leave=pb.Leave(run_id="run", round=1, nonce="00"))]
    assert work.stopped.wait(PATIENCE)
    coordinator.heard(lambda r: is_idle(r) and not r.engaged)
    assert post.answers == []


def test_asked_to_another_attempt_of_a_run_it_checks_in_at_once_to_hear_which_one_is_over(
    coordinator, agent, running, post, work
):
    coordinator.wait, coordinator.interval = True, 3600.0
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    coordinator.tells = [pb.Instruction(leave=pb.Leave(run_id="run", round=1, nonce="00"))]
    coordinator.instructions.put(participate(2))
    request = coordinator.heard(lambda r: r.engaged)
    assert [engaged.round for engaged in request.engaged] == [1, 2]
    assert work.stopped.wait(PATIENCE)


def test_a_worker_that_fails_is_told_until_the_coordinator_has_heard_it(
    coordinator, agent, running, post, work, monkeypatch
):
    pulling, fail = threading.Event(), threading.Event()

    def broken(node):
        pulling.set()
        fail.wait(PATIENCE)
        raise MemoryError

    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    monkeypatch.setattr(PostNode, "pull", broken)
    coordinator.instructions.put(participate())
    assert pulling.wait(PATIENCE)
    coordinator.refusal = ConnectionFailed("The coordinator is busy.")
    until(lambda: coordinator.refused_at)
    fail.set()
    until(lambda: agent._worker.failures)
    calls = len(coordinator.refused_at)
    until(lambda: len(coordinator.refused_at) > calls + 2)
    coordinator.refusal = None
    request = coordinator.heard(lambda r: r.engaged and r.engaged[0].failure)
    assert request.status == pb.STATUS_IDLE
    assert "MemoryError" in request.engaged[0].failure
    assert not coordinator.heard().engaged
    assert agent._worker.failures == {}


def test_an_answerer_that_breaks_is_reported_and_the_agent_goes_on(
    coordinator, config, enrolled, running, post, good_data
):
    def broken(records, should_stop):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    coordinator.wait = True
    running(Agent(config, node_factory=post.node, answer=broken, check=good_data))
    coordinator.heard(is_idle)
    for number in (1, 2):
        post.send(number)
        coordinator.instructions.put(participate(number))
        until(lambda n=number: len(post.errors) == n)
    assert "ModuleNotFoundError" in post.errors[0][2]


def test_stop_ends_training_at_once(coordinator, agent, running, post, work):
    coordinator.wait = True
    box = running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    agent.stop()
    box["thread"].join(PATIENCE)
    assert work.stopped.is_set()
    assert box["ended"] is True
    assert post.answers == []


def test_a_dropped_stream_is_opened_again(coordinator, agent, running, post, work):
    coordinator.wait = True
    work.finish.set()
    running(agent)
    coordinator.heard(is_idle)
    until(lambda: coordinator.waits)
    coordinator.drop_streams.set()
    until(lambda: coordinator.waits > 1)
    coordinator.drop_streams.clear()
    post.send()
    coordinator.instructions.put(participate())
    until(lambda: post.answers)


def test_a_coordinator_that_restarts_in_mid_training_still_gets_the_answer(
    coordinator, agent, running, post, work
):
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    coordinator.stop()
    post.broken = 5
    work.finish.set()
    coordinator.start()
    until(lambda: post.answers)
    assert work.count == 1
    assert post.joined > 1


@pytest.mark.parametrize("word", [Rejection.NOT_SELECTED, "shut out"])
def test_a_device_that_was_shut_out_in_mid_training_hands_over_what_it_has_and_trains_once(
    coordinator, agent, running, post, work, word
):
    """Its node has another number now, or is not let in until it is asked again."""
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    assert work.began.wait(PATIENCE)
    shut_out = TrustError("The key is not admitted.")
    post.refusal = UpdateRejected(word, "another node's") if word != "shut out" else shut_out
    work.finish.set()
    until(lambda: post.refusal is None)
    if word == "shut out":
        coordinator.instructions.put(participate())  # as the coordinator does, once
    until(lambda: post.answers)
    assert work.count == 1
    assert len(post.answers) == 1


def causes(request):
    return [trouble.cause for trouble in request.troubles]


def test_training_that_does_not_move_is_reported_until_it_does(
    config, coordinator, enrolled, running, post, good_data, monkeypatch
):
    monkeypatch.setattr("lepton_client.worker.LOAD_S", 0.0)
    monkeypatch.setattr("lepton_client.agent.BUSY_SLICE_S", 0.05)
    stuck, over = threading.Event(), threading.Event()

    class Stuck(Answer):
        def __call__(self, records, should_stop):
            should_stop()
            stuck.wait(PATIENCE)
            while not over.wait(0.005):  # it moves again, and goes on to move
                should_stop()
            self.finish.set()
            return super().__call__(records, should_stop)

    limits = config.limits.model_copy(update={"stall_s": 0.3})
    settings = config.model_copy(update={"limits": limits})
    agent = Agent(settings, node_factory=post.node, answer=Stuck(), check=good_data, clock=SystemLike())
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    request = coordinator.heard(lambda r: causes(r) == ["hung-training"])
    assert request.status == pb.STATUS_BUSY
    assert "no step of training" in request.troubles[0].detail
    stuck.set()
    coordinator.heard(lambda r: causes(r) == [])  # it moves again
    over.set()
    until(lambda: post.answers)


def test_a_slow_link_is_reported(config, coordinator, enrolled, running, post, good_data, monkeypatch):
    monkeypatch.setattr("lepton_client.agent.BUSY_SLICE_S", 0.05)
    monkeypatch.setattr(PostNode, "moving_s", 20.0)
    work = Answer()
    agent = Agent(config, node_factory=post.node, answer=work, check=good_data, clock=SystemLike())
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    post.send()
    coordinator.instructions.put(participate())
    request = coordinator.heard(lambda r: causes(r) == ["slow-link"])
    assert "on its way for 20 s" in request.troubles[0].detail
    work.finish.set()


@pytest.mark.parametrize(("kills", "cause"), [(3, "interrupted"), (4, "out-of-memory")])
def test_what_ended_the_process_in_mid_training_is_told(
    config, coordinator, enrolled, running, post, work, good_data, monkeypatch, kills, cause
):
    ledger = Ledger(enrolled.ledger, lambda: 3)
    ledger.begin(Ticket("train", "run", 1, 1, "00"))
    monkeypatch.setattr("lepton_client.agent.memory_kills", lambda: kills)
    agent = Agent(config, node_factory=post.node, answer=work, check=good_data, clock=SystemLike())
    post.send()
    running(agent)
    request = coordinator.heard(lambda r: r.troubles)
    assert causes(request) == [cause]
    assert "round 1 of run run" in request.troubles[0].detail
    until(lambda: post.errors)
    assert post.errors[0][1].value == cause


@pytest.mark.parametrize("known", ["begun", "answered"])
def test_a_message_of_an_attempt_begun_before_is_refused_not_redone(
    coordinator, agent, running, post, work, enrolled, known
):
    ledger, ticket = Ledger(enrolled.ledger), Ticket("train", "run", 1, 1, "00")
    ledger.begin(ticket)
    if known == "answered":
        ledger.answered(ticket)
    post.send()
    coordinator.wait = True
    running(agent)
    if known == "answered":  # otherwise it looks for the message by itself
        coordinator.heard(is_idle)
        coordinator.instructions.put(participate())
    until(lambda: post.errors)
    assert "works once" in post.errors[0][2]
    assert work.count == 0
    coordinator.heard(is_idle)
    assert Ledger(enrolled.ledger).interrupted() == []


def test_a_full_disk_means_no_training_and_is_reported(
    coordinator, agent, running, post, work, enrolled, monkeypatch
):
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)

    def full(*_args, **_kwargs):
        raise DiskFull("No space was left.")

    with monkeypatch.context() as patch:
        patch.setattr("lepton_client.ledger.write_atomic", full)
        patch.setattr("lepton_client.state.write_atomic", full)
        post.send()
        coordinator.instructions.put(participate())
        until(lambda: post.errors)
        assert "No space" in post.errors[0][2]
        request = coordinator.heard(lambda r: r.status == pb.STATUS_NOT_ELIGIBLE)
        assert "No space" in request.reason
        assert causes(request) == ["disk-full"]
    coordinator.heard(is_idle)
    assert work.count == 0


def test_a_device_that_is_not_eligible_says_so_and_answers_with_the_reason(
    config, coordinator, enrolled, running, post, work, good_data
):
    rules = config.eligibility.model_copy(update={"command": ("false",)})
    agent = Agent(
        config.model_copy(update={"eligibility": rules}),
        node_factory=post.node,
        answer=work,
        check=good_data,
    )
    coordinator.wait = True
    running(agent)
    request = coordinator.heard(lambda r: r.status == pb.STATUS_NOT_ELIGIBLE)
    assert "said no" in request.reason
    post.send()
    coordinator.instructions.put(participate())
    until(lambda: post.errors)
    assert "said no" in post.errors[0][2]
    assert work.count == 0


def test_data_that_go_and_come_back(config, coordinator, enrolled, running, tmp_path):
    from lepton_client.config import TaskSection
    from lepton_client.inspection import Finding

    path = tmp_path / "rows.npz"
    path.write_text("1")
    section = TaskSection(reference="digits", data={"kind": "npz", "path": str(path)})

    def check(_):
        there = path.exists()
        return Finding("digits", "1", ready=there, reason="" if there else "There is no file.")

    running(Agent(config.model_copy(update={"tasks": (section,)}), check=check))
    coordinator.heard(is_idle)
    path.unlink()
    gone = coordinator.heard(lambda r: bool(r.tasks) and not r.tasks[0].ready)
    assert gone.tasks[0].reason == "There is no file."
    path.write_text("22")
    coordinator.heard(is_idle)


def test_a_task_that_cannot_be_loaded_is_told_as_the_reason(coordinator, config, enrolled, running):
    from lepton_client.inspection import Finding

    running(Agent(config, check=lambda section: Finding("digits", reason="There is no such task.")))
    request = coordinator.heard(lambda r: "no such task" in r.reason)
    assert request.status == pb.STATUS_NOT_ELIGIBLE
    assert [(t.version, t.ready, t.reason) for t in request.tasks] == [("", False, "There is no such task.")]


def test_a_moved_clock_is_reported_and_harmless(coordinator, config, enrolled, running, good_data, caplog):
    clock = SystemLike()
    running(Agent(config, check=good_data, clock=clock))
    coordinator.heard(is_idle)
    clock.shift = -86_400.0 * 400
    coordinator.heard(lambda r: abs(r.device_time - time.time()) > 86_400)
    coordinator.heard(is_idle)
    clock.shift = 0.0
    coordinator.heard(lambda r: abs(r.device_time - time.time()) < 3600)
    text = caplog.text
    assert "clock was moved by" in text
    assert "behind the coordinator" in text
    assert coordinator.renewals == []


def test_the_certificate_is_renewed_when_the_coordinator_says_so(coordinator, agent, running, enrolled):
    before = enrolled.identity()
    coordinator.renew = True
    running(agent)
    until(lambda: coordinator.renewals)
    until(lambda: enrolled.identity().certificate_pem != before.certificate_pem)
    while not coordinator.check_ins.empty():
        coordinator.check_ins.get()
    coordinator.heard()
    assert len(coordinator.renewals) == 1  # not again at once, whatever the coordinator says


@pytest.mark.parametrize("days", [0.05, 0.04])  # signed an hour ago: 83 % of its life, or over
def test_the_certificate_is_renewed_near_its_end_and_after(
    coordinator, config, running, post, work, good_data, days
):
    coordinator.certificate = {"days": days}
    state = StateDir(config.client.state_dir)
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    coordinator.certificate = {"days": 2.0}
    running(Agent(config, node_factory=post.node, answer=work, check=good_data))
    coordinator.heard(is_idle)
    assert coordinator.renewals == [crypto.device_id(crypto.load_key(state.key).public_key())]


def test_a_certificate_that_the_coordinator_thinks_ended_is_renewed(coordinator, config, running, good_data):
    coordinator.certificate = {"days": 0.04}
    state = StateDir(config.client.state_dir)
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    coordinator.certificate = {"days": 2.0}
    clock = SystemLike()
    clock.shift = -3500.0  # this machine believes that it has just begun
    running(Agent(config, check=good_data, clock=clock))
    coordinator.heard(is_idle)
    assert len(coordinator.renewals) == 1


def test_a_refused_renewal_of_an_ended_certificate_is_the_end(coordinator, config, running, good_data):
    coordinator.certificate = {"days": 0.04}
    state = StateDir(config.client.state_dir)
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    coordinator.refusal = TrustError("This device was revoked.")
    box = running(Agent(config, check=good_data))
    box["thread"].join(PATIENCE)
    assert isinstance(box["error"], TrustError)


@pytest.mark.parametrize("interval", [float("nan"), -1.0, 0.0, float("inf"), 1e12])
def test_a_senseless_interval_does_not_turn_into_a_storm(coordinator, agent, running, interval):
    coordinator.interval = interval
    running(agent)
    coordinator.heard()
    until(lambda: agent._diary._fields.get("connected"))
    time.sleep(0.3)
    assert coordinator.check_ins.qsize() <= 2


# --- a coordinator that is restarted in mid-round -------------------------------------------------------


class Restarted(Post):
    """Pushes come too late: their question was asked by a coordinator that is gone."""

    def __init__(self):
        super().__init__()
        self.gone, self.strange = threading.Event(), 0

    def node(self, address, ca_pem, key):
        return RestartedNode(self)


class RestartedNode(PostNode):
    def activate(self):
        number = super().activate()
        if self.post.strange:
            self.post.strange -= 1
            raise TrustError("the request is not signed by an admitted key")
        return number

    def push(self, handle, records):
        if not self.post.gone.is_set():
            with self.post.lock:
                self.post.waiting.clear()  # the message went with the process that had it
            self.post.gone.set()
            raise UpdateRejected(Rejection.LATE, "the message is unknown")
        super().push(handle, records)


@pytest.fixture
def restarted():
    return Restarted()


@pytest.fixture
def trained(coordinator, config, enrolled, restarted, work, good_data, running):
    """An agent that was asked, and has trained."""
    agent = Agent(config, node_factory=restarted.node, answer=work, check=good_data, clock=SystemLike())
    coordinator.wait = True
    work.finish.set()

    def asked():
        running(agent)
        coordinator.heard(is_idle)
        restarted.send()
        coordinator.instructions.put(participate())
        return agent

    return asked


def test_what_was_trained_is_given_to_the_coordinator_that_asks_again(
    coordinator, enrolled, restarted, work, trained
):
    trained()
    assert restarted.gone.wait(PATIENCE)
    again = participate()
    again.participate.resumed = True
    restarted.send()
    coordinator.instructions.put(again)
    until(lambda: restarted.answers)
    assert work.count == 1
    assert not restarted.errors
    until(lambda: not Ledger(enrolled.ledger).interrupted())


def test_the_word_that_a_restarted_coordinator_asks_may_come_after_the_work(
    coordinator, agent, post, work, running
):
    def ask(number):
        call = participate(deadline_s=3600.0)
        call.participate.resumed, call.participate.node_id = True, number
        coordinator.instructions.put(call)

    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    work.finish.set()
    post.number = 7
    post.send()
    ask(7)
    until(lambda: post.answers and not agent._worker.busy)
    ask(7)  # a check-in that was long on its way
    verdict = pb.Verdict(run_id="run", round=1, attempt=1, kind="train", accepted=True)
    coordinator.instructions.put(pb.Instruction(verdict=verdict))
    until(lambda: agent._diary._verdicts)
    assert not agent._worker.busy  # until the deadline, nobody would have drawn it
    post.number = 8  # it was restarted once more, and wants what it does not have
    post.send()
    ask(8)
    until(lambda: post.errors and not agent._worker.busy)
    assert work.count == 1


def test_a_worker_that_fails_is_not_started_again_by_the_same_offer(
    coordinator, config, enrolled, work, good_data, running, caplog
):
    def no_node(*_):
        raise RuntimeError("Flower is not whole")

    agent = Agent(config, node_factory=no_node, answer=work, check=good_data, clock=SystemLike())
    coordinator.wait = True
    running(agent)
    coordinator.heard(is_idle)
    for _ in range(3):
        coordinator.instructions.put(participate())
        until(lambda: "the worker failed" in caplog.text and not agent._worker.alive)
    verdict = pb.Verdict(run_id="run", round=1, attempt=1, kind="train", accepted=False)
    coordinator.instructions.put(pb.Instruction(verdict=verdict))
    until(lambda: agent._diary._verdicts)
    assert caplog.text.count("the worker failed") == 1


def test_an_error_that_nobody_foresaw_does_not_silence_a_device(
    coordinator, agent, running, caplog, monkeypatch
):
    check_in, wrong = agent._check_in, [RuntimeError("odd"), KeyError("odd, too")]

    def odd():
        if wrong:
            raise wrong.pop()
        return check_in()

    monkeypatch.setattr(agent, "_check_in", odd)
    running(agent)
    coordinator.heard(is_idle)
    assert caplog.text.count("nobody foresaw") == 2


def test_a_call_that_grpc_never_ends_ends_for_us(coordinator, config, enrolled, monkeypatch):
    from lepton_client import link as module

    monkeypatch.setattr(module, "LATE_S", 0.1)
    monkeypatch.setattr(module, "CLOSE_S", 0.1)
    identity, closed = enrolled.identity(), threading.Event()
    lost = types.SimpleNamespace(add_done_callback=lambda told: None, cancel=lambda: None)
    with module.Link(identity.device_service, identity.ca_pem.encode(), timeout_s=0.1) as link:
        channel = link._channel
        link._channel = types.SimpleNamespace(close=closed.wait)
        link._stub = types.SimpleNamespace(CheckIn=types.SimpleNamespace(future=lambda *_, **__: lost))
        with pytest.raises(ConnectionFailed, match="does not end"):
            link.check_in(pb.CheckInRequest())
    closed.set()
    channel.close()


def test_a_verdict_settles_what_was_never_acknowledged(coordinator, enrolled, restarted, trained):
    agent = trained()
    assert restarted.gone.wait(PATIENCE)
    assert Ledger(enrolled.ledger).interrupted()
    verdict = pb.Verdict(run_id="run", round=1, attempt=1, kind="train", accepted=True)
    coordinator.instructions.put(pb.Instruction(verdict=verdict))
    until(lambda: not Ledger(enrolled.ledger).interrupted())
    until(lambda: not agent._worker.busy)


def test_a_selection_outlives_one_refusal_of_a_coordinator_that_just_came_up(restarted, trained):
    restarted.gone.set()
    restarted.strange = 1
    trained()
    until(lambda: restarted.answers)
