"""The noise of past rounds at rest: AES-256-GCM, bound to the run and the round it belongs to.

Who reads a mechanism's memory can subtract the noise, so it is stored sealed, in the transaction that stores
the release. A sealed state of another run or round does not open.

    box = seal(mechanism.state(), key, run_id="r-1", round_number=7)
    mechanism = mechanism.restored(unseal(box, key, run_id="r-1", round_number=7))
"""

import json
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lepton_fl.errors import ConfigError, StateCorrupt

KEY_BYTES = 32
_NONCE_BYTES = 12  # random: far below 2**32 rounds are ever sealed under one key


def seal(state: bytes, key: bytes, *, run_id: str, round_number: int) -> bytes:
    """Encrypt and authenticate a state: nonce, ciphertext, tag."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, state, _context(run_id, round_number))


def unseal(box: bytes, key: bytes, *, run_id: str, round_number: int) -> bytes:
    """Open what :func:`seal` made.

    Raises:
        StateCorrupt: altered, cut off, under another key, or of another run or round.
    """
    try:
        nonce, body = box[:_NONCE_BYTES], box[_NONCE_BYTES:]
        return _cipher(key).decrypt(nonce, body, _context(run_id, round_number))
    except (InvalidTag, ValueError) as error:
        raise StateCorrupt(
            f"The sealed noise of run {run_id}, round {round_number} does not open.",
            hint="It was altered, or is of another run, round or key. Close the run and start a new one.",
        ) from error


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ConfigError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
    return AESGCM(key)


def _context(run_id: str, round_number: int) -> bytes:
    return json.dumps(["lepton sealed noise v1", run_id, round_number], separators=(",", ":")).encode()
