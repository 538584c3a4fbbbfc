"""Run measurements: ``python benchmarks [--list | NAME ARGUMENTS...]``.

By path, as ``-m benchmarks`` may find the package of that name that opacus installs.

Without a name all of them run, one after the other. Those that need real data take the folder from
``LEPTON_DATA`` and are left out, by name, when it is not set.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("_")}


def run(name: str, arguments: list[str]) -> int:
    """Run one measurement in a process of its own; return its exit code."""
    print(f"--- {name} {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, str(SCRIPTS[name]), *arguments], check=False).returncode


def run_all() -> int:
    """Run all; return how many failed."""
    failed = 0
    for name, path in SCRIPTS.items():
        data = os.environ.get("LEPTON_DATA", "")
        if '"--data"' not in path.read_text():
            failed += run(name, []) != 0
        elif data:
            failed += run(name, ["--data", data]) != 0
        else:
            print(f"--- {name}: left out, needs LEPTON_DATA=FOLDER")
    return failed


def main(arguments: list[str]) -> int:
    """The exit code."""
    if arguments == ["--list"]:
        for name, path in SCRIPTS.items():
            print(f"{name:20} {path.read_text().lstrip().splitlines()[0].strip(chr(34))}")
        return 0
    if not arguments:
        return run_all()
    if arguments[0] not in SCRIPTS:
        print(f"there is no measurement {arguments[0]!r}; there are: {', '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
