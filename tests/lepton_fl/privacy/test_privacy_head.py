"""Signed heads of a ledger: what follows from what was seen, and that nobody can invent one."""

from dataclasses import replace

import pytest

from lepton_fl.crypto import new_key
from lepton_fl.errors import StateCorrupt, TrustError
from lepton_fl.privacy.head import LedgerHead, sign_head

KEY = new_key()


def head(seq, digit="a", key=KEY):
    return sign_head(seq, digit * 64, key)


def test_a_ledger_only_grows():
    kept = head(7)
    kept.check()
    assert head(1).objection(None) == ""
    assert head(7).objection(kept) == head(8, "b").objection(kept) == ""
    assert "older copy" in head(6).objection(kept)
    assert "gone on from an older copy" in head(7, "b").objection(kept)
    assert "another key" in head(8, key=new_key()).objection(kept)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 8},
        {"seq": 0},
        {"seq": 2**63},
        {"hash": bytes(32)},
        {"hash": b""},
        {"key": b""},
        {"key": bytes(10**4)},
        {"signature": b""},
        {"signature": bytes(10**4)},
    ],
)
def test_an_altered_head_is_refused(change):
    with pytest.raises(TrustError):
        replace(head(7), **change).check()


def test_a_head_of_another_key_is_refused():
    stolen = replace(head(7), signature=head(7, key=new_key()).signature)
    with pytest.raises(TrustError):
        stolen.check()


def test_as_json():
    made = head(7)
    assert LedgerHead.from_json(made.to_json()) == made
    for damaged in ({}, None, [], made.to_json() | {"seq": "x"}, made.to_json() | {"hash": "zz"}):
        with pytest.raises(StateCorrupt):
            LedgerHead.from_json(damaged)
