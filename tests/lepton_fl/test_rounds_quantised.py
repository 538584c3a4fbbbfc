"""Rounds in few bits: the plan proves or refuses; the same bits masked or not; the ring follows the sums."""

import json
from collections.abc import Generator
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pydantic import ValidationError

from lepton_fl.errors import ConfigError, Rejection
from lepton_fl.plan import Quantisation, RoundPlan, RunSpec
from lepton_fl.rounds.campaign import Campaign, RunState, Work, plan_round
from lepton_fl.rounds.cohort import Candidate
from lepton_fl.rounds.collect import ACCEPTED, collect_training
from lepton_fl.rounds.exchange import Answer
from lepton_fl.rounds.quantised import DECAY, compressed, next_expected, planned_for, prove_fits
from lepton_fl.rounds.secure_device import Offer
from lepton_fl.rounds.secure_ideal import IdealRounds
from lepton_fl.rounds.secure_sum import context_of, encoding_of
from lepton_fl.rounds.secure_sum import prove_fits as prove_any
from lepton_fl.secagg.quantised import SURE, TUNED, Quantised, ring_bits
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import UPDATE, Request, Ticket, TrainReply
from lepton_fl.wire.records import Records

SIZE = 300
WORK = Work("pkg:task", "1", "ab" * 32, SIZE, TrainingLoss(), evaluate_on_devices=False)
COHORT = tuple(f"d{i:02}" for i in range(20))
GOOD = {
    "task": "pkg:task",
    "clip_norm": 4.0,
    "weighting": "equal",
    "cohort": {"size": 20},
    "quantisation": {"bits": 4},
}


def spec_of(**more) -> RunSpec:
    return RunSpec.model_validate({**GOOD, **more})


def plan_of(spec: RunSpec, expected=0.0, number=1) -> tuple[RoundPlan, Request]:
    model = np.linspace(-1, 1, SIZE, dtype=np.float32)
    state = RunState(model, expected=expected)
    plan = plan_round(spec, "run", WORK, "train", number, state, COHORT, len(COHORT), "5a" * 16)
    return plan, Request.of(plan, model)


def reply_of(plan: RoundPlan, device: str, size=0.1) -> TrainReply:
    number = int(device[1:])
    delta = np.random.default_rng(number).normal(size=SIZE).astype(np.float32) * size
    update = to_grid(delta, plan.grid_step, plan.clip_norm)
    sums = {"loss_sum": np.array([0.5 * number]), "examples": np.array([10 + number])}
    return TrainReply(Ticket.of(plan), plan.task_version, 3 + number, update, sums, 0.1)


def coins(plan: RoundPlan, device: str):
    return Random(f"{plan.round} {device}").randbytes


class Devices:
    """They answer as real ones do; ``size`` scales all updates, ``spoil`` changes one answer."""

    def __init__(self, size=0.1, spoil=None) -> None:
        self.size, self.spoil, self.told = size, spoil or {}, {}

    def ask(self, plan: RoundPlan, request: Request) -> Generator[Answer, None, None]:
        asked = request.to_records()
        for device in plan.cohort:
            answered = compressed(asked, reply_of(plan, device, self.size).to_records(), coins(plan, device))
            change = self.spoil.get(device)
            answered = change(answered) if change else answered
            size = sum(array.nbytes for array in answered.arrays.values())
            yield Answer(device, answered, size)

    def tell(self, plan, device_id, refusal) -> None:
        self.told[device_id] = refusal


def exact_mean(plan: RoundPlan, size=0.1):
    replies = [reply_of(plan, device, size) for device in plan.cohort]
    weights = [1 if plan.weighting == "equal" else r.num_examples for r in replies]
    total = sum(r.update.astype(np.float64) * w for r, w in zip(replies, weights, strict=True))
    return total * plan.grid_step / sum(weights)


# --- the plan -------------------------------------------------------------------------------------------


def test_the_first_ring_is_sure_and_later_ones_follow_the_sums():
    spec = spec_of()
    first = planned_for(spec, 1, 0.0, 20, SIZE)
    assert first == Quantisation(bits=16, reach=80.0, risk=SURE, cohort=20)
    later = planned_for(spec, 1, 20.0, 20, SIZE)
    assert later == Quantisation(bits=ring_bits(4, 20, SIZE), reach=3.0, risk=TUNED, cohort=20)
    assert planned_for(spec, 1, 1e9, 20, SIZE).reach == 80.0  # devices clip: it cannot be longer
    assert planned_for(spec_of(quantisation={"ring": 9, "headroom": 2}), 1, 20.0, 20, SIZE) == Quantisation(
        bits=9, reach=4.0, risk=TUNED, cohort=20
    )
    assert planned_for(spec_of(weighting="examples"), 1, 0.0, 20, SIZE).bits == 32
    assert planned_for(spec_of(quantisation=None), 1, 0.0, 20, SIZE) is None
    assert next_expected(2.0, 3.0) == 3.0
    assert next_expected(2.0, 0.1) == DECAY * 2.0
    assert next_expected(2.0, 0.3, rate=0.1) == pytest.approx(3.0)
    falling = spec_of(rounds=100, schedule={"kind": "cosine"})
    reaches = [planned_for(falling, number, 20.0, 20, SIZE).reach for number in (1, 51)]
    assert reaches[1] == pytest.approx(reaches[0] / 2)  # updates are in proportion to the learning rate


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"aggregation": {"name": "median"}}, "median"),
        ({"mode": "buffered"}, "buffered"),
        ({"local": {"control_variates": True}}, "control_variates"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"secure_aggregation": "required", "secure": {"bits": 16}}, "secure.bits=16"),
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.trust='central'"),
        (
            {"privacy": {"noise_multiplier": 1.0, "trust": "distributed", "mechanism": "skellam"}},
            "privacy.trust='distributed': set secure.bits",
        ),
        ({"quantisation": {"bits": 3}}, "bits"),
        ({"quantisation": {"bits": 4, "headroom": 0.5}}, "headroom"),
    ],
)
def test_what_few_bits_do_not_go_with_is_refused_by_name(more, word):
    with pytest.raises(ValidationError, match=word):
        spec_of(**more)


def test_a_private_run_of_example_level_may_use_few_bits():
    privacy = {"unit": "example", "trust": "local", "mechanism": "dp-sgd", "noise_multiplier": 1.0}
    assert spec_of(privacy=privacy).quantisation.bits == 4


@pytest.mark.parametrize("ring", [5, 16, 32])
def test_a_ring_that_does_not_suffice_is_refused_with_numbers(ring):
    spec = spec_of(quantisation={"bits": 4, "ring": ring})
    with pytest.raises(ConfigError, match=f"ring={ring} does not suffice: updates of 20 devices .* need 7"):
        prove_any(spec, SIZE)
    prove_fits(spec_of(quantisation={"bits": 4, "ring": 7}), SIZE)


def test_the_plan_is_journalled_whole_and_read_back():
    plan, _ = plan_of(spec_of(), expected=20.0)
    assert RoundPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.update_bytes == -(-SIZE * 7 // 8)


# --- a round --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "examples"])
@pytest.mark.parametrize("expected", [0.0, 80.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_bits_masked_or_not(weighting, expected, bits):
    more = {"weighting": weighting, "quantisation": {"bits": bits}}
    if weighting == "examples":
        more["max_weight"] = 30
    plain, request = plan_of(spec_of(**more), expected)
    collected, mean = collect_training(plain, request.model, Devices())
    masked, asked = plan_of(spec_of(**more, secure_aggregation="required"), expected)
    found, same = IdealRounds(coins).collect(masked, asked, Devices(), lambda: 0.0, None)
    assert_array_equal(mean, same)
    assert collected.figures() == found.figures()
    assert asked.quantisation is None  # part of the offer that the device signs
    true = exact_mean(plain)
    error = np.linalg.norm(mean - true) / np.linalg.norm(true)
    assert error < (0.06 if not expected else {2: 1.6, 4: 0.6, 8: 0.05}[bits])
    assert found.reports == 20
    assert collected.sums["examples"] == found.sums["examples"]


def test_an_answer_takes_as_many_bits_as_its_integers_have():
    plan, request = plan_of(spec_of(), 80.0)
    collected, _ = collect_training(plan, request.model, Devices())
    sizes = {entry.num_bytes for entry in collected.participation.values()}
    assert max(sizes) <= plan.update_bytes + 40
    assert max(sizes) < SIZE  # a quarter of 32 bits


def test_a_round_reports_its_error():
    plan, request = plan_of(spec_of(), 80.0)
    collected, mean = collect_training(plan, request.model, Devices())
    figures, true = collected.figures(), exact_mean(plan)
    measured = np.linalg.norm(mean - true) / np.linalg.norm(true)
    assert figures["quantisation_error"] == pytest.approx(measured, rel=0.15)
    assert figures["ring_bits"] == 7
    assert figures["sum_norm"] == pytest.approx(20 * np.linalg.norm(true), rel=0.1)


def test_a_sum_that_leaves_its_ring_is_thrown_away():
    spec = spec_of()
    plan, request = plan_of(spec, expected=5.0)
    collected, mean = collect_training(plan, request.model, Devices())
    assert mean is None
    assert collected.wrapped
    assert "left its ring of 7 bits" in collected.summary()
    masked, asked = plan_of(spec_of(secure_aggregation="required"), expected=5.0)
    found, mean = IdealRounds(coins).collect(masked, asked, Devices(), lambda: 0.0, None)
    assert mean is None
    assert found.wrapped
    assert found.burnt  # devices sign no other survivor set in this round


def longer(answered: Records) -> Records:
    """An update that is far longer than the clip norm, as if by a device that does not clip."""
    message = answered.arrays[UPDATE].copy()
    message[1:40] = 0x77
    return replace(answered, arrays={UPDATE: message})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (longer, Rejection.OUT_OF_RANGE),
        (lambda a: replace(a, arrays={UPDATE: a.arrays[UPDATE][:-1]}), Rejection.WRONG_SHAPE),
        (lambda a: replace(a, arrays={UPDATE: np.zeros(0, np.uint8)}), Rejection.WRONG_SHAPE),
        (lambda a: replace(a, arrays={UPDATE: np.zeros(SIZE, np.int32)}), Rejection.WRONG_SHAPE),
        (lambda a: replace(a, arrays={}), Rejection.MALFORMED),
    ],
)
def test_an_answer_that_is_none_is_refused_by_name_and_the_round_goes_on(spoil, reason):
    plan, request = plan_of(spec_of(clip_norm=0.5), 0.0)
    collected, mean = collect_training(plan, request.model, Devices(spoil={"d03": spoil}))
    assert collected.participation["d03"].outcome == reason
    assert collected.reports == 19
    others = [reply_of(plan, d) for d in plan.cohort if d != "d03"]
    true = sum(r.update.astype(np.float64) for r in others) * plan.grid_step / 19
    assert np.linalg.norm(mean - true) < 0.05 * np.linalg.norm(true)


def test_a_failure_stays_a_failure_and_other_requests_are_left_alone():
    plan, request = plan_of(spec_of(), 80.0)
    failed = Records({}, {"failed": "non-finite", "detail": "x", **Ticket.of(plan).to_config()}, {})
    assert compressed(request.to_records(), failed, coins(plan, "d01")) is failed
    bare, asked = plan_of(spec_of(quantisation=None))
    answer = reply_of(bare, "d01").to_records()
    assert compressed(asked.to_records(), answer, coins(plan, "d01")) is answer


def test_a_request_without_sense_becomes_a_failure_of_the_device():
    plan, request = plan_of(spec_of(), 80.0)
    mad = replace(request, quantisation=Quantisation(bits=2, reach=1.0, risk=10, cohort=1000))
    answer = compressed(mad.to_records(), reply_of(plan, "d01").to_records(), coins(plan, "d01"))
    assert answer.config["failed"] == Rejection.MALFORMED
    assert "2 bits are too few" in answer.config["detail"]


def test_the_offer_of_a_masked_round_names_the_ring():
    plan, request = plan_of(spec_of(secure_aggregation="required"), 80.0)
    context = context_of(plan, request, "lab")
    offer = Offer.from_json(Offer.of(context).to_json())
    assert offer.context("lab").digest == context.digest
    assert isinstance(offer.encoding, Quantised)
    assert offer.encoding == encoding_of(plan)
    assert context.upload_bytes < SIZE + 100


# --- a run ----------------------------------------------------------------------------------------------


class Roster:
    def candidates(self):
        return tuple(Candidate(device, "eligible") for device in COHORT)

    def wait(self, seconds):
        pass


class Book:
    def __init__(self) -> None:
        self.plans, self.lost, self.rounds = [], [], []

    def planned(self, plan):
        self.plans.append(plan)

    def abandoned(self, collected, cause):
        self.lost.append(cause)

    def committed(self, round_):
        self.rounds.append(round_)

    def evaluated(self, evaluation):
        pass

    def waiting(self, cause, seconds):
        pass


class Growing(Devices):
    """Updates that are suddenly ten times as long in round 4."""

    def ask(self, plan, request):
        self.size = 0.05 if plan.round < 4 else 0.9
        yield from super().ask(plan, request)


@pytest.mark.parametrize("secure", ["off", "required"])
def test_a_run_follows_its_sums_and_begins_anew_after_one_that_left(secure):
    spec = spec_of(rounds=6, clip_norm=40.0, evaluate_every=0, secure_aggregation=secure)
    book, rounds = Book(), IdealRounds(coins) if secure == "required" else None
    campaign = Campaign(
        spec, "run", WORK, Growing(), Roster(), book, Random(0), secure=rounds, clock=lambda: 0.0
    )
    verdict = campaign.run(RunState(np.zeros(SIZE, np.float32)))
    assert verdict.outcome == "completed", verdict.reason
    bits = [(plan.round, plan.quantisation.bits) for plan in book.plans]
    # A masked round in which signatures were given is over; a plain one is tried again.
    again = [(5, 16), (6, 7)] if secure == "required" else [(4, 16), (5, 7), (6, 7)]
    assert bits == [(1, 16), (2, 7), (3, 7), (4, 7), *again]
    assert ["left its ring" in cause for cause in book.lost] == [True]
    norms = [r.metrics["sum_norm"] for r in book.rounds]
    assert book.plans[1].quantisation.reach == pytest.approx(1.5 * norms[0])
    assert book.rounds[-1].state.expected >= norms[-1]
    accepted = [e.outcome for r in book.rounds for e in r.collected.participation.values()]
    assert set(accepted) == {ACCEPTED}
