"""A device's part in the rounds of ``rounds.secure``: what it is offered, and its sessions.

    member = SecureMember("d-abc", "example.org", signing, Pinned(keys), ledger)
    advert = member.advert(key)
    shares = member.shares(key, offer, roster)          # the offer names the request and the model by hash
    member.deliver(key, delivery)
    upload, vector = member.mask(key, vector)           # after the request was held against the offer
    consent = member.consent(key, survivors)
    reveal = member.reveal(key, certificate)

Secrets are in ``SecureMember`` only, for as long as the process lives; it refuses to be pickled or printed.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NoReturn, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.errors import ConfigError, Rejection, TrustError, UpdateRejected
from lepton_fl.rounds.secure_sum import SumEncoding
from lepton_fl.secagg.client import ClientSession, Ledger, Policy, Prekey
from lepton_fl.secagg.context import COMPLETE, RoundContext, Rules
from lepton_fl.secagg.encoding import Counter, Exact, Rotated
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Trust
from lepton_fl.secagg.masks import Ring
from lepton_fl.secagg.messages import Roster
from lepton_fl.secagg.quantised import Quantised
from lepton_fl.wire.messages import malformed

VALID_S: Final = 7 * 86_400  # seconds for which an advert is good
MOST_SESSIONS: Final = 4  # at a time; the oldest goes
# Keys made ahead; the oldest go. A coordinator that is restarted asks for new ones, and may go on with a
# roster that names an older one.
MOST_SPARE: Final = 32
DEFAULT_POLICY: Final = Policy()
MOST_COORDINATES: Final = 2**31

_KINDS: Final[Mapping[str, type[Exact] | type[Rotated] | type[Quantised]]] = {
    "exact": Exact,
    "rotated": Rotated,
    "quantised": Quantised,
}


@dataclass(frozen=True)
class Offer:
    """What a device is invited to: all of a round's context but the installation, which it knows itself."""

    run: str
    round: int
    attempt: int
    request: bytes  # SHA-256
    model: bytes  # SHA-256
    encoding: SumEncoding
    rules: Rules
    cohort: int = 0  # which of the round's cohorts

    @classmethod
    def of(cls, context: RoundContext) -> Self:
        """The offer of a context."""
        assert isinstance(context.encoding, SumEncoding)  # there are no others
        return cls(
            context.run,
            context.round,
            context.attempt,
            context.request,
            context.model,
            context.encoding,
            context.rules,
            context.cohort,
        )

    def context(self, deployment: str) -> RoundContext:
        """As the device signs it."""
        return RoundContext(
            deployment,
            self.run,
            self.round,
            self.attempt,
            self.request,
            self.model,
            self.encoding,
            self.rules,
            self.cohort,
        )

    def to_json(self) -> str:
        """Canonical JSON."""
        body = {
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "request": self.request.hex(),
            "model": self.model.hex(),
            "encoding": {"kind": type(self.encoding).__name__.lower()} | asdict(self.encoding),
            "min_cohort": self.rules.min_cohort,
            "max_dropout": self.rules.max_dropout,
            "edge_odds": self.rules.edge_odds,
            "cohort": self.cohort,
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read and check.

        Raises:
            UpdateRejected: MALFORMED.
        """
        try:
            body = json.loads(text)
            encoding = dict(body["encoding"])
            counters = tuple(Counter(str(c["name"]), _integer(c["bound"])) for c in encoding.pop("counters"))
            kind = _KINDS[encoding.pop("kind")]
            values: dict[str, Any] = {name: _number(value) for name, value in encoding.items()}
            made = kind(**values, counters=counters)
            if made.num_coordinates > MOST_COORDINATES:
                raise ValueError("too many coordinates")
            edge_odds = _integer(body["edge_odds"], COMPLETE)
            rules = Rules(_integer(body["min_cohort"]), _integer(body["max_dropout"]), edge_odds)
            numbers = _integer(body["round"]), _integer(body["attempt"])
            digests = bytes.fromhex(body["request"]), bytes.fromhex(body["model"])
            cohort = _integer(body["cohort"], 2**32 - 1)
            if len(body) != 10 or any(len(digest) != 32 for digest in digests):
                raise ValueError("unknown fields, or not digests")
            return cls(str(body["run"]), *numbers, *digests, made, rules, cohort)
        except (KeyError, TypeError, ValueError, ConfigError, RecursionError) as error:
            raise malformed("the offer of a secure aggregation does not decode") from error


def _integer(value: Any, most: int = 2**63 - 1) -> int:  # noqa: ANN401 - from JSON
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("not an integer")
    return value


def _number(value: Any) -> int | float | str:  # noqa: ANN401 - from JSON
    if type(value) not in (int, float, str):
        raise ValueError("not a number or a text")
    result: int | float | str = value
    return result


@dataclass
class _Place:
    """One attempt at one round."""

    prekey: Prekey
    offer: Offer | None = None
    session: ClientSession | None = None


class SecureMember:
    """One device: its signing key, its policy and the sessions under way."""

    def __init__(
        self,
        device: str,
        deployment: str,
        signing: Ed25519PrivateKey,
        trust: Trust,
        ledger: Ledger,
        policy: Policy = DEFAULT_POLICY,
        *,
        credential: bytes = b"",
        random: Random = os.urandom,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; see ``ClientSession`` for the arguments."""
        self.device, self.deployment = device, deployment
        self._signing, self._trust, self._ledger, self._policy = signing, trust, ledger, policy
        self.credential, self._random, self._now = credential, random, now
        self._lock = threading.Lock()  # prekeys are made by another thread than the one that uses them
        self._places: dict[str, _Place] = {}
        self._spare: list[Prekey] = []

    def __reduce__(self) -> NoReturn:
        raise TypeError("SecureMember holds secrets and stays in this process.")

    def __repr__(self) -> str:
        return f"<SecureMember {self.device}>"

    def prekey(self) -> bytes:
        """A message 1 made ahead, for some later attempt: whichever roster it is in."""
        made = self._make()
        with self._lock:
            self._spare.append(made)
            while len(self._spare) > MOST_SPARE:
                self._spare.pop(0).discard()
        return made.advert

    def _make(self) -> Prekey:
        return Prekey.make(
            self.device,
            self.deployment,
            self._signing,
            self.credential,
            int(self._now()) + VALID_S,
            self._random,
        )

    def advert(self, key: str) -> bytes:
        """Message 1 of an attempt; again, the same.

        Args:
            key: names the attempt.
        """
        if key not in self._places:
            self._enter(key, self._make())
        return self._places[key].prekey.advert

    def _enter(self, key: str, prekey: Prekey) -> None:
        self._places[key] = _Place(prekey)
        while len(self._places) > MOST_SESSIONS:
            self._forget(next(iter(self._places)))

    def _adopt(self, key: str, roster: bytes) -> None:
        """Begin an attempt with the keys made ahead that its roster names, if there are such."""
        adverts = set(Roster.decode(roster).adverts)
        for prekey in self._spare:
            if prekey.advert in adverts:
                self._spare.remove(prekey)
                self.leave(key)
                self._enter(key, prekey)
                return

    def refuse_if_signed(self, offer: str) -> None:
        """Hold an offer against what this device has signed: no new attempt at that round can have it.

        Raises:
            UpdateRejected: SIGNED_BEFORE; or the offer does not decode.
            StateError: the ledger cannot be read.
        """
        if self._ledger.signed(Offer.from_json(offer).context(self.deployment).round_key):
            words = "This device has signed in this round already; nobody gets a second sum of it."
            raise UpdateRejected(Rejection.SIGNED_BEFORE, words)

    def shares(self, key: str, offer: str, roster: bytes) -> bytes:
        """Message 3, the answer to an offer and the roster.

        Raises:
            UpdateRejected: the offer does not decode, or is another one than before.
            TrustError: a refusal.
        """
        wanted = Offer.from_json(offer)
        with self._lock:
            if key not in self._places or self._places[key].session is None:
                self._adopt(key, roster)
        place = self._place(key)
        if place.session is None:
            if wanted.encoding.cohort < wanted.rules.min_cohort:
                raise malformed("the encoding is made for fewer devices than the round allows")
            context = wanted.context(self.deployment)
            place.offer = wanted
            place.session = ClientSession(
                context, place.prekey, self._signing, self._trust, self._ledger, self._policy
            )
        elif wanted != place.offer:
            place.session.close("a different second offer")
            raise TrustError("Refused: a different second offer in one attempt.")
        return place.session.share_keys(roster, self._random, self._now())

    def deliver(self, key: str, delivery: bytes) -> tuple[str, ...]:
        """Take message 4; whose shares cannot be used."""
        return self._session(key).deliver(delivery)

    def offer(self, key: str) -> Offer:
        """What this device has agreed to: hold the request against it before training."""
        place = self._place(key)
        if place.offer is None:
            raise TrustError(f"Device {self.device} has not been offered a round of this name.")
        return place.offer

    def mask(self, key: str, vector: Ring) -> tuple[bytes, memoryview]:
        """Message 5 and the masked vector."""
        return self._session(key).mask(vector)

    def consent(self, key: str, survivors: bytes) -> bytes:
        """Message 7; what has come so far was received, so the vector is forgotten."""
        session = self._session(key)
        answer = session.consent(survivors)
        session.release()
        return answer

    def reveal(self, key: str, certificate: bytes) -> bytes:
        """Message 9."""
        return self._session(key).reveal(certificate)

    def leave(self, key: str) -> None:
        """Overwrite the secrets of an attempt that goes on without this device; from any thread."""
        self._forget(key)

    def close(self) -> None:
        """Overwrite the secrets of everything under way."""
        for key in list(self._places):
            self._forget(key)
        while self._spare:
            self._spare.pop().discard()

    def _place(self, key: str) -> _Place:
        if key not in self._places:
            raise TrustError(
                f"Device {self.device} has no keys for this round: it joined late, or was restarted."
            )
        return self._places[key]

    def _session(self, key: str) -> ClientSession:
        session = self._place(key).session
        if session is None:
            raise TrustError(f"Device {self.device} has not shared its keys in this round.")
        return session

    def _forget(self, key: str) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        place.prekey.discard()
        if place.session is not None:
            place.session.close()


def check_request(offer: Offer, request: bytes, model: bytes) -> None:
    """Hold what a device was sent against what it has agreed to, before it trains.

    Args:
        offer: what it has agreed to.
        request: SHA-256 of what it was asked.
        model: SHA-256 of the model that it was sent.

    Raises:
        TrustError: another request or model.
    """
    for name, agreed, found in (("request", offer.request, request), ("model", offer.model, model)):
        if agreed != found:
            raise TrustError(
                f"Refused: the {name} is not the one that this round was offered with.",
                hint="The coordinator has not followed the protocol.",
            )
