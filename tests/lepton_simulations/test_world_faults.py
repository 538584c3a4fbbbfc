"""What goes wrong in a virtual world, by declaration: drop-outs, corrupt and malicious devices, crashes."""

import json
from math import inf

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, DataContractError, UpdateRejected
from lepton_fl.plan import LocalPlan, RoundPlan
from lepton_fl.tasks import load_task
from lepton_fl.tasks.data import Dataset
from lepton_fl.wire.messages import EvaluateReply, Ticket, TrainReply
from lepton_simulations.world import World, WorldConfig
from lepton_simulations.world.harm import DAMAGES, broken, flipped

IDS = tuple(f"device-{i}" for i in range(400))


def plan(round_=1, attempt=1, kind="train", cohort=IDS):
    return RoundPlan(
        run_id="r",
        round=round_,
        attempt=attempt,
        kind=kind,
        task="t:t",
        task_version="1",
        layout_digest="0" * 64,
        num_coordinates=4,
        model_sha256="0" * 64,
        cohort=cohort,
        wanted_reports=len(cohort),
        min_reports=1,
        deadline_s=600.0,
        local=LocalPlan(),
        weighting="examples",
        max_weight=10,
        grid_step=2.0**-24,
        nonce="0",
    )


def world(seed=0, devices=None, **faults):
    return World.build(WorldConfig.of(devices=devices or {}, faults=faults), IDS, seed)


def fates(of, **about):
    return of.fates(plan(**about), lambda device_id: 100, 1000, 1000)


def reply(of, values=(1, -2, 3, 4)):
    sums = {"loss_sum": np.array([2.0]), "examples": np.array([3])}
    if of.kind == "evaluate":
        return EvaluateReply(Ticket.of(of), "1", 3, {"hits": np.array([1])}, 0.5).to_records()
    return TrainReply(Ticket.of(of), "1", 3, np.array(values, np.int32), sums, 0.5).to_records()


# --- drop-outs --------------------------------------------------------------------------------------

STAGES = ["offline", "download", "training", "upload"]
SLOW = {"classes": [{"speed": 100, "down": 1000, "up": 1000}]}  # one second for each of the three stages


@pytest.mark.parametrize("stage", STAGES)
def test_devices_drop_out_in_a_stage(stage):
    name = "drop_out" if stage == "offline" else f"drop_{stage}"
    of = world(devices=SLOW, **{name: 0.1})
    found = [f for r in range(1, 26) for f in fates(of, round_=r)]
    gone = [f for f in found if not f.answers]
    assert {f.stage for f in gone} == {stage}
    assert len(gone) / len(found) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / len(found)))
    assert len({f.device_id for f in gone}) > 300  # not always the same
    begin = max(0, STAGES.index(stage) - 1)
    moments = np.array([f.arrives_s for f in gone]) - 20.0  # of silence
    if stage == "offline":
        assert set(moments) == {0.0}
    else:
        assert begin <= moments.min() < begin + 0.05
        assert begin + 0.95 < moments.max() <= begin + 1
    assert {f.refusal for f in gone} == {"offline"}


def test_each_stage_has_its_own_chance():
    of = world(devices=SLOW, drop_out=0.2, drop_download=0.2, drop_training=0.2, drop_upload=0.2)
    found = [f for r in range(1, 26) for f in fates(of, round_=r)]
    for place, stage in enumerate(STAGES):
        share = np.mean([f.stage == stage for f in found])
        assert share == pytest.approx(0.2 * 0.8**place, abs=0.02)
    order = [f.arrives_s for f in found[:400]]
    assert order == sorted(order)


def test_silence_until_the_deadline():
    found = fates(world(devices=SLOW, drop_training=0.5, silence_s=0))
    assert {f.arrives_s for f in found if not f.answers} == {inf}
    assert {f.refusal for f in found if not f.answers} == {""}
    assert [f.answers for f in found] == sorted((f.answers for f in found), reverse=True)


def test_everybody_and_nobody():
    assert not any(f.answers for f in fates(world(drop_out=1.0)))
    assert all(f.answers for f in fates(world(drop_out=0.0)))


# --- corrupt replies --------------------------------------------------------------------------------


def test_every_reply_of_a_corrupt_device_is_refused():
    of = world(corrupt=0.25)
    for kind in ("train", "evaluate"):
        about = plan(kind=kind)
        read = (TrainReply if kind == "train" else EvaluateReply).read
        found = of.fates(about, lambda device_id: 1, 0, 0)
        assert sum(bool(f.damage) for f in found) == 100
        assert {f.damage for f in found} == {"", *DAMAGES}
        reasons = set()
        for fate in found:
            spoilt = of.spoil(fate, reply(about))
            if fate.ordinary:
                read(spoilt, about)
                continue
            with pytest.raises(UpdateRejected) as refused:
                read(spoilt, about)
            reasons.add(refused.value.reason)
        assert len(reasons) >= 4
    assert {f.device_id: f.damage for f in fates(of)} == {f.device_id: f.damage for f in fates(of, round_=2)}


@pytest.mark.parametrize("how", [0.1, 0.9])
@pytest.mark.parametrize("name", ["digits", "shakespeare", "beijing_air", "heart_disease", "turbofan"])
def test_broken_rows_break_every_contract(name, how):
    task = load_task(name)
    contract = task.contract
    rows = max(contract.min_rows, 4)
    low = np.broadcast_to(np.asarray(contract.low, float), contract.shape)
    kind = np.uint8 if contract.dtype == "uint8" else np.int64 if contract.dtype == "int" else np.float32
    x = np.broadcast_to(low, (rows, *contract.shape)).astype(kind)
    shape = (rows, *contract.target_shape)
    y = np.zeros(shape, np.int64) if contract.num_classes else np.full(shape, contract.target_low, np.float32)
    task.check(Dataset(x, y))
    with pytest.raises(DataContractError):
        task.check(broken(Dataset(x, y), how))


def test_devices_with_corrupt_data():
    of = world(corrupt_data=0.1)
    raw = Dataset(np.ones((3, 2)), np.array([0, 1, 2]))
    bad = [d for d in IDS if of.corrupted(d, raw) is not raw]
    assert len(bad) == 40
    assert [d for d in IDS if world(corrupt_data=0.1).corrupted(d, raw) is not raw] == bad
    assert np.isfinite(raw.x).all()  # the owner's rows are not touched


# --- attacks ----------------------------------------------------------------------------------------


def attack(kind, factor=None, values=(1, -2, 3, 4), share=0.2):
    given = {} if factor is None else {"attack_factor": factor}
    of, about = world(malicious=share, attack=kind, **given), plan()
    bad = [f for f in fates(of) if f.attack]
    return of, bad, [of.spoil(f, reply(about, values)) for f in bad]


def test_malicious_devices_are_always_the_same():
    of, bad, _ = attack("sign_flip")
    assert len(bad) == 80
    assert {f.device_id for f in bad} == {f.device_id for f in fates(of, round_=7) if f.attack}
    assert not any(f.ordinary for f in bad)


def test_sign_flip_and_scaling():
    assert attack("sign_flip")[2][0].arrays["update"].tolist() == [-1, 2, -3, -4]
    assert attack("sign_flip", 2.5)[2][0].arrays["update"].tolist() == [-2, 5, -8, -10]
    assert attack("scaled_update", 100)[2][0].arrays["update"].tolist() == [100, -200, 300, 400]
    limits = attack("scaled_update", 100, (2**30, -(2**30), 0, 1))[2][0].arrays["update"]
    assert limits.tolist() == [2**31 - 1, -(2**31 - 1), 0, 100]
    assert limits.dtype == np.int32


def test_a_nan_update_is_refused_and_a_random_one_is_not():
    with pytest.raises(UpdateRejected) as refused:
        TrainReply.read(attack("nan_update")[2][0], plan())
    assert refused.value.reason == "non-finite"
    of, bad, sent = attack("random_update", 3.0, (10_000, 0, 0, 0))
    updates = [TrainReply.read(r, plan()).update for r in sent]
    assert np.linalg.norm(updates[0]) == pytest.approx(30_000, rel=1e-3)
    assert len({tuple(u) for u in updates}) == 80
    assert np.array_equal(of.spoil(bad[0], sent[0]).arrays["update"] != 0, np.ones(4, bool))
    again = of.spoil(bad[0], reply(plan(), (10_000, 0, 0, 0)))
    assert np.array_equal(again.arrays["update"], sent[0].arrays["update"])
    later = of.spoil(bad[0], reply(plan(round_=2), (10_000, 0, 0, 0)))
    assert not np.array_equal(later.arrays["update"], updates[0])


def test_a_label_flipper_is_ordinary_but_for_its_rows():
    of, bad, sent = attack("label_flip")
    assert all(f.ordinary for f in bad)
    assert sent[0].arrays["update"].tolist() == [1, -2, 3, 4]
    data = Dataset(np.ones((3, 1), np.float32), np.array([0, 1, 9]))
    assert of.poisoned(bad[0].device_id, data, 10).y.tolist() == [9, 8, 0]
    honest = next(f for f in fates(of) if not f.attack)
    assert of.poisoned(honest.device_id, data, 10) is data
    numbers = Dataset(data.x, np.array([1.0, -2.0, 0.0], np.float32))
    assert flipped(numbers, 0).y.tolist() == [-1.0, 2.0, 0.0]


def test_an_evaluation_is_not_attacked():
    of = world(malicious=1.0, attack="sign_flip")
    about = plan(kind="evaluate")
    honest = reply(about)
    assert of.spoil(fates(of, kind="evaluate")[0], honest) is honest


# --- the coordinator --------------------------------------------------------------------------------


def test_the_coordinator_crashes_in_the_first_attempt_of_a_round():
    of = world(crash_rounds=[2, 5], restart_s=30)
    crashed = [(r, a) for r in range(1, 7) for a in (1, 2) if of.crashes(plan(r, a))]
    assert crashed == [(2, 1), (5, 1)]
    assert not of.crashes(plan(2, 1, "evaluate"))
    assert of.downtime_s(plan(2)) == 30.0


# --- bad settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"faults": {"drop_out": 1.5}}, "faults.drop_out = 1.5: Input should be less than or equal to 1"),
        ({"faults": {"drop_out": float("nan")}}, "faults.drop_out"),
        ({"faults": {"dropout": 0.5}}, "faults.dropout = 0.5: Extra inputs are not permitted"),
        ({"faults": {"malicious": 0.2}}, "malicious = 0.2 needs attack"),
        ({"faults": {"malicious": 0.2, "attack": "bribe"}}, "faults.attack = 'bribe'"),
        ({"faults": {"malicious": 0.2, "attack": "scaled_update"}}, "changes nothing"),
        ({"faults": {"attack": "label_flip", "attack_factor": 2}}, "has no meaning with 'label_flip'"),
        ({"faults": {"slowdown": 0.5}}, "faults.slowdown = 0.5"),
        ({"faults": {"crash_rounds": [3, 3]}}, "names a round twice"),
        ({"faults": {"crash_rounds": [0]}}, "faults.crash_rounds.0 = 0"),
        ({"devices": {"shared_cores": -1}}, "devices.shared_cores = -1"),
        ({"devices": {"classes": [{"share": 0}]}}, "devices.classes.0.share = 0"),
        ({"devices": {"classes": [{"name": "a"}, {"name": "a"}]}}, "two classes are named 'a'"),
        ({"devices": {"classes": [{"speed": -5}]}}, "devices.classes.0.speed.value = -5"),
        ({"devices": {"classes": [{"speed": True}]}}, "devices.classes.0.speed = True"),
        ({"devices": {"classes": [{"speed": {"low": 1}}]}}, "kind = 'fixed' takes value, not low"),
        (
            {"devices": {"classes": [{"speed": {"kind": "uniform", "low": 3, "high": 1}}]}},
            "low = 3 exceeds high = 1",
        ),
        (
            {"devices": {"classes": [{"availability": {"kind": "daily", "longest_s": 5}}]}},
            "belong to kind = 'charging', not 'daily'",
        ),
        ({"devices": {"classes": [{"availability": {"kind": "trace"}}]}}, "needs trace"),
        ({"devices": {"classes": [{"availability": {"repeat_s": 5}}]}}, "belong to kind = 'trace'"),
        (
            {"devices": {"classes": [{"availability": {"kind": "charging"}}]}},
            "expected 0 < shortest_s <= longest_s",
        ),
        (
            {
                "devices": {
                    "classes": [{"availability": {"kind": "charging", "shortest_s": 1, "longest_s": 90_000}}]
                }
            },
            "windows would overlap",
        ),
    ],
)
def test_wrong_settings_are_named(sections, message):
    with pytest.raises(ConfigError) as error:
        WorldConfig.of(**sections)
    assert message in str(error.value)


def test_settings_from_a_file_and_back(tmp_path):
    path = tmp_path / "world.toml"
    path.write_text(
        "[devices]\nshared_cores = 2\n[[devices.classes]]\nspeed = 400\nup = { kind = 'uniform', low = 1, "
        "high = 2 }\n[devices.classes.availability]\nkind = 'charging'\nshortest_s = 3600\nlongest_s = 7200\n"
        "[faults]\ndrop_training = 0.1\ncrash_rounds = [3]\n"
    )
    config = WorldConfig.load(path)
    assert config.devices.classes[0].speed.value == 400.0
    assert config.devices.classes[0].up.high == 2.0
    assert config.faults.crash_rounds == (3,)
    assert WorldConfig.model_validate_json(json.dumps(config.to_json())) == config
    path.write_text("[faults]\ndrop_trainin = 0.1\n")
    with pytest.raises(ConfigError, match=r"did you mean 'faults\.drop_training'"):
        WorldConfig.load(path)
    path.write_text("[[devices.classes]]\nspeed = { kind = 'lognormal', median = 5.0, value = 4.0 }\n")
    with pytest.raises(ConfigError, match=r"world\.toml:2.*takes median and sigma, not value"):
        WorldConfig.load(path)
