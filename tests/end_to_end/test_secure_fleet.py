"""Secure aggregation on real processes: the coordinator adds what it cannot see, whoever is killed when."""

import json
import signal

import numpy as np
import pytest

from lepton_fl.files import BlobStore
from lepton_fl.plan import RoundPlan, RunSpec
from lepton_fl.rounds.accumulator import Accumulator, UpdateBatch
from lepton_fl.rounds.campaign import RunState, Work, advance
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.secagg.server import Stage
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.vector import vector_digest
from lepton_fl.wire.messages import Request, TrainReply
from lepton_server.book import load_model
from lepton_server.store import open_store

pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]

CLIENT = """
[client]
secure_aggregation = "required"
least_cohort = 4
[limits]
nice = 0
[connection]
backoff_max_s = 2.0
"""
RUN = """
[run]
task = "digits"
rounds = {rounds}
secure_aggregation = "required"
clip_norm = 4.0
weighting = "equal"
[run.cohort]
size = {devices}
min_reports = {least}
max_attempts = 20
deadline_s = {deadline_s}
fill_wait_s = 5
[run.secure]
min_cohort = {least}
[run.local]
epochs = 1
batch_size = 10
"""


@pytest.fixture(scope="module")
def same_rows(tmp_path_factory):
    """Data of which the order does not matter, so that anybody can compute a device's update again."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path_factory.mktemp("same")

    def make(device):
        path = folder / f"{device}.npz"
        x, y = digits.images[device].astype(np.uint8), digits.target[device]
        np.savez(path, x=np.repeat(x[None], 20, axis=0), y=np.repeat(y, 20))
        return path

    return make


def replayed(fleet, run_id, data_of):
    """Of each committed round: its row, its reports, the model that a plain one gives, and its model."""
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        store.verify_journal()
        assert store.rebuild().equal
        spec = RunSpec.model_validate_json(json.dumps(dict(store.run(run_id).spec)))
        rounds = [r for r in store.rounds(run_id) if r.state == "committed"]
        parts = [p for p in store.participation(run_id) if p.outcome == "counted"]
        names = {d.id: d.name for d in store.devices()}
        first = next(m.sha256 for m in store.models(run_id) if m.round == 0)
    blobs = BlobStore(fleet.folder / "server" / "blobs")
    model = load_model(blobs, first)
    for done in rounds:
        plan = RoundPlan.model_validate_json(json.dumps(dict(done.plan)))
        counted = [p.device_id for p in parts if (p.round, p.attempt) == (plan.round, plan.attempt)]
        assert len(counted) >= spec.secure.least_survivors(len(plan.cohort))
        accumulator, request = Accumulator(plan), Request.of(plan, model)
        for device in counted:
            reply = TrainReply.read(plain_answer(request, data_of[names[device]]), plan)
            accumulator.add(UpdateBatch(reply.update[None, :], np.array([reply.num_examples])))
        work = Work(plan.task, plan.task_version, plan.layout_digest, len(model), TrainingLoss())
        state = RunState(model, ServerState.initial(spec.server, len(model)))
        plain = advance(spec, work, plan, state, accumulator.finalize(), len(counted)).model
        # Those of rounds long past are kept no more; one that is the same need not be read.
        same = vector_digest(plain) == done.model_sha256
        model = plain if same else load_model(blobs, done.model_sha256)
        yield done, len(counted), plain, model


def check_sums(fleet, run_id, data_of):
    """Every committed model is what plain rounds with the same devices give, bit for bit."""
    rounds = []
    for done, _, plain, _ in replayed(fleet, run_id, data_of):
        assert vector_digest(plain) == done.model_sha256
        rounds.append(done)
    return rounds


def has_ended(fleet, run_id):
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        return store.run(run_id).finished


def started(fleet, same_rows, devices):
    """Start a coordinator and so many devices; the rows of each, by its name."""
    fleet.make_authority()
    fleet.start_server()
    data = {f"dev{i}": same_rows(i) for i in range(devices)}
    fleet.join_all(list(data))
    for name, rows in data.items():
        fleet.start_client(name, rows, CLIENT)
    return data


def plain_answer(request, data):
    """What a device answers in a plain round."""
    import torch

    from lepton_client.config import LimitsSection, TaskSection
    from lepton_client.desk import Office

    torch.set_num_threads(1)
    section = TaskSection(reference="digits", data={"kind": "npz", "path": str(data)})
    office = Office((section,), LimitsSection(), lambda: None)
    return office(request.to_records(), lambda: False)


def test_a_fleet_trains_and_the_sums_are_those_of_plain_rounds(real_fleet, same_rows):
    fleet = real_fleet
    data = started(fleet, same_rows, 5)
    run_id = fleet.start_run(RUN.format(rounds=2, devices=5, least=5, deadline_s=120))
    fleet.until(lambda: has_ended(fleet, run_id), "the run ends", 600)
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
    assert any("cannot see any single device's update" in sentence for sentence in shown["seen"])
    assert all(p["examples"] == 0 for p in shown["participation"])
    assert len(check_sums(fleet, run_id, data)) == 2
    assert not list((fleet.folder / "server" / "blobs" / "attempts").glob("[0-9a-f][0-9a-f]/*"))


@pytest.mark.slow
def test_updates_in_few_bits_come_through_masks(real_fleet, same_rows):
    fleet = real_fleet
    data = started(fleet, same_rows, 4)
    ups = {}
    for bits in (8, 4, 2):
        few = f"[run.quantisation]\nbits = {bits}\n"
        run_id = fleet.start_run(RUN.format(rounds=2, devices=4, least=4, deadline_s=120) + few)
        fleet.until(lambda r=run_id: has_ended(fleet, r), "the run ends", 600)
        shown = fleet.show(run_id)
        assert shown["state"] == "completed", shown
        assert any("cannot see any single device's update" in sentence for sentence in shown["seen"])
        for done, reports, plain, model in replayed(fleet, run_id, data):
            figures = dict(done.metrics)
            expected = figures["quantisation_error"] * figures["sum_norm"] / reports
            assert 0.3 * expected < np.linalg.norm(model - plain) < 3 * expected
            if figures["ring_bits"] < 16:  # 16 at first; then as few as the sum of so many needs
                ups[bits] = done.bytes_up
        assert all(r["bytes_down"] > 0 for r in shown["rounds_done"] if r["state"] == "committed")
    assert ups
    assert list(ups.values()) == sorted(ups.values(), reverse=True)


# --- kills ------------------------------------------------------------------------------------------

OF_DEVICES = {  # where one device each dies
    "dev0": "secure.advertised",
    "dev1": "secure.keyed",
    "dev2": "secure.masked",
    "dev3": "secure.signed",
    "dev4": "secure.revealed",
}
OF_THE_COORDINATOR = [f"secure.{stage.name.lower()}:5" for stage in Stage if stage is not Stage.DONE]


@pytest.mark.slow
def test_of_twenty_devices_and_the_coordinator_some_die_at_every_stage(real_fleet, same_rows):
    """The coordinator with five answers of a stage recorded, and at the next stage after each restart."""
    fleet, names = real_fleet, [f"dev{i}" for i in range(20)]
    fleet.make_authority()
    with open(fleet.config, "a") as file:
        file.write("[rounds]\nstage_s = 20.0\n")
    fleet.start_server()
    fleet.join_all(names)
    data = {name: same_rows(i) for i, name in enumerate(names)}
    for name in names:
        fleet.start_client(name, data[name], CLIENT, crash=OF_DEVICES.get(name, ""))

    def idle():
        with open_store(fleet.folder / "server" / "lepton.db") as store:  # a command takes seconds
            devices = store.devices()
        ready = [
            d for d in devices if d.status == "idle" and any(t["ready"] for t in d.reported.get("tasks", ()))
        ]
        return len(ready) == len(names)

    fleet.until(idle, "all devices are there", 600)
    fleet.kill("server", signal.SIGTERM)
    run_id = fleet.start_run(RUN.format(rounds=4, devices=20, least=10, deadline_s=90))
    for point in OF_THE_COORDINATOR:
        fleet.start("server", "server", "--config", str(fleet.config), crash=point)
        ended = fleet.processes["server"].poll
        fleet.until(lambda ended=ended: ended() is not None, f"the coordinator reaches {point}", 600)
        assert ended() == -signal.SIGKILL, (point, fleet.log("server")[-6000:])
    fleet.start_server()
    fleet.until(lambda: has_ended(fleet, run_id), "the run ends", 600)
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
    assert {name: fleet.processes[name].poll() for name in OF_DEVICES} == dict.fromkeys(OF_DEVICES, -9)
    assert check_sums(fleet, run_id, data)  # of rounds that were given up there is nothing to check
