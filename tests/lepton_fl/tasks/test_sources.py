"""Device data: read as declared, split stably, and every broken file named."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from lepton_fl.errors import ConfigError, DataContractError, DataError
from lepton_fl.tasks import Classification, DataContract, Dataset, Regression, Task, load_task
from lepton_fl.tasks.partition import PartitionSpec
from lepton_fl.tasks.sources import DataSourceSpec, hold_out, open_source, read_source

TABLE = Task(
    name="table",
    version="1",
    model=lambda: None,
    contract=DataContract((2,), columns=("age", "dose"), missing="allow", num_classes=2, target="ill"),
    loss="cross_entropy",
    metrics=Classification(2),
)
NUMBER = replace(TABLE, contract=DataContract((1,), columns=("age",), target="dose"), metrics=Regression())
GREY = replace(TABLE, contract=DataContract((2, 3), "uint8", num_classes=2, class_names=("cat", "dog")))
COLOUR = replace(TABLE, contract=DataContract((3, 2, 3), "uint8", num_classes=2))


def write(path, text):
    path.write_text(text)
    return path


# --- tables


def csv(path, **options):
    return DataSourceSpec(kind="csv", path=path, **options)


def test_csv_by_declared_columns_in_any_order(tmp_path):
    path = write(tmp_path / "a.csv", "ill,note,dose,age\n1,x,0.5,70\n0,y,,30\n")
    data = read_source(csv(path), TABLE)
    np.testing.assert_array_equal(data.x, [[70, 0.5], [30, np.nan]])
    assert data.y.tolist() == [1, 0]
    assert read_source(csv(path, target="age", columns=("dose",)), NUMBER).y.tolist() == [70, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,ill\n1,1\n", r"a.csv has no column 'dose'"),
        ("age,dose,dose,ill\n1,1,1,1\n", "more than one column 'dose'"),
        ("age,dose,ill\n1,2,1\nold,2,1\n", "a.csv, column 'age': .*'old'"),
        ("age,dose,ill\n1,2,1.5\n", "a.csv, column 'ill': .*'1.5'"),
        ("age,dose,ill\n1,2,1\n1,2,\n", "a.csv, column 'ill': the value of row 1 is missing"),
        ("age,dose,ill\n1,2\n", "a.csv cannot be read as csv"),
        ("", "a.csv cannot be read as csv"),
        ("\x00\x01\x02", "a.csv"),
    ],
)
def test_broken_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_source(csv(write(tmp_path / "a.csv", text)), TABLE)


def test_csv_with_only_a_header_breaks_the_contract(tmp_path):
    path = write(tmp_path / "a.csv", "age,dose,ill\n")
    with pytest.raises(DataContractError, match="0 rows"):
        open_source(csv(path), TABLE)


def test_a_number_beyond_float32_breaks_the_contract(tmp_path):
    path = write(tmp_path / "a.csv", "age,dose,ill\n1e300,1,0\n")
    with pytest.raises(DataContractError, match="column 'age'"):
        open_source(csv(path), TABLE)


def parquet(path, **columns):
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table(columns), path)
    return DataSourceSpec(kind="parquet", path=path)


def test_parquet(tmp_path):
    spec = parquet(tmp_path / "a.parquet", ill=[1, 0], dose=[0.5, None], age=[70, 30], note=["x", "y"])
    data = read_source(spec, TABLE)
    np.testing.assert_array_equal(data.x, [[70, 0.5], [30, np.nan]])
    assert data.y.dtype == np.int64


def test_broken_parquet(tmp_path):
    spec = parquet(tmp_path / "a.parquet", ill=[1, 0], age=[70, 30])
    with pytest.raises(DataError, match="no column 'dose'"):
        read_source(spec, TABLE)
    spec = parquet(tmp_path / "a.parquet", ill=[1], dose=["much"], age=[1])
    with pytest.raises(DataError, match=r"a.parquet, column 'dose' of type string"):
        read_source(spec, TABLE)
    spec = parquet(tmp_path / "a.parquet", ill=[0.5], dose=[1], age=[1])
    with pytest.raises(DataError, match="column 'ill' of type double"):
        read_source(spec, TABLE)
    whole = (tmp_path / "a.parquet").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.parquet").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a.parquet cannot be read"):
            read_source(spec, TABLE)


def test_columns_must_fit_the_task(tmp_path):
    path = write(tmp_path / "a.csv", "age,dose,ill\n1,2,1\n")
    with pytest.raises(ConfigError, match="1 columns are named"):
        read_source(csv(path, columns=("age",)), TABLE)
    with pytest.raises(ConfigError, match="columns are named"):
        read_source(csv(path), GREY)


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet", "images"])
def test_missing_paths(tmp_path, kind):
    with pytest.raises(DataError, match=r"There is no (file|folder) .*gone"):
        read_source(DataSourceSpec(kind=kind, path=tmp_path / "gone"), GREY if kind == "images" else TABLE)
    with pytest.raises(ConfigError, match="needs a path"):
        read_source(DataSourceSpec(kind=kind), TABLE)


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_a_folder_is_no_file(tmp_path, kind):
    with pytest.raises(DataError, match=str(tmp_path)):
        read_source(DataSourceSpec(kind=kind, path=tmp_path), TABLE)


# --- archives


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return partial(DataSourceSpec, kind="npz", path=path)


ROWS = {"x_train": np.arange(12.0).reshape(6, 2), "y_train": np.array([0, 1] * 3)}


def test_npz_users_and_splits(tmp_path):
    users = np.array([3, 3, 5, 5, 5, 9])
    spec = npz(tmp_path / "a.npz", **ROWS, client_train=users, x_test=np.ones((1, 2)), y_test=np.array([1]))
    assert len(read_source(spec(), TABLE)) == 6
    assert read_source(spec(client=5), TABLE).x[:, 0].tolist() == [4, 6, 8]
    assert len(read_source(spec(split="test"), TABLE)) == 1
    with pytest.raises(DataError, match="no rows of client 4"):
        read_source(spec(client=4), TABLE)
    with pytest.raises(ConfigError, match="does not say whose"):
        read_source(spec(split="test", client=3), TABLE)
    natural = PartitionSpec(kind="natural")
    assert read_source(spec(partition=natural, part=1), TABLE).x[:, 0].tolist() == [4, 6, 8]
    with pytest.raises(ConfigError, match="exclude each other"):
        read_source(spec(partition=natural, client=3), TABLE)
    with pytest.raises(ConfigError, match="parts 0 to 2"):
        read_source(spec(partition=natural, part=3), TABLE)


def test_parts_cover_everything_once(tmp_path):
    spec = npz(tmp_path / "a.npz", x=ROWS["x_train"], y=ROWS["y_train"])
    split = PartitionSpec(kind="iid", clients=3)
    parts = [read_source(spec(partition=split, part=i), TABLE).x[:, 0] for i in range(3)]
    assert sorted(np.concatenate(parts)) == [0, 2, 4, 6, 8, 10]


def test_broken_npz(tmp_path):
    path = tmp_path / "a.npz"
    spec = npz(path, **ROWS)()
    whole = path.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a.npz cannot be read"):
            read_source(spec, TABLE)
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a.npz"):
        read_source(spec, TABLE)
    npz(path, x=ROWS["x_train"])
    with pytest.raises(DataError, match="no array 'y'; it has x"):
        read_source(spec, TABLE)
    npz(path, x=ROWS["x_train"], y=np.zeros(5))
    with pytest.raises(DataError, match="differ in length"):
        read_source(spec, TABLE)
    npz(path, **ROWS, client_train=np.zeros(4))
    with pytest.raises(DataError, match="client_train has shape"):
        read_source(spec, TABLE)


def test_pickled_objects_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([Bomb()], dtype=object), y=np.zeros(1))
    with pytest.raises(DataError, match="cannot be read"):
        read_source(DataSourceSpec(kind="npz", path=path), TABLE)


# --- images


def save_image(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def images(path):
    return DataSourceSpec(kind="images", path=path)


def test_grey_images_by_class_name(tmp_path):
    grey = np.arange(6).reshape(2, 3)
    save_image(tmp_path / "dog" / "b.png", grey)
    save_image(tmp_path / "dog" / "a.png", grey * 2)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = read_source(images(tmp_path), GREY)
    assert data.y.tolist() == [1, 1]  # a device without cats still counts dogs as class 1
    np.testing.assert_array_equal(data.x, [grey * 2, grey])


def test_colour_images_channels_first(tmp_path):
    rgb = np.arange(18).reshape(2, 3, 3)
    save_image(tmp_path / "0" / "a.png", rgb)
    data = read_source(images(tmp_path), COLOUR)
    np.testing.assert_array_equal(data.x[0], rgb.transpose(2, 0, 1))
    COLOUR.check(data)


def test_broken_images(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        read_source(images(tmp_path), GREY)
    save_image(tmp_path / "cat" / "a.png", np.zeros((3, 3)))
    with pytest.raises(DataError, match=r"a.png has 3x3 pixels, the task needs 3x2"):
        read_source(images(tmp_path), GREY)
    save_image(tmp_path / "cat" / "a.png", np.random.default_rng(0).integers(0, 255, (2, 3)))
    whole = (tmp_path / "cat" / "a.png").read_bytes()
    for cut in (0, 20, len(whole) // 2):
        (tmp_path / "cat" / "a.png").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a.png cannot be read as an image"):
            read_source(images(tmp_path), GREY)
    save_image(tmp_path / "bird" / "a.png", np.zeros((2, 3)))
    with pytest.raises(DataError, match="sub-folder 'bird', which is no class"):
        read_source(images(tmp_path), GREY)
    with pytest.raises(ConfigError, match="predicts a number"):
        read_source(images(tmp_path), NUMBER)


# --- a task's own data, options, held-out rows


def test_digits_over_simulated_devices():
    task = load_task("digits")
    spec = {"kind": "task", "partition": {"kind": "iid", "clients": 5}, "part": 4}
    device = open_source(DataSourceSpec.parse(spec), task)
    assert len(device.train) + len(device.held_out) == 287
    assert device.train.x.shape[1:] == (1, 8, 8)
    with pytest.raises(DataError, match="comes without a data set"):
        open_source(DataSourceSpec(kind="task"), TABLE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kind": "xls"}, "'kind'"), ({"kind": "csv", "pth": "a"}, "'pth'"), ({}, "'kind'")],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataSourceSpec.parse(fields)


def rows_of(data):
    return {x.tobytes() for x in data.x}


def test_held_out_rows_stay_held_out():
    x = np.random.default_rng(0).normal(size=(2000, 3))
    data = Dataset(x, np.arange(2000))
    train, kept = hold_out(data, 0.2, 7)
    assert len(train) + len(kept) == 2000
    assert 320 < len(kept) < 480
    shuffled = data.take(np.random.default_rng(1).permutation(2000)[:1500])
    assert rows_of(hold_out(shuffled, 0.2, 7)[1]) <= rows_of(kept)
    assert rows_of(hold_out(data, 0.2, 8)[1]) != rows_of(kept)


def test_copies_of_a_row_stay_together():
    data = Dataset(np.repeat(np.arange(50.0), 4)[:, None], np.zeros(200))
    train, kept = hold_out(data, 0.5, 0)
    assert not rows_of(train) & rows_of(kept)


def test_something_is_left_to_train_on():
    data = Dataset(np.zeros((5, 1)), np.zeros(5))
    for seed in range(20):
        assert len(hold_out(data, 0.9, seed)[0]) >= 1
    assert len(hold_out(data, 0.0, 0)[1]) == 0
