"""``lepton demo delivery`` at a small size: the whole way from a training to devices that serve it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

LEPTON = Path(sys.executable).parent / "lepton"


@pytest.fixture
def short():
    """A folder for what is temporary: a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield Path(folder)


def test_the_right_file_is_served_everywhere_and_a_bad_one_is_caught(tmp_path, short):
    environment = {k: v for k, v in os.environ.items() if k != "LEPTON_DATA"} | {"TMPDIR": str(short)}
    done = subprocess.run(
        [LEPTON, "demo", "delivery", "--devices", "6", "--output", tmp_path / "demo", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout)
    assert [row["profile"] for row in story["devices"]] == ["gateway", "phone", "sensor"] * 2
    assert all(row["serving"] for row in story["devices"])
    assert min(row["accuracy"] for row in story["devices"]) > 0.8
    assert len({row["sha256"] for row in story["devices"]}) == 3  # one variant for each profile
    good, bad = story["rollouts"]
    assert (good["phase"], bad["phase"]) == ("done", "rolled-back")
    assert 1 <= story["reached_by_bad"] <= 4  # the canaries, of six
    assert "on their own rows" in bad["cause"]
    assert story["failed"] == []
    assert story["requests"] > 0
    assert Path(story["plot"]).stat().st_size > 10_000
    assert not list(short.glob("lepton-*"))  # nothing of the fleet is left


def test_a_task_without_its_data_is_refused_before_anything_starts(tmp_path):
    done = subprocess.run(
        [
            LEPTON,
            "demo",
            "delivery",
            "--task",
            "fashion_mnist",
            "--data",
            tmp_path,
            "--output",
            tmp_path / "o",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "fashion_mnist.npz" in done.stderr
