"""The house rules hold: layers, packaging, what the repository may contain, what ``--help`` loads."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "lepton_fl": ".",
    "lepton_server": "server",
    "lepton_client": "client",
    "lepton_strategies": "strategies",
    "lepton_simulations": "simulations",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def tracked() -> list[Path]:
    listed = run("git", "ls-files", "-z")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    """The tracked files that are text, by their path in the repository."""
    found = {}
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw:
            found[str(path.relative_to(ROOT))] = raw.decode()
    return found


# --- layers -----------------------------------------------------------------------------------------------

# Contract -> (file, a line that breaks it).
PLANTED = {
    "Processes sit on strategies, strategies on the library": (
        "lepton_client/planted.py",
        "import lepton_server",
    ),
    "The library flows one way": ("lepton_fl/errors.py", "import lepton_fl.plan"),
    "The library knows neither Flower nor wires nor SQL": ("lepton_fl/plan.py", "import grpc"),
    "Keys and messages never load torch": ("lepton_fl/wire/planted.py", "import torch"),
    "Only the store speaks SQL": ("lepton_server/planted.py", "import sqlalchemy"),
    "Only the adapters and the strategies import Flower": ("lepton_simulations/planted.py", "import flwr"),
}


@pytest.fixture
def copy(tmp_path):
    """The packages' source, side by side."""
    for package, folder in PACKAGES.items():
        shutil.copytree(
            ROOT / folder / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def broken(folder: Path) -> set[str]:
    """The names of the contracts that do not hold in a copy."""
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = run(
        sys.executable,
        "-c",
        script,
        "--no-cache",
        "--no-logo",
        cwd=folder,
        PYTHONPATH=str(folder),
        COLUMNS="300",
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    names = {match[1] for match in re.finditer(r"^(.*) BROKEN\b", done.stdout, re.MULTILINE)}
    assert (done.returncode == 0) == (not names)
    return names


def test_the_layers_hold(copy):
    assert broken(copy) == set()


def test_every_contract_has_a_planted_violation():
    assert {contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]} == set(PLANTED)


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_violation_is_caught(copy, contract):
    name, line = PLANTED[contract]
    path = copy / name
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    assert contract in broken(copy)


def test_a_module_without_a_layer_is_caught(copy):
    (copy / "lepton_fl/planted.py").write_text("")
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = run(sys.executable, "-c", script, "--no-cache", cwd=copy, PYTHONPATH=str(copy))
    assert done.returncode != 0
    assert "planted" in done.stdout


def test_strategies_use_flowers_public_interface_only():
    allowed = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    for path in (ROOT / "strategies/lepton_strategies").rglob("*.py"):
        text = path.read_text()
        used = re.findall(r"^\s*(?:from|import)\s+(flwr[\w.]*)", text, re.MULTILINE)
        assert set(used) <= allowed, f"{path.name} imports {set(used) - allowed}"


# --- packaging --------------------------------------------------------------------------------------------


def test_the_wheel_has_our_five_packages():
    paths = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(path).name for path in paths} == set(PACKAGES)


def test_the_version_is_written_once():
    from lepton_fl import __version__

    assert __version__ == PROJECT["project"]["version"]
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_there():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_every_dependency_says_why():
    section = ""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        section = line if line.startswith("[") else section
        if section in ("[project]", "[project.optional-dependencies]") and re.match(r'    "[\w-]+', line):
            if "Classifier" in line or " :: " in line:
                continue
            assert re.search(r'",\s+# \S+', line), f"{line.strip()} does not say what it is for"


def test_every_dependency_has_a_lower_bound():
    """What pip may take is what has been tried, or newer; a development tool may be any."""
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [d for name in extras if name != "dev" for d in extras[name] if not d.startswith("lepton-fl[")]
    assert [d for d in PROJECT["project"]["dependencies"] + wanted if ">=" not in d] == []


@pytest.mark.parametrize(
    ("packages", "words", "good"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], "1 of 1 packages looked up, 0 with", True),
        ([{"name": "a", "skip_reason": "not found"}], "Not looked for", True),
        (
            [
                {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]},
                {"name": "b", "skip_reason": "not found"},
            ],
            "a 1: CVE-1, mended in 1.1\n1 of 2 packages looked up, 1 with",
            False,
        ),
    ],
)
def test_known_vulnerabilities_are_told_from_packages_that_nobody_knows(packages, words, good):
    spec = importlib.util.spec_from_file_location("advisories", ROOT / ".ci" / "advisories.py")
    advisories = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(advisories)
    said, well = advisories.verdict({"dependencies": packages})
    assert said.startswith(words)
    assert well is good


def test_every_entry_point_names_a_module_of_ours():
    for group in PROJECT["project"]["entry-points"].values():
        for value in group.values():
            assert value.split(".")[0] in PACKAGES


# --- what the repository contains -------------------------------------------------------------------------


def test_no_file_names_a_machine_or_a_registry():
    # Put together here, so that this file does not contain them.
    words = [
        "/" + "work/",
        "/" + "root/",
        "/home/" + "user",
        "py" + "pi.org",
        "pythonhosted" + ".org",
        "npmjs" + ".org",
    ]
    words += ["find-" + "links", "index-" + "url", "/opt/" + "pypi", "/opt/" + "wheels"]
    for name, text in texts().items():
        for word in words:
            assert word not in text, f"{name} contains {word}"


def test_no_private_key_and_nothing_large_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 2**20, f"{path} is larger than 1 MiB"
    for name, text in texts().items():
        assert "PRIVATE " + "KEY-----\nM" not in text, f"{name} contains a private key"


def test_no_unfinished_work_is_marked():
    words = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")
    for name, text in texts().items():
        assert not words.search(text), f"{name} contains {words.search(text)}"


def test_every_suppression_says_why():
    bare = re.compile(r"#\s*(noqa(:\s*[A-Z0-9, ]+)?|type: ignore(\[[\w, -]+\])?)\s*$", re.MULTILINE)
    found = [
        f"{name}: {match[0]}"
        for name, text in texts().items()
        if name.endswith(".py") and not name.startswith("lepton_fl/wire/v1/")
        for match in bare.finditer(text)
    ]
    assert not found


def test_links_between_documents_lead_somewhere():
    for name, text in texts().items():
        if not name.endswith(".md"):
            continue
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_generated_code_is_fresh():
    done = run("bash", "proto/generate", "--check", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_pages_are_fresh():
    done = run(sys.executable, ".ci/reference_docs.py", "--check")
    assert done.returncode == 0, done.stderr


# --- the command is light -----------------------------------------------------------------------------------

HEAVY = {"torch", "flwr", "scipy", "grpc", "google.protobuf", "sqlmodel", "sqlalchemy", "sklearn", "pyarrow"}
HEAVY |= {"matplotlib", "numpy", "fastapi", "cryptography", "psutil", "PIL", "alembic", "prometheus_client"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["task", "list"]])
def test_the_command_line_loads_nothing_heavy(arguments):
    script = (
        "import sys\nfrom lepton_fl.cli.app import run\n"
        f"assert run({arguments}) == 0\nprint()\nprint(*sys.modules)"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not HEAVY & loaded
    assert len(loaded) < 700  # a plain `import typer, rich` is about 250


@pytest.mark.parametrize("module", ["lepton_server.config", "lepton_client.config"])
def test_the_configuration_models_are_light(module):
    done = run(sys.executable, "-c", f"import sys, {module}\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())
