"""What a device keeps of models: verified, within its quota, and no trouble if the disk makes some."""

import hashlib
import os
import stat

import pytest

from lepton_client.objects import KeptObjects


def some(number, size=2000):
    content = number.to_bytes(4, "big") * (size // 4)
    return hashlib.sha256(content).hexdigest(), content


def used(folder, name, at):
    os.utime(folder / name, (at, at))


@pytest.fixture
def kept(tmp_path):
    return KeptObjects(tmp_path / "objects", 5000)


def test_what_is_kept_is_there_again_and_private(kept, tmp_path):
    name, content = some(1)
    assert kept.get(name) is None
    kept.put(name, content)
    assert KeptObjects(tmp_path / "objects", 5000).get(name) == content
    assert kept.names() == [name]
    assert stat.S_IMODE((tmp_path / "objects" / name).stat().st_mode) == 0o600
    kept.drop(name)
    assert (kept.get(name), kept.names()) == (None, [])


def test_what_was_not_used_for_longest_goes_first(kept, tmp_path):
    (a, at), (b, bt), (c, ct) = some(1), some(2), some(3)
    kept.put(a, at)
    kept.put(b, bt)
    used(tmp_path / "objects", a, 1_000)
    used(tmp_path / "objects", b, 2_000)
    assert kept.get(a) == at  # used now
    kept.put(c, ct)
    assert set(kept.names()) == {a, c}
    assert sum(path.stat().st_size for path in (tmp_path / "objects").iterdir()) <= 5000


def test_the_quota_is_never_passed_and_may_be_nothing(kept, tmp_path):
    name, content = some(1, 8000)
    kept.put(name, content)
    assert kept.names() == []
    none = KeptObjects(tmp_path / "none", 0)
    none.put(*some(2))
    assert none.get(some(2)[0]) is None
    assert not (tmp_path / "none").exists()


def test_damaged_files_and_others_names_are_not_used(kept, tmp_path):
    name, content = some(1)
    kept.put(name, content)
    (tmp_path / "objects" / name).write_bytes(content[:-1] + b"!")
    assert kept.get(name) is None
    assert not (tmp_path / "objects" / name).exists()
    for wrong in ("../../key", "", "ab" * 31, name.upper() + "x"):
        kept.put(wrong, content)
        assert kept.get(wrong) is None
    assert list(tmp_path.rglob("*key*")) == []


def test_a_disk_that_takes_nothing_is_no_trouble(tmp_path, caplog):
    (tmp_path / "objects").write_text("a file where the folder should be")
    kept = KeptObjects(tmp_path / "objects", 5000)
    kept.put(*some(1))
    assert kept.get(some(1)[0]) is None
    kept.drop(some(1)[0])
    assert kept.names() == []


def test_what_a_killed_process_left_half_written_is_removed(kept, tmp_path):
    kept.put(*some(1))
    left = tmp_path / "objects" / f".{some(2)[0]}.tmp"
    left.write_bytes(b"half")
    kept.put(*some(3))
    assert not left.exists()
