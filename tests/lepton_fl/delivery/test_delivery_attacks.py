"""Attacks in the manner of python-tuf's own tests: each asserts the error *and* the files left on disk."""

import shutil
from datetime import timedelta

import pytest

from lepton_fl.delivery.keys import new_key
from lepton_fl.delivery.manifest import Manifest
from lepton_fl.errors import Fault, StateConflict, TrustError
from lepton_fl.files import sha256_hex


@pytest.fixture
def serving(world):
    """A device that serves the first release, and a second one that was published."""
    first = world.publish()
    assert world.deliver(first).state == "serving"
    return world


def refused(world, name, fault, *, state="waiting"):
    """The wanted release is refused for this reason, and nothing that serves has changed."""
    before, metadata = world.files(), world.metadata()
    outcome = world.deliver(name)
    assert (outcome.state, outcome.fault) == (state, fault), outcome
    after = world.files()
    if state == "waiting":
        assert after == before
    else:
        assert {k: v for k, v in after.items() if k != "record.json"} == {
            k: v for k, v in before.items() if k != "record.json"
        }
        assert world.slots.record().failures[-1].fault is fault
    assert world.slots.record().current == outcome.serving
    world.slots.verified(outcome.serving)
    return metadata, world.metadata()


def held_back(world, *names):
    """The coordinator goes on serving these files as they were now."""
    old = {name: world.shelf.repository.read(name) for name in names}
    world.network.change_metadata = lambda name, data: old.get(name, data)


def test_a_replayed_timestamp_is_refused(serving):
    world = serving
    held_back(world, "timestamp.json")
    world.network.change_metadata, replay = lambda name, data: data, world.network.change_metadata
    second = world.publish()
    assert world.deliver(second).state == "serving"
    third = world.publish()
    world.network.change_metadata = replay
    before, after = refused(world, third, Fault.REPLAYED)
    assert before == after


def test_a_replayed_snapshot_is_refused(serving):
    world = serving
    old = world.shelf.repository.read("2.snapshot.json")
    second = world.publish()
    assert world.shelf.repository.read("3.snapshot.json") != old
    world.network.change_metadata = lambda name, data: old if name == "3.snapshot.json" else data
    before, after = refused(world, second, Fault.REPLAYED)
    assert before["snapshot.json"] == after["snapshot.json"]
    assert before["targets.json"] == after["targets.json"]


@pytest.mark.parametrize(
    ("role", "days"), [("timestamp", 2), ("snapshot", 8), ("targets", 91), ("root", 366)]
)
def test_expired_metadata_are_refused(world, role, days):
    """Every role made in the past, with only one of them too old."""
    present = world.now
    first = world.publish()
    assert world.deliver(first).state == "serving"
    life = dict.fromkeys(("root", "targets", "snapshot", "timestamp"), 10000.0)
    life[role] = days - 1.0
    world.shelf.repository._life.update(life)
    world.now = present - timedelta(days=days)
    if role == "root":
        with world.shelf.repository._edit("root", world.signers["root"]):
            pass
    second = world.publish()
    before, after = refused(world, second, Fault.EXPIRED)
    assert before["targets.json"] == after["targets.json"]


def test_old_targets_under_a_new_snapshot_are_refused(serving):
    world = serving
    second = world.publish()
    old = world.shelf.repository.read("2.targets.json")
    world.network.change_metadata = lambda name, data: old if name == "3.targets.json" else data
    before, after = refused(world, second, Fault.REPLAYED)
    assert before["targets.json"] == after["targets.json"]


def test_an_unknown_key_is_refused(serving, tmp_path):
    """A list of releases signed by somebody else, under genuine snapshot and timestamp."""
    world = serving
    stranger = new_key(tmp_path / "stranger", "targets", None)
    with pytest.raises(TrustError, match="not signed by enough"):
        world.shelf.repository.publish([], [stranger])
    second = _forge(world, stranger)
    before, after = refused(world, second, Fault.UNSIGNED)
    assert before["targets.json"] == after["targets.json"]


def test_stolen_online_keys_cannot_make_a_release(serving):
    """Snapshot and timestamp keys are in the thief's hands; the targets key is not."""
    world = serving
    second = _forge(world, world.signers["snapshot"][0])
    refused(world, second, Fault.UNSIGNED)
    forged = {"manifest": second}
    world.network.change_metadata = lambda name, data: data
    assert world.shelf.blobs.has(forged["manifest"])  # it lies there, and nobody takes it


def _forge(world, signer):
    """Add a release signed by ``signer``, and have snapshot and timestamp follow."""
    repository = world.shelf.repository
    verify = repository._verify
    repository._verify = lambda *_: None
    try:
        world.count += 1
        variant = world.make_variant(world.folder / f"variant{world.count}", seed=99, round=99)
        ((name, _),) = world.shelf.publish([variant], [signer])
        repository.refresh(world.signers)
    finally:
        repository._verify = verify
    return name


def test_mix_and_match_is_refused(serving):
    """The newest timestamp beside the snapshot of another moment."""
    world = serving
    second = world.publish()
    third = world.publish()
    other = world.shelf.repository.read("3.snapshot.json")
    world.network.change_metadata = lambda name, data: other if name == "4.snapshot.json" else data
    refused(world, third, Fault.REPLAYED)
    refused(world, second, Fault.REPLAYED)


def test_a_tampered_manifest_is_refused(serving):
    world = serving
    second = world.publish()
    world.network.change_chunk = lambda name, data: (
        data.replace(b'"round":2', b'"round":9') if name == second else data
    )
    refused(world, second, Fault.TAMPERED)


def test_altered_metadata_are_refused(serving):
    world = serving
    second = world.publish()
    for name, old, new in (
        ("timestamp.json", b'"version":3', b'"version":4'),
        ("3.targets.json", b'"round":2', b'"round":3'),
    ):
        world.network.change_metadata = lambda n, data, name=name, old=old, new=new: (
            data.replace(old, new) if n == name else data
        )
        refused(world, second, Fault.UNSIGNED)
    world.network.change_metadata = lambda n, data: b"{" if n == "timestamp.json" else data
    refused(world, second, Fault.TAMPERED)


@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.targets.json", "2.root.json"])
def test_endless_metadata_are_refused(serving, name):
    world = serving
    second = world.publish()
    if name == "2.root.json":
        with world.shelf.repository._edit("root", world.signers["root"]):
            pass
        world.shelf.repository.refresh(world.signers)
    world.network.change_metadata = lambda n, data: data + b" " * 2**21 if n == name else data
    refused(world, second, Fault.ENDLESS)


def test_endless_chunks_are_refused(serving):
    world = serving
    second = world.publish()
    world.network.change_chunk = lambda name, data: data + b"x" * 2**20
    refused(world, second, Fault.ENDLESS)
    world.network.change_chunk = lambda name, data: data + b"x" if name != second else data
    refused(world, second, Fault.ENDLESS)


def test_more_chunks_than_asked_for_are_refused(serving):
    world = serving
    second = world.publish()
    plain = world.network.chunks

    def chunks(names):
        yield from plain(names)
        if names != [second]:
            yield b"more"

    world.network.chunks = chunks
    refused(world, second, Fault.ENDLESS)


def test_a_swapped_chunk_is_refused(serving):
    world = serving
    second = world.publish()
    file = world.shelf.manifest(second).file("model.onnx")
    swap = {p.chunks[0]: p.chunks[1] for p in (file, *file.packs)}
    read = world.shelf.blobs.read
    world.network.change_chunk = lambda name, data: read(swap[name]) if name in swap else data
    refused(world, second, Fault.TAMPERED)
    world.network.change_chunk = lambda name, data: data
    assert world.deliver(second).state == "serving"


def test_a_truncated_chunk_is_refused(serving):
    world = serving
    second = world.publish()
    world.network.change_chunk = lambda name, data: data[:-1] if name != second else data
    refused(world, second, Fault.TAMPERED)


def test_a_foreign_task_is_refused(serving):
    world = serving
    foreign = world.publish(task="lepton_fl.tasks.images:fashion_mnist")
    asked = len(world.network.asked)
    refused(world, foreign, Fault.FOREIGN, state="refused")
    assert world.shelf.manifest(foreign).file("model.onnx").chunks[0] not in world.network.asked[asked:]


def test_an_older_round_freshly_signed_is_refused(serving):
    """The signers are made to sign it: the repository refuses, and so does a device that is shown it."""
    world = serving
    for _ in range(2):
        assert world.deliver(world.publish()).state == "serving"
    with pytest.raises(StateConflict, match="older than round"):
        world.publish(round=1)
    world.shelf.repository._check_forward = lambda *_: None
    old = world.publish(round=1)
    refused(world, old, Fault.OLDER, state="refused")


def test_a_coordinator_can_take_a_device_back_by_one_step_only(world):
    names = [world.publish() for _ in range(4)]
    for name in names[:3]:
        assert world.deliver(name).state == "serving"
    assert world.deliver(names[1]).state == "serving"  # the one before: it lies in the other slot
    refused(world, names[0], Fault.OLDER, state="refused")
    assert world.deliver(names[2], serial=2).state == "serving"  # forward again
    assert world.deliver(names[1], serial=2).state == "serving"
    assert world.slots.record().floor.sequence == 2
    assert world.deliver(names[3]).state == "serving"
    assert world.slots.record().floor.sequence == 2  # two was left for four
    refused(world, names[0], Fault.OLDER, state="refused")


def test_a_release_that_was_never_signed_is_refused(serving):
    refused(serving, "0" * 64, Fault.UNKNOWN)


def test_a_withdrawn_release_is_not_installed(serving):
    world = serving
    second = world.publish()
    world.shelf.repository.withdraw(second, world.signers["targets"])
    world.shelf.repository.refresh(world.signers)
    refused(world, second, Fault.UNKNOWN)


def test_a_desired_state_that_names_nonsense_is_refused(serving):
    world = serving
    for name in ("../../etc/passwd", "A" * 64, "0" * 63):
        before = world.files()
        outcome = world.deliver(name)
        assert (outcome.state, outcome.fault) == ("refused", Fault.UNKNOWN)
        assert world.files() == before


def test_another_root_is_refused(serving, make_world):
    """A second coordinator with keys of its own, behind the same address."""
    world, other = serving, make_world()
    name = other.publish(round=7)
    world.network.shelf = other.shelf
    refused(world, name, Fault.UNSIGNED)


def test_a_rotated_key_is_followed_and_the_old_one_counts_no_more(serving):
    world = serving
    repository = world.shelf.repository
    old = world.signers["targets"]
    new = [new_key(world.folder / "keys", "targets", None)]
    repository.rotate("targets", new, world.signers)
    world.signers["targets"] = new
    second = world.publish()
    assert world.deliver(second).state == "serving"
    with pytest.raises(TrustError):
        repository.publish([], old)
    for role in ("root", "snapshot", "timestamp"):
        fresh = [new_key(world.folder / "keys", role, None)]
        repository.rotate(role, fresh, world.signers)
        world.signers[role] = fresh
        name = world.publish()
        assert world.deliver(name).state == "serving"


def test_a_list_restored_from_an_older_copy_is_followed_when_its_online_keys_are_new(serving, tmp_path):
    world = serving
    shutil.copytree(world.shelf.folder, tmp_path / "copy")
    for _ in range(2):  # of these the copy knows nothing
        assert world.deliver(world.publish()).state == "serving"
    shutil.rmtree(world.shelf.folder)
    shutil.copytree(tmp_path / "copy", world.shelf.folder)
    refused(world, world.publish(), Fault.REPLAYED)
    for role in ("snapshot", "timestamp"):
        fresh = [new_key(world.folder / "keys", role, None)]
        world.shelf.repository.rotate(role, fresh, world.signers)
        world.signers[role] = fresh
    world.publish()  # has the number of one that was lost
    assert world.deliver(world.publish()).state == "serving"


def test_a_rotation_of_the_targets_keys_that_was_cut_off_is_completed(serving):
    world = serving
    repository, new = world.shelf.repository, [new_key(world.folder / "keys", "targets", None)]
    edit = repository._edit

    def dies(role, signers):
        if role == "targets":
            raise KeyboardInterrupt
        return edit(role, signers)

    repository._edit = dies
    with pytest.raises(KeyboardInterrupt):
        repository.rotate("targets", new, world.signers)
    repository._edit = edit
    with pytest.raises(TrustError):
        repository.refresh(world.signers)  # nothing unsigned goes out
    world.signers["targets"] = new
    repository.renew({"targets": new})
    assert world.deliver(world.publish()).state == "serving"


def test_a_threshold_of_two_needs_two_keys(make_world):
    world = make_world(targets=2)
    first = world.publish()
    assert world.deliver(first).state == "serving"
    with pytest.raises(TrustError, match="not signed by enough"):
        world.shelf.repository.publish([], world.signers["targets"][:1])


def test_a_manifest_says_no_more_and_no_less_than_it_may(serving):
    world = serving
    text = world.shelf.blobs.read(world.slots.record().current)
    assert Manifest.from_bytes(text).name == sha256_hex(text)
    for old, new, fault in (
        (b'"sequence":1', b'"sequence":01', Fault.TAMPERED),
        (b'"sequence":1', b'"sequence":"1"', Fault.TAMPERED),
        (b'"task":', b'"more":1,"task":', Fault.TAMPERED),
        (b'"name":"model.onnx"', b'"name":"../x"', Fault.TAMPERED),
        (b'"chunk_bytes":1024', b'"chunk_bytes":2048', Fault.TAMPERED),
        (b'"published":', b'"published" :', Fault.TAMPERED),
        (b'"format"', b" " * 2**20 + b'"format"', Fault.ENDLESS),
    ):
        assert old in text
        with pytest.raises(TrustError) as caught:
            Manifest.from_bytes(text.replace(old, new, 1))
        assert caught.value.fault is fault
