"""Run in a bare environment where the wheel is installed: check_wheel.py WHEEL.

Its top-level names are exactly our packages, every module can be imported from there, and the command answers
without having loaded anything heavy.
"""

import importlib
import pkgutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

PACKAGES = {"lepton_fl", "lepton_server", "lepton_client", "lepton_strategies", "lepton_simulations"}
HEAVY = {"torch", "flwr", "scipy", "grpc", "sqlmodel", "sqlalchemy", "sklearn", "pyarrow", "matplotlib"}


def top_level_names(wheel: str) -> set[str]:
    """What the wheel puts into site-packages, apart from its own metadata."""
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def import_everything() -> int:
    """Import every module of every package; return how many there are."""
    site = Path(sysconfig.get_paths()["purelib"])
    count = 0
    for package in sorted(PACKAGES):
        module = importlib.import_module(package)
        assert Path(str(module.__file__)).is_relative_to(site), f"{package} does not come from the wheel"
        for info in pkgutil.walk_packages(module.__path__, package + "."):
            if not info.name.endswith(".__main__"):
                importlib.import_module(info.name)
                count += 1
    return count


def loaded_by_help() -> set[str]:
    """The heavy packages that ``lepton --help`` loads."""
    script = (
        "import sys\n"
        "from lepton_fl.cli.app import run\n"
        "assert run(['--help']) == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


def main() -> None:
    """Say what was checked, or fail."""
    names = top_level_names(sys.argv[1])
    assert names == PACKAGES, f"top-level names of the wheel are {sorted(names)}, not {sorted(PACKAGES)}"
    heavy = loaded_by_help()
    assert not heavy, f"lepton --help loads {sorted(heavy)}"
    lepton = Path(sys.executable).with_name("lepton")
    shown = subprocess.run([str(lepton), "--help"], capture_output=True, text=True, check=True).stdout
    assert "Not available" not in shown, f"a role cannot be loaded:\n{shown}"
    print(f"{Path(sys.argv[1]).name}: {import_everything()} modules imported, lepton --help is light")


if __name__ == "__main__":
    main()
