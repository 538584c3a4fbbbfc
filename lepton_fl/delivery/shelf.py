"""Where a coordinator keeps what devices may fetch: signed metadata and content-addressed chunks.

A shelf is a folder of its own, apart from the models of rounds, so that a device can ask for nothing else::

    <folder>/metadata/     the signed list of releases (``repository``)
             blobs/ab/…    chunks and manifests, named by their SHA-256

It may lie on the coordinator, or on the machine of whoever signs; :meth:`Shelf.take_from` brings it over.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_fl.compression.card import Card, read_variant
from lepton_fl.delivery.manifest import CHUNK, File, Manifest, Pack, describe
from lepton_fl.delivery.repository import LIFE, Repository
from lepton_fl.errors import NotFound, StateConflict
from lepton_fl.files import BlobStore, make_private_folder, sha256_hex

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner


class Shelf:
    """The releases in ``folder``."""

    def __init__(
        self,
        folder: Path,
        *,
        life: Mapping[str, float] = LIFE,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        make: bool = True,
    ) -> None:
        """Nothing is made before something is put there; ``make`` = False: only to be read."""
        self.folder, self._make = folder, make
        self.repository = Repository(folder, life=life, now=now)

    @cached_property
    def blobs(self) -> BlobStore:
        """Chunks and manifests."""
        if self._make:
            make_private_folder(self.folder)
        return BlobStore(self.folder / "blobs", make=self._make)

    def manifest(self, name: str) -> Manifest:
        """The manifest of that name, signed or not; raises NotFound or StateCorrupt."""
        return Manifest.from_bytes(self.blobs.read(name))

    def find(self, wanted: str) -> str:
        """The name of a signed release from a unique beginning of it, ``VARIANT`` or ``VARIANT@SEQUENCE``.

        A variant alone means its newest release.

        Raises:
            NotFound: There is none, or several.
        """
        rows = self.repository.releases()
        found = [name for name in rows if name.startswith(wanted)] if len(wanted) >= 4 else []
        if not found:
            variant, _, number = wanted.partition("@")
            found = [
                name
                for name, row in rows.items()
                if row["variant"] == variant and number in ("", str(row["sequence"]))
            ]
            found = found if number else found[-1:]
        if len(found) == 1:
            return found[0]
        problem = f"{len(found)} releases fit" if found else "There is no release"
        raise NotFound(f"{problem} {wanted!r}.", hint="`lepton release list` shows them.")

    def publish(
        self,
        folders: Iterable[Path],
        signers: Sequence["CryptoSigner"],
        *,
        chunk_bytes: int = CHUNK,
        ungated: bool = False,
    ) -> list[tuple[str, Manifest]]:
        """Sign variants as releases; what devices fetch is in place before the signature is.

        A variant whose newest release has the very same files is not signed again: a publication that was cut
        off is repeated by the same call.

        Args:
            folders: Each with a variant's three files.
            signers: The targets keys.
            chunk_bytes: Size of a chunk.
            ungated: Also variants that were held against no profile. One that failed all of its gates never
                becomes a release.

        Returns:
            Name and manifest of each; of the one there is, where nothing had to be signed.

        Raises:
            NotFound, StateCorrupt: A folder holds no whole variant.
            StateConflict: A round is older than a release of its run, or a gate was not passed.
        """
        folders = list(folders)
        for folder in folders:
            _check_gate(read_variant(folder), ungated)
        made: list[tuple[str, Manifest]] = []
        make_private_folder(self.folder)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            for number, folder in enumerate(folders):
                if (there := self._released(folder)) is not None:
                    made.append((there.name, there))
                    continue
                base = self._latest(folder, Path(scratch, str(number)))
                sequence = self._next_sequence(folder, made)
                manifest, blobs = describe(folder, sequence=sequence, base=base, chunk_bytes=chunk_bytes)
                for blob in blobs.values():
                    self.blobs.put(blob)
                made.append((manifest.name, manifest))
        known = self.repository.releases()
        if fresh := [manifest for name, manifest in made if name not in known]:
            self.repository.publish(fresh, signers)
        return made

    def _next_sequence(self, folder: Path, made: list[tuple[str, Manifest]]) -> int:
        task = read_variant(folder).task
        last = self.repository.next_sequence(task)
        return last + sum(m.task == task and m.sequence >= last for _, m in made)

    def _newest(self, folder: Path) -> Manifest | None:
        """The newest release of the same task and variant."""
        card = read_variant(folder)
        rows = self.repository.releases().items()
        same = [name for name, row in rows if (row["task"], row["variant"]) == (card.task, card.name)]
        return self.manifest(same[-1]) if same else None

    def _released(self, folder: Path) -> Manifest | None:
        """The same, if it has the very files of this folder."""
        newest = self._newest(folder)
        same = newest is not None and all(
            sha256_hex((folder / file.name).read_bytes()) == file.sha256 for file in newest.files
        )
        return newest if same else None

    def _latest(self, folder: Path, scratch: Path) -> Path | None:
        """The files of the newest release of the same task and variant, to offer differences to."""
        newest = self._newest(folder)
        if newest is None:
            return None
        scratch.mkdir()
        for file in newest.files:
            with open(scratch / file.name, "wb") as out:
                out.writelines(self.blobs.read(chunk) for chunk in file.chunks)
        return scratch

    def take_from(self, other: "Shelf") -> list[str]:
        """Bring over what was signed on another machine: chunks first, then root and targets.

        Args:
            other: A copy of this shelf to which releases were added.

        Returns:
            The names of the releases that are new here.

        Raises:
            TrustError: Its metadata are not signed by the keys that this shelf knows.
            StateConflict: It does not continue this shelf.
            NotFound, StateCorrupt: A chunk is missing or damaged.
        """
        known = set(self.repository.releases()) if self.repository.exists else set()
        fresh = [name for name in other.repository.releases() if name not in known]
        for name in fresh:
            manifest = other.manifest(name)
            for blob in _blobs(manifest):
                if not self.blobs.has(blob):
                    self.blobs.put(other.blobs.read(blob))
            self.blobs.put(manifest.to_bytes())
        self.repository.follow(other.repository)
        return fresh

    def tidy(self) -> int:
        """Delete the chunks that no signed release names; returns how many."""
        keep = set()
        for name in self.repository.releases():
            keep |= {name, *_blobs(self.manifest(name))}
        gone = [path for path in self.blobs.folder.glob("??/*") if path.parent.name + path.name not in keep]
        for path in gone:
            self.blobs.delete(path.parent.name + path.name)
        return len(gone)


def _check_gate(card: Card, ungated: bool) -> None:
    if card.offered or (ungated and not card.gate):
        return
    why = "; ".join(reason for verdict in card.gate for reason in verdict.reasons)
    raise StateConflict(
        f"Variant {card.name} passed no gate" + (f": {why}." if why else ", it was held against no profile."),
        hint="Build it with the profiles of your devices (`lepton variants build`)."
        if card.gate
        else "Build it with the profiles of your devices, or publish it --ungated for all of them.",
    )


def _blobs(manifest: Manifest) -> set[str]:
    """Every chunk that a manifest names."""
    parts: list[File | Pack] = [*manifest.files, *(pack for file in manifest.files for pack in file.packs)]
    return {chunk for part in parts for chunk in part.chunks}
