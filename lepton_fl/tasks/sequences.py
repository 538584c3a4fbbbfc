"""Ready tasks on sequences: ``shakespeare`` (next character) and ``turbofan`` (remaining useful life)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.archive import data_file, read_arrays, read_corpus
from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.data import Array, Corpus, Dataset
from lepton_fl.tasks.metrics import NextToken, Regression
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

# --- shakespeare: 927 speaking roles, the next character at each of 80 positions -----------------------

_VOCABULARY = 76
_WINDOW = 80


def _tokens(data: Dataset) -> Dataset:
    return Dataset(data.x.astype(np.int64), data.y.astype(np.int64))


def _next_character() -> "nn.Module":
    from lepton_fl.tasks.models import GRU

    return GRU(_VOCABULARY, vocabulary=_VOCABULARY, embedding=32, hidden=128, every_step=True)


shakespeare = Task(
    name="shakespeare",
    version="1",
    model=_next_character,
    contract=DataContract(
        (_WINDOW,),
        "int",
        low=0,
        high=_VOCABULARY - 1,
        num_classes=_VOCABULARY,
        target="next character",
        target_shape=(_WINDOW,),
    ),
    loss="cross_entropy",
    metrics=NextToken(),
    transform=_tokens,
    data=partial(read_corpus, file="shakespeare_roles.npz", users=True),
    local=LocalPlan(learning_rate=1.0, batch_size=8, clip_grad_norm=5.0),
)

# --- turbofan: C-MAPSS FD001, remaining useful life (RUL) from the last 30 cycles ----------------------

_CYCLES = 30  # per window
_CAP = 125.0  # cycles; a healthy engine's RUL cannot be told, so it counts as this (Heimes 2008)

# Columns that vary in FD001, by number (0..2 settings, 3..23 sensors 1..21): nominal value and spread of an
# engine at sea level. The other columns are constant there and are left out.
_SENSORS = {
    4: (642.7, 0.5), 5: (1590.0, 6.0), 6: (1409.0, 9.0), 9: (553.0, 0.9), 10: (2388.1, 0.07),
    11: (9065.0, 22.0), 13: (47.5, 0.27), 14: (521.4, 0.74), 15: (2388.1, 0.07), 16: (8144.0, 19.0),
    17: (8.44, 0.038), 19: (393.0, 1.5), 22: (38.8, 0.18), 23: (23.3, 0.11),
}  # fmt: skip


_TURBOFAN_FILE = "cmapss_fd001.npz"


def _turbofan(folder: Path | None) -> Corpus:
    """Every window of the 100 training engines; of 100 other engines, the last window only (as scored)."""
    path = data_file(folder, _TURBOFAN_FILE)
    train, train_engines = _windows(path, "train", last_only=False)
    test, test_engines = _windows(path, "test", last_only=True)
    # A test engine is another one than the training engine of the same number: count them from 1001.
    return Corpus(train, test, train_engines, test_engines + 1000)


def _windows(path: Path, part: str, *, last_only: bool) -> tuple[Dataset, Array]:
    """Windows of consecutive cycles of one engine each, with the RUL at their last cycle; and the engines."""
    names = [f"{name}_{part}" for name in ("x", "y", "client", "cycle")]
    arrays = read_arrays(path, names)
    x, y, engines, cycles = (arrays[name] for name in names)
    windows, ends, owners = [], [], []
    for engine in np.unique(engines):
        rows = np.flatnonzero(engines == engine)
        rows = rows[np.argsort(cycles[rows])]
        short = max(0, _CYCLES - len(rows))
        padded = np.concatenate([np.repeat(rows[:1], short), rows])  # the first cycle again, in front
        first = len(padded) - _CYCLES if last_only else 0
        windows.append(x[sliding_window_view(padded[first:], _CYCLES)])  # (n, 30, 24)
        ends.append(y[padded[first + _CYCLES - 1 :]])
        owners.append(np.full(len(ends[-1]), engine, np.int64))
    return Dataset(np.concatenate(windows), np.concatenate(ends)), np.concatenate(owners)


def _scale_sensors(data: Dataset) -> Dataset:
    """(N, 30, 24) -> (N, 30, 14) around 0; RUL capped and divided by the cap, in -0.5..0.5."""
    table = np.array(list(_SENSORS.values()), np.float32)
    x = (data.x[:, :, list(_SENSORS)].astype(np.float32) - table[:, 0]) / table[:, 1]
    return Dataset(x, np.minimum(data.y, _CAP).astype(np.float32) / np.float32(_CAP) - np.float32(0.5))


def _rul_model() -> "nn.Module":
    from lepton_fl.tasks.models import GRU

    return GRU(0, inputs=len(_SENSORS), hidden=48)


turbofan = Task(
    name="turbofan",
    version="1",
    model=_rul_model,
    contract=DataContract(
        (_CYCLES, 24), low=-1e3, high=2e4, target="remaining cycles", target_low=0, target_high=1e5
    ),
    loss="squared_error",
    metrics=Regression(scale=_CAP, offset=_CAP / 2),
    transform=_scale_sensors,
    data=_turbofan,
)
