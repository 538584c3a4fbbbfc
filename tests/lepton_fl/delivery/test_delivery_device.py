"""What a device does with a release that is as it should be, and with its own troubles."""

import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.delivery.deliver import SelfTestCrashed, retreat
from lepton_fl.delivery.fetch import Limits
from lepton_fl.delivery.keys import load_keys, new_key
from lepton_fl.delivery.packs import DIFFERENCES, pack, unpack
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.delivery.slots import Slots, served
from lepton_fl.errors import (
    ConnectionFailed,
    DiskFull,
    Fault,
    NotFound,
    ReleaseRefused,
    StateConflict,
    StateCorrupt,
    TrustError,
)

# --- packs --------------------------------------------------------------------------------------------


@given(
    st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1), st.sampled_from([*DIFFERENCES, "plain"])
)
@settings(max_examples=200, deadline=None)
def test_a_pack_gives_back_the_bytes(data, seed, transform):
    base = np.random.default_rng(seed).integers(0, 256, len(data), np.uint8).tobytes()
    base = None if transform == "plain" else base
    assert unpack(pack(data, base, transform), base, transform, len(data)) == data


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"nonsense",
        lzma.compress(b"x" * 99),
        lzma.compress(b"x" * 10**7),
        lzma.compress(b"x" * 100) + b"more",
    ],
)
def test_a_pack_that_is_not_one_is_refused(packed):
    with pytest.raises(ReleaseRefused) as caught:
        unpack(packed, None, "plain", 100)
    assert caught.value.fault is Fault.TAMPERED


def test_a_pack_to_another_file_is_refused():
    with pytest.raises(ReleaseRefused):
        unpack(pack(b"abcd", b"abce", "sub8"), b"abc", "sub8", 4)


def test_differences_pay_for_what_they_are_made_for():
    rng = np.random.default_rng(0)
    old8 = rng.integers(-60, 60, 40_000).astype(np.int8)
    new8 = (old8 + rng.integers(-1, 2, 40_000)).astype(np.int8)
    old32 = rng.normal(0, 1, 10_000).astype(np.float32)
    new32 = (old32 + rng.normal(0, 1e-3, 10_000)).astype(np.float32)
    nibbles = rng.integers(0, 16, (2, 40_000), np.uint8)
    moved = (nibbles + (rng.random((2, 40_000)) < 0.05)) % 16
    old4, new4 = ((a[0] | a[1] << 4).astype(np.uint8) for a in (nibbles, moved))
    for transform, old, new in (("sub8", old8, new8), ("xor4", old32, new32), ("sub4", old4, new4)):
        sizes = {t: len(pack(new.tobytes(), old.tobytes(), t)) for t in DIFFERENCES}
        assert min(sizes, key=sizes.get) == transform
        assert sizes[transform] < 0.7 * len(lzma.compress(new.tobytes()))


def test_a_difference_is_fetched_by_who_has_the_base_only(make_world):
    world = make_world()
    first = world.publish(width=640, seed=1)
    second = world.publish(width=640, seed=2, like=1)
    manifest = world.shelf.manifest(second)
    base = world.shelf.manifest(first).file("model.onnx").sha256
    assert [p.base for p in manifest.file("model.onnx").packs] == [base]
    world.deliver(first)
    outcome = world.deliver(second)
    assert "model.onnx" in outcome.tally.packs
    assert outcome.tally.fetched < manifest.size / 5

    world.slots = Slots(world.folder / "other device")
    outcome = world.deliver(second)
    assert outcome.state == "serving"
    assert "model.onnx" not in outcome.tally.packs
    assert outcome.tally.fetched >= manifest.file("model.onnx").bytes


def test_no_difference_is_offered_where_it_does_not_pay(world):
    world.publish(seed=1)
    manifest = world.shelf.manifest(world.publish(seed=2, width=65))
    assert all(p.base is None for p in manifest.file("model.onnx").packs)


def test_a_bad_difference_falls_back_to_the_whole_file(world, monkeypatch):
    """Signed, and wrong nevertheless: what comes out is held against the file's own hash."""
    from lepton_fl.delivery import manifest

    right = manifest.pack
    monkeypatch.setattr(
        manifest,
        "pack",
        lambda data, base, how: right(data[:-1] + b"!", base, how) if base else right(data, None, how),
    )
    world.deliver(world.publish(seed=1, width=640))
    second = world.publish(seed=2, width=640, like=1)
    outcome = world.deliver(second)
    assert outcome.state == "serving"
    assert outcome.tally.packs == []
    world.slots.verified(second)


# --- downloads ----------------------------------------------------------------------------------------


def breaks_after(world, count):
    """The connection dies after so many chunks."""
    plain = world.network.chunks

    def chunks(names):
        nonlocal count
        for data in plain(names):
            if count == 0:
                world.network.chunks = plain
                raise ConnectionFailed("the line broke")
            count -= 1
            yield data

    world.network.chunks = chunks


def test_a_broken_download_goes_on_where_it_stopped(make_world):
    world = make_world()
    name = world.publish(width=640)
    total = len(world.shelf.manifest(name).file("model.onnx").chunks)
    breaks_after(world, 1 + total // 2)  # the manifest is one
    first = world.deliver(name)
    assert (first.state, first.fault) == ("waiting", None)
    assert first.tally.fetched > 0
    asked = len(world.network.asked)
    second = world.deliver(name)
    assert second.state == "serving"
    assert first.tally.fetched + second.tally.fetched <= world.shelf.manifest(name).size
    again = [a for a in world.network.asked[asked:] if a in world.network.asked[:asked] and len(a) == 64]
    assert set(again) <= {name} | set(world.network.asked[asked - 1 : asked])


def test_a_coordinator_that_stops_sending_is_waited_for(world):
    name = world.publish()
    plain = world.network.chunks
    world.network.chunks = lambda names: iter(()) if names != [name] else plain(names)
    assert world.deliver(name).state == "waiting"
    world.network.chunks = plain
    assert world.deliver(name).state == "serving"


def test_the_bandwidth_is_what_the_owner_allows(world):
    name, slept = world.publish(), []
    world.limits = Limits(bytes_per_s=1000.0, clock=lambda: 0.0, sleep=slept.append)
    outcome = world.deliver(name)
    assert sum(slept) == pytest.approx(outcome.tally.fetched / 1000.0)


def test_a_download_waits_for_its_window(world):
    name, closed = world.publish(), "time 12:00 is outside 01:00-05:00"
    world.limits = Limits(objection=lambda: closed)
    outcome = world.deliver(name)
    assert (outcome.state, outcome.fault, outcome.detail) == ("waiting", None, closed)
    closed = ""
    assert world.deliver(name).state == "serving"


@pytest.mark.parametrize("limits", [{"quota_bytes": 1000}, {"min_free_bytes": 2**60}])
def test_a_release_that_does_not_fit_is_not_fetched(world, limits):
    name = world.publish()
    world.limits = Limits(**limits)
    outcome = world.deliver(name)
    assert (outcome.state, outcome.fault) == ("waiting", Fault.QUOTA)
    assert outcome.tally.fetched == 0
    world.limits = Limits()
    assert world.deliver(name).state == "serving"


def test_a_full_disk_is_waited_out(world, small_files):
    first, second = world.publish(), world.publish(width=640)
    world.deliver(first)
    with small_files(8192):
        outcome = world.deliver(second)
    assert (outcome.state, outcome.serving) == ("waiting", first)
    assert world.deliver(second).state == "serving"


def test_a_record_that_cannot_be_written_changes_nothing(world, monkeypatch):
    first, second = world.publish(), world.publish()
    world.deliver(first)

    def full(self, record):
        raise DiskFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "save", full)
        assert world.deliver(second).state == "waiting"
    assert served(world.slots.folder) == first


def test_only_two_releases_stay(world):
    names = [world.publish() for _ in range(3)]
    for name in names:
        world.deliver(name)
    assert {p.name for p in world.slots.slots.iterdir()} == set(names[1:])
    assert world.slots.record().previous == names[1]


def test_files_that_did_not_change_are_not_fetched_again(world):
    first, second = world.publish(seed=1), world.publish(seed=1, round=2)
    world.deliver(first)
    outcome = world.deliver(second)
    assert outcome.state == "serving"
    assert outcome.tally.kept >= world.shelf.manifest(second).file("model.onnx").bytes


# --- the self-test and what follows from it --------------------------------------------------------------


def test_a_failed_self_test_is_given_up_until_it_is_asked_for_again(world):
    first, bad = world.publish(), world.publish()
    world.deliver(first)

    def fails(path):
        raise ReleaseRefused(Fault.SELF_TEST, "differs by 1")

    world.self_test = fails
    for _ in range(2):
        outcome = world.deliver(bad)
        assert (outcome.state, outcome.fault, outcome.serving) == ("refused", Fault.SELF_TEST, first)
    assert {p.name for p in world.slots.slots.iterdir()} == {first}
    world.self_test = lambda path: None
    assert world.deliver(bad).state == "refused"
    assert world.deliver(bad, serial=2).state == "serving"
    assert world.slots.record().failures == ()


def test_a_release_that_ends_its_self_test_is_given_up_after_two_starts(world):
    first, bad = world.publish(), world.publish()
    world.deliver(first)
    starts = []

    def crashes(path):
        starts.append(path.name)
        raise SelfTestCrashed("signal 11")

    world.self_test = crashes
    outcome = world.deliver(bad)
    assert (outcome.state, outcome.fault, outcome.serving) == ("refused", Fault.CRASHED, first)
    assert starts == [bad, bad]
    assert world.deliver(bad).state == "refused"
    assert len(starts) == 2


def test_a_release_that_ends_the_machine_is_given_up_after_two_starts(world):
    """Nothing but what is on the disk survives: the count of starts does."""
    first, bad = world.publish(), world.publish()
    world.deliver(first)

    class PowerCut(BaseException):
        pass

    def dies(path):
        saved = Slots.save
        Slots.save = lambda *_: (_ for _ in ()).throw(PowerCut)  # nothing can be written any more
        world.restore = lambda: setattr(Slots, "save", saved)
        raise PowerCut

    world.self_test = dies
    for _ in range(2):
        with pytest.raises(PowerCut):
            world.deliver(bad)
        world.restore()
        assert served(world.slots.folder) == first
    outcome = world.deliver(bad)
    assert (outcome.state, outcome.fault) == ("refused", Fault.CRASHED)


def test_an_orderly_stop_in_a_self_test_does_not_count(world):
    name = world.publish()

    def stopped(path):
        raise KeyboardInterrupt

    world.self_test = stopped
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            world.deliver(name)
    world.self_test = lambda path: None
    assert world.deliver(name).state == "serving"


def test_a_missing_runtime_is_waited_for(world):
    name = world.publish()

    def lacks(path):
        raise ReleaseRefused(Fault.RUNTIME, "no onnxruntime")

    world.self_test = lacks
    for _ in range(3):
        assert world.deliver(name).fault is Fault.RUNTIME
    world.self_test = lambda path: None
    assert world.deliver(name).state == "serving"


def test_a_release_that_crashes_in_service_gives_way_to_the_one_before(world, desired):
    first, bad = world.publish(), world.publish()
    world.deliver(first)
    world.deliver(bad)
    asked = desired(bad)
    assert not retreat(world.slots, first, Fault.CRASHED, "it crashed", asked)
    assert retreat(world.slots, bad, Fault.CRASHED, "it crashed", asked)
    record = world.slots.record()
    assert (record.current, record.previous, record.failures[0].fault) == (first, None, Fault.CRASHED)
    assert world.deliver(bad).state == "refused"
    assert world.deliver(bad, serial=2).state == "serving"


def test_another_profile_is_refused(world, desired):
    from dataclasses import replace

    from lepton_fl.delivery.deliver import deliver

    name = world.publish(profiles=("gateway", "camera"))
    text = desired(name)
    outcome = deliver(replace(world.device, profile="watch"), text)
    assert (outcome.state, outcome.fault) == ("refused", Fault.FOREIGN)
    assert deliver(replace(world.device, profile="camera"), desired(name, 2)).state == "serving"


def test_a_damaged_slot_is_fetched_again(world):
    first, second = world.publish(), world.publish()
    world.deliver(first)
    world.deliver(second)
    path = world.slots.path(first) / "model.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ReleaseRefused):
        world.slots.verified(first)
    assert world.deliver(first).state == "serving"
    world.slots.verified(first)


def test_a_damaged_record_is_said_and_kept(world):
    world.deliver(world.publish())
    path = world.slots.folder / "record.json"
    path.write_text('{"current":"x"}')
    with pytest.raises(StateCorrupt):
        world.slots.record()
    assert path.read_text() == '{"current":"x"}'


# --- publishing ---------------------------------------------------------------------------------------


def test_a_variant_that_failed_its_gate_is_never_published(world):
    with pytest.raises(StateConflict, match="too slow"):
        world.publish(profiles=(), failed=("gateway",))
    with pytest.raises(StateConflict, match="no profile"):
        world.publish(profiles=())
    variant = world.make_variant(world.folder / "free", profiles=())
    ((name, manifest),) = world.shelf.publish([variant], world.signers["targets"], ungated=True)
    assert manifest.profiles == ()
    world.shelf.repository.refresh(world.signers)
    assert world.deliver(name).state == "serving"


def test_a_damaged_variant_is_not_published(world):
    variant = world.make_variant(world.folder / "v")
    (variant / "model.onnx").write_bytes(b"other")
    with pytest.raises(StateCorrupt):
        world.shelf.publish([variant], world.signers["targets"])
    assert world.shelf.repository.releases() == {}


def test_releases_are_found_by_name_variant_and_number(world):
    first, second = world.publish(), world.publish()
    other = world.publish(name="tiny")
    find = world.shelf.find
    assert find(first[:8]) == find("int8@1") == first
    assert find("int8") == find("int8@2") == second
    assert find("tiny") == other
    for wanted in ("", "nothing", "int8@9"):
        with pytest.raises(NotFound):
            find(wanted)


def test_what_was_signed_elsewhere_is_taken_over(world, copy_tree):
    """A signing machine with a copy; the coordinator never sees the key."""
    world.publish()
    away = Shelf(world.folder / "away")
    copy_tree(world.shelf.folder, away.folder)
    variant = world.make_variant(world.folder / "new", seed=7, round=7)
    ((name, _),) = away.publish([variant], world.signers["targets"], chunk_bytes=1024)
    assert world.shelf.take_from(away) == [name]
    world.shelf.repository.refresh(world.signers)
    assert world.deliver(name).state == "serving"
    assert world.shelf.take_from(away) == []
    world.publish(round=8)
    with pytest.raises(StateConflict, match="version"):
        world.shelf.take_from(away)


def test_what_a_stranger_signed_is_not_taken_over(world, make_world):
    other = make_world()
    other.publish()
    with pytest.raises((StateConflict, TrustError)):
        world.shelf.take_from(other.shelf)
    assert world.shelf.repository.releases() == {}


def test_withdrawn_chunks_are_deleted(world):
    first, second = world.publish(seed=1), world.publish(seed=2)
    world.shelf.repository.withdraw(first, world.signers["targets"])
    assert world.shelf.tidy() > 0
    world.shelf.repository.refresh(world.signers)
    assert world.deliver(second).state == "serving"


def test_the_list_is_signed_anew_in_time_only(world):
    refresh = world.shelf.repository.refresh
    assert not refresh(world.signers)
    from datetime import timedelta

    world.now += timedelta(hours=13)
    assert refresh(world.signers)
    assert not refresh(world.signers)


def test_keys_are_private_encrypted_and_never_shown(tmp_path):
    signer = new_key(tmp_path / "keys", "targets", b"five random words here")
    (path,) = (tmp_path / "keys").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in path.read_bytes()
    assert "PRIVATE" not in repr(signer)
    (same,) = load_keys(tmp_path / "keys", "targets", None, lambda _: b"five random words here")
    assert same.public_key.keyid == signer.public_key.keyid
    with pytest.raises(TrustError, match="does not open"):
        load_keys(tmp_path / "keys", "targets", None, lambda _: b"wrong")
    assert load_keys(tmp_path / "keys", "targets", {"0" * 64}, lambda _: pytest.fail("asked")) == []
    with pytest.raises(TrustError, match="at least 12"):
        new_key(tmp_path / "keys", "root", b"short")
    path.chmod(0o644)
    with pytest.raises(TrustError, match="private"):
        load_keys(tmp_path / "keys", "targets", None, lambda _: b"")
