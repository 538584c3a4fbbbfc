"""The operator's HTTP endpoints: ``/healthz``, ``/readyz`` and ``/metrics`` (Prometheus text).

Plain HTTP on the loopback interface by default: nothing here changes anything, and nothing names a device.
"""

from collections.abc import Callable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

ROUND_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)  # seconds


class Meters:
    """What the coordinator counts; one registry per coordinator, so that tests can have several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.devices = Gauge(
            "lepton_devices", "Registered devices by standing", ["standing"], registry=self.registry
        )
        self.streams = Gauge("lepton_waiting_streams", "Open Wait streams", registry=self.registry)
        self.runs = Gauge("lepton_runs", "Runs by state", ["state"], registry=self.registry)
        self.rounds = Counter("lepton_rounds", "Committed rounds", ["run"], registry=self.registry)
        self.abandoned = Counter(
            "lepton_rounds_abandoned", "Abandoned attempts", ["run"], registry=self.registry
        )
        self.reports = Counter(
            "lepton_reports", "Device answers by outcome", ["run", "outcome"], registry=self.registry
        )
        self.late = Counter(
            "lepton_refused_replies",
            "Replies refused by the transport, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "lepton_round_seconds",
            "Seconds per committed round",
            ["run"],
            buckets=ROUND_BUCKETS,
            registry=self.registry,
        )
        self.bytes = Counter(
            "lepton_model_bytes", "Model bytes by direction", ["run", "direction"], registry=self.registry
        )
        self.serving = Gauge(
            "lepton_serving", "Devices by the release they serve", ["release"], registry=self.registry
        )
        self.waiting = Gauge(
            "lepton_run_waiting",
            "1 while a run waits for something else than its devices' work",
            ["run"],
            registry=self.registry,
        )
        self.wait = Gauge(
            "lepton_run_wait_cause", "1 for what a run waits for", ["run", "cause"], registry=self.registry
        )
        self.faults = Gauge(
            "lepton_run_faults",
            "Devices with something wrong, as a run sees them, by cause",
            ["run", "cause"],
            registry=self.registry,
        )
        self.repairs = Counter(
            "lepton_repairs", "Acts of self-repair, by kind", ["act"], registry=self.registry
        )
        self._shown: dict[str, tuple[set[str], str]] = {}  # run -> causes of faults, cause of waiting

    def show_faults(self, run_id: str, counts: Mapping[str, int], wait: str) -> None:
        """What is wrong now, as one run sees it; ``wait`` is the cause for which the run waits, or ''."""
        causes, waited = self._shown.get(run_id, (set(), ""))
        for cause in causes - set(counts):
            self.faults.remove(run_id, cause)
        for cause, devices in counts.items():
            self.faults.labels(run_id, cause).set(devices)
        if waited and waited != wait:
            self.wait.remove(run_id, waited)
        if wait:
            self.wait.labels(run_id, wait).set(1)
        self._shown[run_id] = set(counts), wait

    def forget_faults(self, run_id: str) -> None:
        """A run is over."""
        self.show_faults(run_id, {}, "")
        del self._shown[run_id]


def ops_app(meters: Meters, ready: Callable[[], str], refresh: Callable[[], None]) -> Starlette:
    """The ASGI app.

    Args:
        meters: what ``/metrics`` prints.
        ready: '' when every part is up, else what is missing in words.
        refresh: brings the gauges up to date before they are printed.
    """

    def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    def readyz(_: Request) -> Response:
        missing = ready()
        return PlainTextResponse(
            f"{missing}\n" if missing else "ready\n", status_code=503 if missing else 200
        )

    def metrics(_: Request) -> Response:
        refresh()
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    routes = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
    return Starlette(routes=routes)
