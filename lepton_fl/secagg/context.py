"""What one secure aggregation is about, frozen: every signature and every key is bound to it.

A device builds the context itself, from the request that it has decided to answer; it never takes a digest
from the coordinator. Two devices that were given different models, parameters or attempts have different
contexts and cannot take part in the same sum (Pasquini et al. 2022, "Eluding Secure Aggregation").

    context = RoundContext.of(request, "example.org", encoding, Rules())
    context.digest
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import exp, lgamma, log
from typing import Any

from lepton_fl.errors import ConfigError
from lepton_fl.secagg.codec import Writer
from lepton_fl.secagg.encoding import Encoding, wire_bytes
from lepton_fl.wire.messages import Request

VERSION = b"flsa/1"
LEAST_COHORT = 4  # below it a quorum proves nothing
DEFAULT_COHORT = 16
MOST_COHORT = 1_000  # larger cohorts are split, see lepton_fl.secagg.cohorts
COMPLETE = 2**64  # odds of an edge that is always there
_WAVE = 30  # the thresholds' roundings repeat: n / 3 and 0.7 n
NO_PRIVACY = bytes(32)  # in place of the digest of a privacy mechanism


@dataclass(frozen=True)
class Rules:
    """How many must take part, sign and reveal, as functions of the n devices in the roster.

    Attributes:
        min_cohort: The smallest roster that a device accepts.
        max_dropout: Drop-outs that the round must survive, per thousand of the roster, at most 333.
        edge_odds: Two devices share a mask with probability ``edge_odds / 2**64``. ``COMPLETE`` (always) is
            the published protocol. Less is EXPERIMENTAL: a hidden random mask graph, argued and simulated but
            not reviewed by others; take the value from :func:`hidden_odds`.
    """

    min_cohort: int = DEFAULT_COHORT
    max_dropout: int = 300  # per thousand
    edge_odds: int = COMPLETE

    def __post_init__(self) -> None:
        if not LEAST_COHORT <= self.min_cohort <= MOST_COHORT:
            raise ConfigError(
                f"Expected min_cohort of {LEAST_COHORT} to {MOST_COHORT}, got {self.min_cohort}.",
                hint="Fewer devices cannot hide one; of more, make several cohorts.",
            )
        if not 0 <= self.max_dropout <= 333:
            raise ConfigError(f"Expected max_dropout of 0 to 333 per thousand, got {self.max_dropout}.")
        if not 1 <= self.edge_odds <= COMPLETE:
            raise ConfigError(f"Expected edge_odds of 1 to 2**64, got {self.edge_odds}.")

    @staticmethod
    def threshold(n: int) -> int:
        """Shares that recover a secret: more than half."""
        return n // 2 + 1

    @staticmethod
    def quorum(n: int) -> int:
        """Signatures that certify a survivor set: any two quorums share an honest signer."""
        return 2 * n // 3 + 1

    @staticmethod
    def corrupted(n: int) -> int:
        """Devices that may side with the coordinator: fewer than a third."""
        return (n - 1) // 3

    def least_survivors(self, n: int) -> int:
        """The smallest survivor set that a device signs."""
        return max(self.quorum(n), -(-(1000 - self.max_dropout) * n // 1000))


@lru_cache(maxsize=64)
def hidden_odds(n: int, max_dropout: int = 300, sigma: int = 40) -> int:
    """EXPERIMENTAL: odds of an edge so that the honest survivors' graph falls apart with p <= 2**-sigma.

    Solves the union bound over all ways to cut h honest survivors into s and h - s,
    ``sum C(h, s) (1 - q)^(s (h - s)) <= 2**-sigma``, by bisection on q. Up to n = 32 all edges are needed.

    Args:
        n: Devices in the roster.
        max_dropout: Per thousand.
        sigma: Bits of statistical security.
    """
    rules = Rules(max_dropout=max_dropout)
    honest = rules.least_survivors(n) - rules.corrupted(n)
    if n <= 32 or honest < 2:
        return COMPLETE
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _cut_bound(honest, middle) <= 2.0**-sigma else (middle, high)
    return min(COMPLETE, int(high * COMPLETE) + 1)


def hidden_rules(least: int, most: int, max_dropout: int = 300) -> Rules:
    """EXPERIMENTAL: rules with one hidden mask graph that is dense enough for rosters of all these sizes.

    Args:
        least: The smallest roster; fewer devices will not accept these rules.
        most: The largest.
        max_dropout: Per thousand.
    """
    # More devices need fewer edges each; only the rounding of the thresholds makes small waves.
    sizes = range(least, min(most, least + _WAVE) + 1)
    return Rules(least, max_dropout, max(hidden_odds(n, max_dropout) for n in sizes))


def _cut_bound(h: int, q: float) -> float:
    if q >= 1:
        return 0.0
    terms = (
        lgamma(h + 1) - lgamma(s + 1) - lgamma(h - s + 1) + s * (h - s) * log(1 - q)
        for s in range(1, h // 2 + 1)
    )
    return sum(exp(min(term, 50.0)) for term in terms)


@dataclass(frozen=True)
class RoundContext:
    """One attempt at one cohort's sum of one round.

    Attributes:
        deployment: Names the coordinator's installation; part of every enrolment.
        run: The training run.
        round: First round: 1.
        attempt: First attempt at the round: 1.
        request: SHA-256 over everything the device was asked, 32 bytes.
        model: SHA-256 of the model that is trained from, 32 bytes.
        encoding: How updates become ring elements.
        rules: Thresholds.
        cohort: Which of the round's cohorts, from 0.
        privacy: SHA-256 of the privacy mechanism's parameters, 32 bytes; zeros without one.
    """

    deployment: str
    run: str
    round: int
    attempt: int
    request: bytes
    model: bytes
    encoding: Encoding
    rules: Rules = field(default_factory=Rules)
    cohort: int = 0
    privacy: bytes = NO_PRIVACY

    def __post_init__(self) -> None:
        for name in ("request", "model", "privacy"):
            if len(getattr(self, name)) != 32:
                raise ConfigError(f"Expected 32 bytes for {name}, got {len(getattr(self, name))}.")

    @classmethod
    def of(
        cls,
        request: Request,
        deployment: str,
        encoding: Encoding,
        rules: Rules,
        cohort: int = 0,
        privacy: bytes = NO_PRIVACY,
    ) -> "RoundContext":
        """The context of a round's request, the same on both sides of the wire."""
        ticket = request.ticket
        return cls(
            deployment,
            ticket.run_id,
            ticket.round,
            ticket.attempt,
            request_digest(request),
            bytes.fromhex(request.model_sha256),
            encoding,
            rules,
            cohort,
            privacy,
        )

    @property
    def length(self) -> int:
        """Elements of one upload."""
        return self.encoding.length

    @property
    def bits(self) -> int:
        """The ring of a coordinate is the integers modulo ``2**bits``."""
        return self.encoding.bits

    def least_survivors(self, n: int) -> int:
        """Of a roster of n, these must come through, or nothing is revealed: by the rules, and the noise."""
        return max(self.rules.least_survivors(n), self.encoding.survivors)

    @property
    def upload_bytes(self) -> int:
        """Bytes of one masked vector."""
        return wire_bytes(self.encoding)

    @property
    def round_key(self) -> str:
        """What a device signs at most one survivor set for: attempts and cohorts do not count."""
        return json.dumps([self.deployment, self.run, self.round], separators=(",", ":"))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it."""
        rules = self.rules
        writer = Writer(VERSION + b" context\0").text(self.deployment).text(self.run)
        writer.u64(self.round).u64(self.attempt).u32(self.cohort)
        writer.raw(self.request).raw(self.model).raw(self.privacy).raw(self.encoding.digest)
        writer.u16(rules.min_cohort).u16(rules.max_dropout).u64(rules.edge_odds % COMPLETE)
        return hashlib.sha256(bytes(writer)).digest()


def request_digest(request: Request) -> bytes:
    """SHA-256 of a request's fields; the model's weights are in it by their own digest."""
    fields: dict[str, Any] = dict(request.to_records().config)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(VERSION + b" request\0" + text.encode()).digest()
