"""The coordinator process: every part, started in order and ended in the reverse.

    with Coordinator(config) as coordinator:   # ports are bound, runs are continued
        coordinator.wait()                     # until stop() or a signal

Starting either succeeds as a whole or leaves nothing open and the state as it was.
"""

import logging
import socket
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import uvicorn

from lepton_fl import __version__
from lepton_fl.errors import ConnectionFailed, LeptonError
from lepton_fl.files import BlobStore, make_private_folder
from lepton_fl.secagg.identity import deployment_of
from lepton_server.attempts import Attempts, adopt
from lepton_server.authority import Authority
from lepton_server.config import ServerConfig
from lepton_server.connections import LOOP, BoundedHttp, BoundedListener, Room, leaving_in_order
from lepton_server.device_service import DeviceService, Endpoints, hosts_of
from lepton_server.fleet import Fleet
from lepton_server.flower import FlowerLink, Limits, Refused
from lepton_server.heads import Heads
from lepton_server.lease import Leadership, claim, refuse_unfinished
from lepton_server.ops import Meters, ops_app
from lepton_server.privacy import PrivacyKeys
from lepton_server.quarantine import Quarantine
from lepton_server.releases import ListKeeper, online_keys, shelf_of
from lepton_server.rollouts import RolloutKeeper
from lepton_server.runs import RunDriver, workshop_of
from lepton_server.signing import Signing
from lepton_server.store import Store, open_store
from lepton_server.tls import ServerTls
from lepton_server.watchdog import Watchdog

log = logging.getLogger(__name__)

START_S = 30.0  # for a listener to come up
GRACE_S = 2  # for requests under way at a shutdown


class Coordinator:
    """One coordinator; start it with ``start`` or as a context manager."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.meters = Meters()
        self._stack = ExitStack()
        self._ended = threading.Event()
        self._driver: RunDriver | None = None
        self._service: DeviceService | None = None
        self._fleet: Fleet | None = None
        self._lease: Leadership | None = None
        self._ops_port = 0
        self._room = Room.of(config.limits)
        self._listeners: dict[str, threading.Thread] = {}

    # --- life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open everything.

        Raises:
            StateLocked: another coordinator uses the state folder.
            ConnectionFailed: a port is taken or cannot be bound.
            LeptonError: the state cannot be used; the message says why.
        """
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Ask ``wait`` to return; may be called from a signal handler."""
        self._ended.set()

    def wait(self) -> None:
        """Block until ``stop``.

        Raises:
            LeaseLost: another coordinator has taken over.
        """
        while not self._ended.wait(1.0):  # a bounded wait lets signals through
            pass
        if self._lease is not None and self._lease.lost is not None:
            raise self._lease.lost

    def close(self) -> None:
        """End all parts; runs are left to be continued."""
        self._stack.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoints(self) -> Endpoints:
        """Where devices reach this coordinator."""
        assert self._service is not None, "the coordinator is not started"
        return self._service.endpoints

    @property
    def ops_port(self) -> int:
        """The bound port of the operator's endpoints."""
        return self._ops_port

    # --- parts --------------------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> None:
        config = self.config
        folder = config.server.state_dir
        make_private_folder(folder)
        stack.enter_context(claim(folder))
        refuse_unfinished(folder)
        store = stack.enter_context(open_store(config.store_url))
        self._lead(stack, store)
        workshop = workshop_of(config.rounds, store)
        stack.callback(workshop.close)
        blobs = BlobStore(config.blob_dir)
        attempts = Attempts(store, BlobStore(config.attempts_dir))
        adopt(store, attempts.blobs, config.blob_dir / "spool")
        authority = Authority.open(folder / "keys", hosts_of(config.listen))
        link = FlowerLink(
            Limits(max_reply_bytes=config.limits.max_body_bytes),
            max_unread_replies=config.rounds.max_unread_replies,
            on_refused=self._refused,
        )
        fleet_port = self._serve_fleet(stack, link, authority)
        stack.enter_context(link)  # closes before its listener: devices are told to come back
        fleet = self._fleet = Fleet(store, config.check_in)
        signing = Signing.open(config.authority, store, deployment_of(authority.ca_der))
        if signing is not None:
            fleet.set_authority(signing.renew_s)
        keys = PrivacyKeys(folder / "keys", config.privacy)
        heads = Heads(store, keys)
        heads.refresh()
        fleet.on_grown(heads.refresh)
        fleet.start()
        stack.callback(fleet.stop)
        service = self._service = DeviceService(
            config, store, authority, fleet, fleet_port=fleet_port, signing=signing, heads=heads
        )
        service.start()
        stack.callback(service.stop)
        keeper = ListKeeper(shelf_of(config), online_keys(config), store)
        keeper.start()
        stack.callback(keeper.close)
        rollouts = RolloutKeeper(store, fleet.heard, said=fleet.said)
        rollouts.start()
        stack.callback(rollouts.close)
        watch = Watchdog(fleet, self.meters, folder, rollouts=rollouts.views)
        watch.start()
        stack.callback(watch.close)
        self._driver = RunDriver(
            config.rounds,
            store,
            blobs,
            fleet,
            link,
            self.meters,
            keys=keys,
            signing=signing,
            watch=watch,
            quarantine=Quarantine(config.watchdog, store, fleet, self.meters),
            attempts=attempts,
            workshop=workshop,
        )
        fleet.on_revoked(self._driver.expel)
        self._serve_ops(stack)
        endpoints = {
            "enrolment": service.endpoints.enrolment,
            "devices": service.endpoints.device_service,
            "fleet": service.endpoints.fleet,
        }
        store.record("server.started", "server", {"version": __version__, "info": endpoints})
        stack.callback(_record_stop, store)
        self._driver.start()
        stack.callback(self._driver.close)
        log.info("ready: enrolment %(enrolment)s, devices %(devices)s, fleet %(fleet)s", endpoints)

    def _lead(self, stack: ExitStack, store: Store) -> None:
        """Be the one coordinator of this database, or wait to become it."""
        folder, standby = self.config.server.state_dir, self.config.server.standby
        lease = self._lease = Leadership.take(store, folder, standby=standby, stopped=self._ended)
        stack.callback(lease.release)
        lease.keep(self.stop)

    def _serve_fleet(self, stack: ExitStack, link: FlowerLink, authority: Authority) -> int:
        listen, tls = self.config.listen, ServerTls(authority.server_path)
        server = uvicorn.Config(
            leaving_in_order(link.app),
            loop=LOOP,
            lifespan="off",
            log_level="warning",
            access_log=False,
            ssl_context_factory=lambda *_: tls.context,
            http=BoundedHttp,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
        most = self._room.fleet
        listener = BoundedListener(_family(listen.host), most, self._room.of_address(most))
        return self._serve(stack, server, listener, listen.host, listen.fleet_port, "listen.fleet_port")

    def _serve_ops(self, stack: ExitStack) -> None:
        listen = self.config.listen
        app = ops_app(self.meters, self._missing, self._refresh)
        server = uvicorn.Config(
            leaving_in_order(app),
            loop=LOOP,
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
        host, most = listen.ops_host, self._room.ops
        listener = BoundedListener(_family(host), most, most)  # its one caller is this machine
        self._ops_port = self._serve(stack, server, listener, host, listen.ops_port, "listen.ops_port")

    def _serve(
        self,
        stack: ExitStack,
        config: uvicorn.Config,
        listener: BoundedListener,
        host: str,
        port: int,
        key: str,
    ) -> int:
        """Serve an ASGI app on a thread of its own until the stack unwinds; return the bound port."""
        _bind(listener, host, port, key)
        stack.callback(listener.close)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name=key, daemon=True)
        thread.start()
        self._listeners[key] = thread

        def end() -> None:
            server.should_exit = True
            thread.join(START_S)

        stack.callback(end)
        ends = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > ends:
                raise ConnectionFailed(f"Nothing answers on {host}:{port} ({key}); the log says why.")
            time.sleep(0.01)
        return int(listener.getsockname()[1])

    def _missing(self) -> str:
        dead = [key for key, thread in self._listeners.items() if not thread.is_alive()]
        if dead:
            return f"nothing listens on {', '.join(dead)}"
        return "" if self._driver and self._driver.is_watching() else "the run driver is not up"

    def _refresh(self) -> None:
        if self._fleet is None or self._driver is None:
            return
        counts = self._fleet.counts()
        for name in ("registered", "online", "busy"):
            self.meters.devices.labels(name).set(getattr(counts, name))
        self.meters.streams.set(counts.waiting)
        self.meters.serving.clear()
        for release, devices in self._fleet.releases().items():
            self.meters.serving.labels(release[:12]).set(devices)
        self.meters.runs.labels("active").set(self._driver.active())

    def _refused(self, refused: Refused) -> None:
        self.meters.late.labels(refused.reason.value).inc()
        log.warning("an answer of node %d was refused: %s", refused.node_id, refused.reason.value)


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bind(listener: socket.socket, host: str, port: int, key: str) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConnectionFailed(
            f"Cannot listen on {host}:{port} ({key}): {error.strerror}.",
            hint=f"Another program may use the port; set {key} to a free one.",
        ) from error


def _record_stop(store: Store) -> None:
    try:
        store.record("server.stopped", "server", {"reason": "shutdown"})
    except LeptonError as error:
        log.warning("the shutdown could not be recorded: %s", error)
