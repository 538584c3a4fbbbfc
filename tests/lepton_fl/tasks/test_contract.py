"""The data contract: each offence is refused, and the message says where and what."""

import numpy as np
import pytest

from lepton_fl.errors import DataContractError, DataError
from lepton_fl.tasks import DataContract, Dataset, check

TABLE = DataContract((2,), low=(0, -10), high=(5, 10), columns=("a", "b"), num_classes=3, min_rows=2)


def table(x, y=(0, 1, 2)):
    return Dataset(np.array(x, np.float32), np.array(y))


GOOD = [[0, -10], [5, 10], [1, 1]]


def test_report():
    report = check(TABLE, table(GOOD))
    assert (report.rows, report.missing, report.low, report.high) == (3, 0, -10, 10)
    assert report.class_counts == (1, 1, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table([[0, 0]], [0]), "have 1 rows, the task needs at least 2"),
        (Dataset(np.zeros((0, 2)), np.zeros(0, int)), "have 0 rows"),
        (table([[0], [1], [2]]), r"shape \(1,\), the task expects \(2,\)"),
        (table([[0, 0], [6, 0], [0, 0]]), "row 1, column 'a' is 6; the task allows 0 to 5"),
        (table([[0, 0], [0, 0], [0, -11]]), "row 2, column 'b' is -11; the task allows -10 to 10"),
        (table([[0, 7], [7, 0], [0, 0]]), "row 1, column 'a' is 7"),
        (table([[0, np.nan], [0, 0], [0, 0]]), "row 0, column 'b' is nan; the task takes no missing"),
        (table([[0, 0], [np.inf, 0], [0, 0]]), "row 1, column 'a' is inf"),
        (table(GOOD, [0, 1, 3]), "row 2 is 3, the task has classes 0 to 2"),
        (table(GOOD, [0, -1, 0]), "row 1 is -1"),
        (table(GOOD, [0.0, 1.0, 2.0]), "type float64, the task expects int"),
        (table(GOOD, [[0], [1], [2]]), r"One row of target has shape \(1,\)"),
        (Dataset(np.array([["a", "b"]] * 3), np.arange(3)), "the task expects float"),
        (Dataset(np.array([[1j, 0]] * 3), np.arange(3)), "complex128"),
    ],
)
def test_offences(data, message):
    with pytest.raises(DataContractError, match=message) as caught:
        check(TABLE, data)
    assert caught.value.hint or "missing" in str(caught.value)


def test_missing_values_where_allowed():
    contract = DataContract((2,), low=0, missing="allow", num_classes=3)
    assert check(contract, table([[np.nan, 1], [2, np.nan], [3, 4]])).missing == 2
    with pytest.raises(DataContractError, match="Every value of x is missing"):
        check(contract, table(np.full((3, 2), np.nan)))
    with pytest.raises(DataContractError, match="is -inf"):
        check(contract, table([[np.nan, 1], [-np.inf, 0], [3, 4]]))
    with pytest.raises(DataContractError, match="is -1"):
        check(contract, table([[np.nan, 1], [-1, 0], [3, 4]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 101.0])
def test_regression_targets(bad):
    contract = DataContract((1,), target_low=0, target_high=100, target="ppm")
    data = Dataset(np.zeros((2, 1)), np.array([1.0, bad]))
    with pytest.raises(DataContractError, match=r"'ppm' of row 1 is .*allows 0 to 100"):
        check(contract, data)


def test_values_beyond_float32_are_refused_by_default():
    with pytest.raises(DataContractError, match="is 1e"):
        check(DataContract((1,)), Dataset(np.array([[1e300]]), np.zeros(1)))


def test_images_must_be_uint8():
    contract = DataContract((2, 2), "uint8", num_classes=2)
    good = Dataset(np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.uint8))
    assert check(contract, good).rows == 1
    with pytest.raises(DataContractError, match="uint16, the task expects uint8"):
        check(contract, Dataset(good.x.astype(np.uint16), good.y))


def test_positions_of_images():
    contract = DataContract((2, 2), high=1, num_classes=2)
    x = np.zeros((3, 2, 2))
    x[1, 0, 1] = 9
    with pytest.raises(DataContractError, match=r"row 1, position \(0, 1\) is 9"):
        check(contract, Dataset(x, np.zeros(3, int)))


def test_rows_must_match():
    with pytest.raises(DataError, match="differ in length"):
        Dataset(np.zeros((3, 2)), np.zeros(2))


@pytest.mark.parametrize(
    "options",
    [
        {"low": (0.0,)},
        {"columns": ("a",)},
        {"class_names": ("x",)},
        {"missing": "allow", "dtype": "int"},
        {"min_rows": 0},
    ],
)
def test_a_contract_that_contradicts_itself(options):
    with pytest.raises(ValueError, match=r".+"):
        DataContract((2,), **options)
