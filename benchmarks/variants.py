"""Variants on real data: bytes, latency and accuracy of what `lepton variants` makes.

    python benchmarks/variants.py --data FOLDER                 # everything
    python benchmarks/variants.py --data FOLDER --part cnn      # one model

The global models are those that the anchors in ``docs/benchmarks.md`` were measured with: a CNN of 1.20 M
parameters on MNIST, a GRU of 0.66 M and a transformer of 0.82 M on Shakespeare's next character. They are
trained here, centrally, in this process, and kept in ``--work`` so that a second run only builds; those on
text for 150 steps only, enough to see what quantising loses. The teacher of the students has never seen the
proxy rows, and nothing has seen the test rows.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lepton_fl.compression.build import Build
from lepton_fl.compression.card import Card
from lepton_fl.compression.catalogue import read_report
from lepton_fl.compression.recipe import (
    Candidate,
    DistilSpec,
    EvaluationSpec,
    PruneSpec,
    QuantiseSpec,
    Recipe,
    StudentSpec,
    Training,
    TransferSpec,
)
from lepton_fl.compression.source import GlobalModel, read_tensors
from lepton_fl.files import make_private_folder
from lepton_fl.plan import LocalPlan
from lepton_fl.tasks import Dataset, Task, load_task
from lepton_fl.tasks.sources import DataSourceSpec
from lepton_fl.training.trainer import Trainer

PROXY_ROWS = 10_000
PARTS = ("cnn", "gru", "transformer", "generator")


# --- the models of the anchors ------------------------------------------------------------------------


def cnn() -> nn.Module:
    """Two convolutions and a wide hidden layer, 1,199,882 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def gru() -> nn.Module:
    """Two layers of 256 units, 0.67 M parameters."""
    from lepton_fl.tasks.models import GRU

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


MODELS: dict[str, tuple[str, Callable[[], nn.Module], LocalPlan]] = {
    "cnn": (
        "mnist_by_writer",
        cnn,
        LocalPlan(optimizer="adam", learning_rate=0.001, batch_size=128, epochs=2),
    ),
    "gru": (
        "shakespeare",
        gru,
        LocalPlan(optimizer="adam", learning_rate=0.004, batch_size=32, max_steps=150, clip_grad_norm=5.0),
    ),
    "transformer": (
        "shakespeare",
        Transformer,
        LocalPlan(optimizer="adam", learning_rate=0.002, batch_size=32, max_steps=150, clip_grad_norm=1.0),
    ),
}


def task_of(name: str) -> Task:
    """The data of a ready task with the model of an anchor."""
    base, model, local = MODELS[name]
    return replace(load_task(base), name=f"{base}_{name}", model=model, local=local)


def rows_of(task: Task, folder: Path) -> tuple[Dataset, Dataset]:
    """Raw training rows of the teacher, and the proxy rows: other ones, drawn by a fixed seed."""
    from lepton_fl.tasks.federated import read

    train = read(task, folder).train
    order = np.random.default_rng(0).permutation(len(train))
    return train.take(order[PROXY_ROWS:]), train.take(order[:PROXY_ROWS])


def global_model(name: str, data: Path, work: Path) -> GlobalModel:
    """Train a model, or read it back."""
    from safetensors.numpy import save_file

    task, path = task_of(name), work / f"{name}.safetensors"
    if not path.exists():
        trainer, began = Trainer(task), time.perf_counter()
        rows, _ = rows_of(task, data)
        start = trainer.initial(0)
        trained = start + trainer.train(start, task.transform(rows), task.local, seed=0).delta
        save_file(trainer.layout.unflatten(trained), path)
        print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
    arrays, _ = read_tensors(path)
    weights = Trainer(task).layout.flatten(arrays)
    reference = f"benchmarks.variants:{name}"
    return GlobalModel(task, reference, weights, f"{name}-central", None, "", None, data)


# --- recipes --------------------------------------------------------------------------------------------


def candidates(name: str) -> tuple[Candidate, ...]:
    """What is tried of a model."""
    dynamic, static = QuantiseSpec(kind="dynamic"), QuantiseSpec(kind="static")
    stored = QuantiseSpec(kind="weights")
    if name == "gru":
        return (
            Candidate(name="int8-dynamic", quantise=dynamic),
            Candidate(name="weights8", quantise=stored),
            Candidate(name="weights4", quantise=QuantiseSpec(kind="weights", bits=4)),
        )
    if name == "transformer":
        return (
            Candidate(name="int8-dynamic", quantise=dynamic),
            Candidate(name="int8-static", quantise=static),
            Candidate(name="weights8", quantise=stored),
            Candidate(name="matmul4", quantise=QuantiseSpec(kind="matmul", bits=4)),
        )
    student = DistilSpec(student=StudentSpec(kind="cnn", width=8, hidden=22), epochs=20)
    if name == "generator":
        return (Candidate(name="student", distil=student),)
    small = DistilSpec(student=StudentSpec(kind="cnn", width=4, hidden=12), epochs=20)
    fine = Training(epochs=2, learning_rate=0.0003)
    return (
        Candidate(name="int8-static", quantise=static),
        Candidate(name="student", distil=student),
        Candidate(name="student-int8", distil=student, quantise=static),
        Candidate(name="int8-dynamic", quantise=dynamic),
        Candidate(name="weights8", quantise=stored),
        Candidate(name="matmul4", quantise=QuantiseSpec(kind="matmul", bits=4)),
        Candidate(name="fp16", quantise=QuantiseSpec(kind="fp16")),
        Candidate(name="student-aware", distil=student, quantise=static.model_copy(update={"aware": fine})),
        Candidate(name="small-int8", distil=small, quantise=static),
        Candidate(name="sparse90-int8", prune=PruneSpec(amount=0.9, epochs=3), quantise=static),
        Candidate(name="two-of-four-int8", prune=PruneSpec(kind="2:4", epochs=2), quantise=static),
        Candidate(
            name="thin75-int8", prune=PruneSpec(kind="structured", amount=0.75, epochs=5), quantise=static
        ),
    )


def recipe_of(name: str, model: GlobalModel, data: Path, work: Path) -> Recipe:
    """The recipe, with its proxy rows written as an operator would have them: an archive without labels."""
    if name == "generator":
        return Recipe(transfer=TransferSpec(source="generator"), candidates=candidates(name))
    proxy = work / f"{name}-proxy.npz"
    if not proxy.exists():
        np.savez_compressed(proxy, x=rows_of(model.task, data)[1].x)
    rows = PROXY_ROWS if name == "cnn" else 1_000  # of the sequences only ranges are taken
    transfer = TransferSpec(source="proxy", data=DataSourceSpec(kind="npz", path=proxy), rows=rows)
    evaluation = EvaluationSpec(rows=0 if name == "cnn" else 500)
    return Recipe(transfer=transfer, evaluation=evaluation, candidates=candidates(name))


# --- the table ------------------------------------------------------------------------------------------


def part(name: str, data: Path, work: Path) -> tuple[Card, ...]:
    """Build one model's variants."""
    model = global_model("cnn" if name == "generator" else name, data, work)
    folder = work / f"{name}-variants"
    build = Build(model, recipe_of(name, model, data, work), folder=folder, data=data)
    build.on_done = partial(print, f"{name}:", flush=True)
    build.run()
    report, cards = read_report(folder)
    for failure in report.failures:
        print(f"{name}: {failure.name} failed: {failure.reason}")
    return cards


def table(name: str, cards: tuple[Card, ...]) -> None:
    """Print one model's variants in Markdown."""
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
            global_model("cnn" if name == "generator" else name, options.data, options.work)
        else:
            table(name, part(name, options.data, options.work))


if __name__ == "__main__":
    main()
