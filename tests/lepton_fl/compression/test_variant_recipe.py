"""Recipes and profiles: what an operator writes is checked as a whole before anything starts."""

from pathlib import Path

import pytest

from lepton_fl.compression.profiles import load_profiles
from lepton_fl.compression.recipe import Candidate, PruneSpec, QuantiseSpec, Recipe, load_recipe, suggested
from lepton_fl.errors import ConfigError


def written(folder, text):
    path = folder / "file.toml"
    path.write_text(text)
    return path


def test_profiles_are_read_from_a_file(tmp_path):
    text = '[[profiles]]\nname = "gateway"\nram = 64_000_000\n[[profiles]]\nname = "sensor"\nflash = 20_000\n'
    assert [p.name for p in load_profiles(written(tmp_path, text))] == ["gateway", "sensor"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[profiles]]\nname = "a"\n[[profiles]]\nname = "a"\n', "called a"),
        ('[[profiles]]\nname = "a"\nrom = 3\n', "unknown key"),
        ('[[profiles]]\nname = "a"\nram = 0\n', "ram"),
        ("profiles = []\n", "profiles"),
        ('[[profiles]]\nname = "../a"\n', "name"),
    ],
)
def test_wrong_profiles_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_profiles(written(tmp_path, text))


def test_a_recipe_is_read_from_a_file(tmp_path):
    text = """
        [transfer]
        source = "proxy"
        data = { kind = "npz", path = "rows.npz" }
        [[candidates]]
        name = "student"
        distil = { student = { kind = "cnn", width = 4 }, epochs = 3 }
        prune = { kind = "2:4", epochs = 1 }
        quantise = { kind = "static", aware = { epochs = 1 } }
    """
    (found,) = load_recipe(written(tmp_path, text)).candidates
    assert len(found.trainings) == 3
    assert found.words() == (
        "distil into cnn (width 4, hidden 32), 3 epochs",
        "prune 2:4, 1 epochs",
        "quantise static after aware training",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[candidates]]\nname = "a"\nprune = { amount = 0.5 }\n', "must be trained"),
        ('[[candidates]]\nname = "a"\ndistil = { student = {} }\n', "exactly one"),
        ('[[candidates]]\nname = "a"\ndistil = { student = { kind = "cnn", scale = 0.5 } }\n', "exactly one"),
        ('[[candidates]]\nname = "a"\nquantise = { kind = "static", bits = 4 }\n', "bits = 4"),
        ('[[candidates]]\nname = "a"\nquantise = { kind = "int2" }\n', "kind"),
        ('[[candidates]]\nname = "a"\n[[candidates]]\nname = "a"\n', "called a"),
        ('[[candidates]]\nname = "a"\nprune = { amount = 1.0, epochs = 0 }\n', "amount"),
        ('[transfer]\nsource = "proxy"\n', "needs data"),
        ('[transfer]\nsource = "generator"\nlabelled = true\n', "labelled"),
        (
            '[transfer]\nsource = "generator"\n[[candidates]]\nname = "a"\nprune = { labels = 0.5 }\n',
            "transfer.labelled",
        ),
    ],
)
def test_an_impossible_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path, text))


def test_the_predicted_factor_is_that_of_bits_and_weights():
    assert Candidate(name="a").factor == 1
    assert Candidate(name="a", quantise=QuantiseSpec(kind="static")).factor == 4
    assert Candidate(name="a", quantise=QuantiseSpec(kind="fp16")).factor == 2
    assert Candidate(name="a", quantise=QuantiseSpec(kind="weights", bits=4)).factor == 8
    both = Candidate(name="a", prune=PruneSpec(amount=0.75), quantise=QuantiseSpec(kind="static"))
    assert both.factor == 16


@pytest.mark.parametrize(
    "operators", [{"Conv", "Gemm"}, {"GRU", "MatMul"}, {"LSTM", "Gemm"}, {"MatMul"}, {"Gemm"}]
)
def test_suggestions_are_possible_recipes(operators):
    plain = suggested(operators, transfer=False)
    assert not any(candidate.learns for candidate in plain)
    assert len(plain) >= 4
    Recipe(candidates=plain)
    assert any(candidate.learns for candidate in suggested(operators, transfer=True))


def test_the_examples_are_recipes_and_profiles():
    folder = Path(__file__).resolve().parents[3] / "examples" / "variants"
    assert len(load_recipe(folder / "images.toml").candidates) == 6
    assert [p.name for p in load_profiles(folder / "profiles.toml")] == ["gateway", "phone", "sensor"]
