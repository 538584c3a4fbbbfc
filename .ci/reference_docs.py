"""Write the generated parts of the reference pages anew; ``--check`` fails if that changes anything.

docs/configuration.md: the tables of every role's keys, from the models. docs/cli.md: every command with its
arguments and options, from the command line itself. What people wrote stands above the mark and stays.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lepton_fl.cli.app import build
from lepton_fl.cli.schema import schema_of
from lepton_fl.config import roles

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARK = "<!-- Everything below is generated: make docs. -->\n"
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "maxLength": "at most {} characters",
    "maxItems": "at most {}",
}


def configuration() -> str:
    """One table per section of each role."""
    return "".join(_role(name, model) for name, model in roles().items())


def commands() -> str:
    """One section per command."""
    root = typer.main.get_command(build())
    return "".join(_command(path, command) for path, command in _leaves(root, "lepton"))


def _leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    if path != "lepton" and command.invoke_without_command:
        yield path, command
    for name in sorted(command.commands):
        yield from _leaves(command.commands[name], f"{path} {name}")


def _command(path: str, command: click.Command) -> str:
    parameters = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    usage = [
        path,
        *(p.make_metavar(click.Context(command)) for p in parameters if p.param_type_name == "argument"),
    ]
    lines = [f"\n### `{' '.join(usage)}`\n\n{inspect.cleandoc(command.help or '').strip()}\n"]
    if parameters:
        lines.append("\n| argument or option | meaning | default |\n|--|--|--|\n")
        lines += [_parameter(parameter) for parameter in parameters]
    return "".join(lines)


def _parameter(parameter: click.Parameter) -> str:
    name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        name = parameter.make_metavar(click.Context(click.Command("x"))).strip("[]")
    text = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
    if isinstance(parameter.type, click.Choice):
        text += f" One of {', '.join(f'`{choice}`' for choice in parameter.type.choices)}."
    if parameter.envvar:
        text += f" Also from `{parameter.envvar}`."
    default = parameter.default
    shown = (
        "required"
        if parameter.required
        else ""
        if default in (None, False, (), []) or callable(default)
        else f"`{default}`"
    )
    return f"| `{name}` | {text} | {shown} |\n"


def _role(name: str, model: type[BaseModel]) -> str:
    schema = schema_of(model)
    properties = schema["properties"]
    lines = [f"\n## {name}\n"]
    if own := {key: value for key, value in properties.items() if not _section(schema, value)}:
        lines.append(_table(schema, own, model))
    return "".join([*lines, *_sections(schema, properties, model, "", {})])


def _sections(
    schema: dict[str, Any],
    properties: dict[str, Any],
    model: type[BaseModel] | None,
    where: str,
    shown: dict[type[BaseModel], str],
) -> Iterator[str]:
    """One table for each key that is a table, and for those within it."""
    for key, value in properties.items():
        if found := _section(schema, value):
            inner = _model(model, key) if model else None
            yield f"\n### {_brackets(where + key, value)}\n\n{_words(found)}\n"
            if inner is not None and inner in shown:
                yield f"\nThe keys of {shown[inner]}.\n"
                continue
            if inner is not None:
                shown[inner] = _brackets(where + key, value)
            yield _table(schema, found["properties"], inner)
            yield from _sections(schema, found["properties"], inner, f"{where}{key}.", shown)


def _brackets(key: str, value: dict[str, Any]) -> str:
    return f"[[{key}]]" if value.get("type") == "array" else f"[{key}]"


def _words(section: dict[str, Any]) -> str:
    """The first sentence of a table's own text; that of a role's sections begins with their name."""
    first = str(section.get("description", "")).split("\n")[0]
    text = (first.partition(": ")[2] if first.startswith("[") else first).replace("``", "`")
    return text[:1].upper() + text[1:]


def _section(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    """The definition behind a key that is a table, or an array of tables."""
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    for part in value.get("anyOf", []):
        reference = reference or part.get("$ref")
    found = schema["$defs"][reference.split("/")[-1]] if reference else None
    return found if found and "properties" in found else None


def _model(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation: Any = model.model_fields[key].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _table(schema: dict[str, Any], keys: dict[str, Any], model: type[BaseModel] | None) -> str:
    rows = ["\n| key | type | default | meaning |\n|--|--|--|--|\n"]
    for key, value in keys.items():
        text = " ".join(value.get("description", "").split()).replace("|", "\\|")
        if found := _section(schema, value):
            rows.append(f"| `{key}` | table, see below | | {text or _words(found)} |\n")
        else:
            default = _default(model, key, value)
            rows.append(f"| `{key}` | {_type(schema, value)} | {default} | {text} |\n")
    return "".join(rows)


def _default(model: type[BaseModel] | None, key: str, value: dict[str, Any]) -> str:
    field = model.model_fields[key] if model else None
    if field is not None and field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "see meaning"
    default = value.get("default")
    if default in ("", None, [], {}):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, float):
        return f"`{default:.6g}`"
    return f"`{default!r}`".replace("'", '"')


def _type(schema: dict[str, Any], value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_type(schema, part) for part in value["anyOf"] if part.get("type") != "null")
    if "enum" in value:
        return ", ".join(f'`"{item}"`' if isinstance(item, str) else f"`{item}`" for item in value["enum"])
    if "$ref" in value:
        return _type(schema, schema["$defs"][value["$ref"].split("/")[-1]])
    if value.get("type") == "array":
        inner = _type(schema, value["items"]) if "items" in value else "values"
        return f"list of {inner}" + _bounds(value)
    return str(value.get("type", "any")).replace("object", "table") + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    found = [text.format(f"{value[key]:.6g}") for key, text in BOUNDS.items() if key in value]
    return f", {', '.join(found)}" if found else ""


def main() -> None:
    """Write, or check."""
    stale = []
    for name, generate in (("configuration.md", configuration), ("cli.md", commands)):
        old = (DOCS / name).read_text()
        new = old.split(MARK)[0] + MARK + generate()
        if "--check" not in sys.argv:
            (DOCS / name).write_text(new)
        elif new != old:
            stale.append(f"docs/{name}")
    if stale:
        sys.exit(f"{' and '.join(stale)} stale: run make docs")


if __name__ == "__main__":
    main()
