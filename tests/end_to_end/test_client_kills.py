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
MASKING = (  # of each device, one after the other; each in another secure round, if all goes as planned
    ("secure.advertised", "secure.revealed:3"),
    ("secure.keyed:2",),
    ("secure.masked:3",),
    ("secure.signed:4",),
)
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


def supervise(fleet, data, following, before):
    """Start each device again whenever it has died, with its next point; ends when all have started so."""
    left = {name: list(points) for name, points in following.items() if points}

    def look():
        for name in [n for n in left if fleet.processes[n].poll() is not None]:
            assert fleet.processes.pop(name).returncode == -signal.SIGKILL, fleet.log(name)
            now = kept(fleet, name)
            assert before.setdefault(name, now) == now
            fleet.start_client(name, data[name], SETTINGS, crash=left[name].pop(0))
            if not left[name]:
                del left[name]
        return not left

    fleet.until(look, "all devices get to their crash points", 600)


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
    fleet, names = real_fleet, [f"dev{i}" for i in range(DEVICES)]
    fleet.make_authority()
    fleet.start_server()
    for name, point in zip(names, ENROLLING, strict=False):
        enrol_killed(fleet, name, point)
    fleet.join_all(names[len(ENROLLING) :])
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        assert len(store.devices()) == DEVICES  # nobody twice
    data, before = dict(zip(names, digit_files, strict=False)), {}
    masking = dict(zip(names, MASKING, strict=True))
    passed = [*ENROLLING, *TRAINING, *(p.partition(":")[0] for of in MASKING for p in of)]
    assert sorted(passed) == sorted(CLIENT)

    # All at once in one plain round.
    for name, point in zip(names, TRAINING, strict=True):
        fleet.start_client(name, data[name], SETTINGS, crash=point)
    plain = fleet.start_run(RUN.format(rounds=1, secure="off", least=1))
    supervise(fleet, data, {name: of[:1] for name, of in masking.items()}, before)
    assert len(until_completed(fleet, plain)) <= DEVICES
    # One after the other in secure rounds: of four devices, three must come through.
    secure = fleet.start_run(RUN.format(rounds=6, secure="required", least=3))
    supervise(fleet, data, {name: [*of[1:], ""] for name, of in masking.items()}, before)
    counted = until_completed(fleet, secure)
    assert len({(p.round, p.attempt, p.device_id) for p in counted}) == len(counted)
    # And then everybody as if nothing had happened.
    last = fleet.start_run(RUN.format(rounds=1, secure="required", least=DEVICES))
    assert len(until_completed(fleet, last)) == DEVICES
    for name in names:
        assert kept(fleet, name) == before[name]
