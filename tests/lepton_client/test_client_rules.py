"""Eligibility, clocks, back-off, ledger, lock and configuration: no network."""

import json
import os
import subprocess
import sys
from datetime import datetime, time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lepton_client.backoff import Backoff
from lepton_client.clock import Watch
from lepton_client.config import ClientConfig, EligibilitySection
from lepton_client.eligibility import Machine, first_objection, in_window
from lepton_client.fingerprint import fingerprint
from lepton_client.inspection import Finding, Inspector, inspect
from lepton_client.ledger import KEEP, Ledger
from lepton_client.state import StateDir
from lepton_fl.config import load
from lepton_fl.errors import ConfigError, DiskFull, StateCorrupt, StateError, StateLocked
from lepton_fl.wire.messages import Ticket

NOON = datetime(2030, 1, 1, 12, 0)


class Fake(Machine):
    def __init__(self, load=0.0, memory=2**30, disk=2**30, battery=None):
        self.values = load, memory, disk, battery

    def load_per_cpu(self):
        return self.values[0]

    def free_memory(self):
        return self.values[1]

    def free_disk(self, folder):
        if isinstance(self.values[2], OSError):
            raise self.values[2]
        return self.values[2]

    def battery(self):
        return self.values[3]


def power(percent, plugged):
    return SimpleNamespace(percent=percent, power_plugged=plugged)


def objection(machine=None, now=NOON, **rules):
    return first_objection(EligibilitySection(**rules), Path("/"), now, machine or Fake())


@pytest.mark.parametrize(
    ("rules", "machine", "words"),
    [
        ({"max_load": 0.5}, Fake(load=0.6), "load per CPU 0.60 exceeds max_load 0.5"),
        ({"min_free_memory": 2**31}, Fake(), "free memory 1024 MiB is below min_free_memory 2048 MiB"),
        ({}, Fake(disk=2**20), "1 MiB left"),
        ({}, Fake(disk=FileNotFoundError(2, "No such file or directory")), "cannot be used"),
        ({"windows": ("22:00-06:00",)}, Fake(), "time 12:00 is outside 22:00-06:00"),
        ({"on_ac_power_only": True}, Fake(battery=power(90, False)), "on battery at 90 %"),
        ({"min_battery": 50}, Fake(battery=power(40, False)), "battery at 40 % is below min_battery 50 %"),
        ({"command": ("false",)}, Fake(), "said no (exit code 1)"),
        ({"command": ("/nonexistent/program",)}, Fake(), "cannot be started"),
        ({"command": ("sleep", "60"), "command_timeout_s": 0.1}, Fake(), "took longer than 0.1 s"),
    ],
)
def test_each_rule_names_value_and_bound(rules, machine, words):
    assert words in objection(machine, **rules)


@pytest.mark.parametrize(
    ("rules", "machine"),
    [
        ({}, Fake(load=99)),
        ({"max_load": 0.5}, Fake(load=0.5)),
        ({"min_free_memory": 2**30}, Fake()),
        ({"min_free_disk": 0}, Fake(disk=0)),
        ({"windows": ("06:00-07:00", "12:00-13:00")}, Fake()),
        ({"on_ac_power_only": True}, Fake()),  # no battery: a machine that is always plugged in
        ({"on_ac_power_only": True, "min_battery": 100}, Fake(battery=power(1, True))),
        ({"min_battery": 50}, Fake(battery=power(50, False))),
        ({"command": ("true",)}, Fake()),
    ],
)
def test_rules_that_hold_say_nothing(rules, machine):
    assert objection(machine, **rules) == ""


def test_this_machine_can_be_asked():
    rules = {"max_load": 1e9, "min_free_memory": 1, "min_free_disk": 1, "min_battery": 1e-9}
    assert objection(Machine(), **rules) == ""


@given(st.times(), st.times(), st.times())
def test_a_window_and_its_complement_share_no_minute(a, b, now):
    start, end = f"{a:%H:%M}", f"{b:%H:%M}"
    if start != end:
        assert in_window(f"{start}-{end}", now) != in_window(f"{end}-{start}", now)


@pytest.mark.parametrize(
    ("at", "inside"),
    [("21:59", False), ("22:00", True), ("23:59", True), ("00:00", True), ("05:59", True), ("06:00", False)],
)
def test_a_window_across_midnight(at, inside):
    assert in_window("22:00-06:00", time.fromisoformat(at)) is inside


@pytest.mark.parametrize(
    "body",
    [
        {"eligibility": {"windows": ["25:00-06:00"]}},
        {"eligibility": {"windows": ["06:00-06:00"]}},
        {"eligibility": {"max_load": float("nan")}},
        {"limits": {"memory_bytes": 1}},
        {"limits": {"threads": 0}},
        {"tasks": [{"reference": "os.system"}]},
        {"tasks": [{"reference": "digits"}, {"reference": "digits"}]},
        {"connection": {"backoff_min_s": 10, "backoff_max_s": 1}},
        {"client": {"groups": [""]}},
        {"surprise": 1},
    ],
)
def test_a_wrong_configuration_is_refused(body):
    with pytest.raises(ValidationError):
        ClientConfig.model_validate(body)


def test_the_example_configuration_loads():
    path = Path(__file__).parents[2] / "client" / "client.toml"
    settings = load(ClientConfig, path, env={}).value
    assert settings.tasks
    assert settings.client.state_dir == Path("/var/lib/lepton-client")


def test_a_wrong_key_gets_a_suggestion(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text("[limits]\nthread = 2\n")
    with pytest.raises(ConfigError, match="threads"):
        load(ClientConfig, path, env={})


# --- back-off and clocks


def test_backoff_doubles_within_its_bounds_and_starts_again():
    highest = Backoff(1, 8, draw=lambda low, high: high)
    assert [highest.next() for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    highest.reset()
    assert highest.next() == 1
    lowest = Backoff(1, 8, draw=lambda low, high: low)
    assert [lowest.next() for _ in range(3)] == [0.1, 0.2, 0.4]


def test_backoff_never_overflows():
    backoff = Backoff(1, 300)
    assert all(0.1 <= backoff.next() <= 300 for _ in range(5000))


class Hands:
    """A clock that a test sets."""

    def __init__(self, now=1000.0, wall=2e9):
        self.monotonic, self.utc = now, wall

    def now(self):
        return self.monotonic

    def wall(self):
        return self.utc


def test_a_jump_of_the_wall_clock_is_seen_once_and_sleep_is_none():
    clock = Hands()
    watch = Watch(clock)
    clock.monotonic += 7200
    clock.utc += 7200  # two hours asleep
    assert watch.jumped() == 0
    clock.utc -= 86_400
    assert watch.jumped() == -86_400
    assert watch.jumped() == 0


def test_a_clock_unlike_the_coordinators_is_told_once_and_corrected():
    clock = Hands()
    watch = Watch(clock)
    assert "3600 s behind" in watch.heard(clock.utc + 3600)
    assert watch.heard(clock.utc + 3600) == ""
    assert watch.server_now() == clock.utc + 3600
    assert "agrees" in watch.heard(clock.utc)
    assert watch.heard(clock.utc + 5) == ""
    told = clock.utc + 5
    clock.utc += 86_400 * 400  # moved by hand; nobody has heard from the coordinator since
    clock.monotonic += 10
    assert watch.server_now() == told + 10


# --- the ledger


def ticket(number=1, attempt=1, nonce="a"):
    return Ticket("train", "run", number, attempt, nonce)


def test_the_ledger_lets_each_attempt_begin_once(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    assert ledger.begin(ticket())
    assert not ledger.begin(ticket())
    assert ledger.begin(ticket(attempt=2))
    assert ledger.begin(ticket(nonce="b"))
    ledger.answered(ticket(attempt=2))
    again = Ledger(path)
    assert not again.begin(ticket())
    assert not again.begin(ticket(attempt=2))
    assert [(e.attempt, e.nonce) for e in again.interrupted()] == [(1, "a"), (1, "b")]


def test_the_ledger_stays_small(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    for number in range(KEEP + 10):
        ledger.begin(ticket(number))
    assert len(json.loads(path.read_bytes())["entries"]) == KEEP
    assert not Ledger(path).begin(ticket(KEEP + 9))


@pytest.mark.parametrize(
    "content", ["", "{", '{"format":2,"entries":[]}', '{"format":1,"entries":[[1]]}', "[]"]
)
def test_a_damaged_ledger_is_refused(tmp_path, content):
    path = tmp_path / "ledger.json"
    path.write_text(content)
    with pytest.raises(StateCorrupt, match="ledger"):
        Ledger(path)


FULL = """
import resource, sys
from pathlib import Path
from lepton_client.ledger import Ledger
from lepton_fl.errors import DiskFull
from lepton_fl.wire.messages import Ticket
ledger = Ledger(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    ledger.begin(Ticket("train", "run", 2, 1, "b"))
except DiskFull:
    print("full")
"""


def test_a_full_disk_stops_the_work_and_keeps_the_ledger(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger(path).begin(ticket())
    before = path.read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "full\n"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


# --- the folder


def test_two_agents_do_not_share_a_folder(tmp_path):
    first, second = StateDir(tmp_path), StateDir(tmp_path)
    with first.locked():
        assert second.holder() == os.getpid()
        with pytest.raises(StateLocked, match=f"pid {os.getpid()}"), second.locked():
            pass
    assert second.holder() == 0
    with second.locked():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file"), StateDir(tmp_path / "file" / "state").locked():
        pass


def test_a_damaged_status_is_named(tmp_path):
    (tmp_path / "status.json").write_bytes(b"\xff")
    os.chmod(tmp_path / "status.json", 0o600)
    with pytest.raises(StateCorrupt, match=r"status\.json"):
        StateDir(tmp_path).status()


# --- the contract check


def section(**data):
    return ClientConfig.model_validate({"tasks": [{"reference": "digits", "data": data}]}).tasks[0]


def test_the_fingerprint_follows_the_files(tmp_path):
    folder = tmp_path / "data"
    spec = section(kind="images", path=str(folder))
    seen = [fingerprint(spec)]
    folder.mkdir()
    seen.append(fingerprint(spec))
    (folder / "a").write_text("1")
    seen.append(fingerprint(spec))
    (folder / "a").write_text("12")
    seen.append(fingerprint(spec))
    assert len(set(seen)) == 4
    assert fingerprint(spec) == seen[-1]
    assert fingerprint(section()) == ()


def test_the_inspector_looks_again_only_when_data_change(tmp_path):
    path = tmp_path / "x.npz"
    looked = []

    def check(spec):
        looked.append(path.exists())
        return Finding("digits", ready=path.exists())

    inspector = Inspector((section(kind="npz", path=str(path)),), lambda: None, check)
    for content in (None, None, "1", "1", "22"):
        if content:
            path.write_text(content)
            os.utime(path, (1, 1))
        inspector.refresh()
        if inspector._thread:
            inspector._thread.join()
    assert looked == [False, True, True]
    assert inspector.findings[0].ready


def test_a_real_check_runs_in_a_child_and_gives_reasons(tmp_path):
    import numpy as np

    path = tmp_path / "digits.npz"
    missing = inspect(section(kind="npz", path=str(path)))
    assert not missing.ready
    assert str(path) in missing.reason
    np.savez(path, x=np.full((50, 8, 8), 99.0, np.float32), y=np.arange(50) % 10)
    wrong = inspect(section(kind="npz", path=str(path)))
    assert not wrong.ready
    assert "99" in wrong.reason
    np.savez(
        path, x=np.random.default_rng(0).uniform(0, 16, (50, 8, 8)).astype(np.float32), y=np.arange(50) % 10
    )
    good = inspect(section(kind="npz", path=str(path)))
    assert good.ready, good.reason
    assert good.name == "lepton_fl.tasks.images:digits"
    unknown = inspect(section(kind="npz", pth="x"))
    assert "pth" in unknown.reason


def test_an_interpreter_that_has_only_the_client_loads_nothing_heavy():
    absent = {
        "lepton_client.agent": "numpy torch flwr sklearn pyarrow scipy cryptography typer rich",
        "lepton_client.cli": "numpy torch flwr grpc pydantic cryptography",
    }
    for module, names in absent.items():
        code = f"import sys, {module}; sys.exit(' '.join(set({names.split()}) & set(sys.modules)) or None)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_full_disk_is_seen_by_the_diary_and_forgotten_when_it_is_over(tmp_path, monkeypatch):
    from lepton_client.diary import Diary

    state = StateDir(tmp_path)
    diary = Diary(state, Hands(), {})
    write = state.save_status

    def full(status):
        raise DiskFull("No space was left.")

    monkeypatch.setattr(state, "save_status", full)
    diary.flush()
    assert "No space" in diary.trouble
    monkeypatch.setattr(state, "save_status", write)
    diary.flush()
    assert diary.trouble == ""
    assert state.status()["verdicts"] == []
