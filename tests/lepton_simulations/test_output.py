"""Rows as tables, plots, TensorBoard, labels, strategies by name, comparisons."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lepton_fl.errors import ConfigError, NotFound, StateCorrupt
from lepton_fl.files import canonical_json
from lepton_fl.plan import PrivacySpec, RunSpec
from lepton_fl.rounds.campaign import Committed, RunState, Work, plan_round
from lepton_fl.rounds.collect import Collected, Participation
from lepton_fl.tasks import Classification
from lepton_simulations import labels
from lepton_simulations.api import run_scenario, simulate
from lepton_simulations.book import MemoryBook, read_rows, read_scenario
from lepton_simulations.compare import compare, draw, read_run, read_runs
from lepton_simulations.config import DataConfig, OutputConfig, ReplayConfig, SimulationConfig
from lepton_simulations.labels import PRIVACY_IS_SIMULATED, simulated
from lepton_simulations.plot import plot_all, plot_privacy, plot_rows
from lepton_simulations.rows import Row, Tally, device_columns, frame, row_columns, table
from lepton_simulations.settings import names, run_settings
from lepton_simulations.sinks import EventFile, log_to_mlflow, scalars
from lepton_simulations.world import DevicesConfig, FaultsConfig
from lepton_strategies import FedAdam

LOCAL = {"learning_rate": 0.1, "batch_size": 256}
DEVICES = {"classes": [{"speed": 50.0, "up": 1e5, "down": 1e6}]}


def small(**changes):
    settings = {"clients": 6, "rounds": 3, "cohort": 3, "workers": 0, "local": LOCAL, "drop_out": 0.3}
    return simulate("digits", **settings | changes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return small(folder=tmp_path_factory.mktemp("runs") / "one", devices=DEVICES)


def row(number, **changes):
    fields = {"reports": 2, "asked": 3, "train_loss": 1.0, "metrics": {}, "outcomes": {"accepted": 2}}
    return Row(round=number, **fields | {"bytes_up": 10, "bytes_down": 20, "seconds": 0.5} | changes)


# --- tables -------------------------------------------------------------------------------------------


def test_a_frame_has_one_line_a_round(recorded):
    data = recorded.to_frame()
    assert list(data["round"]) == [1, 2, 3]
    assert list(data["central_accuracy"]) == [row.metric("accuracy") for row in recorded.rows]
    assert data["bytes_total"].iloc[-1] == (data["bytes_up"] + data["bytes_down"]).sum()
    assert (data["outcome_accepted"] == data["reports"]).all()
    assert data["epsilon"].isna().all()
    assert data["time_s"].is_monotonic_increasing


def test_every_device_is_in_the_participation(recorded):
    data = recorded.devices_frame().set_index("device")
    assert sorted(data.index) == [str(n) for n in range(6)]
    assert data["accepted"].sum() == sum(row.reports for row in recorded.rows)
    assert data["asked"].sum() == sum(sum(row.outcomes.values()) for row in recorded.rows)
    assert (data.filter(like="outcome_").sum(axis=1) == data["asked"]).all()
    assert data["bytes_up"].sum() == sum(row.bytes_up for row in recorded.rows)
    assert data["bytes_down"].sum() == sum(row.bytes_down for row in recorded.rows)


def attempt(number, devices):
    """An attempt at round 1 of which nobody answers."""
    work = Work("pkg:task", "1", "", 10, Classification(3))
    state = RunState(np.zeros(10, np.float32), attempt=number)
    cohort = tuple(f"d{n}" for n in range(devices))
    plan = plan_round(RunSpec(task="pkg:task"), "run", work, "train", 1, state, cohort, 1, "00")
    return Collected(plan, {d: Participation(d, "offline") for d in cohort})


def test_every_attempt_has_the_bytes_of_its_own_cohort():
    book = MemoryBook()
    book.abandoned(attempt(1, 3), "nobody came")
    book.abandoned(attempt(2, 7), "nobody came")
    counts = attempt(3, 5)
    book.committed(Committed(RunState(np.zeros(10, np.float32), round=1), counts, {}, 1.0, 4 * 10 * 5))
    assert book.rows[0].bytes_down == 4 * 10 * (3 + 7 + 5)
    assert sum(tally.bytes_down for tally in book.tallies.values()) == book.rows[0].bytes_down


def test_the_files_say_the_same(recorded):
    metrics = pq.read_table(recorded.folder / "metrics.parquet").to_pydict()
    assert metrics == {name: list(values) for name, values in row_columns(recorded.rows).items()}
    devices = pq.read_table(recorded.folder / "participation.parquet").to_pydict()
    assert devices == device_columns(recorded.tallies)
    assert read_rows(recorded.folder) == recorded.rows


def test_rounds_without_a_figure_have_a_gap():
    columns = row_columns([row(1), row(2, metrics={"accuracy": 0.5}, outcomes={"late": 1}, epsilon=0.1)])
    assert columns["accuracy"] == [None, 0.5]
    assert columns["outcome_late"] == [0, 1]
    assert columns["bytes_total"] == [30, 60]
    data = frame(columns)
    assert data["accuracy"].isna().tolist() == [True, False]
    assert data["accuracy"].dtype == data["epsilon"].dtype == float
    assert str(table(columns).schema.field("clip_norm").type) == "double"


def test_no_rounds_are_an_empty_table():
    assert frame(row_columns([])).empty
    assert table(row_columns([])).num_rows == 0
    assert device_columns({})["device"] == []


# --- plots --------------------------------------------------------------------------------------------


def test_every_plot_is_a_picture(recorded, tmp_path):
    assert {p.name for p in (recorded.folder / "plots").iterdir()} == {"learning.png", "participation.png"}
    rows = [replace(r, epsilon=0.1 * r.round, clip_norm=1.0) for r in recorded.rows]
    paths = plot_all(rows, recorded.tallies, tmp_path, title="a" * 200, footer="b " * 500)
    assert [path.name for path in paths] == ["learning.png", "participation.png", "privacy.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_a_plot_of_many_rounds_without_a_score(tmp_path):
    rows = [row(n, outcomes={"accepted": 2, "strange": 1, "offline": n % 3}) for n in range(1, 300)]
    for path in plot_all(rows, {"a": Tally()}, tmp_path):
        assert path.stat().st_size > 10_000


def test_rounds_that_tell_no_losses_are_drawn(tmp_path):
    plot_rows([row(1, train_loss=None), row(2, train_loss=None)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ConfigError, match="no round was committed"):
        plot_rows([], tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no round spent any epsilon"):
        plot_privacy([row(1)], tmp_path / "a.png")


def test_drawing_needs_no_display_and_starts_no_thread():
    import threading

    before = threading.active_count()
    small(rounds=1)
    assert threading.active_count() == before


# --- TensorBoard and MLflow -----------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read an event file back: records of a length, its checksum, an Event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    body, found = path.read_bytes(), {}
    while body:
        (length,) = struct.unpack("<Q", body[:8])
        event = Event.FromString(body[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        body = body[16 + length :]
    return found


def test_tensorboard_has_every_figure_once(recorded):
    found = events(recorded.folder / "tensorboard")
    for name, points in found.items():
        assert [step for step, _ in points] == sorted({step for step, _ in points}), name
    accuracy = [value for _, value in found["metrics/central_accuracy"]]
    assert accuracy == pytest.approx([r.metric("accuracy") for r in recorded.rows])
    assert len(found["cost/time_s"]) == len(found["round/train_loss"]) == 3
    assert "round/epsilon" not in found


def test_a_run_that_goes_on_has_no_figure_twice(tmp_path):
    seen = []
    small(folder=tmp_path / "run", on_round=seen.append, should_stop=lambda: len(seen) >= 3)
    small(folder=tmp_path / "run", resume=True)
    assert [step for step, _ in events(tmp_path / "run/tensorboard")["round/train_loss"]] == [1, 2, 3]


def test_without_tensorboard_nothing_is_missed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.event_file_writer", None)
    assert EventFile.open(tmp_path / "t", []) is None
    result = small(rounds=1, folder=tmp_path / "run")
    assert result.verdict.outcome == "completed"
    assert not (tmp_path / "run/tensorboard").exists()


def test_scalars_are_finite():
    found = scalars(row(1, metrics={"a": float("inf"), "b": 1.0}, epsilon=float("nan")))
    assert "metrics/a" not in found
    assert "round/epsilon" not in found
    assert found["metrics/b"] == 1.0


def test_mlflow_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "mlflow.entities", None)
    with pytest.raises(ConfigError, match="mlflow is not installed"):
        log_to_mlflow(str(tmp_path), "run", {}, [], {}, [])


@pytest.mark.filterwarnings("default")  # what MLflow's own dependencies warn of is not ours to change
def test_mlflow_takes_a_run(tmp_path, recorded):
    pytest.importorskip("mlflow", reason="mlflow is not installed; it is no dependency")
    from mlflow.tracking import MlflowClient

    parameters = {"run": {"task": "digits", "rounds": 3}}
    tags = {"weights_sha256": recorded.weights_sha256}
    files = [recorded.folder / "metrics.csv"]
    run_id = log_to_mlflow(str(tmp_path / "ml"), "one", parameters, recorded.rows, tags, files)
    client = MlflowClient(f"sqlite:///{tmp_path}/ml/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["run.rounds"] == "3"
    assert run.data.tags["weights_sha256"] == recorded.weights_sha256
    assert [file.path for file in client.list_artifacts(run_id)] == ["metrics.csv"]
    history = client.get_metric_history(run_id, "metrics/central_accuracy")
    assert [point.step for point in history] == [1, 2, 3]


# --- what is simulated ----------------------------------------------------------------------------------


def config(**sections) -> SimulationConfig:
    return SimulationConfig(**{"run": RunSpec(task="digits")} | sections)


def test_labels_name_what_is_simulated(recorded):
    found = simulated(
        config(
            devices=DevicesConfig.model_validate(DEVICES),
            faults=FaultsConfig(drop_out=0.1, malicious=0.2, attack="label_flip", crash_rounds=(3,)),
            data=DataConfig(partition={"kind": "dirichlet", "alpha": 0.1}),
        ),
        539,
        "fused",
    )
    assert found == (
        "539 virtual devices: Dirichlet(0.1) over classes",
        "virtual time of 1 device class",
        "drop-out 10 %",
        "20 % malicious (label flip)",
        "1 coordinator crash",
        "engine fused",
        "privacy: none",
    )
    assert json.loads((recorded.folder / "scenario.json").read_text())["simulated"] == list(
        recorded.simulated
    )


def test_a_replay_is_labelled():
    found = simulated(config(replay=ReplayConfig(file="x")), 5)
    assert "times and drop-outs replayed from a journal" in found
    assert not any("drop-out 0" in label or "no faults" in label for label in found)


def test_simulated_privacy_says_that_it_protects_nobody():
    assert "protects nobody" in PRIVACY_IS_SIMULATED
    asked = PrivacySpec(epsilon=1.0, delta=1e-5).to_json()
    assert list(labels._privacy({"run": {"privacy": asked}})) == [
        PRIVACY_IS_SIMULATED,
        "what is protected: one device, trust central, adjacency zero-out, delta 1e-05",
    ]
    assert list(labels._privacy({"run": {"secure_aggregation": {"enabled": True}}})) == [PRIVACY_IS_SIMULATED]
    assert list(labels._privacy({"run": {"privacy": None, "secagg": False}})) == ["privacy: none"]


# --- strategies by name ---------------------------------------------------------------------------------


def settings(strategy, **more):
    base = {"clients": 8, "rounds": 4, "cohort": 0, "seed": 0, "more": more}
    return run_settings("digits", strategy, **base)


@pytest.mark.parametrize("name", names())
def test_every_name_is_a_strategy(name):
    spec = settings(name)
    assert spec.cohort.size == 8
    assert (spec == settings("fedavg")) == (name == "fedavg")


def test_what_is_said_besides_wins_key_by_key():
    assert settings("fedadam").server.learning_rate == 0.01
    spec = settings("fedadam", server={"learning_rate": 0.5}, local={"epochs": 3}, cohort={"min_reports": 2})
    assert (spec.server.name, spec.server.learning_rate) == ("fedadam", 0.5)
    assert (spec.cohort.size, spec.cohort.min_reports) == (8, 2)
    assert settings("", server={"name": "fedyogi"}).server.name == "fedyogi"


def test_a_strategy_object_brings_its_settings():
    strategy = FedAdam("digits", learning_rate=0.05, cohort={"size": 3}, local={"epochs": 2}, seed=1)
    spec = settings(strategy)
    assert (spec.server.name, spec.server.learning_rate) == ("fedadam", 0.05)
    assert (spec.cohort.size, spec.local.epochs, spec.rounds) == (3, 2, 4)
    by_object = simulate("digits", strategy, 6, 2, workers=0)
    by_name = small(
        strategy="fedadam", rounds=2, drop_out=0.0, local={"epochs": 2}, server={"learning_rate": 0.05}
    )
    assert by_object.weights_sha256 == by_name.weights_sha256


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fedsgd", "There is no strategy 'fedsgd'"),
        (object(), "is not a strategy of lepton_strategies"),
        (FedAdam("lepton_fl.tasks.tables:heart_disease"), "was made for"),
    ],
)
def test_what_is_no_strategy_is_refused(strategy, message):
    with pytest.raises(ConfigError, match=message):
        settings(strategy)


# --- comparing ------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was(recorded):
    run = read_run(recorded.folder)
    assert run.weights_sha256 == recorded.weights_sha256
    assert run.journal_sha256 == recorded.journal_sha256
    assert run.rows == recorded.rows
    assert run.simulated == recorded.simulated


def test_two_runs_side_by_side(recorded, tmp_path):
    small(folder=tmp_path / "one", devices=DEVICES, rounds=4)
    runs = read_runs([recorded.folder, tmp_path / "one"])
    assert [run.name for run in runs] == [str(recorded.folder), str(tmp_path / "one")]
    found = compare(runs)
    assert (found.metric, found.mode, found.same_weights, found.same_journal) == (
        "accuracy",
        "max",
        False,
        False,
    )
    first, second = found.lines
    assert found.target == min(first.best, second.best)
    assert first.rounds_to_target <= 3
    there = recorded.rows[first.rounds_to_target - 1]
    assert first.time_s_to_target == there.time_s
    assert first.bytes_to_target == sum(r.traffic for r in recorded.rows[: first.rounds_to_target])
    assert draw(runs, found, tmp_path / "c.png").stat().st_size > 10_000
    assert compare(runs[:1], "accuracy", 1.1).lines[0].rounds_to_target is None
    assert compare(runs[:1], "loss").mode == "min"
    with pytest.raises(ConfigError, match="No run has the metric 'speed'"):
        compare(runs, "speed")


def test_folders_without_a_run_and_damaged_ones(recorded, tmp_path):
    with pytest.raises(NotFound):
        read_run(tmp_path)
    small(rounds=1, folder=tmp_path / "run")
    path = tmp_path / "run/state.json"
    path.write_bytes(path.read_bytes().replace(b'"seq":', b'"seq":1'))
    with pytest.raises(StateCorrupt, match="was noted"):
        read_run(tmp_path / "run")


def test_rows_that_are_missing_are_noticed(tmp_path):
    small(rounds=2, folder=tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(row for row in rows if json.loads(row)["round"] != 1))
    with pytest.raises(StateCorrupt, match="each of the"):
        read_run(tmp_path / "run")


def changed(row, name):
    """A row with another figure."""
    if name == "metrics":
        return row | {"metrics": dict.fromkeys(row["metrics"], 1.0)}
    return row | {name: (row[name] or 0) + 1}


@pytest.mark.parametrize("name", ["metrics", "train_loss", "epsilon", "time_s", "bytes_up", "bytes_down"])
def test_figures_that_are_not_the_journals_are_noticed(tmp_path, name):
    """The rows are outside the hash chain; nobody can make a run look better by them."""
    small(rounds=2, folder=tmp_path / "run", devices=DEVICES)
    path = tmp_path / "run/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    rows[-1] = changed(rows[-1], name)
    path.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))
    state = json.loads((tmp_path / "run/state.json").read_bytes())
    state["metrics_bytes"] = path.stat().st_size
    (tmp_path / "run/state.json").write_bytes(canonical_json(state))
    with pytest.raises(StateCorrupt, match=f"differ in round 2: {name}"):
        read_run(tmp_path / "run")


def test_rows_after_the_commit_point_are_not_read(recorded, tmp_path):
    """A run that is still going on writes them first."""
    shutil.copytree(recorded.folder, tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "ab") as file:
        file.write(b'{"round": 4, "rep')
    assert read_run(tmp_path / "run").rows == recorded.rows


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_out": 0.6, "cohort": {"size": 4, "min_reports": 3}},
        {"rounds": 2, "mode": "buffered", "buffer": {"size": 2, "concurrency": 3}, "drop_out": 0.2},
        {"faults": {"crash_rounds": (2,)}, "evaluate_every": 2},
    ],
)
def test_runs_with_abandoned_attempts_agree_with_their_journals(tmp_path, changes):
    result = small(folder=tmp_path / "run", devices=DEVICES, **changes)
    assert read_run(tmp_path / "run").rows == result.rows


# --- replay ---------------------------------------------------------------------------------------------


def test_a_replayed_run_gives_the_same_weights_at_the_same_times(recorded, tmp_path):
    scenario = read_scenario(recorded.folder)
    update = {
        "devices": DevicesConfig(),
        "faults": FaultsConfig(),
        "replay": ReplayConfig(file=str(recorded.folder / "journal.jsonl")),
        "output": OutputConfig(folder=str(tmp_path / "again"), plots=False),
    }
    again = run_scenario(scenario.model_copy(update=update))
    assert again.weights_sha256 == recorded.weights_sha256
    assert [r.time_s for r in again.rows] == [r.time_s for r in recorded.rows]
    assert [r.outcomes for r in again.rows] == [r.outcomes for r in recorded.rows]


def test_the_scenarios_are_complete():
    from lepton_fl.config import load

    files = sorted((Path(__file__).parents[2] / "simulations").glob("*.toml"))
    assert len([f for f in files if f.name.startswith("minute_")]) == 6
    for file in files:
        load(SimulationConfig, file, env={})
