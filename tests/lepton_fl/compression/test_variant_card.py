"""A card names the files beside it, nothing else is accepted; the gate says who may get a variant and why."""

import json

import numpy as np
import pytest

from lepton_fl.compression.card import (
    Card,
    Lineage,
    Measured,
    Parity,
    TensorSpec,
    Transfer,
    Verdict,
    check_parity,
    read_variant,
)
from lepton_fl.compression.catalogue import pareto
from lepton_fl.compression.profiles import Profile, Reference, judge, score_of
from lepton_fl.errors import ConfigError, NotFound, StateCorrupt, StateTooNew
from lepton_fl.files import canonical_json, sha256_hex

MODEL, PARITY = b"a graph", b"some rows"


def card(**changes) -> Card:
    measured = Measured(
        wire_bytes=5,
        parameters=10,
        nonzero=9,
        macs=100,
        energy_uj=0.5,
        energy_model="a formula",
        rows=360,
        metrics={"accuracy": 0.98, "loss": 0.1},
        recall=(0.97, 0.99),
        agreement=0.99,
        deviation=0.01,
        p50_ms=0.1,
        p95_ms=0.2,
        peak_memory=1_000_000,
        build_seconds=3.0,
        processor="a processor",
    )
    known = {
        "name": "int8",
        "task": "lepton_fl.tasks.images:digits",
        "task_version": "1",
        "opset": 20,
        "model_sha256": sha256_hex(MODEL),
        "model_bytes": len(MODEL),
        "input": TensorSpec(name="input", dtype="float32", shape=(None, 1, 8, 8)),
        "output": TensorSpec(name="output", dtype="float32", shape=(None, 10)),
        "steps": ("quantise static",),
        "predicted_bytes": 2.5,
        "lineage": Lineage(
            run="r-1",
            round=7,
            global_sha256="a" * 64,
            candidate_sha256="b" * 64,
            recipe_sha256="c" * 64,
            privacy="epsilon = 3 at delta = 1e-05, device level",
            transfer=Transfer(
                source="proxy", rows=10, entropy=0.1, reference_entropy=0.1, shift=0.05, seconds=0.1
            ),
        ),
        "measured": measured,
        "parity": Parity(sha256=sha256_hex(PARITY), rows=4, tolerance=0.01, torch_error=1e-6),
        "gate": (
            Verdict(profile="gateway", passed=True),
            Verdict(profile="sensor", passed=False, reasons=("x",)),
        ),
    }
    return Card(**(known | changes))


@pytest.fixture
def folder(tmp_path):
    for name, data in (
        ("model.onnx", MODEL),
        ("parity.safetensors", PARITY),
        ("card.json", card().to_bytes()),
    ):
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_card_is_read_back_as_it_was_written(folder):
    assert read_variant(folder) == card()
    assert Card.from_bytes(card().to_bytes()).to_bytes() == card().to_bytes()


def test_only_those_who_passed_are_offered_a_variant():
    assert card().offered
    assert card().offered_to("gateway")
    assert not card().offered_to("sensor")
    assert not card().offered_to("unknown")
    assert not card(gate=()).offered


@pytest.mark.parametrize("name", ["model.onnx", "parity.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"?" + data[1:]]
)
def test_a_damaged_file_is_refused_and_left_alone(folder, name, damage):
    bad = damage((folder / name).read_bytes())
    (folder / name).write_bytes(bad)
    with pytest.raises(StateCorrupt, match=name):
        read_variant(folder)
    assert (folder / name).read_bytes() == bad


@pytest.mark.parametrize("name", ["model.onnx", "parity.safetensors", "card.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        read_variant(folder)


def altered(**changes) -> bytes:
    return canonical_json(card().to_json() | changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "name"),
        (b"[]", "wrong"),
        (card().to_bytes()[:-1], "not JSON"),
        (b" " + card().to_bytes(), "canonical"),
        (json.dumps(card().to_json()).encode(), "canonical"),
        (altered(unknown=1), "unknown"),
        (altered(model_bytes="7"), "model_bytes"),
        (altered(model_sha256="A" * 64), "model_sha256"),
        (altered(name="../up"), "name"),
        (altered(runtime="python"), "runtime"),
        (card().to_bytes().replace(b'"p50_ms":0.1', b'"p50_ms":NaN'), "p50_ms"),
        (b"x" * 2_000_000, "at most"),
    ],
)
def test_what_is_no_card_is_refused(data, message):
    with pytest.raises(StateCorrupt, match=message):
        Card.from_bytes(data)


def test_a_card_of_newer_code_is_told_apart():
    with pytest.raises(StateTooNew, match="lepton-variant/2"):
        Card.from_bytes(altered(format="lepton-variant/2"))


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (np.zeros((4, 10), np.float32) + 0.02, "differs"),
        (np.full((4, 10), np.nan, np.float32), "not finite"),
        (np.zeros((4, 9), np.float32), "gave"),
    ],
)
def test_a_runtime_that_computes_something_else_is_refused(got, message):
    expected = np.zeros((4, 10), np.float32)
    check_parity(card(), expected, expected + 0.009)
    with pytest.raises(StateCorrupt, match=message):
        check_parity(card(), expected, got)


def test_an_input_must_have_the_type_and_shape_of_the_graph():
    spec = card().input
    assert spec.fits(np.zeros((3, 1, 8, 8), np.float32))
    assert not spec.fits(np.zeros((3, 1, 8, 8), np.float64))
    assert not spec.fits(np.zeros((3, 1, 8, 9), np.float32))
    assert not spec.fits(np.zeros((8, 8), np.float32))


# --- the gate ------------------------------------------------------------------------------------------

REFERENCE = Reference({"accuracy": 0.985, "loss": 0.09}, (0.98, 0.99), None, "x86_64")
WIDE = Profile(name="wide")


def measured(**changes):
    return card().measured.model_copy(update=changes)


def test_a_good_variant_passes():
    verdict = judge(WIDE, card(), REFERENCE)
    assert verdict.passed
    assert verdict.reasons == ()


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"flash": 6}, "7 bytes, flash allows 6"),
        ({"ram": 999_999}, "1000000 bytes of memory"),
        ({"latency_ms": 0.19}, "p95 latency 0.2 ms"),
        ({"slowdown": 10.0, "latency_ms": 1.9}, "p95 latency 2 ms"),
        ({"isa": ("aarch64",)}, "not known"),
        ({"max_drop": 0.004}, "0.0050 below the global model"),
        ({"min_score": 0.981}, "min_score"),
        ({"min_recall": 0.98}, "class 0"),
        ({"max_recall_drop": 0.005}, "fell from 0.9800 to 0.9700"),
        ({"min_agreement": 0.995}, "agrees with the global model"),
        ({"max_shift": 0.04}, "out of the domain"),
        ({"metric": "loss", "max_drop": 0.005}, "loss"),
    ],
)
def test_every_bound_refuses_with_value_and_bound(bounds, reason):
    verdict = judge(Profile(name="tight", **bounds), card(), REFERENCE)
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert reason in verdict.reasons[0]
    assert not card(gate=(verdict,)).offered_to("tight")


def test_a_bound_is_met_exactly_at_its_value():
    tight = Profile(name="exact", flash=7, ram=1_000_000, latency_ms=0.2, min_score=0.98, min_agreement=0.99)
    assert judge(tight, card(), REFERENCE).passed


def test_all_reasons_are_told_at_once():
    assert len(judge(Profile(name="tight", flash=1, ram=1, latency_ms=0.1), card(), REFERENCE).reasons) == 3


def test_a_variant_worse_than_the_one_in_service_is_refused():
    served = Reference(REFERENCE.metrics, REFERENCE.recall, {"accuracy": 0.995}, "x86_64")
    assert "in service" in judge(WIDE, card(), served).reasons[0]
    worse = Reference(REFERENCE.metrics, REFERENCE.recall, {"accuracy": 0.5}, "x86_64")
    assert judge(WIDE, card(), worse).passed


def test_generated_rows_are_not_refused_for_their_shift():
    drawn = Transfer(source="generator", rows=9, entropy=0.1, reference_entropy=0.1, shift=0.99, seconds=1)
    lineage = card().lineage.model_copy(update={"transfer": drawn})
    assert judge(WIDE, card(lineage=lineage), REFERENCE).passed


def test_a_regression_is_judged_by_its_own_figures():
    number = card(measured=measured(metrics={"rmse": 21.0, "r2": 0.6}, recall=(), agreement=None))
    before = Reference({"rmse": 20.0, "r2": 0.65}, (), None, "x86_64")
    assert "r2" in judge(WIDE, number, before).reasons[0]
    assert judge(Profile(name="p", metric="rmse", max_drop=1.0), number, before).passed
    assert not judge(Profile(name="p", metric="rmse", max_drop=0.9), number, before).passed


def test_a_metric_the_task_does_not_report_is_named():
    with pytest.raises(ConfigError, match=r"accuracy.*not f1"):
        score_of({"accuracy": 1.0}, "f1")


def test_the_front_holds_those_that_nobody_beats():
    whole = card(name="whole")
    small = card(name="small", model_bytes=5, measured=measured(metrics={"accuracy": 0.97}, p50_ms=0.1))
    worse = card(name="worse", model_bytes=6, measured=measured(metrics={"accuracy": 0.96}, p50_ms=0.2))
    quick = card(name="quick", model_bytes=8, measured=measured(p50_ms=0.05))
    assert pareto([whole, small, worse, quick]) == ("whole", "small", "quick")
    assert pareto([whole, card(name="twin")]) == ("whole", "twin")
    assert pareto([]) == ()
