"""This device's seat in secure rounds: which authority it believes, and what it keeps."""

import json
import stat
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_client.config import ClientSection
from lepton_client.secure import Seat, deployment, signing_key
from lepton_client.state import Identity, StateDir
from lepton_fl import crypto
from lepton_fl.errors import StateCorrupt, TrustError
from lepton_fl.files import canonical_json, write_private
from lepton_fl.secagg.identity import issue, read_request
from lepton_fl.wire.v1 import device_pb2 as pb
from lepton_server.authority import Authority


class Coordinator:
    """The other end of ``Link.certify``; it may lie."""

    def __init__(self, name):
        self.name, self.authority = name, Ed25519PrivateKey.generate()
        self.shown, self.signer, self.pending = self.authority, self.authority, False

    @property
    def public(self):
        return self.shown.public_key().public_bytes_raw()

    def certify(self, request):
        device, key = read_request(request.request, self.name)
        credential = issue(self.signer, self.name, device, key, int(time.time()) + 3600)
        return pb.CertifyResponse(authority=self.public, credential=b"" if self.pending else credential)


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path / "device")
    crypto.save_key(made.key, crypto.new_key())
    return made


@pytest.fixture
def identity(tmp_path, state):
    ca = Authority.open(tmp_path / "keys").ca_pem.decode()
    device = crypto.device_id(crypto.load_key(state.key).public_key())
    made = Identity(device, "kitchen", "", ca, "a:1", "a:2", "a:3", "", 0.0, 1.0)
    state.save_identity(made)
    return made


@pytest.fixture
def link(identity):
    return Coordinator(deployment(identity))


def test_the_first_authority_is_pinned_and_the_certificate_is_kept(state, identity, link):
    seat = Seat(state, ClientSection(), None)
    pinned = seat.certify(identity, link)
    assert pinned.authority == link.public.hex() == state.identity().authority
    assert seat.credential_ends > time.time()
    assert Seat(state, ClientSection(), None).credential_ends == seat.credential_ends
    for path in (state.signing_key, state.signing):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = signing_key(state).private_bytes_raw()
    seat.certify(pinned, link)
    assert signing_key(state).private_bytes_raw() == first


def test_another_authority_is_refused_and_nothing_changes(state, identity, link):
    seat = Seat(state, ClientSection(), None)
    pinned = seat.certify(identity, link)
    before = state.signing.read_bytes()
    link.shown = link.signer = Ed25519PrivateKey.generate()
    with pytest.raises(TrustError, match="has pinned"):
        seat.certify(pinned, link)
    assert state.signing.read_bytes() == before
    assert state.identity() == pinned


def test_what_the_owner_has_pinned_counts_from_the_first_time(state, identity, link):
    seat = Seat(state, ClientSection(authority="ab" * 32), None)
    with pytest.raises(TrustError, match="has pinned"):
        seat.certify(identity, link)
    assert state.identity().authority == ""
    seat = Seat(state, ClientSection(authority=link.public.hex()), None)
    assert seat.certify(identity, link).authority == link.public.hex()


def test_a_certificate_that_is_not_the_authoritys_is_refused(state, identity, link):
    link.signer = Ed25519PrivateKey.generate()
    seat = Seat(state, ClientSection(), None)
    with pytest.raises(TrustError, match="not certified by a known authority"):
        seat.certify(identity, link)
    assert not state.signing.exists()
    assert seat.credential_ends == 0


def test_an_answer_that_takes_time_is_no_error(state, identity, link):
    link.pending = True
    seat = Seat(state, ClientSection(), None)
    seat.belongs_to(seat.certify(identity, link))
    assert seat.credential_ends == 0
    with pytest.raises(TrustError, match="not certified"):
        seat.make_adverts(2)
    link.pending = False
    seat.certify(state.identity(), link)
    seat.make_adverts(2)
    assert len(seat.adverts) == 2
    seat.sent()
    assert seat.adverts == ()


def test_files_of_before_and_damaged_ones(state, identity):
    body = json.loads((state.folder / "identity.json").read_text())
    del body["authority"]
    write_private(state.folder / "identity.json", canonical_json(body))
    assert state.identity() == identity
    for text in (b"", b"{}", b"[]", b'{"format": 1, "ends": "x"}'):
        write_private(state.signing, text)
        with pytest.raises(StateCorrupt, match="damaged"):
            Seat(state, ClientSection(), None)


def test_secrets_of_rounds_do_not_leave_the_process(state, identity, link):
    seat = Seat(state, ClientSection(), None)
    seat.belongs_to(seat.certify(identity, link))
    seat.make_adverts(1)
    key = signing_key(state).private_bytes_raw().hex()
    member = seat._seated()
    for text in (repr(seat), repr(member), repr(member._spare)):
        assert key not in text
    on_disk = {p.name for p in state.folder.iterdir()}
    assert on_disk == {"device.key", "identity.json", "signing.key", "signing.json"}
