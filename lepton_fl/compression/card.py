"""What is known of one variant: where it comes from, what was measured, who may get it.

A variant is a folder of three files::

    model.onnx           the graph, weights inside, for ONNX Runtime
    parity.safetensors   "input" (n, ...) real rows, prepared, and "output" (n, ...) what the model made of
                         them when it was measured: the device's self-test before it serves
    card.json            this record, canonical JSON; it names the other two by SHA-256

    card = read_variant(folder)          # all three files are there and fit each other, or StateCorrupt
    card.offered_to("gateway")           # False: kept, marked, never handed out

Needs numpy and pydantic only: a device reads cards.
"""

import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from lepton_fl.errors import NotFound, StateCorrupt, StateTooNew
from lepton_fl.files import canonical_json, sha256_hex
from lepton_fl.plan import Frozen

FAMILY = "lepton-variant/"
FORMAT: Final = "lepton-variant/1"
MODEL, PARITY, CARD = "model.onnx", "parity.safetensors", "card.json"
PROGRAM: Final = "model.pte"  # beside them, where the recipe asks for it
MAX_CARD = 2**20  # bytes; a card is a few kilobytes

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # also a folder's name
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class TensorSpec(Frozen):
    """One input or output of the graph."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[Annotated[int, Field(ge=1)] | None, ...]  # None = the batch, any number of rows

    def fits(self, array: NDArray[np.generic]) -> bool:
        """Whether an array may be given for it."""
        same = len(array.shape) == len(self.shape) and array.dtype == self.dtype
        return same and all(want in (None, got) for want, got in zip(self.shape, array.shape, strict=True))


class Transfer(Frozen):
    """What a variant was trained on, how far that is from the evaluation set to the teacher, and its cost."""

    source: Literal["proxy", "generator", "devices"]
    rows: Count  # 0 = not known: they are on the devices
    labelled: bool = False
    entropy: Amount | None  # nats, mean over the teacher's decisions on these rows; None for a regression
    reference_entropy: Amount | None  # the same on the evaluation set
    shift: Share  # Kolmogorov-Smirnov distance of the teacher's outputs here and there: 0 = alike, 1 = apart
    seconds: Amount  # to make or read the rows, or of the devices' rounds
    run: str = ""  # of the devices that taught; what follows is its cost
    rounds: Count = 0
    bytes_up: Count = 0  # from all devices together
    bytes_down: Count = 0  # to them: the student every time, the teacher where a device has not kept it
    privacy: str | None = None  # what was promised to the devices that taught


class Lineage(Frozen):
    """Where a variant comes from."""

    run: str  # id of the run
    round: Count | None  # of the global model; None = the source does not say
    global_sha256: Sha256  # name of the global model: SHA-256 of its float32 vector
    journal_sha256: str = ""  # head of the journal when the model was committed; empty = not known
    privacy: str | None = None  # what is promised to those who trained it; None = no guarantee is known
    candidate_sha256: Sha256  # of everything this variant depends on: model, steps, transfer data
    recipe_sha256: Sha256  # of the recipe's text
    transfer: Transfer | None = None  # what its training used; None = none was needed


class Measured(Frozen):
    """What was measured, in the runtime of the device, one thread, in a process of its own."""

    wire_bytes: Count  # zstd
    parameters: Count  # numbers in the weights
    nonzero: Count  # of them, not zero
    macs: Count  # multiply-adds of one row, dense
    energy_uj: Amount  # of one row: an ESTIMATE, see ``energy_model``
    energy_model: str  # the formula's name
    rows: Count  # of the evaluation set
    metrics: dict[str, Finite]  # of the task, on the evaluation set: accuracy, f1, loss, ...
    recall: tuple[Share, ...] = ()  # of each class; empty where there are none
    agreement: Share | None = None  # rows (positions) on which the global model decides the same
    deviation: Amount  # mean absolute difference of the outputs from the global model's
    p50_ms: Amount  # one row at a time
    p95_ms: Amount
    peak_memory: Count  # bytes that loading and serving added to the process, at the peak
    build_seconds: Amount  # to produce it, shared steps included
    processor: str  # on which it was measured
    threads: Literal[1] = 1


class ExecuTorch(Frozen):
    """The same variant as a program for ExecuTorch (XNNPACK), measured in that runtime, one thread.

    It lies beside the graph as ``model.pte``; it is neither gated nor delivered.
    """

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1)]
    metrics: dict[str, Finite]
    agreement: Share | None = None
    torch_error: Amount  # mean absolute difference of the outputs from torch's, before quantisation
    p50_ms: Amount
    p95_ms: Amount
    peak_memory: Count  # the bindings need torch, so this says little of an embedded runtime


class Parity(Frozen):
    """The device's self-test."""

    sha256: Sha256  # of parity.safetensors
    rows: Annotated[int, Field(ge=1)]
    tolerance: Amount  # root mean square difference allowed; integer kernels differ between processors
    torch_error: Amount  # of the exported graph, before quantisation, from torch: largest difference


class Verdict(Frozen):
    """What the gate says about one device profile."""

    profile: str
    passed: bool
    reasons: tuple[str, ...] = ()  # every bound that was missed, with value and bound


class Card(Frozen):
    """The record of one variant."""

    format: Literal["lepton-variant/1"] = FORMAT
    name: Name
    task: str  # package.module:attribute
    task_version: str
    runtime: Literal["onnxruntime"] = "onnxruntime"
    opset: Annotated[int, Field(ge=1)]
    model_sha256: Sha256  # of model.onnx
    model_bytes: Annotated[int, Field(ge=1)]  # of model.onnx
    input: TensorSpec  # prepared rows, as ``Task.transform`` gives them
    output: TensorSpec
    steps: tuple[str, ...]  # how it was made, in words
    predicted_bytes: Amount  # N/k by quantising and pruning, N/k^2 with distillation
    lineage: Lineage
    measured: Measured
    parity: Parity
    executorch: ExecuTorch | None = None
    gate: tuple[Verdict, ...] = ()

    @property
    def offered(self) -> bool:
        """Whether any profile may get it."""
        return any(verdict.passed for verdict in self.gate)

    def offered_to(self, profile: str) -> bool:
        """Whether devices of this profile may get it; no for a profile it was never held against."""
        return any(verdict.passed for verdict in self.gate if verdict.profile == profile)

    def to_bytes(self) -> bytes:
        """The canonical text of card.json."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a card.

        Raises:
            StateTooNew: it is of another format.
            StateCorrupt: it is no card, or not the canonical text of one.
        """
        if len(data) > MAX_CARD:
            raise StateCorrupt(f"The card has {len(data)} bytes, at most {MAX_CARD} are allowed.")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StateCorrupt(f"The card is not JSON: {error}.") from error
        written = str(found.get("format", "")) if isinstance(found, dict) else ""
        if written.startswith(FAMILY) and written != FORMAT:
            raise StateTooNew(
                f"The card has the format {written!r}, this version reads {FORMAT!r}.",
                hint="Install the version of lepton-fl that wrote it.",
            )
        try:
            card = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise StateCorrupt(f"The card's {where or 'text'} is wrong: {first['msg']}.") from error
        if card.to_bytes() != data:
            raise StateCorrupt("The card is not canonical: the same facts would have another hash.")
        return card

    def check_files(self, model: bytes, parity: bytes) -> None:
        """Refuse files that are not the ones this card names.

        Raises:
            StateCorrupt: another size or hash.
        """
        if len(model) != self.model_bytes or sha256_hex(model) != self.model_sha256:
            raise StateCorrupt(
                f"{MODEL} of {self.name} has {len(model)} bytes and SHA-256 {sha256_hex(model)}, "
                f"the card says {self.model_bytes} and {self.model_sha256}."
            )
        if sha256_hex(parity) != self.parity.sha256:
            raise StateCorrupt(
                f"{PARITY} of {self.name} has SHA-256 {sha256_hex(parity)}, "
                f"the card says {self.parity.sha256}."
            )


def read_variant(folder: Path) -> Card:
    """The card of a variant's folder, its other files checked against it.

    Raises:
        NotFound: a file is missing.
        StateCorrupt: a file is damaged, or is not the one that the card names.
        StateTooNew: the card is of another format.
    """
    files = {}
    for name in (CARD, MODEL, PARITY):
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no {folder / name}.", hint="`lepton variants build` makes it."
            ) from error
        except OSError as error:
            raise StateCorrupt(f"{folder / name} cannot be read: {error.strerror}.") from error
    card = Card.from_bytes(files[CARD])
    card.check_files(files[MODEL], files[PARITY])
    return card


def check_parity(card: Card, expected: NDArray[np.float32], got: NDArray[np.generic]) -> None:
    """Refuse a runtime whose outputs on the self-test rows are not those the variant was measured with.

    Args:
        card: whose tolerance holds.
        expected: "output" of parity.safetensors.
        got: what the runtime gave for its "input".

    Raises:
        StateCorrupt: another shape, numbers that are not finite, or a difference above the tolerance.
    """
    if got.shape != expected.shape:
        raise StateCorrupt(f"The self-test of {card.name} gave {got.shape}, expected {expected.shape}.")
    if not np.isfinite(got).all():
        raise StateCorrupt(f"The self-test of {card.name} gave numbers that are not finite.")
    difference = float(np.sqrt(np.mean((got.astype(np.float64) - expected) ** 2)))
    if difference > card.parity.tolerance:
        raise StateCorrupt(
            f"The self-test of {card.name} differs by {difference:g}, at most {card.parity.tolerance:g} is "
            "allowed.",
            hint="This processor computes the variant differently; offer this profile another one.",
        )
