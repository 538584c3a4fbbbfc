"""Checks that one process makes once for many devices: the same answers, and no trust in what failed."""

from dataclasses import replace

import pytest

from lepton_fl.errors import LeptonError, TrustError
from lepton_fl.secagg import checks as module
from lepton_fl.secagg import messages
from lepton_fl.secagg.checks import Checks, SharedChecks
from lepton_fl.secagg.messages import Certificate
from lepton_fl.secagg.server import Stage


@pytest.fixture
def counted(monkeypatch):
    """How many signatures were verified."""
    calls, verify = [], messages.verify

    def counting(*args):
        calls.append(args)
        verify(*args)

    monkeypatch.setattr(messages, "verify", counting)
    monkeypatch.setattr(module, "verify", counting)
    return calls


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_roster_is_read_as_always_and_verified_once(make, counted):
    server = make(n=7).server
    roster, context = server.roster(), server.context.digest
    counted.clear()
    shared, plain = SharedChecks(), Checks()
    assert shared.cohort(roster, context) == plain.cohort(roster, context)
    assert len(counted) == 14
    assert shared.cohort(bytes(bytearray(roster)), context) is shared.cohort(roster, context)
    for checks in (shared, plain):
        with pytest.raises(TrustError, match="another context"):
            checks.cohort(roster, bytes(32))  # no signature is looked at
    assert len(counted) == 14


def test_a_certificate_is_verified_once_for_its_own_roster(make, counted):
    cohort = make(n=7).to(Stage.REVEALS)
    certificate = Certificate.decode(cohort.server.certificate(), 7)
    shared = SharedChecks()
    own = shared.cohort(cohort.server.roster(), cohort.server.context.digest)
    counted.clear()
    for _ in range(3):
        shared.consents(own, certificate)
    assert len(counted) == 5
    foreign = make(n=7, name="other").server
    other = Checks().cohort(foreign.roster(), foreign.context.digest)
    with pytest.raises(LeptonError):
        shared.consents(other, certificate)


def test_whatever_byte_is_altered_the_answers_are_those_of_the_plain_checks(make):
    cohort = make(n=4).to(Stage.REVEALS)
    roster, certificate = cohort.server.roster(), cohort.server.certificate()
    shared = SharedChecks()
    context = cohort.server.context.digest
    own = shared.cohort(roster, context)
    shared.consents(own, Certificate.decode(certificate, 4))

    def told(checks, data):
        try:
            return checks.cohort(data, context)
        except LeptonError as error:
            return str(error)

    for place in range(0, len(roster), 7):
        bad = flipped(roster, place)
        assert told(shared, bad) == told(Checks(), bad) == told(shared, bad)  # nor is a failure remembered
    first = Certificate.decode(certificate, 4)
    (sender, signature), *rest = first.signatures
    for place in range(64):
        false = replace(first, signatures=((sender, flipped(signature, place)), *rest))
        for _ in range(2):
            with pytest.raises(LeptonError):
                shared.consents(own, false)


def test_what_is_remembered_is_bounded(make):
    shared = SharedChecks()
    servers = [make(n=4, name=f"c{i}").server for i in range(module._MOST + 3)]
    keys = [(server.roster(), server.context.digest) for server in servers]
    for key in keys:
        shared.cohort(*key)
    assert len(shared._cohorts) == module._MOST
    assert keys[0] not in shared._cohorts
