"""Rounds that go well, rounds with drop-outs at every stage, and coordinators that die after every record."""

import contextlib
import copy
import os
import pickle
from itertools import product

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_fl.crypto import device_id, new_key
from lepton_fl.errors import (
    ConfigError,
    LeptonError,
    QuorumError,
    Rejection,
    StateCorrupt,
    TrustError,
    UpdateRejected,
)
from lepton_fl.plan import LocalPlan
from lepton_fl.secagg import agreements
from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy, Prekey
from lepton_fl.secagg.cohorts import add_sums, split
from lepton_fl.secagg.context import COMPLETE, RoundContext, Rules, hidden_odds
from lepton_fl.secagg.encoding import Exact, Sum
from lepton_fl.secagg.field import SECRET_BYTES
from lepton_fl.secagg.identity import Certified, Pinned, certify, request_certificate
from lepton_fl.secagg.messages import Reveal
from lepton_fl.secagg.rehearsal import ideal, rehearse
from lepton_fl.secagg.server import ServerSession, Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool
from lepton_fl.wire.messages import Request, Ticket
from tests.lepton_fl.secagg.conftest import NOW, Cohort

STAGES = [Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS, Stage.REVEALS]

# --- the sum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "bits"), [(4, 32), (5, 16), (16, 32)])
def test_the_sum_is_the_sum(make, n, bits):
    cohort = make(n=n, bits=bits)
    outcome = cohort.run()
    assert outcome.survivors == tuple(cohort.devices)
    assert not outcome.blames
    assert (outcome.total == cohort.plain_sum(cohort.devices)).all()
    assert cohort.server.finish() is outcome


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bits", [16, 32])
def test_as_many_as_allowed_may_drop_at_any_stage(make, stage, bits):
    cohort = make(n=10, bits=bits)
    drops = dict.fromkeys(cohort.devices[1:4], stage)
    outcome = cohort.run(drops)
    alive = [d for d in cohort.devices if stage > Stage.UPLOADS or d not in drops]
    assert outcome.survivors == tuple(alive)
    assert (outcome.total == cohort.plain_sum(alive)).all()


@pytest.mark.parametrize("stage", STAGES[:3])
def test_one_more_gives_no_result_and_reveals_nothing(make, stage):
    cohort = make(n=10)
    drops = dict.fromkeys(cohort.devices[:4], stage)
    with pytest.raises(QuorumError):
        cohort.run(drops)
    assert "reveals" not in cohort.log
    assert all(session.refused == "" for session in cohort.sessions.values())


def test_after_the_certificate_half_may_drop(make):
    cohort = make(n=10).to(Stage.REVEALS)
    for i, d in enumerate(cohort.devices[:6]):
        if i < 6:
            with pytest.raises(QuorumError):
                cohort.server.finish()
        cohort.reveal([d])
    assert (cohort.server.finish().total == cohort.plain_sum(cohort.devices)).all()


def test_mixed_drops(make):
    cohort = make(n=16)
    drops = {"d001": Stage.SHARES, "d004": Stage.UPLOADS, "d007": Stage.CONSENTS, "d015": Stage.REVEALS}
    outcome = cohort.run(drops)
    alive = [d for d in cohort.devices if d not in ("d001", "d004")]
    assert (outcome.total == cohort.plain_sum(alive)).all()


def test_too_few_adverts(make):
    cohort = make(n=5, advertise=False, rules=Rules(min_cohort=5))
    for d in cohort.devices[:4]:
        cohort.accept(d, cohort.prekeys[d].advert)
    with pytest.raises(QuorumError, match="adverts"):
        cohort.close()
    assert cohort.server.stage is Stage.ADVERTS


def test_the_hidden_graph_gives_the_same_sum(make):
    odds = hidden_odds(40)
    assert odds < COMPLETE
    cohort = make(n=40, d=3, rules=Rules(edge_odds=odds))
    outcome = cohort.run(dict.fromkeys(cohort.devices[:9], Stage.UPLOADS))
    assert (outcome.total == cohort.plain_sum(cohort.devices[9:])).all()


def test_the_hidden_graph_needs_consent_and_density(make):
    cohort = make(n=40, d=3, rules=Rules(edge_odds=hidden_odds(40)))
    with pytest.raises(TrustError, match="experimental"):
        cohort.session("d000", policy=Policy())
    sparse = make(n=40, d=3, rules=Rules(edge_odds=hidden_odds(40) - 2**40))
    with pytest.raises(TrustError, match="too sparse"):
        sparse.share(["d000"])


def test_hidden_odds_agree_with_the_published_table():
    masks = {100: 57.5, 200: 70.7, 300: 76.4, 500: 82.2, 1000: 87.7}
    for n, expected in masks.items():
        assert hidden_odds(n) / COMPLETE * (n - 1) == pytest.approx(expected, abs=0.06)
    assert hidden_odds(16) == COMPLETE


def test_thresholds():
    for n in range(4, 1001):
        quorum, corrupted = Rules.quorum(n), Rules.corrupted(n)
        assert 2 * quorum - n > corrupted  # two quorums share an honest device
        assert Rules.threshold(n) > n / 2 > corrupted
        assert Rules().least_survivors(n) >= quorum
        assert Rules().least_survivors(n) <= n


@pytest.mark.parametrize(
    "bad", [{"min_cohort": 3}, {"min_cohort": 1001}, {"max_dropout": 334}, {"edge_odds": 0}]
)
def test_rules_are_checked(bad):
    with pytest.raises(ConfigError, match="Expected"):
        Rules(**bad)


# --- a device -------------------------------------------------------------------------------------------


def test_repeats_get_the_same_bytes(make):
    cohort = make(n=5)
    first = cohort.share()
    assert cohort.share(send=False) == first
    for d in cohort.devices:
        cohort.accept(d, first[d])  # the coordinator does not mind either
    cohort.close()
    cohort.deliver()
    cohort.deliver()
    uploads = cohort.upload()
    assert cohort.upload(send=False) == uploads
    cohort.inputs = {d: x + 1 for d, x in cohort.inputs.items()}
    assert cohort.upload() == uploads  # the first vector stays
    cohort.close()
    consents = cohort.consent()
    assert cohort.consent() == consents
    cohort.close()
    reveals = cohort.reveal()
    assert cohort.reveal() == reveals
    assert cohort.server.finish().total is not None


def test_secrets_stay_in_the_process(make):
    cohort = make(n=4)
    session = cohort.sessions["d000"]
    for holder in (session, cohort.session("d000", prekey=fresh_prekey(cohort)), fresh_prekey(cohort)):
        for copying in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="secrets"):
                copying(holder)
        assert repr(holder) in ("<ClientSession>", "<Prekey>")


def fresh_prekey(cohort, device="d000", **fields):
    values = {"device": device, "deployment": "lab", "not_after": 4_000_000_000} | fields
    return Prekey.make(
        values["device"],
        values["deployment"],
        cohort.signing[device],
        b"",
        values["not_after"],
        os.urandom,
    )


def test_a_device_forgets(make):
    cohort = make(n=4).to(Stage.CONSENTS)
    session = cohort.sessions["d000"]
    assert session._b == bytes(32) == session._m
    cohort.consent()
    cohort.close()
    cohort.reveal()
    assert session._held == {}
    assert not hasattr(session, "_share_key")
    prekey = fresh_prekey(cohort)
    prekey.discard()
    assert prekey._b == bytes(32)
    with pytest.raises(TrustError, match="used"):
        prekey.take()


def test_a_prekey_serves_once(make):
    cohort = make(n=4)
    with pytest.raises(TrustError, match="used"):
        cohort.session("d000")


def test_a_released_vector_is_gone_but_the_round_goes_on(make):
    cohort = make(n=4)
    cohort.share()
    cohort.close()
    cohort.deliver()
    cohort.upload()
    for session in cohort.sessions.values():
        session.release()
    with pytest.raises(TrustError, match="released"):
        cohort.upload(["d000"])
    cohort.close()
    cohort.consent()
    cohort.close()
    cohort.reveal()
    assert (cohort.server.finish().total == cohort.plain_sum(cohort.devices)).all()


def test_a_full_disk_delays_consent_and_nothing_else(make):
    cohort = make(n=4).to(Stage.CONSENTS)

    class FullOnce(MemoryLedger):
        full = True

        def claim(self, round_key, digest):
            if self.full:
                self.full = False
                raise StateCorrupt("no space")
            return super().claim(round_key, digest)

    cohort.sessions["d000"]._ledger = FullOnce()
    with pytest.raises(StateCorrupt):
        cohort.consent(["d000"])
    cohort.consent()
    cohort.close()
    cohort.reveal()
    assert cohort.server.finish().total is not None


def test_a_vector_of_another_shape_is_an_error_of_the_caller(make):
    cohort = make(n=4)
    cohort.share()
    cohort.close()
    cohort.deliver()
    for vector in (np.zeros(3, "<u4"), np.zeros(cohort.context.length, np.int32)):
        with pytest.raises(UpdateRejected) as caught:
            cohort.sessions["d000"].mask(vector)
        assert caught.value.reason is Rejection.WRONG_SHAPE
    cohort.upload()


# --- the coordinator comes back ---------------------------------------------------------------------------


def test_a_coordinator_may_die_after_every_record(make):
    """Replay every prefix of the records: the messages that come next are the same, and so is the sum."""
    cohort = make(n=5)
    outcome = cohort.run({"d001": Stage.UPLOADS})
    final = outcome.total.copy()
    for count in range(len(cohort.records) + 1):
        again = ServerSession.resume(
            cohort.context, cohort.trust, Intake(cohort.context, cohort.spool), cohort.records[:count]
        )
        for record in cohort.records[count:]:
            again._apply(record)
        again._restore_intake()
        assert again.roster() == cohort.log["roster"]
        assert again.survivors() == cohort.log["survivors"]
        assert again.certificate() == cohort.log["certificate"]
        assert (again.finish().total == final).all()


def test_a_restart_at_every_stage_goes_on(make):
    for stage in STAGES:
        cohort = make(n=5, name=f"restart-{stage}").to(stage)
        cohort.server = ServerSession.resume(
            cohort.context, cohort.trust, Intake(cohort.context, cohort.spool), cohort.records
        )
        cohort.to(Stage.REVEALS)
        cohort.reveal()
        assert (cohort.server.finish().total == cohort.plain_sum(cohort.devices)).all()


def test_a_checkpoint_is_not_added_twice(make):
    cohort = make(n=5)
    cohort.share()
    cohort.close()
    cohort.deliver()
    cohort.upload(cohort.devices[:3])
    head, body = cohort.server.intake.checkpoint()
    stored = head + bytes(body)
    cohort.upload(cohort.devices[3:])
    intake = Intake(cohort.context, cohort.spool, stored)
    assert intake.included == set(cohort.devices[:3])
    again = ServerSession.resume(cohort.context, cohort.trust, intake, cohort.records)
    assert intake.included == set(cohort.devices)
    assert (intake.total == cohort.server.intake.total).all()
    again.intake.add(cohort.devices[0])
    assert (intake.total == cohort.server.intake.total).all()
    for place in (0, 8, 45, len(head) - 1, len(stored) - 1):
        bad = bytearray(stored)
        bad[place] ^= 1
        with pytest.raises(StateCorrupt):
            Intake(cohort.context, MemorySpool(), bytes(bad))
    with pytest.raises(StateCorrupt):
        Intake(cohort.context, MemorySpool(), stored[:20])


def test_records_that_do_not_follow_are_refused(make):
    cohort = make(n=4).to(Stage.CONSENTS)
    for records in (
        cohort.records[5:],
        [b"\x07"],
        [b""],
        [cohort.records[0][:30]],
        cohort.records[:5] + cohort.records[4:],
    ):
        with pytest.raises(StateCorrupt):
            ServerSession.resume(cohort.context, cohort.trust, Intake(cohort.context, MemorySpool()), records)


def test_a_journal_that_fails_leaves_everything_as_it_was(make):
    cohort = make(n=4, advertise=False)

    def broken(_):
        raise StateCorrupt("disk")

    with pytest.raises(StateCorrupt):
        cohort.server.accept("d000", cohort.prekeys["d000"].advert, NOW, broken)
    assert cohort.server.heard() == frozenset()
    for d in cohort.devices:
        cohort.accept(d, cohort.prekeys[d].advert)
    with pytest.raises(StateCorrupt):
        cohort.server.close(broken)
    assert cohort.server.stage is Stage.ADVERTS
    cohort.close()
    assert cohort.to(Stage.REVEALS).server.stage is Stage.REVEALS


def test_vectors_come_in_pieces(make):
    cohort = make(n=4, d=30, bits=16)
    cohort.share()
    cohort.close()
    cohort.deliver()
    for d, (tail, body) in cohort.upload(send=False).items():
        server = cohort.server
        assert server.chunk(d, 0, body[:7]) == 7
        with pytest.raises(UpdateRejected, match="expected 7"):
            server.chunk(d, 8, body[8:])
        assert server.chunk(d, 0, body[:9]) == 9  # overlaps
        with pytest.raises(UpdateRejected) as caught:
            cohort.accept(d, tail)  # not complete
        assert caught.value.reason is Rejection.WRONG_SHAPE
        assert server.chunk(d, 9, body[9:]) == len(body)
        assert server.chunk(d, 5, body[5:8]) == len(body)
        with pytest.raises(UpdateRejected, match="Expected a vector"):
            server.chunk(d, len(body), b"x")
        cohort.accept(d, tail)
    cohort.close()
    assert (cohort.to(Stage.REVEALS).server.intake.total != 0).any()
    cohort.reveal()
    assert (cohort.server.finish().total == cohort.plain_sum(cohort.devices)).all()


def test_a_damaged_vector_can_be_sent_again(make):
    cohort = make(n=4)
    cohort.share()
    cohort.close()
    cohort.deliver()
    uploads = cohort.upload(send=False)
    tail, body = uploads["d000"]
    cohort.server.chunk("d000", 0, bytes(len(body)))
    with pytest.raises(UpdateRejected, match="SHA-256"):
        cohort.accept("d000", tail)
    assert cohort.server.heard() == frozenset()
    assert not cohort.server.intake.total.any()
    cohort.server.intake.restart("d000")
    cohort.server.chunk("d000", 0, body)
    cohort.accept("d000", tail)
    cohort.server.intake.restart("d000")  # too late to do harm
    assert cohort.server.intake.included == {"d000"}


# --- any order of events ----------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random n, d, drop-outs, duplicates, re-orderings, late messages, lies of the coordinator and restarts.

    The exact sum over U, or nothing; whatever happens, no peer gives two kinds of share away, no device says
    two things at one stage, and none says anything after a refusal.
    """

    @initialize(
        n=st.integers(4, 8),
        d=st.integers(1, 9),
        bits=st.sampled_from([16, 32]),
        dead=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(STAGES)), max_size=3),
        name=st.integers(0, 3),
    )
    def begin(self, n, d, bits, dead, name):
        self.c = Cohort(n=n, d=d, bits=bits, name=f"any-{name}")
        self.dead = {f"d{i:03}": stage for i, stage in dead}
        self.sent, self.kinds, self.over, self.refused = {}, {}, False, set()

    def answer(self, device):
        server, session = self.c.server, self.c.sessions[device]
        match server.stage:
            case Stage.SHARES:
                return session.share_keys(server.roster(), self.c.streams[device], NOW)
            case Stage.UPLOADS:
                session.deliver(server.delivery(device))
                tail, body = session.mask(self.c.inputs[device].copy())
                server.chunk(device, 0, bytes(body))
                return tail
            case Stage.CONSENTS:
                return session.consent(server.survivors())
        return session.reveal(server.certificate())

    @precondition(lambda self: not self.over)
    @rule(pick=st.integers(0, 7))
    def someone_answers(self, pick):
        expected = self.alive()
        assume(expected)
        self.take(expected[pick % len(expected)])

    @precondition(lambda self: not self.over)
    @rule(order=st.permutations(range(8)), left_out=st.integers(0, 3))
    def a_stage_goes_by(self, order, left_out):
        """Without this rule, hardly a run would get beyond the first stage."""
        expected = self.alive()
        for i in order[max(0, left_out - 2) :]:
            if i < len(expected):
                self.take(expected[i])
        self.the_stage_ends()

    @precondition(lambda self: not self.over)
    @rule(stages=st.integers(1, 4))
    def stages_go_by(self, stages):
        for _ in range(stages):
            if not self.over:
                self.a_stage_goes_by(range(8), 0)

    def alive(self):
        stage = self.c.server.stage
        expected = [d for d in sorted(self.c.server.expected()) if self.dead.get(d, Stage.DONE) > stage]
        # Who has not signed has nothing to reveal, and is not asked.
        return [d for d in expected if stage is not Stage.REVEALS or (d, Stage.CONSENTS) in self.sent]

    def take(self, device):
        stage = self.c.server.stage
        held = dict(self.c.sessions[device]._held)  # forgotten with the reveal
        message = self.answer(device)
        assert self.sent.setdefault((device, stage), message) == message
        self.c.accept(device, message)
        if stage is Stage.REVEALS and held:
            for dealer, part in Reveal.decode(message, self.c.server.n).shares.items():
                kinds = {"b": held[dealer][:SECRET_BYTES], "m": held[dealer][SECRET_BYTES:]}
                [kind] = [name for name, half in kinds.items() if half == part]
                self.kinds.setdefault(dealer, set()).add(kind)

    @precondition(lambda self: self.sent)
    @rule(pick=st.integers(0, 50))
    def an_old_message_comes_again(self, pick):
        (device, _), message = sorted(self.sent.items(), key=str)[pick % len(self.sent)]
        before = len(self.c.records)
        self.c.accept(device, message)
        assert len(self.c.records) == before

    @precondition(lambda self: not self.over and self.c.server.stage > Stage.SHARES)
    @rule(pick=st.integers(0, 7))
    def shares_come_late(self, pick):
        silent = [d for d in self.c.devices if (d, Stage.SHARES) not in self.sent and d not in self.refused]
        assume(silent)
        device, before = silent[pick % len(silent)], len(self.c.records)
        message = self.c.sessions[device].share_keys(self.c.server.roster(), self.c.streams[device], NOW)
        with pytest.raises(UpdateRejected) as caught:
            self.c.accept(device, message)
        assert caught.value.reason in (Rejection.LATE, Rejection.NOT_SELECTED)
        assert len(self.c.records) == before

    @precondition(lambda self: not self.over)
    @rule(pick=st.integers(0, 7), stage=st.sampled_from(STAGES), place=st.integers(0, 2**16))
    def the_coordinator_lies(self, pick, stage, place):
        device = self.c.devices[pick % len(self.c.devices)]
        assume(len(self.refused | {device}) <= 1)
        lie = bytearray(self.c.server.roster())
        lie[place % len(lie)] ^= 1
        self.refused.add(device)
        self.dead[device] = Stage.ADVERTS
        session = self.c.sessions[device]
        if stage is Stage.SHARES:
            with pytest.raises(TrustError):
                session.share_keys(bytes(lie), self.c.streams[device], NOW)
            return
        asked = {
            Stage.UPLOADS: session.deliver,
            Stage.CONSENTS: session.consent,
            Stage.REVEALS: session.reveal,
        }
        with pytest.raises(TrustError):
            asked[stage](bytes(lie))

    @precondition(lambda self: not self.over)
    @rule()
    def the_coordinator_restarts(self):
        c = self.c
        c.server = ServerSession.resume(c.context, c.trust, Intake(c.context, c.spool), c.records)

    @precondition(lambda self: not self.over)
    @rule()
    def a_stage_ends(self):
        self.the_stage_ends()

    def the_stage_ends(self):
        server, stage = self.c.server, self.c.server.stage
        try:
            if stage is Stage.REVEALS:
                outcome = server.finish()
                assert (outcome.total == self.c.plain_sum(outcome.survivors)).all()
                assert len(outcome.survivors) >= server.context.rules.least_survivors(server.n)
                self.over = True
            else:
                self.c.close()
        except QuorumError:
            assert self.c.server.stage is stage

    @invariant()
    def nothing_is_said_after_a_refusal(self):
        for device in getattr(self, "refused", ()):
            session = self.c.sessions[device]
            assert session.refused
            for call in (session.deliver, session.consent, session.reveal):
                with pytest.raises(TrustError):
                    call(b"")

    @invariant()
    def one_kind_of_share_each(self):
        assert all(len(kinds) == 1 for kinds in getattr(self, "kinds", {}).values())


AnyOrder.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase


# --- around it ----------------------------------------------------------------------------------------------


def request(**changes):
    fields = {
        "ticket": Ticket("train", "run", 2, 1, "00"),
        "task": "t:t",
        "task_version": "1",
        "layout_digest": "l",
        "model_sha256": "ab" * 32,
        "local": LocalPlan(),
        "weighting": "equal",
        "max_weight": 1,
        "grid_step": 2.0**-24,
        "clip_norm": 0.0,
        "model": np.zeros(4, np.float32),
    }
    return Request(**(fields | changes))


def test_everything_is_in_the_context():
    encoding = Exact(4, 20, 1, 10)
    one = RoundContext.of(request(), "lab", encoding, Rules())
    assert one.digest == RoundContext.of(request(), "lab", encoding, Rules()).digest
    others = [
        RoundContext.of(request(model_sha256="cd" * 32), "lab", encoding, Rules()),
        RoundContext.of(request(ticket=Ticket("train", "run", 2, 2, "00")), "lab", encoding, Rules()),
        RoundContext.of(request(ticket=Ticket("train", "run", 2, 1, "01")), "lab", encoding, Rules()),
        RoundContext.of(request(local=LocalPlan(epochs=2)), "lab", encoding, Rules()),
        RoundContext.of(request(), "other", encoding, Rules()),
        RoundContext.of(request(), "lab", Exact(4, 20, 1, 11), Rules()),
        RoundContext.of(request(), "lab", encoding, Rules(min_cohort=17)),
        RoundContext.of(request(), "lab", encoding, Rules(max_dropout=200)),
        RoundContext.of(request(), "lab", encoding, Rules(edge_odds=5)),
        RoundContext.of(request(), "lab", encoding, Rules(), cohort=1),
        RoundContext.of(request(), "lab", encoding, Rules(), privacy=bytes(31) + b"1"),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == len(others) + 1
    assert others[1].round_key == one.round_key == others[9].round_key  # attempts and cohorts do not count
    with pytest.raises(ConfigError, match="32 bytes"):
        RoundContext("lab", "run", 1, 1, b"", bytes(32), encoding)


def test_certificates_tie_the_two_keys_together():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    authority, signing, identity = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate(), new_key()
    asked = request_certificate(identity, signing, "lab")
    device, credential = certify(authority, asked, "lab", 1000)
    assert device == device_id(identity.public_key())
    assert len(credential) == 72
    trust = Certified([authority.public_key().public_bytes_raw()])
    key = signing.public_key().public_bytes_raw()
    for _ in range(2):  # the second time from memory
        trust.check("lab", device, key, credential, 1000)
    for bad in (
        ("other", device, key, credential, 0),
        ("lab", "d-other", key, credential, 0),
        ("lab", device, bytes(32), credential, 0),
        ("lab", device, key, credential[:-1] + bytes([credential[-1] ^ 1]), 0),
        ("lab", device, key, credential, 1001),
    ):
        with pytest.raises(TrustError):
            trust.check(*bad)
    for short in (b"", credential[:-1], credential + b"x"):
        with pytest.raises(UpdateRejected):
            trust.check("lab", device, key, short, 0)
    stranger = Certified([Ed25519PrivateKey.generate().public_key().public_bytes_raw()])
    with pytest.raises(TrustError, match="authority"):
        stranger.check("lab", device, key, credential, 0)
    with pytest.raises(TrustError, match="both"):
        certify(authority, asked, "elsewhere", 1000)
    for place in range(0, len(asked), 3):
        bad_request = bytearray(asked)
        bad_request[place] ^= 1
        with pytest.raises(LeptonError):
            certify(authority, bytes(bad_request), "lab", 1000)


def test_a_round_with_certificates(stream):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    authority = Ed25519PrivateKey.generate()
    trust = Certified([authority.public_key().public_bytes_raw()])
    context = RoundContext("lab", "r", 1, 1, bytes(32), bytes(32), Exact(3, 4, 1, 10), Rules(min_cohort=4))
    server = ServerSession(context, trust, Intake(context, MemorySpool()))
    for _ in range(4):
        signing = Ed25519PrivateKey.generate()
        device, credential = certify(authority, request_certificate(new_key(), signing, "lab"), "lab", 10**10)
        prekey = Prekey.make(device, "lab", signing, credential, 10**10, os.urandom)
        server.accept(device, prekey.advert, NOW, lambda _: None)
        with pytest.raises(TrustError):
            server.accept("d-other", prekey.advert, NOW, lambda _: None)
    server.close(lambda _: None)
    assert server.n == 4
    last = ClientSession(context, prekey, signing, trust, MemoryLedger(), Policy(4))
    assert last.share_keys(server.roster(), os.urandom, NOW)


def test_pinned_trust():
    trust = Pinned({"d": bytes(32)})
    trust.check("any", "d", bytes(32), b"", 0)
    for device, key, credential in (("e", bytes(32), b""), ("d", b"1" * 32, b""), ("d", bytes(32), b"x")):
        with pytest.raises(TrustError):
            trust.check("any", device, key, credential, 0)


def test_the_rehearsal_is_the_ideal_functionality():
    encoding = Exact(50, 20, 1, 1000)
    context = RoundContext("sim", "r", 1, 1, bytes(32), bytes(32), encoding, Rules())
    updates = {f"d{i:02}": np.arange(-25, 25, dtype=np.int32) * (i + 1) for i in range(17)}
    vectors = {d: lambda u=u: encoding.encode(u, 1) for d, u in updates.items()}
    records = []
    drops = {"d03": Stage.ADVERTS, "d04": Stage.UPLOADS, "d05": Stage.REVEALS}
    outcome = rehearse(context, vectors, os.urandom, drops, workers=2, journal=records.append)
    assert len(outcome.survivors) == 15
    assert (outcome.total == ideal(context, vectors, outcome.survivors)).all()
    total = encoding.decode(outcome.total)
    assert total.weight == 15
    assert (total.update == sum(updates[d].astype(np.int64) for d in outcome.survivors)).all()
    assert len(records) == 16 + 1 + 16 + 1 + 15 + 1 + 15 + 1 + 14


def test_large_cohorts_are_split():
    devices = [f"d{i}" for i in range(2500)]
    groups = split(devices, os.urandom)
    assert sorted(len(g) for g in groups) == [833, 833, 834]
    assert sorted(d for g in groups for d in g) == sorted(devices)
    assert split(devices[:16], os.urandom) == (tuple(sorted(devices[:16])),)
    assert split(devices, os.urandom) != split(devices, os.urandom)
    for bad in (lambda: split(["a", "a"] * 20, os.urandom), lambda: split(devices, os.urandom, 900, 950)):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(QuorumError):
        split(devices[:15], os.urandom)


def test_cohort_sums_add_up_in_64_bits():
    big = np.full(3, 2**31 - 1, np.int32)
    total = add_sums([Sum(big, {"weight": 3}), Sum(big, {"weight": 4}), Sum(big, {"weight": 1})])
    assert total.update.tolist() == [3 * (2**31 - 1)] * 3
    assert total.counters == {"weight": 8}
    for bad in ([], [Sum(big, {"weight": 3}), Sum(big[:2], {"weight": 3})]):
        with pytest.raises(ConfigError):
            add_sums(bad)


# --- every schedule of a small model ------------------------------------------------------------------------


def test_no_two_survivor_sets_can_be_certified(make):
    """n = 4, one corrupted: all choices of U, in two attempts, in every order, to real sessions.

    A device's behaviour is found from real sessions: which proposals it signs after which. Then all
    schedules are walked: the corrupted device signs everything, the others what they were seen to sign.
    """
    rules = Rules(min_cohort=4)
    everyone = frozenset(range(4))
    sets = [everyone, *(everyone - {i} for i in range(4))]
    proposals = list(product((1, 2), range(len(sets))))
    honest, quorum = (0, 1, 2), rules.quorum(4)

    def behaviour(device):
        """(first proposal) -> signed?, (first, second) -> signed?"""
        signs = {}
        for first in proposals:
            for second in proposals:
                ledgers = {f"d{i:03}": MemoryLedger() for i in range(4)}
                runs = {
                    a: make(n=4, d=1, name=f"model-{a}", attempt=a, ledgers=ledgers, rules=rules)
                    for a in sorted({first[0], second[0]})
                }
                signs[first, second] = tuple(propose(runs, device, p) for p in (first, second))
        return signs

    def propose(runs, device, proposal):
        from lepton_fl.secagg.messages import Survivors

        attempt, which = proposal
        cohort, name = runs[attempt], f"d{device:03}"
        if cohort.server.stage < Stage.UPLOADS:
            cohort.share()
            cohort.close()
            cohort.deliver()
            with contextlib.suppress(TrustError):  # a signature ends what it gives in this round
                cohort.upload([name], send=False)
        session = cohort.sessions[name]
        message = Survivors(session._r, session._dealers_digest(), sets[which]).encode(4)
        try:
            session.consent(message)
        except TrustError:
            return False
        return True

    signs = behaviour(0)
    for (first, second), (one, two) in signs.items():
        assert one == (0 in sets[first[1]])
        if one and second != first:
            assert not two
    # By symmetry every honest device signs at most one proposal, one that it is in; the others, nothing.
    choices = [[None, *(p for p in proposals if h in sets[p[1]])] for h in honest]
    for schedule in product(*choices):
        certified = {p for p in proposals if schedule.count(p) + 1 >= quorum}
        assert len(certified) <= 1


# --- every core ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("odds", [COMPLETE, hidden_odds(40)])
def test_the_sum_is_the_same_on_however_many_cores(make, monkeypatch, odds):
    monkeypatch.setattr(agreements, "WORTH_HELP", 0)  # as a cohort of 1,000 would have it
    drops = {"d002": Stage.UPLOADS, "d005": Stage.UPLOADS, "d009": Stage.UPLOADS}
    totals = []
    for workers in (1, 3):
        cohort = make(n=40, d=30, rules=Rules(edge_odds=odds))
        intake = cohort.server.intake
        cohort.server = ServerSession.resume(cohort.context, cohort.trust, intake, cohort.records, workers)
        outcome = cohort.run(drops)
        assert (outcome.total == cohort.plain_sum(outcome.survivors)).all()
        totals.append(outcome.total.tobytes())
    assert len(set(totals)) == 1


def test_helpers_that_fail_are_no_loss(monkeypatch):
    keys = [X25519PrivateKey.generate() for _ in range(30)]
    members = [(i, key.public_key().public_bytes_raw()) for i, key in enumerate(keys)]
    work = agreements.Agreements(bytes(32), members, [(40 + i, bytes([i]) * 32) for i in range(7)])
    alone = list(work.results(1))
    assert [position for position, _ in alone] == list(range(40, 47))
    monkeypatch.setattr(agreements, "WORTH_HELP", 0)
    assert list(work.results(3)) == alone
    helped = work.results(3)  # given up in the midst of it: no process stays
    assert next(helped) == alone[0]
    helped.close()
    for broken in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr(agreements.sys, "executable", broken)
        assert list(work.results(3)) == alone
