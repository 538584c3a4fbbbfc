"""The whole thing, as its users run it: real processes, real TLS, real data, real trouble."""

import re
import signal

import pytest

from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 5
[run.cohort]
size = 5
min_reports = 5
deadline_s = 120
fill_wait_s = 60
[run.local]
optimizer = "adam"
learning_rate = 0.004
batch_size = 10
epochs = 2
[run.early_stop]
metric = "accuracy"
mode = "max"
"""


def test_a_fleet_trains_through_kills_newcomers_and_a_restart(real_fleet, digit_files):
    fleet = real_fleet
    fleet.start_server()
    for i in range(6):
        fleet.join(f"dev{i}")
    for i in range(5):
        fleet.start_client(f"dev{i}", digit_files[i])
    run_id = fleet.start_run(RUN)

    def done():
        """From the metrics: a command takes longer than a round."""
        found = re.search(r"^lepton_rounds_total\{.*\} (\d+)", fleet.get("/metrics"), re.MULTILINE)
        return 0 if found is None else int(found[1])

    fleet.until(done, "round 1 is committed")
    fleet.kill("dev1", signal.SIGKILL)  # a device dies
    last = done() + 1  # the round in hand may have its answer
    fleet.start_client("dev5", digit_files[5])  # another comes
    fleet.until(lambda: done() >= 2, "round 2 is committed without the dead device")
    fleet.kill("server", signal.SIGKILL)  # and the coordinator dies
    fleet.start_server()
    fleet.until(
        lambda: fleet.show(run_id)["state"] == "completed", "the restarted coordinator finishes the run"
    )

    check_rounds(fleet.show(run_id))
    names = {d["id"]: d["name"] for d in fleet.lepton("devices", "list")}
    check_journal(fleet, run_id, names, last)


def check_rounds(shown):
    committed = [r for r in shown["rounds_done"] if r["state"] == "committed"]
    assert [r["round"] for r in committed] == [1, 2, 3, 4, 5]
    assert committed[-1]["metrics"]["accuracy"] >= 0.85
    assert all(r["state"] in ("committed", "abandoned") for r in shown["rounds_done"])


def check_journal(fleet, run_id, names, last):
    with open_store(fleet.folder / "server" / "lepton.db") as store:
        store.verify_journal()
        assert store.rebuild().equal
        parts = [p for p in store.participation(run_id) if p.outcome == "counted"]
        attempts = {(r.round, r.attempt): r.state for r in store.rounds(run_id)}
        models = store.models(run_id)
    counted = {}
    for part in parts:
        if attempts[part.round, part.attempt] == "committed":
            counted.setdefault(part.round, set()).add(names[part.device_id])
    assert all(len(devices) == 5 for devices in counted.values())  # so nothing went on without the newcomer
    assert not any("dev1" in devices for number, devices in counted.items() if number > last)  # it was dead
    assert any("dev5" in devices for devices in counted.values())  # the newcomer took part
    assert len(set(counted) & {1, 2, 3, 4, 5}) == 5
    chain = {m.sha256: m.parent_sha256 for m in models}
    newest = max(models, key=lambda m: m.round).sha256
    length = 0
    while chain[newest] is not None:
        newest, length = chain[newest], length + 1
    assert length == 5  # lineage from the last model back to the first


@pytest.mark.postgres
def test_a_fleet_on_postgresql(tmp_path, postgres_url, digit_files, make_fleet):
    fleet = make_fleet(tmp_path, postgres_url)
    fleet.start_server()
    for i in range(2):
        fleet.join(f"dev{i}", groups=("ward",))
        fleet.start_client(f"dev{i}", digit_files[i])
    run_id = fleet.start_run(
        RUN.replace("rounds = 5", "rounds = 2").replace("size = 5\nmin_reports = 5", "size = 2")
    )
    fleet.until(lambda: fleet.show(run_id)["state"] == "completed", "the run completes")
    assert 'lepton_rounds_total{run="' + run_id + '"} 2.0' in fleet.get("/metrics")
    exported = tmp_path / "model.safetensors"
    assert fleet.lepton("run", "export", str(exported))["bytes"] == exported.stat().st_size
    device = fleet.lepton("devices", "list")[0]
    fleet.lepton("devices", "revoke", device["name"])
    fleet.until(
        lambda: fleet.processes[device["name"]].poll() == 6, "the revoked device stops with exit code 6"
    )
    with open_store(postgres_url) as store:
        store.verify_journal()
        assert store.rebuild().equal
