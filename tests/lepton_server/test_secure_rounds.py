"""Secure rounds between the coordinator's part and real devices' seats: no network, every crash."""

import base64
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, select, text, update

from lepton_client.clock import SystemClock
from lepton_client.config import ClientSection
from lepton_client.ledger import Ledger
from lepton_client.secure import Seat, deployment, signing_key
from lepton_client.state import Identity, StateDir
from lepton_client.worker import Worker
from lepton_fl import crypto
from lepton_fl.errors import DiskFull, NotFound, Rejection, TrustError, UpdateRejected
from lepton_fl.files import GENESIS, BlobStore, canonical_json
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.secure_wire import StageAnswer, StageRequest
from lepton_fl.secagg.identity import Certified, issue
from lepton_fl.secagg.server import Stage
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request, TrainReply
from lepton_server import secure as module
from lepton_server.attempts import AttemptLog, Attempts, adopt
from lepton_server.authority import Authority
from lepton_server.secure import SecureFleet, attempt_of
from lepton_server.store import open_store
from lepton_server.store.tables import ATTEMPT_RECORD

N, SIZE = 7, 33
STAGES = [s for s in Stage if s is not Stage.DONE]


class Crash(BaseException):
    """The power is gone."""


class Trains:
    """An owner's data and task: the update is known."""

    def __init__(self, number):
        self.number, self.asked = number, 0

    def update(self, request):
        rng = np.random.default_rng([self.number, request.ticket.round])
        return rng.integers(-1000, 1000, SIZE).astype(np.int32)

    def respond(self, records, should_stop):
        self.asked += 1
        request = Request.read(records)
        sums = {"loss_sum": np.array([float(self.number)]), "examples": np.array([2])}
        return TrainReply(request.ticket, "1", 2, self.update(request), sums, 0.1).to_records()


class Stock:
    """What the fleet keeps of keys made ahead."""

    def __init__(self):
        self.adverts, self.spent = {}, set()

    def spend_adverts(self, adverts):
        self.spent |= set(adverts)

    def take_advert(self, device):
        found = self.adverts.get(device, [])
        return found.pop(0) if found else None

    def add_advert(self, device, advert):
        self.adverts.setdefault(device, []).append(advert)


class Wire:
    """Carries stages to seats; devices may be silent, or say something else, at any of them."""

    def __init__(self, seats):
        self.seats, self.silent, self.twist = seats, {}, lambda device, stage, records: records
        self.answers, self.asked, self.told, self.phases = {}, [], [], []
        self.disk = {}  # durable answers
        self.leaving = False  # whether devices hear that an attempt is over

    def moved(self, plan, phase):
        self.phases.append(phase)

    def stages(self, plan, seconds, *, resumed=False):
        self.plan = plan
        return self

    def ask(self, messages, seconds, *, durable=False):
        for device in messages:
            asked = StageRequest.read(messages[device])
            self.asked.append((asked.stage, device))
            if device in self.silent.get(asked.stage, ()):
                yield None
                continue
            answer = self.answer(device, asked)
            if durable:
                self.disk[self.plan.nonce, device] = answer
            yield Answer(device, answer, 10)

    def kept(self, plan, device):
        if (plan.nonce, device) not in self.disk:
            raise NotFound("There is no update.")
        return self.disk[plan.nonce, device]

    def answer(self, device, asked):
        seat, name = self.seats[device], f"{asked.ticket.run_id}/{asked.ticket.round}/{asked.ticket.nonce}"
        try:
            records = seat.answer(asked, name).to_records()
            if asked.stage is Stage.SHARES:
                seat.train(asked, name, lambda: False)
        except (TrustError, UpdateRejected) as error:
            return UpdateRejected(Rejection.FAILED, str(error))
        frame = StageAnswer.read(records).frame
        assert self.answers.setdefault((device, name, asked.stage), frame) == frame  # the same again
        return self.twist(device, asked.stage, records)

    def tell(self, plan, device, refusal):
        self.told.append((device, refusal))

    def close(self, *, going_on=False):
        if self.leaving and not going_on:
            for seat in self.seats.values():  # devices leave
                seat.leave(f"{self.plan.run_id}/{self.plan.round}/{self.plan.nonce}")


@pytest.fixture
def fleet(tmp_path):
    with open_store(tmp_path / "lepton.db") as store:
        yield make_fleet(tmp_path, store)


def make_fleet(folder, store):
    authority, ca = Ed25519PrivateKey.generate(), Authority.open(folder / "keys")
    public = authority.public_key().public_bytes_raw()
    seats, identity = {}, None
    for number in range(N):
        state = StateDir(folder / f"dev{number}")
        crypto.save_key(state.key, crypto.new_key())
        device = crypto.device_id(crypto.load_key(state.key).public_key())
        identity = Identity(
            device, "", "", ca.ca_pem.decode(), "", "", "", "", 0.0, 0.0, authority=public.hex()
        )
        key, name = signing_key(state), deployment(identity)
        credential = issue(authority, name, device, key.public_key().public_bytes_raw(), 2**31)
        paper = {
            "authority": public.hex(),
            "signing_key": key.public_key().public_bytes_raw().hex(),
            "credential": base64.b64encode(credential).decode(),
            "ends": 2**31,
            "format": 1,
        }
        from lepton_fl.files import canonical_json, write_private

        write_private(state.signing, canonical_json(paper))
        seats[device] = Seat(state, ClientSection(least_cohort=4), Trains(number))
        seats[device].belongs_to(identity)
    return Works(folder, store, seats, Certified([public]), deployment(identity))


class Works:
    def __init__(self, folder, store, seats, trust, name):
        self.folder, self.seats, self.trust, self.deployment = folder, seats, trust, name
        self.store, self.attempts = store, Attempts(store, BlobStore(folder / "attempts"))
        self.wire, self.stock = Wire(seats), Stock()
        self.shown = []

    def rounds(self):
        """As after a restart of the coordinator: nothing is left but the store and the files."""
        return SecureFleet(
            self.wire,
            self.stock,
            self,
            self.attempts,
            stage_s=1.0,
            show=lambda words, seconds: self.shown.append(words),
            insist=lambda work: work(),
        )

    def plan(self, number=1, attempt=1, without="", **secure):
        spec = RunSpec(
            task="pkg:task",
            cohort={"size": N, "min_reports": 4},
            secure_aggregation="required",
            secure={"min_cohort": 4} | secure,
            clip_norm=1.0,
            weighting="equal",
        )
        self.work = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
        state = RunState(np.zeros(SIZE, np.float32)).on(attempt=attempt)
        nonce = f"{number:016x}{attempt:016x}"
        cohort = tuple(d for d in self.seats if d != without)
        plan = plan_round(spec, "r1", self.work, "train", number, state, cohort, N, nonce)
        return plan, Request.of(plan, state.model)

    def expected(self, plan, request, devices):
        accumulator = Accumulator(plan)
        for device in devices:
            update = self.seats[device]._office.update(request)
            accumulator.add(UpdateBatch(update[None, :], np.array([2], np.int64)))
        return accumulator.finalize()

    def run(self, plan, request):
        return self.rounds().collect(plan, request, None, lambda: 0.0, None)

    def check(self, plan, request, collected, mean):
        counted = [d for d, e in collected.participation.items() if e.outcome == "accepted"]
        assert np.array_equal(mean, self.expected(plan, request, counted))
        return counted


def test_the_sum_is_that_of_a_plain_round_and_keys_are_made_ahead(fleet):
    plan, request = fleet.plan()
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N
    assert {s for s, _ in fleet.wire.asked} == set(STAGES)
    fleet.wire.asked.clear()
    plan, request = fleet.plan(number=2)
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N
    assert Stage.ADVERTS not in {s for s, _ in fleet.wire.asked}  # one exchange less to wait for


def test_a_key_that_was_taken_outlives_those_that_a_restarted_coordinator_asks_for(fleet, monkeypatch):
    take = fleet.stock.take_advert

    def taken(device):
        advert = take(device)
        for _ in range(3):  # restarts, before the roster comes to the device
            fleet.seats[device].make_adverts(2)
        return advert

    for device, seat in fleet.seats.items():
        seat.make_adverts(2)
        for advert in seat.adverts:
            fleet.stock.add_advert(device, advert)
    made = {adverts[0] for adverts in fleet.stock.adverts.values()}
    monkeypatch.setattr(fleet.stock, "take_advert", taken)
    plan, request = fleet.plan()
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N
    assert Stage.ADVERTS not in {s for s, _ in fleet.wire.asked}
    assert fleet.stock.spent == made


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name.lower())
@pytest.mark.parametrize("lost", [1, 2])
def test_devices_drop_out_at_every_stage(fleet, stage, lost):
    plan, request = fleet.plan()
    gone = set(list(fleet.seats)[:lost])
    for later in STAGES[STAGES.index(stage) :]:
        fleet.wire.silent[later] = gone
    collected, mean = fleet.run(plan, request)
    counted = fleet.check(plan, request, collected, mean)
    assert set(counted) == set(fleet.seats) - (gone if stage <= Stage.UPLOADS else set())


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name.lower())
def test_too_many_drop_outs_give_nothing_and_burn_the_round_once_signatures_were_asked_for(fleet, stage):
    plan, request = fleet.plan()
    devices = list(fleet.seats)
    for later in STAGES[STAGES.index(stage) :]:
        fleet.wire.silent[later] = set(devices[:4])
    collected, mean = fleet.run(plan, request)
    assert mean is None
    assert collected.burnt == (stage >= Stage.CONSENTS)
    if stage < Stage.REVEALS:
        assert not any(s is Stage.REVEALS for s, _ in fleet.wire.asked)
    fleet.wire.silent.clear()
    plan, request = fleet.plan(attempt=2)
    collected, mean = fleet.run(plan, request)
    signed = stage >= Stage.CONSENTS  # devices that have signed a set sign no other in this round
    assert (mean is None) == signed
    plan, request = fleet.plan(number=2)
    fleet.check(plan, request, *fleet.run(plan, request))


def test_a_coordinator_that_is_killed_after_any_record_goes_on_and_asks_for_no_other_set(fleet, monkeypatch):
    """Every record is the last one before a crash, in one long round of crashes; the sum is right."""
    plan, request = fleet.plan()
    fleet.wire.silent[Stage.UPLOADS] = {next(iter(fleet.seats))}
    append, certified = AttemptLog.append, set()

    def dying(log, record, *, durable):
        append(log, record, durable=durable)
        raise Crash

    monkeypatch.setattr(AttemptLog, "append", dying)
    crashes = 0
    while True:
        try:
            collected, mean = fleet.run(plan, request)
            break
        except Crash:
            crashes += 1
            fleet.stock.adverts.clear()  # it was in memory
    assert len(fleet.check(plan, request, collected, mean)) == N - 1
    assert crashes == N + N + (N - 1) * 3 + 4  # adverts, shares, uploads, consents, reveals; four decisions
    certified = {frame for (_, _, stage), frame in fleet.wire.answers.items() if stage is Stage.CONSENTS}
    assert len(certified) == N - 1
    assert all(seat._office.asked <= 1 for seat in fleet.seats.values())  # nobody has trained twice


def test_a_device_that_was_restarted_is_a_drop_out_and_its_old_keys_do_no_harm(fleet):
    plan, request = fleet.plan()
    fleet.run(plan, request)  # leaves an advert of every device with the coordinator
    device = next(iter(fleet.seats))
    old = fleet.seats[device]
    fleet.seats[device] = Seat(old._state, old._config, old._office)
    fleet.seats[device].belongs_to(old._identity)
    plan, request = fleet.plan(number=2)
    counted = fleet.check(plan, request, *fleet.run(plan, request))
    assert set(counted) == set(fleet.seats) - {device}


def test_a_device_that_sends_another_vector_than_it_signed_is_left_out(fleet):
    plan, request = fleet.plan()
    victim = list(fleet.seats)[2]

    def twist(device, stage, records):
        if device != victim or stage is not Stage.UPLOADS:
            return records
        masked = np.array(records.arrays["masked"])
        masked[0] ^= 1
        return replace(records, arrays={"masked": masked})

    fleet.wire.twist = twist
    collected, mean = fleet.run(plan, request)
    assert victim not in fleet.check(plan, request, collected, mean)
    assert collected.participation[victim].outcome == Rejection.MALFORMED


def test_a_device_with_bad_shares_is_named_before_anybody_signs_and_the_round_goes_on_without_it(fleet):
    plan, request = fleet.plan()
    culprit = list(fleet.seats)[1]
    signing = signing_key(fleet.seats[culprit]._state)

    def twist(device, stage, records):
        if device != culprit or stage is not Stage.SHARES:
            return records
        frame = bytearray(StageAnswer.read(records).frame[:-64])
        for place in range(41, 41 + 80 * (N - 1), 80):
            frame[place + 5] ^= 1
        return StageAnswer(bytes(frame) + signing.sign(bytes(frame))).to_records()

    fleet.wire.twist = twist
    collected, mean = fleet.run(plan, request)
    assert mean is None
    assert not collected.burnt
    assert collected.participation[culprit].outcome == Rejection.BLAMED
    plan, request = fleet.plan(attempt=2, without=culprit)
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N - 1


def test_damaged_records_give_the_round_up_rather_than_ask_again(fleet, monkeypatch):
    plan, request = fleet.plan()
    fleet.wire.silent[Stage.REVEALS] = set(fleet.seats)
    fleet.run(plan, request)
    with fleet.store._engine.begin() as connection:
        body = fleet.store.kept(attempt_of(plan))[1].body
        damaged = body[:40] + bytes([body[40] ^ 1]) + body[41:]
        table = ATTEMPT_RECORD
        connection.execute(update(table).where(table.c.number == 2).values(body=damaged))
    collected, mean = fleet.run(plan, request)
    assert mean is None
    assert collected.burnt
    assert "damaged" in next(iter(collected.participation.values())).detail


def _cut(kept):
    where, records = kept
    return {where: replace(records, arrays={"masked": records.arrays["masked"][:-4]})}


def _lost(kept):
    return {kept[0]: UpdateRejected(Rejection.OFFLINE, "Its file is damaged.")}


@pytest.mark.parametrize("lose", [_cut, _lost])
def test_a_vector_that_was_lost_with_the_power_is_no_part_of_a_sum(fleet, lose):
    plan, request = fleet.plan()
    fleet.wire.silent[Stage.CONSENTS] = set(fleet.seats)
    fleet.run(plan, request)
    fleet.wire.disk |= lose(next(iter(fleet.wire.disk.items())))
    fleet.wire.silent.clear()
    collected, mean = fleet.run(plan, request)
    assert mean is None
    assert collected.burnt


def through_workers(fleet):
    """Devices answer as their workers do; the word that an answer has come is lost."""

    def unused(*_args):
        raise AssertionError

    def worker(seat):
        ledger = Ledger(seat._state.ledger)
        return Worker(
            unused, unused, ledger, SystemClock(), poll_s=1.0, changed=unused, trouble=unused, seat=seat
        )

    workers = {device: worker(seat) for device, seat in fleet.seats.items()}

    def answer(device, asked):
        ticket = asked.ticket
        return workers[device]._answer_stage(asked, (ticket.run_id, ticket.round, ticket.nonce))[0]

    fleet.wire.answer = answer


def test_a_device_that_was_not_told_that_its_key_shares_have_come_trains_when_its_vector_is_asked_for(fleet):
    through_workers(fleet)
    plan, request = fleet.plan()
    name = f"{plan.run_id}/{plan.round}/{plan.nonce}"
    fleet.wire.silent[Stage.UPLOADS] = {(last := list(fleet.seats)[-1])}
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N - 1
    for device, seat in fleet.seats.items():
        assert seat._office.asked == (device != last)
        assert (seat.untrained(name) is None) == (device != last)
        seat.train(seat.untrained(name) or request, name, lambda: False)  # again, or at last
        assert seat._office.asked == 1


def test_devices_that_have_signed_refuse_a_restored_coordinator_before_they_train(fleet):
    through_workers(fleet)
    fleet.wire.leaving = True
    plan, request = fleet.plan()
    fleet.check(plan, request, *fleet.run(plan, request))
    with fleet.store._engine.begin() as connection:
        connection.execute(delete(ATTEMPT_RECORD))  # the backup is from before
    for attempt in (1, 2):  # the one that was open, and another one
        plan, request = fleet.plan(attempt=attempt)
        collected, mean = fleet.run(plan, request)
        assert mean is None
        assert collected.burnt
        assert {e.outcome for e in collected.participation.values()} == {Rejection.SIGNED_BEFORE.value}
    assert all(seat._office.asked == 1 for seat in fleet.seats.values())
    plan, request = fleet.plan(number=2)
    assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N


def before_v0006(store):
    """Tables as before: nothing but spool files had masked vectors, which records name."""
    with store._engine.begin() as connection:
        for change in (
            "DROP TABLE received",
            "DROP TABLE lease",
            "ALTER TABLE round DROP COLUMN phase",
            "ALTER TABLE rollout DROP COLUMN suspect_requests",
            "ALTER TABLE attempt_record ADD COLUMN spooled TEXT NOT NULL DEFAULT '{}'",
            "UPDATE lepton_version SET version_num = 'v0005'",
        ):
            connection.execute(text(change))
        last, rows = GENESIS, connection.execute(select(ATTEMPT_RECORD).order_by(ATTEMPT_RECORD.c.number))
        for row in rows.mappings().all():
            head = canonical_json(
                [row["run_id"], row["round"], row["attempt"], last, row["number"], "", "{}"]
            )
            last = hashlib.sha256(len(head).to_bytes(8, "big") + head + row["body"]).hexdigest()
            here = ATTEMPT_RECORD.c.number == row["number"]
            connection.execute(update(ATTEMPT_RECORD).where(here).values(hash=last))


def test_an_attempt_whose_vectors_an_upgrade_cannot_find_is_given_up_and_the_next_round_is_well(tmp_path):
    with open_store(tmp_path / "lepton.db") as store:
        fleet = make_fleet(tmp_path, store)
        plan, request = fleet.plan()
        model = {"model_sha256": plan.model_sha256 or "ab" * 32}
        store.record("run.queued", {"run_id": "r1", "name": "first", "spec": {"rounds": 3}})
        store.record("run.started", {"run_id": "r1"})
        store.record("model.created", {"run_id": "r1", "round": 0, "metrics": {}} | model)
        store.record("round.planned", {"run_id": "r1", "round": 1, "attempt": 1, "plan": {}} | model)
        fleet.wire.silent[Stage.CONSENTS] = set(fleet.seats)
        fleet.run(plan, request)
        assert len(store.kept(attempt_of(plan))) > 3 * N
        assert all(row.blob == "" for row in store.kept(attempt_of(plan)))
        before_v0006(store)
    fleet.wire.disk.clear()  # a device's update was not kept then
    (tmp_path / "blobs" / "spool" / "r1").mkdir(parents=True)
    with open_store(tmp_path / "lepton.db") as store:
        fleet.store, fleet.attempts = store, Attempts(store, BlobStore(tmp_path / "attempts"))
        adopt(store, fleet.attempts.blobs, tmp_path / "blobs" / "spool")
        assert not (tmp_path / "blobs" / "spool").exists()
        fleet.wire.silent.clear()
        collected, mean = fleet.run(plan, request)
        assert mean is None
        assert collected.burnt
        assert "masked vector" in next(iter(collected.participation.values())).detail
        plan, request = fleet.plan(number=2)
        assert len(fleet.check(plan, request, *fleet.run(plan, request))) == N


@pytest.mark.parametrize("records", [5, 2 * N + 3], ids=["adverts", "uploads"])
def test_a_full_disk_is_waited_for_and_the_attempt_goes_on(fleet, monkeypatch, records):
    plan, request = fleet.plan()
    append, budget = AttemptLog.append, [records]

    def full(log, record, *, durable):
        budget[0] -= 1
        if budget[0] == 0:
            raise DiskFull("No space.")
        append(log, record, durable=durable)

    monkeypatch.setattr(AttemptLog, "append", full)
    rounds, fleet.wire.leaving = fleet.rounds(), True

    def insist(work):
        try:
            work()
        except DiskFull:
            work()

    rounds._insist = insist
    fleet.check(plan, request, *rounds.collect(plan, request, None, lambda: 0.0, None))


def test_a_long_stage_is_shown_with_whom_it_waits_for(fleet, monkeypatch):
    monkeypatch.setattr(module, "SHOW_AFTER_S", 0.0)
    plan, request = fleet.plan()
    silent = next(iter(fleet.seats))
    fleet.wire.silent[Stage.UPLOADS] = {silent}
    fleet.run(plan, request)
    assert any("masked updates" in words and silent in words for words in fleet.shown)
    assert fleet.shown[-1] == ""
