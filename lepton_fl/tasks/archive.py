"""Reading ``.npz`` archives: no pickle, and every failure named."""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lepton_fl.errors import DataError
from lepton_fl.tasks.data import Array, Corpus, Dataset


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """These arrays of an archive.

    Raises:
        DataError: the file is missing, truncated or no archive, or an array is absent, damaged or pickled.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds one bare array, an .npz archive with x and y is expected.")
            for name in names:
                if name not in archive.files:
                    raise DataError(
                        f"{path} has no array {name!r}; it has {', '.join(archive.files) or 'none'}.",
                        hint="Save it with numpy.savez_compressed(path, x=..., y=...).",
                    )
            return {name: archive[name] for name in names}
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.", hint="Check the path of the data source.") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as an .npz archive: {error}.",
            hint="The file is truncated, damaged or holds pickled objects; copy or save it again.",
        ) from error


def array_names(path: Path) -> tuple[str, ...]:
    """The names of the arrays of an archive; DataError as ``read_arrays``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.", hint="Check the path of the data source.") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as an .npz archive: {error}.",
            hint="The file is truncated or not an archive; copy or save it again.",
        ) from error


def data_file(folder: Path | None, file: str) -> Path:
    """The path of a published data set; DataError where no folder was given or there is none."""
    if folder is None:
        raise DataError(
            f"This task reads {file} from a folder, and none was given.",
            hint="Name the folder with --data or LEPTON_DATA.",
        )
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", hint=f"It should hold {file}.")
    return folder / file


def read_corpus(folder: Path | None, file: str, *, users: bool) -> Corpus:
    """A published data set: ``x_train``, ``y_train``, ``x_test``, ``y_test``, and ``client_*`` if ``users``.

    Raises:
        DataError: no folder was given, or the file in it cannot be used.
    """
    path = data_file(folder, file)
    names = ["x_train", "y_train", "x_test", "y_test"]
    owners = ["client_train", "client_test"] if users else []
    found = read_arrays(path, names + owners)
    train, test = (Dataset(found[f"x_{part}"], found[f"y_{part}"]) for part in ("train", "test"))
    if not users:
        return Corpus(train, test)
    for part, data in (("train", train), ("test", test)):
        if found[f"client_{part}"].shape != (len(data),):
            raise DataError(
                f"client_{part} in {path} has shape {found[f'client_{part}'].shape}, "
                f"one id for each of the {len(data)} rows is expected."
            )
    return Corpus(train, test, found["client_train"], found["client_test"])
