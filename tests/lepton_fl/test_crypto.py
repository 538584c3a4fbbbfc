import base64
import json
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl import crypto
from lepton_fl.errors import ConfigError, NotFound, StateCorrupt, TrustError
from lepton_fl.files import canonical_json, write_private

# A fixed key (scalar 1): the id of a device must not change from one version to the next.
KNOWN = ec.derive_private_key(1, ec.SECP256R1())


@pytest.fixture(scope="module")
def ca():
    import datetime as dt

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KNOWN.public_key())
    built = builder.serial_number(1).not_valid_before(start).not_valid_after(start + dt.timedelta(days=1))
    return built.sign(KNOWN, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


class TestKeys:
    def test_round_trip_in_a_private_file(self, tmp_path):
        key = crypto.new_key()
        path = tmp_path / "keys" / "device.key"
        crypto.save_key(path, key)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert crypto.load_key(path).private_numbers() == key.private_numbers()

    def test_no_two_keys_are_equal(self):
        assert crypto.public_der(crypto.new_key().public_key()) != crypto.public_der(
            crypto.new_key().public_key()
        )

    def test_a_readable_key_file_is_refused(self, tmp_path):
        crypto.save_key(tmp_path / "key", crypto.new_key())
        (tmp_path / "key").chmod(0o644)
        with pytest.raises(TrustError):
            crypto.load_key(tmp_path / "key")

    def test_a_missing_key_file(self, tmp_path):
        with pytest.raises(NotFound):
            crypto.load_key(tmp_path / "key")

    @pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
    def test_a_damaged_key_file_is_named(self, tmp_path, content):
        write_private(tmp_path / "key", content)
        with pytest.raises(StateCorrupt, match="key"):
            crypto.load_key(tmp_path / "key")

    @pytest.mark.parametrize(
        "key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]
    )
    def test_keys_of_another_kind_are_refused(self, key):
        with pytest.raises(StateCorrupt, match="P-256"):
            crypto.key_from_pem(crypto.key_to_pem(key))
        der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with pytest.raises(TrustError, match="P-256"):
            crypto.public_from_der(der)

    def test_flower_verifies_what_this_key_signs(self):
        from flwr.supercore.primitives.asymmetric import (
            bytes_to_public_key,
            sign_message,
            uses_nist_ec_curve,
            verify_signature,
        )

        key = crypto.new_key()
        public = bytes_to_public_key(crypto.public_pem(key.public_key()))
        assert uses_nist_ec_curve(public)
        assert verify_signature(public, b"now", sign_message(key, b"now"))


class TestDeviceId:
    def test_known_answer(self):
        assert crypto.device_id(KNOWN.public_key()) == "d-4wcrl4hxkdkfayrmhvasux7f"

    def test_form(self):
        assert crypto.is_device_id(crypto.device_id(crypto.new_key().public_key()))
        for wrong in ("", "d-", "d-" + "A" * 24, "d-" + "a" * 24 + "\n", "x-" + "a" * 24, "d-" + "1" * 24):
            assert not crypto.is_device_id(wrong)

    def test_der_round_trip(self):
        der = crypto.public_der(KNOWN.public_key())
        assert crypto.public_der(crypto.public_from_der(der)) == der
        with pytest.raises(TrustError):
            crypto.public_from_der(der[:-1])

    def test_fingerprint(self):
        assert crypto.fingerprint(b"").startswith("E3:B0:C4:42:")
        assert len(crypto.fingerprint(b"")) == 95


class TestRequests:
    def test_gives_the_key_that_signed(self):
        key = crypto.new_key()
        assert crypto.public_der(crypto.verify_csr(crypto.make_csr(key, "kitchen"))) == crypto.public_der(
            key.public_key()
        )

    @pytest.mark.parametrize("name", ["", "x" * 65])
    def test_name_bounds(self, name):
        with pytest.raises(ConfigError):
            crypto.make_csr(KNOWN, name)

    @pytest.mark.parametrize("pem", [b"", b"garbage", b"x" * 20_000])
    def test_garbage(self, pem):
        with pytest.raises(TrustError):
            crypto.verify_csr(pem)

    def test_every_flipped_byte_is_refused(self):
        request = x509.load_pem_x509_csr(crypto.make_csr(KNOWN, "kitchen"))
        der = bytearray(request.public_bytes(serialization.Encoding.DER))
        for place in range(len(der)):
            bad = bytes(der[:place]) + bytes([der[place] ^ 1]) + bytes(der[place + 1 :])
            text = base64.encodebytes(bad)
            pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n"
            if place == len(der) - len(request.signature) - 1:
                continue  # how many bits of the signature's last byte are unused: content and signature stay
            with pytest.raises(TrustError):
                crypto.verify_csr(pem)

    def test_a_request_of_another_kind_of_key(self):
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
        key = ec.generate_private_key(ec.SECP384R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        with pytest.raises(TrustError, match="P-256"):
            crypto.verify_csr(request.public_bytes(serialization.Encoding.PEM))


class TestJoinToken:
    @pytest.mark.parametrize("addr", ["localhost:1", "fl.example.org:65535", "192.0.2.1:9000", "[::1]:9000"])
    def test_round_trip(self, ca, addr):
        secret = crypto.new_secret()
        text = crypto.make_join_token(addr, ca, secret)
        assert text.startswith("lepton1.")
        assert text.isascii()
        token = crypto.parse_join_token(f"  {text}\n")
        assert (token.addr, token.ca, token.secret) == (addr, ca, secret)
        assert token.secret_sha256 == crypto.secret_sha256(secret)
        assert token.ca_pem.startswith(b"-----BEGIN CERTIFICATE")

    def test_does_not_print_its_secret(self, ca):
        secret = crypto.new_secret()
        shown = repr(crypto.parse_join_token(crypto.make_join_token("h:1", ca, secret)))
        assert "secret" not in shown
        assert repr(secret) not in shown

    @given(st.data())
    @settings(max_examples=60)
    def test_cut_or_altered_anywhere_is_refused(self, ca, data):
        text = crypto.make_join_token("localhost:9000", ca, b"s" * 20)
        place = data.draw(st.integers(0, len(text) - 1))
        char = data.draw(st.sampled_from("ABab01-_.=+/ \x00é"))
        altered = text[:place] + char + text[place + 1 :]
        for wrong in (text[:place], altered if altered.strip() != text else "", text + char):
            if wrong.strip() == text:
                continue
            with pytest.raises(TrustError) as caught:
                crypto.parse_join_token(wrong)
            assert "lepton token create" in caught.value.hint

    @pytest.mark.parametrize(
        "change",
        [
            {"extra": "x"},
            {"addr": "localhost:9001"},
            {"addr": 5},
            {"check": ""},
            {"secret": ""},
            {"ca": ""},
        ],
    )
    def test_other_parts_are_refused(self, ca, change):
        text = crypto.make_join_token("localhost:9000", ca, b"s" * 20)
        raw = text.removeprefix("lepton1.")
        fields = json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
        encoded = base64.urlsafe_b64encode(canonical_json(fields | change)).rstrip(b"=").decode()
        with pytest.raises(TrustError):
            crypto.parse_join_token("lepton1." + encoded)

    @pytest.mark.parametrize("text", ["", "lepton1.", "lepton2.abc", "lepton1." + "A" * 9000])
    def test_other_texts_are_refused(self, text):
        with pytest.raises(TrustError):
            crypto.parse_join_token(text)

    @pytest.mark.parametrize(
        "addr", ["", "host", "host:", "host:0", "host:65536", ":1", "a b:1", "::1:9", "h:²"]
    )
    def test_unusable_addresses_are_refused_when_made(self, ca, addr):
        with pytest.raises(ConfigError):
            crypto.make_join_token(addr, ca, b"s" * 20)

    def test_unusable_secrets_and_certificates_are_refused_when_made(self, ca):
        with pytest.raises(ConfigError, match="20 bytes"):
            crypto.make_join_token("h:1", ca, b"s")
        with pytest.raises(ConfigError, match="certificate"):
            crypto.make_join_token("h:1", ca[:-1], b"s" * 20)
