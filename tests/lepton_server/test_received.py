"""Updates on the disk before their devices are told: kept, read again, counted, erased; and what is lost."""

import hashlib
import threading

import numpy as np
import pytest

from lepton_fl.errors import DiskFull, Rejection, StateConflict, UpdateRejected
from lepton_fl.files import BlobStore
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_server.exchange import FleetExchange
from lepton_server.patience import Interrupted
from lepton_server.received import Inbox

SIZE = 4


def objects(*contents):
    return {hashlib.sha256(c).hexdigest(): c for c in contents}


@pytest.fixture
def planned(works):
    """A run whose first attempt is open; its plan."""
    works.queue()
    works.store.record("run.started", {"run_id": "r1"})
    spec = RunSpec(task="pkg:task", cohort={"size": 3, "deadline_s": 20.0})
    work = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
    state = RunState(np.zeros(SIZE, np.float32)).on(attempt=1)
    plan = plan_round(spec, "r1", work, "train", 1, state, works.ids, 3, "ab" * 16)
    body = {
        "run_id": "r1",
        "round": 1,
        "attempt": 1,
        "plan": plan.to_json(),
        "model_sha256": plan.model_sha256,
    }
    works.store.record("round.planned", body)
    return plan


@pytest.fixture
def inbox(works):
    return lambda: Inbox(works.store, BlobStore(works.folder / "attempts"))


def files(works):
    return [path for path in (works.folder / "attempts").rglob("*") if path.is_file()]


def test_what_is_kept_is_there_after_a_restart_and_the_first_one_moves_the_attempt(works, planned, inbox):
    one, first = works.ids[:2], objects(b"a" * 1000, b"", b"root")
    inbox().keep(planned, one[0], first, 1004)
    assert works.store.phase("r1", 1, 1) == "collecting"
    inbox().keep(planned, one[1], objects(b"b"), 1)
    again = {kept.device_id: kept for kept in inbox().of(planned)}
    assert list(again) == sorted(one)
    assert {name: bytes(content) for name, content in again[one[0]].read().items()} == first
    assert again[one[0]].num_bytes == 1004
    assert len(files(works)) == 2
    kinds = [e.kind for e in works.store.events(subject="r1")]
    assert kinds.count("round.moved") == 1
    works.unharmed()


def test_one_device_has_one_update_and_a_closed_attempt_takes_none(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a"), 1)
    with pytest.raises(StateConflict, match="already"):
        box.keep(planned, works.ids[0], objects(b"b"), 1)
    with works.store.transaction() as change:
        assert change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[:1])
    with pytest.raises(StateConflict, match="takes no updates"):
        box.keep(planned, works.ids[1], objects(b"c"), 1)
    assert len(files(works)) == 1  # what was refused is not left


def test_once_it_is_fixed_who_counts_nobody_else_is_found(works, planned, inbox):
    box = inbox()
    for device in works.ids:
        box.keep(planned, device, objects(device.encode()), 1)
    assert not box.is_closed(planned)
    with works.store.transaction() as change:
        change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[1:])
    assert box.is_closed(planned)
    assert [kept.device_id for kept in box.of(planned)] == sorted(works.ids[1:])


def test_phases_only_go_on(works, planned):
    def move(phase):
        with works.store.transaction() as change:
            return change.move("r1", 1, 1, phase)

    assert move("collecting")
    assert not move("offered")
    assert not move("collecting")
    assert move("aggregated")
    with pytest.raises(StateConflict, match="cannot be offered"):
        works.store.record("round.moved", {"run_id": "r1", "round": 1, "attempt": 1, "phase": "offered"})
    with pytest.raises(StateConflict, match="cannot be released"):
        works.store.record("round.moved", {"run_id": "r1", "round": 1, "attempt": 1, "phase": "released"})
    with pytest.raises(StateConflict, match="unplanned"):
        works.store.record("round.moved", {"run_id": "r1", "round": 2, "attempt": 1, "phase": "offered"})


def test_what_was_never_acknowledged_and_what_is_over_are_erased(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a"), 1)
    box.blobs.put(b"an update whose row a crash has prevented")
    (works.folder / "attempts" / "tmp" / "half").write_bytes(b"an update that a crash has cut off")
    assert len(files(works)) == 3
    box = inbox()
    assert len(files(works)) == 1
    box.forget("r1", 1)
    assert files(works) == []
    assert works.store.received("r1", 1, 1) == []


def test_a_damaged_or_missing_file_is_noticed(works, planned, inbox):
    box = inbox()
    box.keep(planned, works.ids[0], objects(b"a" * 100), 1)
    assert box.is_whole(planned)
    (path,) = files(works)
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        assert not box.is_whole(planned)
    path.unlink()
    assert not box.is_whole(planned)


def test_a_full_disk_keeps_nothing_and_says_so(works, planned, inbox, small_files):
    box = inbox()
    with small_files(2000), pytest.raises(DiskFull):
        box.keep(planned, works.ids[0], objects(bytes(5000)), 1)
    assert works.store.received("r1", 1, 1) == []
    assert files(works) == []
    box.keep(planned, works.ids[0], objects(bytes(5000)), 1)


# --- an attempt that a restart has cut off ----------------------------------------------------------


def exchange_of(works, inbox, **settings):
    return FleetExchange(
        works.link,
        works.fleet,
        lambda device_id: works.store.device(device_id).public_key,
        stay_s=1.0,
        closing=settings.pop("closing", lambda: False),
        inbox=inbox,
        **settings,
    )


def reply_objects(works, number):
    """A device's reply as Flower's objects, the root last."""
    from flwr.app import Message, RecordDict
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )

    from lepton_strategies.records import to_record_dict

    metadata = Metadata(1, "", 1, 1, "m", "g", 0.0, 1.0, "train")
    metadata.delivered_at = ""
    message = make_message(metadata=metadata, content=to_record_dict(Records({}, {"x": number})))
    assert isinstance(message, Message)
    assert isinstance(message.content, RecordDict)
    made = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return {node.object_id: made[node.object_id] for node in iterate_object_tree(get_object_tree(message))}


def test_a_restarted_round_has_what_had_come_and_asks_the_others_only(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    for number, device in enumerate(works.ids[:2]):
        box.keep(planned, device, reply_objects(works, number), 10)
    told, phases = [], []
    real = works.fleet.instruct
    works.fleet.instruct = lambda device, what: told.append((device, what)) or real(device, what)
    exchange = exchange_of(works, inbox(), unfinished=planned, moved=lambda plan, phase: phases.append(phase))
    answers = exchange.ask(planned, request)
    found = {a.device_id: a.records.config["x"] for a in (next(answers), next(answers))}
    assert found == {works.ids[0]: 0, works.ids[1]: 1}
    assert not told  # and nobody was asked for that

    def wait():
        with pytest.raises(Interrupted):
            list(answers)

    worker = threading.Thread(target=wait)
    worker.start()
    works.until(lambda: works.link._posts)
    assert [device for device, _ in told] == [works.ids[2]]
    assert told[0][1].participate.resumed
    assert phases == ["offered"]
    exchange._closing = lambda: True
    worker.join(30)
    assert not worker.is_alive()
    assert [what.WhichOneof("kind") for _, what in told] == ["participate"]  # at a shutdown they go on


def test_nobody_is_asked_once_it_is_fixed_who_counts(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    for number, device in enumerate(works.ids[:2]):
        box.keep(planned, device, reply_objects(works, number), 10)
    with works.store.transaction() as change:
        change.move("r1", 1, 1, "aggregated")
        change.count_received("r1", 1, 1, works.ids[:1])
    answers = list(exchange_of(works, inbox(), unfinished=planned).ask(planned, request))
    assert [a.device_id for a in answers] == works.ids[:1]
    assert not works.link._posts


def test_a_lost_file_costs_one_device_its_answer(works, planned, inbox):
    box, request = inbox(), Request.of(planned, np.zeros(SIZE, np.float32))
    box.keep(planned, works.ids[0], reply_objects(works, 7), 10)
    files(works)[0].write_bytes(b"?")
    answers = exchange_of(works, box, unfinished=planned).ask(planned, request)
    lost = next(answers)
    answers.close()
    assert isinstance(lost.records, UpdateRejected)
    assert lost.records.reason is Rejection.OFFLINE
