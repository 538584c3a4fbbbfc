"""The keys that sign releases: Ed25519, one file each, named by the role and the key's id.

    <folder>/root-5f2c….pem  targets-91ab….pem        offline: a removable disk, a safe; encrypted
    <state>/keys/snapshot-….pem  timestamp-….pem      on the coordinator; mode 0600

Rules: a private key is written once, with mode 0600, and encrypted when there is a passphrase; it is never
logged, printed or put into an exception. A key that others can read is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.crypto import MIN_PASSPHRASE
from lepton_fl.errors import NotFound, StateCorrupt, TrustError
from lepton_fl.files import read_private, write_private

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

OFFLINE: Final = ("root", "targets")
ONLINE: Final = ("snapshot", "timestamp")
ROLES: Final = (*OFFLINE, *ONLINE)

Passphrase = Callable[[Path], bytes]  # asked for only when a key is encrypted


def new_key(folder: Path, role: str, passphrase: bytes | None) -> "CryptoSigner":
    """Make a key and write it.

    Args:
        folder: Made with mode 0700 if it is missing.
        role: One of :data:`ROLES`.
        passphrase: None = not encrypted, mode 0600 only.

    Raises:
        TrustError: The passphrase is too short.
        DiskFull, StateError: It could not be written.
    """
    from securesystemslib.signer import CryptoSigner

    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE:
        raise TrustError(
            f"Expected a passphrase of at least {MIN_PASSPHRASE} bytes, got {len(passphrase)}.",
            hint="Five random words do.",
        )
    private = Ed25519PrivateKey.generate()
    signer = CryptoSigner(private)
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    write_private(folder / f"{role}-{signer.public_key.keyid[:16]}.pem", pem)
    return signer


def load_keys(
    folder: Path, role: str, ids: "set[str] | None", passphrase: Passphrase
) -> "list[CryptoSigner]":
    """Read the keys of a role that lie in a folder.

    Args:
        folder: Where to look.
        role: One of :data:`ROLES`.
        ids: Only keys with these ids (the whole id); None = all.
        passphrase: Asked for an encrypted file.

    Raises:
        TrustError: Others can read a file, or the passphrase is wrong.
        StateCorrupt: A file holds no Ed25519 key.
    """
    found = []
    for path in sorted(folder.glob(f"{role}-*.pem")):
        if ids is not None and not any(path.stem == f"{role}-{key[:16]}" for key in ids):
            continue  # rotated out: its passphrase is not asked for
        signer = _load(path, passphrase)
        if ids is None or signer.public_key.keyid in ids:
            found.append(signer)
    return found


def need_keys(
    folders: list[Path], role: str, ids: "set[str]", threshold: int, passphrase: Passphrase
) -> "list[CryptoSigner]":
    """The keys of a role from several folders, enough of them.

    Raises:
        NotFound: Fewer than ``threshold``.
    """
    signers = {
        signer.public_key.keyid: signer
        for folder in folders
        for signer in load_keys(folder, role, ids, passphrase)
    }
    if len(signers) < threshold:
        where = ", ".join(map(str, folders))
        raise NotFound(
            f"{threshold} {role} key(s) must sign, {len(signers)} of the trusted ones lie in {where}.",
            hint=f"Their files are named {role}-….pem (`lepton keys show`); name each folder with --keys.",
        )
    return list(signers.values())


def _load(path: Path, passphrase: Passphrase) -> "CryptoSigner":
    from securesystemslib.signer import CryptoSigner

    pem = read_private(path)
    secret = passphrase(path) if b"ENCRYPTED" in pem.split(b"\n", 1)[0] else None
    try:
        key = serialization.load_pem_private_key(pem, secret)
    except (ValueError, TypeError):
        if secret is not None:
            raise TrustError(
                f"The passphrase does not open {path}.", hint="Check it and try again."
            ) from None
        raise StateCorrupt(f"{path} holds no private key in PEM.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise StateCorrupt(f"Expected an Ed25519 key in {path}, got another kind.")
    return CryptoSigner(key)
