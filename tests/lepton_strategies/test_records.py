"""Records through Flower's RecordDict: exact round trips, and what a decoder refuses."""

import numpy as np
import pytest

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.wire.records import Records
from lepton_strategies.records import from_record_dict, to_record_dict

ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.array(7, dtype=np.int64),
    np.zeros((0, 5), dtype=np.int32),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.arange(10, dtype=np.int16)[::2],
    np.array([True, False]),
    np.array([1.5, np.nan, np.inf], dtype=">f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}-{a.shape}")
def test_an_array_comes_back_bit_for_bit_and_read_only(array):
    back = from_record_dict(to_record_dict(Records({"a": array}))).arrays["a"]
    assert back.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(back, array)
    assert back.shape == array.shape
    assert back.size == 0 or not back.flags.writeable


def test_numpy_reads_what_we_write_and_we_read_what_flower_writes():
    from flwr.app import Array, ArrayRecord, RecordDict

    array = np.arange(5, dtype=np.int32)
    np.testing.assert_array_equal(to_record_dict(Records({"a": array}))["arrays"]["a"].numpy(), array)
    stock = RecordDict({"arrays": ArrayRecord({"a": Array(array)})})
    np.testing.assert_array_equal(from_record_dict(stock).arrays["a"], array)


def test_settings_and_numbers_keep_their_types_and_the_salt_is_dropped():
    config = {"b": True, "i": 2**40, "f": 0.5, "s": "ü", "y": b"\0\xff", "l": ["a", "b"], "e": []}
    metrics = {"loss": float("nan"), "n": 3, "counts": [1, 2, 3]}
    back = from_record_dict(to_record_dict(Records({}, config, metrics), salt=b"x" * 16))
    assert back.config == config
    assert {k: type(v) for k, v in back.config.items()} == {k: type(v) for k, v in config.items()}
    assert np.isnan(back.metrics["loss"])
    assert back.metrics["counts"] == [1, 2, 3]
    assert not back.arrays


def test_encoding_refuses_objects_and_text():
    for array in (np.array([object()]), np.array(["a"])):
        with pytest.raises(TypeError, match="expected booleans, integers or floats"):
            to_record_dict(Records({"a": array}))


def test_encoding_refuses_values_without_a_wire_type():
    with pytest.raises(TypeError):
        to_record_dict(Records({}, {"x": {"nested": 1}}))


def _tampered(**changes):
    from flwr.app import Array, ArrayRecord, RecordDict

    good = to_record_dict(Records({"a": np.arange(4, dtype=np.float32)}))["arrays"]["a"]
    fields = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data} | changes
    return RecordDict({"arrays": ArrayRecord({"a": Array(**fields)})})


def _npy(array):
    return _tampered(data=to_record_dict(Records({"a": array}))["arrays"]["a"].data)


def _huge():
    """A header that claims 2**40 numbers over 16 bytes of data."""
    good = to_record_dict(Records({"a": np.arange(4, dtype=np.float32)}))["arrays"]["a"]
    claim = good.data.replace(b"(4,), }             ", b"(1099511627776,), } ")
    assert claim != good.data
    return _tampered(data=claim, shape=(2**40,))


def _pickled():
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return _tampered(data=buffer.getvalue(), dtype="object", shape=(1,))


@pytest.mark.parametrize(
    "content",
    [
        lambda: _tampered(dtype="float64"),
        lambda: _tampered(shape=(2, 2)),
        lambda: _tampered(stype="pickle"),
        lambda: _tampered(data=b""),
        lambda: _tampered(data=b"\x93NUMPY\x01\x00"),
        lambda: _tampered(data=_tampered()["arrays"]["a"].data[:-1]),
        lambda: _tampered(data=_tampered()["arrays"]["a"].data + b"\0"),
        lambda: _npy(np.arange(4, dtype=np.int32)),
        _huge,
        _pickled,
    ],
)
def test_an_array_that_is_not_what_it_claims_is_refused(content):
    with pytest.raises(UpdateRejected) as refused:
        from_record_dict(content())
    assert refused.value.reason is Rejection.MALFORMED


def test_unknown_families_are_refused():
    from flwr.app import ConfigRecord, RecordDict

    for name in ("extra", "arrays"):
        with pytest.raises(UpdateRejected, match="not expected"):
            from_record_dict(RecordDict({name: ConfigRecord({"a": 1})}))
