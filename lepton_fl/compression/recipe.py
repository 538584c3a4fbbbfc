"""What to try: candidates, each ``distil -> prune -> quantise -> export``, declared in TOML.

    [transfer]                                   # what students and fine-tuning learn from
    source = "proxy"
    data = { kind = "npz", path = "unlabelled.npz" }

    [[candidates]]
    name = "student-int8"
    distil = { student = { kind = "cnn", width = 6, hidden = 16 }, epochs = 40 }
    quantise = { kind = "static" }

Every step of a candidate may be left out. Nothing is assumed of what helps: all that is listed is made and
measured.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from lepton_fl.compression.card import Name
from lepton_fl.plan import Fraction, Frozen, Positive
from lepton_fl.tasks.sources import DataSourceSpec

OPSET: Final = 20  # fixed: the newest whose graphs ONNX Runtime's quantiser understands as torch writes them
MANY: Final = 256  # candidates of one recipe

Epochs = Annotated[int, Field(ge=0, le=10_000)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Inside = Annotated[float, Field(gt=0, lt=1)]


class Training(Frozen):
    """How a step trains on the transfer data: Adam, the rate falling to zero along a cosine."""

    epochs: Epochs = 10
    learning_rate: Positive = 0.002
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    temperature: Positive = 2.0  # of both sides' logits (Hinton et al. 2015); no part in a regression
    labels: Fraction = 0.0  # weight of the task's own loss; needs transfer.labelled


class StudentSpec(Frozen):
    """A student's architecture: one of ``name``, ``scale`` and ``kind``."""

    name: str = ""  # one that the task brings along (``Task.students``)
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0  # this share of the channels of the task's own model
    kind: Literal["", "linear", "mlp", "cnn", "gru", "lstm"] = ""  # one of lepton_fl.tasks.models
    width: Width = 8  # cnn: channels of the first convolution
    hidden: Width = 32
    layers: Annotated[int, Field(ge=1, le=16)] = 1  # mlp, gru, lstm
    embedding: Width = 16  # gru, lstm on tokens

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(map(bool, (self.name, self.scale, self.kind))) != 1:
            raise ValueError("give exactly one of name, scale and kind")
        return self


class DistilSpec(Training):
    """Teach a smaller model what the global one answers."""

    student: StudentSpec
    epochs: Epochs = 30
    weights: Path | None = None  # a distillation run's folder or model: nothing is trained here
    teachers: Literal["global", "ensemble"] = (
        "global"  # ensemble: with every --teacher (FedDF, Lin et al. 2020)
    )

    @model_validator(mode="after")
    def _trained_once(self) -> Self:
        if self.weights is not None and self.epochs:
            raise ValueError("weights come from a run that is over: set epochs = 0")
        return self


class PruneSpec(Training):
    """Take weights away, then fine-tune the rest on the teacher's answers."""

    kind: Literal["structured", "magnitude", "2:4"] = "magnitude"
    amount: Inside = 0.5  # of the channels (structured) or weights (magnitude); 2:4 is half by definition
    epochs: Epochs = 5


class QuantiseSpec(Frozen):
    """Fewer bits.

    static: weights and activations in 8 bits, ranges from calibration rows (QDQ, min-max); for convolutions.
    dynamic: weights in 8 bits, activations as they come; for matrix products.
    weights: stored in 8 or 4 bits, computed in float32; for what has no integer kernel (GRU).
    matmul: matrix products read 8- or 4-bit weights, block by block (MatMulNBits).
    fp16: half precision.
    """

    kind: Literal["static", "dynamic", "weights", "matmul", "fp16"]
    bits: Literal[8, 4] = 8  # weights, matmul
    operators: tuple[str, ...] = ()  # static, dynamic: only these; empty = all that the runtime can
    calibration_rows: Annotated[int, Field(ge=1, le=100_000)] = 256  # static
    aware: Training | None = None  # fine-tune first, with the rounding in the loop

    @model_validator(mode="after")
    def _bits_that_mean_something(self) -> Self:
        if self.bits == 4 and self.kind not in ("weights", "matmul"):
            raise ValueError(f"bits = 4 is for kind = 'weights' or 'matmul', not {self.kind!r}")
        return self

    @property
    def weight_bits(self) -> int:
        """Of a weight in the file."""
        return 16 if self.kind == "fp16" else self.bits


class Candidate(Frozen):
    """One way to make a variant."""

    name: Name
    distil: DistilSpec | None = None
    prune: PruneSpec | None = None
    quantise: QuantiseSpec | None = None
    executorch: bool = False  # also as an ExecuTorch program; float32, or quantised statically

    @model_validator(mode="after")
    def _what_executorch_takes(self) -> Self:
        if self.executorch and self.quantise is not None and self.quantise.kind != "static":
            raise ValueError(f"executorch takes quantise.kind = 'static' or none, not {self.quantise.kind!r}")
        return self

    @property
    def learns(self) -> bool:
        """Whether transfer data are needed."""
        aware = self.quantise.aware if self.quantise else None
        return any(step is not None and step.epochs > 0 for step in (self.distil, self.prune, aware))

    @property
    def trainings(self) -> tuple[Training, ...]:
        """The steps that train, in order."""
        aware = self.quantise.aware if self.quantise else None
        return tuple(step for step in (self.distil, self.prune, aware) if step is not None and step.epochs)

    def words(self) -> tuple[str, ...]:
        """The steps, for people."""
        return tuple(filter(None, (_distil(self.distil), _prune(self.prune), _quantise(self.quantise))))

    @property
    def factor(self) -> float:
        """k: by how much quantising and pruning should make a file smaller, on paper."""
        bits = 32 / self.quantise.weight_bits if self.quantise else 1.0
        kept = (
            0.5 if self.prune and self.prune.kind == "2:4" else 1 - self.prune.amount if self.prune else 1.0
        )
        return bits / kept


class GeneratorSpec(Frozen):
    """A generator trained against the teacher, without data (DAFL, Chen et al. 2019; ZSKT, Micaelli 2019)."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1500
    batch_size: Annotated[int, Field(ge=2, le=100_000)] = 128
    learning_rate: Positive = 0.001
    rows: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000  # kept, from all along the training


class TransferSpec(Frozen):
    """The rows that students and fine-tuning learn from."""

    source: Literal["none", "proxy", "generator"] = "none"
    data: DataSourceSpec | None = (
        None  # proxy: rows the operator owns, of the task's raw form; labels not needed
    )
    rows: Annotated[int, Field(ge=0)] = 0  # at most; 0 = all
    labelled: bool = False  # the rows carry true labels
    generator: GeneratorSpec = GeneratorSpec()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "proxy" and self.data is None:
            raise ValueError("source = 'proxy' needs data = { kind = ..., path = ... }")
        if self.labelled and self.source != "proxy":
            raise ValueError(f"labelled = true is for source = 'proxy', not {self.source!r}")
        return self


class EvaluationSpec(Frozen):
    """The labelled rows that everything is measured on; nothing ever trains on them."""

    data: DataSourceSpec | None = None  # None = the test set of the task's published data
    first: Annotated[int, Field(ge=0)] = 0  # row to begin with
    rows: Annotated[int, Field(ge=0)] = 0  # at most; 0 = all
    parity_rows: Annotated[int, Field(ge=1, le=1024)] = 16  # that go along as the device's self-test


class Recipe(Frozen):
    """Everything that is to be tried."""

    seed: Annotated[int, Field(ge=0)] = 0
    transfer: TransferSpec = TransferSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    candidates: Annotated[
        tuple[Candidate, ...], Field(max_length=MANY)
    ] = ()  # empty = as the operators suggest

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [candidate.name for candidate in self.candidates]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several candidates are called {', '.join(twice)}")
        learning = [candidate.name for candidate in self.candidates if candidate.learns]
        if learning and self.transfer.source == "none":
            raise ValueError(
                f"{', '.join(learning)} must be trained: set transfer.source to 'proxy' or 'generator', "
                "or epochs to 0"
            )
        graded = [c.name for c in self.candidates if any(step.labels for step in c.trainings)]
        if graded and not self.transfer.labelled:
            raise ValueError(f"{', '.join(graded)} should learn from labels: set transfer.labelled")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: it cannot be read or says something that is not possible; all problems at once.
    """
    from lepton_fl.config import load

    return load(Recipe, path, env={}).value


def suggested(operators: Collection[str], *, transfer: bool) -> tuple[Candidate, ...]:
    """Candidates for a model, by the operators of its graph. They are tried, not trusted.

    Args:
        operators: ONNX operator types of the exported global model.
        transfer: whether there are rows to train on.
    """
    quantisers = {"fp16": QuantiseSpec(kind="fp16"), "weights8": QuantiseSpec(kind="weights")}
    if _CONVOLUTIONS & set(operators):
        quantisers["int8-static"] = QuantiseSpec(kind="static")
    if _PRODUCTS & set(operators):
        quantisers["int8-dynamic"] = QuantiseSpec(kind="dynamic", operators=("MatMul", "Gemm"))
        quantisers["matmul4"] = QuantiseSpec(kind="matmul", bits=4)
    if _RECURRENT & set(operators):
        quantisers["weights4"] = QuantiseSpec(kind="weights", bits=4)
    found = [Candidate(name=name, quantise=spec) for name, spec in quantisers.items()]
    if transfer:
        found += _learning(operators)
    return tuple(found)


_CONVOLUTIONS = frozenset({"Conv"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_RECURRENT = frozenset({"GRU", "LSTM"})


def _learning(operators: Collection[str]) -> list[Candidate]:
    """Those that need transfer data."""
    if _RECURRENT & set(operators):  # no library removes channels of recurrent layers
        kind: Literal["gru", "lstm"] = "gru" if "GRU" in operators else "lstm"
        student, quantise = StudentSpec(kind=kind, hidden=32), QuantiseSpec(kind="weights")
    elif _CONVOLUTIONS & set(operators):
        student, quantise = StudentSpec(scale=0.25), QuantiseSpec(kind="static")
    else:
        student, quantise = StudentSpec(scale=0.25), QuantiseSpec(kind="dynamic")
    pruned = PruneSpec(kind="magnitude", amount=0.8)
    return [
        Candidate(name="student", distil=DistilSpec(student=student)),
        Candidate(name="student-small", distil=DistilSpec(student=student), quantise=quantise),
        Candidate(name="sparse-small", prune=pruned, quantise=quantise),
    ]


def _distil(step: DistilSpec | None) -> str:
    if step is None:
        return ""
    student = step.student
    shape = {"cnn": f"width {student.width}, "}.get(student.kind, "") + f"hidden {student.hidden}"
    what = student.name or (
        f"{student.kind} ({shape})" if student.kind else f"{student.scale:.0%} of the channels"
    )
    if step.weights is not None:
        return f"distil into {what}, on the devices"
    return f"distil into {what}, {step.epochs} epochs" + (", ensemble" if step.teachers == "ensemble" else "")


def _prune(step: PruneSpec | None) -> str:
    if step is None:
        return ""
    amount = "" if step.kind == "2:4" else f" {step.amount:.0%}"
    return f"prune {step.kind}{amount}, {step.epochs} epochs"


def _quantise(step: QuantiseSpec | None) -> str:
    if step is None:
        return ""
    bits = f" {step.bits} bits" if step.kind in ("weights", "matmul") else ""
    only = f" of {', '.join(step.operators)}" if step.operators else ""
    return f"quantise {step.kind}{bits}{only}" + (" after aware training" if step.aware else "")
