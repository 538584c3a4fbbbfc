"""A coordinator's shelf and a device in two folders; between them a network that can be made to lie."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lepton_fl.delivery.deliver import Device, deliver
from lepton_fl.delivery.fetch import Limits
from lepton_fl.delivery.keys import ROLES, new_key
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.delivery.slots import Slots
from lepton_fl.delivery.trust import TrustStore
from lepton_fl.files import canonical_json

TASK = "lepton_fl.tasks.images:digits"
CHUNK = 1024  # bytes: several chunks in a small file


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here asks whether the disk keeps its word; ``crash_driver.py`` asks whether it was asked."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(name="desired")
def desired_fixture():
    return desired


def desired(name: str, serial: int = 1) -> str:
    return canonical_json({"release": {"manifest": name, "serial": serial}}).decode()


@dataclass
class Network:
    """The coordinator as a device sees it; an attack replaces one of the two functions."""

    shelf: Shelf
    asked: list[str] = field(default_factory=list)
    change_metadata: Callable[[str, bytes], bytes] = lambda name, data: data
    change_chunk: Callable[[str, bytes], bytes] = lambda name, data: data

    def metadata(self, name):
        self.asked.append(name)
        return self.change_metadata(name, self.shelf.repository.read(name))

    def chunks(self, names):
        for name in names:
            self.asked.append(name)
            yield self.change_chunk(name, self.shelf.blobs.read(name))


class World:
    """One shelf, one device."""

    def __init__(self, folder: Path, make_variant, **thresholds) -> None:
        self.folder, self.make_variant = folder, make_variant
        self.now = datetime.now(UTC)
        self.shelf = Shelf(folder / "shelf", now=lambda: self.now)
        counts = {role: max(1, thresholds.get(role, 1)) for role in ROLES}
        self.signers = {
            role: [new_key(folder / "keys", role, None) for _ in range(counts[role])] for role in ROLES
        }
        self.shelf.repository.create(self.signers, thresholds)
        self.pinned = self.shelf.repository.read("1.root.json")
        self.network = Network(self.shelf)
        self.slots = Slots(folder / "device")
        self.tested: list[str] = []
        self.self_test = lambda path: self.tested.append(path.name)
        self.limits = Limits()
        self.count = 0

    def publish(self, **changes):
        """Sign the next release; returns its name."""
        self.count += 1
        changes = {"seed": self.count, "round": self.count} | changes
        variant = self.make_variant(self.folder / f"variant{self.count}", **changes)
        ((name, _),) = self.shelf.publish([variant], self.signers["targets"], chunk_bytes=CHUNK)
        self.shelf.repository.refresh(self.signers)
        return name

    @property
    def device(self):
        trust = TrustStore(self.slots.folder / "metadata", lambda: self.pinned)
        return Device(self.slots, trust, self.network, TASK, self.limits, lambda path: self.self_test(path))

    def deliver(self, name, serial=1):
        return deliver(self.device, desired(name, serial) if name else "")

    def files(self):
        """Everything on the device's disk that decides what is served."""
        folder = self.slots.folder
        paths = [folder / "record.json", *(folder / "slots").rglob("*")]
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file() and ".part" not in str(p)
        }

    def metadata(self):
        """The metadata that the device holds, by name."""
        folder = self.slots.folder / "metadata"
        return {p.name: p.read_bytes() for p in folder.glob("*.json") if not p.is_symlink()}


@pytest.fixture
def world(tmp_path, make_variant):
    return World(tmp_path, make_variant)


@pytest.fixture
def make_world(tmp_path, make_variant):
    return lambda **thresholds: World(
        tmp_path / str(len(list(tmp_path.iterdir()))), make_variant, **thresholds
    )


@pytest.fixture
def copy_tree():
    def copy(source, target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, symlinks=True)

    return copy
