"""Private runs at the coordinator: charged before anybody is asked, refused when the budget is spent."""

import contextlib
import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, NotFound, TrustError
from lepton_fl.plan import RunSpec
from lepton_fl.privacy import record
from lepton_fl.privacy.budget import epsilon_of
from lepton_fl.privacy.events import Gaussian, to_json
from lepton_fl.privacy.mechanisms import Correlated, Independent
from lepton_fl.privacy.record import Policy
from lepton_fl.rounds.secure_ideal import IdealRounds
from lepton_fl.secagg.server import Stage
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Ticket, TrainReply
from lepton_server import cli_privacy
from lepton_server.config import PrivacySection
from lepton_server.fleet import Report, Secrecy, TaskState
from lepton_server.privacy import NOT_BEGUN, Ledger, PrivacyKeys, guard_run, set_budget

TASK, VERSION = "lepton_fl.tasks.images:digits", "1"
BANDED = {
    "mechanism": "banded",
    "clip_norm": 1.0,
    "noise_multiplier": 4.0,
    "delta": 1e-3,
    "min_separation": 2,
    "max_participations": 2,
}
BLT = {**BANDED, "mechanism": "blt"}
INDEPENDENT = {"mechanism": "independent", "clip_norm": 1.0, "noise_multiplier": 4.0, "delta": 1e-3}


def clipped(device_id, plan, request):
    """A device that moves a little, within the clip, and talks much."""
    update = to_grid(np.full(plan.update_size, 1e-4, np.float32), plan.grid_step, plan.clip_norm)
    sums = {"loss_sum": np.array([7.25]), "examples": np.array([4242])}
    return TrainReply(Ticket.of(plan), plan.task_version, 4242, update, sums, 0.125).to_records()


def queue(works, run_id="r1", privacy=BANDED, **changes):
    works.exchange.script = clipped
    spec = {"rounds": 4, "evaluate_every": 0, "privacy": privacy, "cohort": {"size": 2, "min_reports": 2}}
    return works.queue(run_id, **spec | changes)


def drive(works, run_id="r1"):
    driver = works.driver()
    driver._drive(run_id)
    return works.store.run(run_id)


def keys(works):
    return PrivacyKeys(works.folder / "keys", PrivacySection())


def cap(works, account, epsilon, delta=1e-3, **fields):
    with works.store.transaction() as change:
        return set_budget(change, keys(works), Policy(account, 1, epsilon, delta, **fields))


def spent(works, account):
    found = {b.policy.account: (b.policy, counts) for b, counts in works.store.budgets()}
    return epsilon_of(found[account][0].budget, found[account][1])


def proven(works):
    """The ledger proves itself, and says the same as the tables."""
    works.unharmed()
    report = record.verify(cli_privacy.ledger_lines(works.store), keys(works).public())
    for budget in report.budgets:
        assert budget.spent == pytest.approx(spent(works, budget.policy.account), rel=1e-12)
    cli_privacy._check_releases(works.store)
    return report


@pytest.fixture
def crowd(works):
    works.check_in(*works.register(3))
    return works


# --- a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [BANDED, BLT, {**INDEPENDENT, "min_separation": 2}])
def test_a_whole_run_is_charged_before_its_first_round_and_committed_with_each(crowd, privacy):
    queue(crowd, privacy=privacy)
    run = drive(crowd)
    assert run.state == "completed", run.reason
    charges = crowd.store.charges("r1")
    assert [(c.round, c.state, len(c.events)) for c in charges] == [
        (1, "committed", 1),
        (2, "committed", 0),
        (3, "committed", 0),
        (4, "committed", 0),
    ]
    rounds = crowd.store.rounds("r1")
    assert [c.model_sha256 for c in charges] == [r.model_sha256 for r in rounds]
    report = proven(crowd)
    assert (report.releases, report.unsettled, report.voided) == (4, 0, 0)
    assert rounds[-1].metrics["epsilon_charged"] == pytest.approx(report.budgets[0].spent)


def test_without_a_contract_every_round_is_charged_by_itself(crowd):
    queue(crowd, privacy=INDEPENDENT)
    assert drive(crowd).state == "completed"
    assert [len(c.events) for c in crowd.store.charges("r1")] == [1, 1, 1, 1]
    proven(crowd)


def test_nobody_takes_part_too_soon_or_too_often_and_a_restart_does_not_forget_it(crowd, kill_at):
    queue(crowd)
    for _ in range(2):
        kill_at(9)
        with contextlib.suppress(kill_at.error):
            drive(crowd)
        crowd.fleet.release("r1")
    kill_at(0)
    assert drive(crowd).state == "completed"
    took = {}
    for part in crowd.store.participation("r1"):
        attempt = next(
            r for r in crowd.store.rounds("r1") if (r.round, r.attempt) == (part.round, part.attempt)
        )
        if part.outcome == "counted" and attempt.state == "committed":
            took.setdefault(part.device_id, []).append(part.round)
    assert sum(map(len, took.values())) == 8
    assert all(len(rounds) <= 2 and all(b - a >= 2 for a, b in pairwise(rounds)) for rounds in took.values())
    assert crowd.store.participations("r1") == {d: (r[-1], len(r)) for d, r in took.items()}


def test_nothing_that_devices_say_of_themselves_is_kept_or_logged(crowd, caplog):
    with caplog.at_level(logging.DEBUG):
        queue(crowd)
        drive(crowd)
    for part in crowd.store.participation("r1"):
        assert (part.examples, part.seconds) == (0, 0.0)
    told = " ".join(str(dict(e.body)) for e in crowd.store.events(subject="r1")) + caplog.text
    assert "4242" not in told
    assert "7.25" not in told
    allowed = {"epsilon", "epsilon_charged", "delta", "noise_multiplier", "clip_norm"}
    assert all(set(r.metrics) == allowed for r in crowd.store.rounds("r1"))


def test_the_memory_of_noise_is_sealed_replaced_and_forgotten_at_the_end(crowd):
    left = []

    def looking(device_id, plan, request):
        left.append([c.state_sha256 for c in crowd.store.charges("r1", states=["committed"])])
        return clipped(device_id, plan, request)

    queue(crowd)
    crowd.exchange.script = looking
    drive(crowd)
    memories = [c.state_sha256 for c in crowd.store.charges("r1")]
    assert len(set(memories)) == 4
    assert len(max(left, key=len)) == 3
    assert not any(crowd.blobs.has(sha256) for sha256 in memories)


# --- refusal ------------------------------------------------------------------------------------------


def test_a_spent_budget_exhausts_the_run_which_goes_on_when_a_signed_row_raises_it(crowd):
    one = epsilon_of(Policy("x", 1, 9.0, 1e-3).budget, {Gaussian(4.0): 2})
    cap(crowd, "fleet", one * 1.01)
    queue(crowd, privacy=INDEPENDENT)
    run = drive(crowd)
    assert (run.state, run.committed) == ("exhausted", 2)
    assert "Budget 'fleet' allows" in run.reason
    assert "noise multiplier" in run.reason
    assert run.model_sha256 == crowd.store.rounds("r1")[-1].model_sha256
    assert crowd.blobs.has(run.model_sha256)  # the last model is served as before
    assert len(crowd.store.charges("r1")) == 2
    assert len(crowd.exchange.asked) == 2  # the refused round reached nobody
    crowd.store.record("run.resumed", {"run_id": "r1"})
    assert drive(crowd).state == "exhausted"  # nothing has changed
    cap(crowd, "fleet", 100.0)
    crowd.store.record("run.resumed", {"run_id": "r1"})
    run = drive(crowd)
    assert (run.state, run.committed) == ("completed", 4)
    report = proven(crowd)
    assert report.releases == 4
    assert [b.policy.version for b in report.budgets if b.policy.account == "fleet"] == [2]


def test_every_enclosing_budget_is_charged_and_others_are_not(crowd):
    task = crowd.store.run(queue(crowd)).spec["task"]
    for account in ("fleet", f"task:{task}", "group:ward", "task:other:task"):
        cap(crowd, account, 50.0)
    drive(crowd)
    own = spent(crowd, "run:r1")
    assert own > 0
    assert spent(crowd, "fleet") == spent(crowd, f"task:{task}") == spent(crowd, "group:ward") == own
    assert spent(crowd, "task:other:task") == 0.0
    queue(crowd, "r2")
    drive(crowd, "r2")
    assert spent(crowd, "run:r1") == own
    assert spent(crowd, "fleet") > own  # two models of one fleet compose
    proven(crowd)


def test_a_run_of_one_group_is_charged_to_it_and_to_the_fleet(works):
    works.check_in(*works.register(4, groups=("ward",)))
    for account in ("fleet", "group:ward", "group:lab"):
        cap(works, account, 50.0)
    queue(works, cohort={"size": 2, "min_reports": 2, "groups": ("ward",)})
    assert drive(works).state == "completed"
    assert spent(works, "fleet") == spent(works, "group:ward") > 0
    assert spent(works, "group:lab") == 0.0
    proven(works)


def test_a_budget_set_late_counts_what_was_spent_before_it(crowd):
    queue(crowd)
    drive(crowd)
    cap(crowd, "fleet", 1e-6)
    assert spent(crowd, "fleet") == spent(crowd, "run:r1")
    queue(crowd, "r2")
    assert drive(crowd, "r2").state == "exhausted"
    proven(crowd)


def test_a_promise_against_the_coordinator_is_not_broken_by_a_central_run(crowd):
    cap(crowd, "fleet", 50.0, trust="distributed")
    queue(crowd)
    run = drive(crowd)
    assert run.state == "exhausted"
    assert "promises trust='distributed'" in run.reason
    assert not crowd.exchange.asked
    proven(crowd)


def test_a_budget_that_somebody_else_has_signed_releases_nothing(crowd):
    other = PrivacyKeys(crowd.folder / "elsewhere", PrivacySection())
    with crowd.store.transaction() as change:
        set_budget(change, other, Policy("fleet", 1, 1e9, 1e-3))
    queue(crowd)
    run = drive(crowd)
    assert run.state == "failed"
    assert "not signed by the budget key" in run.reason
    assert not crowd.exchange.asked
    ledger = Ledger(crowd.store, "r1", RunSpec.model_validate(run.spec), keys(crowd).public())
    ledger.reserve("r1", 1, 1, Gaussian(4.0))
    with pytest.raises(TrustError, match="not signed"), crowd.store.transaction() as change:
        ledger.write_reserved(change)
    with pytest.raises(TrustError, match="not signed"):
        cap(crowd, "fleet", 1.0)  # nor is it replaced in silence


def test_a_delta_that_would_publish_a_device_is_refused(crowd):
    queue(crowd, privacy={**BANDED, "delta": 0.2})
    run = drive(crowd)
    assert run.state == "failed"
    assert "one over the devices" in run.reason
    assert not crowd.exchange.asked


def test_a_coordinator_without_keys_runs_no_private_run(crowd):
    queue(crowd)
    driver = crowd.driver()
    driver._privacy_keys = None
    with pytest.raises(ConfigError, match="without the keys"):
        driver._run("r1")


# --- crashes ------------------------------------------------------------------------------------------


def counted_noise(monkeypatch):
    """How often noise was drawn, and how often for which round."""
    drawn = []
    for mechanism in (Correlated, Independent):
        real = mechanism.release

        def release(self, total, round_number, stream=None, *, real=real):
            drawn.append((round_number, stream))
            return real(self, total, round_number, stream)

        monkeypatch.setattr(mechanism, "release", release)
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [BANDED, INDEPENDENT])
def test_a_kill_around_any_record_never_hides_a_release(crowd, kill_at, monkeypatch, privacy):
    drawn = counted_noise(monkeypatch)
    queue(crowd, "whole", privacy=privacy, rounds=2)
    count = kill_at(0)
    assert drive(crowd, "whole").state == "completed"
    transactions = count["seen"]
    assert transactions >= 9
    cap(crowd, "fleet", 1000.0)
    for number in range(1, transactions + 1):
        for when in ("before", "after"):
            run_id = queue(crowd, f"{when}-{number}", privacy=privacy, rounds=2)
            drawn.clear()
            kill_at(number, when)
            with contextlib.suppress(kill_at.error):
                drive(crowd, run_id)
            kill_at(0)
            crowd.fleet.release(run_id)
            if not crowd.store.run(run_id).finished:
                drive(crowd, run_id)
            run = crowd.store.run(run_id)
            charges = crowd.store.charges(run_id)
            begun = [c for c in charges if c.state in ("committed", "releasing")]
            assert len(begun) >= len(drawn), (number, when)  # no noise without a charge that counts
            assert len({id(stream) for _, stream in drawn}) == len(drawn)  # and never the same noise
            in_doubt = [c for c in charges if c.state == "releasing"]
            # Only the instant between the two words of a release is in doubt; then its price is due again.
            assert run.state == ("exhausted" if in_doubt else "completed"), (number, when, run.reason)
            assert all(c.evidence for c in charges if c.state == "voided")
    proven(crowd)


def test_a_round_cut_short_by_a_kill_is_given_back_for_nothing_was_added_up(crowd, kill_at):
    def dying(device_id, plan, request):
        if plan.round == 2 and plan.attempt == 1:
            raise kill_at.error
        return clipped(device_id, plan, request)

    queue(crowd, privacy=INDEPENDENT)
    crowd.exchange.script = dying
    with pytest.raises(kill_at.error):
        drive(crowd)
    crowd.fleet.release("r1")
    assert [c.state for c in crowd.store.charges("r1")] == ["committed", "reserved"]
    assert drive(crowd).state == "completed"
    second = [(c.attempt, c.state, c.evidence) for c in crowd.store.charges("r1") if c.round == 2]
    assert second == [(1, "voided", NOT_BEGUN), (2, "committed", "")]
    assert proven(crowd).releases == 4


def test_an_attempt_with_too_few_reports_is_given_back_with_its_evidence(crowd):
    def silent_once(device_id, plan, request):
        return None if (plan.round, plan.attempt) == (1, 1) else clipped(device_id, plan, request)

    queue(crowd)
    crowd.exchange.script = silent_once
    assert drive(crowd).state == "completed"
    first = crowd.store.charges("r1")[0]
    assert (first.state, len(first.events)) == ("voided", 1)
    assert "0 of 2 reports" in first.evidence
    assert len(crowd.store.charges("r1")[1].events) == 1  # the next attempt sets it aside again
    proven(crowd)


@pytest.mark.parametrize("change", ["lost", "replaced"])
def test_without_the_key_of_its_noise_a_run_ends_and_says_why(crowd, kill_at, change):
    queue(crowd)
    kill_at(12)
    with pytest.raises(kill_at.error):
        drive(crowd)
    kill_at(0)
    crowd.fleet.release("r1")
    assert crowd.store.run("r1").committed >= 1
    path = crowd.folder / "keys" / "noise.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    if change == "replaced":
        keys(crowd).noise(make=True)
    run = drive(crowd)
    assert run.state == "failed"
    assert ("restore it" in run.reason) if change == "lost" else ("does not open" in run.reason)
    assert run.model_sha256


def test_keys_are_made_once_private_and_refused_when_others_can_read_them(tmp_path):
    made = PrivacyKeys(tmp_path / "keys", PrivacySection())
    with pytest.raises(NotFound, match=r"noise\.key"):
        made.noise(make=False)
    assert made.noise(make=True) == made.noise(make=False)
    assert made.public() == PrivacyKeys(tmp_path / "keys", PrivacySection()).public()
    assert [p.stat().st_mode & 0o777 for p in sorted((tmp_path / "keys").iterdir())] == [0o600, 0o600]
    (tmp_path / "keys" / "noise.key").chmod(0o640)
    with pytest.raises(TrustError, match="0640"):
        made.noise(make=False)
    elsewhere = PrivacyKeys(tmp_path / "keys", PrivacySection(noise_key=tmp_path / "mounted"))
    (tmp_path / "mounted").write_bytes(b"short")
    (tmp_path / "mounted").chmod(0o400)
    with pytest.raises(Exception, match="32 bytes"):
        elsewhere.noise(make=True)


# --- a broken contract ----------------------------------------------------------------------------------


def test_a_participation_too_many_is_charged_upward_and_then_nobody_is_asked(crowd, monkeypatch):
    from lepton_fl.rounds.private import PrivateRounds

    queue(crowd)
    monkeypatch.setattr(PrivateRounds, "may_ask", lambda self, device_id: device_id in crowd.ids[:2])
    run = drive(crowd)
    assert run.state == "exhausted"
    assert "more than was planned" in run.reason
    last = crowd.store.charges("r1", states=["committed"])[-1]
    assert len(last.extra) == 1
    report = proven(crowd)
    assert report.budgets[0].spent > report.budgets[0].policy.epsilon
    assert report.budgets[0].overspent_by


def test_the_guard_opens_a_budget_once(crowd):
    spec = RunSpec(task="a:b", rounds=2, evaluate_every=0, privacy=INDEPENDENT, cohort={"size": 2})
    from lepton_fl.rounds.private import prepared

    queue(crowd)
    ready = prepared(spec, 4)
    for _ in range(2):
        guard_run(crowd.store, keys(crowd), "r1", spec, ready, devices=6, committed=0)
    assert [(b.policy.account, b.policy.version) for b, _ in crowd.store.budgets()] == [("run:r1", 1)]
    assert to_json(Gaussian(4.0))


# --- secure rounds that are left out ----------------------------------------------------------------------


class Ended(BaseException):
    """The coordinator is gone."""


SECRET = {
    "secure_aggregation": "required",
    "secure": {"min_cohort": 4},
    "cohort": {"size": 5, "min_reports": 4},
}
SKELLAM = {
    "trust": "distributed",
    "mechanism": "skellam",
    "epsilon": 20.0,
    "delta": 1e-3,
    "clip_norm": 1.0,
    "min_survivors": 0.8,
}


def drive_secure(works, burnt, ends_at=0):
    """As ``drive``, with the sums of the ideal functionality; in ``burnt`` rounds devices sign and leave."""

    def leaves(plan):
        return dict.fromkeys(plan.cohort, Stage.CONSENTS) if plan.round in burnt else {}

    ideal = IdealRounds(lambda plan, device: None, leaves=leaves)

    def collect(plan, *rest):
        if plan.round == ends_at:
            raise Ended
        return ideal.collect(plan, *rest)

    driver = works.driver()
    driver._signing = object()  # there is an authority
    driver._secure = lambda *_: SimpleNamespace(collect=collect)
    with contextlib.suppress(Ended):
        driver._drive("r1")
    works.fleet.release("r1")
    return works.store.run("r1")


@pytest.fixture
def sworn(works):
    """Devices that can take part in secure rounds."""
    for device in works.register(7):
        report = Report((TaskState(TASK, VERSION, "", True, ""),), "0.1", ())
        works.fleet.check_in(device, report, secrecy=Secrecy(credential_ends=2.0**31))
    return works


@pytest.mark.parametrize(("burnt", "ends_at"), [({1}, 0), ({2}, 3), ({1, 2}, 3)])
@pytest.mark.parametrize(
    "privacy",
    [
        INDEPENDENT,
        {**INDEPENDENT, "max_participations": 3},
        {**BLT, "min_separation": 1, "max_participations": 3},
        {**BANDED, "min_separation": 1, "max_participations": 3},
        SKELLAM,
        {**SKELLAM, "max_participations": 3},
    ],
    ids=lambda p: p["mechanism"] + ("-contract" if "max_participations" in p else ""),
)
def test_a_secure_round_that_is_left_out_stays_charged_also_over_a_restart(sworn, privacy, burnt, ends_at):
    queue(sworn, privacy=privacy, **SECRET)
    run = drive_secure(sworn, burnt, ends_at)
    if ends_at:
        assert run.state == "running"
        run = drive_secure(sworn, burnt)
    assert run.state == "completed", run.reason
    charges = sworn.store.charges("r1")
    assert {c.round for c in charges if c.state == "releasing"} == burnt
    assert {c.round for c in charges if c.state == "committed"} == {1, 2, 3, 4} - burnt
    contract = "max_participations" in privacy
    counted = [c for c in charges if c.state != "voided"]
    assert [len(c.events) for c in counted] == ([1, 0, 0, 0] if contract else [1, 1, 1, 1])
    last = [r for r in sworn.store.rounds("r1") if r.state == "committed"][-1]
    assert last.metrics["epsilon_charged"] == pytest.approx(spent(sworn, "run:r1"), rel=1e-12)
    assert last.metrics["epsilon"] <= last.metrics["epsilon_charged"] * (1 + 1e-12)
    proven(sworn)
    # Nobody knows whose updates were in the sums that may have been learnt: all that were asked count.
    asked = [p for r in sworn.store.rounds("r1") if r.round in burnt for p in r.plan["cohort"]]
    took = sworn.store.participations("r1")
    assert all(took[device][1] >= asked.count(device) for device in asked)
    if contract:
        assert max(times for _, times in took.values()) <= 3
