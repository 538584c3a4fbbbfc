"""Several machines: the same bits as one, over torch.distributed and over Ray; failures are named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lepton_fl.errors import ConfigError, Rejection, RunError, UpdateRejected
from lepton_fl.wire.records import Records
from lepton_simulations.api import build_fleet, run_scenario
from lepton_simulations.backend import Alone
from lepton_simulations.cluster import Cluster, Follower, Note, TorchLink
from lepton_simulations.config import SimulationConfig

SCENARIO = {
    "run": {
        "task": "digits",
        "rounds": 3,
        "cohort": {"size": 7},
        "local": {"learning_rate": 0.1, "batch_size": 16},
        "clip_norm": 0.5,
    },
    "data": {"partition": {"kind": "dirichlet", "clients": 9}},
    "engine": {"workers": 0},
    "faults": {"drop_out": 0.1, "corrupt": 0.3, "malicious": 0.2, "attack": "sign_flip"},
}


def config(**engine) -> SimulationConfig:
    return SimulationConfig.model_validate({**SCENARIO, "engine": {"workers": 0, **engine}})


@pytest.fixture(scope="module")
def alone():
    return run_scenario(config())


class Direct:
    """A link to followers in this process."""

    def __init__(self, *followers: Follower) -> None:
        self._all = followers
        self._answers: list[Note] = []

    @property
    def followers(self) -> int:
        return len(self._all)

    def send(self, notes) -> None:
        leaving = [n for n in notes if n.body["do"] == "leave"]
        self._answers = [] if leaving else [f.handle(n) for f, n in zip(self._all, notes, strict=True)]

    def receive(self):
        yield from self._answers

    def close(self) -> None:
        self._answers = []


@pytest.mark.parametrize(("followers", "leader_computes"), [(1, True), (2, True), (3, False)])
def test_a_cluster_gives_the_bits_of_one_machine(alone, monkeypatch, followers, leader_computes):
    shards = [Alone(build_fleet(config())) for _ in range(followers)]
    link = Direct(*(Follower(shard) for shard in shards))

    def cluster(fleet, config, stack):
        return stack.enter_context(Cluster(link, Alone(fleet) if leader_computes else None))

    monkeypatch.setattr("lepton_simulations.api.make_backend", cluster)
    result = run_scenario(config())
    assert_array_equal(result.model, alone.model)
    assert result.journal_sha256 == alone.journal_sha256


class Broken(Alone):
    """A machine without memory."""

    def train(self, devices, costs):
        raise MemoryError("32 GB are not enough")
        yield


def test_a_machine_that_fails_is_heard_of(monkeypatch):
    link = Direct(Follower(Broken(build_fleet(config()))))
    monkeypatch.setattr(
        "lepton_simulations.api.make_backend", lambda f, c, stack: stack.enter_context(Cluster(link))
    )
    result = run_scenario(config())
    assert result.verdict.outcome == "failed"
    assert "32 GB are not enough" in result.verdict.reason


class Stubborn:
    """A backend that fails at everything."""

    def answer(self, devices):
        raise MemoryError("full")

    def subtotal(self):
        raise MemoryError("full")


class Counting(Direct):
    """Knows how many answers nobody has taken."""

    left = 0

    def send(self, notes):
        super().send(notes)
        self.left = len(self._answers)

    def receive(self):
        for answer in self._answers:
            self.left -= 1
            yield answer


@pytest.mark.parametrize("own_fails", [False, True])
@pytest.mark.parametrize("ask", ["answer", "subtotal", "tell"])
def test_after_a_failure_nobody_is_left_with_an_answer(ask, own_fails):
    """Else the next question would get the answer to this one."""
    link = Counting(*(Follower(Stubborn()) for _ in range(3)))
    cluster = Cluster(link, Stubborn() if own_fails else None)
    asks = {
        "answer": lambda: list(cluster.answer(["a", "b", "c", "d"])),
        "subtotal": cluster.subtotal,
        "tell": lambda: cluster._tell([Note({"do": "subtotal"})] * 3),
    }
    with pytest.raises((RunError, MemoryError), match="full"):
        asks[ask]()
    assert link.left == 0


def test_answers_cross_whole():
    class Two:
        def answer(self, devices):
            arrays = {"update": np.arange(3, dtype=np.int32)}
            yield "a", Records(arrays, {"round": 1}, {"seconds": 0.5})
            yield "b", UpdateRejected(Rejection.FAILED, "no", hint="go")

    cluster = Cluster(Direct(Follower(Two())))
    (a, records), (b, refusal) = cluster.answer(["a", "b"])
    assert (a, b) == ("a", "b")
    assert_array_equal(records.arrays["update"], [0, 1, 2])
    assert (records.config, records.metrics) == ({"round": 1}, {"seconds": 0.5})
    assert (refusal.reason, str(refusal), refusal.hint) == (Rejection.FAILED, "no", "go")


def test_a_follower_that_fails_answers_with_the_error():
    answer = Follower(Alone(build_fleet(config()))).handle(
        Note({"do": "train", "devices": ["nobody"], "costs": [1]})
    )
    assert "error" in answer.body
    with pytest.raises(RunError, match="machine of the cluster failed"):
        list(Cluster(Direct(Follower(Broken(build_fleet(config()))))).train(["0"], [1]))


def test_torchrun_is_asked_for_but_did_not_start_this(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="not started by torchrun"):
        TorchLink()


def scenario_file(folder: Path) -> Path:
    path = folder / "scenario.toml"
    path.write_text(
        """
[run]
task = "digits"
rounds = 3
clip_norm = 0.5
[run.cohort]
size = 7
[run.local]
learning_rate = 0.1
batch_size = 16
[data.partition]
kind = "dirichlet"
clients = 9
[faults]
drop_out = 0.1
corrupt = 0.3
malicious = 0.2
attack = "sign_flip"
"""
    )
    return path


@pytest.mark.slow
@pytest.mark.network
def test_torchrun_on_this_machine(tmp_path, alone):
    tools = Path(sys.executable).parent
    output = tmp_path / "run"
    simulate = ["lepton", "simulate", str(scenario_file(tmp_path)), "--output", str(output)]
    command = [tools / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [tools / simulate[0], *simulate[1:], "--set", "engine.backend=torchrun"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    journal = (output / "journal.jsonl").read_text().splitlines()
    assert alone.journal_sha256 in journal[-1]


@pytest.mark.slow
@pytest.mark.network
def test_ray_on_this_machine(tmp_path, alone):
    pytest.importorskip("ray", reason="Ray is not installed")
    output = tmp_path / "run"
    command = [Path(sys.executable).parent / "lepton", "simulate", str(scenario_file(tmp_path))]
    command += ["--output", str(output), "--set", "engine.backend=ray", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert alone.journal_sha256 in (output / "journal.jsonl").read_text().splitlines()[-1]
