"""SIGKILL of the client at its crash points, on real processes: started again, it takes part as before."""

import signal

import pytest

from lepton_client.contracts import Contracts
from lepton_client.ledger import Ledger
from lepton_client.state import StateDir
from lepton_fl import crypto
from lepton_fl.crashpoints import CLIENT
from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1200)]

DEVICES = 4  # as few as a secure round may have; three of them are enough for its sum
ENROLLING = ("enrol.key", "enrol.answered")
TRAINING = ("train.downloaded", "train.begun", "train.trained", "train.sent")
MASKING = ("secure.keyed", "secure.masked", "secure.signed")
SETTINGS = """
[client]
least_cohort = 4
[limits]
nice = 0
[connection]
backoff_max_s = 1.0
"""
RUN = """
[run]
task = "digits"
rounds = {rounds}
clip_norm = 4.0
weighting = "equal"
secure_aggregation = "{secure}"
[run.cohort]
size = 4
min_reports = {least}
max_attempts = 20
deadline_s = 60
fill_wait_s = 60
[run.secure]
min_cohort = 4
[run.local]
epochs = 1
batch_size = 20
"""


def enrol_killed(fleet, name, point):
    """Enrol with one token, killed at a point, then by the same command again."""
    token, state = fleet.lepton("token", "create")["token"], StateDir(fleet.state(name))
    command = "client", "enroll", "--token", token, "--state-dir", str(state.folder), "--name", name
    assert fleet.run(*command, check=False, crash=point).returncode == -signal.SIGKILL
    assert not state.is_enrolled()
    key = state.key.read_bytes()
    fleet.run(*command)
    assert state.key.read_bytes() == key
    crypto.load_key(state.key)
    assert state.identity().name == name


def kept(fleet, name):
    """What a device has on its disk is whole; its keys and its identity, which nothing but time changes."""
    state = StateDir(fleet.state(name))
    Ledger(state.ledger)
    Contracts(state.contracts)
    status = state.status()
    assert status["device_id"] == state.identity().device_id
    return state.identity().device_id, state.key.read_bytes(), state.signing_key.read_bytes()


def until_killed(fleet, name):
    process = fleet.processes[name]
    fleet.until(lambda: process.poll() is not None, f"{name} gets to its crash point", 300)
    assert fleet.processes.pop(name).returncode == -signal.SIGKILL, fleet.log(name)


def until_completed(fleet, run_id):
    def ended():
        with open_store(fleet.folder / "server" / "lepton.db") as store:  # a command takes seconds
            return store.run(run_id).finished

    fleet.until(ended, f"run {run_id} ends", 600)
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        run = store.run(run_id)
        assert run.state == "completed", run.reason
        return [p for p in store.participation(run_id) if p.outcome == "counted"]


def test_killed_at_any_point_a_client_takes_part_again(real_fleet, digit_files):
    assert {*ENROLLING, *TRAINING, *MASKING} <= set(CLIENT)  # test_secure_fleet has the other stages
    fleet, names = real_fleet, [f"dev{i}" for i in range(DEVICES)]
    fleet.make_authority()
    fleet.start_server()
    for name, point in zip(names, ENROLLING, strict=False):
        enrol_killed(fleet, name, point)
    fleet.join_all(names[len(ENROLLING) :])
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        assert len(store.devices()) == DEVICES  # nobody twice
    before = {}

    def start(points):
        """All of them; each of the first ones dies at its point."""
        for i, name in enumerate(names):
            if name not in fleet.processes:
                crash = points[i] if i < len(points) else ""
                fleet.start_client(name, digit_files[i], SETTINGS, crash=crash)

    def strike(points, **fields):
        """A run in which each dies at its point and is started again, and nothing else is done for it."""
        start(points)
        run_id = fleet.start_run(RUN.format(**fields))
        for name in names[: len(points)]:
            until_killed(fleet, name)
            now = kept(fleet, name)
            assert before.setdefault(name, now) == now
        return run_id

    # All at once in one plain round.
    plain = strike(TRAINING, rounds=1, secure="off", least=1)
    # One in each of three secure rounds: of four devices, three must come through.
    start([f"{point}:{number}" for number, point in enumerate(MASKING, 1)])
    assert len(until_completed(fleet, plain)) <= DEVICES
    secure = strike((), rounds=4, secure="required", least=3)
    for name in names[: len(MASKING)]:
        until_killed(fleet, name)
        assert kept(fleet, name) == before[name]
        fleet.start_client(name, digit_files[names.index(name)], SETTINGS)
    counted = until_completed(fleet, secure)
    assert len({(p.round, p.attempt, p.device_id) for p in counted}) == len(counted)
    # And then everybody as if nothing had happened.
    last = fleet.start_run(RUN.format(rounds=1, secure="required", least=DEVICES))
    assert len(until_completed(fleet, last)) == DEVICES
    for name in names:
        assert kept(fleet, name) == before.setdefault(name, kept(fleet, name))
