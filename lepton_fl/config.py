"""Configuration: one TOML file per role, checked as a whole before anything starts.

A role is described by a pydantic model whose fields are its sections. A value is taken from the first of

1. the command line (``overrides``),
2. the environment: ``LEPTON__SECTION__KEY`` (more ``__`` for deeper keys),
3. the role's TOML file,
4. the model's default,

and every value remembers where it came from. Rules:

* An unknown key is an error, wherever it was written, and so is a number that is not finite.
* Values in a file have TOML's types: ``"8080"`` is no port and ``true`` is no number.
* A variable's text is read as JSON where the key's type wants that (numbers, ``true``, lists, ``null``), else
  as text.
* All roles share one environment: a variable that names a key of another role is left to that role. One that
  no installed role knows is an error.
* Secrets (``SecretStr``, or ``Annotated[str, Secret()]``) and passwords inside URLs are never shown.

Example::

    resolved = load(ServerConfig, Path("server.toml"), overrides={"grpc.port": port})  # None: not given
    serve(resolved.value)
"""

# ruff: noqa: ANN401 -- what is parsed, and the annotations walked here, are of any type

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, SecretBytes, SecretStr, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lepton_fl.errors import ConfigError

PREFIX = "LEPTON__"
MAX_FILE_BYTES = 4 * 2**20  # no configuration is larger; keeps a wrong path from filling the memory
MASK = "***"
ROLE_GROUP = "lepton.config"  # entry points: role name -> model

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str, ...]  # ("grpc", "port")


class Secret:
    """Marks a field whose value is never shown: ``Annotated[str, Secret()]``."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from; ``where`` is ``file:line``, a variable's name or empty."""

    kind: Literal["default", "file", "environment", "command line"]
    where: str = ""

    def __str__(self) -> str:
        return self.where or self.kind


@dataclass(frozen=True, slots=True)
class Setting:
    """One resolved key, safe to show."""

    key: str  # dotted
    value: Any  # plain JSON types; secrets are ***
    source: Source


DEFAULT = Source("default")


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Model]):
    """A checked configuration and where each of its values came from."""

    value: Model
    sources: Mapping[str, Source]  # by dotted key; a key that is absent has its default
    path: Path | None  # the file, if one was read

    def settings(self) -> list[Setting]:
        """Every key in the model's order, with secrets masked."""
        leaves = _leaves(self.value, ())
        names = [(".".join(key), value) for key, value in leaves]
        return [Setting(name, value, self.sources.get(name, DEFAULT)) for name, value in names]

    def to_json(self) -> dict[str, Any]:
        """Nested plain JSON types, with secrets masked."""
        tree: dict[str, Any] = {}
        for key, value in _leaves(self.value, ()):
            _put(tree, key, value)
        return tree


def load(
    model: type[Model],
    path: Path | str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Resolved[Model]:
    """Read, merge and check one role's configuration.

    Args:
        model: The role's pydantic model.
        path: Its TOML file; None means defaults, environment and overrides only.
        env: The environment; None means the process's.
        overrides: Dotted key to value, from the command line. A value of None means "not given".
            Text is read like a variable's text.

    Raises:
        ConfigError: The file cannot be read or parsed, a key is unknown or a value is not accepted. All
            problems are named at once, each with its key, value, bound and source.
    """
    draft = _Draft(model)
    if path is not None:
        path = Path(path)
        draft.read(path)
    draft.environment(os.environ if env is None else env)
    for name, value in (overrides or {}).items():
        if value is not None:
            draft.set(tuple(name.split(".")), value, Source("command line"))
    if problems := draft.problems + draft.not_finite():
        raise _config_error(problems, [])
    try:
        document = json.dumps(draft.data, default=str, allow_nan=False)
        checked = model.model_validate_json(document, strict=True, extra="forbid")
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem(model, detail, draft.sources) for detail in details]
        raise _config_error(problems, _hints(model, details, path)) from None
    return Resolved(checked, draft.sources, path)


def roles() -> dict[str, type[BaseModel]]:
    """The installed roles' models by name; a role whose extra is not installed is left out."""
    found: dict[str, type[BaseModel]] = {}
    for entry in sorted(entry_points(group=ROLE_GROUP), key=lambda entry: entry.name):
        try:
            found[entry.name] = entry.load()
        except ImportError:
            continue
    return found


class _Draft:
    """Values on their way to a model, with their sources and what is wrong with them so far."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model
        self.data: dict[str, Any] = {}
        self.sources: dict[str, Source] = {}
        self.problems: list[str] = []

    def read(self, path: Path) -> None:
        text = _read(path)
        self.data = _parse(path, text)
        self.sources = _locate(path, text)

    def environment(self, env: Mapping[str, str]) -> None:
        for key, text, source in _variables(env):
            if _type_at(self.model, key) is not None or not _known_elsewhere(self.model, key):
                self.set(key, text, source)

    def set(self, key: Key, value: Any, source: Source) -> None:
        """Put one override in its place, or note why not."""
        kind = _type_at(self.model, key)
        if kind is None:
            self.problems.append(f"{source}: {_unknown(self.model, key)}")
            return
        value = _interpret(value, kind) if isinstance(value, str) else value
        if not _put(self.data, key, value):
            self.problems.append(f"{source}: {'.'.join(key)} cannot be set inside a single value")
            return
        below = ".".join(key) + "."
        self.sources = {name: old for name, old in self.sources.items() if not name.startswith(below)}
        self.sources.update({".".join(name): source for name in _keys(value, key)})

    def not_finite(self) -> list[str]:
        found = _not_finite(self.data, ())
        return [f"{_at(key, self.sources)} is {value}, not a finite number" for key, value in found]


# --- the file ---------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {path} does not exist", hint="check the path given with --config"
        ) from None
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"configuration file {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: byte {error.start} is not UTF-8", hint="save the file with UTF-8 encoding"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = text.count("\n") + (not text.endswith("\n"))
        message = str(error).replace("at end of document", f"at end of document, line {max(1, last)}")
        raise ConfigError(
            f"{path} is not valid TOML: {message}",
            hint="the file may be cut short, or a quote, bracket or equals sign may be missing on that line",
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{path} is nested too deeply", hint="no key needs more than a few levels"
        ) from None


def _locate(path: Path, text: str) -> dict[str, Source]:
    """The line of every key of a valid TOML text.

    A statement ends with the first line at which the lines since the last one parse by themselves.
    """
    found: dict[str, Source] = {}
    table: Key = ()
    counts: dict[Key, int] = {}  # arrays of tables seen so far
    statement, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if not statement and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if statement else number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        source = Source("file", f"{path}:{start}")
        if statement.lstrip().startswith("["):
            table = _header(parsed, counts)
            found.setdefault(".".join(table), source)
        else:
            for key in _keys(parsed, table):
                found.setdefault(".".join(key), source)
        statement = ""
    return found


def _header(parsed: dict[str, Any], counts: dict[Key, int]) -> Key:
    """The path that a table header opens, with the index of each array of tables on the way."""
    path: Key = ()
    node: Any = parsed
    while isinstance(node, dict) and node:
        name, node = next(iter(node.items()))
        path += (name,)
        if isinstance(node, list):
            counts[path] = counts.get(path, -1) + 1
            node = node[0]
        if path in counts:
            path += (str(counts[path]),)
    return path


def _keys(node: Any, path: Key) -> Iterator[Key]:
    """The key of a value and of all that is inside it."""
    if path:
        yield path
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _keys(child, (*path, name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            if isinstance(child, dict):
                yield from _keys(child, (*path, str(index)))


# --- the environment and the command line -----------------------------------------------------------------


def _variables(env: Mapping[str, str]) -> list[tuple[Key, str, Source]]:
    """Our variables, the less deep keys first, so that a key overrides its table."""
    ours = [
        (tuple(name.removeprefix(PREFIX).lower().split("__")), text, Source("environment", name))
        for name, text in env.items()
        if name.startswith(PREFIX)
    ]
    return sorted(ours, key=lambda item: (len(item[0]), item[0]))


def _known_elsewhere(model: type[BaseModel], key: Key) -> bool:
    return any(_type_at(other, key) is not None for other in roles().values() if other is not model)


def _put(data: dict[str, Any], key: Key, value: Any) -> bool:
    node: Any = data
    for name in key[:-1]:
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.setdefault(name, {})
        else:
            return False
    if isinstance(node, list) and key[-1].isdecimal() and int(key[-1]) < len(node):
        node[int(key[-1])] = value
    elif isinstance(node, dict):
        node[key[-1]] = value
    else:
        return False
    return True


def _interpret(text: str, kind: Any) -> Any:
    """The value that a text means for a key of this type: JSON if that fits, else the text itself."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    candidates: list[Any] = [text]
    with contextlib.suppress(ValueError, RecursionError):  # not JSON: the text is meant
        candidates.insert(0, json.loads(text, parse_constant=_refuse_constant))
    for candidate in candidates:
        try:
            adapter.validate_json(json.dumps(candidate), strict=True)
        except ValidationError:
            continue
        return candidate
    try:
        value = adapter.validate_python(text)  # yes, 1e3, .5
    except ValidationError:
        return candidates[0]
    return value if isinstance(value, bool | int | float) else candidates[0]


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _not_finite(node: Any, path: Key) -> Iterator[tuple[Key, float]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _not_finite(child, (*path, name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _not_finite(child, (*path, str(index)))
    elif isinstance(node, float) and not isfinite(node):
        yield path, node


# --- the model --------------------------------------------------------------------------------------------


def _arms(kind: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and None."""
    if get_origin(kind) is Annotated:
        return _arms(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [arm for part in get_args(kind) for arm in _arms(part)]
    return [] if kind is type(None) else [kind]


def _child(kind: Any, name: str) -> Any:
    """The type of ``name`` inside a type, or None if there is no such key."""
    for arm in _arms(kind):
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            if name in arm.model_fields:
                return arm.model_fields[name].annotation
        elif get_origin(arm) in (dict, Mapping):
            return get_args(arm)[1]
        elif get_origin(arm) in (list, tuple) and name.isdecimal():
            return get_args(arm)[0]
    return None


def _type_at(model: Any, key: Key) -> Any:
    """The type of a dotted key, or None if the model has no such key."""
    kind: Any = model
    for name in key:
        kind = _child(kind, name)
        if kind is None:
            return None
    return kind


def _names(kind: Any) -> list[str]:
    return [
        name
        for arm in _arms(kind)
        if isinstance(arm, type) and issubclass(arm, BaseModel)
        for name in arm.model_fields
    ]


def _all_keys(model: Any, path: Key = ()) -> Iterator[str]:
    for name in _names(model):
        yield ".".join((*path, name))
        if len(path) < 8:  # a model may contain itself
            yield from _all_keys(_child(model, name), (*path, name))


def _unknown(model: Any, key: Key) -> str:
    """``unknown key 'grpc.prot'; did you mean 'grpc.port'?``."""
    depth = next(i for i in range(len(key)) if _type_at(model, key[: i + 1]) is None)
    parent, wrong = key[:depth], key[depth]
    names = _names(_type_at(model, parent))
    close = [".".join((*parent, name)) for name in get_close_matches(wrong, names, n=1)]
    if not close:  # right name, wrong section
        close = [name for name in _all_keys(model) if name.split(".")[-1] == key[-1]][:1]
    text = f"unknown key {'.'.join(key[: depth + 1])!r}"
    if close:
        return f"{text}; did you mean {close[0]!r}?"
    if not names:
        return f"{text}; {'.'.join(parent)!r} is a single value"
    where = f"{'.'.join(parent)!r} has" if parent else "there are"
    return f"{text}; {where} {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _leaves(value: Any, path: Key, *, secret: bool = False) -> Iterator[tuple[Key, Any]]:
    """Every key that is not itself a table, with a value that may be shown."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            marked = secret or _is_secret(field.metadata)
            yield from _leaves(getattr(value, name), (*path, name), secret=marked)
    elif isinstance(value, list | tuple) and any(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)), secret=secret)
    elif isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, str(name)), secret=secret)
    else:
        yield path, _shown(value, secret=secret)


def _shown(value: Any, *, secret: bool) -> Any:
    if isinstance(value, SecretStr | SecretBytes):
        value, secret = value.get_secret_value(), True
    if secret:
        return MASK if value else value
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    if isinstance(plain, list):
        return [_mask_url(item) for item in plain]
    return _mask_url(plain)


def _mask_url(value: Any) -> Any:
    """Hide the password of ``postgresql://user:password@host/name``."""
    return re.sub(r"(://[^:/@\s]*:)[^/@\s]+@", rf"\g<1>{MASK}@", value) if isinstance(value, str) else value


# --- what went wrong --------------------------------------------------------------------------------------


def _at(key: Key, sources: Mapping[str, Source]) -> str:
    """``server.toml:3: grpc.port``."""
    for length in range(len(key), 0, -1):
        if source := sources.get(".".join(key[:length])):
            return f"{source}: {'.'.join(key)}"
    return ".".join(key)


def _problem(model: Any, detail: ErrorDetails, sources: Mapping[str, Source]) -> str:
    # pydantic's location also names the arm of a union: those parts are not keys.
    key: Key = ()
    for part in map(str, detail["loc"]):
        if _type_at(model, (*key, part)) is not None or detail["type"] == "extra_forbidden":
            key += (part,)
    at = _at(key, sources)
    if detail["type"] == "extra_forbidden":
        return at.removesuffix(".".join(key)) + _unknown(model, key)
    if detail["type"] == "missing":
        return f"{at} is required"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
    if not key:
        return message
    value = detail["input"]
    if isinstance(value, dict | list):
        return f"{at}: {message}"
    verb = "" if message.startswith("should") else "is refused: "
    return f"{at} = {_error_value(model, key, value)} {verb}{message}"


def _error_value(model: Any, key: Key, value: Any) -> str:
    """The refused value as it may be shown."""
    for arm in _arms(_type_at(model, key[:-1])):
        field = arm.model_fields.get(key[-1]) if hasattr(arm, "model_fields") else None
        if field and (_is_secret(field.metadata) or {SecretStr, SecretBytes} & set(_arms(field.annotation))):
            return MASK
    return repr(_mask_url(value))


def _is_secret(metadata: list[Any]) -> bool:
    return any(isinstance(mark, Secret) or mark is Secret for mark in metadata)


def _hints(model: Any, details: list[ErrorDetails], path: Path | None) -> list[str]:
    hints = []
    for detail in details:
        key = tuple(map(str, detail["loc"]))
        if detail["type"] == "missing":
            hints.append(f"set {'.'.join(key)} in the file, or {PREFIX}{'__'.join(key).upper()}")
        elif detail["type"] == "extra_forbidden":
            others = [role for role, other in roles().items() if key[0] in _names(other)]
            if others and path and key[0] not in _names(model):
                hints.append(
                    f"{key[0]!r} belongs to the {' and '.join(others)} configuration: is {path} right?"
                )
    return hints


def _config_error(problems: list[str], hints: list[str]) -> ConfigError:
    hint = "; ".join(dict.fromkeys(hints)) or "`lepton config schema ROLE` lists every key with its bounds"
    if len(problems) == 1:
        return ConfigError(problems[0], hint=hint)
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return ConfigError(f"{len(problems)} problems in the configuration:{lines}", hint=hint)
