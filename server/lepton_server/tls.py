"""The TLS context of the fleet port, which follows the server's certificate.

The certificate is renewed months after the start, by this process or another. A context in use must not be
changed under a handshake in another thread, so each handshake is handed the newest context instead.
"""

import logging
import os
import ssl
from pathlib import Path

from lepton_fl.errors import StateError

log = logging.getLogger(__name__)


class ServerTls:
    """Serve with ``context``; new connections get the certificate that is in the file then."""

    def __init__(self, path: Path) -> None:
        """Load the certificate.

        Args:
            path: PEM file with key and certificate.

        Raises:
            StateError: It cannot be read.
        """
        self._path = path
        try:
            self._stamp = self._look()
            self.context = self._current = self._load()
        except (OSError, ssl.SSLError) as error:
            raise StateError(f"Cannot serve with the certificate in {path}: {error}.") from error
        self.context.sni_callback = self._choose

    def _look(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_ino, status.st_mtime_ns

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._path)
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called in each handshake, with or without a server name."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._current, self._stamp = self._load(), stamp
                log.info("the fleet port serves with the renewed certificate")
        except (OSError, ssl.SSLError) as error:  # as before; the next handshake tries again
            log.error("the renewed certificate cannot be loaded: %s", error)
        connection.context = self._current
