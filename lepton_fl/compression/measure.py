"""Run a variant as a device will: ONNX Runtime (or ExecuTorch), one thread, a process of its own.

A graph that takes the runtime down takes that process down and nothing else, and its peak memory is its own.
``python -m lepton_fl.compression.measure MODEL ROWS OUTPUTS`` is that process; it needs numpy and onnxruntime
only (for a .pte file executorch and torch), and prints one JSON object.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from lepton_fl.errors import DiskFull, TaskError
from lepton_fl.tasks.data import Array

LIMIT_S: Final = 1800.0  # a variant that takes longer than this for the evaluation set is of no use
PTE: Final = ".pte"
BATCH: Final = 256  # rows of the evaluation at a time
_NOT_WRITTEN: Final = 74  # exit code of the process whose answers did not fit the disk (EX_IOERR)
_WARM_UP, _REPEATS = 10, 5
_CALLS, _SECONDS = 200, 1.5  # of one repeat, at most


@dataclass(frozen=True, eq=False)
class Running:
    """What one process found out."""

    outputs: Array  # (N, ...) float32
    p50_ms: float  # of the repeat with the lowest median: the others were disturbed
    p95_ms: float
    peak_memory: int  # bytes


def run(model: Path, rows: Path, folder: Path) -> Running:
    """Run every row through a model.

    Args:
        model: an .onnx file, or a .pte file.
        rows: an .npy file, (N, ...).
        folder: for the outputs; the file is removed again.

    Raises:
        TaskError: the runtime refused the model, died of it, or gave numbers that are not finite.
    """
    outputs = folder / f"outputs-{os.getpid()}.npy"
    command = [sys.executable, "-m", __spec__.name, str(model), str(rows), str(outputs)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        done = subprocess.run(  # noqa: S603 - our own module, by this interpreter
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, **one_thread},
        )
        if done.returncode == _NOT_WRITTEN:
            raise DiskFull(
                f"No space was left in {folder} for the answers of {model.parent.name}.",
                hint="Free some space, then start the build again: it goes on.",
            )
        if done.returncode:
            runtime = "ExecuTorch" if model.suffix == PTE else "ONNX Runtime"
            raise TaskError(f"{runtime} does not run it: {_why(done)}")
        found = json.loads(done.stdout)
        answers = np.load(outputs, allow_pickle=False)
    except subprocess.TimeoutExpired as error:
        raise TaskError(f"It took more than {LIMIT_S:g} s to run the evaluation set.") from error
    finally:
        outputs.unlink(missing_ok=True)
    if not np.isfinite(answers).all():
        raise TaskError("It answers with numbers that are not finite.")
    return Running(answers, found["p50_ms"], found["p95_ms"], found["peak_memory"])


def processor() -> str:
    """The machine that measures, for the card."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {platform.machine()}" if names else platform.machine()


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}."
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1][:400] if lines else f"exit code {done.returncode}."


# --- in the process of its own ------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Measure one model; see the module."""
    model, path, outputs = map(Path, arguments)
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    single = [np.ascontiguousarray(rows[i : i + 1]) for i in range(min(len(rows), 64))]
    before = _start_of_peak()
    batch = 1 if model.suffix == PTE else BATCH
    answer = _program(model) if model.suffix == PTE else _session(model)
    p50, p95 = _latency(answer, single)
    peak = max(0, _status("VmHWM") - before)
    parts = [answer(np.ascontiguousarray(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    try:
        np.save(outputs, np.concatenate(parts).astype(np.float32), allow_pickle=False)
    except OSError:
        sys.exit(_NOT_WRITTEN)
    sys.stdout.write(json.dumps({"p50_ms": p50, "p95_ms": p95, "peak_memory": peak}))


def _session(model: Path) -> Callable[[Array], Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})[0]


def _program(model: Path) -> Callable[[Array], Array]:
    import torch
    from executorch.runtime import Runtime

    torch.set_num_threads(1)
    method = Runtime.get().load_program(model).load_method("forward")

    def answer(rows: Array) -> Array:
        found: Array = method.execute([torch.from_numpy(rows)])[0].numpy().copy()
        return found

    return answer


def _latency(answer: Callable[[Array], Array], single: list[Array]) -> tuple[float, float]:
    """Median and 95th percentile in ms, one row at a time."""
    for row in single[:_WARM_UP]:
        answer(row)
    best = (float("inf"), float("inf"))
    for _ in range(_REPEATS):
        times: list[float] = []
        ends = perf_counter() + _SECONDS
        while len(times) < _CALLS and (perf_counter() < ends or len(times) < _WARM_UP):
            row = single[len(times) % len(single)]
            began = perf_counter()
            answer(row)
            times.append(1e3 * (perf_counter() - began))
        best = min(best, (float(np.median(times)), float(np.percentile(times, 95))))
    return best


def _start_of_peak() -> int:
    """Forget the peak so far; return the bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _status(key: str) -> int:
    """Bytes, from /proc; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


if __name__ == "__main__":
    main(sys.argv[1:])
