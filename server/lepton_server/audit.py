"""The journal, checked by somebody who need not trust the coordinator: offline, and in one pass.

An export is one header line, then one line an event: the very bytes whose SHA-256 is the event's hash and
which the next event names. So no byte can change unseen, checking costs one hash a line, and only events that
promise something are read. Whoever holds the database can write a whole new history; a head that was
published before shows it.

Example::

    with open("journal.jsonl", "rb") as file:
        report = verify_export(file, published=Head(812, "77ab…"))
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import ConfigError, LeptonError, NotFound, StateCorrupt
from lepton_fl.files import GENESIS, JOURNAL, BlobStore, canonical_json, sha256_hex, translated
from lepton_fl.privacy.record import LedgerReport, Verifier
from lepton_server.store import KINDS, Head, Store
from lepton_server.store.events import MAX_BODY, LedgerBody, decode_body

FORMAT: Final = "lepton journal export 1"
_MAX_LINE = 2 * MAX_BODY + 4096  # bytes; a body is text in a line, so that its quotes are escaped
_HINT = "It was altered after it was written, or damaged. Compare with another copy."


@dataclass(frozen=True)
class AuditReport:
    """What a whole journal proves.

    Attributes:
        head: Its newest event.
        ledger: What its privacy ledger proves, computed anew.
        models: Models that the journal names.
        releases: Releases that were published and not withdrawn: SHA-256 of the manifest -> task, sequence.
    """

    head: Head
    ledger: LedgerReport
    models: int
    releases: Mapping[str, tuple[str, int]]


class Auditor:
    """Takes every event of a journal, oldest first, and refuses the first that cannot be true."""

    def __init__(self, published: Head | None = None, *, deep: bool = False) -> None:
        """Begin with an empty journal.

        Args:
            published: A head that was noted elsewhere and must be part of this journal.
            deep: Also hold every body against the schema of its kind.
        """
        self._published, self._deep = published, deep
        self._seq, self._hash = 0, GENESIS
        self._ledger = Verifier()
        self._private: set[str] = set()  # runs whose every model must be paid for
        self._owed: dict[tuple[str, int], str] = {}
        self._paid: dict[tuple[str, int], str] = {}
        self._models = 0
        self._releases: dict[str, tuple[str, int]] = {}

    def take(self, line: bytes) -> None:
        """The next event's line, without its newline.

        Raises:
            StateCorrupt: Names the event and what is wrong with it.
        """
        seq = self._seq + 1
        prefix = b'["%b","%b",%d,"' % (_FORMAT, self._hash.encode(), seq)
        if not line.startswith(prefix):
            raise StateCorrupt(f"Event {seq} is missing, altered, or follows an altered one.", hint=_HINT)
        previous, self._seq, self._hash = self._hash, seq, sha256_hex(line)
        if self._published and seq == self._published.seq and self._hash != self._published.hash:
            raise StateCorrupt(
                f"Event {seq} is not the one that was published: this is another history.", hint=_HINT
            )
        kind = line[len(prefix) :].split(b'","', 2)[1:2]  # after the time, which has no quotes
        if not kind or kind[0] not in _KINDS:
            raise StateCorrupt(f"Event {seq} is of no known kind.", hint=_HINT)
        if self._deep or kind[0] in _WATCHED:
            self._read(line, previous)

    def _read(self, line: bytes, previous: str) -> None:
        time, kind, subject, text = self._parsed(line)
        if self._deep:
            self._hold(kind, subject, text)
        try:
            body = json.loads(text)
            if kind in _LEDGER:
                event = {"seq": self._seq, "time": time, "kind": kind, "subject": subject, "body": body}
                self._ledger.take(event | {"prev": previous, "hash": self._hash})
            self._watch(kind, body)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StateCorrupt(
                f"Event {self._seq} ({kind}) is not of its kind's form.", hint=_HINT
            ) from error

    def report(self) -> AuditReport:
        """What the events so far prove.

        Raises:
            StateCorrupt: The published head is not among them, or a private model was charged to nobody.
        """
        if self._published and self._seq < self._published.seq:
            raise StateCorrupt(
                f"The journal ends at event {self._seq}, a head at {self._published.seq} was published: "
                "its end was cut off.",
                hint=_HINT,
            )
        for (run, round_), sha256 in self._owed.items():
            if run in self._private and self._paid.get((run, round_)) != sha256:
                raise StateCorrupt(f"The model of run {run}, round {round_} was charged to nobody.")
        ledger = self._ledger.report()
        return AuditReport(Head(self._seq, self._hash), ledger, self._models, dict(self._releases))

    def _parsed(self, line: bytes) -> tuple[float, str, str, str]:
        try:
            _, _, _, time, kind, subject, text = json.loads(line)
            return float.fromhex(time), str(kind), str(subject), str(text)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise StateCorrupt(f"Event {self._seq} cannot be read.", hint=_HINT) from error

    def _hold(self, kind: str, subject: str, text: str) -> None:
        try:
            good = decode_body(kind, text).subject == subject
            # A body that an older coordinator wrote lacks what came later, and is canonical all the same.
            good = good and canonical_json(json.loads(text)).decode() == text
        except (LeptonError, ValueError) as error:
            raise StateCorrupt(f"Event {self._seq}: {error}", hint=_HINT) from error
        if not good:
            raise StateCorrupt(f"Event {self._seq} ({kind}) is not in the form that is written.", hint=_HINT)

    def _watch(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "run.queued":
            if (body["spec"].get("privacy") or {}).get("unit") == "device":
                self._private.add(body["run_id"])
        elif kind == "model.created":
            self._models += 1
            if body["round"] and body["run_id"] in self._private:
                self._owed[body["run_id"], body["round"]] = body["model_sha256"]
        elif kind == "privacy.committed":
            self._paid[body["run_id"], body["round"]] = body["model_sha256"]
        elif kind == "release.published":
            self._releases[body["release"]] = (body["task"], body["sequence"])
        elif kind == "release.withdrawn":
            self._releases.pop(body["release"], None)


_FORMAT = JOURNAL.encode()
_KINDS = frozenset(kind.encode() for kind in KINDS)
_LEDGER = frozenset(kind for kind, body in KINDS.items() if issubclass(body, LedgerBody))
_WATCHED = frozenset(
    kind.encode()
    for kind in _LEDGER | {"run.queued", "model.created", "release.published", "release.withdrawn"}
)


# --- the file ---------------------------------------------------------------------------------------


def export_lines(head: Head, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of an export, each with its newline."""
    yield _header(head.seq, head.hash)
    for line in lines:
        yield line + b"\n"


def write_lines(path: Path, lines: Iterable[bytes]) -> int:
    """Write a new file, mode 0600, however long; return its bytes. Lines are read as they are written.

    Raises:
        DiskFull: No space was left; nothing is left behind.
        StateError: The file is there, or its folder may not be written.
    """
    written = 0
    with translated(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                for line in lines:
                    written += file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return written


def verify_export(file: BinaryIO, published: Head | None = None, *, deep: bool = False) -> AuditReport:
    """Check an export as it is read, line by line; see :class:`Auditor` for the arguments.

    Raises:
        StateCorrupt: Names the first thing that is not true.
    """
    try:
        header = json.loads(file.readline(1000))
        events, last = header["events"], header["head"]
        known = header["format"] == FORMAT and type(events) is int and _is_digest(last)  # 1 is not 1.0
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise StateCorrupt(
            f"Expected a journal that begins with format {FORMAT!r}.",
            hint="`lepton audit export` writes one; `lepton run journal` writes a part of one.",
        )
    file.seek(0)
    if file.readline(1000) != _header(events, last):
        raise StateCorrupt("The first line was altered.", hint=_HINT)
    auditor = Auditor(published, deep=deep)
    while line := file.readline(_MAX_LINE):
        if not line.endswith(b"\n"):
            raise StateCorrupt("The file ends within a line, or a line has no end.", hint=_HINT)
        auditor.take(line[:-1])
    report = auditor.report()
    if report.head != (events, last):
        raise StateCorrupt(
            f"The file announces {str(events)[:40]} events that end in {str(last)[:12]}…; it has "
            f"{report.head.seq} that end in {report.head.hash[:12]}….",
            hint=_HINT,
        )
    return report


def parse_head(text: str) -> Head:
    """Read ``SEQ:HASH``; raises ConfigError."""
    seq, colon, digest = text.strip().partition(":")
    if colon and seq.isascii() and seq.isdigit() and len(seq) < 20 and _is_digest(digest):
        return Head(int(seq), digest)
    raise ConfigError(
        f"Expected a head as SEQ:HASH, such as 812:77ab…, got {text[:100]!r}.",
        hint="`lepton audit verify` prints it.",
    )


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _header(events: int, head: str) -> bytes:
    return canonical_json({"format": FORMAT, "events": events, "head": head}) + b"\n"


# --- what the journal names -------------------------------------------------------------------------


def verify_blobs(store: Store, blobs: BlobStore) -> tuple[int, int]:
    """Check the stored bytes of every model and optimiser state that the journal names.

    Checkpoints of older rounds are deleted in time; the newest and the best of each run must be there.

    Returns:
        How many are there and have their hash, and how many were deleted in time.

    Raises:
        StateCorrupt: One is damaged, or one that must be there is not.
    """
    named, needed = named_blobs(store)
    there = {sha256 for sha256 in named | needed.keys() if _intact(blobs, sha256)}
    for sha256 in needed.keys() - there:
        # A run that is under way may have moved on, and dropped it, since the journal was read.
        if sha256 in _needed_now(store, needed[sha256]):
            raise StateCorrupt(
                f"Blob {sha256} of run {needed[sha256]} is not in {blobs.folder}.",
                hint="Restore it from a copy of that folder.",
            )
    return len(there), len(named - there)


def named_blobs(store: Store) -> tuple[set[str], dict[str, str]]:
    """The models and optimiser states that the journal names, and those that must be there, by run."""
    named, needed = set[str](), dict[str, str]()
    for run in store.runs():
        rounds = [row for row in store.rounds(run.id) if row.state == "committed"]
        named |= {model.sha256 for model in store.models(run.id)}
        named |= {row.state_sha256 for row in rounds if row.state_sha256}
        newest = rounds[-1].state_sha256 if rounds and not run.finished else None
        for what in (run.model_sha256, run.best_sha256, newest):
            if what:
                needed[what] = run.id
    return named, needed


def _intact(blobs: BlobStore, sha256: str) -> bool:
    """Whether it is there; raises StateCorrupt where it is damaged."""
    try:
        blobs.open(sha256).close()
    except NotFound:
        return False
    return True


def _needed_now(store: Store, run_id: str) -> set[str | None]:
    run = store.run(run_id)
    states = {row.state_sha256 for row in store.rounds(run_id)[-1:] if not run.finished}
    return {run.model_sha256, run.best_sha256} | states


def verify_releases(folder: Path, journaled: Mapping[str, tuple[str, int]]) -> int:
    """Check the signed list of releases, the manifests it names, and that the journal knows them.

    Args:
        folder: The coordinator's release folder or a copy.
        journaled: :attr:`AuditReport.releases`.

    Returns:
        How many releases are signed.

    Raises:
        TrustError: The list is not signed as its root demands.
        StateCorrupt: List and journal disagree, or a manifest is damaged.
    """
    shelf = Shelf(folder, make=False)
    shelf.repository.root()
    signed = shelf.repository.releases()
    for name, (task, sequence) in journaled.items():
        if name not in signed:
            raise StateCorrupt(f"Release {name[:12]}… ({task}, {sequence}) is in the journal and not signed.")
    for name, row in signed.items():
        if journaled.get(name) != (row.get("task"), row.get("sequence")):
            raise StateCorrupt(
                f"Release {name[:12]}… is signed and not in the journal.",
                hint="Try again if one is being published just now; else it was signed elsewhere.",
            )
        shelf.manifest(name)
    return len(signed)
