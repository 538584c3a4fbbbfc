"""How the messages of ``flsa/1`` travel between our coordinator and our device, as records.

A device is told up to five things in one attempt, and answers each: to advertise keys (unless it has made
some ahead), the roster with the request and the model, the others' shares, the survivor set, its
certificate. It answers the roster first and trains then, so that the shares are exchanged while all are
training.

    records = StageRequest.of(plan, Stage.SHARES, roster, offer, request).to_records()
    asked = StageRequest.read(records)                       # on the device
    records = StageAnswer(frame).to_records()
    answer = StageAnswer.read(records)                       # at the coordinator
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.secure_device import Offer
from lepton_fl.secagg.messages import MAX_ADVERT
from lepton_fl.secagg.server import Stage
from lepton_fl.wire.messages import Fields, Request, Ticket, malformed
from lepton_fl.wire.records import Records

STAGE: Final = "secure-stage"
FRAME: Final = "secure-frame"
OFFER: Final = "secure-offer"
PREKEY: Final = "secure-prekey"
MASKED: Final = "masked"
MAX_FRAME: Final = 2**20  # bytes; a delivery for 1,000 devices has 112 KB

_STAGES: Final[Mapping[str, Stage]] = {s.name.lower(): s for s in Stage if s is not Stage.DONE}


@dataclass(frozen=True)
class StageRequest:
    """What one device is told at one stage."""

    ticket: Ticket
    stage: Stage
    frame: bytes  # message 2, 4, 6 or 8; empty at ADVERTS
    offer: str = ""  # with the roster: what the round is about (``Offer``)
    request: Records = field(default_factory=Records)  # with the roster: the request, as in a plain round

    @classmethod
    def of(
        cls,
        plan: RoundPlan,
        stage: Stage,
        frame: bytes,
        offer: Offer | None = None,
        request: Request | None = None,
    ) -> Self:
        """One message of an attempt; offer and request go with the roster."""
        asked = Records() if request is None else request.to_records()
        return cls(Ticket.of(plan), stage, frame, "" if offer is None else offer.to_json(), asked)

    def to_records(self) -> Records:
        """As a transport carries it; the model is not copied."""
        ours = {STAGE: self.stage.name.lower(), FRAME: self.frame}
        if self.offer:
            ours[OFFER] = self.offer
        config = {**self.ticket.to_config(), **self.request.config, **ours}
        return Records(self.request.arrays, config, {})

    @classmethod
    def read(cls, records: Records) -> Self:
        """Decode on the device.

        Raises:
            UpdateRejected: MALFORMED or WRONG_VERSION.
        """
        config = dict(records.config)
        fields = Fields({name: config.pop(name) for name in (STAGE, FRAME, OFFER) if name in config})
        name, frame = fields.text(STAGE), _bytes(fields.take(FRAME), MAX_FRAME)
        stage = _STAGES.get(name)
        if stage is None:
            raise malformed(f"there is no stage {name[:20]!r}")
        offer = fields.text(OFFER) if stage is Stage.SHARES else ""
        fields.finish()
        rest = Fields(config)
        ticket = Ticket.take(rest)
        if stage is not Stage.SHARES:
            rest.finish()
            if records.arrays:
                raise malformed(f"arrays at stage {name}")
        return cls(ticket, stage, frame, offer, Records(records.arrays, config, records.metrics))


@dataclass(frozen=True)
class StageAnswer:
    """What a device answers."""

    frame: bytes  # message 1, 3, 5, 7 or 9
    vector: bytes | memoryview = b""  # masked; with message 5
    prekey: bytes = b""  # a message 1 for a later attempt
    seconds: float = 0.0  # the device's own

    def to_records(self) -> Records:
        """As a transport carries it; the vector is not copied."""
        config: dict[str, Any] = {FRAME: self.frame}
        if self.prekey:
            config[PREKEY] = self.prekey
        arrays: dict[str, NDArray[Any]] = {}
        if len(self.vector):
            arrays[MASKED] = np.frombuffer(self.vector, np.uint8)
        return Records(arrays, config, {"seconds": self.seconds})

    @classmethod
    def read(cls, records: Records) -> Self:
        """Decode at the coordinator.

        Raises:
            UpdateRejected: MALFORMED.
        """
        fields, metrics = Fields(records.config), Fields(records.metrics)
        frame = _bytes(fields.take(FRAME), MAX_FRAME)
        prekey = _bytes(fields.take(PREKEY), MAX_ADVERT) if fields.has(PREKEY) else b""
        fields.finish()
        seconds = metrics.number("seconds")
        metrics.finish()
        arrays = dict(records.arrays)
        masked = arrays.pop(MASKED, None)
        if arrays or (masked is not None and (masked.dtype != np.uint8 or masked.ndim != 1)):
            raise malformed("expected one vector of bytes, or none")
        vector = b"" if masked is None else np.ascontiguousarray(masked).data
        return cls(frame, vector, prekey, min(max(seconds, 0.0), 1e9))


def is_stage(records: Records) -> bool:
    """Whether a message belongs to a round with secure aggregation."""
    return STAGE in records.config


def _bytes(value: Any, most: int) -> bytes:  # noqa: ANN401 - a field of any of the wire's types
    if not isinstance(value, bytes) or len(value) > most:
        raise malformed(f"a field is not made of at most {most} bytes")
    return value
