"""Variants on real data: bytes, latency and accuracy of what `lepton variants` makes.

    python benchmarks/variants.py --data FOLDER                 # everything; killed, it goes on where it was
    python benchmarks/variants.py --data FOLDER --part devices  # one part

The global models are those that the anchors in ``docs/benchmarks.md`` were measured with: a CNN of 1.20 M
parameters on MNIST, a GRU of 0.67 M and a transformer of 0.82 M on Shakespeare's next character; and the
ready CNN on Fashion-MNIST. They are trained here, centrally, one epoch after the other, each kept in
``--work``. The teacher of the students has never seen the proxy rows, and nothing has seen the test rows.

``devices`` teaches the same student without any proxy: a simulated fleet of the 539 writers, each of whom
answers as the teacher does on rows of its own. ``generator`` has no rows at all.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lepton_fl.compression.build import Build
from lepton_fl.compression.card import Card
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.federated import distillation
from lepton_fl.compression.plot import draw
from lepton_fl.compression.recipe import (
    Candidate,
    DistilSpec,
    EvaluationSpec,
    GeneratorSpec,
    PruneSpec,
    QuantiseSpec,
    Recipe,
    StudentSpec,
    Training,
    TransferSpec,
)
from lepton_fl.compression.source import GlobalModel, read_tensors
from lepton_fl.files import make_private_folder, remove, write_atomic
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks import Dataset, Task, load_task
from lepton_fl.tasks.models import CNN, GRU
from lepton_fl.tasks.sources import DataSourceSpec
from lepton_fl.training.trainer import Trainer

PARTS = ("cnn", "devices", "fashion", "gru", "transformer", "generator")
STUDENT = StudentSpec(kind="cnn", width=8, hidden=22)
ROUNDS = 120  # of the devices


# --- the models of the anchors ------------------------------------------------------------------------


def cnn() -> nn.Module:
    """Two convolutions and a wide hidden layer, 1,199,882 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def gru() -> nn.Module:
    """Two layers of 256 units, 0.67 M parameters."""
    return GRU(76, vocabulary=76, embedding=64, hidden=256, layers=2, every_step=True)


class Transformer(nn.Module):
    """Four causal layers of width 128, 0.82 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(76, 128)
        self.places = nn.Parameter(0.02 * torch.randn(80, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 76)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T) to logits (N, T, 76)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out: Tensor = self.head(self.layers(self.tokens(x) + self.places, mask=mask, is_causal=True))
        return out


@dataclass(frozen=True)
class Model:
    """A global model: of which task, and how it is trained."""

    task: str
    model: Callable[[], nn.Module] | None  # None = the task's own
    local: LocalPlan
    epochs: int
    proxy: int  # rows kept back from the training, for the operator
    evaluated: int = 0  # rows of the test set; 0 = all


MODELS = {
    "cnn": Model(
        "mnist_by_writer", cnn, LocalPlan(optimizer="adam", learning_rate=0.001, batch_size=128), 4, 10_000
    ),
    "fashion": Model(
        "lepton_fl.tasks.images:fashion_mnist",
        None,
        LocalPlan(optimizer="adam", learning_rate=0.002, batch_size=64),
        8,
        10_000,
    ),
    "gru": Model(
        "shakespeare",
        gru,
        LocalPlan(optimizer="adam", learning_rate=0.004, batch_size=64, clip_grad_norm=5.0),
        3,
        1_000,
        1_000,
    ),
    "transformer": Model(
        "shakespeare",
        Transformer,
        LocalPlan(optimizer="adam", learning_rate=0.002, batch_size=64, clip_grad_norm=1.0),
        3,
        1_000,
        1_000,
    ),
}


def task_of(name: str) -> Task:
    """The data of a ready task with the model of an anchor."""
    wanted = MODELS[name]
    base = load_task(wanted.task)
    if wanted.model is None:
        return base
    return replace(base, name=f"{base.name}_{name}", model=wanted.model, local=wanted.local)


def small() -> nn.Module:
    """The student, 18,796 parameters."""
    return CNN((1, 28, 28), 10, STUDENT.width, STUDENT.hidden)


taught = distillation(task_of("cnn"), small)


def rows_of(name: str, folder: Path) -> tuple[Dataset, Dataset]:
    """Raw training rows of the teacher, and the proxy rows: other ones, drawn by a fixed seed."""
    from lepton_fl.tasks.federated import read

    train, kept = read(task_of(name), folder).train, MODELS[name].proxy
    order = np.random.default_rng(0).permutation(len(train))
    return train.take(order[kept:]), train.take(order[:kept])


def global_model(name: str, data: Path, work: Path) -> GlobalModel:
    """Train a model, or read it back."""
    task, path = task_of(name), work / f"{name}.safetensors"
    if not path.exists():
        train(name, data, path)
    weights = Trainer(task).layout.flatten(read_tensors(path)[0])
    return GlobalModel(task, f"variants:{name}", weights, f"{name}-central", None, "", None, data)


def train(name: str, data: Path, path: Path) -> None:
    """One epoch after the other, at rates that fall along a cosine; a killed training loses one epoch."""
    from safetensors.numpy import save

    task, plan, epochs = task_of(name), MODELS[name].local, MODELS[name].epochs
    trainer, rows = Trainer(task), task.transform(rows_of(name, data)[0])
    kept, weights, done = path.with_suffix(".epoch"), trainer.initial(0), 0
    if kept.exists():
        arrays, said = read_tensors(kept)
        weights, done = arrays["weights"], int(said["epochs"])
    for epoch in range(done, epochs):
        began, rate = time.process_time(), plan.learning_rate * (1 + cos(pi * epoch / epochs)) / 2
        result = trainer.train(weights, rows, plan.model_copy(update={"learning_rate": rate}), seed=epoch)
        weights = weights + result.delta
        loss = result.sums["loss_sum"][0] / result.sums["examples"][0]
        print(
            f"{name}: epoch {epoch + 1} of {epochs}, loss {loss:.4f}, "
            f"{time.process_time() - began:.0f} CPU s",
            flush=True,
        )
        write_atomic(kept, save({"weights": weights}, {"epochs": str(epoch + 1)}))
    write_atomic(path, save(trainer.layout.unflatten(weights)))
    remove(kept)


# --- the fleet that teaches ---------------------------------------------------------------------------


def fleet(data: Path, work: Path, teacher: Path) -> Path:
    """The folder of the distillation run; a killed one goes on after its last round."""
    from lepton_simulations.api import run_scenario
    from lepton_simulations.config import SimulationConfig

    folder = work / "devices-run"
    if (folder / "model.safetensors").exists():
        return folder
    config = SimulationConfig.model_validate(
        {
            "run": {
                "task": "variants:taught",
                "teacher": str(teacher),
                "rounds": ROUNDS,
                "evaluate_every": 10,
                "cohort": {"size": 40},
                "local": {"learning_rate": 0.1, "batch_size": 10, "epochs": 2, "clip_grad_norm": 5.0},
                "schedule": {"kind": "cosine", "floor": 0.02},
                "early_stop": {"metric": "accuracy", "mode": "max"},
            },
            "data": {"partition": {"kind": "natural"}, "folder": str(data)},
            "engine": {"workers": 0},
            "output": {"folder": str(folder), "plots": False, "tensorboard": False},
        }
    )
    result = run_scenario(config, resume=(folder / "state.json").exists())
    print(f"devices: {result.verdict.reason}", flush=True)
    return folder


# --- recipes --------------------------------------------------------------------------------------------

DYNAMIC, STATIC = QuantiseSpec(kind="dynamic"), QuantiseSpec(kind="static")
STORED, BLOCKS = QuantiseSpec(kind="weights"), QuantiseSpec(kind="matmul", bits=4)
STORED4 = QuantiseSpec(kind="weights", bits=4)


def of_text(name: str) -> tuple[Candidate, ...]:
    """No convolution, so integers as they come, and weights that are only stored small."""
    more = (
        (Candidate(name="weights4", quantise=STORED4),)
        if name == "gru"
        else (
            Candidate(name="int8-static", quantise=STATIC),
            Candidate(name="matmul4", quantise=BLOCKS),
            Candidate(name="weights4", quantise=STORED4),
        )
    )
    return (
        Candidate(name="int8-dynamic", quantise=DYNAMIC),
        Candidate(name="weights8", quantise=STORED),
        Candidate(name="fp16", quantise=QuantiseSpec(kind="fp16")),
        *more,
    )


def of_images() -> tuple[Candidate, ...]:
    """Everything."""
    student = DistilSpec(student=STUDENT, epochs=20)
    tiny = DistilSpec(student=StudentSpec(kind="cnn", width=4, hidden=12), epochs=20)
    fine = Training(epochs=2, learning_rate=0.0003)
    return (
        Candidate(name="int8-static", quantise=STATIC),
        Candidate(name="student", distil=student),
        Candidate(name="student-int8", distil=student, quantise=STATIC),
        Candidate(name="int8-dynamic", quantise=DYNAMIC),
        Candidate(name="weights8", quantise=STORED),
        Candidate(name="matmul4", quantise=BLOCKS),
        Candidate(name="fp16", quantise=QuantiseSpec(kind="fp16")),
        Candidate(name="student-aware", distil=student, quantise=STATIC.model_copy(update={"aware": fine})),
        Candidate(name="tiny-int8", distil=tiny, quantise=STATIC),
        Candidate(name="sparse90-int8", prune=PruneSpec(amount=0.9, epochs=3), quantise=STATIC),
        Candidate(name="two-of-four-int8", prune=PruneSpec(kind="2:4", epochs=2), quantise=STATIC),
        Candidate(
            name="thin75-int8", prune=PruneSpec(kind="structured", amount=0.75, epochs=5), quantise=STATIC
        ),
    )


def recipe_of(name: str, data: Path, work: Path) -> Recipe:
    """The recipe, with its proxy rows written as an operator would have them: an archive without labels."""
    if name == "generator":
        return Recipe(
            transfer=TransferSpec(source="generator", generator=GeneratorSpec()),
            candidates=(Candidate(name="student", distil=DistilSpec(student=STUDENT, epochs=20)),),
        )
    if name == "devices":
        weights = fleet(data, work, work / "cnn.safetensors")
        step = DistilSpec(student=STUDENT, epochs=0, weights=weights)
        return Recipe(
            candidates=(
                Candidate(name="student", distil=step),
                Candidate(name="student-int8", distil=step, quantise=STATIC),
            )
        )
    proxy = work / f"{name}-proxy.npz"
    if not proxy.exists():
        np.savez_compressed(proxy, x=rows_of(name, data)[1].x)
    transfer = TransferSpec(source="proxy", data=DataSourceSpec(kind="npz", path=proxy))
    listed = of_images() if name in ("cnn", "fashion") else of_text(name)
    return Recipe(
        transfer=transfer, evaluation=EvaluationSpec(rows=MODELS[name].evaluated), candidates=listed
    )


# --- the table ------------------------------------------------------------------------------------------


def part(name: str, data: Path, work: Path) -> tuple[Card, ...]:
    """Build one part's variants."""
    model = global_model(name if name in MODELS else "cnn", data, work)
    folder = work / f"{name}-variants"
    build = Build(model, recipe_of(name, data, work), folder=folder, data=data)
    build.on_done = partial(print, f"{name}:", flush=True)
    build.run()
    report, cards = read_report(folder)
    for failure in report.failures:
        print(f"{name}: {failure.name} failed: {failure.reason}")
    draw(report, cards, folder / "variants.png")
    return cards


def table(name: str, cards: tuple[Card, ...]) -> None:
    """Print one part's variants in Markdown."""
    whole = cards[0]
    print(
        f"\n{name}, {whole.measured.rows} rows\n\n"
        "| variant | bytes | x fp32 | zstd | predicted | parameters | accuracy | points | agreement "
        "| p50 ms | x fp32 | peak MB | s |\n"
        "|--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for card in cards:
        ours, base = card.measured, whole.measured
        accuracy = ours.metrics["accuracy"]
        print(
            f"| {card.name} | {card.model_bytes} | {card.model_bytes / whole.model_bytes:.3f} "
            f"| {ours.wire_bytes} | {card.predicted_bytes:.0f} | {ours.nonzero} | {100 * accuracy:.2f} "
            f"| {100 * (accuracy - base.metrics['accuracy']):+.2f} | {100 * (ours.agreement or 0):.2f} "
            f"| {ours.p50_ms:.3f} | {ours.p50_ms / base.p50_ms:.2f} | {ours.peak_memory / 1e6:.1f} "
            f"| {ours.build_seconds:.0f} |"
        )
    for card in cards:
        learnt = card.lineage.transfer
        if learnt is not None and learnt.source == "devices":
            print(
                f"{card.name}: {learnt.rounds} rounds, {learnt.bytes_up / 1e6:.1f} MB up, "
                f"{learnt.bytes_down / 1e6:.1f} MB down, {learnt.seconds:.0f} s"
            )
        elif learnt is not None:
            print(f"{card.name}: {learnt.source}, {learnt.rows} rows, shift {learnt.shift:.3f}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--work", type=Path, default=Path("variants-benchmark"), help="what is kept")
    parser.add_argument("--train", action="store_true", help="only train the models")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the data sets with --data or LEPTON_DATA")
    torch.set_num_threads(1)
    make_private_folder(options.work)
    for name in options.part or PARTS:
        if options.train:
            global_model(name if name in MODELS else "cnn", options.data, options.work)
        else:
            table(name, part(name, options.data, options.work))


if __name__ == "__main__":
    main()
