"""A device's part in ``flsa/1``: five answers, each given once, then nothing left to tell.

    prekey = Prekey.make("d-abc", "example.org", signing, credential, not_after, os.urandom)
    session = ClientSession(context, prekey, signing, trust, ledger, now)
    shares = session.share_keys(roster, os.urandom, now)    # while training runs
    session.deliver(delivery)                               # while training runs
    upload, vector = session.mask(encoding.encode(update, weight))
    consent = session.consent(survivors)
    reveal = session.reveal(certificate)

Rules. The same request again gets the same bytes again. Anything else that is not the next step of this round
ends the session: its secrets are overwritten and it never answers again (``TrustError``). Secrets live in
this object only; it cannot be copied, pickled or printed. What must outlive a crash are two lines: in
which attempt a vector of this round was given, and which survivor set was signed (``Ledger``).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from lepton_fl.errors import Rejection, TrustError, UpdateRejected
from lepton_fl.secagg.checks import Checks, Cohort
from lepton_fl.secagg.context import COMPLETE, DEFAULT_COHORT, RoundContext, hidden_odds
from lepton_fl.secagg.encoding import to_wire
from lepton_fl.secagg.field import LIMBS, SECRET_BYTES, Random, draw, pack, share, unpack
from lepton_fl.secagg.identity import Trust
from lepton_fl.secagg.keys import (
    MASK,
    SELF,
    agree,
    commit_self,
    commit_share,
    has_edge,
    mask_key,
    open_sealed,
    pair_mask,
    public_bytes,
    seal,
    sealing_key,
    self_seed,
    sign_of,
    wipe,
)
from lepton_fl.secagg.masks import Ring, add_masks, byte_view, ring_type
from lepton_fl.secagg.messages import (
    Advert,
    Certificate,
    Consent,
    Delivery,
    Reveal,
    Shares,
    Survivors,
    Upload,
    dealers_digest,
)


class Ledger(Protocol):
    """What a device has given and signed, on its disk; not to be emptied while the run lasts.

    In every round it gives vectors in ever later attempts, none after it has signed a survivor set, and signs
    one set, in the attempt of its last vector. So honest signers of a set are in no later sum of its round.
    """

    def give(self, round_key: str, attempt: int, roster: bytes) -> bool:
        """Whether a vector may be given in an attempt to devices of this roster; if so, noted durably.

        Not if a later one was given, or one with another roster in this attempt, or another one's survivor
        set was signed. The last vector that was given may be given again.
        """
        ...

    def claim(self, round_key: str, digest: bytes) -> bytes:
        """Store ``digest`` under ``round_key`` durably if there is none yet; return what is stored."""
        ...

    def signed(self, round_key: str) -> bool:
        """Whether a survivor set was signed in a round: no further attempt at it can have this device."""
        ...


@dataclass(frozen=True)
class Policy:
    """What a device demands of a round, whatever the coordinator proposes.

    Attributes:
        least_cohort: A round that allows fewer devices is refused.
        hidden_graph: Whether the experimental hidden mask graph is allowed; its odds must then be those of
            ``hidden_odds`` for the roster, or more.
    """

    least_cohort: int = DEFAULT_COHORT
    hidden_graph: bool = False


class MemoryLedger:
    """A ledger for simulations and tests: it forgets when the process ends."""

    def __init__(self) -> None:
        self._signed: dict[str, bytes] = {}
        self._given: dict[str, tuple[int, bytes]] = {}

    def give(self, round_key: str, attempt: int, roster: bytes) -> bool:
        """See :class:`Ledger`."""
        last = self._given.get(round_key, (-1, b""))
        if last != (attempt, roster):
            if round_key in self._signed or last[0] >= attempt:
                return False
            self._given[round_key] = attempt, roster
        return True

    def claim(self, round_key: str, digest: bytes) -> bytes:
        """See :class:`Ledger`."""
        return self._signed.setdefault(round_key, digest)

    def signed(self, round_key: str) -> bool:
        """See :class:`Ledger`."""
        return round_key in self._signed


class _Secret:
    """Cannot be pickled, copied or shown."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds secrets and stays in this process.")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Prekey(_Secret):
    """A device's keys for one round, made ahead; ``advert`` is the public half."""

    def __init__(self, advert: bytes, share_key: X25519PrivateKey, b: bytearray, m: bytearray) -> None:
        self.advert = advert
        self._share_key = share_key
        self._b, self._m = b, m
        self._taken = False

    @classmethod
    def make(
        cls,
        device: str,
        deployment: str,
        signing: Ed25519PrivateKey,
        credential: bytes,
        not_after: int,
        random: Random,
    ) -> "Prekey":
        """Make one.

        Args:
            device: The device's id.
            deployment: The installation that it is enrolled at.
            signing: Its signing key.
            credential: Proof that the signing key is its own, for the others' ``Trust``.
            not_after: Seconds since 1970; others refuse the advert later.
            random: The operating system's randomness.
        """
        share_key = X25519PrivateKey.from_private_bytes(random(32))
        b, m = (bytearray(pack(draw(random, LIMBS))) for _ in range(2))
        share_public, mask_public = public_bytes(share_key), public_bytes(mask_key(m))
        advert = Advert(
            deployment,
            device,
            signing.public_key().public_bytes_raw(),
            credential,
            not_after,
            share_public,
            mask_public,
            commit_self(deployment, device, share_public, mask_public, bytes(b)),
        )
        return cls(advert.encode(signing), share_key, b, m)

    def take(self) -> tuple[X25519PrivateKey, bytearray, bytearray]:
        """Hand the secrets over, once: a key that served two rounds would link their masks.

        Raises:
            TrustError: they have been taken.
        """
        if self._taken:
            raise TrustError("This prekey has been used; every round needs a new one.")
        self._taken = True
        return self._share_key, self._b, self._m

    def discard(self) -> None:
        """Overwrite the secrets of a prekey that has not been used."""
        if not self._taken:
            self._taken = True
            wipe(self._b, self._m)


@dataclass
class _Told:
    """A request's digest and what was answered."""

    request: bytes
    answer: bytes = field(repr=False)


class ClientSession(_Secret):
    """One device in one attempt at one sum."""

    def __init__(
        self,
        context: RoundContext,
        prekey: Prekey,
        signing: Ed25519PrivateKey,
        trust: Trust,
        ledger: Ledger,
        policy: Policy = Policy(),
        workers: int = 1,
        checks: Checks = Checks(),  # noqa: B008 - has no state
    ) -> None:
        """Begin.

        Args:
            context: What this device has decided to take part in.
            prekey: Its keys; used up, whatever comes of the session.
            signing: Its signing key.
            trust: Decides which keys are whose.
            ledger: What it has signed, durable.
            policy: What the device demands.
            workers: Threads for masking.
            checks: Makes the costly ones; other than the default only where one process is many devices.

        Raises:
            TrustError: the context is below the device's policy, or the prekey has been used.
        """
        if context.rules.min_cohort < policy.least_cohort:
            raise TrustError(
                f"The round allows cohorts of {context.rules.min_cohort}, this device wants "
                f"{policy.least_cohort}.",
                hint="Raise the run's cohort, or lower least_cohort in the device's configuration.",
            )
        if context.rules.edge_odds < COMPLETE and not policy.hidden_graph:
            raise TrustError("The round uses the experimental mask graph; this device does not allow it.")
        self._context, self._signing, self._trust, self._ledger = context, signing, trust, ledger
        self._advert = prekey.advert
        self._share_key, self._b, self._m = prekey.take()
        self._workers, self._checks = workers, checks
        self._told: dict[str, _Told] = {}
        self._refused = ""
        self._cohort: Cohort | None = None
        self._peers: tuple[Advert, ...] = ()
        self._r = b""  # roster digest
        self._me = -1
        self._receiving: dict[int, bytes] = {}  # dealer -> sealing key
        self._own = b""  # both halves of the share of its own secrets
        self._dealers: frozenset[int] = frozenset()  # R1
        self._held: dict[int, bytes] = {}  # dealer -> both halves of this device's share
        self._complaints: frozenset[int] = frozenset()
        self._vector: NDArray[np.uint8] | None = None  # masked, as it travels: no secret
        self._survivors: Survivors | None = None

    # --- who ----------------------------------------------------------------------------------------

    @property
    def refused(self) -> str:
        """Why this session has ended; empty while it has not."""
        return self._refused

    def share_keys(self, roster: bytes, random: Random, now: float) -> bytes:
        """Answer the roster with sealed shares of both secrets.

        Args:
            roster: Message 2.
            random: The operating system's randomness.
            now: Seconds since 1970.

        Raises:
            TrustError: a refusal; the session has ended.
        """
        return self._answer("share_keys", roster, lambda: self._share_keys(roster, random, now))

    def _share_keys(self, message: bytes, random: Random, now: float) -> bytes:
        self._require(self._cohort is None, "a roster after the round has moved on")
        cohort = self._checks.cohort(message, self._context.digest)
        self._check_cohort(cohort, now)
        self._cohort, self._r = cohort, cohort.digest
        n, me = len(self._peers), self._me
        secrets = unpack(bytes(self._b + self._m))
        shares = share(secrets, n, self._context.rules.threshold(n), random)
        packed = [pack(row) for row in shares]
        shares.fill(0)
        sealed = []
        for j, peer in enumerate(self._peers):
            if j == me:
                continue
            shared = agree(self._share_key, peer.share_key)
            self._receiving[j] = sealing_key(shared, self._r, j, me)
            sealed.append(seal(sealing_key(shared, self._r, me, j), packed[j], self._r, me, j))
        self._own = packed[me]
        commitments = b"".join(
            b"".join(commit_share(self._r, me, j, half, part) for half, part in _halves(packed[j]))
            for j in range(n)
        )
        return Shares(self._r, me, b"".join(sealed), commitments).encode(self._signing)

    def _check_cohort(self, cohort: Cohort, now: float) -> None:
        rules, n = self._context.rules, len(cohort.adverts)
        self._require(n >= rules.min_cohort, f"a roster of {n}, fewer than {rules.min_cohort}")
        if rules.edge_odds < COMPLETE:
            enough = hidden_odds(n, rules.max_dropout)
            self._require(rules.edge_odds >= enough, f"a mask graph that is too sparse for {n} devices")
        self._require(self._advert in cohort.adverts, "a roster without this device's own advert")
        self._peers = cohort.peers
        self._me = cohort.adverts.index(self._advert)
        devices = [peer.device for peer in self._peers]
        self._require(
            all(a < b for a, b in pairwise(devices)),
            "a roster that is not in order, or names a device twice",
        )
        keys = {key for peer in self._peers for key in (peer.share_key, peer.mask_key)}
        self._require(len(keys) == 2 * n, "a roster in which a key occurs twice")
        signers = {peer.signing_key for peer in self._peers}
        self._require(len(signers) == n, "a roster in which a signing key occurs twice")
        for peer in self._peers:
            self._require(peer.deployment == self._context.deployment, "an advert of another deployment")
            self._require(now <= peer.not_after, f"an expired advert of {peer.device}")
            self._trust.check(peer.deployment, peer.device, peer.signing_key, peer.credential, now)

    # --- shares ---------------------------------------------------------------------------------------

    def deliver(self, delivery: bytes) -> tuple[str, ...]:
        """Take the others' shares; the ids of those whose shares cannot be used.

        Raises:
            TrustError: a refusal; the session has ended.
        """
        self._answer("deliver", delivery, lambda: self._deliver(delivery))
        return tuple(self._peers[dealer].device for dealer in sorted(self._complaints))

    def _deliver(self, message: bytes) -> bytes:
        self._require("share_keys" in self._told and not self._dealers, "shares out of turn")
        n, me = len(self._peers), self._me
        delivery = Delivery.decode(message, n)
        self._require(delivery.roster == self._r, "shares for another roster")
        self._require(delivery.receiver == me, "shares for another device")
        self._require(me in delivery.dealers, "a round that goes on without this device")
        self._held = {me: self._own}
        for dealer, (sealed, commitments) in delivery.parts.items():
            opened = self._open(dealer, sealed, commitments)
            if opened is not None:
                self._held[dealer] = opened
        least = self._context.least_survivors(n)
        self._require(len(self._held) >= least, f"usable shares of {len(self._held)} devices, {least} needed")
        self._dealers = delivery.dealers
        self._complaints = delivery.dealers - frozenset(self._held)
        self._receiving.clear()
        return b""

    def _open(self, dealer: int, sealed: bytes, commitments: bytes) -> bytes | None:
        """Both halves of a share, or None if it is garbled, not canonical, or not what was committed to."""
        try:
            opened = open_sealed(self._receiving[dealer], sealed, self._r, dealer, self._me)
            unpack(opened)
        except (InvalidTag, UpdateRejected):
            return None
        expected = b"".join(
            commit_share(self._r, dealer, self._me, half, part) for half, part in _halves(opened)
        )
        return opened if expected == commitments else None

    # --- the vector -----------------------------------------------------------------------------------

    def mask(self, vector: Ring) -> tuple[bytes, memoryview]:
        """Mask the encoded update, in place.

        The first call decides: repeats give the first vector's bytes, whatever they bring.

        Args:
            vector: (length,) elements from the context's encoding; overwritten and kept.

        Returns:
            Message 5 and the masked vector's bytes, for upload in chunks.

        Raises:
            TrustError: out of turn, or a vector of this round went elsewhere; the session has ended.
            UpdateRejected: WRONG_SHAPE; the session goes on.
            StateError: the ledger could not be written; nothing was given, try again.
        """
        context = self._context
        if vector.shape != (context.length,) or vector.dtype != ring_type(context.bits):
            raise UpdateRejected(
                Rejection.WRONG_SHAPE,
                f"Expected a vector of shape ({context.length},) and {context.bits} bits, got {vector.shape} "
                f"{vector.dtype}.",
            )
        tail = self._answer("mask", b"", lambda: self._mask(vector))
        masked = self._vector
        if masked is None:  # the answer above has set it
            raise TrustError("The masked vector has been released; it cannot be sent again.")
        return tail, byte_view(masked)

    def release(self) -> None:
        """Forget the masked vector, once the coordinator has confirmed the upload; the session goes on."""
        self._vector = None

    def _mask(self, vector: Ring) -> bytes:
        self._require(bool(self._dealers), "a vector before the shares")
        self._require(self._is_last(), "another vector in one round")
        masked = np.ascontiguousarray(vector)
        if not masked.flags.writeable:
            masked = masked.copy()
        seeds = [(self_seed(self._b, self._r), 1), *self._pair_masks()]
        add_masks(masked, seeds, workers=self._workers)
        self._vector = to_wire(self._context.encoding, masked)
        digest = hashlib.sha256(byte_view(self._vector)).digest()
        upload = Upload(self._r, self._me, self._dealers_digest(), digest, self._complaints)
        self._forget_round_secrets()
        return upload.encode(len(self._peers), self._signing)

    def _is_last(self) -> bool:
        """Whether this device's vector of this attempt may be given, or is the last that it has given."""
        return self._ledger.give(self._context.round_key, self._context.attempt, self._r)

    def _pair_masks(self) -> list[tuple[bytes, int]]:
        key, masks = mask_key(self._m), []
        for other in sorted(self._dealers - {self._me}):
            seed, coin = pair_mask(key, self._peers[other].mask_key, self._r, self._me, other)
            if has_edge(coin, self._context.rules.edge_odds):
                masks.append((seed, sign_of(self._me, other)))
        return masks

    def _dealers_digest(self) -> bytes:
        return dealers_digest(self._r, self._dealers, len(self._peers))

    # --- one survivor set -----------------------------------------------------------------------------

    def consent(self, survivors: bytes) -> bytes:
        """Sign the survivor set, after it has been written to the ledger.

        Raises:
            TrustError: a refusal; the session has ended.
            StateError: the ledger could not be written; nothing was signed, try again.
        """
        return self._answer("consent", survivors, lambda: self._consent(survivors))

    def _consent(self, message: bytes) -> bytes:
        self._require("mask" in self._told, "a survivor set out of turn")
        n = len(self._peers)
        proposed = Survivors.decode(message, n)
        members, least = proposed.members, self._context.least_survivors(n)
        self._require(proposed.roster == self._r, "survivors of another roster")
        self._require(proposed.dealers == self._dealers_digest(), "survivors of other dealers")
        self._require(self._me in members, "a survivor set without this device")
        self._require(members <= frozenset(self._held), "a survivor whose shares this device does not have")
        self._require(len(members) >= least, f"{len(members)} survivors, {least} needed")
        digest = proposed.digest(self._context.digest, n)
        self._require(self._is_last(), "survivors of an attempt that was given up")
        stored = self._ledger.claim(self._context.round_key, digest)
        self._require(stored == digest, "a second survivor set in one round")
        self._survivors = proposed
        return Consent(self._r, self._me, digest).encode(self._signing)

    def reveal(self, certificate: bytes) -> bytes:
        """Give one share for every device, and forget everything else.

        Raises:
            TrustError: a refusal; the session has ended.
        """
        return self._answer("reveal", certificate, lambda: self._reveal(certificate))

    def _reveal(self, message: bytes) -> bytes:
        self._require(self._survivors is not None and bool(self._held), "a certificate out of turn")
        assert self._survivors is not None  # for the type checker
        n, rules, members = len(self._peers), self._context.rules, self._survivors.members
        certificate = Certificate.decode(message, n)
        digest = self._survivors.digest(self._context.digest, n)
        self._require(certificate.roster == self._r, "a certificate of another roster")
        self._require(certificate.survivors == digest, "a certificate for another survivor set")
        count = len(certificate.signatures)
        self._require(count >= rules.quorum(n), f"{count} signatures, {rules.quorum(n)} needed")
        signers = {sender for sender, _ in certificate.signatures}
        self._require(signers <= members, "a signature of a device that is no survivor")
        assert self._cohort is not None  # as above
        self._checks.consents(self._cohort, certificate)
        shares = {
            dealer: held[:SECRET_BYTES] if dealer in members else held[SECRET_BYTES:]
            for dealer, held in self._held.items()
        }
        answer = Reveal(self._r, self._me, digest, shares).encode(n, self._signing)
        self._forget()
        return answer

    # --- one answer each --------------------------------------------------------------------------------

    def _answer(self, stage: str, request: bytes, work: Callable[[], bytes]) -> bytes:
        """The stage's answer: computed once, repeated for the same request, refused for any other."""
        if self._refused:
            raise TrustError(f"This session has ended: {self._refused}.")
        digest = hashlib.sha256(request).digest()
        told = self._told.get(stage)
        if told is None:
            told = self._told[stage] = _Told(digest, self._guarded(work))
        elif told.request != digest:
            self._end(f"a different second request ({stage})")
        return told.answer

    def _guarded(self, work: Callable[[], bytes]) -> bytes:
        """A message that does not decode or is not signed by whom it names ends the session."""
        try:
            return work()
        except (TrustError, UpdateRejected) as error:
            if not self._refused:
                self._end(str(error).rstrip("."))
            raise TrustError(f"Refused: {self._refused}.") from error

    def _require(self, condition: bool, otherwise: str) -> None:
        if not condition:
            self._end(otherwise)

    def _end(self, why: str) -> NoReturn:
        self.close(why)
        raise TrustError(f"Refused: {why}.", hint="The coordinator has not followed the protocol.")

    def close(self, why: str = "closed") -> None:
        """End the session; secrets are overwritten as far as Python allows, and it never answers again."""
        self._refused = self._refused or why
        self._told.clear()
        self._forget()

    def _forget_round_secrets(self) -> None:
        """After masking, a device needs its own secrets no more: the others hold the shares."""
        wipe(self._b, self._m)

    def _forget(self) -> None:
        self._forget_round_secrets()
        self._held, self._own = {}, b""
        self._receiving.clear()
        self._vector = None
        if hasattr(self, "_share_key"):
            del self._share_key


def _halves(packed: bytes) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    return (SELF, packed[:SECRET_BYTES]), (MASK, packed[SECRET_BYTES:])
