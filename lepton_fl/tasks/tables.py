"""Ready tasks on tables: ``beijing_air`` (regression) and ``heart_disease`` (missing values).

Columns are scaled by constants written here, never by statistics of the data: a row then means the same on
every device, and no device learns anything of another's data.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lepton_fl.plan import LocalPlan
from lepton_fl.tasks.archive import read_corpus
from lepton_fl.tasks.contract import DataContract
from lepton_fl.tasks.data import Array, Dataset
from lepton_fl.tasks.metrics import Classification, Regression
from lepton_fl.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

# --- beijing_air: PM2.5 six hours ahead, 12 stations -------------------------------------------------

_PM = (80.0, 80.0)  # centre and spread, ug/m3: a polluted city's
_CYCLIC = (0.0, 0.7)  # sine and cosine of an angle

# name: centre, spread, lowest and highest plausible value.
_AIR = {
    "PM2.5": (*_PM, 0, 2000),  # ug/m3
    "PM10": (100.0, 90.0, 0, 3000),
    "SO2": (20.0, 25.0, 0, 3000),
    "NO2": (50.0, 35.0, 0, 1000),
    "CO": (12.0, 12.0, 0, 500),  # 100 ug/m3
    "O3": (60.0, 60.0, 0, 1500),
    "TEMP": (13.0, 12.0, -50, 60),  # degrees Celsius
    "PRES": (10.0, 10.0, -150, 100),  # hPa above 1000
    "DEWP": (2.0, 14.0, -60, 50),
    "RAIN": (0.0, 1.0, 0, 300),  # mm
    "WSPM": (1.7, 1.3, 0, 100),  # m/s
    **dict.fromkeys(("wd_sin", "wd_cos", "hour_sin", "hour_cos", "doy_sin", "doy_cos"), (*_CYCLIC, -1, 1)),
    **{f"PM2.5_lag{hours}": (*_PM, 0, 2000) for hours in (1, 3, 6, 12, 24)},
}
_AIR_TABLE = np.array(list(_AIR.values()), np.float32)  # (22, 4)


def _air(data: Dataset) -> Dataset:
    x = (data.x.astype(np.float32) - _AIR_TABLE[:, 0]) / _AIR_TABLE[:, 1]
    return Dataset(x, (data.y.astype(np.float32) - _PM[0]) / _PM[1])


def _air_model() -> "nn.Module":
    from lepton_fl.tasks.models import MLP

    return MLP(len(_AIR), 0, (64, 32))


beijing_air = Task(
    name="beijing_air",
    version="1",
    model=_air_model,
    contract=DataContract(
        (len(_AIR),),
        low=tuple(float(v[2]) for v in _AIR.values()),
        high=tuple(float(v[3]) for v in _AIR.values()),
        columns=tuple(_AIR),
        target="PM2.5 in 6 h",
        target_low=0,
        target_high=2000,
        min_rows=24,
    ),
    loss="squared_error",
    metrics=Regression(scale=_PM[1], offset=_PM[0]),
    transform=_air,
    data=partial(read_corpus, file="beijing_air.npz", users=True),
    local=LocalPlan(learning_rate=0.05, batch_size=64),
)

# --- heart_disease: four hospitals -------------------------------------------------------------------

# Numbers: typical value and spread of an adult cardiology patient, lowest and highest plausible value.
_VITALS = {
    "age": (55.0, 10.0, 0, 120),  # years
    "sex": (0.5, 0.5, 0, 1),
    "cp": (3.0, 1.0, 1, 4),  # chest pain type
    "trestbps": (130.0, 18.0, 0, 300),  # mm Hg at rest; 0 = not measured
    "chol": (240.0, 50.0, 0, 1000),  # mg/dl; 0 = not measured
    "fbs": (0.15, 0.4, 0, 1),
    "restecg": (0.6, 0.8, 0, 2),
    "thalach": (140.0, 25.0, 0, 250),  # beats per minute
    "exang": (0.4, 0.5, 0, 1),
    "oldpeak": (0.9, 1.1, -10, 10),  # mm
    "slope": (1.8, 0.6, 1, 3),
    "ca": (0.7, 0.9, 0, 9),  # vessels coloured, 0 to 3; 9 = not measured
    "thal": (5.0, 1.9, 3, 7),
}
_VITALS_TABLE = np.array(list(_VITALS.values()), np.float32)  # (13, 4)
_NOT_MEASURED = {"trestbps": 0, "chol": 0, "ca": 9}  # codes that stand for a missing value
_CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "slope": (1, 2, 3), "thal": (3, 6, 7)}


def _heart(data: Dataset) -> Dataset:
    """Impute and scale; append one missing indicator per column, and one indicator per category.

    A missing number becomes the constant typical value, which scales to 0. A missing category has no
    indicator set. (N, 13) -> (N, 39).
    """
    x = data.x.astype(np.float32)
    for name, code in _NOT_MEASURED.items():
        column = x[:, list(_VITALS).index(name)]  # a view
        column[column == code] = np.nan
    scaled = (x - _VITALS_TABLE[:, 0]) / _VITALS_TABLE[:, 1]
    parts: list[Array] = [np.nan_to_num(scaled, nan=0.0), np.isnan(x)]
    for name, values in _CATEGORIES.items():
        parts.append(x[:, [list(_VITALS).index(name)]] == np.array(values, np.float32))
    return Dataset(np.concatenate(parts, axis=1, dtype=np.float32), data.y.astype(np.int64))


def _heart_model() -> "nn.Module":
    from lepton_fl.tasks.models import Linear

    return Linear(2 * len(_VITALS) + sum(map(len, _CATEGORIES.values())), 2)


heart_disease = Task(
    name="heart_disease",
    version="1",
    model=_heart_model,
    contract=DataContract(
        (len(_VITALS),),
        low=tuple(float(v[2]) for v in _VITALS.values()),
        high=tuple(float(v[3]) for v in _VITALS.values()),
        columns=tuple(_VITALS),
        missing="allow",
        num_classes=2,
        class_names=("healthy", "disease"),
        target="disease",
        min_rows=10,
    ),
    loss="cross_entropy",
    metrics=Classification(2),
    transform=_heart,
    data=partial(read_corpus, file="heart_disease.npz", users=True),
    local=LocalPlan(learning_rate=0.05, batch_size=16),
)
