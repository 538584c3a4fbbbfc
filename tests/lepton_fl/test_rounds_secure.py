"""Secure rounds: the plain round's sum, or no sum; who leaves and who cheats is named."""

import os
from collections.abc import Generator, Mapping
from random import Random

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

from lepton_fl.errors import Cause, ConfigError, Rejection, StateError, TrustError, UpdateRejected
from lepton_fl.plan import RoundPlan, RunSpec, SecureSpec
from lepton_fl.rounds.accumulator import Accumulator, Subtotal
from lepton_fl.rounds.campaign import Campaign, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import ACCEPTED, SURPLUS, collect_training
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.quantised import compressed, planned_for
from lepton_fl.rounds.secure import Party, Told, collect_secure, lead
from lepton_fl.rounds.secure_device import Offer, SecureMember, check_request
from lepton_fl.rounds.secure_sum import context_of, encode_reply, encoding_of, groups_of, prove_fits, rules_of
from lepton_fl.rounds.spool import FolderSpool
from lepton_fl.secagg.client import MemoryLedger, Policy
from lepton_fl.secagg.context import COMPLETE, Rules, hidden_odds, hidden_rules
from lepton_fl.secagg.encoding import fit
from lepton_fl.secagg.identity import Pinned
from lepton_fl.secagg.server import ServerSession, Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Request, Ticket, TrainReply

SIZE, PLACE = 50, "example.org"
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss())
COHORT = tuple(f"d{i:02}" for i in range(20))
GOOD = {"task": "pkg:task", "clip_norm": 1.0, "weighting": "equal", "cohort": {"size": 20, "min_reports": 1}}


def spec_of(**more) -> RunSpec:
    return RunSpec.model_validate({**GOOD, "secure_aggregation": "required", **more})


def plan_of(spec: RunSpec, cohort=COHORT, **more) -> tuple[RoundPlan, Request]:
    model = np.linspace(-1, 1, SIZE, dtype=np.float32)
    state = RunState(model)
    plan = plan_round(spec, "run", WORK, "train", 1, state, cohort, len(cohort), "5a" * 16)
    plan = plan.model_copy(update=more)
    return plan, Request.of(plan, model)


def reply_of(plan: RoundPlan, device: str) -> TrainReply:
    number = int(device[1:])
    delta = np.random.default_rng(number).normal(size=SIZE).astype(np.float32) * 0.1
    update = to_grid(delta, plan.grid_step, plan.clip_norm)
    sums = {"loss_sum": np.array([0.5 * number]), "examples": np.array([10 + number])}
    return TrainReply(Ticket.of(plan), plan.task_version, 3 + number, update, sums, 0.1)


class Fleet:
    """Real members; ``drops`` says before which stage a device falls silent."""

    def __init__(self, plan: RoundPlan, request: Request, drops: Mapping[str, Stage] | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self.plan, self.request, self.drops = plan, request, dict(drops or {})
        keys = {d: Ed25519PrivateKey.generate() for d in plan.cohort}
        self.trust = Pinned({d: k.public_key().public_bytes_raw() for d, k in keys.items()})
        policy = Policy(plan.secure.min_cohort, hidden_graph=plan.secure.mask_graph == "hidden")
        self.members = {
            d: SecureMember(d, PLACE, k, self.trust, MemoryLedger(), policy) for d, k in keys.items()
        }
        self.group = {d: i for i, group in enumerate(groups_of(plan)) for d in group}
        self.random_of = lambda device: os.urandom
        self.asked: list[Stage] = []
        self.revealed: list[str] = []
        self.spoil: dict[tuple[Stage, str], object] = {}

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        self.asked.append(stage)
        for device, message in messages.items():
            if self.drops.get(device, Stage.DONE) <= stage:
                continue
            told = self.answer(stage, device, message)
            change = self.spoil.get((stage, device))
            yield change(told) if change else told

    def answer(self, stage: Stage, device: str, message: bytes) -> Told:
        member, encoding = self.members[device], encoding_of(self.plan)
        if stage is Stage.ADVERTS:
            return Told(device, member.advert("r1"))
        if stage is Stage.SHARES:
            offer = Offer.of(context_of(self.plan, self.request, PLACE, self.group[device])).to_json()
            return Told(device, member.shares("r1", offer, message))
        if stage is Stage.UPLOADS:
            member.deliver("r1", message)
            vector = encode_reply(self.plan, encoding, reply_of(self.plan, device), self.random_of(device))
            tail, body = member.mask("r1", vector)
            return Told(device, tail, body, 0.1, len(tail) + len(body))
        if stage is Stage.CONSENTS:
            return Told(device, member.consent("r1", message))
        self.revealed.append(device)
        return Told(device, member.reveal("r1", message))


class Plain:
    """The same devices in a plain round."""

    def __init__(self, devices) -> None:
        self.devices = devices

    def ask(self, plan, request) -> Generator[Answer, None, None]:
        for device in self.devices:
            yield Answer(device, reply_of(plan, device).to_records())

    def tell(self, plan, device_id, refusal) -> None:
        pass


def secure(fleet: Fleet, **more):
    return collect_secure(fleet.plan, fleet.request, fleet.ask, fleet.trust, PLACE, **more)


# --- the plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"aggregation": {"name": "median"}}, "median"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"cohort": {"size": 15}}, "cohort.size=15"),
        ({"cohort": {"size": 1001}, "secure": {"min_cohort": 600}}, "1001 devices cannot be divided"),
        ({"secure": {"max_cohort": 15}}, "max_cohort=15"),
        ({"cohort": {"size": 20, "over_selection": 2.0}}, "over_selection"),
        ({"mode": "buffered"}, "buffered"),
        ({"weighting": "examples"}, "max_weight"),
        ({"grid_step": 2.0**-28}, "grid_step=5.96046e-08"),
        ({"privacy": {"noise_multiplier": 1.0}, "secure": {"bits": 16}}, "privacy"),
    ],
)
def test_what_cannot_be_hidden_or_does_not_fit_is_refused_by_name(more, word):
    with pytest.raises(ValidationError, match=word):
        spec_of(**more)


@pytest.mark.parametrize("weight", [1, 20, 1000])
@pytest.mark.parametrize("clip", [0.5, 1.0, 37.0])
def test_the_implied_grid_is_the_finest_that_fits(weight, clip):
    spec = spec_of(weighting="examples", max_weight=weight, clip_norm=clip)
    encoding, step = fit(SIZE, 20, weight, clip)
    assert spec.grid_step == step
    assert encoding_of(plan_of(spec)[0]).coordinate_bound == encoding.coordinate_bound


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.3, 0.333])
def test_the_plan_and_the_devices_agree_on_how_many_must_survive(dropout):
    spec = SecureSpec(max_dropout=dropout)
    rules = Rules(max_dropout=spec.per_thousand)
    assert all(spec.least_survivors(n) == rules.least_survivors(n) for n in range(4, 1001))


def test_a_run_without_it_is_as_before():
    spec = RunSpec(task="pkg:task")
    assert spec.grid_step == 2.0**-24
    assert plan_of(spec)[0].secure is None


def test_a_campaign_that_cannot_hide_refuses():
    campaign = Campaign(spec_of(), "r", WORK, Plain(()), Nobody(), None, Random(1))
    verdict = campaign.run(RunState(np.zeros(SIZE, np.float32)))
    assert verdict.outcome == "failed"
    assert "secure_aggregation" in verdict.reason


class Nobody:
    def candidates(self):
        return [Candidate(d, "eligible") for d in COHORT]

    def wait(self, seconds: float) -> None:
        pass


# --- the sum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_on_and_off_give_the_same_bits(weighting):
    plan, request = plan_of(spec_of(weighting=weighting, max_weight=15))
    collected, mean = secure(Fleet(plan, request))
    plain, expected = collect_training(plan, request.model, Plain(COHORT))
    assert_array_equal(mean, expected)
    assert collected.reports == plain.reports == 20
    assert {e.outcome for e in collected.participation.values()} == {ACCEPTED}
    assert collected.sums["examples"] == plain.sums["examples"]
    assert_allclose(collected.sums["loss_sum"], plain.sums["loss_sum"], atol=1e-4)


def test_no_count_of_a_single_device_is_in_the_report():
    plan, request = plan_of(spec_of())
    collected, _ = secure(Fleet(plan, request))
    assert {e.num_examples for e in collected.participation.values()} == {0}


def test_sixteen_bits_are_close():
    plan, request = plan_of(spec_of(secure={"bits": 16}))
    _, mean = secure(Fleet(plan, request))
    _, expected = collect_training(plan, request.model, Plain(COHORT))
    assert np.linalg.norm(mean - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS, Stage.REVEALS])
def test_six_of_twenty_may_leave_at_any_stage(stage):
    plan, request = plan_of(spec_of())
    gone = COHORT[3:9]
    collected, mean = secure(Fleet(plan, request, dict.fromkeys(gone, stage)))
    counted = COHORT if stage > Stage.UPLOADS else tuple(d for d in COHORT if d not in gone)
    _, expected = collect_training(plan, request.model, Plain(counted))
    assert_array_equal(mean, expected)
    outcomes = {d: e.outcome for d, e in collected.participation.items()}
    assert outcomes == {d: ACCEPTED if d in counted else Rejection.OFFLINE.value for d in COHORT}


class Diagnosed(Fleet):
    """Of a silent device it is said what keeps it, as on a real fleet."""

    def ask(self, stage: Stage, messages: Mapping[str, bytes]) -> Generator[Told, None, None]:
        yield from super().ask(stage, messages)
        for device in messages:
            if self.drops.get(device, Stage.DONE) <= stage:
                why = UpdateRejected(Rejection.OFFLINE, "No answer.", cause=Cause.HUNG_TRAINING)
                yield Told(device, why)


@pytest.mark.parametrize("stage", [Stage.ADVERTS, Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS])
def test_what_keeps_a_silent_device_is_noted_and_changes_no_sum(stage):
    plan, request = plan_of(spec_of())
    gone = COHORT[3:7]
    collected, mean = secure(Diagnosed(plan, request, dict.fromkeys(gone, stage)))
    counted = COHORT if stage > Stage.UPLOADS else tuple(d for d in COHORT if d not in gone)
    assert_array_equal(mean, collect_training(plan, request.model, Plain(counted))[1])
    for device, entry in collected.participation.items():
        lost = device not in counted
        assert entry.outcome == (Rejection.OFFLINE if lost else ACCEPTED)
        assert entry.cause is (Cause.HUNG_TRAINING if lost else None)


@pytest.mark.parametrize("stage", list(Stage)[:4])
def test_more_give_nothing_and_nothing_is_revealed(stage):
    plan, request = plan_of(spec_of())
    fleet = Fleet(plan, request, dict.fromkeys(COHORT[:7], stage))
    collected, mean = secure(fleet)
    assert mean is None
    assert not collected.enough
    assert collected.reports == 0
    assert not collected.sums
    assert not fleet.revealed


def test_silence_at_the_end_is_asked_again_before_the_round_is_lost():
    plan, request = plan_of(spec_of())
    fleet = Fleet(plan, request, dict.fromkeys(COHORT[:7], Stage.CONSENTS))
    assert secure(fleet)[1] is None
    assert fleet.asked.count(Stage.CONSENTS) == 2


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 10, 20, 25, 41, 45, 61, 62, 70, 84, 90])
def test_a_coordinator_that_ends_goes_on_where_it_was(after, tmp_path):
    plan, request = plan_of(spec_of())
    fleet, records = Fleet(plan, request, {"d03": Stage.UPLOADS, "d04": Stage.CONSENTS}), []

    def journal(record: bytes) -> None:
        if len(records) == after:
            raise Killed
        records.append(record)

    spool = FolderSpool(tmp_path)
    with pytest.raises(Killed):
        secure(fleet, journal=journal, spool=spool)
    kept = list(records)
    collected, mean = secure(fleet, journal=kept.append, records=records, spool=spool)
    left = [d for d in COHORT if d != "d03"]
    assert_array_equal(mean, collect_training(plan, request.model, Plain(left))[1])
    outcomes = {d: e.outcome for d, e in collected.participation.items()}
    assert outcomes == {d: ACCEPTED if d in left else Rejection.OFFLINE.value for d in COHORT}


def test_a_sum_that_could_leave_its_bits_is_refused_before_anybody_is_asked():
    prove_fits(spec_of(), 50_000_000)
    prove_fits(spec_of(secure={"bits": 16}, cohort={"size": 1000}), 50_000_000)
    past_the_plan = spec_of().model_copy(update={"grid_step": 2.0**-30})  # not validated
    with pytest.raises(ConfigError, match="does not fit the ring of 32 bits"):
        prove_fits(past_the_plan, SIZE)
    verdict = Campaign(past_the_plan, "r", WORK, Plain(()), Nobody(), None, Random(1)).run(
        RunState(np.zeros(SIZE, np.float32))
    )
    assert "does not fit" in verdict.reason


def test_the_round_closes_with_enough_vectors():
    plan, request = plan_of(spec_of(), wanted_reports=16)
    collected, mean = secure(Fleet(plan, request))
    _, expected = collect_training(plan, request.model, Plain(COHORT[:16]))
    assert_array_equal(mean, expected)
    assert {collected.participation[d].outcome for d in COHORT[16:]} == {SURPLUS}


def test_a_damaged_vector_is_refused_and_the_round_goes_on(tmp_path):
    plan, request = plan_of(spec_of())
    fleet, told = Fleet(plan, request), {}
    fleet.spoil[Stage.UPLOADS, "d05"] = lambda t: Told(t.device, t.message, bytes(len(t.vector)))
    fleet.spoil[Stage.UPLOADS, "d06"] = lambda t: Told(t.device, t.message, bytes(t.vector)[:-4])
    fleet.spoil[Stage.SHARES, "d07"] = lambda t: Told(t.device, t.message[:-1] + bytes([t.message[-1] ^ 1]))
    fleet.spoil[Stage.UPLOADS, "d08"] = lambda t: Told(t.device, UpdateRejected(Rejection.FAILED, "no data"))
    collected, mean = secure(fleet, spool=FolderSpool(tmp_path), tell=lambda d, r: told.update({d: r}))
    left = [d for d in COHORT if d not in ("d05", "d06", "d07", "d08")]
    assert_array_equal(mean, collect_training(plan, request.model, Plain(left))[1])
    outcomes = {d: collected.participation[d].outcome for d in ("d05", "d06", "d07", "d08")}
    assert outcomes == {"d05": "malformed", "d06": "wrong-shape", "d07": "malformed", "d08": "failed"}
    assert told["d05"].reason is Rejection.MALFORMED
    assert told["d04"] is None


def test_who_shares_garbage_is_blamed_and_left_out():
    plan, request = plan_of(spec_of())
    fleet = Fleet(plan, request)
    cheat = fleet.members["d02"]

    def garbled(told: Told) -> Told:
        from lepton_fl.secagg.messages import Shares

        shares = Shares.decode(told.message, len(COHORT))
        bad = Shares(shares.roster, shares.sender, bytes(len(shares.sealed)), shares.commitments)
        return Told(told.device, bad.encode(cheat._signing))

    fleet.spoil[Stage.SHARES, "d02"] = garbled
    collected, mean = secure(fleet)
    assert collected.participation["d02"].outcome == Rejection.BLAMED
    assert "bad-shares" in collected.participation["d02"].detail
    if mean is not None:
        left = [d for d in COHORT if d != "d02"]
        assert_array_equal(mean, collect_training(plan, request.model, Plain(left))[1])


# --- a device ---------------------------------------------------------------------------------------


def test_an_offer_survives_its_text_and_nothing_else_does():
    for bits in (16, 32):
        plan, request = plan_of(spec_of(secure={"bits": bits}))
        context = context_of(plan, request, PLACE)
        offer = Offer.from_json(Offer.of(context).to_json())
        assert offer.context(PLACE).digest == context.digest
    text = Offer.of(context).to_json()
    for bad in (
        "",
        "[]",
        "{}",
        text[:-1],
        text.replace('"round":1', '"round":true'),
        text.replace("run", "RUN"),
    ):
        with pytest.raises(UpdateRejected):
            Offer.from_json(bad)


def test_a_device_trains_only_what_it_was_offered():
    plan, request = plan_of(spec_of())
    context = context_of(plan, request, PLACE)
    offer = Offer.of(context)
    check_request(offer, context.request, context.model)
    for wrong in ((bytes(32), context.model), (context.request, bytes(32))):
        with pytest.raises(TrustError):
            check_request(offer, *wrong)


def test_a_device_keeps_few_sessions_and_forgets_the_oldest():
    plan, request = plan_of(spec_of())
    member = Fleet(plan, request).members["d00"]
    first = member.advert("a")
    assert member.advert("a") == first
    for name in "bcde":
        member.advert(name)
    with pytest.raises(TrustError, match="no keys"):
        member.consent("a", b"")
    with pytest.raises(TypeError):
        member.__reduce__()


def test_a_full_disk_is_named_and_undone(tmp_path, monkeypatch):
    spool = FolderSpool(tmp_path)
    spool.append("d", b"12345")
    monkeypatch.setattr("os.fsync", _no_space)
    durable = FolderSpool(tmp_path, durable=True)
    with pytest.raises(StateError, match="space"):
        durable.append("d", b"678")
    assert b"".join(spool.read("d")) == b"12345"
    spool.discard("d")
    spool.discard("d")
    assert spool.size("d") == 0
    assert list(spool.read("d")) == []


def _no_space(file: int) -> None:
    raise OSError(28, "No space left on device")


# --- more devices than one sum takes ------------------------------------------------------------------

MANY = tuple(f"d{i:02}" for i in range(40))
SPLIT = {"cohort": {"size": 40, "min_reports": 1}, "secure": {"min_cohort": 6, "max_cohort": 14}}


def mean_of(spec: RunSpec, devices) -> np.ndarray:
    plan, request = plan_of(spec, MANY, min_reports=1)
    return collect_training(plan, request.model, Plain(devices))[1]


def plain_spec(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"secure_aggregation": "off"})


def test_a_large_cohort_makes_several_sums_of_which_the_mean_is_the_same():
    spec = spec_of(**SPLIT)
    plan, request = plan_of(spec, MANY)
    groups = groups_of(plan)
    assert sorted(map(len, groups)) == [13, 13, 14]
    assert sorted(d for group in groups for d in group) == sorted(MANY)
    assert groups == groups_of(plan) != groups_of(plan.model_copy(update={"nonce": "6b" * 16}))
    fleet = Fleet(plan, request)
    collected, mean = secure(fleet)
    assert collected.reports == 40
    assert list(collected.participation) == list(plan.cohort)
    assert mean.tobytes() == mean_of(plain_spec(spec), MANY).tobytes()
    assert fleet.asked == [stage for stage in Stage if stage is not Stage.DONE]  # all sums at the same time


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS])
@pytest.mark.parametrize("bits", [16, 32])
def test_a_sum_that_fails_leaves_the_others(stage, bits):
    spec = spec_of(**SPLIT | {"secure": SPLIT["secure"] | {"bits": bits}})
    plan, request = plan_of(spec, MANY)
    lost, *kept = groups_of(plan)
    fleet = Fleet(plan, request, dict.fromkeys(lost[:9], stage))
    collected, mean = secure(fleet)
    devices = [d for group in kept for d in group]
    assert collected.reports == len(devices)
    assert {d for d, e in collected.participation.items() if e.outcome == ACCEPTED} == set(devices)
    assert not set(fleet.revealed) & set(lost)
    last = collected.participation[lost[-1]]
    assert last.outcome == (Rejection.OFFLINE if stage < Stage.UPLOADS else SURPLUS)
    expected = mean_of(plain_spec(spec), devices)
    if bits == 32:
        assert mean.tobytes() == expected.tobytes()
    else:
        assert_allclose(mean, expected, atol=2e-3)


OVER = {"cohort": {"size": 32, "over_selection": 1.25, "min_reports": 1}, "secure": SPLIT["secure"]}


def test_a_round_of_several_sums_does_not_close_while_one_of_them_would_be_lost():
    """Two sums' devices are quick, so as many vectors as are wanted come before the third has enough."""
    plan, request = plan_of(spec_of(**OVER), MANY, wanted_reports=32)
    needed = plan.secure.least_survivors(13)
    quick = sorted(map(len, groups_of(plan)))[-2:]
    assert sum(quick) + needed > 32  # by the total alone it would have closed too early
    collected, mean = secure(Fleet(plan, request))
    counted = [d for d, e in collected.participation.items() if e.outcome == ACCEPTED]
    assert all(len(set(g) & set(counted)) >= needed for g in groups_of(plan))
    assert collected.reports == len(counted) < 40  # and it has closed without the slowest
    assert mean.tobytes() == mean_of(plain_spec(spec_of(**OVER)), counted).tobytes()


def test_a_sum_that_cannot_come_about_any_more_is_not_waited_for():
    plan, request = plan_of(spec_of(**OVER), MANY, wanted_reports=24)
    lost, *kept = groups_of(plan)
    fleet = Fleet(plan, request)

    def refuse(told):
        return Told(told.device, UpdateRejected(Rejection.FAILED, "no data"))

    fleet.spoil = {(Stage.UPLOADS, d): refuse for d in lost[:6]}
    collected, mean = secure(fleet)
    assert mean is not None
    assert 24 <= collected.reports < sum(map(len, kept))
    assert not set(fleet.revealed) & set(lost)


def test_the_grid_has_room_for_the_largest_sum_that_fewer_devices_can_make():
    """1,001 are planned, in two sums of 501; if one of them is away, the others make one sum of 1,000."""
    for size, least, largest in ((1001, 900, 1000), (1001, 1001, 501), (1500, 1200, 750), (999, 16, 999)):
        spec = spec_of(cohort={"size": size, "min_reports": least}, clip_norm=2.0)
        assert spec.largest_sum == largest
        sums = [max(spec.secure.sums(asked)) for asked in range(least, size + 1)]
        assert max(sums) == largest
    spec = spec_of(cohort={"size": 1001, "min_reports": 900}, clip_norm=2.0)
    plan, _ = plan_of(spec, tuple(f"d{i:04}" for i in range(1000)))
    assert encoding_of(plan).cohort == 1000  # which would be refused if it did not fit


def test_if_all_sums_fail_there_is_none():
    plan, request = plan_of(spec_of(**SPLIT), MANY)
    fleet = Fleet(plan, request, dict.fromkeys([d for g in groups_of(plan) for d in g[:6]], Stage.UPLOADS))
    collected, mean = secure(fleet)
    assert mean is None
    assert not collected.reports
    assert not fleet.revealed


@pytest.mark.parametrize("after", [30, 75, 110, 125, 165])
def test_several_sums_go_on_after_a_restart(after, tmp_path):
    spec = spec_of(**SPLIT)
    plan, request = plan_of(spec, MANY)
    fleet, records, spool = Fleet(plan, request), [], FolderSpool(tmp_path)

    def journal(record: bytes) -> None:
        if len(records) == after:
            raise Killed
        records.append(record)

    with pytest.raises(Killed):
        secure(fleet, journal=journal, spool=spool)
    collected, mean = secure(fleet, records=list(records), spool=FolderSpool(tmp_path))
    assert collected.reports == 40
    assert mean.tobytes() == mean_of(plain_spec(spec), MANY).tobytes()


def test_a_gateway_that_adds_up_its_own_devices_is_the_same_operation():
    """Two edge gateways lead a sum each; the coordinator adds what they report, and sees nothing else."""
    spec = spec_of(**SPLIT | {"secure": {"min_cohort": 10, "max_cohort": 20}})
    plan, request = plan_of(spec, MANY)
    top = Accumulator(plan)
    for number, devices in enumerate(groups_of(plan)):
        fleet = Fleet(plan, request, {devices[3]: Stage.UPLOADS})
        context = context_of(plan, request, PLACE, number)
        gateway = Party(ServerSession(context, fleet.trust, Intake(context, MemorySpool())), devices)
        lead([gateway], fleet.ask)
        found = context.encoding.decode(gateway.result().total)
        reports = len(gateway.result().survivors)
        top.merge(Subtotal(found.update.astype(np.int64), found.weight, reports))
    left = [d for d in MANY if d not in [group[3] for group in groups_of(plan)]]
    assert top.reports == len(left)
    assert top.finalize().tobytes() == mean_of(plain_spec(spec), left).tobytes()


# --- the experimental mask graph ------------------------------------------------------------------------


def test_the_hidden_graph_is_a_choice_of_the_run_and_of_each_device():
    wide = tuple(f"d{i:02}" for i in range(44))
    chosen = {"cohort": {"size": 44}, "secure": {"mask_graph": "hidden"}}
    plan, request = plan_of(spec_of(**chosen), wide)
    assert context_of(plan, request, PLACE).rules.edge_odds < COMPLETE
    fleet = Fleet(plan, request, dict.fromkeys(wide[:4], Stage.ADVERTS) | {wide[7]: Stage.UPLOADS})
    collected, mean = secure(fleet)
    off = plain_spec(spec_of(**chosen))
    plain = collect_training(plan_of(off, wide, min_reports=1)[0], request.model, Plain(wide[4:7] + wide[8:]))
    assert collected.reports == 39
    assert mean.tobytes() == plain[1].tobytes()
    refusing = Fleet(plan, request)
    for member in refusing.members.values():
        member._policy = Policy(16)
    with pytest.raises(TrustError, match="experimental"):
        secure(refusing)


def test_the_hidden_graph_is_dense_enough_for_every_roster_it_is_made_for():
    for least, most in ((32, 36), (40, 60), (90, 100), (270, 300)):
        rules = hidden_rules(least, most)
        assert all(rules.edge_odds >= hidden_odds(n) for n in range(least, most + 1))
        assert rules.min_cohort == least
    assert hidden_rules(16, 20).edge_odds == COMPLETE  # few devices need all edges


def test_by_default_every_pair_shares_a_mask_however_many_they_are():
    for size in (20, 101, 1000):
        assert rules_of(SecureSpec(), size) == Rules(16, 300, COMPLETE)


# --- few bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_updates_give_the_bits_of_a_plain_round_through_real_masks(bits):
    """Seven of them are packed; two leave; nobody but the coordinator of a plain round sees an integer."""
    fields = {"weighting": "examples", "max_weight": 9, "quantisation": {"bits": bits}}
    plain, request = plan_of(RunSpec.model_validate({**GOOD, **fields}))
    few = planned_for(RunSpec.model_validate({**GOOD, **fields}), 1, 30.0, 20, SIZE)
    plain = plain.model_copy(update={"quantisation": few, "min_reports": 1})

    def coins(device):
        return Random(device).randbytes

    class Compressing(Plain):
        def ask(self, plan, request):
            for device in self.devices:
                answer = reply_of(plan, device).to_records()
                yield Answer(device, compressed(request.to_records(), answer, coins(device)))

    masked, asked = plan_of(spec_of(**fields), quantisation=few)
    fleet = Fleet(masked, asked, {COHORT[3]: Stage.UPLOADS, COHORT[4]: Stage.SHARES})
    fleet.random_of = coins
    found, mean = secure(fleet)
    there = [device for device in COHORT if device not in COHORT[3:5]]
    collected, expected = collect_training(plain, request.model, Compressing(there))
    assert_array_equal(mean, expected)
    assert found.figures() == collected.figures()
    lane = 2 if few.bits <= 16 else 4
    counters = encoding_of(masked).length - SIZE
    assert context_of(masked, asked, PLACE).upload_bytes == -(-SIZE * few.bits // 8) + lane * counters
