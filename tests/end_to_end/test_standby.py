"""A stand-by on PostgreSQL: the leader is killed, the other one finishes the run."""

import shutil
import signal

import pytest

from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.postgres, pytest.mark.timeout(600)]

RUN = """
[run]
task = "digits"
rounds = 4
[run.cohort]
size = 2
min_reports = 2
deadline_s = 240
fill_wait_s = 60
[run.local]
batch_size = 10
"""
CLIENT = "[limits]\nnice = 0\n[connection]\nbackoff_max_s = 1.0\n"


def test_a_stand_by_takes_over_and_finishes_the_run(tmp_path, postgres_url, digit_files, make_fleet):
    fleet = make_fleet(tmp_path, postgres_url)
    text = fleet.config.read_text()
    fleet.config.write_text(text.replace("[store]\n", f'[store]\nblobs = "{tmp_path / "blobs"}"\n'))
    fleet.start_server()
    for i in range(2):
        fleet.join(f"dev{i}")
        fleet.start_client(f"dev{i}", digit_files[i], CLIENT)
    other = tmp_path / "other.toml"
    other.write_text(fleet.config.read_text().replace(str(tmp_path / "server"), str(tmp_path / "other")))
    shutil.copytree(tmp_path / "server" / "keys", tmp_path / "other" / "keys")
    refused = fleet.run("server", "--config", str(other), check=False)
    assert refused.returncode == 7
    assert "holds the lease" in refused.stderr

    fleet.start("standby", "server", "--config", str(other), "--standby")
    fleet.until(lambda: "standing by" in fleet.log("standby"), "the second one stands by")
    run_id = fleet.start_run(RUN)
    with open_store(postgres_url) as store:
        fleet.until(lambda: store.run(run_id).committed >= 1, "round 1 is committed")
        fleet.kill("server", signal.SIGKILL)
        token = store.lease().token
        fleet.processes["server"] = fleet.processes.pop("standby")
        fleet.until(lambda: store.lease().token > token, "the stand-by leads")
        fleet.until(lambda: store.run(run_id).finished, "the stand-by finishes the run")
        assert store.run(run_id).state == "completed"
        assert [(r.round, r.attempt, r.state) for r in store.rounds(run_id)] == [
            (n, 1, "committed") for n in (1, 2, 3, 4)
        ]
        assert store.lease().holder.endswith("/other")
        store.verify_journal()
        assert store.rebuild().equal
