"""Runs one measurement in processes of its own and reads what it recorded."""

import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from _fleet import tree
from numpy.typing import NDArray

BENCHMARKS = Path(__file__).parent.parent
MARK = "LEPTON_BENCHMARK"  # in the environment of all that is started, so that it can be found again
PATIENCE_S = 1800.0
SAMPLE_S = 0.05


class RunFailed(Exception):
    """A measurement ended badly; says how."""


@dataclass(frozen=True)
class Outcome:
    """One measured run."""

    seconds: tuple[float, ...]  # of each round after the first
    first_s: float  # from the start of the process to the end of the first round
    first_without_interpreter_s: float  # the same from the first line of its own code
    total_s: float  # from the start of the process to the end of the last round
    model: NDArray[np.float32]  # (P,) at the end, or (rounds, P)
    peak_mb: float | None  # of the process and its children, shared memory shared out
    load: float  # the machine's load average at the end, the run's own share included

    @property
    def rounds(self) -> int:
        """All of them, the first as well."""
        return len(self.seconds) + 1

    @property
    def round_s(self) -> float:
        """The median."""
        return statistics.median(self.seconds)


def start(
    command: Sequence[object], folder: Path, *, memory: bool = False, one_thread: bool = True
) -> Outcome:
    """Run a command that leaves its record in ``folder``.

    Args:
        command: program and arguments.
        folder: is made; takes the record and the output.
        memory: look at the memory all the time, which costs a little speed.
        one_thread: tell numerical libraries to use one thread per process, which helps the peers; ours has to
            see to that itself, as it must on a user's machine.

    Raises:
        RunFailed: it ended with an error, or not in time.
    """
    folder.mkdir(parents=True)
    mark = secrets.token_hex(8)
    with open(folder / "log", "wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(folder, mark, one_thread),
            cwd=folder,
        )
    try:
        with _peak(process.pid, memory) as peak:
            code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"not done within {PATIENCE_S:g} s") from error
    finally:
        _end(process, mark)
    if code or not (folder / "record.json").exists():
        tail = (folder / "log").read_text(errors="replace").strip().splitlines()[-12:]
        raise RunFailed(f"ended with {code}:\n" + "\n".join(tail))
    record = json.loads((folder / "record.json").read_text())
    commits = record["commits"]
    return Outcome(
        seconds=tuple(b - a for a, b in itertools.pairwise(commits)),
        first_s=commits[0] - began,
        first_without_interpreter_s=commits[0] - record["began"],
        total_s=commits[-1] - began,
        model=np.load(folder / "model.npy"),
        peak_mb=peak[0] if memory else None,
        load=os.getloadavg()[0],
    )


def gflops(threads: int) -> float:
    """The machine's speed at large matrix products."""
    command = [sys.executable, "-m", "_simulation.limits", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    return float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def _environment(folder: Path, mark: str, one_thread: bool) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    return {
        **os.environ,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])),
        **threads,
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": str(folder.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def _peak(pid: int, wanted: bool) -> Iterator[list[float]]:
    """The largest sum of PSS seen so far, in MB, of a process and its children."""
    peak, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], sum(map(_pss_mb, tree(pid))))

    thread = threading.Thread(target=look, daemon=True)
    if wanted:
        thread.start()
    try:
        yield peak
    finally:
        done.set()
        if wanted:
            thread.join()


def _pss_mb(process: psutil.Process) -> float:
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0.0
    _, found, rest = text.partition("\nPss:")
    return int(rest.split()[0]) / 1024 if found else 0.0


def _end(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """End the process and whatever it has left behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for other in psutil.process_iter():
        try:
            if other.environ().get(MARK) == mark:
                other.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
