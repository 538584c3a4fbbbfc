"""The peers' own virtual environments, made once in a cache folder."""

import os
import subprocess
import sys
from pathlib import Path

TORCH = "torch>=2.13,<2.14"  # first and by itself: pip then takes a CPU build where one is at hand
PEERS = {"pfl": "pfl[pytorch]==0.6.0", "flower": "flwr[simulation]>=1.41,<1.42"}


class InstallFailed(Exception):
    """A peer could not be installed."""


def default_cache() -> Path:
    """Where environments are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lepton-fl" / "benchmarks"


def python_of(peer: str, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made where it is missing or has other versions.

    Raises:
        InstallFailed: says what pip said.
    """
    folder, wanted = cache / peer, f"{TORCH}\n{PEERS[peer]}\n"
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {PEERS[peer]} with {TORCH} into {folder} (about 1 GB) ...", flush=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    for requirement in wanted.split():
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise InstallFailed(said[-1] if said else f"{command[1:4]} ended with {done.returncode}")
