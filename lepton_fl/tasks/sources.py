"""Where a device's rows come from: an archive, a table, a folder of images, or a task's published data set.

    spec = DataSourceSpec(kind="csv", path="/var/lib/ward/patients.csv", target="disease")
    device = open_source(spec, task)     # device.train, device.held_out: checked and prepared

Files are read as data only: no pickle, no code. Whatever cannot be used is a ``DataError`` that names the
file, and the column or image; readable rows that break the task's contract are a ``DataContractError``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from lepton_fl.errors import ConfigError, DataError, TaskError
from lepton_fl.plan import Frozen
from lepton_fl.tasks.archive import array_names, read_arrays
from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.data import Array, Dataset
from lepton_fl.tasks.federated import read
from lepton_fl.tasks.partition import PartitionSpec, partition
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # no format that runs another program
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class DataSourceSpec(Frozen):
    """One device's data source, as its owner configures it."""

    kind: Literal["npz", "csv", "parquet", "images", "task"]
    path: Path | None = None  # file; folder for images and task ("task" reads the published data set)
    columns: tuple[str, ...] = ()  # csv, parquet: inputs in order; empty = those the task names
    target: str = ""  # csv, parquet: the target's column; empty = the one the task names
    split: Literal["train", "test"] = "train"  # npz, task: x_train or x_test
    client: int | None = None  # npz, task: only the rows of this user
    partition: PartitionSpec | None = None  # simulated fleets: split the rows, and take part `part`
    part: Annotated[int, Field(ge=0)] = 0
    partition_seed: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def parse(cls, fields: Mapping[str, object]) -> "DataSourceSpec":
        """From a configuration's table; ConfigError names what is wrong in it."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"The data source's {key!r} is wrong: {first['msg']}.",
                hint=f"Keys: {', '.join(cls.model_fields)}.",
            ) from error


@dataclass(frozen=True, eq=False)
class DeviceData:
    """One device's rows, checked and prepared."""

    train: Dataset
    held_out: Dataset  # may be empty


def open_source(spec: DataSourceSpec, task: Task, held_out: float = 0.2, seed: int = 0) -> DeviceData:
    """Read, check, split and prepare a device's rows.

    Args:
        spec: where they are.
        task: what they are for.
        held_out: expected share of the rows kept for evaluation only, see ``hold_out``.
        seed: of that split.

    Raises:
        DataError: the source cannot be read.
        DataContractError: the rows break the task's contract.
        ConfigError: the options contradict each other or the data.
    """
    raw = read_source(spec, task)
    task.check(raw)
    train, kept = hold_out(raw, held_out, seed)
    return DeviceData(task.transform(train), task.transform(kept))


def read_source(spec: DataSourceSpec, task: Task) -> Dataset:
    """The raw rows of a source, all of them, not yet checked against the contract."""
    if spec.kind == "task":
        corpus = read(task, spec.path.expanduser() if spec.path else None)
        data, users = (
            (corpus.train, corpus.train_users) if spec.split == "train" else (corpus.test, corpus.test_users)
        )
    else:
        data, users = _read_path(spec, task.contract)
    if spec.client is not None:
        data = _of_client(spec, data, users)
    if spec.partition is not None:
        data = _of_part(spec, spec.partition, data, users)
    return data


def _read_path(spec: DataSourceSpec, contract: DataContract) -> tuple[Dataset, Array | None]:
    if spec.path is None:
        raise ConfigError(f"A data source of kind {spec.kind!r} needs a path.")
    path = spec.path.expanduser()
    if spec.kind == "npz":
        return _read_npz(spec, path)
    if spec.kind == "images":
        return _read_images(path, contract), None
    return _read_table(spec, path, contract), None


def _of_client(spec: DataSourceSpec, data: Dataset, users: Array | None) -> Dataset:
    if users is None:
        raise ConfigError(
            f"client = {spec.client} was asked for, but the source does not say whose its rows are.",
            hint="Only archives with client_train or client, and tasks with natural users, can be filtered.",
        )
    rows = np.flatnonzero(users == spec.client)
    if len(rows) == 0:
        known = np.unique(users)
        raise DataError(
            f"The source has no rows of client {spec.client}.",
            hint=f"It has {len(known)} clients, from {known[0]} to {known[-1]}."
            if len(known)
            else "It is empty.",
        )
    return data.take(rows)


def _of_part(spec: DataSourceSpec, split: PartitionSpec, data: Dataset, users: Array | None) -> Dataset:
    if spec.client is not None:
        raise ConfigError("client and partition exclude each other.", hint="Remove one of them.")
    parts = partition(split, labels=data.y, users=users, seed=spec.partition_seed)
    if spec.part >= len(parts):
        raise ConfigError(f"part = {spec.part}, but the partition has parts 0 to {len(parts) - 1}.")
    return data.take(parts[spec.part])


def hold_out(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into training and held-out ones by a hash of their content.

    A row stays on its side when others are added or reordered, and copies of a row stay together, so
    nothing trained on is ever evaluated on. The share is therefore met on average only. At least one row is
    left for training.

    Args:
        data: the rows.
        fraction: expected share to hold out, 0 <= fraction < 1.
        seed: another seed gives another split.
    """
    key = seed.to_bytes(16, "big")
    limit = int(fraction * 2**64)
    out = np.fromiter(
        (_row_hash(key, x, y) < limit for x, y in zip(data.x, data.y, strict=True)), np.bool_, count=len(data)
    )
    if out.all() and len(data):
        out[0] = False
    return data.take(np.flatnonzero(~out)), data.take(np.flatnonzero(out))


def _row_hash(key: bytes, x: Array, y: Array) -> int:
    content = np.ascontiguousarray(x).tobytes() + np.asarray(y).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "big")


# --- archives ---------------------------------------------------------------------------------------


def _read_npz(spec: DataSourceSpec, path: Path) -> tuple[Dataset, Array | None]:
    """``x_train, y_train[, client_train]`` (or ``_test``), else ``x, y[, client]``."""
    present = array_names(path)
    suffix = f"_{spec.split}" if f"x_{spec.split}" in present else ""
    names = [f"x{suffix}", f"y{suffix}"]
    owner = f"client{suffix}"
    found = read_arrays(path, [*names, owner] if owner in present else names)
    try:
        data = Dataset(found[names[0]], found[names[1]])
    except DataError as error:
        raise DataError(f"{path}: {error}", hint=error.hint) from error
    users = found.get(owner)
    if users is not None and users.shape != (len(data),):
        raise DataError(
            f"{path}: {owner} has shape {users.shape}, one id for each of {len(data)} rows is expected."
        )
    return data, users


# --- tables -----------------------------------------------------------------------------------------


def _read_table(spec: DataSourceSpec, path: Path, contract: DataContract) -> Dataset:
    """Columns by name, with the types the contract declares; an empty field is NaN in a float column."""
    pa = _pyarrow(spec.kind)
    columns = spec.columns or contract.columns
    target = spec.target or contract.target
    if contract.shape != (len(columns),):
        raise ConfigError(
            f"{len(columns)} columns are named for {path}, one row of the task has shape {contract.shape}.",
            hint="List the inputs in `columns`, in the order the task expects."
            if len(contract.shape) == 1
            else "This task cannot be fed from a table.",
        )
    number = pa.float64() if contract.dtype == "float" else pa.int64()
    answer = pa.int64() if contract.num_classes else pa.float64()
    schema = {**dict.fromkeys(columns, number), target: answer}
    try:
        if not path.is_file():
            raise DataError(f"There is no file {path}.", hint="Check the path of the data source.")
        table = _read_csv(path, schema) if spec.kind == "csv" else _read_parquet(path, schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as {spec.kind}: {error}.", hint="The file may be truncated or damaged."
        ) from error
    arrays = {name: _column(path, table, name, contract) for name in schema}
    x = np.stack([arrays[name] for name in columns], axis=1)
    return Dataset(x, arrays[target])


def _pyarrow(kind: str) -> Any:  # noqa: ANN401 - pyarrow publishes no types
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError(
            f"Reading {kind} files needs pyarrow.", hint="Install it with 'lepton-fl[train]'."
        ) from error
    return pyarrow


def _missing_columns(path: Path, schema: dict[str, "pa.DataType"], present: list[str]) -> None:
    missing = [name for name in schema if name not in present]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}.",
            hint=f"It has {', '.join(map(repr, present))}.",
        )
    twice = [name for name in schema if present.count(name) > 1]
    if twice:
        raise DataError(f"{path} has more than one column {twice[0]!r}.", hint="Rename one of them.")


def _read_csv(path: Path, schema: dict[str, "pa.DataType"]) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv

    with csv.open_csv(path) as reader:
        present = reader.schema.names
    _missing_columns(path, schema, present)
    options = csv.ConvertOptions(column_types=schema, include_columns=list(schema), strings_can_be_null=True)
    try:
        return csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
        column = re.search(r"In CSV column #(\d+): (.*)", str(error))
        if column is None:
            raise
        raise DataError(
            f"{path}, column {present[int(column[1])]!r}: {column[2]}.",
            hint=f"The task needs {schema[present[int(column[1])]]} there.",
        ) from error


def _read_parquet(path: Path, schema: dict[str, "pa.DataType"]) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _missing_columns(path, schema, file.schema_arrow.names)
        table = file.read(columns=list(schema))
    converted = []
    for name, kind in schema.items():
        try:
            converted.append(table[name].cast(kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{path}, column {name!r} of type {table[name].type}: {error}.",
                hint=f"The task needs {kind} there.",
            ) from error
    return pa.table(dict(zip(schema, converted, strict=True)))


def _column(path: Path, table: "pa.Table", name: str, contract: DataContract) -> Array:
    column = table[name]
    whole = column.type == "int64"
    if column.null_count and whole:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise DataError(
            f"{path}, column {name!r}: the value of row {row} is missing ({column.null_count} in all).",
            hint="Remove such rows; only inputs declared as numbers with gaps may be empty.",
        )
    values: Array = column.to_numpy()  # null becomes NaN
    return values.astype(np.int64 if whole else np.float64, copy=False)


# --- images -----------------------------------------------------------------------------------------


def _read_images(folder: Path, contract: DataContract) -> Dataset:
    """``folder/<class>/*.png``: one sub-folder per class, named as in the contract or by number.

    Images are turned into the contract's mode and must have its size: shape (H, W) or (1, H, W) for grey,
    (H, W, 3) or (3, H, W) for colour.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", hint="Check the path of the data source.")
    if not contract.num_classes:
        raise ConfigError("A folder of images gives classes, this task predicts a number.")
    names = contract.class_names or tuple(map(str, range(contract.num_classes)))
    xs, ys = [], []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if sub.name not in names:
            raise DataError(
                f"{folder} has a sub-folder {sub.name!r}, which is no class of this task.",
                hint=f"Classes: {', '.join(names)}.",
            )
        for file in sorted(f for f in sub.iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES):
            xs.append(_read_image(file, contract.shape))
            ys.append(names.index(sub.name))
    if not xs:
        raise DataError(f"{folder} holds no images.", hint=f"Expected {folder}/<class>/*.png.")
    return Dataset(np.stack(xs), np.array(ys, np.int64))


def _read_image(file: Path, shape: tuple[int, ...]) -> Array:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise TaskError("Reading images needs pillow.", hint="Install it with 'lepton-fl[train]'.") from error
    channels_first = len(shape) == 3 and shape[0] in (1, 3)
    height, width = shape[1:] if channels_first else shape[:2]
    try:
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            if image.size != (width, height):  # known before the pixels are decoded
                raise DataError(
                    f"{file} has {image.size[0]}x{image.size[1]} pixels, the task needs {width}x{height}.",
                    hint="Resize the images of this device.",
                )
            pixels = np.asarray(
                image.convert("RGB" if 3 in (shape[0], shape[-1]) and len(shape) == 3 else "L")
            )
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file} cannot be read as an image: {error}.", hint="The file is truncated or damaged."
        ) from error
    if channels_first and pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    return pixels.reshape(shape)
