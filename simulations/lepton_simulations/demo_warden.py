"""Ends what a demonstration has started, should the demonstration itself be killed.

    python -m lepton_simulations.demo_warden FOLDER      # its standard input: a pipe from the demonstration

The demonstration keeps its end of the pipe open for as long as it lives; the system closes it, however that
ends. Its processes, and theirs, have FOLDER in their environment under ``MARK``: nobody else's are touched.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final

MARK: Final = "LEPTON_DEMO"  # environment variable: the fleet's folder
END_S: Final = 20.0  # patience with processes that were asked to end
LOOK_S: Final = 0.1


def marked(folder: str) -> list[int]:
    """The processes of the fleet in ``folder``."""
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end(folder: str, patience_s: float = END_S) -> None:
    """End the fleet in ``folder``, and remove what it kept."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        ends = time.monotonic() + patience_s
        for process in marked(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while marked(folder) and time.monotonic() < ends:
            time.sleep(LOOK_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(sys.argv[1])
