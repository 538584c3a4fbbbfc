"""A whole build on the bundled digits: made, measured, gated, killed, continued, attacked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from lepton_fl.compression import measure
from lepton_fl.compression.build import BASELINE, Build, best
from lepton_fl.compression.card import check_parity, read_variant
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.profiles import Profile
from lepton_fl.compression.recipe import (
    Candidate,
    DistilSpec,
    QuantiseSpec,
    Recipe,
    StudentSpec,
    TransferSpec,
)
from lepton_fl.compression.source import read_source
from lepton_fl.errors import ConfigError, DiskFull, NotFound, StateCorrupt, StateLocked, TaskError
from lepton_fl.files import lock_folder
from lepton_fl.tasks import load_task
from lepton_fl.tasks.federated import read
from lepton_fl.training.trainer import Trainer

DIGITS = load_task("digits")
FILES = {"card.json", "model.onnx", "parity.safetensors"}
STUDENT = DistilSpec(student=StudentSpec(kind="mlp", hidden=8), epochs=3)
CANDIDATES = (
    Candidate(name="int8", quantise=QuantiseSpec(kind="static")),
    Candidate(name="student", distil=STUDENT),
    Candidate(name="impossible", distil=DistilSpec(student=StudentSpec(name="nobody"), epochs=1)),
)
PROFILES = (Profile(name="wide", max_drop=0.02, max_recall_drop=1.0), Profile(name="tiny", flash=100))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained model, and proxy rows: half of the training rows, in the domain, and noise."""
    folder = tmp_path_factory.mktemp("home")
    raw = read(DIGITS, None).train
    trainer = Trainer(DIGITS)
    start = trainer.initial(0)
    rows = DIGITS.transform(raw.take(np.arange(1000)))
    weights = start + trainer.train(start, rows, DIGITS.local, seed=0).delta
    said = {"task": "digits", "run": "r-7", "round": "3", "task_version": "1", "journal_sha256": "ab"}
    save_file(trainer.layout.unflatten(weights), folder / "model.safetensors", said)
    np.savez(folder / "proxy.npz", x=raw.x[1000:1400])
    np.savez(folder / "noise.npz", x=np.random.default_rng(0).uniform(0, 16, (400, 8, 8)))
    return folder


def recipe(home, rows="proxy.npz", candidates=CANDIDATES):
    transfer = TransferSpec.model_validate({"source": "proxy", "data": {"kind": "npz", "path": home / rows}})
    return Recipe(transfer=transfer, candidates=candidates)


def building(home, folder, *, rows="proxy.npz", candidates=CANDIDATES, profiles=PROFILES, **more):
    return Build(
        read_source(home / "model.safetensors"), recipe(home, rows, candidates), profiles, folder, **more
    )


@pytest.fixture(scope="module")
def built(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    building(home, folder).run()
    return folder


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "built"))


def contents(folder, name="model.onnx"):
    return {path.parent.name: path.read_bytes() for path in folder.glob(f"*/{name}")}


# --- what a build leaves ----------------------------------------------------------------------------


def test_every_variant_is_three_files_that_fit_each_other(built):
    report, cards = read_report(built)
    assert report.names == (BASELINE, "int8", "student")
    for card in cards:
        folder = built / card.name
        assert {path.name for path in folder.iterdir()} == FILES
        assert read_variant(folder) == card
        assert (card.lineage.run, card.lineage.round, card.lineage.journal_sha256) == ("r-7", 3, "ab")
        assert b"/" + os.fsencode(built.name) not in (folder / "model.onnx").read_bytes()


def test_the_self_test_is_made_of_real_rows_and_passes_in_the_runtime(built):
    import onnxruntime

    test_rows = DIGITS.transform(read(DIGITS, None).test).x
    for card in read_report(built)[1]:
        parity = load_file(built / card.name / "parity.safetensors")
        assert (parity["input"] == test_rows[: card.parity.rows]).all()
        session = onnxruntime.InferenceSession(built / card.name / "model.onnx")
        check_parity(card, parity["output"], session.run(None, {"input": parity["input"]})[0])


def test_figures_are_those_of_the_runtime(built):
    import onnxruntime

    test = DIGITS.transform(read(DIGITS, None).test)
    for card in read_report(built)[1]:
        session = onnxruntime.InferenceSession(built / card.name / "model.onnx")
        right = (session.run(None, {"input": test.x})[0].argmax(1) == test.y).mean()
        assert card.measured.metrics["accuracy"] == pytest.approx(right)
        assert card.measured.rows == len(test)
        assert 0 < card.measured.p50_ms <= card.measured.p95_ms
        assert card.measured.peak_memory > 0


def test_a_candidate_that_cannot_be_made_is_marked_and_the_others_go_on(built):
    (failure,) = read_report(built)[0].failures
    assert failure.name == "impossible"
    assert "nobody" in failure.reason
    assert not (built / "impossible" / "card.json").exists()


def test_a_variant_below_the_floor_is_kept_and_never_offered(built):
    cards = {card.name: card for card in read_report(built)[1]}
    assert cards[BASELINE].offered_to("wide")
    assert not cards["student"].offered_to("wide")  # three epochs are not enough
    assert "max_drop" in " ".join(r for v in cards["student"].gate for r in v.reasons)
    assert not any(card.offered_to("tiny") for card in cards.values())
    assert best(list(cards.values()), "tiny") is None
    assert best(list(cards.values()), "wide").name == "int8"


def test_the_source_of_what_was_learnt_is_in_the_card(built):
    report, cards = read_report(built)
    learnt = cards[-1].lineage.transfer
    assert (learnt.source, learnt.rows, learnt.labelled) == ("proxy", 400, False)
    assert report.transfer == learnt
    assert cards[0].lineage.transfer is None


# --- again ----------------------------------------------------------------------------------------------


def test_a_second_build_makes_nothing_anew(home, copied):
    before, cards = contents(copied), contents(copied, "card.json")
    building(home, copied).run()
    assert contents(copied) == before
    assert contents(copied, "card.json") == cards


def test_other_profiles_only_judge_again(home, copied):
    before = read_report(copied)[1]
    building(
        home, copied, profiles=(Profile(name="new", max_drop=1.0, min_agreement=0, max_recall_drop=1),)
    ).run()
    after = read_report(copied)[1]
    assert [card.measured for card in after] == [card.measured for card in before]
    assert all(card.offered_to("new") and not card.offered_to("wide") for card in after)


def test_a_damaged_variant_is_refused_and_made_again(home, copied):
    path = copied / "int8" / "model.onnx"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(StateCorrupt, match=r"model\.onnx"):
        read_report(copied)
    building(home, copied).run()
    assert path.read_bytes() == good


def test_the_variant_in_service_is_a_floor_of_its_own(home, copied):
    strict = Profile(name="wide", max_drop=1.0, min_agreement=0, max_recall_drop=1.0, max_drop_in_service=0.0)
    building(home, copied, profiles=(strict,), in_service=copied / "fp32").run()
    cards = {card.name: card for card in read_report(copied)[1]}
    assert "in service" in cards["student"].gate[0].reasons[0]
    assert cards["fp32"].offered


class Stopped(Exception):
    pass


_SLOW = pytest.mark.slow


@pytest.mark.parametrize("after", [pytest.param(2, marks=_SLOW), 4, pytest.param(7, marks=_SLOW)])
def test_a_build_that_was_stopped_anywhere_ends_with_the_same_files(home, built, tmp_path, after):
    steps = []

    def on_step(what):
        steps.append(what)
        if len(steps) == after:
            raise Stopped

    with pytest.raises(Stopped):
        building(home, tmp_path, on_step=on_step).run()
    whole = {path.parent.name for path in tmp_path.glob("*/card.json")}
    assert all(read_variant(tmp_path / name) for name in whole)
    building(home, tmp_path).run()
    assert contents(tmp_path) == contents(built)


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["work/epoch-*", "int8/model.onnx", "student/parity.safetensors"])
def test_a_build_that_was_killed_goes_on(home, built, tmp_path, mark):
    text = f"""
        [transfer]
        source = "proxy"
        data = {{ kind = "npz", path = "{home / "proxy.npz"}" }}
        [[candidates]]
        name = "int8"
        quantise = {{ kind = "static" }}
        [[candidates]]
        name = "student"
        distil = {{ student = {{ kind = "mlp", hidden = 8 }}, epochs = 3 }}
    """
    (tmp_path / "recipe.toml").write_text(text)
    folder = tmp_path / "variants"
    command = [sys.executable, "-c", "from lepton_fl.cli import main; main()", "variants", "build"]
    command += [str(home / "model.safetensors"), "-o", str(folder), "--recipe", str(tmp_path / "recipe.toml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob(mark)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [*command, "--format", "json"], capture_output=True, text=True, check=True, timeout=200
    )
    assert [row["name"] for row in json.loads(done.stdout)["variants"]] == ["fp32", "int8", "student"]
    assert contents(folder) == contents(built)


# --- attacks and accidents -------------------------------------------------------------------------------


def test_proxy_rows_of_another_domain_are_refused_by_the_gate(home, tmp_path):
    lenient = Profile(name="lenient", max_drop=1.0, min_agreement=0, max_recall_drop=1.0)
    building(home, tmp_path, rows="noise.npz", candidates=CANDIDATES[1:2], profiles=(lenient,)).run()
    cards = {card.name: card for card in read_report(tmp_path)[1]}
    assert cards["student"].lineage.transfer.shift > lenient.max_shift
    assert "out of the domain" in cards["student"].gate[0].reasons[0]
    assert not cards["student"].offered
    assert cards["fp32"].offered


def test_a_full_disk_stops_the_build_and_it_goes_on_later(home, built, tmp_path, small_files):
    with small_files(20_000), pytest.raises(DiskFull):
        building(home, tmp_path).run()
    assert not list(tmp_path.glob("*/card.json"))
    assert not list(tmp_path.glob("**/*.tmp"))
    building(home, tmp_path).run()
    assert contents(tmp_path) == contents(built)


def test_two_builds_do_not_work_in_one_folder(home, copied):
    with lock_folder(copied), pytest.raises(StateLocked):
        building(home, copied).run()


def altered(home, path, change, said=None):
    tensors = load_file(home / "model.safetensors")
    change(tensors)
    save_file(tensors, path, said or {"task": "digits"})
    return path


def spoil(tensors):
    tensors["features.0.bias"] = tensors["features.0.bias"] * np.float32("nan")


def widen(tensors):
    tensors["features.0.bias"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (spoil, StateCorrupt, "not finite"),
        (widen, TaskError, r"features\.0\.bias"),
        (lambda tensors: tensors.pop("features.0.bias"), TaskError, "None"),
        (lambda tensors: tensors.update(extra=np.zeros(2, np.float32)), TaskError, "extra"),
    ],
)
def test_a_model_that_is_not_the_tasks_is_refused(home, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        read_source(altered(home, tmp_path / "m.safetensors", change))


def test_a_model_must_say_what_it_is_of(home, tmp_path):
    path = altered(home, tmp_path / "m.safetensors", dict, {"run": "r"})
    with pytest.raises(ConfigError, match="which task"):
        read_source(path)
    assert read_source(path, "digits").run == "r"
    other = altered(home, tmp_path / "n.safetensors", dict, {"task": "digits", "task_version": "0"})
    with pytest.raises(TaskError, match="version 0"):
        read_source(other)


def test_a_damaged_or_missing_source_is_refused(home, tmp_path):
    (tmp_path / "m.safetensors").write_bytes((home / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(StateCorrupt, match="safetensors"):
        read_source(tmp_path / "m.safetensors")
    with pytest.raises(NotFound):
        read_source(tmp_path / "none.safetensors")
    with pytest.raises(NotFound):
        read_source(tmp_path)


def graph_of(*nodes):
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, 4])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, [None, 4])
    made = helper.make_graph(list(nodes), "g", [x], [y])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a graph", "does not run"),
        (graph_of(helper.make_node("Log", ["input"], ["output"])).SerializeToString(), "not finite"),
        (graph_of(helper.make_node("Unheard", ["input"], ["output"])).SerializeToString(), "does not run"),
    ],
)
def test_what_the_runtime_cannot_serve_is_refused(tmp_path, data, message):
    (tmp_path / "model.onnx").write_bytes(data)
    np.save(tmp_path / "rows.npy", -np.ones((3, 4), np.float32))
    with pytest.raises(TaskError, match=message):
        measure.run(tmp_path / "model.onnx", tmp_path / "rows.npy", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "rows.npy"}


def test_a_truncated_graph_is_refused(built, tmp_path):
    data = (built / "int8" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[:-40])
    np.save(tmp_path / "rows.npy", np.zeros((3, 1, 8, 8), np.float32))
    with pytest.raises(TaskError, match="does not run"):
        measure.run(tmp_path / "model.onnx", tmp_path / "rows.npy", tmp_path)


# --- the command ------------------------------------------------------------------------------------------


def lepton(capsys, *arguments):
    from lepton_fl.cli.app import run

    code = run([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_lists_shows_and_draws(built, tmp_path, capsys):
    code, out, _ = lepton(capsys, "variants", "list", built, "--format", "json")
    body = json.loads(out)
    assert code == 0
    assert [row["name"] for row in body["variants"]] == ["fp32", "int8", "student"]
    assert body["failures"][0]["name"] == "impossible"
    code, out, _ = lepton(capsys, "variants", "list", built)
    assert "max_drop" in out
    code, out, _ = lepton(capsys, "variants", "show", "student", built)
    assert code == 0
    assert "distil into mlp" in out
    code, out, _ = lepton(capsys, "variants", "show", "impossible", built)
    assert "nobody" in out
    assert lepton(capsys, "variants", "compare", built, "-o", tmp_path / "plot.svg")[0] == 0
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "none"], 9, "no variant"),
        (["compare", "-o", "plot.gif"], 3, "plot.gif"),
    ],
)
def test_the_command_says_what_is_wrong(built, capsys, arguments, code, message):
    first, *rest = arguments
    words = [first, *rest[:1], built, *rest[1:]] if first == "show" else [first, built, *rest]
    got, _, err = lepton(capsys, "variants", *words)
    assert got == code
    assert message in err


def test_rows_have_one_source(home, tmp_path, capsys):
    options = ["--proxy", home / "proxy.npz", "--generator", "-o", tmp_path / "v"]
    code, _, err = lepton(capsys, "variants", "build", home / "model.safetensors", *options)
    assert code == 3
    assert "contradict" in err
    code, _, err = lepton(capsys, "variants", "build", home / "model.safetensors", "--device", "tpu")
    assert code == 3
