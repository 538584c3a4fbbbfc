"""The coordinator's deployment files, as far as they can be checked without running them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lepton_fl.config import load
from lepton_server.config import ServerConfig

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server"
UNIT = SERVER / "lepton-server.service"


def test_the_example_configuration_is_valid_and_says_the_defaults():
    given = load(ServerConfig, SERVER / "server.toml", env={}).value
    plain = load(ServerConfig, None, env={}).value
    changed = {
        f"{section}.{key}"
        for section, values in given.model_dump().items()
        for key, value in values.items()
        if value != plain.model_dump()[section][key]
    }
    assert changed == {"server.state_dir", "tls.renew_at"}  # 2/3 has no short decimal form


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
        ("User", "lepton-server"),
        ("StateDirectory", "lepton-server"),
        ("StateDirectoryMode", "0700"),
        ("TimeoutStopSec", "60"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("CapabilityBoundingSet", ""),
        ("UMask", "0077"),
    ],
)
def test_the_unit_restarts_is_hardened_and_keeps_its_state_private(key, value):
    assert unit()["Service"][key] == [value]


def test_the_unit_uses_the_state_folder_of_the_example_and_little_memory():
    service = unit()["Service"]
    assert "MALLOC_ARENA_MAX=2" in service["Environment"][0].split()
    state = load(ServerConfig, SERVER / "server.toml", env={}).value.server.state_dir
    assert state == Path("/var/lib") / service["StateDirectory"][0]
    assert "3" in service["RestartPreventExitStatus"][0].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text()))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert UNIT.name not in result.stderr, result.stderr


def instructions():
    text = re.sub(r"\\\n", " ", (SERVER / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def test_the_image_runs_as_a_numbered_user_with_a_home_it_can_write():
    last = instructions()[[i for i, (word, _) in enumerate(instructions()) if word == "FROM"][-1] :]
    (user,) = [value for word, value in last if word == "USER"]
    assert user.isdecimal()
    assert int(user) >= 1000
    made = [value for word, value in last if word == "RUN" and "--create-home" in value]
    assert made
    assert f"--uid {user}" in made[0]
    (check,) = [value for word, value in last if word == "HEALTHCHECK"]
    assert "/healthz" in check
    assert str(load(ServerConfig, None, env={}).value.listen.ops_port) in check


def test_the_health_check_is_a_valid_program():
    import json

    (check,) = [value for word, value in instructions() if word == "HEALTHCHECK"]
    command = json.loads(check[check.index("CMD") + 3 :])
    compile(command[-1], "healthcheck", "exec")


def test_what_the_image_copies_exists_and_holds_no_secret():
    sources = [
        source
        for word, value in instructions()
        if word == "COPY" and "--from=" not in value
        for source in value.split()[:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    text = "\n".join(f"{word} {value}" for word, value in instructions())
    assert not re.search(r"(?i)(token|secret|password|private.key)\s*=", text)
    assert "://" not in text
    assert "ADD" not in [word for word, _ in instructions()]
    for word, value in instructions():
        if word in ("CMD", "ENTRYPOINT"):
            assert value.startswith("["), "a shell in between would swallow SIGTERM"


def test_the_composition_holds_no_secret_and_opens_no_port_without_a_login():
    text = (SERVER / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"database", "coordinator", "client"}
    for service in services.values():
        assert not any("PASSWORD" in key or "URL" in key for key in service.get("environment", {}))
        assert "privileged" not in service
    assert services["database"]["env_file"] == "postgres.env"
    assert "ports" not in services["database"]
    assert not any(port.startswith("9443") for port in services["coordinator"]["ports"])
    assert not re.search(r"(?i)password\s*[:=]\s*\S", re.sub(r"(?m)#.*$", "", text))
    for service in ("coordinator", "client"):
        build = services[service]["build"]
        assert (SERVER / build["context"] / build["dockerfile"]).exists()
        assert services[service]["read_only"] is True
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/server/*.env" in ignored
