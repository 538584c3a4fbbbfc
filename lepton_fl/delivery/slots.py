"""What a device keeps of releases: two slots, and one small file that says which of them serves.

    <folder>/record.json            the record: in service, the one before, the floor, what failed
             slots/<name>/          a whole, verified release and its manifest
             slots/<name>.part/     one on its way
             metadata/  root.json   what the device trusts (``trust``)

Rules: a slot gets its name by one rename when it is whole and on the disk; the switch is one rename of the
record. A kill at any moment leaves the old release in service or the new one, and never a mixture.
"""

import json
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, ValidationError

from lepton_fl.delivery.fetch import verify
from lepton_fl.delivery.manifest import MAX_MANIFEST, Manifest, Sha256
from lepton_fl.errors import Fault, NotFound, ReleaseRefused, StateCorrupt
from lepton_fl.files import (
    canonical_json,
    make_private_folder,
    read_private,
    remove_tree,
    rename,
    sha256_hex,
    sweep,
    write_atomic,
    write_private,
)
from lepton_fl.plan import Frozen

MANIFEST: Final = "manifest.json"
PART: Final = ".part"
MAX_FAILURES: Final = 8  # that are remembered and reported, the newest last

Count = Annotated[int, Field(ge=0)]


class Failure(Frozen):
    """A release that this device tried and gave up."""

    manifest: Sha256
    fault: Fault
    detail: str
    desired: str  # SHA-256 of the desired state that asked for it: another asking tries again


class Place(Frozen):
    """Where a release stands among those of its task."""

    sequence: Count = 0
    run: str = ""
    round: Count | None = None


class Record(Frozen):
    """All that decides what is served; replaced by one rename."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    current: Sha256 | None = None
    standing: Place = Place()  # of the current release
    previous: Sha256 | None = None  # the last known good
    floor: Place = Place()  # nothing before it may serve again
    failures: tuple[Failure, ...] = ()
    trying: Sha256 | None = None  # whose self-test was started
    starts: Count = 0  # so often

    def failed(self, name: str, desired: str) -> Failure | None:
        """Whether this asking was given up before."""
        found = (f for f in self.failures if (f.manifest, f.desired) == (name, desired))
        return next(found, None)

    def give_up(self, failure: Failure) -> "Record":
        """With one more failure, and no self-test under way."""
        others = [f for f in self.failures if f.manifest != failure.manifest]
        failures = (*others, failure)[-MAX_FAILURES:]
        return self.model_copy(update={"failures": failures, "trying": None, "starts": 0})


class Slots:
    """The releases on one device; one process writes, any number read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slots = folder / "slots"
        self._record = folder / "record.json"

    # --- reading ------------------------------------------------------------------------------------

    def record(self) -> Record:
        """The record; an empty one where nothing was ever delivered.

        Raises:
            StateCorrupt: The file is damaged.
        """
        try:
            return Record.model_validate_json(read_private(self._record))
        except NotFound:
            return Record()
        except ValidationError as error:
            raise StateCorrupt(
                f"{self._record} is damaged.",
                hint="Restore the folder from a copy, or remove it: the release is then fetched again.",
            ) from error

    def path(self, name: str) -> Path:
        """The slot of a release."""
        return self.slots / name

    def has(self, name: str) -> bool:
        """Whether it is installed."""
        return (self.path(name) / MANIFEST).is_file()

    def manifest(self, name: str) -> Manifest:
        """The manifest of an installed release; raises ReleaseRefused if it is not the one of that name."""
        with open(self.path(name) / MANIFEST, "rb") as file:
            data = file.read(MAX_MANIFEST + 1)
        if sha256_hex(data) != name:
            raise ReleaseRefused(Fault.TAMPERED, f"The manifest in {self.path(name)} was altered.")
        return Manifest.from_bytes(data)

    def verified(self, name: str) -> Manifest:
        """The same, with every file checked; raises ReleaseRefused."""
        manifest = self.manifest(name)
        verify(manifest, self.path(name))
        return manifest

    # --- writing ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folders, and remove what a killed process left."""
        make_private_folder(self.slots)
        for folder in (self.folder, self.slots):
            sweep(folder)

    def save(self, record: Record) -> Record:
        """Replace the record, durably; this is the switch."""
        write_private(self._record, canonical_json(record.to_json()))
        return record

    def staging(self, name: str) -> Path:
        """Where a release is put together."""
        return self.slots / (name + PART)

    def adopt(self, manifest: Manifest) -> None:
        """A staged release is whole: give it its slot. Its files are verified and on the disk already."""
        name = manifest.name
        staging = self.staging(name)
        write_atomic(staging / MANIFEST, manifest.to_bytes())
        remove_tree(self.path(name))  # a damaged one of that name
        rename(staging, self.path(name))

    def tidy(self, record: Record, wanted: str) -> None:
        """Remove every slot but the two of the record and the one that is wanted."""
        keep = {record.current, record.previous, wanted, wanted + PART}
        for path in self.slots.iterdir():
            if path.name not in keep:
                remove_tree(path)


def served(folder: Path) -> str:
    """The release in service by the record of ``folder``; empty = none. Cheap: for a look every second."""
    try:
        current = json.loads((folder / "record.json").read_bytes()).get("current")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as error:
        raise StateCorrupt(f"{folder / 'record.json'} cannot be read: {error}.") from error
    return current or ""
