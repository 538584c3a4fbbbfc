"""What a release is: a signed list of files with their hashes, and where they come from.

A release is a variant (``lepton_fl.compression.card``) under a *manifest*: canonical JSON whose SHA-256 names
the release everywhere. Its files travel in chunks that are named by their hash, so that nothing is fetched
twice and a broken download goes on where it stopped. A file may also come as a *pack*: the same bytes
compressed, or the difference to a file of an earlier release (``packs``).

    manifest, blobs = describe(folder, sequence=4, base=(old_manifest, old_folder))
    manifest = Manifest.from_bytes(data)      # ReleaseRefused: no manifest, or not its canonical text
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lepton_fl.compression.card import CARD, MODEL, PARITY, Card, Lineage, read_variant
from lepton_fl.delivery.packs import DIFFERENCES, Transform, pack
from lepton_fl.errors import ConfigError, Fault, ReleaseRefused
from lepton_fl.files import canonical_json, sha256_hex
from lepton_fl.plan import Frozen

FORMAT: Final = "lepton-release/1"
FILES: Final = (CARD, MODEL, PARITY)  # what a release consists of
CHUNK: Final = 256 * 1024  # bytes
MAX_MANIFEST: Final = 512 * 1024  # bytes: a list for 2 GB; one message carries it
PAYS: Final = 0.9  # a pack is offered when it has at most this part of the bytes

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=1, le=2**40)]


class Pack(Frozen):
    """Another way to a file's bytes."""

    base: Sha256 | None = None  # of the file it is the difference to; None = compressed as it is
    transform: Transform
    bytes: Bytes
    chunks: tuple[Sha256, ...]


class File(Frozen):
    """One file of a release."""

    name: Literal["card.json", "model.onnx", "parity.safetensors"]
    bytes: Bytes
    sha256: Sha256
    chunks: tuple[Sha256, ...]
    packs: tuple[Pack, ...] = ()


class Manifest(Frozen):
    """The record that is signed."""

    format: Literal["lepton-release/1"] = FORMAT
    task: str  # package.module:attribute
    task_version: str
    variant: str
    sequence: Annotated[int, Field(ge=1, le=2**31 - 1)]  # of the task's releases: 1, 2, 3, …
    published: str  # when, ISO 8601, for people
    profiles: tuple[str, ...] = ()  # of devices whose gate it passed; empty = it was held against none
    lineage: Lineage
    chunk_bytes: Annotated[int, Field(ge=1024, le=512 * 1024)] = CHUNK
    files: tuple[File, ...]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = tuple(sorted(file.name for file in self.files))
        if names != FILES:
            raise ValueError(f"Expected the files {', '.join(FILES)}, got {', '.join(names)}")
        parts: list[File | Pack] = [*self.files, *(p for file in self.files for p in file.packs)]
        for part in parts:
            if len(part.chunks) != -(-part.bytes // self.chunk_bytes):
                raise ValueError(f"{part.bytes} bytes are not {len(part.chunks)} chunks")
        if any(p.bytes >= file.bytes for file in self.files for p in file.packs):
            raise ValueError("A pack is not smaller than its file")
        return self

    @property
    def size(self) -> int:
        """Bytes that the release takes on the disk of a device, without the manifest."""
        return sum(file.bytes for file in self.files)

    def file(self, name: str) -> File:
        """The entry of a file that every release has."""
        return next(file for file in self.files if file.name == name)

    def to_bytes(self) -> bytes:
        """The canonical text; its SHA-256 is the release's name."""
        return canonical_json(self.to_json())

    @property
    def name(self) -> str:
        """SHA-256 (hex) of the canonical text."""
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            ReleaseRefused: it is too long, no manifest, or not the canonical text of one.
        """
        if len(data) > MAX_MANIFEST:
            raise ReleaseRefused(
                Fault.ENDLESS, f"The manifest has {len(data)} bytes, at most {MAX_MANIFEST} are allowed."
            )
        try:
            found = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ReleaseRefused(
                Fault.TAMPERED, f"The manifest's {where or 'text'} is wrong: {first['msg']}."
            ) from None
        if found.to_bytes() != data:
            raise ReleaseRefused(Fault.TAMPERED, "The manifest is not the canonical text of itself.")
        return found

    def summary(self) -> dict[str, object]:
        """What a list of releases shows; plain JSON."""
        return {
            "task": self.task,
            "variant": self.variant,
            "sequence": self.sequence,
            "run": self.lineage.run,
            "round": self.lineage.round,
            "bytes": self.size,
            "profiles": list(self.profiles),
            "published": self.published,
        }


Blobs = dict[str, bytes]  # by SHA-256


def describe(
    folder: Path,
    *,
    sequence: int,
    base: Path | None = None,
    chunk_bytes: int = CHUNK,
    now: datetime | None = None,
) -> tuple[Manifest, Blobs]:
    """Make the manifest of a variant, and everything that devices may ask for.

    Args:
        folder: The variant's three files.
        sequence: The number of the release among those of its task.
        base: Folder of the release that devices have now; differences to it are offered where they pay.
        chunk_bytes: Size of a chunk.
        now: When it is published.

    Returns:
        The manifest, and its chunks by their hash, the manifest itself among them.

    Raises:
        NotFound, StateCorrupt, StateTooNew: the folder holds no whole variant.
        ConfigError: the model is too large for one manifest.
    """
    card: Card = read_variant(folder)
    blobs: Blobs = {}
    files = tuple(_file(folder / name, base / name if base else None, chunk_bytes, blobs) for name in FILES)
    manifest = Manifest(
        task=card.task,
        task_version=card.task_version,
        variant=card.name,
        sequence=sequence,
        profiles=tuple(sorted({verdict.profile for verdict in card.gate if verdict.passed})),
        published=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
        lineage=card.lineage,
        chunk_bytes=chunk_bytes,
        files=files,
    )
    text = manifest.to_bytes()
    if len(text) > MAX_MANIFEST:
        raise ConfigError(
            f"The manifest of {folder} has {len(text)} bytes, at most {MAX_MANIFEST} are possible.",
            hint="Publish a smaller variant, or without a base for differences.",
        )
    blobs[sha256_hex(text)] = text
    return manifest, blobs


def _file(path: Path, base: Path | None, chunk_bytes: int, blobs: Blobs) -> File:
    data = path.read_bytes()
    old = base.read_bytes() if base is not None and base.exists() else None
    ways: list[tuple[str | None, bytes, Transform]] = [(None, pack(data, None, "plain"), "plain")]
    if old is not None and old != data and len(old) == len(data):  # else positions mean nothing
        tries = ((pack(data, old, name), name) for name in DIFFERENCES)
        ways.append((sha256_hex(old), *min(tries, key=lambda way: len(way[0]))))
    packs, least = [], len(data)
    for source, packed, transform in ways:
        if len(packed) <= PAYS * least:
            least, chunks = len(packed), _chunks(packed, chunk_bytes, blobs)
            packs.append(Pack(base=source, transform=transform, bytes=least, chunks=chunks))
    return File(
        name=path.name,  # type: ignore[arg-type]  # one of FILES
        bytes=len(data),
        sha256=sha256_hex(data),
        chunks=_chunks(data, chunk_bytes, blobs),
        packs=tuple(packs),
    )


def _chunks(data: bytes, size: int, blobs: Blobs) -> tuple[str, ...]:
    names = []
    for chunk in slices(data, size):
        names.append(sha256_hex(chunk))
        blobs[names[-1]] = chunk
    return tuple(names)


def slices(data: bytes, size: int) -> Iterator[bytes]:
    """``data`` in pieces of ``size`` bytes; the last may be shorter."""
    return (data[start : start + size] for start in range(0, len(data), size))


def parse_desired(text: str) -> str:
    """The release that a twin's desired state names (SHA-256 of its manifest); empty = none.

    Raises:
        ReleaseRefused: it names something that is no release.
    """
    try:
        desired = json.loads(text) if text else {}
        name = desired.get("release", {}).get("manifest", "")
    except (ValueError, AttributeError, RecursionError):
        name = None
    if not isinstance(name, str) or (name and (len(name) != 64 or set(name) - set("0123456789abcdef"))):
        raise ReleaseRefused(Fault.UNKNOWN, "The desired state does not name a release.")
    return name
