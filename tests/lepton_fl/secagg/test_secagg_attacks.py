"""A coordinator that does not follow the protocol, and devices that do not.

Every attack on a device ends in a refusal after which it never answers again, with nothing signed and no
share given. Every attack on the coordinator leaves its state as it was, or ends in blame by device id.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lepton_fl.errors import LeptonError, QuorumError, Rejection, TrustError, UpdateRejected
from lepton_fl.secagg.blame import Blame, Fault, settle_complaints
from lepton_fl.secagg.client import MemoryLedger, Policy, Prekey
from lepton_fl.secagg.context import Rules
from lepton_fl.secagg.field import pack
from lepton_fl.secagg.keys import agree, commit_share, seal, sealing_key
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
    message_number,
    sign_frame,
)
from lepton_fl.secagg.server import Stage

VICTIM = "d000"
FAR = 4_000_000_000
NOW = 1_800_000_000.0

# --- a coordinator that attacks -----------------------------------------------------------------------------


def refused(cohort, call, match="", device=VICTIM):
    """The call is refused, nothing was signed, and the device is silent from now on."""
    ledger = dict(cohort.ledgers[device]._signed)
    with pytest.raises(TrustError, match=match):
        call()
    session = cohort.sessions[device]
    assert session.refused
    assert cohort.ledgers[device]._signed == ledger
    assert session._b == bytes(len(session._b))
    assert session._held == {}
    for again in (
        lambda: session.share_keys(cohort.server.roster(), os.urandom, NOW),
        lambda: session.deliver(b""),
        lambda: session.mask(np.zeros(cohort.context.length, f"<u{cohort.context.bits // 8}")),
        lambda: session.consent(b""),
        lambda: session.reveal(b""),
    ):
        with pytest.raises(TrustError, match="ended"):
            again()


def roster_of(cohort, adverts=None, context=None):
    if adverts is None:
        adverts = Roster.decode(cohort.server.roster()).adverts
    return Roster(context or cohort.context.digest, tuple(adverts)).encode()


def show(cohort, roster):
    return lambda: cohort.sessions[VICTIM].share_keys(roster, os.urandom, NOW)


def advert(cohort, device, signer=None, **fields):
    base = Advert.decode(cohort.prekeys[device].advert)
    return replace(base, **fields).encode(signer or cohort.signing[device])


ROSTERS = {
    "another context (another model)": (
        lambda c: roster_of(c, context=c.__class__(n=5, model=bytes(31) + b"x").context.digest),
        "another context",
    ),
    "another attempt": (
        lambda c: roster_of(c, context=c.__class__(n=5, attempt=2).context.digest),
        "another context",
    ),
    "too few": (lambda c: roster_of(c, list(own(c))[:4]), "fewer than"),
    "the victim is missing": (
        lambda c: roster_of(c, [*list(own(c))[1:], stranger(c, "d900")]),
        "own advert",
    ),
    "the victim's keys were replaced": (
        lambda c: roster_of(c, [advert(c, VICTIM, share_key=other_key()), *list(own(c))[1:]]),
        "own advert",
    ),
    "an advert is not signed by its device": (
        lambda c: roster_of(c, [*list(own(c))[:4], advert(c, "d004", share_key=other_key())[:-1] + b"\0"]),
        "not signed",
    ),
    "an advert is signed by another key": (
        lambda c: roster_of(c, [*list(own(c))[:4], advert(c, "d004", signer=c.signing["d003"])]),
        "not signed",
    ),
    "a device with a key of its own making": (
        lambda c: roster_of(c, [*list(own(c))[:4], stranger(c, "d004")]),
        "not the one on the list",
    ),
    "a device that nobody enrolled": (
        lambda c: roster_of(c, [*own(c), stranger(c, "d900")]),
        "not the one on the list",
    ),
    "a device twice": (lambda c: roster_of(c, [*own(c), list(own(c))[4]]), "in order"),
    "not in order": (lambda c: roster_of(c, list(own(c))[::-1]), "in order"),
    "a copied mask key": (
        lambda c: roster_of(
            c,
            [*list(own(c))[:4], advert(c, "d004", mask_key=Advert.decode(c.prekeys[VICTIM].advert).mask_key)],
        ),
        "key occurs twice",
    ),
    "one key for both uses": (
        lambda c: roster_of(
            c,
            [
                *list(own(c))[:4],
                advert(c, "d004", mask_key=Advert.decode(c.prekeys["d004"].advert).share_key),
            ],
        ),
        "two uses",
    ),
    "a copied key in another encoding": (
        lambda c: roster_of(
            c, [*list(own(c))[:4], advert(c, "d004", mask_key=flip_high(c.prekeys[VICTIM].advert))]
        ),
        "canonical",
    ),
    "a key of small order": (
        lambda c: roster_of(c, [*list(own(c))[:4], advert(c, "d004", share_key=bytes(32))]),
        "small order",
    ),
    "an expired advert": (
        lambda c: roster_of(c, [*list(own(c))[:4], advert(c, "d004", not_after=int(NOW) - 1)]),
        "expired",
    ),
    "an advert of another deployment": (
        lambda c: roster_of(c, [*list(own(c))[:4], advert(c, "d004", deployment="other")]),
        "another deployment",
    ),
    "nothing": (lambda c: b"", "expected"),
    "left-over bytes": (lambda c: c.server.roster() + b"\0", "left over"),
    "a count bomb": (lambda c: c.server.roster()[:38] + b"\xff\xff", "roster of 65535"),
    "another message": (lambda c: b"flsa\x01\x04" + c.server.roster()[6:], "expected 2"),
    "another version": (lambda c: b"flsa\x02\x02" + c.server.roster()[6:], "not a frame"),
}


def own(cohort):
    return Roster.decode(cohort.server.roster()).adverts


def other_key():
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def flip_high(message):
    key = bytearray(Advert.decode(message).mask_key)
    key[31] |= 0x80
    return bytes(key)


def stranger(cohort, device):
    return Prekey.make(device, "lab", Ed25519PrivateKey.generate(), b"", FAR, os.urandom).advert


@pytest.mark.parametrize("attack", ROSTERS)
def test_a_bad_roster(make, attack):
    cohort = make(n=5)
    build, match = ROSTERS[attack]
    refused(cohort, show(cohort, build(cohort)), match)


def test_a_second_roster(make):
    cohort = make(n=5)
    cohort.share()
    refused(
        cohort,
        show(cohort, roster_of(cohort, [*own(cohort)[:4], cohort.prekeys["d004"].advert, b""])),
        "second",
    )


def test_a_context_below_the_devices_policy(make):
    cohort = make(n=5)
    with pytest.raises(TrustError, match="wants 16"):
        cohort.session(VICTIM, policy=Policy())


def at_delivery(make, **options):
    cohort = make(n=7, **options)
    cohort.share()
    cohort.close()
    return cohort


DELIVERIES = {
    "for another roster": (lambda d: replace(d, roster=bytes(32)), "another roster"),
    "for another device": (
        lambda d: Delivery(d.roster, 1, d.dealers, {p if p != 1 else 0: v for p, v in d.parts.items()}),
        "another device",
    ),
    "without the victim": (lambda d: replace(d, dealers=d.dealers - {0}), "without this device"),
    "too few dealers": (
        lambda d: replace(d, dealers=frozenset(range(4)), parts={p: d.parts[p] for p in (1, 2, 3)}),
        "usable shares of 4",
    ),
    "too many garbled": (
        lambda d: replace(d, parts={p: (bytes(80), v[1]) if p > 3 else v for p, v in d.parts.items()}),
        "usable shares of 4",
    ),
    "swapped ciphertexts": (
        lambda d: replace(d, parts={p: d.parts[7 - p] for p in d.parts}),
        "usable shares of 1",
    ),
}


@pytest.mark.parametrize("attack", DELIVERIES)
def test_a_bad_delivery(make, attack):
    cohort = at_delivery(make)
    change, match = DELIVERIES[attack]
    delivery = Delivery.decode(cohort.server.delivery(VICTIM), 7)
    message = change(delivery).encode(7)
    refused(cohort, lambda: cohort.sessions[VICTIM].deliver(message), match)


def test_a_second_delivery_and_a_vector_out_of_turn(make):
    cohort = at_delivery(make)
    cohort.deliver()
    refused(cohort, lambda: cohort.sessions[VICTIM].deliver(cohort.server.delivery("d001")), "second")
    early = make(n=5)
    vector = np.zeros(early.context.length, "<u4")
    refused(early, lambda: early.sessions[VICTIM].mask(vector), "before the shares")
    out_of_turn = make(n=5)
    refused(out_of_turn, lambda: out_of_turn.sessions[VICTIM].deliver(b""), "out of turn")


def test_split_rosters_do_not_mix(make):
    """Devices that were shown different rosters cannot use each other's shares."""
    cohort = make(n=7)
    replaced = Prekey.make("d006", "lab", cohort.signing["d006"], b"", FAR, os.urandom)
    other = roster_of(cohort, [*own(cohort)[:6], replaced.advert])
    made = cohort.share(cohort.devices[1:], send=False)
    cohort.sessions[VICTIM].share_keys(other, os.urandom, NOW)
    victim = cohort.sessions[VICTIM]
    decoded = {i: Shares.decode(made[f"d{i:03}"], 7) for i in range(1, 7)}
    parts = {i: (s.sealed_for(0), s.committed_to(0)) for i, s in decoded.items()}
    message = Delivery(victim._r, 0, frozenset(range(7)), parts).encode(7)
    refused(cohort, lambda: victim.deliver(message), "usable shares of 1")


def test_a_replayed_advert_brings_no_share(make):
    """A device whose old advert is put into a roster has nothing to say under it: it is never a survivor."""
    cohort = make(n=7)
    cohort.share(cohort.devices[:6])
    cohort.close()
    assert 6 not in cohort.server._dealers
    cohort.deliver(cohort.devices[:6])
    cohort.upload(cohort.devices[:6])
    cohort.close()
    everyone = Survivors(cohort.server._r, cohort.server._dealers_digest, frozenset(range(7))).encode(7)
    refused(cohort, lambda: cohort.sessions[VICTIM].consent(everyone), "does not have")


# --- survivors and certificates


def at_consent(make, **options):
    return make(n=7, **options).to(Stage.CONSENTS)


def proposal(cohort, members, **changes):
    real = Survivors.decode(cohort.server.survivors(), 7)
    return replace(real, members=frozenset(members), **changes).encode(7)


SURVIVORS = {
    "too few": (lambda c: proposal(c, range(4)), "4 survivors, 5 needed"),
    "without the victim": (lambda c: proposal(c, range(1, 7)), "without this device"),
    "other dealers": (lambda c: proposal(c, range(7), dealers=bytes(32)), "other dealers"),
    "another roster": (lambda c: proposal(c, range(7), roster=bytes(32)), "another roster"),
    "a padding bit": (lambda c: c.server.survivors()[:-1] + b"\xff", "bitmap"),
    "cut off": (lambda c: c.server.survivors()[:-1], "expected"),
}


@pytest.mark.parametrize("attack", SURVIVORS)
def test_bad_survivors(make, attack):
    cohort = at_consent(make)
    build, match = SURVIVORS[attack]
    refused(cohort, lambda: cohort.sessions[VICTIM].consent(build(cohort)), match)


def test_a_second_survivor_set(make):
    cohort = at_consent(make)
    cohort.sessions[VICTIM].consent(cohort.server.survivors())
    refused(cohort, lambda: cohort.sessions[VICTIM].consent(proposal(cohort, range(6))), "second")


def test_a_second_survivor_set_in_another_attempt(make):
    """The ledger outlives the session: an attempt with other survivors gets no signature."""
    cohort = at_consent(make)
    cohort.sessions[VICTIM].consent(cohort.server.survivors())
    for context in ({"attempt": 2}, {"cohort": 1}):
        again = make(n=7, name="again", ledgers=cohort.ledgers, **context).to(Stage.UPLOADS)
        again.deliver([VICTIM])
        refused(again, lambda c=again: c.upload([VICTIM]), "another vector")
    next_round = make(n=7, round=4, name="next", ledgers=cohort.ledgers).to(Stage.CONSENTS)
    next_round.consent()


def two_rosters(make):
    """Two attempts at one round whose sums would differ by x0 - x4; d003 sides with the coordinator."""
    one = make(n=4, name="one")
    ledgers = one.ledgers | {"d003": MemoryLedger(), "d004": MemoryLedger()}
    two = make(n=4, name="two", attempt=2, ledgers=ledgers, devices=["d001", "d002", "d003", "d004"])
    return one, two


def uploaded(cohort):
    cohort.to(Stage.UPLOADS)
    cohort.deliver()
    cohort.upload()
    cohort.close()
    return cohort


def test_two_rosters_of_one_round_do_not_both_get_their_quorum(make):
    """Each quorum of three could be signed by two honest devices that sign nothing else."""
    one, two = map(uploaded, two_rosters(make))
    one.consent(["d000", "d003"])
    for device in ("d001", "d002"):  # whose last vectors were given in the second attempt
        refused(one, lambda d=device: one.sessions[d].consent(one.server.survivors()), "given up", device)
    with pytest.raises(QuorumError):
        one.close()
    two.consent(["d002", "d003", "d004"])
    two.close()
    two.reveal(["d002", "d003", "d004"])
    assert two.server.finish().total is not None  # this one sum, and no other


def test_who_has_signed_is_in_no_later_sum_of_its_round(make):
    one, two = two_rosters(make)
    uploaded(one).consent(["d000", "d001", "d003"])
    one.close()  # certified
    two.to(Stage.UPLOADS)
    two.deliver()
    refused(two, lambda: two.upload(["d001"]), "another vector", "d001")
    two.upload(["d002", "d003", "d004"])
    two.close()
    assert "d001" not in two.server.expected()
    two.consent(["d002", "d003", "d004"])  # x0 + x1 stay together in what both sums tell


def test_vectors_are_given_in_ever_later_attempts(make):
    one, two = two_rosters(make)
    uploaded(two)
    one.to(Stage.UPLOADS)
    one.deliver()
    refused(one, lambda: one.upload(["d001"]), "another vector", "d001")
    same = make(
        n=4, name="same", ledgers={d: two.ledgers[d] for d in two.devices}, attempt=2, devices=two.devices
    )
    same.to(Stage.UPLOADS)
    same.deliver()  # another roster of the same attempt, as of another cohort
    refused(same, lambda: same.upload(["d001"]), "another vector", "d001")


def test_alive_and_dead(make):
    """One device cannot be made to give both kinds of share of another: neither in one request nor in two."""
    cohort = at_consent(make)
    cohort.consent()
    cohort.close()
    session = cohort.sessions[VICTIM]
    revealed = Reveal.decode(session.reveal(cohort.server.certificate()), 7)
    assert set(revealed.shares) == set(range(7))
    assert all(len(share) == 32 for share in revealed.shares.values())
    smaller = proposal(cohort, range(6))
    refused(cohort, lambda: session.consent(smaller), "second")


def certificate(cohort, **changes):
    return replace(Certificate.decode(cohort.server.certificate(), 7), **changes).encode()


def forged(cohort, count, digest=None):
    """``count`` true signatures, then one of the aggregator's own making."""
    made = Certificate.decode(cohort.server.certificate(), 7)
    return certificate(cohort, signatures=(*made.signatures[:count], (6, bytes(64))))


def other_set(cohort):
    """Signatures of corrupted devices under another set."""
    digest = Survivors(cohort.server._r, cohort.server._dealers_digest, frozenset(range(6))).digest(
        cohort.context.digest, 7
    )
    signatures = tuple(
        (i, Consent(cohort.server._r, i, digest).encode(cohort.signing[f"d{i:03}"])[-64:]) for i in range(6)
    )
    return certificate(cohort, survivors=digest, signatures=signatures)


CERTIFICATES = {
    "too few": (
        lambda c: certificate(c, signatures=Certificate.decode(c.server.certificate(), 7).signatures[:4]),
        "4 signatures, 5 needed",
    ),
    "one forged": (lambda c: forged(c, 4), "not signed"),
    "one twice": (
        lambda c: certificate(
            c, signatures=(Certificate.decode(c.server.certificate(), 7).signatures[0],) * 5
        ),
        "ascending",
    ),
    "swapped signers": (
        lambda c: certificate(
            c,
            signatures=tuple(
                (i, s) for i, (_, s) in enumerate(Certificate.decode(c.server.certificate(), 7).signatures, 1)
            ),
        ),
        "not signed",
    ),
    "for another set": (other_set, "another survivor set"),
    "another roster": (lambda c: certificate(c, roster=bytes(32)), "another roster"),
    "none": (lambda c: certificate(c, signatures=()), "0 signatures"),
    "a count bomb": (lambda c: c.server.certificate()[:70] + b"\xff\xff", "65535 signatures"),
}


@pytest.mark.parametrize("attack", CERTIFICATES)
def test_a_bad_certificate(make, attack):
    cohort = at_consent(make)
    cohort.consent()
    cohort.close()
    build, match = CERTIFICATES[attack]
    refused(cohort, lambda: cohort.sessions[VICTIM].reveal(build(cohort)), match)


def test_no_share_without_having_signed(make):
    cohort = at_consent(make)
    cohort.consent(cohort.devices[1:])
    cohort.close()
    refused(cohort, lambda: cohort.sessions[VICTIM].reveal(cohort.server.certificate()), "out of turn")


def test_signatures_of_the_dropped_do_not_count(make):
    cohort = make(n=7)
    cohort.share()
    cohort.close()
    alive = cohort.devices[:5]
    cohort.deliver(alive)
    cohort.upload(alive)
    cohort.close()
    cohort.consent(alive)
    digest = cohort.server._survivors_digest()
    made = [
        (i, Consent(cohort.server._r, i, digest).encode(cohort.signing[f"d{i:03}"])[-64:])
        for i in (1, 2, 3, 4, 6)
    ]
    message = Certificate(cohort.server._r, digest, tuple(made)).encode()
    refused(cohort, lambda: cohort.sessions[VICTIM].reveal(message), "no survivor")


# --- every byte of every message


def flips(message, step):
    for place in range(0, len(message), step):
        changed = bytearray(message)
        changed[place] ^= 1 << (place % 8)
        yield bytes(changed)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (2, 37),
        (4, 17),
        (6, 1),
        (8, 9),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
    ],
)
def test_every_altered_message_is_refused_or_harmless(make, number, step):
    """Flip a bit of every (few) bytes of what the coordinator sends: a refusal, or the same bytes.

    A delivery is the exception that the protocol wants: an altered share is complained about by name, and
    what the device sends is signed for exactly the shares that it could use.
    """
    reference = make(n=5)
    real = reference.run()
    assert real.total is not None
    message = {
        2: reference.log["roster"],
        4: reference.log["deliveries"][VICTIM],
        6: reference.log["survivors"],
        8: reference.log["certificate"],
    }[number]
    for changed in flips(message, step):
        cohort = make(n=5)
        session = cohort.sessions[VICTIM]
        try:
            shares = session.share_keys(
                changed if number == 2 else reference.log["roster"], cohort.streams[VICTIM], NOW
            )
            assert shares == reference.log["shares"][VICTIM]
            complaints = session.deliver(changed if number == 4 else reference.log["deliveries"][VICTIM])
            assert len(complaints) <= 1
            upload, _ = session.mask(cohort.inputs[VICTIM].copy())
            if complaints:
                assert number == 4
                assert Upload.decode(upload, 5).complaints
                with pytest.raises(TrustError, match="does not have"):
                    session.consent(reference.log["survivors"])
                continue
            assert upload == reference.log["uploads"][VICTIM][0]
            consent = session.consent(changed if number == 6 else reference.log["survivors"])
            assert consent == reference.log["consents"][VICTIM]
            reveal = session.reveal(changed if number == 8 else reference.log["certificate"])
            assert reveal == reference.log["reveals"][VICTIM]
        except TrustError:
            assert session.refused


# --- devices that attack ------------------------------------------------------------------------------------


def state(cohort):
    server = cohort.server
    return (
        server.stage,
        server.heard(),
        server.blames,
        bytes(server.intake.total.tobytes()),
        len(cohort.records),
    )


def rejected(cohort, device, message, error=UpdateRejected, reason=None):
    before = state(cohort)
    with pytest.raises(error) as caught:
        cohort.accept(device, message)
    if reason is not None:
        assert caught.value.reason is reason
    assert state(cohort) == before


def test_bad_adverts(make):
    cohort = make(n=5, advertise=False)
    cohort.accept("d000", cohort.prekeys["d000"].advert)
    first = Advert.decode(cohort.prekeys["d000"].advert)
    rejected(cohort, "d001", cohort.prekeys["d002"].advert, TrustError)
    rejected(cohort, "d001", advert(cohort, "d001", signer=cohort.signing["d002"]), TrustError)
    rejected(cohort, "d001", advert(cohort, "d001", deployment="other"), TrustError)
    rejected(cohort, "d001", stranger(cohort, "d001"), TrustError)
    rejected(cohort, "d001", advert(cohort, "d001", not_after=1), reason=Rejection.REPLAYED)
    rejected(cohort, "d001", advert(cohort, "d001", mask_key=bytes(32)), reason=Rejection.MALFORMED)
    rejected(cohort, "d001", advert(cohort, "d001", mask_key=first.mask_key), reason=Rejection.MALFORMED)
    rejected(cohort, "d001", advert(cohort, "d001", share_key=first.mask_key), reason=Rejection.MALFORMED)
    rejected(cohort, "d001", b"", reason=Rejection.MALFORMED)
    rejected(cohort, "d000", advert(cohort, "d000", not_after=FAR - 1), reason=Rejection.DUPLICATE)


def test_messages_out_of_place(make):
    cohort = make(n=5)
    rejected(cohort, "d900", b"", reason=Rejection.NOT_SELECTED)
    made = cohort.share(send=False)
    rejected(cohort, "d001", made["d000"], TrustError)
    rejected(cohort, "d000", made["d000"][:-1], reason=Rejection.MALFORMED)
    rejected(cohort, "d000", made["d000"] + b"\0", reason=Rejection.MALFORMED)
    rejected(cohort, "d000", made["d000"][:-1] + bytes([made["d000"][-1] ^ 1]), TrustError)
    rejected(cohort, "d000", cohort.prekeys["d000"].advert + b"x", reason=Rejection.LATE)
    other = make(n=5, name="other")
    rejected(cohort, "d000", other.share(send=False)["d000"], reason=Rejection.REPLAYED)
    with pytest.raises(UpdateRejected) as caught:
        cohort.server.chunk("d000", 0, b"x")
    assert caught.value.reason is Rejection.LATE
    for d in cohort.devices[1:]:
        cohort.accept(d, made[d])
    second = replace(Shares.decode(made["d001"], 5), sealed=bytes(4 * 80)).encode(cohort.signing["d001"])
    rejected(cohort, "d001", second, reason=Rejection.DUPLICATE)
    cohort.close()
    rejected(cohort, "d000", made["d000"], reason=Rejection.LATE)
    with pytest.raises(UpdateRejected) as caught:
        cohort.server.delivery("d000")
    assert caught.value.reason is Rejection.NOT_SELECTED
    with pytest.raises(UpdateRejected):
        cohort.server.chunk("d000", 0, b"x")


def test_two_uploads_are_evidence(make):
    cohort = at_delivery(make)
    cohort.deliver()
    uploads = cohort.upload()
    second = replace(Upload.decode(uploads["d003"][0], 7), vector=bytes(32)).encode(7, cohort.signing["d003"])
    total = cohort.server.intake.total.copy()
    with pytest.raises(UpdateRejected, match="two different"):
        cohort.accept("d003", second)
    (blame,) = cohort.server.blames
    assert (blame.device, blame.fault, blame.proven) == ("d003", Fault.TWO_UPLOADS, True)
    assert Blame.decode(blame.encode()) == blame
    assert uploads["d003"][0] in blame.evidence
    assert second in blame.evidence
    rejected(cohort, "d003", second, reason=Rejection.DUPLICATE)
    assert (cohort.server.intake.total == total).all()


def test_uploads_that_do_not_fit(make):
    cohort = at_delivery(make)
    cohort.deliver()
    tail, body = cohort.upload(send=False)["d000"]
    with pytest.raises(UpdateRejected) as caught:
        cohort.server.chunk("d000", 0, body + b"\0")
    assert caught.value.reason is Rejection.WRONG_SHAPE
    cohort.server.chunk("d000", 0, body)
    decoded, sign = Upload.decode(tail, 7), cohort.signing["d000"]
    rejected(cohort, "d000", replace(decoded, dealers=bytes(32)).encode(7, sign), reason=Rejection.REPLAYED)
    rejected(cohort, "d000", replace(decoded, vector=bytes(32)).encode(7, sign), reason=Rejection.MALFORMED)
    own_name = replace(decoded, complaints=frozenset([0])).encode(7, sign)
    rejected(cohort, "d000", own_name, reason=Rejection.MALFORMED)
    cohort.accept("d000", tail)
    late = at_delivery(make)
    late.deliver()
    made = late.upload(send=False)
    for d in late.devices[1:]:
        late.server.chunk(d, 0, made[d][1])
        late.accept(d, made[d][0])
    late.close()
    with pytest.raises(UpdateRejected):
        late.server.chunk("d000", 0, made["d000"][1])
    rejected(late, "d000", made["d000"][0], reason=Rejection.LATE)


def reshared(cohort, dealer, message, change):
    """The dealer's shares with some plaintexts changed, and commitments that fit them."""
    n, r, name = cohort.server.n, cohort.server._r or cohort.sessions[dealer]._r, dealer
    i, decoded = cohort.devices.index(name), Shares.decode(message, n)
    session = cohort.sessions[name]
    sealed, promised = [], []
    for j in range(n):
        if j == i:
            promised.append(decoded.committed_to(j))
            continue
        peer = session._peers[j]
        key = sealing_key(agree(session._share_key, peer.share_key), r, i, j)
        fake = change(j)
        if fake is None:
            sealed.append(decoded.sealed_for(j))
            promised.append(decoded.committed_to(j))
        else:
            sealed.append(seal(key, fake, r, i, j))
            promised.append(commit_share(r, i, j, b"b", fake[:32]) + commit_share(r, i, j, b"m", fake[32:]))
    return Shares(r, i, b"".join(sealed), b"".join(promised)).encode(cohort.signing[name])


def with_bad_dealer(make, change, n=7, dealer="d002"):
    cohort = make(n=n)
    made = cohort.share(send=False)
    made[dealer] = change(cohort, made[dealer])
    for d, message in made.items():
        cohort.accept(d, message)
    cohort.close()
    cohort.deliver()
    return cohort


def finish(cohort):
    cohort.upload()
    cohort.close()
    members = cohort.server.expected()
    for d in sorted(members):
        try:
            cohort.consent([d])
        except TrustError:
            continue
    cohort.close()
    for d in sorted(members):
        if not cohort.sessions[d].refused:
            cohort.reveal([d])
    return cohort.server.finish()


def test_poisoned_shares_end_in_blame(make):
    """Shares that open, fit their commitments, and make up no secret: no sum, and the dealer is named."""
    wrong = pack(np.arange(32))
    cohort = with_bad_dealer(make, lambda c, m: reshared(c, "d002", m, lambda j: wrong))
    outcome = finish(cohort)
    assert outcome.total is None
    assert [(b.device, b.fault) for b in outcome.blames] == [("d002", Fault.POISONED_SHARES)]
    assert "d002" in outcome.reason


def test_a_few_poisoned_shares_do_not_stop_the_round(make):
    wrong = pack(np.arange(32))
    cohort = with_bad_dealer(make, lambda c, m: reshared(c, "d002", m, lambda j: wrong if j < 2 else None))
    outcome = finish(cohort)
    assert (outcome.total == cohort.plain_sum(cohort.devices)).all()


def garbled(holders):
    def change(cohort, message):
        decoded, sealed = Shares.decode(message, cohort.server.n), bytearray()
        for j in range(cohort.server.n):
            if j != 2:
                sealed += bytes(80) if j in holders else decoded.sealed_for(j)
        return replace(decoded, sealed=bytes(sealed)).encode(cohort.signing["d002"])

    return change


def test_garbled_shares_for_many_convict_the_dealer_and_the_round_goes_on(make):
    cohort = with_bad_dealer(make, garbled({0, 1, 3, 4, 5}), n=13)
    assert cohort.sessions["d000"].deliver(cohort.server.delivery("d000")) == ("d002",)
    outcome = finish(cohort)
    assert [(b.device, b.fault) for b in outcome.blames] == [("d002", Fault.BAD_SHARES)]
    alive = [d for d in cohort.devices if d != "d002"]
    assert outcome.survivors == tuple(alive)
    assert (outcome.total == cohort.plain_sum(alive)).all()


def test_garbled_shares_for_too_many_end_the_attempt_before_anybody_signs(make):
    cohort = with_bad_dealer(make, garbled({0, 1, 3}))
    cohort.upload()
    for _ in range(2):
        with pytest.raises(QuorumError, match="usable shares of d002"):
            cohort.close()
        assert [(b.device, b.fault) for b in cohort.server.blames] == [("d002", Fault.BAD_SHARES)]
    assert cohort.server.stage is Stage.UPLOADS
    assert not any(ledger._signed for ledger in cohort.ledgers.values())
    again = make(n=6, attempt=2, name="again", ledgers=cohort.ledgers)
    assert again.run().total is not None


def test_garbled_shares_for_one_cost_one_signature(make):
    cohort = with_bad_dealer(make, garbled({4}))
    outcome = finish(cohort)
    assert outcome.blames == ()
    assert "d002" in outcome.survivors
    assert (outcome.total == cohort.plain_sum(cohort.devices)).all()
    assert cohort.sessions["d004"].refused


@pytest.mark.parametrize("kind", ["not canonical", "not what was committed to"])
def test_shares_that_open_but_are_wrong_are_complained_about(make, kind):
    fake = b"\xff" * 64

    def change(cohort, message):
        made = Shares.decode(reshared(cohort, "d002", message, lambda j: fake if j == 4 else None), 7)
        if kind != "not canonical":
            made = replace(made, sealed=Shares.decode(message, 7).sealed)
        return made.encode(cohort.signing["d002"])

    cohort = with_bad_dealer(make, change)
    assert cohort.sessions["d004"].deliver(cohort.server.delivery("d004")) == ("d002",)
    assert finish(cohort).total is not None


def test_false_complaints_convict_the_complainer(make):
    cohort = at_delivery(make)
    cohort.deliver()
    for d, (tail, body) in cohort.upload(send=False).items():
        message = tail
        if d == "d005":
            lie = replace(Upload.decode(tail, 7), complaints=frozenset([0, 1, 2]))
            message = lie.encode(7, cohort.signing[d])
        cohort.server.chunk(d, 0, body)
        cohort.accept(d, message)
    cohort.close()
    assert [(b.device, b.fault) for b in cohort.server.blames] == [("d005", Fault.FALSE_COMPLAINTS)]
    assert cohort.server.expected() == set(cohort.devices) - {"d005"}
    alive = [d for d in cohort.devices if d != "d005"]
    cohort.consent(alive)
    cohort.close()
    cohort.reveal(alive)
    assert (cohort.server.finish().total == cohort.plain_sum(alive)).all()


def reveals(make, change, who="d001"):
    cohort = at_consent(make)
    cohort.consent()
    cohort.close()
    for d in cohort.devices:
        message = cohort.sessions[d].reveal(cohort.server.certificate())
        if d == who:
            message = change(Reveal.decode(message, 7)).encode(7, cohort.signing[d])
        cohort.accept(d, message)
    return cohort


def test_a_wrong_share_is_dropped_and_blamed(make):
    cohort = reveals(make, lambda r: replace(r, shares=r.shares | {3: bytes(32)}))
    outcome = cohort.server.finish()
    assert [(b.device, b.fault) for b in outcome.blames] == [("d001", Fault.WRONG_SHARE)]
    assert (outcome.total == cohort.plain_sum(cohort.devices)).all()


def test_a_withheld_share_is_blamed_and_the_rest_is_used(make):
    cohort = reveals(make, lambda r: replace(r, shares={k: v for k, v in r.shares.items() if k != 3}))
    outcome = cohort.server.finish()
    assert [(b.device, b.fault) for b in outcome.blames] == [("d001", Fault.WITHHELD_SHARES)]
    assert (outcome.total == cohort.plain_sum(cohort.devices)).all()


def test_reveals_that_do_not_decode(make):
    cohort = at_consent(make)
    cohort.consent()
    cohort.close()
    message = cohort.sessions["d001"].reveal(cohort.server.certificate())
    decoded, sign = Reveal.decode(message, 7), cohort.signing["d001"]
    big = (65521).to_bytes(2, "little") + bytes(30)
    frame = replace(decoded, shares=decoded.shares | {0: big}).encode(7, sign)
    rejected(cohort, "d001", frame, reason=Rejection.MALFORMED)
    rejected(cohort, "d001", replace(decoded, survivors=bytes(32)).encode(7, sign), reason=Rejection.REPLAYED)
    short = sign_frame(message[:-96], sign)
    rejected(cohort, "d001", short, reason=Rejection.MALFORMED)
    cohort.accept("d001", message)


def test_consents_for_another_set_do_not_count(make):
    cohort = at_consent(make)
    fake = Consent(cohort.server._r, 1, bytes(32)).encode(cohort.signing["d001"])
    rejected(cohort, "d001", fake, reason=Rejection.REPLAYED)
    with pytest.raises(QuorumError):
        cohort.close()


def test_after_the_end_nothing_counts(make):
    cohort = at_consent(make)
    cohort.consent()
    cohort.close()
    reveal_messages = cohort.reveal(cohort.devices[:6])
    cohort.server.finish()
    rejected(
        cohort, "d006", cohort.sessions["d006"].reveal(cohort.server.certificate()), reason=Rejection.LATE
    )
    cohort.accept("d000", reveal_messages["d000"])
    with pytest.raises(QuorumError):
        cohort.close()


def test_random_bytes_never_do_more_than_be_refused(make):
    random = np.random.default_rng(7)
    cohort = at_consent(make)
    samples = [cohort.sessions[d].consent(cohort.server.survivors()) for d in cohort.devices]
    for _ in range(200):
        message = bytearray(samples[random.integers(len(samples))])
        for _ in range(random.integers(1, 4)):
            message[random.integers(len(message))] = random.integers(256)
        before = state(cohort)
        device = cohort.devices[random.integers(7)]
        if bytes(message) in samples:
            continue
        with pytest.raises(LeptonError):
            cohort.accept(device, bytes(message))
        assert state(cohort) == before
    with pytest.raises(UpdateRejected):
        message_number(b"xyz")
    assert message_number(samples[0]) == 7


# --- complaints ---------------------------------------------------------------------------------------------


def settle(n, complaints):
    rules = Rules(min_cohort=4)
    full = {i: frozenset(complaints.get(i, ())) for i in range(n)}
    return settle_complaints(
        frozenset(range(n)), full, rules.corrupted(n), rules.quorum(n), rules.least_survivors(n)
    )


def test_no_complaints_no_change():
    settled = settle(10, {})
    assert settled.members == settled.signers == set(range(10))
    assert not settled.culprits


def test_a_dispute_blames_nobody():
    settled = settle(10, {0: [1]})
    assert not settled.culprits
    assert settled.members == set(range(10))
    assert settled.signers == set(range(10)) - {0}


def test_the_dealer_is_left_out_when_signatures_are_scarce():
    settled = settle(10, {0: [1], 2: [1], 3: [1]})
    assert not settled.culprits  # three may be corrupted
    assert settled.members == set(range(10)) - {1}
    assert settled.signers == settled.members


def test_liars_do_not_convict_the_honest():
    """Three of ten lie about the same three honest devices: nobody honest is blamed."""
    settled = settle(10, {i: [5, 6, 7] for i in range(3)})
    assert not settled.culprits
    assert len(settled.signers) >= Rules.quorum(10)
    assert len(settled.members) >= Rules().least_survivors(10)
