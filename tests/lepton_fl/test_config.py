"""One TOML file per role: what is accepted, where it came from, and how a mistake reads."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr, model_validator

from lepton_fl import config
from lepton_fl.config import MASK, Secret, load
from lepton_fl.errors import ConfigError


class Grpc(BaseModel):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9092
    tls: bool = True


class Limits(BaseModel):
    rate: Annotated[float, Field(gt=0)] = 1.0
    groups: tuple[str, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    low: int = 1
    high: int = 2

    @model_validator(mode="after")
    def _ordered(self) -> "Limits":
        if self.low > self.high:
            raise ValueError(f"low={self.low} exceeds high={self.high}")
        return self


class Data(BaseModel):
    path: Path
    columns: dict[str, int] = {}


class Role(BaseModel):
    name: str = "one"
    grpc: Grpc = Grpc()
    limits: Limits = Limits()
    sources: dict[str, Data] = {}
    stages: list[Data] = []
    password: SecretStr = SecretStr("")
    token: Annotated[str, Secret()] = ""
    database: str = "sqlite:///x.db"
    maybe: int | None = 3


class Other(BaseModel):
    grpc: Grpc = Grpc()
    device: Data | None = None
    radio: Limits = Limits()


@pytest.fixture(autouse=True)
def _two_roles(monkeypatch):
    monkeypatch.setattr(config, "roles", lambda: {"role": Role, "other": Other})


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "role.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refused(*args, **kwargs) -> str:
    kwargs.setdefault("env", {})
    with pytest.raises(ConfigError) as caught:
        load(Role, *args, **kwargs)
    assert caught.value.hint
    return str(caught.value)


def shown(resolved) -> dict[str, tuple[object, str]]:
    return {setting.key: (setting.value, str(setting.source)) for setting in resolved.settings()}


def test_nothing_given_means_defaults():
    resolved = load(Role, env={})
    assert resolved.value == Role()
    assert {source for _, source in shown(resolved).values()} == {"default"}


def test_each_value_says_where_it_came_from(write):
    path = write(
        '# ours\nname = "two"\n\n[grpc]\nport = 1\ntls = false\n[limits]\ngroups = [\n  "a",\n]\nlow = 0\n'
    )
    resolved = load(
        Role,
        path,
        env={"LEPTON__GRPC__TLS": "true", "LEPTON__LIMITS__RATE": ".5", "HOME": "x", "LEPTON_DEBUG": "1"},
        overrides={"grpc.port": 2, "limits.high": "7", "name": None},
    )
    rows = shown(resolved)
    assert rows["name"] == ("two", f"{path}:2")
    assert rows["grpc.port"] == (2, "command line")
    assert rows["grpc.tls"] == (True, "LEPTON__GRPC__TLS")
    assert rows["grpc.host"] == ("127.0.0.1", "default")
    assert rows["limits.groups"] == (["a"], f"{path}:8")
    assert rows["limits.rate"] == (0.5, "LEPTON__LIMITS__RATE")
    assert rows["limits.low"] == (0, f"{path}:11")
    assert rows["limits.high"] == (7, "command line")
    assert resolved.to_json()["grpc"] == {"host": "127.0.0.1", "port": 2, "tls": True}


def test_lines_of_nested_tables(write):
    path = write(
        'sources.a = {path = "p", columns = {x = 1}}\n[sources.b]\npath = """\nq"""\ncolumns.y = 2\n'
        '[[stages]]\npath = "s0"\n[[stages]]\npath = "s1"\n[stages.columns]\nz = 3\n'
    )
    rows = shown(load(Role, path, env={}))
    assert rows["sources.a.columns.x"] == (1, f"{path}:1")
    assert rows["sources.b.path"] == ("q", f"{path}:3")
    assert rows["sources.b.columns.y"] == (2, f"{path}:5")
    assert rows["stages.0.path"] == ("s0", f"{path}:7")
    assert rows["stages.1.columns.z"] == (3, f"{path}:11")


def test_a_variable_replaces_a_table_and_a_deeper_one_its_key(write):
    path = write('[sources.a]\npath = "p"\n')
    env = {
        "LEPTON__SOURCES__B__PATH": "q2",
        "LEPTON__SOURCES": '{"b": {"path": "q"}}',
        "LEPTON__MAYBE": "null",
        "LEPTON__NAME": "123",
    }
    resolved = load(Role, path, env=env)
    assert {name: str(data.path) for name, data in resolved.value.sources.items()} == {"b": "q2"}
    assert resolved.value.maybe is None
    assert resolved.value.name == "123"
    assert shown(resolved)["sources.b.path"] == ("q2", "LEPTON__SOURCES__B__PATH")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[grpc]\nprot = 1\n", ["role.toml:2", "unknown key 'grpc.prot'", "did you mean 'grpc.port'?"]),
        ("[gprc]\nport = 1\n", ["role.toml:1", "did you mean 'grpc'?"]),
        ("rate = 1.0\n", ["role.toml:1", "did you mean 'limits.rate'?"]),
        ("[limits]\nqqqqq = 1\n", ["'limits' has rate, groups"]),
        ('[sources.a]\npath = "p"\npth = 1\n', ["role.toml:3", "'sources.a.path'"]),
        ('[[stages]]\npath = "p"\n[[stages]]\npath = "p"\npaht = 1\n', ["role.toml:5", "'stages.1.path'"]),
        ("[grpc]\nport = 70000\n", ["role.toml:2: grpc.port = 70000", "less than or equal to 65535"]),
        ('[grpc]\nport = "80"\n', ["grpc.port = '80' should be a valid integer"]),
        ("[grpc]\nport = true\n", ["grpc.port = True should be a valid integer"]),
        ("[grpc]\ntls = 1\n", ["grpc.tls = 1 should be a valid boolean"]),
        ("grpc = 1\n", ["role.toml:1: grpc"]),
        ("[limits]\nrate = nan\n", ["role.toml:2: limits.rate is nan, not a finite number"]),
        ("[limits]\nrate = -inf\n", ["limits.rate is -inf"]),
        ('[limits]\nmode = "fsat"\n', ["limits.mode = 'fsat' should be 'fast' or 'slow'"]),
        ("[limits]\nlow = 5\n", ["role.toml:1: limits", "low=5 exceeds high=2"]),
        ("[sources.a]\n", ["sources.a.path is required"]),
        ("[[stages]]\n", ["stages.0.path is required"]),
        ("[grpc]\nport = 1\n[grp", ["role.toml is not valid TOML", "line 3"]),
        ("name = 'x", ["not valid TOML", "line 1"]),
        ("name = 1\nname = 2\n", ["not valid TOML", "line 2"]),
        (b"name = '\xff'\n", ["role.toml:1", "UTF-8"]),
        (b"\x00\x01", ["not valid TOML"]),
        ("x = " + "[" * 5000, ["role.toml"]),
    ],
)
def test_a_mistake_in_the_file_is_named(write, text, words):
    message = refused(write(text))
    for word in words:
        assert word in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "LEPTON__GRPC__PROT",
            "1",
            ["LEPTON__GRPC__PROT: unknown key 'grpc.prot'; did you mean 'grpc.port'?"],
        ),
        ("LEPTON__GPRC__PORT", "1", ["did you mean 'grpc'?"]),
        ("LEPTON__GRPC__PORT__X", "1", ["unknown key 'grpc.port.x'", "single value"]),
        ("LEPTON__GRPC__PORT", "70000", ["LEPTON__GRPC__PORT: grpc.port = 70000", "65535"]),
        ("LEPTON__GRPC__PORT", "many", ["grpc.port = 'many' should be a valid integer"]),
        ("LEPTON__LIMITS__RATE", "nan", ["limits.rate is nan"]),
        ("LEPTON__LIMITS__RATE", "1e999", ["limits.rate is inf"]),
        ("LEPTON__LIMITS__GROUPS", "[1", ["limits.groups = '[1' should be"]),
        ("LEPTON__", "1", ["unknown key ''"]),
        ("LEPTON__GRPC____PORT", "1", ["unknown key 'grpc.'"]),
    ],
)
def test_a_mistake_in_a_variable_is_named(name, text, words):
    message = refused(env={name: text})
    for word in words:
        assert word in message


def test_all_problems_are_named_at_once(write):
    message = refused(write("[grpc]\nport = -1\ntls = 3\nhots = 'x'\n"))
    assert message.startswith("3 problems")
    assert all(word in message for word in ("grpc.port = -1", "grpc.tls = 3", "'grpc.host'"))


def test_a_variable_of_another_role_is_left_to_it():
    env = {"LEPTON__RADIO__RATE": "2", "LEPTON__DEVICE__PATH": "x", "LEPTON__GRPC__PORT": "5"}
    assert load(Role, env=env).value.grpc.port == 5
    with pytest.raises(ConfigError, match="unknown key 'radio'"):
        load(Role, env={"LEPTON__RADIO__RAET": "2"})


def test_the_file_of_another_role_is_recognised(write):
    with pytest.raises(ConfigError) as caught:
        load(Role, write("[radio]\nrate = 1.0\n"), env={})
    assert "other configuration" in caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "folder", "huge"])
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, kind):
    path = tmp_path / "role.toml"
    if kind == "folder":
        path.mkdir()
    if kind == "huge":
        monkeypatch.setattr(config, "MAX_FILE_BYTES", 10)
        path.write_text("name = 'long enough'")
    with pytest.raises(ConfigError, match=r"role\.toml"):
        load(Role, path, env={})


def test_an_empty_file_a_bom_and_crlf_are_fine(write):
    assert load(Role, write(b""), env={}).value == Role()
    resolved = load(Role, write(b'\xef\xbb\xbfname = "a"\r\n[grpc]\r\nport = 5\r\n'), env={})
    assert (resolved.value.name, resolved.value.grpc.port) == ("a", 5)
    assert shown(resolved)["grpc.port"][1].endswith(":3")


def test_secrets_are_not_shown(write):
    path = write('password = "hunter2"\ntoken = "hunter2"\ndatabase = "postgresql://me:hunter2@db/x"\n')
    resolved = load(Role, path, env={})
    assert resolved.value.token == "hunter2"
    rows = shown(resolved)
    assert rows["password"][0] == rows["token"][0] == MASK
    assert rows["database"][0] == f"postgresql://me:{MASK}@db/x"
    assert "hunter2" not in str(resolved.to_json())
    for text in (
        "password = 22222\n",
        "token = 22222\n",
        'name = 1\ndatabase = ["postgresql://me:22222@db"]\n',
    ):
        assert "22222" not in refused(write(text))


def test_overrides_are_checked_like_the_rest():
    assert "did you mean 'grpc.port'?" in refused(overrides={"grpc.prot": 1})
    assert "command line: grpc.port = 70000" in refused(overrides={"grpc.port": 70000})


values = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(st.text(max_size=40), values.map(str)),
    name=st.sampled_from(["name", "grpc__port", "limits", "stages", "maybe"]),
)
def test_any_text_in_a_variable_is_read_or_refused(text, name):
    try:
        load(Role, env={f"LEPTON__{name.upper()}": text})
    except ConfigError:
        return


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(min_value=0), junk=st.binary(max_size=3))
def test_a_cut_or_damaged_file_is_read_or_refused(tmp_path_factory, cut, junk):
    whole = b'name = "two"\n[grpc]\nport = 1\n[limits]\ngroups = ["a", "b"]\n[[stages]]\npath = """a\nb"""\n'
    path = tmp_path_factory.getbasetemp() / "cut.toml"
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut] + junk)
    try:
        load(Role, path, env={})
    except ConfigError:
        return
