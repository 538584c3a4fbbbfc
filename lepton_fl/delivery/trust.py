"""On the device: no byte of a release is believed before its signature and its hash.

The Update Framework's client workflow is python-tuf's. What is ours: the transport (``Source``), the name of
a release as the hash of its manifest, and words for what went wrong.

    trust = TrustStore(folder, path.read_bytes)
    manifest = trust.manifest(name, source)      # ReleaseRefused: unsigned, expired, replayed, tampered, …

The first root is pinned and never fetched again; every later one must be signed by the one before. What was
seen last lies in ``folder``, so that a coordinator can only go forward.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from lepton_fl.delivery.manifest import MAX_MANIFEST, Manifest
from lepton_fl.delivery.repository import MAX_METADATA
from lepton_fl.errors import ConnectionFailed, Fault, LeptonError, NotFound, ReleaseRefused
from lepton_fl.files import make_private_folder, sha256_hex, sync_tree, translated

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import UpdaterConfig
    from tuf.ngclient.fetcher import FetcherInterface

MAX_ROOT: Final = 64 * 1024  # bytes
MAX_SMALL: Final = 16 * 1024  # bytes of a timestamp or a snapshot
MAX_ROTATIONS: Final = 64  # roots that one refresh follows


class Source(Protocol):
    """Where bytes come from; nothing it says is believed."""

    def metadata(self, name: str) -> bytes:
        """A metadata file; raises NotFound or ConnectionFailed."""
        ...

    def chunks(self, names: Sequence[str]) -> Iterator[bytes]:
        """Content-addressed chunks in the order asked for; may end early. Raises ConnectionFailed."""
        ...


class TrustStore:
    """What a device believes about releases; in ``folder``, which is its own."""

    def __init__(self, folder: Path, pinned_root: Callable[[], bytes]) -> None:
        """``pinned_root`` gives the first root; it is asked when one is needed."""
        self._folder, self._pinned = folder, pinned_root

    def manifest(self, name: str, source: Source) -> Manifest:
        """The manifest of that name, once signatures say that it is a release today.

        Args:
            name: SHA-256 (hex) of the manifest.
            source: The coordinator.

        Raises:
            ReleaseRefused: It must not be believed; nothing but the metadata cache has changed.
            ConnectionFailed: The coordinator cannot be reached.
            DiskFull, StateError: The cache cannot be written.
        """
        target = self._target(name, source)
        if target.length > MAX_MANIFEST or target.hashes.get("sha256") != name:
            raise ReleaseRefused(Fault.TAMPERED, f"The list of releases contradicts itself about {name}.")
        data = fetch_one(source, name, target.length)
        if sha256_hex(data) != name:
            raise ReleaseRefused(Fault.TAMPERED, f"What came as manifest {name[:12]} has another hash.")
        return Manifest.from_bytes(data)

    def _target(self, name: str, source: Source) -> "TargetFile":
        from tuf.api import exceptions
        from tuf.ngclient import Updater

        make_private_folder(self._folder)
        try:
            with translated(self._folder):
                updater = Updater(
                    str(self._folder),
                    "lepton:",
                    fetcher=_fetcher(source),
                    config=_bounds(),
                    bootstrap=self._pinned(),
                )
                updater.refresh()
                target = updater.get_targetinfo(f"{name}.json")
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            raise _translated(error) from error
        sync_tree(self._folder)  # else a power cut could bring back an older view
        if target is None:
            raise ReleaseRefused(
                Fault.UNKNOWN,
                f"The signed list of releases does not name {name[:12]}.",
                hint="It may have been withdrawn; ask the operator.",
            )
        return target


def check_root(data: bytes) -> None:
    """Refuse bytes that are no root, or one that its own keys did not sign: before they are pinned.

    Raises:
        ReleaseRefused: they are not.
    """
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    try:
        found = Metadata[Root].from_bytes(data[: MAX_ROOT + 1])
        found.verify_delegate("root", found)
    except (RepositoryError, ValueError, TypeError) as error:
        raise _translated(error) from error


def fetch_one(source: Source, name: str, size: int) -> bytes:
    """One chunk of exactly ``size`` bytes; its hash is the caller's to check.

    Raises:
        ReleaseRefused: more bytes came, or fewer.
        ConnectionFailed: nothing came.
    """
    data = next(iter(source.chunks([name])), None)
    if data is None:
        raise ConnectionFailed(f"The coordinator sent nothing for {name[:12]}.", hint="It is asked again.")
    if len(data) != size:
        fault = Fault.ENDLESS if len(data) > size else Fault.TAMPERED
        raise ReleaseRefused(fault, f"Expected {size} bytes of {name[:12]}, got {len(data)}.")
    return data


def _bounds() -> "UpdaterConfig":
    from tuf.ngclient import UpdaterConfig

    return UpdaterConfig(
        max_root_rotations=MAX_ROTATIONS,
        root_max_length=MAX_ROOT,
        timestamp_max_length=MAX_SMALL,
        snapshot_max_length=MAX_SMALL,
        targets_max_length=MAX_METADATA,
    )


def _fetcher(source: Source) -> "FetcherInterface":
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class Fetcher(FetcherInterface):
        """tuf asks by URL; the last part is the file's name."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            name = url.rpartition("/")[2]
            try:
                return iter([source.metadata(name)])
            except NotFound as error:
                raise DownloadHTTPError(str(error), 404) from error

    return Fetcher()


def _translated(error: Exception) -> LeptonError:
    """What a failed verification means, in our words."""
    from tuf.api import exceptions
    from tuf.api.serialization import DeserializationError

    cause = error.__cause__
    if isinstance(cause, LeptonError) and not isinstance(cause, NotFound):
        return cause
    faults: tuple[tuple[type[Exception], Fault, str], ...] = (
        (exceptions.ExpiredMetadataError, Fault.EXPIRED, "Check this device's clock, then ask the operator."),
        (exceptions.BadVersionNumberError, Fault.REPLAYED, ""),
        (exceptions.UnsignedMetadataError, Fault.UNSIGNED, ""),
        (exceptions.LengthOrHashMismatchError, Fault.TAMPERED, ""),
        (exceptions.DownloadLengthMismatchError, Fault.ENDLESS, ""),
        (DeserializationError, Fault.TAMPERED, ""),
    )
    for kind, fault, hint in faults:
        if isinstance(error, kind):
            return ReleaseRefused(fault, f"The metadata of releases are refused: {error}.", hint=hint)
    if isinstance(error, exceptions.DownloadError):
        return ConnectionFailed(f"The metadata of releases could not be fetched: {error}.")
    return ReleaseRefused(Fault.TAMPERED, f"The metadata of releases are refused: {error}.")
