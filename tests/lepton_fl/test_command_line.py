"""The frame of the command line: exit codes, one JSON document, one readable error block."""

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import typer

from lepton_fl import __version__, errors
from lepton_fl.cli import app as frame
from lepton_fl.cli import doctor, output
from lepton_fl.cli.output import Format


@pytest.fixture
def run(capsys, monkeypatch):
    """Run one command line: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith("LEPTON_")]:
        monkeypatch.delenv(name)

    def run(*argv: object) -> tuple[int, str, str]:
        code = frame.run([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def plugin(monkeypatch):
    """Let the command find only these roles: name -> app, or the exception that loading it raises."""

    def plugin(**roles) -> None:
        class Entry(EntryPoint):
            def load(self):
                found = roles[self.name]
                if isinstance(found, Exception):
                    raise found
                return found

        entries = [Entry(name, "some.module:app", frame.GROUP) for name in roles]
        monkeypatch.setattr(frame, "entry_points", lambda group: entries)

    return plugin


def failing(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    return app


ALL_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.LeptonError)
    and kind not in (errors.UpdateRejected, errors.ReleaseRefused)
]


def test_version(run):
    assert run("--version") == (0, f"lepton {__version__}\n", "")


def test_help_without_arguments(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "doctor" in out


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_an_expected_error_is_one_block_with_its_exit_code(run, plugin, kind):
    plugin(x=failing(kind("port=70000 exceeds 65535", hint="choose a lower one")))
    code, out, err = run("fail")
    assert (code, out) == (kind.exit_code, "")
    assert err.startswith("Error: port=70000 exceeds 65535\nHint:  choose a lower one\n")
    assert f"Code:  {kind.code} (exit {kind.exit_code})" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_an_expected_error_as_json(run, plugin, kind):
    app = typer.Typer()

    @app.command()
    def fail(format: output.FormatOption = Format.TEXT) -> None:
        raise kind("no", hint="yes")

    plugin(x=app)
    for spelling in (["--format", "json"], ["--format=json"]):
        code, out, err = run("fail", *spelling)
        assert (code, out) == (kind.exit_code, "")
        assert json.loads(err) == {
            "error": kind.code,
            "message": "no",
            "hint": "yes",
            "exit_code": kind.exit_code,
            "docs": "docs/errors.md",
        }


def test_every_error_code_is_documented():
    text = (Path(__file__).parents[2] / "docs/errors.md").read_text()
    for kind in ALL_ERRORS:
        assert f"`{kind.code}`" in text
    for reason in (*errors.Rejection, *errors.Fault):
        assert f"`{reason}`" in text


def test_an_unexpected_error_shows_no_traceback_unless_asked(run, plugin, monkeypatch):
    plugin(x=failing(ZeroDivisionError("oh")))
    code, _, err = run("fail")
    assert code == 1
    assert "ZeroDivisionError: oh" in err
    assert "LEPTON_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LEPTON_DEBUG", "1")
    code, _, err = run("fail")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_is_quiet(run, plugin, error):
    plugin(x=failing(error))
    code, _, err = run("fail")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(("given", "code"), [(3, 3), (0, 0), (None, 0), ("text", 1)])
def test_an_exit_keeps_its_code(run, plugin, given, code):
    plugin(x=failing(SystemExit(given)))
    assert run("fail")[0] == code


def test_typers_exit_keeps_its_code(run, plugin):
    plugin(x=failing(typer.Exit(4)))
    assert run("fail")[0] == 4


@pytest.mark.parametrize(
    "argv", [["nonsense"], ["doctor", "--nonsense"], ["config", "show"], ["task", "list", "--format", "xml"]]
)
def test_a_wrong_command_line_is_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert "usage is: lepton" in err


def test_a_wrong_command_line_as_json(run):
    code, _, err = run("nonsense", "--format", "json")
    assert code == 2
    assert json.loads(err)["error"] == "usage"


def test_a_role_that_cannot_be_loaded_takes_no_other_with_it(run, plugin):
    fine = typer.Typer()

    @fine.command()
    def hello() -> None:
        output.print_data("hello")

    plugin(
        client=ModuleNotFoundError("No module named 'grpc'", name="grpc"),
        server=RuntimeError("broken"),
        z=fine,
    )
    assert run("hello")[:2] == (0, "hello\n")
    assert "Not available: ModuleNotFoundError" in run("--help")[1]
    code, _, err = run("client", "start", "--config", "x")
    assert code == 3
    assert "pip install 'lepton-fl[client]'" in err
    code, _, err = run("server")
    assert code == 1
    assert "RuntimeError: broken" in err


def test_a_missing_extra_is_named(run, plugin):
    plugin(x=failing(ModuleNotFoundError("No module named 'torch'", name="torch")))
    code, _, err = run("fail")
    assert code == 3
    assert "pip install 'lepton-fl[train]'" in err


def test_the_installed_roles_do_not_claim_the_same_command():
    names = [command.name or command.callback.__name__ for command in frame.build().registered_commands]
    seen = names + [group.name for group in frame.build().registered_groups if group.name]
    for group in frame.build().registered_groups:
        if not group.name:
            inner = group.typer_instance
            seen += [c.name or c.callback.__name__.replace("_", "-") for c in inner.registered_commands]
            seen += [g.name for g in inner.registered_groups]
    assert len(seen) == len(set(seen))


# --- data -------------------------------------------------------------------------------------------------


class Colour(StrEnum):
    RED = "red"


@dataclass
class Row:
    when: datetime
    colour: Colour = Colour.RED


def test_data_in_json_types():
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    assert output.plain([Row(when)]) == [{"when": "2026-01-02T03:04:05.678+00:00", "colour": "red"}]
    assert output.plain(when.replace(tzinfo=None)) == "2026-01-02T03:04:05.678+00:00"
    assert output.plain({1: float("nan"), "b": float("inf"), "c": (1, b"\x01"), "d": {"y", "x"}}) == {
        "1": None,
        "b": None,
        "c": [1, "01"],
        "d": ["x", "y"],
    }
    assert output.plain([np.float32(0.5), np.int64(3), Path("a/b"), timedelta(seconds=90), True]) == [
        0.5,
        3,
        "a/b",
        90.0,
        True,
    ]
    with pytest.raises(TypeError, match="object"):
        output.plain(object())


def test_json_is_one_document_with_all_keys(capsys):
    output.print_data([{"a": 1, "b": float("nan")}], format=Format.JSON, title="T", columns=["a"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [{"a": 1, "b": None}]


def test_a_table_that_is_read_by_a_program_is_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    output.print_data(
        [{"id": "x" * 150, "n": 1.23456789, "none": None, "[red]": "[bold]raw"}], title="Things"
    )
    out = capsys.readouterr().out
    assert "x" * 150 in out
    assert "1.2346" in out
    assert "[bold]raw" in out
    assert "\x1b" not in out


def test_an_empty_table_says_so(capsys):
    output.print_data([], title="Devices", columns=["id"])
    assert capsys.readouterr().out == "Devices: none\n"
    output.print_data([], format=Format.JSON)
    assert json.loads(capsys.readouterr().out) == []


def test_no_progress_bar_without_a_terminal(capsys):
    with output.progress("working", total=3) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_an_error_text_is_not_markup(run, plugin):
    plugin(x=failing(errors.ConfigError("expected [bold]x[/bold] in [server]", hint="[listen] :smile:")))
    err = run("fail")[2]
    assert "expected [bold]x[/bold] in [server]" in err
    assert "[listen] :smile:" in err


def test_a_reader_that_leaves_early_is_no_error():
    script = "import sys; from lepton_fl.cli.app import run; sys.exit(run(['config', 'schema', 'server']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# --- config and doctor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
def test_the_schema_is_json_with_a_description_of_every_key(run, role):
    code, out, _ = run("config", "schema", role)
    assert code == 0
    schema = json.loads(out)
    for name, section in schema["$defs"].items():
        for key, value in section.get("properties", {}).items():
            assert value.get("description") or "$ref" in value, f"{name}.{key} has no description"


def test_show_says_where_a_value_came_from(run, tmp_path, monkeypatch):
    path = tmp_path / "server.toml"
    path.write_text('[server]\nname = "here"\n')
    monkeypatch.setenv("LEPTON__LISTEN__OPS_PORT", "1234")
    code, out, _ = run("config", "show", "server", "--config", path, "--resolved", "--format", "json")
    assert code == 0
    rows = {row["key"]: row for row in json.loads(out)}
    assert rows["server.name"] == {
        "key": "server.name",
        "value": "here",
        "source": "file",
        "where": f"{path}:2",
    }
    assert (rows["listen.ops_port"]["value"], rows["listen.ops_port"]["where"]) == (
        1234,
        "LEPTON__LISTEN__OPS_PORT",
    )
    assert rows["listen.host"]["source"] == "default"
    code, out, _ = run("config", "show", "server", "--config", path, "--format", "json")
    assert json.loads(out)["listen"]["ops_port"] == 1234
    code, out, _ = run("config", "show", "server", "--config", path, "--resolved")
    assert f"{path}:2" in out


def test_a_wrong_configuration_is_3(run, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text('[servr]\nname = "here"\n')
    code, out, err = run("config", "show", "server", "--config", path)
    assert (code, out) == (3, "")
    assert "did you mean 'server'?" in err


def test_an_unknown_role_is_9(run):
    code, _, err = run("config", "show", "sever")
    assert code == 9
    assert "did you mean 'server'?" in err


def test_doctor_looks_and_changes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "server.toml"
    path.write_text("[listen]\nhost='127.0.0.1'\nenrolment_port=0\ndevice_port=0\nfleet_port=0\nops_port=0\n")
    before = {name: (name.stat().st_mtime_ns, name.read_bytes()) for name in tmp_path.rglob("*")}
    code, out, _ = run("doctor", "server", "--config", path, "--format", "json")
    found = json.loads(out)
    assert found["ok"] == (code == 0)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["configuration"]["ok"]
    assert checks["server.state_dir"]["ok"]
    assert {name: (name.stat().st_mtime_ns, name.read_bytes()) for name in tmp_path.rglob("*")} == before


@pytest.mark.network
def test_doctor_names_a_port_that_is_taken(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path / "server.toml"
        path.write_text(f"[listen]\nops_port = {port}\n[server]\nstate_dir = '{tmp_path}/state'\n")
        code, out, err = run("doctor", "server", "--config", path)
    assert code == 1
    assert f"127.0.0.1:{port} cannot be used" in out
    assert "listen.ops_port" in err
    assert not (tmp_path / "state").exists()


def test_doctor_reports_a_wrong_configuration_and_goes_on(run, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text("[listen")
    code, out, _ = run("doctor", "server", "--config", path, "--format", "json")
    assert code == 1
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert not checks["configuration"]["ok"]
    assert "not valid TOML" in checks["configuration"]["detail"]
    assert checks["python"]["ok"]


def test_doctor_without_a_role_takes_no_configuration(run):
    assert run("doctor", "--config", "x.toml")[0] == 2


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_state_folder_that_cannot_be_used(tmp_path, monkeypatch, kind):
    folder = tmp_path / "state"
    if kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        monkeypatch.setattr(os, "access", lambda *_: False)  # the test may run as root
    assert not doctor._writable("state_dir", folder / "deeper").ok


def test_a_contributed_check_may_fail_but_not_stop_the_doctor(monkeypatch):
    class Entry(EntryPoint):
        def load(self):
            def check(context):
                assert context.rebuild
                if self.name == "raises":
                    raise errors.StateLocked("held by process 7", hint="stop it")
                if self.name == "breaks":
                    raise ZeroDivisionError
                return [doctor.Check("journal", True, "5 events")]

            return check

    entries = [Entry(name, "a:b", doctor.GROUP) for name in ("fine", "raises", "breaks")]
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: entries)
    checks = {check.name: check for check in doctor.examine(rebuild=True)}
    assert checks["journal"].ok
    assert (checks["raises"].ok, checks["raises"].hint) == (False, "stop it")
    assert "ZeroDivisionError" in checks["breaks"].detail


def test_packages_of_an_extra(monkeypatch):
    needs = [
        "numpy>=2",
        "grpcio>=1.81; extra == 'client'",
        "lepton-fl[client,train]; extra == 'all'",
        "nope[x]>1; extra == 'train'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    assert doctor.missing_packages("client") == []
    assert doctor.missing_packages("all") == ["nope"]


# --- tasks ------------------------------------------------------------------------------------------------


def test_tasks_are_listed(run):
    code, out, _ = run("task", "list", "--format", "json")
    assert code == 0
    assert {
        "name": "digits",
        "reference": "lepton_fl.tasks.images:digits",
        "package": "lepton-fl",
    } in json.loads(out)


def test_a_task_is_tried(run):
    code, out, _ = run("task", "check", "digits", "--format", "json")
    assert code == 0
    found = json.loads(out)
    assert found["rows"] == 1437
    assert 0 < found["first_loss"] < 10
    assert sum(found["class_counts"]) == found["rows"]


def test_an_unknown_task_is_4(run):
    code, _, err = run("task", "check", "digts")
    assert code == 4
    assert "'digits'" in err


def test_a_missing_data_folder_is_4(run, tmp_path):
    assert run("task", "check", "heart_disease", "--data", tmp_path / "none")[0] == 4
    code, out, err = run("task", "check", "heart_disease", "--format", "json")
    assert code == 0
    assert json.loads(out)["rows"] is None
    assert "without data" in err


def test_a_devices_own_file_is_checked(run, tmp_path):
    x = np.random.default_rng(0).uniform(0, 16, (50, 8, 8))
    y = np.arange(50) % 10
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y)
    code, out, err = run("task", "check", "digits", "--data", tmp_path / "mine.npz", "--format", "json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 50
    x[3, 2, 1] = np.nan
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y)
    code, out, err = run("task", "check", "digits", "--data", tmp_path / "mine.npz", "--format", "json")
    assert (code, out) == (4, "")
    assert json.loads(err)["error"] == "data-contract"
    assert "row 3" in err
    assert run("task", "check", "digits", "--data", '{"kind": "xml"}')[0] == 3
    assert run("task", "check", "digits", "--data", '{"kind": ')[0] == 3
