"""Who should have which release, who gets its chunks, and what keeps the list fresh."""

import asyncio
import json

import pytest

from lepton_fl.delivery.keys import ROLES, new_key
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import ConfigError, NotFound, TrustError
from lepton_server.config import DeliverySection, ServerConfig
from lepton_server.downloads import MAX_CHUNKS, Downloads
from lepton_server.fleet import Failed, Report, Serving
from lepton_server.releases import (
    ListKeeper,
    adopt,
    assign,
    assigned_release,
    forget,
    online_keys,
    online_signers,
    shelf_of,
)

A, B = "a" * 64, "b" * 64


# --- assignment ---------------------------------------------------------------------------------------


def test_a_device_is_told_of_its_release_until_it_acknowledges(works):
    device = works.ids[0]
    assert assigned_release(works.store.device(device).desired) is None
    assert assign(works.store, [device], A) == 1
    works.fleet.follow()
    answer = works.fleet.check_in(device, Report((), "0.1", ()))
    assert assigned_release(json.loads(answer.desired)) == A
    from lepton_fl.files import sha256_hex

    heard = sha256_hex(answer.desired.encode())
    assert works.fleet.check_in(device, Report((), "0.1", ()), desired_digest=heard).desired == ""
    assert works.fleet.check_in(works.ids[1], Report((), "0.1", ())).desired == ""
    works.unharmed()


def test_asking_again_is_another_asking(works):
    device, seen = works.ids[0], set()
    for release in (A, A, B, None, A):
        assign(works.store, [device], release)
        desired = works.store.device(device).desired
        assert assigned_release(desired) == release
        seen.add(json.dumps(desired, sort_keys=True))
    assert len(seen) == 5


def test_an_unknown_device_changes_nothing_for_the_others(works):
    with pytest.raises(NotFound):
        assign(works.store, [works.ids[0], "d-" + "a" * 24], A)
    assert works.store.device(works.ids[0]).desired == {}


def test_what_devices_serve_is_counted_and_journalled(works):
    report = Report(
        (), "0.1", (), Serving("digits", "gateway", A, (Failed(B, "self-test", "differs", True),))
    )
    for device in works.ids:
        works.fleet.check_in(device, report)
    assert works.fleet.releases() == {A: 3}
    works.fleet.flush(everything=True)
    told = works.store.device(works.ids[0]).reported["serving"]
    assert (told["release"], told["failed"][0]["fault"]) == (A, "self-test")
    works.unharmed()


# --- downloads ----------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "releases")


def collect(downloads, device, names, pause=0.0, require=lambda: None):
    async def run():
        found = []
        async for chunk in downloads.chunks(device, names, require):
            found.append(chunk)
            await asyncio.sleep(pause)
        return found

    return run()


def test_chunks_come_in_order_and_are_bounded(shelf):
    data = [bytes([i]) * 1000 for i in range(5)]
    names = [bytes.fromhex(shelf.blobs.put(d)) for d in data]

    async def run():
        downloads = Downloads(shelf, DeliverySection(cache_bytes=2500))
        assert await collect(downloads, "d1", names) == data
        assert await collect(downloads, "d1", names[::-1]) == data[::-1]
        assert downloads._cached <= 2500
        for wrong in ([], names * 7, [b"short"]):
            with pytest.raises(ConfigError):
                await collect(downloads, "d1", wrong)
        with pytest.raises(NotFound):
            await collect(downloads, "d1", [b"\0" * 32])
        assert downloads._active == {}
        downloads.close()

    assert len(names * 7) > MAX_CHUNKS
    asyncio.run(run())


def test_a_newer_call_of_a_device_ends_its_older_one(shelf):
    names = [bytes.fromhex(shelf.blobs.put(b"x" * 10))] * 8

    async def run():
        downloads = Downloads(shelf, DeliverySection())
        older = asyncio.create_task(collect(downloads, "d1", names, 0.01))
        await asyncio.sleep(0.02)
        assert len(await collect(downloads, "d1", names)) == 8
        with pytest.raises(asyncio.CancelledError):
            await older
        downloads.close()

    asyncio.run(run())


def test_devices_take_turns(shelf):
    """One place, three devices with two calls each: nobody gets a second turn before all had one."""
    names = [bytes.fromhex(shelf.blobs.put(b"x" * 10))]
    order = []

    async def run():
        downloads = Downloads(shelf, DeliverySection(max_downloads=1))

        async def device(name):
            for _ in range(2):
                async for _ in downloads.chunks(name, names, lambda: None):
                    order.append(name)
                    await asyncio.sleep(0.01)

        await asyncio.gather(*(device(name) for name in "abc"))
        downloads.close()

    asyncio.run(run())
    assert sorted(order[:3]) == sorted(order[3:]) == ["a", "b", "c"]


def test_a_device_that_is_revoked_gets_no_more(shelf):
    names = [bytes.fromhex(shelf.blobs.put(b"x" * 10))] * 4
    left = [2]

    def require():
        left[0] -= 1
        if left[0] < 0:
            raise TrustError("revoked")

    async def run():
        downloads = Downloads(shelf, DeliverySection())
        with pytest.raises(TrustError):
            await collect(downloads, "d1", names, require=require)
        assert downloads.bytes_sent == 20
        downloads.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "name", ["../keys/ca.pem", "root.json", "1.root.json/../x", "01.root.json", "", "x" * 999]
)
def test_only_metadata_are_handed_out(shelf, name):
    async def run():
        downloads = Downloads(shelf, DeliverySection())
        with pytest.raises(ConfigError):
            await downloads.metadata(name)
        with pytest.raises(NotFound):
            await downloads.metadata("7.root.json")
        downloads.close()

    asyncio.run(run())


# --- the list -----------------------------------------------------------------------------------------


def test_the_coordinator_signs_what_was_published_and_says_what_it_lacks(tmp_path, make_variant, caplog):
    config = ServerConfig.model_validate({"server": {"state_dir": tmp_path / "state"}})
    shelf = shelf_of(config)
    keeper = ListKeeper(shelf, online_keys(config))
    keeper.look()  # nothing was ever signed: nothing to do
    signers = {
        role: [new_key(online_keys(config) if role in ("snapshot", "timestamp") else tmp_path, role, None)]
        for role in ROLES
    }
    shelf.repository.create(signers, {})
    before = shelf.repository.read("timestamp.json")
    shelf.publish([make_variant(tmp_path / "v")], signers["targets"])
    keeper.look()
    assert shelf.repository.read("timestamp.json") != before
    for path in online_keys(config).glob("timestamp-*"):
        path.unlink()
    with pytest.raises(NotFound, match="timestamp key"):
        online_signers(shelf, online_keys(config))
    keeper.look()
    keeper.look()
    assert caplog.text.count("cannot be kept fresh") == 1


def test_a_publication_that_was_cut_off_is_completed_by_whoever_comes_first(tmp_path, works, make_variant):
    config = ServerConfig.model_validate({"server": {"state_dir": tmp_path / "state"}})
    shelf, variant = shelf_of(config), make_variant(tmp_path / "v")
    signers = {
        role: [new_key(online_keys(config) if role in ("snapshot", "timestamp") else tmp_path, role, None)]
        for role in ROLES
    }
    shelf.repository.create(signers, {})

    def journalled():
        return [event.subject for event in works.store.events(kinds=("release.published",))]

    ((name, _),) = shelf.publish([variant], signers["targets"])  # and the process is killed
    assert journalled() == []
    ListKeeper(shelf, online_keys(config), works.store).look()  # the coordinator, before devices hear of it
    assert journalled() == [name]
    assert shelf.publish([variant], signers["targets"])[0][0] == name  # the same call goes on where it was
    assert adopt(works.store, shelf) == 0
    ((other, _),) = shelf.publish([make_variant(tmp_path / "v2", seed=2, round=2)], signers["targets"])
    assert adopt(works.store, shelf) == 1
    assert journalled() == [name, other]
    shelf.repository.withdraw(name, signers["targets"])  # killed again
    assert forget(works.store, shelf, name[:8], "wrong") == name
    with pytest.raises(NotFound):
        forget(works.store, shelf, name[:8], "wrong")  # once
    with pytest.raises(NotFound):
        forget(works.store, shelf, other[:8], "it is still signed")
    assert [e.body["reason"] for e in works.store.events(kinds=("release.withdrawn",))] == ["wrong"]


def test_a_publication_that_dies_while_signing_publishes_nothing(tmp_path, make_variant, monkeypatch):
    config = ServerConfig.model_validate({"server": {"state_dir": tmp_path / "state"}})
    shelf = shelf_of(config)
    signers = {role: [new_key(tmp_path, role, None)] for role in ROLES}
    shelf.repository.create(signers, {})

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lepton_fl.delivery.repository.write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            shelf.publish([make_variant(tmp_path / "v")], signers["targets"])
    assert shelf.repository.releases() == {}
    ((name, manifest),) = shelf.publish([tmp_path / "v"], signers["targets"])
    assert list(shelf.repository.releases()) == [name]
    assert manifest.sequence == 1
