import datetime as dt
import ipaddress
import os
import socket
import ssl
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lepton_fl.crypto import device_id, key_to_pem, make_csr, make_join_token, new_key, parse_join_token
from lepton_fl.errors import ConfigError, StateCorrupt, StateError, TrustError
from lepton_server.authority import Authority

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC).timestamp()
DAY = 86400.0


@pytest.fixture
def authority(tmp_path):
    return Authority.open(tmp_path / "ca", ["fl.example.org", "192.0.2.7"], clock=lambda: NOW)


@pytest.fixture
def issued(authority):
    key = new_key()
    return authority.sign_device(make_csr(key, "kitchen"), device_id(key.public_key()), now=NOW)


class TestFirstStart:
    def test_files_are_private(self, authority):
        assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in authority.folder.iterdir()}
        assert modes["ca.key"] == modes["server.pem"] == 0o600
        assert modes["ca.pem"] == 0o644

    def test_the_second_start_changes_nothing(self, authority):
        before = {p.name: p.read_bytes() for p in authority.folder.iterdir()}
        Authority.open(authority.folder, ["fl.example.org", "192.0.2.7"], clock=lambda: NOW + DAY)
        assert {p.name: p.read_bytes() for p in authority.folder.iterdir()} == before

    def test_two_first_starts_at_once_make_one_authority(self, tmp_path):
        with ThreadPoolExecutor(4) as pool:
            opened = list(pool.map(lambda _: Authority.open(tmp_path / "ca").ca_der, range(4)))
        assert len(set(opened)) == 1

    def test_goes_on_after_a_kill_between_key_and_certificate(self, authority):
        authority.ca_path.unlink()
        again = Authority.open(authority.folder, clock=lambda: NOW)
        assert again.ca_path.exists()

    def test_the_server_certificate_names_all_hosts_and_localhost(self, authority):
        certificate = x509.load_pem_x509_certificate(authority.server_cert_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "fl.example.org"}
        assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {
            "127.0.0.1",
            "::1",
            "192.0.2.7",
        }
        assert authority.server_key_pem.startswith(b"-----BEGIN PRIVATE KEY")

    @pytest.mark.parametrize("host", ["", "a b", "x" * 64, "http://h", "h:80", "ü"])
    def test_bad_hosts(self, tmp_path, host):
        with pytest.raises(ConfigError, match="host name"):
            Authority.open(tmp_path / "ca", [host])
        assert not (tmp_path / "ca").exists()


class TestRenewal:
    @pytest.mark.parametrize(
        ("hosts", "days", "renewed"),
        [
            (["fl.example.org", "192.0.2.7"], 200, False),
            (["fl.example.org", "192.0.2.7"], 260, True),
            ([], 1, True),
        ],
    )
    def test_when_a_third_is_left_or_the_names_change(self, authority, hosts, days, renewed):
        old = authority.server_cert_pem
        again = Authority.open(authority.folder, hosts, clock=lambda: NOW + days * DAY)
        assert (again.server_cert_pem != old) == renewed
        assert again.ca_pem == authority.ca_pem
        assert not again.refresh_server(hosts, now=NOW + days * DAY)

    def test_a_damaged_server_certificate_is_remade(self, authority):
        authority.server_path.write_bytes(b"garbage")
        authority.server_path.chmod(0o600)
        again = Authority.open(authority.folder, clock=lambda: NOW)
        assert again.server_not_after > NOW


class TestDamagedAuthority:
    def test_a_lost_key_is_not_replaced(self, authority):
        (authority.folder / "ca.key").unlink()
        with pytest.raises(StateError, match="gone"):
            Authority.open(authority.folder, clock=lambda: NOW)
        assert not (authority.folder / "ca.key").exists()

    def test_a_readable_key_is_refused(self, authority):
        (authority.folder / "ca.key").chmod(0o640)
        with pytest.raises(TrustError, match="0600"):
            Authority.open(authority.folder, clock=lambda: NOW)

    def test_another_key_is_refused(self, authority):
        (authority.folder / "ca.key").write_bytes(key_to_pem(new_key()))
        with pytest.raises(StateCorrupt, match="not the certificate"):
            Authority.open(authority.folder, clock=lambda: NOW)

    def test_a_cut_certificate_is_refused(self, authority):
        authority.ca_path.write_bytes(authority.ca_pem[:100])
        with pytest.raises(StateCorrupt):
            Authority.open(authority.folder, clock=lambda: NOW)

    @pytest.mark.parametrize("days", [-2, 3700])
    def test_a_clock_outside_the_ten_years(self, authority, days):
        with pytest.raises(StateError, match="clock") as caught:
            Authority.open(authority.folder, clock=lambda: NOW + days * DAY)
        assert caught.value.hint


class TestDeviceCertificates:
    def test_says_whose_key_it_is_for_thirty_days(self, authority):
        key = new_key()
        name = device_id(key.public_key())
        issued = authority.sign_device(make_csr(key, "kitchen"), name, now=NOW)
        assert authority.verify_device_certificate(issued.pem, NOW) == name
        assert issued.not_after == NOW + 30 * DAY
        certificate = x509.load_pem_x509_certificate(issued.pem)
        assert f"{certificate.serial_number:x}" == issued.serial
        der = certificate.public_bytes(serialization.Encoding.DER)
        assert authority.verify_device_certificate(der, NOW) == name

    @pytest.mark.parametrize("offset", [-2 * DAY, 30 * DAY, 31 * DAY, float("nan"), float("inf")])
    def test_outside_its_time(self, authority, issued, offset):
        with pytest.raises(TrustError):
            authority.verify_device_certificate(issued.pem, NOW + offset)

    def test_of_another_authority(self, tmp_path, authority):
        other = Authority.open(tmp_path / "other", clock=lambda: NOW)
        key = new_key()
        foreign = other.sign_device(make_csr(key, "x"), device_id(key.public_key()), now=NOW)
        with pytest.raises(TrustError, match="not issued"):
            authority.verify_device_certificate(foreign.pem, NOW)

    def test_of_an_authority_that_copies_the_name(self, authority):
        """The signature counts, not what the issuer is called."""
        key, rogue = new_key(), new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id(key.public_key()))])
        issuer = x509.load_pem_x509_certificate(authority.ca_pem).subject
        start = dt.datetime.fromtimestamp(NOW - DAY, tz=dt.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).serial_number(5)
        builder = builder.not_valid_before(start).not_valid_after(start + dt.timedelta(days=9))
        builder = builder.public_key(key.public_key()).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        forged = builder.sign(rogue, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        with pytest.raises(TrustError, match="not issued"):
            authority.verify_device_certificate(forged, NOW)

    def test_the_servers_and_the_authoritys_own_are_no_device(self, authority):
        for pem in (authority.server_cert_pem, authority.ca_pem):
            with pytest.raises(TrustError):
                authority.verify_device_certificate(pem, NOW)

    @pytest.mark.parametrize("data", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
    def test_garbage(self, authority, data):
        with pytest.raises(TrustError):
            authority.verify_device_certificate(data, NOW)

    def test_every_flipped_byte_is_refused(self, authority, issued):
        certificate = x509.load_pem_x509_certificate(issued.pem)
        der = certificate.public_bytes(serialization.Encoding.DER)
        for place in range(len(der)):
            if place == len(der) - len(certificate.signature) - 1:
                continue  # how many bits of the signature's last byte are unused: content and signature stay
            bad = der[:place] + bytes([der[place] ^ 1]) + der[place + 1 :]
            with pytest.raises(TrustError):
                authority.verify_device_certificate(bad, NOW)

    def test_another_devices_request_is_refused(self, authority):
        with pytest.raises(TrustError, match="not of"):
            authority.sign_device(make_csr(new_key(), "x"), device_id(new_key().public_key()), now=NOW)

    @pytest.mark.parametrize("days", [0, -1, 399, float("nan"), float("inf")])
    def test_days_out_of_bounds(self, authority, days):
        key = new_key()
        with pytest.raises(ConfigError, match="days"):
            authority.sign_device(make_csr(key, "x"), device_id(key.public_key()), days, now=NOW)

    def test_never_outlives_the_authority(self, authority):
        late = NOW + 3650 * DAY
        issued = authority.issue_device(new_key().public_key(), 300, now=late)
        ca = x509.load_pem_x509_certificate(authority.ca_pem)
        assert issued.not_after == ca.not_valid_after_utc.timestamp()

    def test_wishes_in_a_request_are_ignored(self, authority):
        key = new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lepton coordinator")])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        pem = request.public_bytes(serialization.Encoding.PEM)
        expected = device_id(key.public_key())
        issued = x509.load_pem_x509_certificate(authority.sign_device(pem, expected, now=NOW).pem)
        uses = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert [a.value for a in issued.subject] == [expected]
        with pytest.raises(x509.ExtensionNotFound):
            issued.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.network
def test_a_device_and_the_coordinator_meet_over_mutual_tls(tmp_path):
    authority = Authority.open(tmp_path / "ca")
    token = parse_join_token(make_join_token("localhost:1", authority.ca_der, os.urandom(20)))
    key = new_key()
    name = device_id(key.public_key())
    issued = authority.sign_device(make_csr(key, "x"), name)
    (tmp_path / "device.pem").write_bytes(key_to_pem(key) + issued.pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(authority.server_path)
    server.load_verify_locations(authority.ca_path)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_STRICT
    client = ssl.create_default_context(cadata=token.ca_pem.decode())
    client.load_cert_chain(tmp_path / "device.pem")
    seen = []
    left, right = socket.socketpair()

    def serve():
        with server.wrap_socket(left, server_side=True) as wrapped:
            peer = wrapped.getpeercert(binary_form=True)
            seen.append(authority.verify_device_certificate(peer, dt.datetime.now(dt.UTC).timestamp()))
            wrapped.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    with client.wrap_socket(right, server_hostname="localhost") as wrapped:
        assert wrapped.recv(5) == b"hello"
    thread.join()
    assert seen == [name]
