import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import DiskFull, NotFound, StateCorrupt, StateError, TrustError
from lepton_fl.files import (
    BlobStore,
    canonical_json,
    read_private,
    sha256_hex,
    write_atomic,
    write_private,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\n☃"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
)


class TestCanonicalJson:
    @given(JSON)
    def test_survives_a_round_trip(self, value):
        import json

        text = canonical_json(value)
        assert canonical_json(json.loads(text)) == text

    def test_known_answer(self):
        assert canonical_json({"b": [1, 1.0, None], "a": "é"}) == '{"a":"é","b":[1,1.0,null]}'.encode()

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), {1: 2}, {"a": {None: 1}}, "\ud800", object(), {"a": b"x"}]
    )
    def test_refuses_what_has_no_one_text(self, value):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json(value)

    def test_known_hash(self):
        assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class TestWriting:
    def test_replaces_whole_with_the_mode_whatever_the_umask(self, tmp_path):
        path = tmp_path / "file"
        old = os.umask(0o077)
        try:
            write_atomic(path, b"one")
            write_atomic(path, b"two", mode=0o644)
        finally:
            os.umask(old)
        assert path.read_bytes() == b"two"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert list(tmp_path.iterdir()) == [path]

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(StateError, match="nowhere"):
            write_atomic(tmp_path / "nowhere" / "file", b"")

    def test_secrets_are_private_and_so_is_their_folder(self, tmp_path):
        path = tmp_path / "keys" / "key"
        write_private(path, b"secret")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert read_private(path) == b"secret"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
    def test_a_secret_that_others_can_read_is_refused(self, tmp_path, mode):
        path = tmp_path / "key"
        write_private(path, b"secret")
        path.chmod(mode)
        with pytest.raises(TrustError, match="0600") as caught:
            read_private(path)
        assert "chmod 600" in caught.value.hint

    def test_a_missing_secret_is_not_found(self, tmp_path):
        with pytest.raises(NotFound):
            read_private(tmp_path / "key")

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path, small_files):
        path = tmp_path / "file"
        write_atomic(path, b"old")
        with small_files(1000), pytest.raises(DiskFull, match="unchanged"):
            write_atomic(path, bytes(5000))
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_readers_never_see_half_a_file(self, tmp_path):
        path = tmp_path / "file"
        contents = {bytes([i]) * 200_000 for i in range(8)}
        write_atomic(path, bytes(200_000))
        stop = threading.Event()

        def write():
            for content in contents:
                write_atomic(path, content)
            stop.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not stop.is_set():
            assert path.read_bytes() in contents
        writer.join()

    def test_kill_leaves_the_old_bytes_or_the_new(self, tmp_path):
        path = tmp_path / "file"
        code = (
            "import sys; from lepton_fl.files import write_atomic\n"
            "i = 0\nwhile True:\n    write_atomic(sys.argv[1], bytes([i % 256]) * 300000); i += 1\n"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        try:
            while not path.exists():
                assert writer.poll() is None
            time.sleep(0.05)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1


class TestBlobStore:
    def test_content_names_the_blob_however_it_came(self, tmp_path):
        store = BlobStore(tmp_path / "blobs")
        assert store.put(b"abc") == store.put(iter([b"a", b"", b"bc"])) == sha256_hex(b"abc")
        assert store.read(sha256_hex(b"abc")) == b"abc"
        with store.open(sha256_hex(b"abc")) as file:
            assert file.read() == b"abc"

    def test_empty_blob(self, tmp_path):
        store = BlobStore(tmp_path)
        assert store.read(store.put(b"")) == b""

    def test_missing_and_deleted(self, tmp_path):
        store = BlobStore(tmp_path)
        digest = store.put(b"abc")
        assert store.has(digest)
        assert store.delete(digest)
        assert not store.delete(digest)
        assert not store.has(digest)
        with pytest.raises(NotFound):
            store.read(digest)
        with pytest.raises(NotFound):
            store.open(digest)

    @pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
    def test_a_name_that_is_no_digest_is_refused(self, tmp_path, name):
        with pytest.raises(StateError, match="64"):
            BlobStore(tmp_path).path(name)

    @pytest.mark.parametrize("damage", [b"", b"ab", b"abd", b"abcd"])
    def test_damage_is_found_and_healed_by_the_original(self, tmp_path, damage):
        store = BlobStore(tmp_path)
        digest = store.put(b"abc")
        store.path(digest).write_bytes(damage)
        with pytest.raises(StateCorrupt, match=digest):
            store.read(digest)
        with pytest.raises(StateCorrupt, match=digest):
            store.open(digest)
        assert store.put(b"abc") == digest
        assert store.read(digest) == b"abc"

    def test_a_full_disk_leaves_no_partial_blob(self, tmp_path, small_files):
        store = BlobStore(tmp_path)
        with small_files(1000), pytest.raises(DiskFull):
            store.put(bytes(100) for _ in range(100))
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []

    def test_a_source_that_fails_leaves_no_partial_blob(self, tmp_path):
        def source():
            yield b"abc"
            raise ConnectionError

        with pytest.raises(StateError):
            BlobStore(tmp_path).put(source())
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []

    def test_sweeps_what_a_killed_process_left_but_not_what_is_being_written(self, tmp_path):
        BlobStore(tmp_path)
        old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
        old.write_bytes(b"x")
        new.write_bytes(b"x")
        long_ago = time.time() - 3 * 86400
        os.utime(old, (long_ago, long_ago))
        BlobStore(tmp_path)
        assert not old.exists()
        assert new.exists()


def test_the_limit_that_stands_for_a_full_disk_is_lifted_again(small_files):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small_files(10):
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 10
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
