"""Neutral records to and from Flower's ``RecordDict``, by Flower's public API only.

Arrays travel in NumPy's own file format, as Flower's ``Array`` does it, without pickle. Encoding makes one
copy, decoding none: a decoded array is a read-only view of the received bytes. A decoder refuses what it
does not recognise and allocates nothing that a sender's header merely claims.

    content = to_record_dict(records, salt=secrets.token_bytes(16))
    records = from_record_dict(content)      # raises UpdateRejected(MALFORMED)
"""

from collections.abc import Mapping
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, UpdateRejected
from lepton_fl.wire.records import Records

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, RecordDict

ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
SALT: Final = "salt"  # bytes that make one reply differ from every other; no meaning, dropped on decoding

NUMPY_STYPE: Final = "numpy.ndarray"  # Flower's name for NumPy's file format
KINDS: Final = "biuf"  # booleans, integers, floats
MAX_HEADER: Final = 1024  # bytes of an array's header
MAX_DIMENSIONS: Final = 16


def to_array_record(arrays: Mapping[str, NDArray[Any]]) -> "ArrayRecord":
    """Encode arrays; one copy each.

    Raises:
        TypeError: An array is neither numeric nor boolean.
    """
    from flwr.app import ArrayRecord

    return ArrayRecord({name: _to_array(name, array) for name, array in arrays.items()})


def to_record_dict(
    records: Records, *, arrays: "ArrayRecord | None" = None, salt: bytes = b""
) -> "RecordDict":
    """Encode records; empty families are left out.

    Args:
        records: What to encode.
        arrays: Already encoded, used instead of ``records.arrays``.
        salt: Makes the result unique where a transport stores equal content once.

    Raises:
        TypeError: A value has a type that the wire does not carry.
    """
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    content = RecordDict()
    if arrays is None and records.arrays:
        arrays = to_array_record(records.arrays)
    if arrays:
        content[ARRAYS] = arrays
    if records.config:
        content[CONFIG] = ConfigRecord(dict(records.config))
    if records.metrics:
        content[METRICS] = MetricRecord(dict(records.metrics))
    if salt:
        content[SALT] = ConfigRecord({SALT: salt})
    return content


def from_record_dict(content: "RecordDict") -> Records:
    """Decode records; arrays are read-only views.

    Raises:
        UpdateRejected: MALFORMED: an unknown family or a wrong one, or an array that is not what it claims.
    """
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

    families = {ARRAYS: ArrayRecord, CONFIG: ConfigRecord, METRICS: MetricRecord, SALT: ConfigRecord}
    for name, record in content.items():
        if name not in families or type(record) is not families[name]:
            raise _malformed(f"record {name[:40]!r} of type {type(record).__name__} is not expected")
    arrays = cast("Mapping[str, Array]", content.get(ARRAYS, {}))
    return Records(
        arrays={name: _from_array(name, array) for name, array in arrays.items()},
        config=dict(cast("Mapping[str, Any]", content.get(CONFIG, {}))),
        metrics=dict(cast("Mapping[str, Any]", content.get(METRICS, {}))),
    )


def _to_array(name: str, array: NDArray[Any]) -> "Array":
    from flwr.app import Array

    if array.dtype.kind not in KINDS:
        raise TypeError(f"Array {name!r} has type {array.dtype}, expected booleans, integers or floats.")
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    header = BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    data = b"".join((header.getvalue(), array.reshape(-1).view(np.uint8).data))
    return Array(dtype=str(array.dtype), shape=tuple(array.shape), stype=NUMPY_STYPE, data=data)


def _from_array(name: str, array: "Array") -> NDArray[Any]:
    if array.stype != NUMPY_STYPE:
        raise _malformed(f"array {name[:40]!r} is encoded as {array.stype[:40]!r}, expected {NUMPY_STYPE!r}")
    shape, dtype, offset = _read_header(name, array.data)
    if str(dtype) != array.dtype or shape != tuple(array.shape):
        raise _malformed(
            f"array {name[:40]!r} claims {str(array.dtype)[:20]} {str(array.shape)[:60]} "
            f"but holds {dtype} {shape}"
        )
    size = prod(shape) * dtype.itemsize
    if len(array.data) - offset != size:
        raise _malformed(f"array {name[:40]!r} has {len(array.data) - offset} bytes of data, expected {size}")
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(array.data, dtype, offset=offset).reshape(shape)


def _read_header(name: str, data: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """The shape, the type and the number of bytes of the header, which NumPy parses as literals only."""
    stream = BytesIO(data[: MAX_HEADER + 16])
    try:
        version = npy.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = npy.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise _malformed(f"array {name[:40]!r} has no valid header") from error
    if fortran or dtype.kind not in KINDS or dtype.byteorder == ">":
        raise _malformed(f"array {name[:40]!r} is not little-endian numbers in row order")
    if len(shape) > MAX_DIMENSIONS or any(n < 0 or isinstance(n, bool) for n in shape):
        raise _malformed(f"array {name[:40]!r} has shape {str(shape)[:60]}")
    return shape, dtype, stream.tell()


def _malformed(what: str) -> UpdateRejected:
    return UpdateRejected(Rejection.MALFORMED, f"Malformed message: {what}.")
