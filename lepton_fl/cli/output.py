"""What commands print: data on standard output, everything else on standard error.

With ``--format json`` standard output is exactly one JSON document, or nothing when the command failed; the
failure is then a JSON object on standard error. Exit codes are those of ``lepton_fl.errors``; 2 is a wrong
command line, 1 anything unexpected. Example::

    @app.command("list")
    def list_(format: FormatOption = Format.TEXT) -> None:
        print_data([{"id": "a", "last_seen": when}], format=format, title="Devices", columns=["id"])

Nothing here raises for a closed pipe: ``lepton devices list | head`` ends quietly.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from enum import Enum, StrEnum
from math import isfinite
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.errors import ConfigError, LeptonError

if TYPE_CHECKING:
    from rich.console import Console

DEBUG = "LEPTON_DEBUG"  # environment variable: show tracebacks
UNEXPECTED = 1
USAGE = 2
INTERRUPTED = 130  # the shell's number for Ctrl-C
DOCS = "docs/errors.md"


class Format(StrEnum):
    """How data are printed."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Print text for people or one JSON document.")]


def console(*, stderr: bool = False) -> "Console":
    """A terminal writer; without colour when NO_COLOR is set or the stream is not a terminal."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=not _stream(stderr).isatty(), highlight=False)


def is_terminal(*, stderr: bool = True) -> bool:
    """Whether a person may be watching the stream."""
    return bool(_stream(stderr).isatty())


def say(text: str) -> None:
    """A remark for the person at the terminal, on standard error, so that data stay clean."""
    console(stderr=True).print(text, markup=False)


def plain(value: object) -> Any:  # noqa: ANN401 -- JSON has no narrower type
    """The value in JSON types: times in ISO 8601 (UTC unless they say otherwise), bytes as hex, no NaN.

    A float that is not finite becomes None, because JSON cannot say it.
    """
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat(timespec="milliseconds")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, PurePath):
        return str(value)
    return _plain_container(value)


def _plain_container(value: object) -> Any:  # noqa: ANN401 -- JSON has no narrower type
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):  # a pydantic model, without importing pydantic
        return plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    raise TypeError(f"cannot print a {type(value).__name__} as data")


def print_data(
    data: object,
    *,
    format: Format = Format.TEXT,
    title: str = "",
    columns: Sequence[str] | None = None,
) -> None:
    """Print one document.

    Args:
        data: A list of records (a table), one record (a list of its fields) or a single value.
        format: JSON prints ``data`` whole, with all keys, whatever the columns.
        title: Above the table.
        columns: Keys to show as text, in this order; None means all keys of the first record.
    """
    document = plain(data)
    if format == Format.JSON:
        _write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
        return
    if isinstance(document, list) and all(isinstance(row, dict) for row in document):
        _print_table(document, title, columns)
    elif isinstance(document, dict):
        rows = [(key, document.get(key)) for key in columns or document]
        width = max((len(key) for key, _ in rows), default=0)
        _write(
            (f"{title}\n" if title else "")
            + "\n".join(f"{key:<{width}}  {cell(value)}" for key, value in rows)
        )
    else:
        _write(cell(document))


def cell(value: object) -> str:
    """One value of a table, short: five significant digits, ``-`` for none, times to the second."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={cell(item)}" for key, item in value.items()) or "-"
    return str(value)


@contextmanager
def progress(description: str, total: int | None = None) -> "Iterator[Progress]":
    """A progress bar on standard error; nothing at all unless that is a terminal."""
    if not is_terminal():
        yield Progress()
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console(stderr=True), transient=True) as bar:
        yield Progress(bar, bar.add_task(description, total=total))


class Progress:
    """A handle on one bar, or on none."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:  # noqa: ANN401 -- rich is imported late
        self._bar, self._task = bar, task

    def advance(self, steps: int = 1, *, description: str | None = None) -> None:
        """Move on by so many steps."""
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, description=description)


# --- errors -----------------------------------------------------------------------------------------------

# Module -> the extra that brings it, for a command whose extra is not installed.
_EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "sklearn": "train",
    "pyarrow": "train",
    "PIL": "train",
    "psutil": "client",
    "grpc": "client' or 'lepton-fl[server]",
    "google": "client' or 'lepton-fl[server]",
    "flwr": "client' or 'lepton-fl[server]",
    "sqlmodel": "server",
    "sqlalchemy": "server",
    "alembic": "server",
    "psycopg": "server",
    "prometheus_client": "server",
    "matplotlib": "sim' or 'lepton-fl[variants]",
    "onnx": "variants",
    "onnxscript": "variants",
    "onnxruntime": "variants",
    "torch_pruning": "variants",
    "zstandard": "variants",
    "pandas": "sim",
}


def report(error: BaseException, *, format: Format = Format.TEXT) -> int:
    """Show an error in one block on standard error; return the exit code.

    A traceback is shown only if LEPTON_DEBUG is set.
    """
    if os.environ.get(DEBUG, "") not in ("", "0"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if known := _expected(error):
        return fail(str(known), known.hint, known.code, known.exit_code, format=format)
    hint = f"this is a fault in the program; set {DEBUG}=1 and repeat the command to see where it happened"
    return fail(f"{type(error).__name__}: {error}", hint, "unexpected", UNEXPECTED, format=format)


def fail(message: str, hint: str, code: str, exit_code: int, *, format: Format = Format.TEXT) -> int:
    """Show one error block, or one JSON object, on standard error; return ``exit_code``."""
    if format == Format.JSON:
        body = {"error": code, "message": message, "hint": hint, "exit_code": exit_code, "docs": DOCS}
        sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
        return exit_code
    from rich.text import Text

    block = Text.assemble(("Error: ", "bold red"), message)
    if hint:
        block.append("\nHint:  ", style="bold").append(hint)
    block.append(f"\nCode:  {code} (exit {exit_code}), see {DOCS}", style="dim")
    console(stderr=True).print(block, soft_wrap=True)
    return exit_code


def _expected(error: BaseException) -> LeptonError | None:
    """The error as one of ours, if it is one or means one."""
    if isinstance(error, LeptonError):
        return error
    if isinstance(error, ModuleNotFoundError) and (module := (error.name or "").split(".")[0]) in _EXTRAS:
        return ConfigError(
            f"this command needs {module}, which is not installed",
            hint=f"pip install 'lepton-fl[{_EXTRAS[module]}]'",
        )
    return None


def _stream(stderr: bool) -> Any:  # noqa: ANN401 -- a text stream, or what a test put in its place
    return sys.stderr if stderr else sys.stdout


def _write(text: str) -> None:
    """Print data; if the reader has gone, end the command: nobody wants the rest."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        close_output()
        raise typer.Exit from None


def close_output() -> None:
    """Send what is still to be written nowhere, so that the interpreter can end without complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_table(rows: list[dict[str, Any]], title: str, columns: Sequence[str] | None) -> None:
    names = list(columns or (rows[0] if rows else ()))
    if not rows:
        _write(f"{title}: none" if title else "none")
    elif is_terminal(stderr=False):
        _print_rich(rows, title, names)
    else:
        _print_aligned(rows, title, names)


def _print_rich(rows: list[dict[str, Any]], title: str, names: list[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        side: Any = "right" if _numbers(rows, name) else "left"
        table.add_column(name.replace("_", " "), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(name))) for name in names))
    console().print(table)


def _print_aligned(rows: list[dict[str, Any]], title: str, names: list[str]) -> None:
    """For a file or a pipe: the same table in plain text, with no value cut or folded."""
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    right = [_numbers(rows, name) for name in names]
    if title:
        _write(title)
    for line in lines:
        parts = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ]
        _write("  ".join(parts).rstrip())


def _numbers(rows: list[dict[str, Any]], name: str) -> bool:
    return all(_is_number(row.get(name)) for row in rows)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
