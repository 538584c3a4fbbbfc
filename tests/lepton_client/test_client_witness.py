"""What a device keeps of the coordinator's privacy ledger, and that it sits out for an older one."""

from functools import lru_cache

import pytest

from lepton_client.agent import Agent
from lepton_client.enrol import enrol
from lepton_client.state import StateDir
from lepton_client.witness import GONE, Witness
from lepton_fl.crypto import new_key
from lepton_fl.errors import DiskFull, StateCorrupt
from lepton_fl.privacy.head import LedgerHead, sign_head
from lepton_fl.wire.v1 import device_pb2 as pb

KEY = new_key()


@lru_cache
def head(seq, digit="a", key=KEY):
    return sign_head(seq, digit * 64, key)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger_head.json"


def test_the_newest_head_is_kept_and_an_older_or_another_one_refused(path):
    witness = Witness(path, "ca")
    assert not witness.hear(None)  # there is no ledger yet
    assert witness.objection == ""
    for number in (3, 9, 9):
        witness.hear(head(number))
    assert witness.seen.seq == 9
    assert path.stat().st_mode & 0o777 == 0o600
    for told, words in (
        (head(8), "older copy"),
        (head(9, "b"), "gone on"),
        (head(10, key=new_key()), "another key"),
        (None, GONE),
        (LedgerHead(11, bytes(32), b"x", b"y"), "not signed"),
    ):
        assert witness.hear(told)
        assert words in witness.objection
        assert Witness(path, "ca").seen.seq == 9  # nothing of it was kept
        assert witness.hear(head(9))
        assert witness.objection == ""
    assert not witness.hear(head(12))
    assert Witness(path, "ca").seen.seq == 12


def test_another_coordinator_has_another_ledger(path):
    Witness(path, "one").hear(head(9))
    other = Witness(path, "two")
    assert other.seen is None
    other.hear(head(2, key=new_key()))
    assert other.objection == ""


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "coordinator": "x"'])
def test_a_damaged_file_is_not_taken_for_none(path, damage):
    Witness(path, "ca").hear(head(9))
    path.write_bytes(damage)
    with pytest.raises(StateCorrupt, match=str(path)) as caught:
        Witness(path, "ca")
    assert "Remove the file" in caught.value.hint


def test_a_head_that_cannot_be_kept_is_not_taken_as_kept(path, monkeypatch):
    witness = Witness(path, "ca")
    witness.hear(head(3))

    def full(*_):
        raise DiskFull("no space")

    monkeypatch.setattr("lepton_client.witness.write_private", full)
    with pytest.raises(DiskFull):
        witness.hear(head(4))
    assert witness.seen.seq == 3
    assert witness.objection == ""


# --- the agent ------------------------------------------------------------------------------------------


def told(made):
    return pb.LedgerHead(seq=made.seq, hash=made.hash, key=made.key, signature=made.signature)


@pytest.mark.network
def test_an_agent_sits_out_while_the_ledger_is_an_older_copy(coordinator, config, good_data, running):
    state = StateDir(config.client.state_dir)
    with state.locked():
        enrol(state, coordinator.token(), name="kitchen", timeout_s=5)
    coordinator.ledger = told(head(9))
    running(Agent(config, check=good_data))
    request = coordinator.heard(lambda r: r.HasField("ledger") and r.status == pb.STATUS_IDLE)
    assert (request.ledger.seq, request.ledger.hash) == (9, bytes.fromhex("a" * 64))
    coordinator.ledger = told(head(5))
    request = coordinator.heard(lambda r: r.status == pb.STATUS_NOT_ELIGIBLE)
    assert "older copy" in request.reason
    assert request.ledger.seq == 9  # it goes on showing what it has seen
    coordinator.ledger = None
    assert GONE in coordinator.heard(lambda r: "older copy" not in r.reason).reason
    coordinator.ledger = told(head(10, "c"))  # the right one was restored
    coordinator.heard(lambda r: r.status == pb.STATUS_IDLE and r.ledger.seq == 10)
