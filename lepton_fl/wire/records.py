"""What a transport carries: named arrays, named settings and named numbers, and nothing else.

The three families mirror those of every federated-learning transport, so that this package needs none of
them. A record is neutral: what its fields mean is decided by ``lepton_fl.wire.messages``.

    Records(arrays={"model": vector}, config={"round": 3}, metrics={"loss": 0.5})
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Scalar = bool | int | float | str | bytes
ConfigValue = Scalar | list[bool] | list[int] | list[float] | list[str] | list[bytes]
MetricValue = int | float | list[int] | list[float]


@dataclass(frozen=True)
class Records:
    """The content of one message.

    Attributes:
        arrays: Numeric or boolean arrays of any shape. Those that a transport delivers are read-only
            views of its buffer; copy before writing.
        config: Scalars, strings and bytes, or lists of one of these types.
        metrics: Numbers or lists of numbers.
    """

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # values are ConfigValue
    metrics: Mapping[str, Any] = field(default_factory=dict)  # values are MetricValue
