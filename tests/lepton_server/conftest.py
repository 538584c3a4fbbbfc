"""A coordinator's insides without a network: real store, blobs and fleet, scripted answers of devices."""

import base64
import contextlib
import time
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

import numpy as np
import pytest

TASK, VERSION = "lepton_fl.tasks.images:digits", "1"


class Scripted:
    """An exchange whose devices pull the model towards their own point; ``script`` may answer otherwise."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.script = honest
        self.asked = []
        self.told = []

    def ask(self, plan, request):
        from lepton_fl.rounds.exchange import Answer

        self.asked.append(plan)
        try:
            for device_id in plan.cohort:
                records = self.script(device_id, plan, request)
                if records is not None:
                    yield Answer(device_id, records, 100)
        finally:
            for device_id in plan.cohort:
                self.fleet.mark_idle(device_id, plan.run_id)

    def tell(self, plan, device_id, refusal):
        self.told.append((device_id, refusal))


def honest(device_id, plan, request):
    from lepton_fl.vector import to_grid
    from lepton_fl.wire.messages import EvaluateReply, Ticket, TrainReply

    point = np.float32(crc32(device_id.encode()) % 100 / 100)
    distance = float(np.square(request.model - point).sum())
    sums = {"loss_sum": np.array([distance * 2]), "examples": np.array([2])}
    if plan.kind == "evaluate":
        confusion = np.zeros(100, np.int64)
        confusion[:2] = 1
        sums |= {"confusion": confusion}
        return EvaluateReply(Ticket.of(plan), plan.task_version, 2, sums, 0.1).to_records()
    update = to_grid(plan.local.learning_rate * (point - request.model), plan.grid_step)
    return TrainReply(Ticket.of(plan), plan.task_version, 2, update, sums, 0.1).to_records()


@dataclass
class Works:
    """One coordinator's parts in one folder; ``driver`` may be made again and again, as after a restart."""

    folder: object
    store: object
    blobs: object
    fleet: object
    link: object
    exchange: Scripted
    ids: list[str] = field(default_factory=list)
    drivers: list = field(default_factory=list)

    def driver(self, **changes):
        from lepton_server.config import PrivacySection, RoundsSection
        from lepton_server.ops import Meters
        from lepton_server.privacy import PrivacyKeys
        from lepton_server.runs import RunDriver

        self.meters = Meters()
        exchange = changes.pop("exchange", lambda _: self.exchange)
        quarantine = changes.pop("quarantine", None)
        config = RoundsSection(**changes)
        driver = RunDriver(
            config,
            self.store,
            self.blobs,
            self.fleet,
            self.link,
            self.meters,
            keys=PrivacyKeys(self.folder / "keys", PrivacySection()),
            rng=Random(7),
            exchange=exchange,
            quarantine=quarantine,
        )
        self.drivers.append(driver)
        return driver

    def register(self, count, groups=()):
        from lepton_fl import crypto

        new = []
        for _ in range(count):
            key = crypto.new_key().public_key()
            device_id, token = crypto.device_id(key), f"t{len(self.ids) + len(new)}"
            with self.store.transaction() as change:
                body = {"token_id": token, "secret_sha256": crypto.secret_sha256(token.encode() * 20)}
                change.record("token.created", body | {"expires_at": time.time() + 3600})
                change.record("token.used", {"token_id": token, "device_id": device_id})
                body = {
                    "device_id": device_id,
                    "name": f"device {len(self.ids) + len(new)}",
                    "public_key": base64.b64encode(crypto.public_der(key)).decode(),
                    "cert_serial": "1f",
                    "cert_not_after": time.time() + 86_400,
                    "token_id": token,
                    "groups": list(groups),
                }
                change.record("device.enrolled", body)
            new.append(device_id)
        self.ids += new
        self.fleet.follow()
        return new

    def check_in(self, *device_ids, version=VERSION, ready=True, reason="", status="idle"):
        from lepton_server.fleet import Report, TaskState

        report = Report((TaskState(TASK, version, "", ready, reason),), "0.1", ())
        for device_id in device_ids:
            self.fleet.check_in(device_id, report, status)

    def queue(self, run_id="r1", **changes):
        from lepton_fl.plan import RunSpec

        fields = {"task": TASK, "rounds": 2, "local": {"learning_rate": 0.5}}
        fields["cohort"] = {"size": 3, "min_reports": 2, "fill_wait_s": 0.0, "quorum_wait_s": 60.0}
        fields["cohort"] |= changes.pop("cohort", {})
        spec = RunSpec(**fields | changes).to_json()
        self.store.record("run.queued", {"run_id": run_id, "name": run_id, "spec": spec})
        return run_id

    def until(self, condition, seconds=60.0):
        ends = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < ends, [self.store.run(r.id) for r in self.store.runs()]
            time.sleep(0.02)
        return value

    def finished(self, run_id="r1"):
        return self.until(lambda: (run := self.store.run(run_id)).finished and run)

    def unharmed(self):
        self.store.verify_journal()
        assert self.store.rebuild().differences == ()


@pytest.fixture
def works(tmp_path, monkeypatch):
    import torch

    import lepton_server.runs
    from lepton_fl.files import BlobStore
    from lepton_server.config import CheckInSection
    from lepton_server.fleet import Fleet
    from lepton_server.flower import FlowerLink
    from lepton_server.store import open_store
    from lepton_server.workshop import Workshop

    torch.set_num_threads(1)

    class Here(Workshop):
        """The same work in this process: a child takes seconds to start; test_workshop.py has the child."""

        def _call(self, work, *args):
            return work(*args)

    monkeypatch.setattr(lepton_server.runs, "Workshop", Here)
    monkeypatch.setattr(lepton_server.runs, "LOOK_S", 0.02)
    with open_store(tmp_path / "lepton.db") as store, FlowerLink() as link:
        fleet = Fleet(store, CheckInSection())
        fleet.load()
        made = Works(tmp_path, store, BlobStore(tmp_path / "blobs"), fleet, link, Scripted(fleet))
        made.register(3)
        made.check_in(*made.ids)
        yield made
        for driver in made.drivers:
            driver.close()


class Killed(BaseException):
    """As abrupt as kill -9, seen from inside."""


@pytest.fixture
def kill_at(monkeypatch):
    """``kill_at(n, "before" | "after")``: die around the n-th transaction from now; 0 = never. Counts.

    ``kill_at.error`` is what then goes through the code.
    """
    state = {"left": 0, "when": "", "seen": 0}
    from lepton_server.store import Store

    real = Store.transaction

    @contextlib.contextmanager
    def transaction(self):
        state["left"] -= 1
        state["seen"] += 1
        if state["left"] == 0 and state["when"] == "before":
            raise Killed
        with real(self) as change:
            yield change
        if state["left"] == 0 and state["when"] == "after":
            raise Killed

    monkeypatch.setattr(Store, "transaction", transaction)

    def arm(number, when="before"):
        state.update(left=number, when=when, seen=0)
        return state

    arm.error = Killed
    return arm
