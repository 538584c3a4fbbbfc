"""The systemd unit and the Dockerfile, as far as they can be checked without running them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "client" / "lepton-client.service"
DOCKERFILE = ROOT / "client" / "Dockerfile"


def unit():
    """Section -> key -> values; configparser takes no repeated keys."""
    sections, current = {}, {}
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line.strip() and not line.startswith("#"):
            key, _, value = line.partition("=")
            current.setdefault(key, []).append(value)
    return sections


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Restart", "always"),
        ("Nice", "10"),
        ("StateDirectory", "lepton-client"),
        ("StateDirectoryMode", "0700"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("CapabilityBoundingSet", ""),
        ("UMask", "0077"),
    ],
)
def test_the_unit_restarts_is_hardened_and_keeps_its_state_private(key, value):
    assert unit()["Service"][key] == [value]


def test_the_unit_has_caps_and_no_root():
    service = unit()["Service"]
    assert {"MemoryMax", "MemoryHigh", "CPUQuota", "TasksMax"} <= set(service)
    assert service["User"] == ["lepton-client"]
    assert "6" in service["RestartPreventExitStatus"][0].split()  # revoked: trying again changes nothing


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text()))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert UNIT.name not in result.stderr, (
        result.stderr
    )  # lines about other units of this machine do not count


def instructions():
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def test_the_image_runs_as_a_numbered_user_with_a_home_it_can_write():
    last = instructions()[[i for i, (word, _) in enumerate(instructions()) if word == "FROM"][-1] :]
    users = [value for word, value in last if word == "USER"]
    assert users
    assert users[-1].isdecimal()
    assert int(users[-1]) >= 1000
    assert any(
        "--create-home" in value and f"--uid {users[-1]}" in value for word, value in last if word == "RUN"
    )


def test_what_the_image_copies_exists():
    sources = [
        source
        for word, value in instructions()
        if word == "COPY" and "--from=" not in value
        for source in value.split()[:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_holds_no_secret_and_names_no_host():
    text = "\n".join(f"{word} {value}" for word, value in instructions())
    assert not re.search(r"(?i)(token|secret|password|private.key)\s*=", text)
    assert "://" not in text
    assert re.findall(r"(?m)^FROM (\S+)", text) == ["python:3.11-slim", "python:3.11-slim"]
    assert "ADD" not in [word for word, _ in instructions()]


def test_every_entry_point_is_an_exec_form():
    for word, value in instructions():
        if word in ("CMD", "ENTRYPOINT"):
            assert value.startswith("["), "a shell in between would swallow SIGTERM"
