"""Bring the bytes of a release into a folder, and go on where a broken connection or a kill left off.

A chunk is written at its place in its file, and what is in place and has its hash is never asked for again:
that is all the memory a resumed download needs. Torn writes are found by the same look. No more is asked for
than fits the owner's limits: bytes per second, hours, space.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from lepton_fl.delivery.manifest import File, Manifest, Pack
from lepton_fl.delivery.packs import unpack
from lepton_fl.errors import ConnectionFailed, Fault, ReleaseRefused
from lepton_fl.files import make_private_folder, remove, sha256_hex, sync_tree, translated

if TYPE_CHECKING:  # it loads cryptography, 7 MB that a process which only serves does not need
    from lepton_fl.delivery.trust import Source

AT_ONCE: Final = 32  # chunks asked for together
PACKED: Final = ".pack"  # a pack's file on its way


class Paused(Exception):
    """The owner's limits forbid to go on now; ``str`` is the reason. What was fetched stays."""


@dataclass
class Limits:
    """What the owner of a device allows.

    Attributes:
        bytes_per_s: On average; 0 = any.
        quota_bytes: What all releases on this device may take, the one being fetched included; 0 = any.
        min_free_bytes: Left on the disk.
        objection: Asked before every batch; '' or why it must wait.
    """

    bytes_per_s: float = 0.0
    quota_bytes: int = 0
    min_free_bytes: int = 0
    objection: Callable[[], str] = lambda: ""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def check(self) -> None:
        """Raise Paused if it must wait."""
        if reason := self.objection():
            raise Paused(reason)


@dataclass
class Tally:
    """What a download cost."""

    fetched: int = 0  # bytes that travelled
    kept: int = 0  # bytes that were there already
    packs: list[str] = field(default_factory=list)  # which files came as a pack


def fetch(
    manifest: Manifest,
    staging: Path,
    source: "Source",
    limits: Limits,
    *,
    have: Path | None = None,
    tally: Tally | None = None,
) -> Tally:
    """Make the files of a release in ``staging``, whole, verified and on the disk.

    Args:
        manifest: Trusted.
        staging: A folder of this release's own; what an earlier try left there is used.
        source: Where chunks come from; not trusted.
        limits: The owner's.
        have: Folder of the release in service, for differences and for equal files.
        tally: Counts on while it runs; None = a new one.

    Raises:
        Paused: The owner's limits forbid to go on now.
        ReleaseRefused: Wrong bytes came, or the release does not fit.
        ConnectionFailed: The coordinator cannot be reached, or stopped sending.
        DiskFull, StateError: The folder cannot be written.
    """
    tally = tally if tally is not None else Tally()
    make_private_folder(staging)
    _check_space(manifest, staging, limits)
    with translated(staging):
        for file in manifest.files:
            if not _is_whole(staging / file.name, file.bytes, file.sha256):
                _get(file, manifest.chunk_bytes, staging, source, limits, have, tally)
    sync_tree(staging)
    return tally


def _check_space(manifest: Manifest, staging: Path, limits: Limits) -> None:
    there = _taken(staging)
    need = max(0, manifest.size - there)
    others = _taken(staging.parent) - there
    if limits.quota_bytes and others + manifest.size > limits.quota_bytes:
        raise ReleaseRefused(
            Fault.QUOTA,
            f"The release has {manifest.size} bytes, {others} are taken, the quota is {limits.quota_bytes}.",
            hint="Raise delivery.quota_bytes, or ask for a smaller variant.",
        )
    with translated(staging):
        free = shutil.disk_usage(staging).free
    if free - need < limits.min_free_bytes:
        raise ReleaseRefused(
            Fault.QUOTA,
            f"{need} bytes are needed and {free} are free; {limits.min_free_bytes} must stay free.",
            hint="Make room on the disk.",
        )


def _taken(folder: Path) -> int:
    """Bytes on the disk below a folder."""
    sizes = []
    for parent, _, names in os.walk(folder):
        sizes += [os.stat(os.path.join(parent, name)).st_blocks * 512 for name in names]
    return sum(sizes)


def _get(
    file: File, chunk: int, staging: Path, source: "Source", limits: Limits, have: Path | None, tally: Tally
) -> None:
    target = staging / file.name
    old = have / file.name if have is not None else None
    if old is not None and _is_whole(old, file.bytes, file.sha256):
        shutil.copyfile(old, target)
        tally.kept += file.bytes
    elif (pack := _best(file, old)) is not None and _unpacked(
        pack, file, chunk, target, source, limits, old, tally
    ):
        tally.packs.append(file.name)
    else:
        _fill(target, file, chunk, source, limits, tally)
    if not _is_whole(target, file.bytes, file.sha256):  # every chunk fits and the whole does not: signed so
        raise ReleaseRefused(Fault.TAMPERED, f"The chunks of {file.name} do not make the signed file.")


def _best(file: File, old: Path | None) -> Pack | None:
    """The smallest pack that this device can open; None = the file itself."""
    base = sha256_hex(old.read_bytes()) if old is not None and old.exists() else None
    return min((p for p in file.packs if p.base in (None, base)), key=lambda p: p.bytes, default=None)


def _unpacked(
    pack: Pack,
    file: File,
    chunk: int,
    target: Path,
    source: "Source",
    limits: Limits,
    old: Path | None,
    tally: Tally,
) -> bool:
    """Fetch a pack and open it; False when what comes out is not the file, which is then fetched in full."""
    packed = target.with_name(target.name + PACKED)
    _fill(packed, pack, chunk, source, limits, tally)
    base = old.read_bytes() if pack.base is not None and old is not None else None
    try:
        data = unpack(packed.read_bytes(), base, pack.transform, file.bytes)
    except ReleaseRefused:
        data = b""
    if good := sha256_hex(data) == file.sha256:
        target.write_bytes(data)
    remove(packed)
    return good


def _fill(path: Path, part: File | Pack, chunk: int, source: "Source", limits: Limits, tally: Tally) -> None:
    """Fetch the chunks that are not in place."""
    with open(path, "r+b" if path.exists() else "x+b") as out:
        out.truncate(part.bytes)
        missing = list(_missing(out, part, chunk))
        tally.kept += part.bytes - sum(size for _, _, size in missing)
        while missing:
            limits.check()
            batch, missing = missing[:AT_ONCE], missing[AT_ONCE:]
            _take(out, batch, source, limits, tally)


def _missing(out: BinaryIO, part: File | Pack, chunk: int) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of every chunk that is not there."""
    for number, name in enumerate(part.chunks):
        place = number * chunk
        size = min(chunk, part.bytes - place)
        out.seek(place)
        if hashlib.sha256(out.read(size)).hexdigest() != name:
            yield name, place, size


def _take(
    out: BinaryIO, batch: Sequence[tuple[str, int, int]], source: "Source", limits: Limits, tally: Tally
) -> None:
    answers = iter(source.chunks([name for name, _, _ in batch]))
    for name, place, size in batch:
        began = limits.clock()
        data = next(answers, None)
        if data is None:
            raise ConnectionFailed("The coordinator stopped sending.", hint="The download goes on by itself.")
        if len(data) > size:
            raise ReleaseRefused(
                Fault.ENDLESS, f"Expected {size} bytes of chunk {name[:12]}, got {len(data)}."
            )
        if sha256_hex(data) != name:
            raise ReleaseRefused(Fault.TAMPERED, f"What came as chunk {name[:12]} has another hash.")
        out.seek(place)
        out.write(data)
        out.flush()  # a kill then loses nothing that travelled
        tally.fetched += size
        if limits.bytes_per_s:
            limits.sleep(max(0.0, size / limits.bytes_per_s - (limits.clock() - began)))
    if next(answers, None) is not None:
        raise ReleaseRefused(Fault.ENDLESS, "The coordinator sent more chunks than were asked for.")


def _is_whole(path: Path, size: int, digest: str) -> bool:
    """Whether a file has this content."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False


def verify(manifest: Manifest, folder: Path) -> None:
    """Check the files of an installed release against its manifest.

    Raises:
        ReleaseRefused: one is missing or altered.
    """
    with translated(folder):
        for file in manifest.files:
            if not _is_whole(folder / file.name, file.bytes, file.sha256):
                raise ReleaseRefused(
                    Fault.TAMPERED, f"{folder / file.name} is not the file that was installed."
                )
