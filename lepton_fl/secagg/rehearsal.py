"""A whole cohort in one process: what a simulation runs, what tests and measurements drive.

``rehearse`` runs the real protocol; ``ideal`` is what it must compute, the plain modular sum. Both return the
same numbers, and a scenario chooses.

    outcome = rehearse(context, vectors, random=os.urandom, drops={"d3": Stage.UPLOADS})
    assert (outcome.total == ideal(context, vectors, outcome.survivors)).all()
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl.secagg.checks import Checks, SharedChecks
from lepton_fl.secagg.client import ClientSession, Ledger, MemoryLedger, Policy, Prekey
from lepton_fl.secagg.context import COMPLETE, RoundContext
from lepton_fl.secagg.field import Random
from lepton_fl.secagg.identity import Pinned, Trust
from lepton_fl.secagg.masks import Ring, ring_type
from lepton_fl.secagg.server import Outcome, ServerSession, Stage
from lepton_fl.secagg.uploads import Intake, MemorySpool

Encode = Callable[[], Ring]
NEVER = 2**62  # seconds since 1970: adverts of a rehearsal do not expire


@dataclass
class Member:
    """One device of a rehearsal."""

    device: str
    signing: Ed25519PrivateKey
    prekey: Prekey
    session: ClientSession | None = None
    checks: Checks = field(default_factory=Checks)


def make_members(devices: tuple[str, ...], deployment: str, random: Random) -> tuple[list[Member], Pinned]:
    """Devices with fresh keys, and trust in exactly these keys."""
    members, checks = [], SharedChecks()
    for device in sorted(devices):
        signing = Ed25519PrivateKey.from_private_bytes(random(32))
        prekey = Prekey.make(device, deployment, signing, b"", NEVER, random)
        members.append(Member(device, signing, prekey, checks=checks))
    return members, Pinned({m.device: m.signing.public_key().public_bytes_raw() for m in members})


def rehearse(
    context: RoundContext,
    vectors: Mapping[str, Encode],
    random: Random,
    drops: Mapping[str, Stage] | None = None,
    workers: int = 0,
    ledger: Callable[[str], Ledger] = lambda _: MemoryLedger(),
    journal: Callable[[bytes], None] = lambda _: None,
) -> Outcome:
    """Run one cohort through all stages, one device after the other: memory holds one vector at a time.

    Args:
        context: What is summed.
        vectors: Device id -> function that makes its encoded vector.
        random: Source of all secrets.
        drops: Device -> the first stage for which it does not answer.
        workers: Cores to unmask with; 0 = all.
        ledger: Gives a device's ledger.
        journal: Takes the coordinator's records.

    Raises:
        QuorumError: more drop-outs than the rules allow.
    """
    members, trust = make_members(tuple(vectors), context.deployment, random)
    spool = MemorySpool()
    server = ServerSession(context, trust, Intake(context, spool), workers)
    gone = dict(drops or {})
    for stage in (Stage.ADVERTS, Stage.SHARES, Stage.UPLOADS, Stage.CONSENTS, Stage.REVEALS):
        for member in members:
            if gone.get(member.device, Stage.DONE) > stage and _asked(server, member.device):
                message = _answer(server, member, vectors, context, trust, ledger, random)
                server.accept(member.device, message, 0.0, journal)
                if stage is Stage.UPLOADS:
                    spool.discard(member.device)  # nobody complains here: it will not be taken out again
                    if member.session:
                        member.session.release()
        if stage is not Stage.REVEALS:
            server.close(journal)
    return server.finish()


def _asked(server: ServerSession, device: str) -> bool:
    return server.stage is Stage.ADVERTS or device in server.expected()


def _answer(
    server: ServerSession,
    member: Member,
    vectors: Mapping[str, Encode],
    context: RoundContext,
    trust: Trust,
    ledger: Callable[[str], Ledger],
    random: Random,
) -> bytes:
    """One device's message of the present stage."""
    if server.stage is Stage.ADVERTS:
        policy = Policy(context.rules.min_cohort, context.rules.edge_odds < COMPLETE)
        member.session = ClientSession(
            context,
            member.prekey,
            member.signing,
            trust,
            ledger(member.device),
            policy,
            checks=member.checks,
        )
        return member.prekey.advert
    session = member.session
    assert session is not None  # made above
    if server.stage is Stage.SHARES:
        return session.share_keys(server.roster(), random, 0.0)
    if server.stage is Stage.UPLOADS:
        session.deliver(server.delivery(member.device))
        tail, body = session.mask(vectors[member.device]())
        server.chunk(member.device, 0, body)
        return tail
    if server.stage is Stage.CONSENTS:
        return session.consent(server.survivors())
    return session.reveal(server.certificate())


def ideal(context: RoundContext, vectors: Mapping[str, Encode], survivors: tuple[str, ...]) -> Ring:
    """The ideal functionality: the plain modular sum over the survivors."""
    total: Ring = np.zeros(context.length, ring_type(context.bits))
    for device in survivors:
        total += vectors[device]()
    return total
