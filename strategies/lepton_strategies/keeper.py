"""Where a node's secrets live between two messages.

Flower starts a process for every message, and nothing of a round may be written down. So the first message
of a round starts a small process beside the node, which keeps the keys in memory and answers through a socket
in a folder that only this user can enter. It ends when nobody has asked for a while. ``Here`` keeps them in
this process instead, for nodes that live as long as their run (``AppNodes``).

    keeper = Beside(NodeKeys(Path("node0.key"), Path("keys.txt")))
    advert = keeper.call("advert", "run/1/1")
"""

import fcntl
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from lepton_fl.errors import ConfigError, LeptonError, Rejection, StateError, TrustError, UpdateRejected
from lepton_fl.files import make_private_folder
from lepton_fl.rounds.secure_device import SecureMember
from lepton_fl.rounds.signed import FileLedger
from lepton_fl.secagg.client import Policy
from lepton_fl.secagg.masks import ring_type
from lepton_strategies.secure_keys import fingerprint, load_key, load_list, pinned

IDLE_S: Final = 3600.0  # without a question, then the process ends and what it kept is gone
START_S: Final = 60.0  # for the process to listen
CALL_S: Final = 600.0  # for one answer; masking a large vector takes seconds
MOST_PATH: Final = 100  # bytes; the system allows a few more
_LONGEST: Final = 2**36  # bytes of one part of a message


@dataclass(frozen=True)
class NodeKeys:
    """A node's own settings for secure aggregation; none of them comes from the server."""

    key: Path  # its signing key, mode 0600; what it has signed is noted beside it
    peers: Path  # the public keys that it trusts, one a line
    deployment: str = "flower"  # the installation's name, the same everywhere
    least_cohort: int = 16  # it takes part in no smaller sum
    hidden_graph: bool = False  # whether the experimental mask graph is allowed

    def member(self) -> SecureMember:
        """The node, with its keys read.

        Raises:
            ConfigError, StateError: they cannot be read, or the node's own key is not on the list.
        """
        signing, keys = load_key(self.key), load_list(self.peers)
        public = signing.public_key().public_bytes_raw()
        if public not in keys:
            raise ConfigError(f"The public key of {self.key} is not on the list {self.peers}.")
        ledger = FileLedger(self.key.with_name(self.key.name + ".signed"))
        policy = Policy(self.least_cohort, self.hidden_graph)
        return SecureMember(fingerprint(public), self.deployment, signing, pinned(keys), ledger, policy)


class Keeper(Protocol):
    """Answers for a node."""

    def call(self, what: str, name: str, *parts: bytes | memoryview) -> list[bytes | memoryview]:
        """Ask for one step of the attempt ``name``; what goes in and comes out, see ``answer``.

        Raises:
            TrustError: the node refuses.
            UpdateRejected: the question does not decode.
        """
        ...


def answer(
    member: SecureMember, what: str, name: str, parts: Sequence[bytes | memoryview]
) -> list[bytes | memoryview]:
    """One step of a node.

    ``advert``: to an advert. ``shares`` offer, roster: to shares. ``deliver`` delivery: to the offer's text.
    ``mask`` vector: to the upload and the masked vector. ``consent`` survivors: to the consent, and an advert
    for a later round. ``reveal`` certificate: to the shares.
    """
    given = [bytes(part) if what != "mask" else part for part in parts]
    if what == "advert":
        return [member.advert(name)]
    if what == "shares":
        return [member.shares(name, bytes(given[0]).decode(), bytes(given[1]))]
    if what == "deliver":
        member.deliver(name, bytes(given[0]))
        return [member.offer(name).to_json().encode()]
    if what == "mask":
        dtype = ring_type(member.offer(name).encoding.bits)
        return list(member.mask(name, np.frombuffer(given[0], dtype).copy()))
    if what == "consent":
        return [member.consent(name, bytes(given[0])), member.prekey()]
    if what == "reveal":
        return [member.reveal(name, bytes(given[0]))]
    raise UpdateRejected(Rejection.MALFORMED, f"There is no step {what[:20]!r}.")


class Here:
    """Keeps a node's secrets in this process."""

    def __init__(self, keys: NodeKeys) -> None:
        self._member = keys.member()

    def call(self, what: str, name: str, *parts: bytes | memoryview) -> list[bytes | memoryview]:
        """See ``Keeper``."""
        return answer(self._member, what, name, parts)


class Beside:
    """Keeps them in a process of their own."""

    def __init__(self, keys: NodeKeys, *, idle_s: float = IDLE_S, folder: Path | None = None) -> None:
        """Prepare; the process is started by the first question, if it is not there.

        Args:
            keys: of the node.
            idle_s: after which it ends.
            folder: for the socket; None = one of this user's own in the system's temporary folder.
        """
        self._keys, self._idle_s, self._folder = keys, idle_s, folder

    def call(self, what: str, name: str, *parts: bytes | memoryview) -> list[bytes | memoryview]:
        """See ``Keeper``."""
        try:
            with self._connection(start=what == "advert") as link:
                link.settimeout(CALL_S)
                _send(link, {"what": what, "name": name}, parts)
                head, found = _receive(link)
        except ConnectionError as error:  # it was just ending
            raise _gone() from error
        if "refused" in head:
            raise _refusal(head)
        return found

    def stop(self) -> None:
        """End the process; nothing happens if it is not there."""
        try:
            with self._connect() as link:
                _send(link, {"what": "stop", "name": ""}, [])
                _receive(link)
        except OSError:
            return

    def _connection(self, start: bool) -> socket.socket:
        try:
            return self._connect()
        except OSError as error:
            if not start:
                raise _gone() from error
        self._start()
        end = time.monotonic() + START_S
        while True:
            try:
                return self._connect()
            except OSError as error:
                if time.monotonic() > end:
                    raise StateError(
                        "The process that keeps this node's keys did not start.",
                        hint="Start it by hand to see why: python -m lepton_strategies.keeper",
                    ) from error
                time.sleep(0.05)

    def _connect(self) -> socket.socket:
        place = str(self._place())
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(place)
        except OSError:
            link.close()
            raise
        return link

    def _start(self) -> None:
        self._keys.member().close()  # says here and now what is wrong with the settings
        settings = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(self._keys).items()}
        settings |= {"idle_s": self._idle_s, "place": str(self._place())}
        process = subprocess.Popen(
            [sys.executable, "-m", "lepton_strategies.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it outlives the process of this message
        )
        process.communicate(json.dumps(settings).encode())  # it forks, and ends: the child is nobody's

    def _place(self) -> Path:
        public = load_key(self._keys.key).public_key().public_bytes_raw()
        folder = self._folder or Path(tempfile.gettempdir()) / f"lepton-{os.geteuid()}"
        make_private_folder(folder)
        status = folder.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise StateError(
                f"{folder} belongs to somebody else, or others can enter it.",
                hint="Remove it, or set TMPDIR.",
            )
        place = folder / f"{fingerprint(public)[:16]}.sock"
        if len(os.fsencode(place)) > MOST_PATH:
            raise StateError(f"{place} is too long for a socket's path.", hint="Set TMPDIR to a shorter one.")
        return place


def _send(link: socket.socket, head: dict[str, Any], parts: Sequence[bytes | memoryview]) -> None:
    text = json.dumps(head).encode()
    sizes = [len(text), *(memoryview(part).nbytes for part in parts)]
    link.sendall(struct.pack(f"<B{len(sizes)}Q", len(sizes), *sizes))
    for part in (text, *parts):
        link.sendall(part)


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[bytes | memoryview]]:
    count = _read(link, 1)[0]
    sizes = struct.unpack(f"<{count}Q", _read(link, 8 * count))
    if not 1 <= count <= 8 or max(sizes) > _LONGEST:
        raise UpdateRejected(Rejection.MALFORMED, "A message to a node's keeper does not decode.")
    text, *parts = [_read(link, size) for size in sizes]
    head: dict[str, Any] = json.loads(bytes(text))
    return head, list(parts)


def _read(link: socket.socket, size: int) -> memoryview:
    data = memoryview(bytearray(size))
    have = 0
    while have < size:
        got = link.recv_into(data[have:])
        if not got:
            raise ConnectionResetError("The other side has gone.")
        have += got
    return data


def _gone() -> TrustError:
    return TrustError(
        "This node's keys of the round are gone: the process that kept them has ended.",
        hint="The node takes part in the next round again.",
    )


def _refusal(head: dict[str, Any]) -> LeptonError:
    if head["refused"] == "trust":
        return TrustError(head["text"], hint=head["hint"])
    return UpdateRejected(Rejection(head["refused"]), head["text"], hint=head["hint"])


# --- the process ------------------------------------------------------------------------------------


def serve(settings: dict[str, Any]) -> None:
    """Keep a node's secrets until nobody has asked for a while."""
    place, idle_s = Path(settings.pop("place")), float(settings.pop("idle_s"))
    keys = NodeKeys(Path(settings.pop("key")), Path(settings.pop("peers")), **settings)
    with open(place.with_suffix(".lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another one is there
        member = keys.member()
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(place))
            listener.listen()
            listener.settimeout(idle_s)
            try:
                while _serve_one(listener, member):
                    pass
            except TimeoutError:
                return
            finally:
                member.close()
                place.unlink(missing_ok=True)


def _serve_one(listener: socket.socket, member: SecureMember) -> bool:
    """Answer one question; False = asked to stop."""
    link, _ = listener.accept()
    with link:
        link.settimeout(CALL_S)
        try:
            head, parts = _receive(link)
            if head["what"] == "stop":
                _send(link, {}, [])
                return False
            _send(link, {}, answer(member, head["what"], head["name"], parts))
        except TrustError as error:
            _send(link, {"refused": "trust", "text": str(error), "hint": error.hint}, [])
        except UpdateRejected as error:
            _send(link, {"refused": error.reason.value, "text": str(error), "hint": error.hint}, [])
        except LeptonError as error:
            _send(link, {"refused": Rejection.FAILED.value, "text": str(error), "hint": error.hint}, [])
        except (OSError, ValueError, KeyError, IndexError):
            return True  # whoever asked has gone, or asked nonsense; the next one may not
    return True


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    if os.fork():
        os._exit(0)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not write the secrets down
    serve(wanted)
