"""Published vectors for every primitive, cases that must fail, and our own layers on top of them.

RFC 7748 (X25519), RFC 8032 (Ed25519), RFC 5869 (HKDF), SP 800-38A F.5 (AES-CTR), SP 800-38D and the test
cases of its submission (AES-GCM), and the kinds of case that Project Wycheproof collects.
"""

import os
from itertools import combinations

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import Rejection, TrustError, UpdateRejected
from lepton_fl.secagg import field, keys, masks
from lepton_fl.secagg.codec import Reader, Writer, bitmap_bytes, read_bitmap, to_bitmap
from lepton_fl.secagg.messages import verify

H = bytes.fromhex

# --- published vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scalar", "point", "shared"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
    ],
)
def test_x25519_of_rfc_7748(scalar, point, shared):
    assert keys.agree(X25519PrivateKey.from_private_bytes(H(scalar)), H(point)).hex() == shared


@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_ed25519_of_rfc_8032(secret, public, message, signature):
    key = Ed25519PrivateKey.from_private_bytes(H(secret))
    assert key.public_key().public_bytes_raw() == H(public)
    assert key.sign(H(message)) == H(signature)
    verify(H(public), H(signature), H(message), "d")


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "expected"),
    [
        (
            "0b" * 22,
            "000102030405060708090a0b0c",
            "f0f1f2f3f4f5f6f7f8f9",
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            "0b" * 22,
            "",
            "",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_of_rfc_5869(secret, salt, info, length, expected):
    derivation = HKDF(algorithm=hashes.SHA256(), length=length, salt=H(salt), info=H(info))
    assert derivation.derive(H(secret)).hex() == expected


def test_aes_ctr_of_sp_800_38a():
    key = H("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = H("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = H(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = H(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(plain) == cipher


def test_aes_gcm_of_sp_800_38d_is_the_beginning_of_the_mask():
    sealed = AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None)  # test case 14
    assert sealed.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    for kind in ("gcm", "ctr"):
        assert masks.keystream(bytes(32), 16, kind) == sealed[:16]


# --- cases that must fail -------------------------------------------------------------------------------

SMALL_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


@pytest.mark.parametrize("key", SMALL_ORDER)
def test_keys_of_small_order_are_refused(key):
    with pytest.raises(UpdateRejected) as caught:
        keys.check_order(H(key))
    assert caught.value.reason is Rejection.MALFORMED


@pytest.mark.parametrize(
    "number", [2**255 - 19, 2**255 - 18, 2**255 + 9, 2**256 - 1], ids=["p", "p+1", "high-bit", "all"]
)
def test_second_encodings_of_public_keys_are_refused(number):
    with pytest.raises(UpdateRejected, match="canonical"):
        keys.check_public(number.to_bytes(32, "little"))


ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.mark.parametrize("change", ["malleable", "truncated", "empty", "long", "flipped", "zero"])
def test_signatures_that_must_not_verify(change):
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, good = key.public_key().public_bytes_raw(), key.sign(b"statement")
    scalar = int.from_bytes(good[32:], "little")
    bad = {
        "malleable": good[:32] + (scalar + ORDER).to_bytes(32, "little"),
        "truncated": good[:-1],
        "empty": b"",
        "long": good + b"\0",
        "flipped": bytes([good[0] ^ 1]) + good[1:],
        "zero": bytes(64),
    }[change]
    with pytest.raises(TrustError):
        verify(public, bad, b"statement", "d")


@pytest.mark.parametrize("place", [0, 31, 63, 64, 79])
def test_an_altered_sealed_share_does_not_open(place):
    sealed = bytearray(keys.seal(bytes(32), bytes(64), b"R" * 32, 1, 2))
    assert len(sealed) == keys.SEALED_BYTES
    assert keys.open_sealed(bytes(32), bytes(sealed), b"R" * 32, 1, 2) == bytes(64)
    sealed[place] ^= 1
    with pytest.raises(InvalidTag):
        keys.open_sealed(bytes(32), bytes(sealed), b"R" * 32, 1, 2)


@pytest.mark.parametrize(
    ("roster", "dealer", "holder"), [(b"S" * 32, 1, 2), (b"R" * 32, 2, 1), (b"R" * 32, 1, 3)]
)
def test_a_sealed_share_opens_only_where_it_belongs(roster, dealer, holder):
    sealed = keys.seal(bytes(32), bytes(64), b"R" * 32, 1, 2)
    with pytest.raises(InvalidTag):
        keys.open_sealed(bytes(32), sealed, roster, dealer, holder)


# --- the mask engine ------------------------------------------------------------------------------------


def by_hand(seed: bytes, count: int) -> bytes:
    """AES-256 block by block: the definition."""
    cipher = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    out = b""
    for block in range(-(-count // 16)):
        segment, inside = divmod(block, masks.SEGMENT // 16)
        out += cipher.update(segment.to_bytes(12, "little") + (2 + inside).to_bytes(4, "big"))
    return out[:count]


@pytest.mark.parametrize("kind", ["gcm", "ctr"])
@pytest.mark.parametrize(
    "count", [0, 1, 15, 16, 17, 4000, masks.SEGMENT, masks.SEGMENT + 1, 2 * masks.SEGMENT]
)
def test_both_engines_give_the_defined_bytes(kind, count):
    seed = os.urandom(32)
    stream = masks.keystream(seed, count, kind)
    assert len(stream) == count
    assert stream[:4096] == by_hand(seed, min(count, 4096))
    if count > masks.SEGMENT:
        assert stream[masks.SEGMENT :][:64] == by_hand_segment(seed, 1)[: count - masks.SEGMENT]


def by_hand_segment(seed: bytes, segment: int) -> bytes:
    nonce = segment.to_bytes(12, "little") + (2).to_bytes(4, "big")
    return Cipher(algorithms.AES(seed), modes.CTR(nonce)).encryptor().update(bytes(64))


@settings(max_examples=20, deadline=None)
@given(
    d=st.one_of(st.integers(1, 300), st.integers(32_760, 32_780), st.integers(65_530, 65_545)),
    bits=st.sampled_from([16, 32]),
    signs=st.lists(st.sampled_from([1, -1]), min_size=1, max_size=4),
    workers=st.integers(1, 3),
)
def test_masks_add_and_cancel(d, bits, signs, workers):
    kind = masks.ring_type(bits)
    start = np.frombuffer(os.urandom(d * bits // 8), kind)
    seeds = [(os.urandom(32), sign) for sign in signs]
    vector = start.copy()
    masks.add_masks(vector, seeds, "gcm", workers)
    expected = start.copy()
    for seed, sign in seeds:
        expected += np.frombuffer(masks.keystream(seed, d * bits // 8, "ctr"), kind) * kind.type(
            sign % 2**bits
        )
    assert (vector == expected).all()
    masks.add_masks(vector, [(seed, -sign) for seed, sign in seeds], "ctr")
    assert (vector == start).all()


def test_the_engine_is_chosen_and_bad_arguments_are_refused():
    assert masks.fastest() in ("gcm", "ctr")
    good = np.zeros(4, "<u4")
    for vector, seeds in [
        (np.zeros(4, np.int32), []),
        (np.zeros((2, 2), "<u4"), []),
        (np.zeros(8, "<u4")[::2], []),
        (good, [(bytes(31), 1)]),
        (good, [(bytes(32), 0)]),
    ]:
        with pytest.raises(ValueError, match="Expected"):
            masks.add_masks(vector, seeds)
    with pytest.raises(ValueError, match="16 or 32"):
        masks.ring_type(24)


# --- secret sharing -------------------------------------------------------------------------------------


def by_horner(coefficients, x):
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % field.PRIME
    return value


def test_shares_are_the_polynomial_of_the_definition(stream):
    secrets = field.draw(stream("s"), 32)
    shares = field.share(secrets, 7, 4, stream("c"))
    drawn = field.draw(stream("c"), 3 * 32).reshape(3, 32)
    for holder in range(7):
        for limb in range(32):
            polynomial = [int(secrets[limb]), *(int(c) for c in drawn[:, limb])]
            assert shares[holder, limb] == by_horner(polynomial, holder + 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 40))
def test_any_threshold_of_holders_recovers(data, n):
    threshold = data.draw(st.integers(1, n))
    secrets = field.draw(os.urandom, 32)
    shares = field.share(secrets, n, threshold, os.urandom)
    holders = data.draw(st.permutations(range(n)))[:threshold]
    assert (field.combine(holders, shares[list(holders)]) == secrets).all()


def test_the_largest_cohort_is_exact(stream):
    secrets = np.full(32, field.PRIME - 1, np.int64)
    shares = field.share(secrets, 1000, 501, stream("big"))
    holders = list(range(499, 1000))
    assert (field.combine(holders, shares[holders]) == secrets).all()


def test_one_share_too_few_says_nothing(stream):
    """Whatever the secret, the shares of any two of five holders (threshold 3) are uniform, jointly."""
    random = stream("uniform")
    for secret in (0, field.PRIME - 1):
        shares = field.share(np.full(4000, secret, np.int64), 5, 3, random)
        for a, b in combinations(range(5), 2):
            cells = (shares[a] * 4 // field.PRIME) * 4 + shares[b] * 4 // field.PRIME
            chi_squared = ((np.bincount(cells, minlength=16) - 250) ** 2 / 250).sum()
            assert chi_squared < 50  # 15 degrees of freedom: one in 90,000 exceeds it


def test_drawing_throws_high_words_away():
    feed = [b"\xff\xff" + b"\xf1\xff" + b"\xf0\xff", b"\x05\x00" * 2]

    def random(count):
        part = feed.pop(0)
        assert len(part) == count
        return part

    assert field.draw(random, 3).tolist() == [65520, 5, 5]


def test_field_elements_have_one_encoding():
    assert field.unpack(field.pack(np.array([0, 65520]))).tolist() == [0, 65520]
    for word in (65521, 65535):
        with pytest.raises(UpdateRejected):
            field.unpack(word.to_bytes(2, "little"))
    with pytest.raises(ValueError, match="distinct"):
        field.lagrange_at_zero((1, 1))


# --- the codec ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=60), st.text(max_size=40), st.integers(0, 2**64 - 1), st.sets(st.integers(0, 20)))
def test_what_is_written_is_read(blob, text, number, positions):
    if len(text.encode()) > 255:
        return
    data = bytes(Writer().blob(blob).text(text).u64(number).u8(7).u16(8).u32(9).raw(to_bitmap(positions, 21)))
    reader = Reader(data)
    assert (reader.blob(), reader.text(), reader.u64()) == (blob, text, number)
    assert (reader.u8(), reader.u16(), reader.u32()) == (7, 8, 9)
    assert reader.bitmap(21) == positions
    reader.finish()


@pytest.mark.parametrize(
    "read",
    [
        lambda: Reader(b"abc").raw(4),
        lambda: Reader(b"abc").raw(-1),
        lambda: Reader(b"\xff\xff").blob(),  # a length bomb
        lambda: Reader(b"\x00\x09" + bytes(9)).blob(limit=8),
        lambda: Reader(b"\x01\xff").text(),
        lambda: Reader(b"x").finish(),
        lambda: read_bitmap(b"\x10", 4),
        lambda: Reader(b"").u8(),
    ],
)
def test_what_cannot_be_read_is_malformed(read):
    with pytest.raises(UpdateRejected) as caught:
        read()
    assert caught.value.reason is Rejection.MALFORMED


def test_what_does_not_fit_is_not_written():
    assert bitmap_bytes(9) == 2
    for write in (
        lambda: Writer().u8(256),
        lambda: Writer().u16(-1),
        lambda: Writer().blob(bytes(70_000)),
        lambda: Writer().text("x" * 256),
        lambda: to_bitmap([4], 4),
    ):
        with pytest.raises(ValueError, match=r"fit|Expected"):
            write()


def test_keys_are_apart():
    a, b = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
    roster = b"R" * 32
    seed, coin = keys.pair_mask(a, keys.public_bytes(b), roster, 3, 9)
    assert (seed, coin) == keys.pair_mask(b, keys.public_bytes(a), roster, 9, 3)
    others = {
        keys.pair_mask(a, keys.public_bytes(b), b"S" * 32, 3, 9)[0],
        keys.pair_mask(a, keys.public_bytes(b), roster, 3, 8)[0],
        keys.sealing_key(keys.agree(a, keys.public_bytes(b)), roster, 3, 9),
        keys.sealing_key(keys.agree(a, keys.public_bytes(b)), roster, 9, 3),
        keys.self_seed(bytes(32), roster),
        seed,
    }
    assert len(others) == 6
    assert keys.has_edge(2**64 - 1, 2**64)
    assert not keys.has_edge(5, 5)
    secret = bytearray(b"secret")
    keys.wipe(secret)
    assert secret == bytes(6)
