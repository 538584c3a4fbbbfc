"""The JSON Schema of a configuration, with what every key means.

A field says so by its ``description``, or, as plans and scenarios do, by the comment behind it or above it in
the source: there its meaning stands beside its bounds, once.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Any, get_args

from pydantic import BaseModel


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model, each key of it and of its tables described.

    Args:
        model: Of a role, or of any table; its tables have names of their own.
    """
    found = model.model_json_schema()
    tables = {table.__name__: table for table in _tables(model, [])}
    for name, part in [(model.__name__, found), *found.get("$defs", {}).items()]:
        if (table := tables.get(name)) is not None:
            _describe(table, part["properties"])
    return found


def _tables(kind: Any, found: list[type[BaseModel]]) -> list[type[BaseModel]]:  # noqa: ANN401 - annotations
    """Every model within an annotation, however deep."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind not in found:
            found.append(kind)
            for field in kind.model_fields.values():
                _tables(field.annotation, found)
        return found
    for part in get_args(kind):
        _tables(part, found)
    return found


def _describe(table: type[BaseModel], properties: dict[str, Any]) -> None:
    said: dict[str, str] = {}
    for kind in reversed(table.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            said |= comments(kind)
    for name, words in said.items():
        if name in properties:
            properties[name].setdefault("description", words)


def comments(kind: type) -> dict[str, str]:
    """What the source says of each field of a class, as a sentence; {} where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    lines = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef), "its source"
    return {
        node.target.id: words
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if (words := _sentence(_above(lines, node.lineno) + _beside(lines, node)))
    }


def _above(lines: dict[int, tuple[str, bool]], first: int) -> list[str]:
    """The lines of nothing but comment right above a line."""
    start = first
    while lines.get(start - 1, ("", False))[1]:
        start -= 1
    return [lines[number][0] for number in range(start, first)]


def _beside(lines: dict[int, tuple[str, bool]], node: ast.AnnAssign) -> list[str]:
    return [lines[n][0] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in lines]


def _sentence(parts: list[str]) -> str:
    text = " ".join(parts).replace("``", "`")
    if not text:
        return ""
    first = text.split()[0].rstrip(",:;")
    begins = text[0].upper() if first.isalpha() else text[0]  # a key's name stays as it is
    return begins + text[1:] + ("" if text.endswith(".") else ".")
