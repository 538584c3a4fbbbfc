"""Coordinators that race on one database and are killed at random never spend too much, and hide nothing.

Each process drives runs of its own through random reservations, releases, commits and voids, all under one
budget of the fleet, and writes what it "publishes" into a file of its own before it may commit. Some are
killed by SIGKILL wherever they are.
"""

import multiprocessing
import os
import random
import signal
import time

import pytest

from lepton_fl.errors import BudgetRefused
from lepton_fl.plan import RunSpec
from lepton_fl.privacy import record
from lepton_fl.privacy.budget import epsilon_of
from lepton_fl.privacy.events import Gaussian
from lepton_fl.privacy.record import Policy
from lepton_server import cli_privacy
from lepton_server.config import PrivacySection
from lepton_server.privacy import Ledger, PrivacyKeys, set_budget, void_unbegun
from lepton_server.store import engine, open_store

WANTED = int(os.environ.get("LEPTON_SCHEDULES", "200"))  # attempts of coordinators that are killed
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280 + WANTED)]

CONTEXT = multiprocessing.get_context("fork")
SHA = "ab" * 32
DELTA = 1e-5
ROUNDS = 1200  # schedules in all: attempts at a release, each with an end of its own
SPEC = {"task": "a:b", "evaluate_every": 0, "cohort": {"size": 2}}
PRIVACY = {"mechanism": "independent", "noise_multiplier": 20.0, "delta": DELTA}


def coordinator(database, folder, name, seed, attempts):
    """Random schedules until they are done; each release is published before its commit is tried."""
    rng = random.Random(seed)
    spec = RunSpec.model_validate(SPEC | {"privacy": PRIVACY})
    keys = PrivacyKeys(folder / "keys", PrivacySection())
    refusals = 0
    # A kill is no power cut: what was written is there, synced or not.
    engine._BEGIN["write"] = ("PRAGMA synchronous=OFF", "BEGIN IMMEDIATE")
    published = os.open(folder / f"{name}.published", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    with open_store(database, lock_timeout=60.0) as store:
        ledger = Ledger(store, name, spec, keys.public())
        with store.transaction() as change:
            change.record("run.queued", {"run_id": name, "name": name, "spec": spec.to_json()})
            change.record("run.started", {"run_id": name})
        for number in range(1, attempts + 1):
            event = Gaussian(rng.choice([20.0, 30.0, 50.0])) if rng.random() < 0.9 else None
            ledger.reserve(name, number, 1, event)
            try:
                with store.transaction() as change:
                    ledger.write_reserved(change)
            except BudgetRefused:
                os.write(published, b"refused\n")
                if (refusals := refusals + 1) == 10:  # each searches for what would fit
                    break
                continue
            if rng.random() < 0.3:
                ledger.void(name, number, 1, "too few reports")
                with store.transaction() as change:
                    ledger.write_voided(change)
                ledger.settled()
                continue
            ledger.releasing(name, number, 1)
            os.write(published, f"{number}\n".encode())
            ledger.commit(name, number, 1)
            if rng.random() < 0.9:
                with store.transaction() as change:
                    ledger.write_committed(change, SHA, None)
            ledger.settled()
    os.write(published, b"done\n")


def race(database, folder, *, cap, killed=0):
    """Two racing coordinators, or pair after pair that is killed, until they have begun so many attempts."""
    keys = PrivacyKeys(folder / "keys", PrivacySection())
    with open_store(database) as store, store.transaction() as change:
        set_budget(change, keys, Policy(record.FLEET, 1, cap, DELTA))
    rng, names = random.Random(7), []
    while not names or begun(database) < killed:
        started = []
        for side in range(2):
            names.append(f"r{len(names) // 2}-{side}")
            arguments = (database, folder, names[-1], rng.random(), 10**6 if killed else ROUNDS // 2)
            process = CONTEXT.Process(target=coordinator, args=arguments)
            process.start()
            started.append(process)
        if killed:
            wait_for([folder / f"{name}.published" for name in names[-2:]], rng.randrange(800), started)
            for process in started:
                os.kill(process.pid, signal.SIGKILL)
        for process in started:
            process.join(200)
            assert process.exitcode == (-signal.SIGKILL if killed else 0)
    return names, keys


def begun(database):
    """Attempts so far that were not refused."""
    with open_store(database) as store:
        return len(store.charges())


def wait_for(files, written, processes):
    """Until they have published more bytes than that, or one has ended by itself."""
    while all(process.is_alive() for process in processes):
        if sum(file.stat().st_size for file in files if file.exists()) > written:
            return
        time.sleep(0.005)


def judged(database, folder, names, keys, cap):
    """0 overspends, 0 unrecorded releases, nothing altered; returns how many were released and refused."""
    with open_store(database) as store:
        counted = {(c.run_id, c.round): c for c in store.charges() if c.state in ("releasing", "committed")}
        released = refused = 0
        for name in names:
            path = folder / f"{name}.published"
            lines = path.read_text().split() if path.exists() else []
            refused += lines.count("refused")
            for number in (line for line in lines if line.isdecimal()):
                assert (name, int(number)) in counted, "a release that the ledger does not know"
                released += 1
        with store.transaction() as change:
            for name in {c.run_id for c in store.charges()}:
                void_unbegun(change, name)
        assert not store.charges(states=["reserved"])
        ((budget, counts),) = store.budgets()
        spent = epsilon_of(budget.policy.budget, counts)
        assert spent <= cap
        store.verify_journal()
        assert store.rebuild().equal
        # Every refusal that was due, and every sum, once more and by the events alone.
        report = record.verify(cli_privacy.ledger_lines(store), keys.public())
        assert report.budgets[0].spent == pytest.approx(spent, rel=1e-12)
        return released, refused


def test_two_racing_coordinators_never_overspend(database, tmp_path):
    cap = epsilon_of(Policy("x", 1, 1.0, DELTA).budget, {Gaussian(20.0): 380})
    names, keys = race(database, tmp_path, cap=cap)
    released, refused = judged(database, tmp_path, names, keys, cap)
    assert released > 300
    assert refused > 0  # they have met the end of the budget
    assert begun(database) + refused >= 1000


def test_killed_coordinators_leave_no_release_unrecorded(database, tmp_path):
    """``LEPTON_SCHEDULES=1000`` makes it that many attempts (``make nightly``)."""
    cap = epsilon_of(Policy("x", 1, 1.0, DELTA).budget, {Gaussian(20.0): 10_000})
    names, keys = race(database, tmp_path, cap=cap, killed=WANTED)
    released, _ = judged(database, tmp_path, names, keys, cap)
    assert released > WANTED // 4
    assert begun(database) >= WANTED
    assert len(names) >= WANTED // 100  # processes killed
