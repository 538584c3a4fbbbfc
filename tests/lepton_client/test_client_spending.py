"""The device's own privacy budget: what is spent stays spent, and nobody else decides."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from lepton_client.config import ClientConfig, LimitsSection, PrivacyPolicy, TaskSection
from lepton_client.desk import Office
from lepton_client.report import budget_rows
from lepton_client.spending import Spending, policies_of
from lepton_client.state import StateDir
from lepton_fl.errors import BudgetRefused, DiskFull, Rejection, StateConflict, StateCorrupt, UpdateRejected
from lepton_fl.plan import LocalPlan, RoundPlan, RunSpec
from lepton_fl.privacy.accounting import RdpGate
from lepton_fl.privacy.example import Charge, charge_of
from lepton_fl.vector import vector_digest
from lepton_fl.wire.messages import EvaluateReply, Request, Ticket, TrainReply

DIGITS = "lepton_fl.tasks.images:digits"
CHARGE = Charge(rate=0.1, noise_multiplier=2.0, steps=20, delta=1e-5, epsilon=0.0, participations=1000)


def ticket(number, run="run-1", kind="train", nonce="") -> Ticket:
    return Ticket(kind, run, number, 1, nonce or f"{number:032x}")


def spending(path, epsilon=4.0, delta=1e-5) -> Spending:
    return Spending(path / "budget.jsonl", {"digits": PrivacyPolicy(epsilon=epsilon, delta=delta)})


def fill(book: Spending, first=1) -> int:
    """Charge until the budget says no; how often it said yes."""
    for number in range(first, 1000):
        try:
            book.charge("digits", ticket(number), CHARGE)
        except BudgetRefused:
            return number - first
    raise AssertionError("the budget never ends")


def test_the_cap_holds_for_all_runs_together_and_for_all_lives(tmp_path):
    book = spending(tmp_path)
    taken = fill(book)
    assert taken >= 2
    (row,) = book.accounts()
    assert row["spent"] == pytest.approx(RdpGate().epsilon({CHARGE.event: 20 * taken}, 1e-5))
    assert row["spent"] <= 4.0 < RdpGate().epsilon({CHARGE.event: 20 * (taken + 1)}, 1e-5)
    assert (row["unit"], row["trust"], row["adjacency"], row["rounds"]) == (
        "example",
        "local",
        "zero-out",
        taken,
    )
    again = spending(tmp_path)
    with pytest.raises(BudgetRefused, match=r"'digits' allows epsilon=4 at delta=1e-05") as caught:
        again.charge("digits", ticket(1, run="another run"), CHARGE)
    assert caught.value.spent == pytest.approx(row["spent"])
    assert caught.value.asked > 4.0
    assert "owner" in caught.value.hint
    assert again.accounts() == book.accounts()
    raised = spending(tmp_path, epsilon=8.0)  # the owner may
    raised.charge("digits", ticket(1, run="another run"), CHARGE)
    other = Spending(tmp_path / "budget.jsonl", {})
    other.charge("mnist", ticket(2, run="another run"), CHARGE)  # no cap, but kept
    assert [(r["task"], r["allowed"], r["rounds"]) for r in other.accounts()] == [
        ("digits", None, taken + 1),
        ("mnist", None, 1),
    ]


def test_fresh_randomness_for_every_charge(tmp_path):
    book = spending(tmp_path, epsilon=100.0)
    one, two = (book.charge("digits", ticket(number), CHARGE).words(8).copy() for number in (1, 2))
    assert (one != two).all()


def test_an_attempt_is_charged_once(tmp_path):
    book = spending(tmp_path)
    book.charge("digits", ticket(1), CHARGE)
    for known in (book, spending(tmp_path)):
        with pytest.raises(StateConflict, match="charged for before"):
            known.charge("digits", ticket(1), CHARGE)
    book.charge("digits", ticket(1, nonce="f" * 32), CHARGE)  # another attempt


def test_a_run_s_own_epsilon_and_participations_hold_besides(tmp_path):
    book = spending(tmp_path, epsilon=1e3)
    twice = Charge(0.1, 2.0, 20, 1e-5, 0.0, participations=2)
    book.charge("digits", ticket(1), twice)
    book.charge("digits", ticket(2), twice)
    with pytest.raises(BudgetRefused, match="trained 2 times in run run-1, which allows 2"):
        book.charge("digits", ticket(3), twice)
    small = Charge(0.1, 2.0, 20, 1e-5, epsilon=1.8, participations=100)
    book.charge("digits", ticket(4, run="run-2"), small)
    assert RdpGate().epsilon({small.event: 20}, 1e-5) < 1.8 < RdpGate().epsilon({small.event: 80}, 1e-5)
    with pytest.raises(BudgetRefused, match=r"'run run-2' allows epsilon=1.8"):
        [book.charge("digits", ticket(number, run="run-2"), small) for number in (5, 6, 7)]


@pytest.mark.parametrize("length", [1, 20, 200])
def test_a_half_written_line_was_never_answered_for(tmp_path, length):
    path = tmp_path / "budget.jsonl"
    book = spending(tmp_path)
    book.charge("digits", ticket(1), CHARGE)
    whole = path.read_bytes()
    book.charge("digits", ticket(2), CHARGE)
    path.write_bytes(path.read_bytes()[: len(whole) + length])
    after = spending(tmp_path)
    assert after.accounts()[0]["rounds"] == 1
    after.charge("digits", ticket(3), CHARGE)
    assert [json.loads(line)["round"] for line in path.read_bytes().splitlines()] == [1, 3]
    assert spending(tmp_path).accounts()[0]["rounds"] == 2


def damage(kind, lines):
    first, second = lines
    if kind == "less noise charged":
        return [first.replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0'), second]
    if kind == "a line taken out":
        return [second]
    if kind == "two lines exchanged":
        return [second, first]
    if kind == "another class":
        return [first.replace(b"poisson-gaussian", b"os.system"), second]
    if kind == "a field more":
        return [first.replace(b'"count"', b'"more":1,"count"'), second]
    return [b"\xff not json", second]


@pytest.mark.parametrize(
    "kind",
    [
        "less noise charged",
        "a line taken out",
        "two lines exchanged",
        "another class",
        "a field more",
        "noise",
    ],
)
def test_damage_ends_private_training_and_changes_nothing(tmp_path, kind):
    path = tmp_path / "budget.jsonl"
    book = spending(tmp_path)
    for number in (1, 2):
        book.charge("digits", ticket(number), CHARGE)
    harmed = b"".join(line + b"\n" for line in damage(kind, path.read_bytes().splitlines()))
    path.write_bytes(harmed)
    with pytest.raises(StateCorrupt, match=r"Line 1 of .*budget.jsonl is damaged"):
        spending(tmp_path).charge("digits", ticket(3), CHARGE)
    assert path.read_bytes() == harmed


def test_a_full_disk_spends_nothing_and_trains_nothing(tmp_path):
    book = spending(tmp_path)
    book.charge("digits", ticket(1), CHARGE)
    path = tmp_path / "budget.jsonl"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
    try:
        with pytest.raises(DiskFull):
            book.charge("digits", ticket(2), CHARGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    book.charge("digits", ticket(2), CHARGE)
    assert spending(tmp_path).accounts()[0]["rounds"] == 2


CHARGER = """
import sys
from pathlib import Path
from lepton_client.config import PrivacyPolicy
from lepton_client.spending import Spending
from lepton_fl.privacy.example import Charge
from lepton_fl.wire.messages import Ticket
book = Spending(Path(sys.argv[1]), {"digits": PrivacyPolicy(epsilon=50.0, delta=1e-5)})
charge = Charge(0.1, 1.0, 1, 1e-5, 0, 1000)
for number in range(1000):
    book.charge("digits", Ticket("train", sys.argv[2], number, 1, f"{number:032x}"), charge)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_sigkill_loses_no_charge_that_was_granted(tmp_path):
    """Every number printed was granted, and so could have been trained: it must be in the file."""
    path, granted = tmp_path / "budget.jsonl", 0
    for life in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", CHARGER, str(path), f"run-{life}"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(3 + 7 * life)]
        os.kill(process.pid, signal.SIGKILL)
        seen += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        granted += sum(line.endswith(b"\n") for line in seen)
        (row,) = Spending(path, {}).accounts()
        assert granted <= row["rounds"] <= granted + life + 1


# --- the office


def owned(tmp_path, policy=None) -> tuple[Office, list[str]]:
    section = TaskSection(reference="digits", privacy=policy)
    told: list[str] = []
    book = Spending(tmp_path / "budget.jsonl", policies_of((section,)))
    return Office((section,), LimitsSection(), lambda: None, None, book, told.append), told


def request(office: Office, kind="train", privacy=None, number=1) -> tuple[RoundPlan, Request]:
    trainer = office.trainer(DIGITS)
    given = {"privacy": privacy} if privacy else {}
    local = LocalPlan(learning_rate=0.1, batch_size=200)
    spec = RunSpec(task=DIGITS, weighting="equal", local=local, evaluate_every=0, **given)
    model = trainer.initial(0)
    plan = RoundPlan(
        run_id="run-1",
        round=number,
        attempt=1,
        kind=kind,
        task=DIGITS,
        task_version=trainer.task.version,
        layout_digest=trainer.layout.digest,
        num_coordinates=trainer.layout.size,
        model_sha256=vector_digest(model),
        cohort=("me",),
        wanted_reports=1,
        min_reports=1,
        deadline_s=60,
        local=spec.local,
        weighting="equal",
        max_weight=1,
        grid_step=2.0**-24,
        nonce=f"{number:032x}",
    )
    return plan, Request.of(plan, model)


EXAMPLE = {"unit": "example", "trust": "local", "mechanism": "dp-sgd", "noise_multiplier": 1.0, "delta": 1e-4}


def answer(office, kind="train", privacy=None, number=1):
    plan, asked = request(office, kind, privacy, number)
    reply = office(asked.to_records(), lambda: False)
    return (TrainReply if kind == "train" else EvaluateReply).read(reply, plan)


def test_the_owner_s_budget_refuses_by_reason_whatever_is_asked(tmp_path):
    office, told = owned(tmp_path, PrivacyPolicy(epsilon=5.0, delta=1e-4))
    reply = answer(office, privacy=EXAMPLE)
    assert reply.update.any()
    assert reply.num_examples == 1
    assert not any(value.any() for value in reply.sums.values())  # a loss would be one more release
    with pytest.raises(UpdateRejected, match="'digits' allows epsilon=5") as full:
        [answer(office, privacy=EXAMPLE, number=number) for number in range(2, 40)]
    assert full.value.reason is Rejection.BUDGET
    assert told[0] == ""
    assert "'digits' allows epsilon=5" in told[-1]
    for kind in ("train", "evaluate"):
        with pytest.raises(
            UpdateRejected, match=f"only with example-level privacy, and this {kind}"
        ) as caught:
            answer(office, kind, number=99)
        assert caught.value.reason is Rejection.BUDGET


def test_without_a_cap_charges_are_kept_and_plain_rounds_are_answered(tmp_path):
    office, told = owned(tmp_path)
    assert answer(office).num_examples > 1000
    answer(office, privacy=EXAMPLE, number=2)
    (row,) = Spending(tmp_path / "budget.jsonl", {}).accounts()
    assert (row["task"], row["allowed"], row["rounds"], row["delta"]) == ("digits", None, 1, 1e-4)
    assert told == [""]


def test_nothing_is_charged_for_what_cannot_be_trained(tmp_path):
    office, told = owned(tmp_path)
    plan, asked = request(office, privacy=EXAMPLE | {"delta": 0.01})
    with pytest.raises(UpdateRejected, match="above 1/1148") as caught:
        TrainReply.read(office(asked.to_records(), lambda: False), plan)
    assert caught.value.reason is Rejection.BUDGET
    assert "above 1/1148" in told[-1]  # for ``lepton client status``
    assert not (tmp_path / "budget.jsonl").exists()


def test_two_trainings_of_one_model_differ(tmp_path):
    """Noise comes from the operating system, not from what a coordinator could know."""
    office, _ = owned(tmp_path)
    one, two = (answer(office, privacy=EXAMPLE, number=number).update for number in (1, 2))
    assert (one != two).mean() > 0.9


def test_status_tells_what_is_spent(tmp_path):
    state = StateDir(tmp_path / "state")
    settings = ClientConfig.model_validate(
        {"tasks": [{"reference": "digits", "privacy": {"epsilon": 4.0, "delta": 1e-5}}]}
    )
    assert budget_rows(state, ClientConfig()) == []
    assert budget_rows(state, settings)[0]["spent"] == 0.0
    Spending(state.spending, policies_of(settings.tasks)).charge("digits", ticket(1), CHARGE)
    assert 0 < budget_rows(state, settings)[0]["spent"] < 4.0
    assert state.spending.stat().st_mode & 0o777 == 0o600


def test_the_plan_of_a_run_reaches_the_device():
    spec = RunSpec(task="digits", rounds=7, privacy=EXAMPLE | {"max_participations": 3, "clip_norm": 0.5})
    asked = spec.local.example_privacy
    assert asked is not None
    assert (asked.clip_norm, asked.noise_multiplier, asked.delta, asked.participations) == (0.5, 1.0, 1e-4, 3)
    assert spec.weighting == "equal"
    assert RunSpec.model_validate_json(json.dumps(spec.to_json())) == spec
    assert np.isclose(charge_of(spec.local, 500).rate, 32 / 500, rtol=0.011)
    with pytest.raises(ValueError, match=r"local.example_privacy follows from privacy"):
        RunSpec(task="digits", local=spec.local)
    with pytest.raises(ValueError, match="min_separation is for unit='device'"):
        RunSpec(task="digits", privacy=EXAMPLE | {"min_separation": 2})
