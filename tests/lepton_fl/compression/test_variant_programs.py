"""ExecuTorch programs beside the graphs: what they answer, and what is said where the extra is missing."""

import importlib.util

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file

from lepton_fl.compression import measure, pte
from lepton_fl.compression.build import Build
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.fit import answers_of
from lepton_fl.compression.recipe import Candidate, QuantiseSpec, Recipe
from lepton_fl.compression.source import read_source
from lepton_fl.errors import ConfigError, NotFound, StateCorrupt, TaskError
from lepton_fl.tasks import load_task
from lepton_fl.tasks.federated import read
from lepton_fl.training.trainer import Trainer

installed = importlib.util.find_spec("executorch") is not None
needs_executorch = pytest.mark.skipif(
    not installed, reason="the extra lepton-fl[executorch] is not installed"
)
RECIPE = {
    "evaluation": {"rows": 100},
    "candidates": [
        {"name": "float", "executorch": True},
        {"name": "int8", "quantise": {"kind": "static"}, "executorch": True},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that has learnt a little."""
    task = load_task("digits")
    trainer = Trainer(task)
    rows = task.transform(read(task, None).train)
    start = trainer.initial(0)
    weights = start + trainer.train(start, rows, task.local, seed=0).delta
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(trainer.layout.unflatten(weights), path, {"task": "digits"})
    return read_source(path)


@needs_executorch
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_program_answers_as_the_graph_does(model, tmp_path):
    recipe = Recipe.model_validate({**RECIPE, "candidates": RECIPE["candidates"][:1]})
    Build(model, recipe, folder=tmp_path).run()
    report, cards = read_report(tmp_path)
    assert not report.failures
    whole, plain = cards
    assert plain.executorch.metrics == pytest.approx(whole.measured.metrics, rel=1e-4)
    assert plain.executorch.agreement == 1.0
    assert plain.executorch.torch_error < 1e-4
    program = tmp_path / "float" / "model.pte"
    data = program.read_bytes()
    program.write_bytes(data[:-1] + b"x")
    with pytest.raises(StateCorrupt, match=r"model\.pte"):
        read_report(tmp_path)
    program.unlink()
    with pytest.raises(NotFound, match=r"model\.pte"):
        read_report(tmp_path)


@needs_executorch
@pytest.mark.slow
@pytest.mark.timeout(1200)  # the quantiser alone takes a minute
def test_eight_bits_lose_little(model, tmp_path):
    rows = model.task.transform(read(model.task, None).test).x[:200]
    spec = QuantiseSpec(kind="static", calibration_rows=32)
    sizes = {}
    for name, step in (("float", None), ("int8", spec)):
        path = tmp_path / f"{name}.pte"
        path.write_bytes(pte.lower(model.module(), step, rows))
        sizes[name] = path.stat().st_size
    assert sizes["int8"] < 0.5 * sizes["float"]
    np.save(tmp_path / "rows.npy", rows)
    answers = measure.run(tmp_path / "int8.pte", tmp_path / "rows.npy", tmp_path).outputs
    wanted = answers_of([model.module()], rows, torch.device("cpu"))
    assert (answers.argmax(1) == wanted.argmax(1)).mean() > 0.97
    assert np.abs(answers - wanted).max() > 1e-4


@needs_executorch
def test_a_model_that_cannot_be_lowered_is_told():
    class Stubborn(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TaskError, match="ExecuTorch"):
        pte.lower(Stubborn().eval(), None, np.ones((2, 3), np.float32))


def test_without_the_extra_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pte, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        Build(model, Recipe.model_validate(RECIPE), folder=tmp_path).run()
    assert "lepton-fl[executorch]" in caught.value.hint


def test_only_what_executorch_takes():
    with pytest.raises(ValidationError, match="executorch takes"):
        Candidate.model_validate({"name": "x", "quantise": {"kind": "dynamic"}, "executorch": True})
