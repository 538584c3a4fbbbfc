"""Has the owner's data changed? Answered from names, sizes and times of change; nothing is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lepton_client.config import TaskSection

MAX_FILES: Final = 10_000  # of a data folder that are looked at


def fingerprint(section: TaskSection) -> tuple[object, ...]:
    """Changes when the files behind a data source do: their names, sizes and times of change."""
    path = section.data.get("path")
    if not isinstance(path, str):
        return ()
    return tuple(_stamps(Path(path).expanduser()))


def _stamps(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        stat = path.stat()
        yield str(path), stat.st_size, stat.st_mtime_ns
        if path.is_dir():
            for number, child in enumerate(sorted(path.rglob("*"))):
                if number >= MAX_FILES:
                    return
                stat = child.stat()
                yield str(child), stat.st_size, stat.st_mtime_ns
    except OSError as error:
        yield str(path), -1, error.errno or -1
