"""This device's place in rounds with secure aggregation: its signing key, its certificate, its sessions.

Two threads use it. The agent's own asks for the certificate and makes keys ahead; the worker's answers the
stages of a round. Secrets of rounds are in memory only, for as long as the process lives: a device that is
killed drops out of its round. What must outlive it is the signing key, its certificate, and which survivor
set was signed in which round (``signed.jsonl``).

    seat = Seat(state, config.client, office)
    seat.certify(identity, link)                # agent: as soon as the coordinator says that it can
    answer = seat.answer(asked, name)           # worker: stage after stage
    seat.train(asked, name, should_stop)        # worker: after the answer to the roster has left

Nothing heavy is imported before a coordinator asks for something of this.
"""

import base64
import json
import logging
import os
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lepton_client.config import ClientSection
from lepton_client.state import FORMAT, Identity, StateDir
from lepton_fl.crashpoints import reached
from lepton_fl.errors import NotFound, Rejection, StateCorrupt, TrustError, UpdateRejected
from lepton_fl.files import canonical_json, read_private, write_private
from lepton_fl.wire.v1 import device_pb2 as pb

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lepton_client.desk import Office
    from lepton_client.link import Link
    from lepton_fl.rounds.secure_device import Offer, SecureMember
    from lepton_fl.rounds.secure_wire import StageAnswer, StageRequest
    from lepton_fl.secagg.masks import Ring

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Paper:
    """The certificate of this device's signing key."""

    authority: str  # public key of whom has signed it, hexadecimal
    signing_key: str  # public half, hexadecimal
    credential: str  # base64
    ends: int  # UTC seconds


@dataclass
class _Work:
    """What training has brought in one attempt."""

    asked: "StageRequest | None" = None  # until it is trained
    vector: "Ring | None" = None
    failure: UpdateRejected | None = None
    seconds: float = 0.0


class Seat:
    """See the module."""

    def __init__(
        self,
        state: StateDir,
        config: ClientSection,
        office: "Office | None",
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Read the certificate, if there is one.

        Args:
            state: where key, certificate and ledger are.
            config: what the owner demands.
            office: trains.
            wall: UTC seconds.

        Raises:
            StateCorrupt: the certificate's file is damaged.
        """
        self._state, self._config, self._office, self._wall = state, config, office, wall
        self.session = secrets.token_bytes(8)  # whose secrets are gone when this process ends
        self._paper = _read_paper(state)
        self._lock = threading.Lock()
        self._identity: Identity | None = None
        self._member: SecureMember | None = None
        self._fresh: list[bytes] = []  # adverts that the coordinator does not have yet
        self._works: dict[str, _Work] = {}

    # --- the agent's thread ---------------------------------------------------------------------------

    def belongs_to(self, identity: Identity) -> None:
        """Whose seat it is; again when the identity has changed."""
        self._identity = identity

    @property
    def credential_ends(self) -> int:
        """When the certificate ends, UTC seconds; 0 = there is none."""
        return self._paper.ends if self._paper else 0

    @property
    def adverts(self) -> tuple[bytes, ...]:
        """Made ahead and not yet sent."""
        return tuple(self._fresh)

    def sent(self) -> None:
        """The coordinator has them."""
        self._fresh.clear()

    def make_adverts(self, count: int) -> None:
        """Make keys for later rounds.

        Raises:
            TrustError, StateError: the signing key or its certificate cannot be used.
        """
        member = self._seated()
        self._fresh = [member.prekey() for _ in range(min(count, 4))]
        reached("secure.advertised")

    def certify(self, identity: Identity, link: "Link") -> Identity:
        """Have the signing key certified, or fetch the certificate; the key is made at the first time.

        Returns:
            The identity; with the authority's key, where none was pinned before.

        Raises:
            TrustError: the coordinator names another authority than the pinned one, or the certificate is not
                of this authority for this key.
            ConnectionFailed: it cannot be reached.
            DiskFull, StateError: what came could not be kept.
        """
        from lepton_client.link import PROTOCOL
        from lepton_fl.crypto import load_key
        from lepton_fl.secagg.identity import Certified, ends_of, request_certificate

        key, named = signing_key(self._state), deployment(identity)
        request = request_certificate(load_key(self._state.key), key, named)
        answer = link.certify(pb.CertifyRequest(protocol=PROTOCOL, request=request))
        identity = self._pinned(identity, answer.authority.hex())
        if not answer.credential:
            log.info("the enrolment authority has this device's request for a signing certificate")
            return identity
        public = key.public_key().public_bytes_raw()
        trust = Certified([answer.authority])
        try:
            trust.check(named, identity.device_id, public, answer.credential, self._wall())
            ends = ends_of(answer.credential)
        except UpdateRejected as error:
            raise TrustError("The signing certificate that came back does not decode.") from error
        credential = base64.b64encode(answer.credential).decode()
        paper = Paper(answer.authority.hex(), public.hex(), credential, ends)
        write_private(self._state.signing, canonical_json({"format": FORMAT} | asdict(paper)))
        with self._lock:
            self._paper = paper
            if self._member is not None:
                self._member.credential = answer.credential
        log.info("this device's signing key is certified; it can take part in secure rounds")
        return identity

    def _pinned(self, identity: Identity, found: str) -> Identity:
        pinned = self._config.authority or identity.authority
        if pinned and found != pinned:
            raise TrustError(
                f"The coordinator names the enrolment authority {found[:16]}..., this device has pinned "
                f"{pinned[:16]}....",
                hint="Ask the operator. A device trusts another authority only after enrolling anew.",
            )
        if identity.authority == found:
            return identity
        log.warning("the enrolment authority %s is pinned from now on", found)
        changed = replace(identity, authority=found)
        self._state.save_identity(changed)
        return changed

    # --- the worker's thread --------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """Whether this process takes part in an attempt."""
        return name in self._works

    def refuse_if_signed(self, asked: "StageRequest") -> None:
        """Raise UpdateRejected (SIGNED_BEFORE) if this device has signed in the round that is offered."""
        self._seated().refuse_if_signed(asked.offer)

    def answer(self, asked: "StageRequest", name: str) -> "StageAnswer":
        """Answer one stage; the same again for the same again.

        Args:
            asked: what the coordinator wants.
            name: of the attempt, unique.

        Raises:
            TrustError: a refusal; this device is out of the attempt.
            UpdateRejected: the message does not decode, or this device has nothing to give.
            StateError: a signature could not be noted, so none was given; asking again may help.
        """
        from lepton_fl.rounds.secure_device import MOST_SESSIONS
        from lepton_fl.rounds.secure_wire import StageAnswer
        from lepton_fl.secagg.server import Stage

        member = self._seated()
        if asked.stage is Stage.ADVERTS:
            advert = member.advert(name)
            reached("secure.advertised")
            return StageAnswer(advert)
        if asked.stage is Stage.SHARES:
            _check(asked)
            shares = member.shares(name, asked.offer, asked.frame)
            self._works.setdefault(name, _Work(asked))
            while len(self._works) > MOST_SESSIONS:  # the sessions' own bound
                del self._works[next(iter(self._works))]
            return StageAnswer(shares)
        if asked.stage is Stage.UPLOADS:
            return self._upload(member, asked, name)
        if asked.stage is Stage.CONSENTS:
            consent = member.consent(name, asked.frame)
            reached("secure.signed")
            self._work(name).vector = None
            return StageAnswer(consent, prekey=member.prekey())
        reveal = member.reveal(name, asked.frame)
        reached("secure.revealed")
        return StageAnswer(reveal)

    def train(self, asked: "StageRequest", name: str, should_stop: Callable[[], bool]) -> None:
        """Train on what came with the roster, once; what comes of it, or why nothing does, is kept."""
        from lepton_fl.rounds.secure_sum import encode_answer

        work = self._work(name)
        if work.asked is None:
            return
        work.asked = None
        began = time.monotonic()
        offer: Offer = self._seated().offer(name)
        assert self._office is not None  # an agent has one
        try:
            answered = self._office.respond(asked.request, should_stop)
            least = self._config.least_noise
            work.vector = encode_answer(asked.request, answered, offer.encoding, os.urandom, least)
        except UpdateRejected as error:
            work.failure = error
        except Exception as error:  # whatever is wrong with this machine, the round must hear of it
            log.exception("%s could not be worked on", name)
            work.failure = UpdateRejected(Rejection.FAILED, f"The device failed with {type(error).__name__}.")
        work.seconds = time.monotonic() - began

    def untrained(self, name: str) -> "StageRequest | None":
        """What came with the roster and was not trained on: the coordinator went away in between."""
        work = self._works.get(name)
        return work.asked if work is not None else None

    def leave(self, name: str) -> None:
        """Overwrite the secrets of an attempt that is over for this device."""
        self._works.pop(name, None)
        if self._member is not None:
            self._member.leave(name)

    def _upload(self, member: "SecureMember", asked: "StageRequest", name: str) -> "StageAnswer":
        from lepton_fl.rounds.secure_wire import StageAnswer

        work = self._work(name)
        if work.failure is not None:
            raise work.failure
        if work.vector is None:
            raise UpdateRejected(Rejection.FAILED, "This device has not trained in this round.")
        for device in member.deliver(name, asked.frame):
            log.warning("the key share of device %s cannot be used", device)
        tail, masked = member.mask(name, work.vector)
        reached("secure.masked")
        return StageAnswer(tail, masked, seconds=work.seconds)

    def _work(self, name: str) -> _Work:
        work = self._works.get(name)
        if work is None:
            raise TrustError("This device takes no part in this round: it joined late, or was restarted.")
        return work

    def _seated(self) -> "SecureMember":
        """The sessions; made when they are needed for the first time."""
        with self._lock:
            if self._member is None:
                self._member = self._make_member()
            return self._member

    def _make_member(self) -> "SecureMember":
        from lepton_fl.rounds.secure_device import SecureMember
        from lepton_fl.rounds.signed import FileLedger
        from lepton_fl.secagg.client import Policy
        from lepton_fl.secagg.identity import Certified

        identity, paper = self._identity, self._paper
        if identity is None or paper is None:
            raise TrustError(
                "This device's signing key is not certified.",
                hint="It asks by itself at its check-ins; the enrolment authority has to answer.",
            )
        return SecureMember(
            identity.device_id,
            deployment(identity),
            signing_key(self._state),
            Certified([bytes.fromhex(self._config.authority or identity.authority)]),
            FileLedger(self._state.signed),
            Policy(self._config.least_cohort, self._config.hidden_graph),
            credential=base64.b64decode(paper.credential),
        )


def signing_key(state: StateDir) -> "Ed25519PrivateKey":
    """The device's signing key; made, and on the disk, before it is used for the first time.

    Raises:
        TrustError: others can read its file.
        StateCorrupt: the file holds no key.
        DiskFull, StateError: it could not be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lepton_fl.crypto import load_signing_key, save_signing_key

    try:
        return load_signing_key(state.signing_key)
    except NotFound:
        key = Ed25519PrivateKey.generate()
        save_signing_key(state.signing_key, key)
        return key


def deployment(identity: Identity) -> str:
    """The name of the coordinator's installation, from the CA that this device believes."""
    from lepton_fl.secagg.identity import deployment_of

    return deployment_of(ssl.PEM_cert_to_DER_cert(identity.ca_pem))


def _check(asked: "StageRequest") -> None:
    """The offer names the request and the model that came with it; raises TrustError or UpdateRejected."""
    from lepton_fl.rounds.secure_device import Offer, check_request
    from lepton_fl.secagg.context import request_digest
    from lepton_fl.wire.messages import Request

    request, offer = Request.read(asked.request), Offer.from_json(asked.offer)
    check_request(offer, request_digest(request), bytes.fromhex(request.model_sha256))
    ticket = request.ticket
    if (offer.run, offer.round, offer.attempt) != (ticket.run_id, ticket.round, ticket.attempt):
        raise TrustError("Refused: the offer is for another round than the request.")


def _read_paper(state: StateDir) -> Paper | None:
    try:
        body = json.loads(read_private(state.signing))
        body.pop("format")
        paper = Paper(**body)
        if not isinstance(paper.ends, int) or not isinstance(paper.credential, str):
            raise ValueError("not the types")
        return paper
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateCorrupt(
            f"{state.signing} is damaged: it is not the JSON that was written.",
            hint="Remove it; the device fetches its signing certificate again.",
        ) from error
