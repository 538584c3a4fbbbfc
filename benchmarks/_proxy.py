"""A TCP proxy that can be slow, or dead without saying so."""

import contextlib
import socket
import threading
import time

PIECE = 2048  # bytes moved at a time


class Proxy:
    """One listening port on loopback that passes everything on to another port.

    ``rate`` is bytes per second in each direction, 0 = as fast as it goes. While ``held`` is set nothing
    passes and nothing is closed, as if a cable was cut.
    """

    def __init__(self, target: int) -> None:
        self.rate = 0.0
        self.held = threading.Event()
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        self._listener.close()
        self.held.clear()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the coordinator is down
                near.close()
                continue
            self._open += [near, far]
            for one in (near, far):  # so that little is hidden in buffers
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * PIECE)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                while self.held.is_set():
                    time.sleep(0.05)
                if self.rate:
                    time.sleep(len(data) / self.rate)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
