"""Published vectors for every primitive, cases that must fail, and our own layers on top of them.

RFC 7748 (X25519), RFC 8032 (Ed25519), RFC 5869 (HKDF), SP 800-38A F.5 (AES-CTR), SP 800-38D with the test
cases of its submission and of NIST's validation suite (AES-GCM), and Project Wycheproof's cases that must
fail, by their numbers there (testvectors_v1).
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
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
        (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
    ],
)
def test_x25519_of_rfc_7748(scalar, point, shared):
    assert keys.agree(X25519PrivateKey.from_private_bytes(H(scalar)), H(point)).hex() == shared


def test_x25519_a_thousand_times_of_rfc_7748():
    scalar = point = (9).to_bytes(32, "little")
    for count in range(1, 1001):
        scalar, point = keys.agree(X25519PrivateKey.from_private_bytes(scalar), point), scalar
        if count == 1:
            assert scalar.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


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
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
        (
            "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
            "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
            "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
            "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
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
            "".join(f"{i:02x}" for i in range(0x00, 0x50)),
            "".join(f"{i:02x}" for i in range(0x60, 0xB0)),
            "".join(f"{i:02x}" for i in range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
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
    assert Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(plain) == cipher  # F.5.5
    assert Cipher(algorithms.AES(key), modes.CTR(counter)).decryptor().update(cipher) == plain  # F.5.6


def test_aes_gcm_of_sp_800_38d_is_the_beginning_of_the_mask():
    sealed = AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None)  # test case 14
    assert sealed.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    for kind in ("gcm", "ctr"):
        assert masks.keystream(bytes(32), 16, kind) == sealed[:16]


LONG_KEY = "feffe9928665731c6d6a8f9467308308" * 2
LONG_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
LONG_CIPHER = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)


@pytest.mark.parametrize(
    ("key", "nonce", "plain", "associated", "sealed"),
    [
        ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),  # test case 13
        (
            LONG_KEY,
            "cafebabefacedbaddecaf888",
            LONG_PLAIN,
            "",
            LONG_CIPHER + "b094dac5d93471bdec1a502270e3cc6c",
        ),
        (  # test case 16
            LONG_KEY,
            "cafebabefacedbaddecaf888",
            LONG_PLAIN[:120],
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            LONG_CIPHER[:120] + "76fc6ece0f4e1768cddf8853bb2d551b",
        ),
        (  # gcmDecrypt256, 96 bit IV, count 0
            "f5a2b27c74355872eb3ef6c5feafaa740e6ae990d9d48c3bd9bb8235e589f010",
            "58d2240f580a31c1d24948e9",
            "",
            "",
            "15e051a5e4a5f5da6cea92e2ebee5bac",
        ),
    ],
)
def test_aes_gcm_of_sp_800_38d(key, nonce, plain, associated, sealed):
    cipher = AESGCM(H(key))
    assert cipher.encrypt(H(nonce), H(plain), H(associated)).hex() == sealed
    assert cipher.decrypt(H(nonce), H(sealed), H(associated)).hex() == plain


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


WYCHEPROOF_KEY = "7d4d0e7f6153a69b6242b522abbee685fda4420f8834b108c3bdae369ef549fa"
TEST = (  # tcId 3: valid
    "7c38e026f29e14aabd059a0f2db8b0cd783040609a8be684db12f82a27774ab0"
    "7a9155711ecfaf7f99f277bad0c6ae7e39d4eef676573336a5c51eb6f946b30d"
)
L, P = ORDER.to_bytes(32, "little").hex(), (2**255 - 19).to_bytes(32, "little").hex()
ZERO, ONE, L_LESS_1 = "00" * 32, "01" + "00" * 31, (ORDER - 1).to_bytes(32, "little").hex()
ED25519_FAILS = {
    **dict(enumerate([("3f", r + s) for r in (ZERO, ONE, L, P) for s in (ZERO, ONE, L_LESS_1, L, P)], 10)),
    30: ("54657374", ""),
    31: ("54657374", TEST[:64]),
    32: ("54657374", TEST[:-4]),
    33: ("54657374", TEST + "2020"),
    34: ("54657374", TEST + WYCHEPROOF_KEY),
    35: ("54657374", "00" + TEST),
    36: ("54657374", TEST[:64] + "00" + TEST[64:]),
    37: ("54657374", TEST + "00"),
    42: (
        "313233343030",
        "647c1492402ab5ce03e2c3a7f0384d051b9cf3570f1207fc78c1bcc98c281c2b"
        "1d125e5538f38afbcc1c84e489521083041d24bc6240767029da063271a1ff0c",
    ),
    59: (
        "313233343030",
        "657c1492402ab5ce03e2c3a7f0384d051b9cf3570f1207fc78c1bcc98c281cab"
        "227aedf259f910f0f3a759a335062665217925d019173b88917eae294f75d40f",
    ),
    60: ("313233343030", "00" * 32 + "e0b8e7770d51c7a36375d006c5bffd6af43ff54aaf47e4330dc118c71d61ec02"),
    61: ("313233343030", "ff" * 32 + "463a1908382e7eb7693acef9884f7cf931a215e0791876be22c631a59881fd0e"),
    63: (
        "54657374",
        TEST[:64] + (int.from_bytes(H(TEST[64:]), "little") + ORDER).to_bytes(32, "little").hex(),
    ),
}


@pytest.mark.parametrize("number", ED25519_FAILS)
def test_ed25519_cases_of_wycheproof_that_must_fail(number):
    verify(H(WYCHEPROOF_KEY), H(TEST), H("54657374"), "d")
    message, signature = ED25519_FAILS[number]
    with pytest.raises(TrustError):
        verify(H(WYCHEPROOF_KEY), H(signature), H(message), "d")


GCM_FLIPS = {
    **{
        130 + i: [bit] for i, bit in enumerate((0, 1, 7, 8, 31, 32, 33, 63, 64, 71, 77, 80, 96, 97, 103, 120))
    },
    **{146: [121], 147: [126], 148: [127], 149: [0, 64], 150: [31, 63], 151: [63, 127], 152: range(128)},
    155: range(7, 128, 8),
    156: range(0, 128, 8),
}


@pytest.mark.parametrize("number", [*GCM_FLIPS, 153, 154])
def test_aes_gcm_cases_of_wycheproof_that_must_fail(number):
    cipher, nonce = AESGCM(bytes(range(32))), H("505152535455565758595a5b")
    sealed = bytearray(cipher.encrypt(nonce, bytes(range(0x20, 0x30)), b""))
    assert sealed[:16].hex() == "b2061457c0759fc1749f174ee1ccadfa"
    assert sealed[16:].hex() == "9ce8fef6d8ab1bf1bf887232eab590dd"
    if number in (153, 154):
        sealed[16:] = (b"\0" if number == 153 else b"\xff") * 16
    for bit in GCM_FLIPS.get(number, ()):
        sealed[16 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidTag):
        cipher.decrypt(nonce, bytes(sealed), b"")


@pytest.mark.parametrize(
    ("key", "nonce", "tag"),
    [
        (
            "e5a8123f2e2e007d4e379ba114a2fb66e6613f57c72d4e4f024964053028a831",
            "51e43385bf533e168427e1ad",
            "38fe845c66e66bdd884c2aecafd280e6",
        ),
        (
            "c5ba3bf9ada560fb0301cd4e0b8b8a46a2aff2400395a72ed5804b3c755c4e59",
            "de2b956e704063c000f28bbb",
            "04eb9b20fd4548dc71594f20073a45a2",
        ),
    ],
)
def test_aes_gcm_cases_of_nist_that_must_fail(key, nonce, tag):
    with pytest.raises(InvalidTag):
        AESGCM(H(key)).decrypt(H(nonce), H(tag), b"")


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
    assert [masks.ring_type(bits).str for bits in (2, 7, 16, 17, 32)] == ["<u2", "<u2", "<u2", "<u4", "<u4"]
    for bits in (1, 33):
        with pytest.raises(ValueError, match="2 to 32"):
            masks.ring_type(bits)


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
