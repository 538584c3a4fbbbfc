"""From a global model and a recipe to a folder of variants: made, measured, gated.

    build = Build(model, recipe, profiles, Path("variants/digits"))
    report = build.run()

Rules:

* One candidate after the other; a card is written last, so a folder with a card is whole. Killed at any point
  and started again, a build keeps what is whole, goes on with the training under way at its last epoch, and
  ends with the same files but for times.
* What a variant depends on has one digest, in its card: another model, step or transfer set makes it anew;
  other profiles only judge it again.
* A candidate that cannot be made, or that takes the runtime down, is a failure in the report; the others go
  on.

Importing this module imports torch and onnx: it is for a process of its own, never the coordinator's.
"""

import hashlib
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import nn

from lepton_fl.compression import graph, measure
from lepton_fl.compression.card import (
    CARD,
    MODEL,
    PARITY,
    PROGRAM,
    Card,
    ExecuTorch,
    Lineage,
    Measured,
    Parity,
    Transfer,
    read_variant,
)
from lepton_fl.compression.catalogue import REPORT, Failure, Report, check_program, pareto
from lepton_fl.compression.federated import read_taught
from lepton_fl.compression.fit import Lesson, OnStep, answers_of, fit
from lepton_fl.compression.profiles import Profile, Profiles, Reference, judge
from lepton_fl.compression.quantise import quantise
from lepton_fl.compression.recipe import OPSET, Candidate, QuantiseSpec, Recipe, Training, suggested
from lepton_fl.compression.source import (
    GlobalModel,
    evaluation_rows,
    read_tensors,
    taught_on_devices,
    weights_file,
)
from lepton_fl.compression.students import pruned, student, with_rounding, without_rounding, zero_masks
from lepton_fl.compression.transfer import TransferRows, describe, generated_rows, proxy_rows
from lepton_fl.errors import ConfigError, NotFound, RunError, StateError, TaskError
from lepton_fl.files import canonical_json, lock_folder, make_private_folder, remove, sha256_hex, write_atomic
from lepton_fl.tasks import Classification, Dataset
from lepton_fl.tasks.data import Array

BASELINE: Final = "fp32"  # the global model itself, always made and measured first
_VERSION: Final = 1  # of what is computed; part of every digest
_WIRE_LEVEL: Final = 19  # of zstd
_INTEGER: Final = ("static", "dynamic")  # whose kernels may differ between processors
_BATCH: Final = 1024  # rows whose metrics are counted at a time


@dataclass(frozen=True, eq=False)
class _Made:
    """A trained model on its way to a graph."""

    module: nn.Module
    seconds: float


@dataclass(eq=False)
class Build:
    """One build; ``run`` may be called again after a crash, with the same arguments."""

    model: GlobalModel
    recipe: Recipe
    profiles: Sequence[Profile] = Profiles().profiles
    folder: Path = Path("variants")
    data: Path | None = None  # folder of the task's published data
    ensemble: Sequence[GlobalModel] = ()  # further teachers
    in_service: Path | None = None  # folder of the variant that devices run now
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recipe_sha256: str = ""  # of its text; empty = of its content
    on_step: OnStep = lambda what: None
    on_done: Callable[[str], None] = lambda name: None

    def run(self) -> Report:
        """Make what is not there yet, judge everything, and write the report.

        Raises:
            StateLocked: another build works in the folder.
            DiskFull: no space was left; what is whole stays, and the build can go on.
            DataError: evaluation or proxy rows cannot be used.
            ConfigError: the recipe asks for what this task or machine does not have.
        """
        make_private_folder(self._work)
        with lock_folder(self.folder):
            found = [self._attempt(candidate) for candidate in self.candidates]
            cards = [card for card in found if isinstance(card, Card)]
            report = Report(
                task=self.model.reference,
                run=self.model.run,
                global_sha256=self.model.sha256,
                global_metrics=dict(self._reference.metrics),
                global_recall=self._reference.recall,
                transfer=self._transfer if any(c.learns for c in self.candidates) else None,
                names=tuple(card.name for card in cards),
                pareto=pareto(cards),
                failures=tuple(failure for failure in found if isinstance(failure, Failure)),
            )
            write_atomic(self.folder / REPORT, canonical_json(report.to_json()))
            remove(self._rows_file)
        return report

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The baseline, then those of the recipe or, where it names none, those the operators suggest."""
        listed = self.recipe.candidates or suggested(
            graph.operators(self._exported[0]), transfer=self.recipe.transfer.source != "none"
        )
        if any(candidate.name == BASELINE and candidate.words() for candidate in listed):
            raise ConfigError(f"The candidate {BASELINE!r} is the global model itself and takes no steps.")
        if any(candidate.executorch for candidate in listed):
            from lepton_fl.compression.pte import refuse_missing

            refuse_missing()
        return (Candidate(name=BASELINE), *(c for c in listed if c.name != BASELINE))

    def _attempt(self, candidate: Candidate) -> Card | Failure:
        self.on_step(candidate.name)
        folder = self.folder / candidate.name
        digest = self._digest(candidate)
        card = _whole(folder, digest)
        try:
            if card is None:
                remove(folder / CARD)  # from here on the folder is not whole
                card = self._make(candidate, digest)
        except (TaskError, RunError) as error:
            self.on_done(candidate.name)
            return Failure(name=candidate.name, reason=str(error))
        judged = card.model_copy(
            update={"gate": tuple(judge(p, card, self._reference) for p in self.profiles)}
        )
        if judged != card or not (folder / CARD).exists():
            write_atomic(folder / CARD, judged.to_bytes())
        self.on_done(candidate.name)
        return judged

    # --- what everything is held against ------------------------------------------------------------------

    @property
    def _work(self) -> Path:
        return self.folder / "work"

    @cached_property
    def _teacher(self) -> nn.Module:
        return self.model.module()

    @cached_property
    def _labelled(self) -> Dataset:
        return evaluation_rows(self.model, self.recipe.evaluation, self.data)

    @cached_property
    def _aside(self) -> int:
        """First rows of the evaluation set, for static ranges where there are no others: not measured."""
        if self.recipe.transfer.source != "none":
            return 0
        steps = [c.quantise for c in self.recipe.candidates] or [QuantiseSpec(kind="static")]
        wanted = [step.calibration_rows for step in steps if step and step.kind == "static"]
        return min(max(wanted, default=0), len(self._labelled) // 10)

    @cached_property
    def _evaluation(self) -> Dataset:
        return self._labelled.take(np.arange(self._aside, len(self._labelled)))

    @cached_property
    def _calibration(self) -> Array:
        return self._rows.x if self._aside == 0 and self._learns else self._labelled.x[: max(1, self._aside)]

    @cached_property
    def _answers(self) -> Array:
        """(M, ...) the global model's outputs on the evaluation set."""
        return answers_of([self._teacher], self._evaluation.x, torch.device("cpu"))

    @cached_property
    def _reference(self) -> Reference:
        metrics, recall = self._score(self._answers)
        served = None
        if self.in_service is not None:
            read_variant(self.in_service)
            served = self._score(self._run(self.in_service / MODEL).outputs)[0]
        return Reference(metrics, recall, served, platform.machine())

    @cached_property
    def _exported(self) -> tuple[onnx.ModelProto, float]:
        """The graph of the global model, and its largest difference from torch."""
        made = graph.export(self._teacher, self._evaluation.x)
        return made, graph.compare(made, self._teacher, self._parity_rows)

    @property
    def _parity_rows(self) -> Array:
        return self._evaluation.x[: self.recipe.evaluation.parity_rows]

    # --- what is learnt from ------------------------------------------------------------------------------

    @property
    def _learns(self) -> bool:
        return self.recipe.transfer.source != "none"

    @cached_property
    def _rows(self) -> TransferRows:
        spec = self.recipe.transfer
        if spec.source == "proxy":
            return proxy_rows(spec, self.model.task)
        path = self._work / f"generated-{self._key({'generator': spec.generator.to_json()})}.safetensors"
        if path.exists():
            arrays, said = read_tensors(path)
            return TransferRows(arrays["x"], None, float(said["seconds"]))
        made = generated_rows(
            spec.generator,
            self.model.task,
            [self._teacher],
            self._evaluation.x,
            seed=self.recipe.seed,
            device=self.device,
            on_step=self.on_step,
        )
        self._teacher.cpu()
        _save(path, {"x": made.x}, made.seconds)
        return made

    @cached_property
    def _transfer(self) -> Transfer:
        answers = answers_of([self._teacher], self._rows.x, self.device)
        self._teacher.cpu()
        classes = self.model.task.contract.num_classes > 0
        return describe(self._rows, self.recipe.transfer, answers, self._answers, classes=classes)

    @cached_property
    def _rows_sha256(self) -> str:
        return _arrays_sha256(self._rows.x, *([] if self._rows.labels is None else [self._rows.labels]))

    def _lesson(self, teachers: str) -> Lesson:
        taught = (
            [self._teacher, *(m.module() for m in self.ensemble)]
            if teachers == "ensemble"
            else [self._teacher]
        )
        answers = answers_of(taught, self._rows.x, self.device)
        self._teacher.cpu()
        return Lesson.of(self._rows.x, answers, self._rows.labels, self.device)

    # --- one candidate ------------------------------------------------------------------------------------

    def _make(self, candidate: Candidate, digest: str) -> Card:
        folder = self.folder / candidate.name
        make_private_folder(folder)
        made = self._train(candidate)
        began = perf_counter()
        float_graph, torch_error = self._graph(candidate, made.module)
        final = float_graph
        if candidate.quantise:
            final = quantise(float_graph, candidate.quantise, self._calibration)
        data = final.SerializeToString()
        seconds = made.seconds + perf_counter() - began
        write_atomic(folder / MODEL, data)
        self.on_step(f"{candidate.name}: measuring")
        running = self._run(folder / MODEL)
        expected = running.outputs[: len(self._parity_rows)]
        parity = _encode({"input": self._parity_rows, "output": expected})
        write_atomic(folder / PARITY, parity)
        spec = candidate.quantise
        scale = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
        program = self._program(candidate, made.module) if candidate.executorch else None
        inputs, outputs = graph.interface(final)
        return Card(
            name=candidate.name,
            task=self.model.reference,
            task_version=self.model.task.version,
            opset=graph.opset(final),
            model_sha256=sha256_hex(data),
            model_bytes=len(data),
            input=inputs,
            output=outputs,
            steps=candidate.words(),
            predicted_bytes=self._predicted(candidate),
            lineage=self._lineage(candidate, digest),
            measured=self._measured(candidate, made.module, float_graph, data, running, seconds),
            parity=Parity(
                sha256=sha256_hex(parity),
                rows=len(expected),
                tolerance=(0.1 if spec and spec.kind in _INTEGER else 0.01) * scale + 1e-6,
                torch_error=torch_error,
            ),
            executorch=program,
        )

    def _program(self, candidate: Candidate, module: nn.Module) -> ExecuTorch:
        """The variant for the other runtime, run on all rows there; one in float32 must answer as torch does.

        Raises:
            TaskError: it cannot be made or run, or it answers something else.
        """
        from lepton_fl.compression.pte import lower

        self.on_step(f"{candidate.name}: lowering")
        path = self.folder / candidate.name / PROGRAM
        data = lower(module, candidate.quantise, self._calibration)
        write_atomic(path, data)
        running = self._run(path)
        expected = answers_of([module], self._evaluation.x, torch.device("cpu"))
        error = float(np.abs(running.outputs - expected).mean())
        if candidate.quantise is None and error > 1e-3 * float(np.abs(expected).mean()) + 1e-6:
            raise TaskError(f"The ExecuTorch program differs from torch by {error:g} in the mean.")
        return ExecuTorch(
            sha256=sha256_hex(data),
            bytes=len(data),
            metrics=self._score(running.outputs)[0],
            agreement=self._agreement(running.outputs),
            torch_error=error,
            p50_ms=running.p50_ms,
            p95_ms=running.p95_ms,
            peak_memory=running.peak_memory,
        )

    def _train(self, candidate: Candidate) -> _Made:
        """The module after distilling, pruning and quantisation-aware training."""
        example, seed = self._evaluation.x[:8], self.recipe.seed
        module, seconds = self._teacher, 0.0
        done: dict[str, Any] = {}
        if distil := candidate.distil:
            done["distil"] = distil.to_json()
            fresh = student(distil.student, self.model.task, self._teacher, example, seed)
            if distil.weights is not None:
                done["weights"] = _file_sha256(distil.weights)
                self._fill(fresh, distil.weights)
            module, seconds = self._stage(candidate, done, fresh, distil, seconds, teachers=distil.teachers)
        if prune := candidate.prune:
            done["prune"] = prune.to_json()
            smaller, masks = pruned(module, prune, example)
            module, seconds = self._stage(candidate, done, smaller, prune, seconds, masks=masks)
        if candidate.quantise and (aware := candidate.quantise.aware):
            done["aware"] = candidate.quantise.to_json()
            bits, activations = candidate.quantise.weight_bits, candidate.quantise.kind in _INTEGER
            masks = zero_masks(module) if candidate.prune else {}
            rounding = with_rounding(module, bits, activations=activations)
            masks = {_parametrised(name, rounding): mask for name, mask in masks.items()}
            trained, seconds = self._stage(candidate, done, rounding, aware, seconds, masks=masks)
            module = without_rounding(trained, module)
        return _Made(module, seconds)

    def _fill(self, module: nn.Module, path: Path) -> None:
        """Give a student the weights that the devices have trained, if this global model taught them."""
        taught = read_taught(weights_file(path))
        ours = self._teacher.state_dict()
        if any(not np.array_equal(ours[name].numpy(), array) for name, array in taught.teacher.items()):
            raise TaskError(
                f"The student in {path} was taught by another model than {self.model.sha256[:12]}.",
                hint="Build from the model that the distillation run named as its teacher.",
            )
        try:
            module.load_state_dict({name: torch.from_numpy(array) for name, array in taught.student.items()})
        except RuntimeError as error:
            raise TaskError(
                f"The student in {path} is of another architecture than the recipe's: {error}",
                hint="Declare the student that the distillation task was made with.",
            ) from error

    def _stage(
        self,
        candidate: Candidate,
        done: dict[str, Any],
        module: nn.Module,
        how: Training,
        seconds: float,
        *,
        teachers: str = "global",
        masks: dict[str, torch.Tensor] | None = None,
    ) -> tuple[nn.Module, float]:
        """Train a module, or take what an earlier build or candidate has trained."""
        if not how.epochs:
            return module, seconds
        key = self._key(
            {"steps": done, "rows": self._rows_sha256, "ensemble": self._ensemble_names(teachers)}
        )
        path = self._work / f"trained-{key}.safetensors"
        if not path.exists():
            began = perf_counter()
            lesson = self._lesson(teachers)
            there = {name: mask.to(self.device) for name, mask in (masks or {}).items()}
            fit(
                module.to(self.device),
                self.model.task,
                lesson,
                how,
                seed=self.recipe.seed,
                checkpoint=self._work / f"epoch-{key}.safetensors",
                masks=there,
                on_step=lambda what: self.on_step(f"{candidate.name}: {what}"),
            )
            state = {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()}
            _save(path, state, perf_counter() - began)
            remove(self._work / f"epoch-{key}.safetensors")
        arrays, said = read_tensors(path)
        module.cpu().load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return module.eval(), seconds + float(said["seconds"])

    def _graph(self, candidate: Candidate, module: nn.Module) -> tuple[onnx.ModelProto, float]:
        if module is self._teacher:
            return self._exported
        self.on_step(f"{candidate.name}: exporting")
        made = graph.export(module, self._evaluation.x)
        return made, graph.compare(made, module, self._parity_rows)

    def _predicted(self, candidate: Candidate) -> float:
        """N/k by quantising and pruning, N/k^2 where a student was distilled first."""
        whole = len(self._exported[0].SerializeToString())
        return whole / candidate.factor ** (2 if candidate.distil else 1)

    def _lineage(self, candidate: Candidate, digest: str) -> Lineage:
        return Lineage(
            run=self.model.run,
            round=self.model.round,
            global_sha256=self.model.sha256,
            journal_sha256=self.model.journal_sha256,
            privacy=self.model.privacy,
            candidate_sha256=digest,
            recipe_sha256=self.recipe_sha256 or self.recipe.digest(),
            transfer=self._learnt_from(candidate),
        )

    def _learnt_from(self, candidate: Candidate) -> Transfer | None:
        if candidate.distil is not None and candidate.distil.weights is not None:
            return taught_on_devices(candidate.distil.weights)
        return self._transfer if candidate.learns else None

    def _measured(
        self,
        candidate: Candidate,
        module: nn.Module,
        float_graph: onnx.ModelProto,
        data: bytes,
        running: measure.Running,
        seconds: float,
    ) -> Measured:
        spec = candidate.quantise
        weights = [t for t in module.state_dict().values() if t.is_floating_point()]
        count, macs = sum(t.numel() for t in weights), graph.multiply_adds(float_graph)
        stored = spec.weight_bits if spec else 32
        computed = stored if spec and spec.kind in (*_INTEGER, "fp16") else 32
        metrics, recall = self._score(running.outputs)
        return Measured(
            wire_bytes=_wire_bytes(data),
            parameters=count,
            nonzero=sum(int((t != 0).sum()) for t in weights),
            macs=macs,
            energy_uj=graph.energy_uj(macs, count * stored // 8, computed),
            energy_model=graph.ENERGY_MODEL,
            rows=len(self._evaluation),
            metrics=metrics,
            recall=recall,
            agreement=self._agreement(running.outputs),
            deviation=float(np.abs(running.outputs - self._answers).mean()),
            p50_ms=running.p50_ms,
            p95_ms=running.p95_ms,
            peak_memory=running.peak_memory,
            build_seconds=seconds,
            processor=measure.processor(),
        )

    # --- measuring ----------------------------------------------------------------------------------------

    @property
    def _rows_file(self) -> Path:
        return self._work / "evaluation.npy"

    def _run(self, model: Path) -> measure.Running:
        if not self._rows_file.exists():
            _save_rows(self._rows_file, self._evaluation.x)
        running = measure.run(model, self._rows_file, self._work)
        if running.outputs.shape != self._answers.shape:
            raise TaskError(f"It answers {running.outputs.shape}, the global model {self._answers.shape}.")
        return running

    def _score(self, outputs: Array) -> tuple[dict[str, float], tuple[float, ...]]:
        """The task's figures on the evaluation set, and the recall of each class."""
        metrics, targets = self.model.task.metrics, self._evaluation.y
        total = metrics.zero()
        for first in range(0, len(outputs), _BATCH):
            part = slice(first, first + _BATCH)
            total = metrics.add(total, metrics.count(outputs[part], targets[part]))
        recall: tuple[float, ...] = ()
        if isinstance(metrics, Classification):
            recall = tuple(map(float, metrics.per_class(total)["recall"]))
        return metrics.summarise(total), recall

    def _agreement(self, outputs: Array) -> float | None:
        if not self.model.task.contract.num_classes:
            return None
        return float((outputs.argmax(-1) == self._answers.argmax(-1)).mean())

    # --- digests ------------------------------------------------------------------------------------------

    def _digest(self, candidate: Candidate) -> str:
        """Of everything a variant and its figures depend on."""
        body = candidate.to_json()
        body.pop("name")
        parts = {"candidate": body, "opset": OPSET, "evaluation": self._evaluation_sha256}
        if candidate.learns:
            teachers = candidate.distil.teachers if candidate.distil else "global"
            parts |= {"rows": self._rows_sha256, "ensemble": self._ensemble_names(teachers)}
        if candidate.distil and candidate.distil.weights:
            parts["weights"] = _file_sha256(candidate.distil.weights)
        if candidate.quantise and candidate.quantise.kind == "static":
            parts["calibration"] = _arrays_sha256(self._calibration)
        return sha256_hex(canonical_json(self._context() | parts))

    @cached_property
    def _evaluation_sha256(self) -> str:
        return _arrays_sha256(self._evaluation.x, self._evaluation.y, self._parity_rows)

    def _context(self) -> dict[str, Any]:
        task = self.model.task
        return {
            "version": _VERSION,
            "task": self.model.reference,
            "task_version": task.version,
            "global": self.model.sha256,
            "seed": self.recipe.seed,
        }

    def _ensemble_names(self, teachers: str) -> list[str]:
        return [m.sha256 for m in self.ensemble] if teachers == "ensemble" else []

    def _key(self, parts: dict[str, Any]) -> str:
        return sha256_hex(canonical_json(self._context() | parts))[:32]


def best(cards: Sequence[Card], profile: str) -> Card | None:
    """Of those a profile may get, the smallest; among equals the faster."""
    offered = [card for card in cards if card.offered_to(profile)]
    return min(offered, key=lambda card: (card.model_bytes, card.measured.p50_ms), default=None)


def _whole(folder: Path, digest: str) -> Card | None:
    """The card of a variant that needs not be made again."""
    with suppress(NotFound, StateError):
        card = read_variant(folder)
        check_program(folder, card)
        if card.lineage.candidate_sha256 == digest:
            return card
    return None


def _file_sha256(path: Path) -> str:
    try:
        return sha256_hex(weights_file(path).read_bytes())
    except OSError as error:
        raise NotFound(f"There is no file {path}.", hint="Check distil.weights in the recipe.") from error


def _parametrised(name: str, rounding: nn.Module) -> str:
    """The name that a weight has while it is trained with rounding."""
    layer, _, weight = name.rpartition(".")
    inner = f"{layer}.parametrizations.{weight}.original".lstrip(".")
    return inner if inner in dict(rounding.named_parameters()) else name


def _encode(arrays: dict[str, Array]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _save(path: Path, arrays: dict[str, Array], seconds: float) -> None:
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(whole, {"seconds": f"{seconds:.3f}"}))


def _save_rows(path: Path, rows: Array) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _arrays_sha256(*arrays: Array) -> str:
    """SHA-256 of types, shapes and numbers."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(f"{array.dtype.str}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def _wire_bytes(data: bytes) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=_WIRE_LEVEL).compress(data))
