"""The ready tasks: models, transforms and published data sets."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton_fl.errors import ConfigError, DataError, NotFound
from lepton_fl.tasks import Dataset, installed_tasks, load_task
from lepton_fl.tasks.federated import federated_dataset
from lepton_fl.tasks.models import CNN, GRU, LSTM, MLP, Linear, initial_model
from lepton_fl.tasks.partition import PartitionSpec

torch.set_num_threads(1)
FROM_FOLDER = ("mnist_by_writer", "fashion_mnist", "beijing_air", "heart_disease", "shakespeare", "turbofan")


@pytest.fixture
def folder() -> Path:
    if "LEPTON_DATA" not in os.environ:
        pytest.skip("LEPTON_DATA does not name the folder of the data sets")
    return Path(os.environ["LEPTON_DATA"])


def raw_rows(task, n=3) -> Dataset:
    """Rows in the middle of the contract's range."""
    c = task.contract
    low, high = np.broadcast_to(c.low, c.shape), np.broadcast_to(c.high, c.shape)
    x = np.broadcast_to((low + high) / 2, (n, *c.shape))
    x = x.astype(np.uint8 if c.dtype == "uint8" else np.float32 if c.dtype == "float" else np.int64)
    y = np.ones((n, *c.target_shape), np.int64 if c.num_classes else np.float32)
    return Dataset(x.copy(), y)


@pytest.mark.parametrize("name", sorted(installed_tasks()))
def test_contract_transform_model_and_metrics_fit(name):
    task = load_task(name)
    rows = raw_rows(task, max(3, task.contract.min_rows))
    data = task.prepare(rows)
    assert data.x.dtype in (np.float32, np.int64)
    assert data.y.dtype in (np.float32, np.int64)
    with torch.inference_mode():
        outputs = initial_model(task, 0)(torch.from_numpy(data.x)).numpy()
    sums = task.metrics.count(outputs, data.y)
    task.metrics.validate(sums)
    assert task.metrics.summarise(sums)["examples"] == len(rows)


def test_a_transform_leaves_the_raw_rows_alone():
    for name in installed_tasks():
        task = load_task(name)
        rows = raw_rows(task, max(3, task.contract.min_rows))
        before = rows.x.copy()
        task.prepare(rows)
        np.testing.assert_array_equal(rows.x, before)


def test_heart_disease_imputes_from_constants():
    task = load_task("heart_disease")
    row = np.array([[55, 1, 4, 0, np.nan, 0, 2, 140, 0, 1, np.nan, 9, 7]] * 10, np.float32)
    x = task.prepare(Dataset(row, np.zeros(10, np.uint8))).x[0]
    names = list(task.contract.columns)
    missing = dict(zip(names, x[13:26], strict=True))
    assert {n for n, flag in missing.items() if flag} == {"trestbps", "chol", "slope", "ca"}
    assert all(x[names.index(n)] == 0 for n in ("trestbps", "chol", "slope", "ca"))
    assert x[26:].tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # cp, restecg, slope, thal
    alone = task.transform(Dataset(row[:1], np.zeros(1, np.uint8))).x[0]
    np.testing.assert_array_equal(x, alone)  # no other row has a say


def test_initial_model_depends_on_the_seed_only():
    task = load_task("digits")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = initial_model(task, 3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    two, other = initial_model(task, 3).state_dict(), initial_model(task, 4).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("model", "x", "shape"),
    [
        (CNN((3, 9, 10), 5, 6), torch.zeros(2, 3, 9, 10), (2, 5)),
        (CNN((1, 8, 8), 0), torch.zeros(2, 1, 8, 8), (2,)),
        (MLP(12, 4, (8, 8)), torch.zeros(2, 3, 4), (2, 4)),
        (MLP(3, 0, ()), torch.zeros(1, 3), (1,)),
        (Linear(3, 2), torch.zeros(2, 3), (2, 2)),
        (Linear(3, 0), torch.zeros(1, 3), (1,)),
        (GRU(7, vocabulary=7, every_step=True), torch.zeros(2, 5, dtype=torch.long), (2, 5, 7)),
        (GRU(0, inputs=3, layers=2), torch.zeros(2, 5, 3), (2,)),
        (LSTM(4, inputs=3), torch.zeros(2, 5, 3), (2, 4)),
        (LSTM(7, vocabulary=7, every_step=True), torch.zeros(1, 1, dtype=torch.long), (1, 1, 7)),
    ],
)
def test_output_shapes_and_state(model, x, shape):
    assert model(x).shape == shape
    assert not list(model.buffers())  # no running statistics
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_group_normalisation_does_not_depend_on_the_batch():
    model = CNN((1, 8, 8), 10).train()
    x = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(x)[:2], model(x[:2]))
    assert any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())


def test_impossible_models():
    with pytest.raises(ValueError, match="at least 4"):
        CNN((1, 3, 8), 10)
    with pytest.raises(ValueError, match="either"):
        GRU(3)


def test_digits_over_clients():
    fleet = federated_dataset("digits", None, PartitionSpec(kind="dirichlet", clients=8, alpha=1.0), 0)
    assert fleet.clients == tuple(map(str, range(8)))
    assert sum(len(fleet.train(c)) for c in fleet.clients) == 1437
    assert len(fleet.central_test()) == 360
    assert fleet.test_clients == ()
    with pytest.raises(NotFound, match="no client '8'"):
        fleet.train("8")
    with pytest.raises(ConfigError, match="no natural users"):
        federated_dataset("digits", None, PartitionSpec(kind="natural"), 0)


@pytest.mark.parametrize("name", FROM_FOLDER)
def test_missing_folders_and_files(name, tmp_path):
    spec = PartitionSpec(kind="iid", clients=2)
    with pytest.raises(DataError, match="from a folder, and none was given"):
        federated_dataset(name, None, spec, 0)
    with pytest.raises(DataError, match="There is no folder"):
        federated_dataset(name, tmp_path / "gone", spec, 0)
    with pytest.raises(DataError, match="There is no file"):
        federated_dataset(name, tmp_path, spec, 0)


def test_turbofan_windows(tmp_path):
    engines = np.repeat([1, 2], [40, 12])
    cycles = np.concatenate([np.arange(1, 41), np.arange(1, 13)])
    shuffle = np.random.default_rng(0).permutation(52)
    x = np.zeros((52, 24), np.float32)
    x[:, 4] = cycles
    left = np.where(engines == 1, 240 - cycles, 12 - cycles)
    arrays = {"x": x, "y": left, "client": engines, "cycle": cycles}
    parts = {f"{k}_{p}": v[shuffle] for k, v in arrays.items() for p in ("train", "test")}
    np.savez(tmp_path / "cmapss_fd001.npz", **parts)
    task = load_task("turbofan")
    corpus = task.data(tmp_path)
    assert corpus.train_users.tolist() == [1] * 11 + [2]
    assert corpus.test_users.tolist() == [1001, 1002]
    assert corpus.train.x[0, :, 4].tolist() == list(range(1, 31))
    assert corpus.train.y.tolist() == [*range(210, 199, -1), 0]
    assert corpus.train.x[11, :, 4].tolist() == [1] * 18 + list(range(1, 13))  # a short engine is padded
    np.testing.assert_array_equal(corpus.test.x[0], corpus.train.x[10])
    assert task.prepare(corpus.train).y.tolist() == [0.5] * 11 + [-0.5]  # capped at 125 cycles


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "clients", "test_clients", "central"),
    [
        ("mnist_by_writer", 539, 297, 10_000),
        ("beijing_air", 12, 12, 100_197),
        ("heart_disease", 4, 4, 307),
        ("shakespeare", 927, 927, 10_349),
        ("turbofan", 100, 100, 100),
    ],
)
def test_published_data_keep_their_contracts(folder, name, clients, test_clients, central):
    fleet = federated_dataset(name, folder, PartitionSpec(kind="natural"), 0)
    assert (len(fleet.clients), len(fleet.test_clients)) == (clients, test_clients)
    for client in fleet.clients[:20]:
        assert np.isfinite(fleet.train(client).x).all()
    fleet.task.check(fleet.corpus.train)
    fleet.task.check(fleet.corpus.test)
    assert sum(len(rows) for rows in fleet.test_rows.values()) == central
    assert sum(len(rows) for rows in fleet.train_rows.values()) == len(fleet.corpus.train)
    if name == "mnist_by_writer":
        assert not set(fleet.clients) & set(fleet.test_clients)  # unseen writers


@pytest.mark.data
def test_fashion_by_dirichlet(folder):
    fleet = federated_dataset(
        "fashion_mnist", folder, PartitionSpec(kind="dirichlet", clients=100, alpha=0.3), 0
    )
    assert sum(len(rows) for rows in fleet.train_rows.values()) == 60_000
    fleet.task.check(fleet.corpus.train)
