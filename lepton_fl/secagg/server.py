"""The coordinator's part in ``flsa/1``: collect, close, tell; five times, then unmask one sum.

    server = ServerSession(context, trust, intake)
    server.accept(device, message, now, journal)     # messages 1, 3, 5, 7, 9 of the devices
    server.close(journal)                            # the stage is over: what is next is decided
    server.roster() / .delivery(device) / .survivors() / .certificate()     # messages 2, 4, 6, 8
    outcome = server.finish()

Rules. All of it is a fold over records: ``accept`` and ``close`` hand the record to ``journal`` before
anything changes, so a restarted coordinator calls :meth:`ServerSession.resume` with the records and is
where it was. The session has no secrets. A message that is refused changes nothing. The first valid one of
a device counts; the same again is fine; another one is refused.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import LeptonError, QuorumError, Rejection, StateCorrupt, TrustError, UpdateRejected
from lepton_fl.secagg.agreements import Agreements, available_cores
from lepton_fl.secagg.blame import Blame, Fault, settle_complaints
from lepton_fl.secagg.codec import Reader, Writer
from lepton_fl.secagg.context import MOST_COHORT, RoundContext
from lepton_fl.secagg.field import LIMBS, combine, pack
from lepton_fl.secagg.identity import SIGNATURE_BYTES, Trust
from lepton_fl.secagg.keys import (
    COMMITMENT_BYTES,
    MASK,
    SELF,
    commit_self,
    commit_share,
    has_edge,
    mask_key,
    public_bytes,
    self_seed,
    sign_of,
)
from lepton_fl.secagg.masks import Mask, Ring, add_masks
from lepton_fl.secagg.messages import (
    Advert,
    Certificate,
    Consent,
    Delivery,
    Reveal,
    Roster,
    Shares,
    Survivors,
    Upload,
    dealers_digest,
    verify_frame,
)
from lepton_fl.secagg.uploads import Intake
from lepton_fl.wire.messages import malformed

Journal = Callable[[bytes], None]  # writes a record durably, or raises
_SUBSETS = 16  # sets of holders tried for a secret whose shares do not fit together
_ACCEPT, _CLOSE, _BLAME = 1, 2, 3  # kinds of records
_FAIL = 0  # instead of a record: the stage cannot be closed


class Stage(IntEnum):
    """What the session is collecting."""

    ADVERTS = 1
    SHARES = 3
    UPLOADS = 5
    CONSENTS = 7
    REVEALS = 9
    DONE = 10


@dataclass(frozen=True)
class _Row:
    """What one holder has revealed: of every dealer the half that is wanted, where it is there and right."""

    values: NDArray[np.uint16]  # (n, 16) field elements
    present: NDArray[np.bool_]  # (n,)


@dataclass(frozen=True)
class Outcome:
    """What a round has brought: the sum over the survivors, or nothing and why."""

    total: Ring | None
    survivors: tuple[str, ...]
    blames: tuple[Blame, ...]
    reason: str = ""  # why there is no total


class ServerSession:
    """One attempt at one cohort's sum."""

    def __init__(self, context: RoundContext, trust: Trust, intake: Intake, workers: int = 0) -> None:
        """Begin.

        Args:
            context: What is summed.
            trust: Decides which signing keys are whose.
            intake: Where masked vectors go.
            workers: Cores to unmask with; 0 = all there are. The sum is the same.
        """
        self.context, self.stage = context, Stage.ADVERTS
        self.blames: tuple[Blame, ...] = ()
        self._trust, self.intake, self._workers = trust, intake, workers or available_cores()
        self._adverts: dict[str, bytes] = {}
        self._keys: dict[bytes, str] = {}  # whose each public key is
        self._peers: tuple[Advert, ...] = ()
        self._positions: dict[str, int] = {}
        self._roster, self._r = b"", b""
        self._seen: set[bytes] = set()  # digests of what has been counted: a repeat is no offence
        self._accepted: dict[Stage, dict[int, bytes]] = {stage: {} for stage in Stage}  # position -> message
        self._sealed: dict[int, Shares] = {}
        self._commitments: dict[int, bytes] = {}
        self._dealers: frozenset[int] = frozenset()  # R1
        self._dealers_digest = b""
        self._complaints: dict[int, frozenset[int]] = {}
        self._survivors: Survivors | None = None
        self._certificate = b""
        self._revealed: dict[int, _Row] = {}
        self._outcome: Outcome | None = None

    @classmethod
    def resume(
        cls, context: RoundContext, trust: Trust, intake: Intake, records: Iterable[bytes], workers: int = 0
    ) -> "ServerSession":
        """The session as it was when the last of the records was written.

        Uploads that the records name and the intake's checkpoint lacks are added again from the spool.

        Raises:
            StateCorrupt: the records are not those of a session of this context.
        """
        session = cls(context, trust, intake, workers)
        try:
            for record in records:
                session._apply(record)
        except (LeptonError, LookupError, ValueError) as error:
            raise StateCorrupt(f"The records of a secure aggregation do not follow: {error}") from error
        session._restore_intake()
        return session

    # --- what is there ------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[str, ...]:
        """The roster's devices by position; before it is closed, those that have sent adverts."""
        return tuple(peer.device for peer in self._peers) or tuple(sorted(self._adverts))

    @property
    def n(self) -> int:
        """Devices in the roster."""
        return len(self._peers)

    def heard(self) -> frozenset[str]:
        """Whose message of the present stage has come."""
        if self.stage is Stage.ADVERTS:
            return frozenset(self._adverts)
        return frozenset(self._peers[p].device for p in self._accepted[self.stage])

    def expected(self) -> frozenset[str]:
        """Whose message the present stage can still use: whoever was told something at its beginning."""
        return frozenset(self._peers[p].device for p in self._expected())

    def _expected(self) -> frozenset[int]:
        members = self._survivors.members if self._survivors else frozenset[int]()
        return {
            Stage.SHARES: frozenset(range(self.n)),
            Stage.UPLOADS: self._dealers,
            Stage.CONSENTS: members,
            Stage.REVEALS: members,
        }.get(self.stage, frozenset())

    def needed(self) -> int:
        """How many messages the present stage needs before it can be closed; more are better."""
        rules = self.context.rules
        return {
            Stage.ADVERTS: rules.min_cohort,
            Stage.SHARES: self.context.least_survivors(self.n),
            Stage.UPLOADS: self.context.least_survivors(self.n),
            Stage.CONSENTS: rules.quorum(self.n),
            Stage.REVEALS: rules.threshold(self.n),
        }.get(self.stage, 0)

    # --- from the devices ---------------------------------------------------------------------------

    def accept(self, device: str, message: bytes, now: float, journal: Journal) -> None:
        """Take one message: check it, have it written, then count it.

        Args:
            device: Who the transport says the sender is.
            message: As it came; for stage UPLOADS, the tail after all chunks.
            now: Seconds since 1970.
            journal: Writes the record durably; what it raises goes through, and nothing has changed.

        Raises:
            UpdateRejected: MALFORMED, REPLAYED, DUPLICATE, LATE, NOT_SELECTED or WRONG_SHAPE.
            TrustError: it is not signed by this device.
        """
        record = self._check(device, message, now)
        if record is None:
            return
        journal(record)
        self._apply(record)
        if record[0] == _BLAME:
            raise UpdateRejected(Rejection.DUPLICATE, f"Device {device} has signed two different vectors.")
        if self.stage is Stage.UPLOADS:
            self.intake.add(device)

    def chunk(self, device: str, offset: int, data: bytes | memoryview) -> int:
        """Take the next piece of a device's masked vector (see ``Intake.chunk``).

        Returns:
            How many bytes are there now.

        Raises:
            UpdateRejected: LATE or NOT_SELECTED; and what ``Intake.chunk`` raises.
        """
        if self.stage is not Stage.UPLOADS:
            raise UpdateRejected(Rejection.LATE, "Masked vectors are not being collected.")
        if self._positions.get(device, -1) not in self._dealers:
            raise UpdateRejected(Rejection.NOT_SELECTED, f"Device {device} is not in this round.")
        return self.intake.chunk(device, offset, data)

    def _check(self, device: str, message: bytes, now: float) -> bytes | None:
        """The record of a message, or None if it has been counted before."""
        if _seen(device, message) in self._seen:
            return None
        if self.stage is Stage.ADVERTS:
            return self._check_advert(device, message, now)
        if device not in self._positions:
            raise UpdateRejected(Rejection.NOT_SELECTED, f"Device {device} is not in the roster.")
        position = self._positions[device]
        if self.stage is Stage.DONE:
            raise UpdateRejected(Rejection.LATE, "The round is over.")
        decoded = self._decode(message)
        if decoded.sender != position:
            raise TrustError(f"Device {device} sends a message of position {decoded.sender}.")
        verify_frame(message, self._peers[position].signing_key, device)
        if decoded.roster != self._r:
            raise UpdateRejected(Rejection.REPLAYED, f"A message of {device} belongs to another roster.")
        if position in self._accepted[self.stage]:
            return self._second(position, message)
        if position not in self._expected():
            raise UpdateRejected(Rejection.NOT_SELECTED, f"Device {device} is no longer in this round.")
        self._check_content(device, decoded)
        return bytes(Writer().u8(_ACCEPT).text(device).raw(message))

    def _check_advert(self, device: str, message: bytes, now: float) -> bytes:
        advert = Advert.decode(message)
        if advert.device != device or advert.deployment != self.context.deployment:
            raise TrustError(f"Device {device} shows an advert of {advert.device} at {advert.deployment}.")
        if now > advert.not_after:
            raise UpdateRejected(Rejection.REPLAYED, f"The advert of device {device} has expired.")
        self._trust.check(advert.deployment, device, advert.signing_key, advert.credential, now)
        if device in self._adverts:
            raise UpdateRejected(Rejection.DUPLICATE, f"Device {device} has sent another advert.")
        if len(self._adverts) >= MOST_COHORT:
            raise UpdateRejected(Rejection.NOT_SELECTED, f"The cohort has its {MOST_COHORT} devices.")
        advert.check_order()
        self._check_new_keys(advert)
        return bytes(Writer().u8(_ACCEPT).text(device).raw(message))

    def _check_new_keys(self, advert: Advert) -> None:
        for key in (advert.share_key, advert.mask_key, advert.signing_key):
            if key in self._keys:
                raise malformed(f"device {advert.device} shows a key of device {self._keys[key]}")

    def _decode(self, message: bytes) -> Shares | Upload | Consent | Reveal:
        """The message of the present stage; one of an earlier stage is late."""
        decoders: dict[Stage, type[Shares | Upload | Consent | Reveal]] = {
            Stage.SHARES: Shares,
            Stage.UPLOADS: Upload,
            Stage.CONSENTS: Consent,
            Stage.REVEALS: Reveal,
        }
        number = message[5] if len(message) > 5 else 0
        if number < self.stage and number in {1, 3, 5, 7}:
            raise UpdateRejected(Rejection.LATE, f"Message {number} came after its stage had closed.")
        return decoders[self.stage].decode(message, self.n)

    def _second(self, position: int, message: bytes) -> bytes:
        """A different second message; for an upload, both signatures together are proof."""
        device = self._peers[position].device
        first = self._accepted[self.stage][position]
        already = any(b.device == device and b.fault is Fault.TWO_UPLOADS for b in self.blames)
        if self.stage is Stage.UPLOADS and not already:
            blame = Blame(device, Fault.TWO_UPLOADS, bytes(Writer().blob(first).blob(message)))
            return bytes(Writer().u8(_BLAME).raw(blame.encode()))
        raise UpdateRejected(Rejection.DUPLICATE, f"Device {device} has sent another message already.")

    def _check_content(self, device: str, decoded: Shares | Upload | Consent | Reveal) -> None:
        if isinstance(decoded, Upload):
            if decoded.dealers != self._dealers_digest:
                raise UpdateRejected(Rejection.REPLAYED, f"Device {device} masked for other dealers.")
            if not decoded.complaints <= self._dealers - {decoded.sender}:
                raise malformed(f"device {device} complains about devices that have sent it nothing")
            self.intake.verify(device, decoded.vector)
        elif isinstance(decoded, Consent | Reveal):
            if decoded.survivors != self._survivors_digest():
                raise UpdateRejected(Rejection.REPLAYED, f"Device {device} answers for other survivors.")
            if isinstance(decoded, Reveal) and not decoded.shares.keys() <= self._dealers:
                raise malformed(f"device {device} reveals shares of devices that have sent none")

    def _survivors_digest(self) -> bytes:
        assert self._survivors is not None  # set before the stages that ask
        return self._survivors.digest(self.context.digest, self.n)

    # --- the end of a stage -------------------------------------------------------------------------

    def close(self, journal: Journal) -> Stage:
        """End the present stage with what has come, and go to the next one.

        Raises:
            QuorumError: too few devices; the round has no result, and nothing has changed but, after
                complaints, ``blames``. Before the consents, another attempt is possible.
        """
        decision = {
            Stage.ADVERTS: self._decide_roster,
            Stage.SHARES: self._decide_dealers,
            Stage.UPLOADS: self._decide_survivors,
            Stage.CONSENTS: self._decide_certificate,
        }.get(self.stage)
        if decision is None:
            raise QuorumError("The last stage is ended by finish().")
        if len(self.heard()) < self.needed():
            raise QuorumError(
                f"Secure aggregation, stage {self.stage.name.lower()}: {len(self.heard())} devices, "
                f"{self.needed()} needed.",
                hint="More drop-outs than the round allows give no result, never a partial sum.",
            )
        for record in decision():
            if record[0] == _FAIL:
                raise QuorumError(
                    Reader(record[1:]).blob().decode(),
                    hint="Nobody has signed yet: try again without the devices that are to blame.",
                )
            journal(record)
            self._apply(record)
        if self._survivors and self.stage is Stage.CONSENTS:
            self.intake.settle(self._names(self._survivors.members))
        return self.stage

    def _decide_roster(self) -> list[bytes]:
        return [self._closing(bytes(Roster(self.context.digest, self._sorted_adverts()).encode()))]

    def _sorted_adverts(self) -> tuple[bytes, ...]:
        return tuple(self._adverts[device] for device in sorted(self._adverts))

    def _decide_dealers(self) -> list[bytes]:
        return [self._closing(_positions_text(self._accepted[Stage.SHARES]))]

    def _decide_survivors(self) -> list[bytes]:
        rules, n = self.context.rules, self.n
        uploaded = frozenset(self._accepted[Stage.UPLOADS])
        least, quorum = self.context.least_survivors(n), rules.quorum(n)
        settled = settle_complaints(uploaded, self._complaints, rules.corrupted(n), quorum, least)
        blames = [Blame(self._peers[p].device, fault) for p, fault in sorted(settled.culprits.items())]
        records = [bytes(Writer().u8(_BLAME).raw(b.encode())) for b in blames if b not in self.blames]
        lost = self._unrecoverable(settled.members)
        if len(settled.members) >= least and len(settled.signers) >= quorum and not lost:
            return [*records, self._closing(_positions_text(settled.members))]
        return [*records, _failure(len(settled.members), len(settled.signers), self._names(lost))]

    def _unrecoverable(self, members: frozenset[int]) -> frozenset[int]:
        """Dealers of whose secrets too few survivors have usable shares: their masks would stay."""
        threshold = self.context.rules.threshold(self.n)
        empty: frozenset[int] = frozenset()
        return frozenset(
            dealer
            for dealer in self._dealers
            if sum(dealer not in self._complaints.get(m, empty) for m in members) < threshold
        )

    def _decide_certificate(self) -> list[bytes]:
        signatures = tuple(
            (p, message[-SIGNATURE_BYTES:]) for p, message in sorted(self._accepted[Stage.CONSENTS].items())
        )
        quorum = self.context.rules.quorum(self.n)
        return [self._closing(Certificate(self._r, self._survivors_digest(), signatures[:quorum]).encode())]

    def _closing(self, content: bytes) -> bytes:
        return bytes(Writer().u8(_CLOSE).u8(self.stage).raw(content))

    # --- to the devices -----------------------------------------------------------------------------

    def roster(self) -> bytes:
        """Message 2, the same for all."""
        return self._roster

    def delivery(self, device: str) -> bytes:
        """Message 4, for one device of R1.

        Raises:
            UpdateRejected: NOT_SELECTED, it has sent no shares; LATE, the stage is over.
        """
        position = self._positions.get(device, -1)
        if position not in self._dealers:
            raise UpdateRejected(Rejection.NOT_SELECTED, f"Device {device} has sent no shares.")
        if not self._sealed:
            raise UpdateRejected(Rejection.LATE, "The shares have been handed out.")
        parts = {
            dealer: (shares.sealed_for(position), shares.committed_to(position))
            for dealer, shares in self._sealed.items()
            if dealer != position
        }
        return Delivery(self._r, position, self._dealers, parts).encode(self.n)

    def survivors(self) -> bytes:
        """Message 6, the same for all of U."""
        assert self._survivors is not None, "close(UPLOADS) first"
        return self._survivors.encode(self.n)

    def certificate(self) -> bytes:
        """Message 8, the same for all of U."""
        return self._certificate

    # --- the fold -----------------------------------------------------------------------------------

    def _apply(self, record: bytes) -> None:
        reader = Reader(record)
        kind = reader.u8()
        if kind == _ACCEPT:
            device = reader.text()
            self._count(device, record[2 + len(device.encode()) :])
        elif kind == _BLAME:
            self.blames = (*self.blames, Blame.decode(record[1:]))
        elif kind == _CLOSE:
            if reader.u8() != self.stage:
                raise malformed(f"a record closes another stage than {self.stage.name}")
            self._advance(record[2:])
        else:
            raise malformed(f"a record of kind {kind}")

    def _count(self, device: str, message: bytes) -> None:
        self._seen.add(_seen(device, message))
        if self.stage is Stage.ADVERTS:
            advert = Advert.decode_unverified(message)
            self._keys |= dict.fromkeys((advert.share_key, advert.mask_key, advert.signing_key), device)
            self._adverts[device] = message
            return
        position, decoded = self._positions[device], self._decode(message)
        # Of shares only the parts are kept: they are the largest of the small messages.
        self._accepted[self.stage][position] = b"" if isinstance(decoded, Shares) else message
        if isinstance(decoded, Shares):
            self._sealed[position] = decoded
            self._commitments[position] = decoded.commitments
        elif isinstance(decoded, Upload):
            self._complaints[position] = decoded.complaints
        elif isinstance(decoded, Reveal):
            self._take_row(position, decoded)

    def _advance(self, content: bytes) -> None:
        if self.stage is Stage.ADVERTS:
            roster = Roster.decode(content)
            self._roster, self._r = content, roster.digest
            self._peers = tuple(Advert.decode_unverified(advert) for advert in roster.adverts)
            self._positions = {peer.device: i for i, peer in enumerate(self._peers)}
        elif self.stage is Stage.SHARES:
            self._dealers = _read_positions(content, self.n)
            self._dealers_digest = dealers_digest(self._r, self._dealers, self.n)
        elif self.stage is Stage.UPLOADS:
            self._survivors = Survivors(self._r, self._dealers_digest, _read_positions(content, self.n))
            self._sealed.clear()
        elif self.stage is Stage.CONSENTS:
            self._certificate = content
        self.stage = Stage(self.stage + (2 if self.stage < Stage.REVEALS else 1))

    def _restore_intake(self) -> None:
        for position, message in self._accepted[Stage.UPLOADS].items():
            device = self._peers[position].device
            if device not in self.intake.included:
                self._check_spooled(device, Upload.decode(message, self.n).vector)
        if self._survivors is not None:
            self.intake.settle(self._names(self._survivors.members))
        elif self.stage is Stage.UPLOADS:
            self.intake.settle(self._names(self._accepted[Stage.UPLOADS]))

    def _check_spooled(self, device: str, digest: bytes) -> None:
        """A vector that was lost with the power must not become part of a sum."""
        try:
            self.intake.verify(device, digest)
        except UpdateRejected as error:
            raise StateCorrupt(
                f"The masked vector of device {device} is not the one that came: {error}"
            ) from error

    def _names(self, positions: Iterable[int]) -> tuple[str, ...]:
        return tuple(self._peers[p].device for p in sorted(positions))

    # --- shares that were revealed --------------------------------------------------------------------

    def _take_row(self, holder: int, reveal: Reveal) -> None:
        """Keep what matches the dealers' commitments; blame the holder for what does not."""
        assert self._survivors is not None  # the stage comes after
        members, values = self._survivors.members, np.zeros((self.n, LIMBS), np.uint16)
        present = np.zeros(self.n, np.bool_)
        for dealer, part in reveal.shares.items():
            half = SELF if dealer in members else MASK
            start = (2 * holder + (half == MASK)) * COMMITMENT_BYTES
            expected = self._commitments[dealer][start : start + COMMITMENT_BYTES]
            if commit_share(self._r, dealer, holder, half, part) == expected:
                values[dealer], present[dealer] = np.frombuffer(part, "<u2"), True
        self._revealed[holder] = _Row(values, present)
        owed = self._dealers - self._complaints.get(holder, frozenset())
        if not owed <= reveal.shares.keys():
            self._blame(holder, Fault.WITHHELD_SHARES)
        elif int(present.sum()) < len(reveal.shares):
            self._blame(holder, Fault.WRONG_SHARE)

    def _blame(self, position: int, fault: Fault) -> None:
        self.blames = (*self.blames, Blame(self._peers[position].device, fault))

    # --- the sum ----------------------------------------------------------------------------------------

    def finish(self) -> Outcome:
        """Recover the secrets, check them, take the masks off; again, the same outcome.

        Returns:
            The sum over the survivors (the intake's own memory: it is used up), or, when a dealer's shares
            do not make up its secret, no sum and the dealers to blame.

        Raises:
            QuorumError: too few shares yet; nothing has changed, more reveals may still come.
        """
        if self._outcome is not None:
            return self._outcome
        if self.stage is not Stage.REVEALS or self._survivors is None:
            raise QuorumError(f"Secure aggregation is in stage {self.stage.name.lower()}, not at its end.")
        members = self._survivors.members
        selves, poisoned = self._recover(members, self._is_self_secret)
        keys, more = self._recover(self._dealers - members, self._is_mask_secret)
        for dealer in sorted(poisoned | more):
            self._blame(dealer, Fault.POISONED_SHARES)
        self.stage = Stage.DONE
        if poisoned | more:
            reason = "Shares do not make up the secret of " + ", ".join(self._names(poisoned | more)) + "."
            self._outcome = Outcome(None, self._names(members), self.blames, reason)
        else:
            total = self.intake.total
            for masks in self._masks(selves, keys):
                add_masks(total, masks, workers=self._workers)
            self._outcome = Outcome(total, self._names(members), self.blames)
        return self._outcome

    def _is_self_secret(self, dealer: int, secret: bytes) -> bool:
        peer = self._peers[dealer]
        commitment = commit_self(peer.deployment, peer.device, peer.share_key, peer.mask_key, secret)
        return commitment == peer.commitment

    def _is_mask_secret(self, dealer: int, secret: bytes) -> bool:
        return public_bytes(mask_key(secret)) == self._peers[dealer].mask_key

    def _recover(
        self, dealers: Collection[int], check: Callable[[int, bytes], bool]
    ) -> tuple[dict[int, bytes], frozenset[int]]:
        """The secrets of these dealers, and the dealers whose shares do not fit together.

        A secret is recovered from ``threshold`` holders that have a right share of it, whoever they are:
        usually the same for all, and then one matrix product recovers all.
        """
        threshold = self.context.rules.threshold(self.n)
        found: dict[int, bytes] = {}
        holders = {d: [h for h in sorted(self._revealed) if self._revealed[h].present[d]] for d in dealers}
        short = [d for d in dealers if len(holders[d]) < threshold]
        if short:
            raise QuorumError(
                f"{len(holders[short[0]])} shares of the secret of {self._peers[short[0]].device}, "
                f"{threshold} needed.",
                hint="Wait for more devices to reveal; without them the round has no result.",
            )
        for attempt in range(_SUBSETS):
            groups: dict[tuple[int, ...], list[int]] = {}
            for dealer in sorted(set(dealers) - found.keys()):
                all_of_them = holders[dealer]
                if attempt <= len(all_of_them) - threshold or attempt == 0:
                    chosen = (all_of_them[attempt:] + all_of_them[:attempt])[:threshold]
                    groups.setdefault(tuple(chosen), []).append(dealer)
            for chosen_holders, group in groups.items():
                secrets = self._combine(chosen_holders, group)
                found |= {d: secret for d, secret in secrets.items() if check(d, secret)}
        return found, frozenset(dealers) - found.keys()

    def _combine(self, holders: Sequence[int], dealers: Sequence[int]) -> dict[int, bytes]:
        rows = np.stack([self._revealed[holder].values[list(dealers)].reshape(-1) for holder in holders])
        secrets = combine(holders, rows.astype(np.int64)).reshape(len(dealers), LIMBS)
        return {dealer: pack(secret) for dealer, secret in zip(dealers, secrets, strict=True)}

    def _masks(self, selves: Mapping[int, bytes], keys: Mapping[int, bytes]) -> Iterator[Sequence[Mask]]:
        """What is still in the sum: every survivor's own mask, and those it shares with the dropped."""
        yield [(self_seed(secret, self._r), -1) for secret in selves.values()]
        odds = self.context.rules.edge_odds
        members = [(position, self._peers[position].mask_key) for position in selves]
        work = Agreements(self._r, members, tuple(keys.items()))
        for dropped, pairs in work.results(self._workers):
            yield [
                (seed, -sign_of(member, dropped))
                for (member, _), (seed, coin) in zip(members, pairs, strict=True)
                if has_edge(coin, odds)
            ]


def is_decision(record: bytes) -> bool:
    """Whether a record closes a stage.

    It must be on the disk before anybody is told of it; messages of devices can come again.
    """
    return record[0] == _CLOSE


def _seen(device: str, message: bytes) -> bytes:
    return hashlib.sha256(device.encode() + b"\0" + message).digest()


def _failure(members: int, signers: int, lost: Sequence[str]) -> bytes:
    named = f", and too few have usable shares of {', '.join(lost)}" if lost else ""
    text = f"Complaints leave {members} survivors and {signers} that can sign{named}."
    return bytes(Writer().u8(_FAIL).blob(text.encode()[:60_000]))


def _positions_text(positions: Iterable[int]) -> bytes:
    ordered = sorted(positions)
    writer = Writer().u16(len(ordered))
    for position in ordered:
        writer.u16(position)
    return bytes(writer)


def _read_positions(content: bytes, n: int) -> frozenset[int]:
    reader = Reader(content)
    positions = frozenset(reader.u16() for _ in range(reader.u16()))
    reader.finish()
    if any(position >= n for position in positions):
        raise malformed(f"a record names a position of {n} or more")
    return positions
