"""Tasks are found by name, and nothing else is imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lepton_fl.errors import TaskError
from lepton_fl.tasks import Task, installed_tasks, load_task, resolve

ROOT = Path(__file__).parents[3]


def write_module(tmp_path, monkeypatch, name: str, text: str) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_every_installed_task_loads_by_both_names():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lepton.tasks"]
    assert listed.items() <= installed_tasks().items()
    for short, reference in listed.items():
        task = load_task(short)
        assert isinstance(task, Task)
        assert task.name == short
        assert load_task(reference) is task
        assert resolve(short) == resolve(reference) == reference


def test_listing_and_loading_import_no_torch():
    script = (
        "import sys; import lepton_fl.tasks as t; names = t.installed_tasks(); "
        "[t.load_task(n) for n in names]; "
        "heavy = {'torch', 'sklearn', 'pyarrow', 'PIL', 'scipy', 'flwr'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_short_name_suggests_the_nearest():
    with pytest.raises(TaskError, match=r"no task 'digit'. Did you mean 'digits'") as caught:
        load_task("digit")
    assert "mnist_by_writer" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["", "a b:c", "os.system", "os:", ":x", "../evil:x", "a:b.c", "a:b()", "a..b:c"]
)
def test_malformed_names_are_refused(name):
    with pytest.raises(TaskError, match="There is no task"):
        load_task(name)


def test_unknown_module_and_attribute():
    with pytest.raises(TaskError, match=r"no module 'lepton_fl.tasks.image'. Did you mean"):
        load_task("lepton_fl.tasks.image:digits")
    with pytest.raises(TaskError, match=r"has no 'digit'. Did you mean 'digits'"):
        load_task("lepton_fl.tasks.images:digit")
    with pytest.raises(TaskError, match="is a type, not a Task"):
        load_task("lepton_fl.tasks.images:Task")


def test_allow_list_is_checked_before_the_import(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "lepton_probe_evil", "raise SystemExit('imported')")
    with pytest.raises(TaskError, match="not among those allowed here: digits"):
        load_task("lepton_probe_evil:task", allowed=["digits"])
    assert "lepton_probe_evil" not in sys.modules


def test_allow_list_takes_either_name():
    full = resolve("digits")
    assert load_task(full, allowed={"digits"}) is load_task("digits", allowed={full})


def test_a_failing_module_is_named(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "lepton_probe_bad", "1 / 0")
    with pytest.raises(TaskError, match="lepton_probe_bad:task' failed: ZeroDivisionError"):
        load_task("lepton_probe_bad:task")


def test_a_missing_dependency_is_named(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "lepton_probe_dep", "import not_installed_anywhere")
    with pytest.raises(TaskError, match="needs the module 'not_installed_anywhere'"):
        load_task("lepton_probe_dep:task")
