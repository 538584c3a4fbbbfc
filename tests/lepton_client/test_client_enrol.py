"""Enrolment and renewal over TLS: tokens, lost answers, impostors."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from lepton_client.enrol import enrol, renew
from lepton_client.link import Link, Refused, UntrustedServer
from lepton_client.state import StateDir
from lepton_fl import crypto
from lepton_fl.errors import ConfigError, ConnectionFailed, DiskFull, StateCorrupt, StateTooNew, TrustError
from lepton_fl.wire.v1 import device_pb2 as pb

pytestmark = pytest.mark.network


@pytest.fixture
def state(tmp_path):
    return StateDir(tmp_path / "state")


def join(state, token, **kwargs):
    with state.locked():
        return enrol(state, token, name="kitchen", timeout_s=5, **kwargs)


def test_a_token_gives_an_identity_with_private_files(coordinator, state):
    identity = join(state, coordinator.token(), groups=("home",))
    assert identity == state.identity()
    assert identity.device_id == crypto.device_id(crypto.load_key(state.key).public_key())
    for path in (state.key, state.folder / "identity.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity.valid_until - identity.valid_from == 86_400


def test_the_same_token_again_is_no_error_and_asks_nobody(coordinator, state):
    token = coordinator.token()
    first = join(state, token)
    coordinator.stop()
    assert join(state, token) == first


def test_another_token_does_not_replace_an_identity(coordinator, state):
    first = join(state, coordinator.token())
    with pytest.raises(ConfigError, match="enrolled already"):
        join(state, coordinator.token())
    assert state.identity() == first


def test_a_lost_answer_is_completed_by_the_same_command(coordinator, state):
    token = coordinator.token()
    coordinator.lose_enrolment_answer = True
    with pytest.raises(ConnectionFailed):
        join(state, token)
    assert not state.is_enrolled()
    key = state.key.read_bytes()
    identity = join(state, token)
    assert state.key.read_bytes() == key
    assert list(coordinator.secrets.values()) == [identity.device_id]


def test_a_used_token_is_refused_for_another_device(coordinator, state, tmp_path):
    token = coordinator.token()
    join(state, token)
    other = StateDir(tmp_path / "other")
    with pytest.raises(Refused, match="not valid"):
        join(other, token)
    assert not other.is_enrolled()


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_truncated_token_asks_nobody(coordinator, state, cut):
    with pytest.raises(TrustError, match="token"):
        join(state, coordinator.token()[:-cut])
    assert not state.key.exists()


def test_a_server_of_another_authority_gets_no_secret(coordinator, state):
    from lepton_fl.crypto import make_join_token, parse_join_token

    real = parse_join_token(coordinator.token())
    stranger = type(coordinator.authority)("stranger")
    forged = make_join_token(real.addr, stranger.der, real.secret)
    with pytest.raises(UntrustedServer, match="does not trust"):
        join(state, forged)
    assert not state.is_enrolled()
    assert coordinator.secrets[real.secret] is None


def test_a_certificate_for_another_key_is_not_kept(coordinator, state, monkeypatch):
    other = crypto.new_key().public_key()
    sign = coordinator.authority.device
    monkeypatch.setattr(coordinator.authority, "device", lambda key, **kw: sign(other, **kw))
    with pytest.raises(UntrustedServer, match="another key"):
        join(state, coordinator.token())
    assert not state.is_enrolled()


def test_nobody_there_is_a_connection_error(coordinator, state):
    token = coordinator.token()
    coordinator.stop()
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        join(state, token)


def test_a_disk_that_is_full_leaves_the_device_not_enrolled(coordinator, state, monkeypatch):
    def full(*_):
        raise DiskFull("no space")

    monkeypatch.setattr(state, "save_identity", full)
    token = coordinator.token()
    with pytest.raises(DiskFull):
        join(state, token)
    monkeypatch.undo()
    join(state, token)


def test_renewal_keeps_key_and_id(coordinator, state):
    identity = join(state, coordinator.token())
    with Link(identity.enrolment, identity.ca_pem.encode(), timeout_s=5) as link:
        renewed = renew(state, identity, link)
    assert renewed.device_id == identity.device_id
    assert renewed.certificate_pem != identity.certificate_pem
    assert state.identity() == renewed


KILLED = """
import os, signal, sys
from pathlib import Path
from lepton_client import state as module
from lepton_client.enrol import enrol
import lepton_fl.files as files
steps = iter(range(100))
replace = os.replace
def dying(source, target):
    when, at = sys.argv[3], Path(target).name
    if when == "before " + at:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if when == "after " + at:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = dying
state = module.StateDir(Path(sys.argv[1]))
with state.locked():
    enrol(state, sys.argv[2], name="kitchen", timeout_s=5)
"""


@pytest.mark.parametrize(
    "when", ["before device.key", "after device.key", "before identity.json", "after identity.json"]
)
def test_killed_at_any_step_the_same_token_completes_it(coordinator, state, when):
    token = coordinator.token()
    result = subprocess.run([sys.executable, "-c", KILLED, str(state.folder), token, when], timeout=60)
    assert result.returncode == -9
    assert state.is_enrolled() == (when == "after identity.json")
    identity = join(state, token)
    assert state.identity() == identity
    assert not list(state.folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", StateCorrupt),
        (b'{"format":1', StateCorrupt),
        (b'{"format":1}', StateCorrupt),
        (b"[]", StateCorrupt),
        (b'{"format":2}', StateTooNew),
    ],
)
def test_a_damaged_identity_is_named(coordinator, state, content, error):
    token = coordinator.token()
    join(state, token)
    path = state.folder / "identity.json"
    path.write_bytes(content)
    with pytest.raises(error, match=r"identity\.json"):
        join(state, token)


def test_an_identity_that_others_can_read_is_refused(coordinator, state):
    join(state, coordinator.token())
    os.chmod(state.folder / "identity.json", 0o644)
    with pytest.raises(TrustError, match="0644"):
        state.identity()


def test_threads_of_a_closed_link_end(coordinator):
    before = threading.active_count()
    with Link("127.0.0.1:1", coordinator.authority.pem, timeout_s=5) as link, pytest.raises(ConnectionFailed):
        link.check_in(pb.CheckInRequest())
    assert threading.active_count() <= before + 1
