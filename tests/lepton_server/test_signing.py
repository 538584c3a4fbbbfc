"""Whose signing keys are whose: requests, an authority on another machine, and what the fleet is told."""

import base64
import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lepton_fl import crypto
from lepton_fl.errors import ConfigError, StateCorrupt, TrustError, UpdateRejected
from lepton_fl.secagg.identity import Certified, deployment_of, issue, request_certificate
from lepton_server.authority import Authority
from lepton_server.config import AuthoritySection
from lepton_server.fleet import STOCK, Fleet, Report, Secrecy, TaskState
from lepton_server.signing import Certificates, Requests, Signing, requests_of
from lepton_server.store import open_store

DAY = 86_400.0
TASK = "pkg.tasks:digits"


class Place:
    """A coordinator's store, its CA, an authority's key elsewhere, and devices."""

    def __init__(self, folder, store):
        self.folder, self.store, self.now = folder, store, time.time()
        self.ca = Authority.open(folder / "keys")
        self.deployment = deployment_of(self.ca.ca_der)
        self.authority = Ed25519PrivateKey.generate()
        self.public = self.authority.public_key().public_bytes_raw()

    def signing(self, key=None):
        return Signing(self.store, self.deployment, self.public, key, 90.0, lambda: self.now)

    def device(self, name="kitchen"):
        key = crypto.new_key()
        device = crypto.device_id(key.public_key())
        with self.store.transaction() as change:
            token = {"token_id": device, "secret_sha256": crypto.secret_sha256(device.encode())}
            change.record("token.created", token | {"expires_at": self.now + 3600})
            change.record("token.used", {"token_id": device, "device_id": device})
            body = {
                "device_id": device,
                "name": name,
                "public_key": base64.b64encode(crypto.public_der(key.public_key())).decode(),
                "cert_serial": "1f",
                "cert_not_after": self.now + DAY,
                "token_id": device,
            }
            change.record("device.enrolled", body)
        return device, key, Ed25519PrivateKey.generate()

    def request(self, key, signing_key):
        return request_certificate(key, signing_key, self.deployment)

    def good(self, device, signing_key, credential):
        public = signing_key.public_key().public_bytes_raw()
        Certified([self.public]).check(self.deployment, device, public, credential, self.now)


@pytest.fixture
def place(tmp_path):
    with open_store(tmp_path / "lepton.db") as store:
        yield Place(tmp_path, store)
        store.verify_journal()
        assert store.rebuild().differences == ()


def test_an_authority_on_this_machine_certifies_at_once_and_again_when_it_is_time(place):
    signing = place.signing(place.authority)
    device, key, own = place.device()
    first = signing.answer(device, place.request(key, own))
    place.good(device, own, first)
    assert signing.answer(device, place.request(key, own)) == first
    place.now += 61 * DAY
    second = signing.answer(device, place.request(key, own))
    assert second != first
    place.good(device, own, second)


def test_an_authority_elsewhere_gets_a_file_and_sends_one_back(place):
    signing = place.signing()
    device, key, own = place.device()
    request = place.request(key, own)
    assert signing.answer(device, request) == b""
    assert signing.answer(device, request) == b""  # noted once
    path = place.folder / "requests.json"
    found = requests_of(place.store, place.folder / "keys")
    assert found.rows() == [{"device_id": device, "name": "kitchen"}]
    found.write(path)
    Requests.read(path).sign(place.authority, int(place.now + DAY)).write(path)
    assert Certificates.read(path).install(signing) == found.rows()
    assert requests_of(place.store, place.folder / "keys").rows() == []
    place.good(device, own, signing.answer(device, request))
    assert requests_of(place.store, place.folder / "keys").rows() == found.rows()  # a day is short


def test_nobody_is_certified_under_another_name_and_no_stranger_certifies(place):
    signing = place.signing(place.authority)
    device, key, own = place.device()
    other, _, _ = place.device("attic")
    with pytest.raises(TrustError, match="of device"):
        signing.answer(other, place.request(key, own))
    with pytest.raises(TrustError, match="both of its keys"):
        signing.answer(device, request_certificate(key, own, "ca-elsewhere"))
    with pytest.raises(UpdateRejected):
        signing.answer(device, b"\0\1")
    public = own.public_key().public_bytes_raw()
    forged = issue(Ed25519PrivateKey.generate(), place.deployment, device, public, int(place.now + DAY))
    with pytest.raises(TrustError, match="not certified by a known authority"):
        signing.install(device, public, forged)
    expired = issue(place.authority, place.deployment, device, public, int(place.now - 1))
    with pytest.raises(TrustError, match="expired"):
        signing.install(device, public, expired)
    assert place.store.events(kinds=("device.certified",)) == []


def test_files_that_are_not_what_they_should_be_change_nothing(place):
    device, key, own = place.device()
    place.signing().answer(device, place.request(key, own))
    path = place.folder / "file.json"
    found = requests_of(place.store, place.folder / "keys")
    found.write(path)
    with pytest.raises(ConfigError, match="no file of"):
        Certificates.read(path)
    body = json.loads(path.read_text())
    body["devices"][0]["device_id"] = "d-" + "a" * 24
    path.write_text(json.dumps(body))
    with pytest.raises(TrustError, match="filed under"):
        Requests.read(path).sign(place.authority, int(place.now + DAY))
    for text in ("", "[]", "{}", '{"format": 1}', path.read_text()[:-5]):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no file of"):
            Requests.read(path)
    signed = found.sign(place.authority, int(place.now + DAY))
    with pytest.raises(ConfigError, match="another coordinator"):
        Certificates("ca-elsewhere", signed.devices).install(place.signing())
    place.store.record("device.revoked", {"device_id": device})
    assert signed.install(place.signing()) == []


def test_a_configuration_of_two_keys_that_do_not_belong_together_is_refused(place):
    path = place.folder / "authority.key"
    crypto.save_signing_key(path, place.authority)
    with pytest.raises(ConfigError, match="public_key is not that of"):
        Signing.open(AuthoritySection(public_key="ab" * 32, key_file=path), place.store, "ca")
    assert Signing.open(AuthoritySection(key_file=path), place.store, "ca").public == place.public
    assert Signing.open(AuthoritySection(), place.store, "ca") is None
    path.write_text("no key")
    with pytest.raises(StateCorrupt, match="no Ed25519 key"):
        Signing.open(AuthoritySection(key_file=path), place.store, "ca")


# --- the fleet --------------------------------------------------------------------------------------


@pytest.fixture
def fleet(place):
    made = Fleet(place.store, wall=lambda: place.now)
    made.set_authority(30 * DAY)
    made.load()
    return made


def check_in(fleet, device, **secrecy):
    report = Report((TaskState(TASK, "1", "", True, ""),), "0.1", ())
    return fleet.check_in(device, report, secrecy=Secrecy(**secrecy))


def standing(fleet, *, secure=True):
    return [c.standing for c in fleet.candidates(TASK, "1", secure=secure)]


def test_a_device_is_told_to_ask_until_it_has_what_there_is(place, fleet):
    signing = place.signing()
    device, key, own = place.device()
    fleet.follow()
    assert check_in(fleet, device).certify
    assert standing(fleet) == ["not-certified"]
    assert standing(fleet, secure=False) == ["eligible"]
    signing.answer(device, place.request(key, own))
    fleet.follow()
    assert not check_in(fleet, device).certify  # the authority has it
    found = requests_of(place.store, place.folder / "keys").sign(place.authority, int(place.now + 90 * DAY))
    found.install(signing)
    fleet.follow()
    assert check_in(fleet, device).certify  # to fetch
    ends = int(place.now + 90 * DAY)
    assert not check_in(fleet, device, credential_ends=ends).certify
    assert standing(fleet) == ["eligible"]
    again = Fleet(place.store, wall=lambda: place.now)
    again.set_authority(30 * DAY)
    again.load()  # as after a restart
    assert not check_in(again, device, credential_ends=ends).certify
    place.now += 61 * DAY
    assert check_in(fleet, device, credential_ends=ends).certify  # in its last third
    place.now = ends + 1.0
    assert check_in(fleet, device, credential_ends=ends).certify
    assert standing(fleet) == ["not-certified"]


def test_without_an_authority_nobody_is_told_to_ask(place):
    fleet = Fleet(place.store)
    device, _, _ = place.device()
    fleet.load()
    assert not check_in(fleet, device).certify


def test_keys_made_ahead_are_few_are_given_out_once_and_end_with_their_process(place, fleet):
    device, _, _ = place.device()
    fleet.follow()
    ends = place.now + 60 * DAY
    assert check_in(fleet, device, credential_ends=ends).adverts == 0  # nobody needs them
    fleet.set_secure_active(True)
    assert check_in(fleet, device).adverts == 0  # without a certificate they are worth nothing
    assert check_in(fleet, device, credential_ends=ends).adverts == STOCK
    made = {"credential_ends": ends, "advert_session": b"12345678"}
    assert check_in(fleet, device, adverts=(b"a", b"b"), **made).adverts == 0
    assert fleet.take_advert(device) == b"a"
    assert check_in(fleet, device, **made).adverts == 1
    fleet.add_advert(device, b"c")
    fleet.add_advert(device, b"d")
    assert [fleet.take_advert(device) for _ in range(3)] == [b"c", b"d", None]
    check_in(fleet, device, adverts=(b"e", b"f"), **made)
    fleet.spend_adverts([b"e"])  # a roster names it, from before a restart perhaps
    check_in(fleet, device, adverts=(b"e", b"f"), **made)  # the device was not told that they had come
    assert [fleet.take_advert(device) for _ in range(2)] == [b"f", None]
    fleet.add_advert(device, b"g")
    check_in(fleet, device, credential_ends=ends, advert_session=b"another1")
    assert fleet.take_advert(device) is None
    assert fleet.take_advert("d-nobody") is None


def test_a_device_that_is_gone_is_not_certified(place):
    device, key, own = place.device()
    place.store.record("device.revoked", {"device_id": device})
    with pytest.raises(TrustError):
        place.signing(place.authority).answer(device, place.request(key, own))
