"""Signing keys for secure aggregation in a Flower app, and who trusts which.

Every node has a key of its own; its id is the fingerprint of the public half. The fleet's owner gives server
and nodes the same list of public keys, by another way than Flower's. A server that could choose the list
could fill a cohort with nodes of its own, and then no protocol hides anybody.

    python -m lepton_strategies.secure_keys node0.key >> keys.txt
"""

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.crypto import load_signing_key, save_signing_key
from lepton_fl.errors import ConfigError, LeptonError, StateCorrupt
from lepton_fl.secagg.identity import Pinned

KEY_BYTES = 32


def fingerprint(public: bytes) -> str:
    """A node's id: of its public key, 32 bytes."""
    return hashlib.sha256(b"lepton secure aggregation\0" + public).hexdigest()[:32]


def make_key(path: Path) -> bytes:
    """Write a new private key (mode 0600) and return its public half.

    Raises:
        ConfigError: the file exists.
        StateError: it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists.", hint="A node keeps its key; give another name for a new node.")
    key = Ed25519PrivateKey.generate()
    save_signing_key(path, key)
    return key.public_key().public_bytes_raw()


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        StateError: it cannot be read, or others may read it.
        ConfigError: it is no key.
    """
    try:
        return load_signing_key(path)
    except StateCorrupt as error:
        raise ConfigError(
            f"{path} holds no signing key.", hint="Make one: python -m lepton_strategies.secure_keys FILE"
        ) from error


def load_list(path: Path) -> tuple[bytes, ...]:
    """Read a list of public keys: one a line, hexadecimal; what follows '#' is a remark.

    Raises:
        ConfigError: it cannot be read, or a line is no key.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
        return tuple(_public(line) for line in lines if line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The list of keys {path} cannot be read: {error}.") from error


def pinned(keys: Iterable[bytes | str]) -> Pinned:
    """Trust in these public keys and no others."""
    return Pinned({fingerprint(key): key for key in map(_public, keys)})


def _public(key: bytes | str) -> bytes:
    raw = bytes.fromhex(key) if isinstance(key, str) else key
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"A public key has {KEY_BYTES} bytes, this one has {len(raw)}.")
    return raw


def main(arguments: list[str]) -> int:
    """Make a key and print its public half."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m lepton_strategies.secure_keys FILE\n")
        return 2
    try:
        path = Path(arguments[0])
        sys.stdout.write(f"{make_key(path).hex()}  # {path.name}\n")
    except LeptonError as error:
        sys.stderr.write(f"{error} {error.hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
