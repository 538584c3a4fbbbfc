"""Kills a device at every step of a delivery; run by ``test_delivery_crashes.py`` as a process of its own.

    python crash_driver.py FOLDER

FOLDER holds ``shelf/``, ``root.json``, ``names.json`` (the names of three releases), ``device/``, which
serves the first of them, and ``device2/``, which serves the second. Before each operation that changes a file
(an audit event of the interpreter, or a chunk that arrives) a forked child ends itself: by SIGKILL, or, as if
the power was cut, by SIGKILL after what was not yet on the disk is torn. The parent looks at what a restarted
device would serve, kills the next try at another step, looks again, lets it finish, and looks again. What was
found is one JSON object on standard output.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from lepton_fl.delivery.deliver import Device, deliver
from lepton_fl.delivery.fetch import Limits
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.delivery.slots import Slots, served
from lepton_fl.delivery.trust import TrustStore

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.chmod"}
TASK = "lepton_fl.tasks.images:digits"


class Reaper:
    """Counts the operations of a delivery, and ends the process at one of them."""

    def __init__(self) -> None:
        self.folder, self.at, self.torn, self.seen, self.active = "", -1, False, 0, False
        self.fresh: set[str] = set()  # opened for writing and not synced since
        sys.addaudithook(self.hook)

    def hook(self, event, arguments) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            writing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writing or not str(path).startswith(self.folder):
                return
            self.step()
            self.fresh.add(str(path))
        elif event in CHANGES:
            self.step()

    def step(self) -> None:
        if self.seen == self.at:
            self.active = False
            if self.torn:
                self.tear()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def tear(self) -> None:
        """What was written and not synced may be there in part only."""
        for path in self.fresh:
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)

    def synced(self, descriptor) -> None:
        if self.active:
            self.fresh.discard(os.readlink(f"/proc/self/fd/{descriptor}"))


class Local:
    """The coordinator, in this process; a chunk that arrives is a step, too."""

    def __init__(self, shelf, reaper) -> None:
        self.shelf, self.reaper = shelf, reaper

    def metadata(self, name):
        return self.shelf.repository.read(name)

    def chunks(self, names):
        for name in names:
            if self.reaper.active:
                self.reaper.step()
            yield self.shelf.blobs.read(name)


def main() -> None:
    folder = Path(sys.argv[1])
    shelf, reaper = Shelf(folder / "shelf"), Reaper()
    os.fsync = reaper.synced  # no disk is needed to know what would be on it

    def run(device_folder, name, serial=1):
        slots = Slots(device_folder)
        trust = TrustStore(device_folder / "metadata", (folder / "root.json").read_bytes)
        device = Device(slots, trust, Local(shelf, reaper), TASK, Limits(), lambda path: None)
        return deliver(device, json.dumps({"release": {"manifest": name, "serial": serial}}))

    device = folder / "try"

    def attempt(start, name, at, torn):
        """One delivery in a forked child that dies at step ``at``; returns whether it did."""
        if start is not None:
            shutil.rmtree(device, ignore_errors=True)
            shutil.copytree(start, device, symlinks=True)
        child = os.fork()
        if child == 0:
            reaper.folder, reaper.at, reaper.torn, reaper.active = str(device), at, torn, True
            os._exit(0 if run(device, name).state == "serving" else 3)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"step {at}: {status}"
        return os.WIFSIGNALED(status)

    def look(device, source, target):
        """What a restarted device would serve is whole; returns its name."""
        found = served(device)
        assert found in (source, target), f"serves {found[:12]!r}"
        if found:
            Slots(device).verified(found)
        return found

    def finish(device, source, target):
        outcome = run(device, target)
        if outcome.fault == "crashed":  # both kills hit its self-test: rightly given up, and asked for again
            look(device, source, source)
            outcome = run(device, target, serial=2)
        assert (outcome.state, outcome.serving) == ("serving", target), outcome
        Slots(device).verified(target)
        left = sorted(p.name for p in (device / "slots").iterdir())
        assert left == sorted({target, source} - {""}), left

    (folder / "empty").mkdir(exist_ok=True)
    first, second, third = json.loads((folder / "names.json").read_text())
    kills, corrupt, switched = 0, [], 0
    cases = [("empty", "", second), ("device", first, second), ("device2", second, third)]
    for start, source, target in [*cases, ("device2", second, first)]:
        for torn in (False, True):
            at, died = 0, True
            while died:
                died = attempt(folder / start, target, at, torn)
                kills += died
                try:
                    switched += died and look(device, source, target) == target
                    if died:
                        kills += attempt(None, target, at * 7 % 29, not torn)
                        look(device, source, target)
                    finish(device, source, target)
                except AssertionError as error:
                    corrupt.append(f"{start} step {at} torn={torn}: {error}")
                at += 1
    json.dump({"kills": kills, "corrupt": corrupt, "switched": switched}, sys.stdout)


main()
