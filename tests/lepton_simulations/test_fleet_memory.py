"""The memory of a virtual fleet: a real device's rules, shared with workers, found again by a resumed run."""

import errno
import os

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from lepton_fl.errors import DiskFull, StateCorrupt, StateError
from lepton_fl.plan import LocalPlan, RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks import Classification, DataContract, Dataset, Task
from lepton_fl.tasks.models import MLP
from lepton_fl.training.local import LocalState
from lepton_fl.training.memory import CONTROL, PERSONAL, VolatileMemory
from lepton_fl.training.respond import respond
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Layout, encode
from lepton_fl.wire.messages import UPDATE, Request
from lepton_simulations.memory import TABLE, FleetMemory, outgoing
from lepton_strategies.desk import PartitionDesk, batch_seed

torch.set_num_threads(1)

LAYOUT = Layout.of_shapes({"body": (4,), "head": (3,)})
BOTH = LocalPlan(control_variates=True, personal=("head",))
DEVICES = ("a", "b", "c")


def vectors(value):
    return {CONTROL: np.full(7, value, np.float32), PERSONAL: np.full(3, -value, np.float32)}


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert_array_equal(one[name], other[name])


def test_a_row_follows_the_rules_of_any_memory():
    """Random participations, against the reference."""
    rng = np.random.default_rng(0)
    fleet = FleetMemory(DEVICES, BOTH, LAYOUT)
    reference = {device_id: VolatileMemory() for device_id in DEVICES}
    for number in range(1, 300):
        device_id = DEVICES[rng.integers(3)]
        counts = bool(rng.integers(2))
        ours = fleet.of(device_id).recall("run", lambda r, a, c=counts: c)
        same(ours, reference[device_id].recall("run", lambda r, a, c=counts: c))
        fleet.of(device_id).keep("run", number, 1, vectors(number))
        reference[device_id].keep("run", number, 1, vectors(number))
        if rng.integers(4) == 0:
            fleet.refused(device_id)
            reference[device_id].refused("run")


def test_a_run_that_goes_on_finds_it_again_and_forgets_what_came_after(tmp_path):
    fleet = FleetMemory(DEVICES, BOTH, LAYOUT, tmp_path)
    fleet.of("a").keep("run", 1, 1, vectors(1))
    fleet.of("a").recall("run", lambda r, a: True)
    fleet.of("a").keep("run", 3, 1, vectors(3))
    fleet.of("b").keep("run", 2, 1, vectors(2))
    again = FleetMemory(DEVICES, BOTH, LAYOUT, tmp_path)
    again.rewind(2)  # round 3 was not committed
    same(again.of("a").recall("run", lambda r, a: True), vectors(1))
    same(again.of("b").recall("run", lambda r, a: True), vectors(2))
    assert again.of("c").recall("run", lambda r, a: True) == {}


def test_a_file_of_another_fleet_is_refused(tmp_path):
    FleetMemory(DEVICES, BOTH, LAYOUT, tmp_path)
    with pytest.raises(StateCorrupt, match="bytes"):
        FleetMemory((*DEVICES, "d"), BOTH, LAYOUT, tmp_path)
    with pytest.raises(StateError):
        FleetMemory(DEVICES, BOTH, LAYOUT, tmp_path / TABLE)


def test_devices_that_never_took_part_take_no_room(tmp_path):
    many = [f"d{i}" for i in range(5000)]
    layout = Layout.of_shapes({"body": (10_000,)})
    fleet = FleetMemory(many, LocalPlan(control_variates=True), layout, tmp_path)
    fleet.of("d7").keep("run", 1, 1, {CONTROL: np.ones(10_000, np.float32)})
    found = (tmp_path / TABLE).stat()
    assert found.st_size > 4e8
    assert found.st_blocks * 512 < 4e6


def no_room(descriptor, start, length):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_room_nothing_is_written_and_nothing_is_lost(tmp_path, monkeypatch):
    """A row that was written once can be written again."""
    fleet = FleetMemory(DEVICES, BOTH, LAYOUT, tmp_path)
    for device_id, number in (("a", 1), ("b", 1)):
        fleet.of(device_id).keep("run", number, 1, vectors(number))
    fleet.of("a").recall("run", lambda r, a: True)
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    fleet.of("a").keep("run", 2, 1, vectors(2))
    assert fleet.full is None
    with pytest.raises(DiskFull, match="last committed round is safe"):
        fleet.of("b").recall("run", lambda r, a: True)
    with pytest.raises(DiskFull):
        fleet.of("c").keep("run", 2, 1, vectors(2))
    assert fleet.full is not None
    monkeypatch.undo()
    same(fleet.of("a").recall("run", lambda r, a: True), vectors(2))
    same(fleet.of("b").recall("run", lambda r, a: True), vectors(1))
    assert fleet.of("c").recall("run", lambda r, a: True) == {}


def test_rows_that_were_written_have_room(tmp_path):
    layout = Layout.of_shapes({"body": (100_000,)})
    fleet = FleetMemory(DEVICES, LocalPlan(control_variates=True), layout, tmp_path)
    before = (tmp_path / TABLE).stat().st_blocks
    fleet._make_real(1, 2)
    assert (tmp_path / TABLE).stat().st_blocks - before >= 400_000 // 512


def test_forked_workers_write_what_the_parent_reads():
    fleet = FleetMemory(DEVICES, BOTH, LAYOUT)
    child = os.fork()
    if child == 0:
        fleet.of("a").keep("run", 1, 1, vectors(5))
        os._exit(0)
    os.waitpid(child, 0)
    same(fleet.of("a").recall("run", lambda r, a: True), vectors(5))


def test_a_chunk_does_what_devices_do_one_by_one():
    """The way of a simulation's engine, against that of an edge client: to the bit, over several rounds."""
    task = Task(
        "classes", "1", lambda: MLP(6, 3, (8,)), DataContract((6,), num_classes=3), "cross_entropy",
        Classification(3),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    rows = {d: Dataset(rng.normal(size=(20, 6)).astype(np.float32), rng.integers(0, 3, 20)) for d in DEVICES}
    trainer = Trainer(task)
    layout, model = trainer.layout, trainer.initial(0)
    local = LocalPlan(learning_rate=0.1, batch_size=8, control_variates=True, personal=("layers.2.*",))
    spec = RunSpec(task="pkg:task", local=local, clip_norm=0.4)
    work = Work("pkg:task", "1", layout.digest, layout.size, task.metrics, layout=layout)
    one_by_one, chunk = FleetMemory(DEVICES, local, layout), FleetMemory(DEVICES, local, layout)
    control = np.zeros(layout.size, np.float32)
    for number in range(1, 4):
        state = RunState(model, ServerState({CONTROL: control}), round=number - 1)
        plan = plan_round(spec, "run", work, "train", number, state, DEVICES, 3, "00")
        request = Request.of(plan, model, control).to_records()
        singles = []
        for d in DEVICES:
            desk = PartitionDesk(
                d, "pkg:task", trainer, lambda name, kind: rows[name], memory=one_by_one.of(d)
            )
            singles.append(respond(request, desk).arrays[UPDATE].copy())
        states = [chunk.state(d, plan, model, control, trainer.num_trained) for d in DEVICES]
        results = [
            trainer.train(
                s.start, rows[d], plan.local, seed=batch_seed(0, d, number, 1), correction=s.correction
            )
            for d, s in zip(DEVICES, states, strict=True)
        ]
        deltas = np.stack([r.delta for r in results])
        sent = outgoing(states, deltas, np.array([r.steps for r in results]), plan.local.learning_rate)
        encoded = encode(sent, plan.grid_step, plan.clip_norm)
        assert not encoded.refused
        assert_array_equal(encoded.updates, np.stack(singles))
        for d, s, delta, update in zip(DEVICES, states, deltas, encoded.updates, strict=True):
            chunk.keep(d, plan, s.leaves(delta, update, plan.grid_step))
        mean = encoded.updates.mean(axis=0) * plan.grid_step
        model = (model + mean[: layout.size]).astype(np.float32)
        control = (control + mean[layout.size :]).astype(np.float32)
    assert isinstance(states[0], LocalState)
    assert np.abs(control).max() > 0
