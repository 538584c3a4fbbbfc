"""Backups: of one moment while others write, whole or not there, checked to the last byte, put back whole."""

import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_fl.cli import app
from lepton_fl.crashpoints import OPERATOR, VARIABLE
from lepton_fl.crypto import new_key
from lepton_fl.delivery.keys import ONLINE, ROLES
from lepton_fl.delivery.keys import new_key as new_release_key
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import (
    ConfigError,
    DiskFull,
    LeptonError,
    NotFound,
    StateConflict,
    StateCorrupt,
    StateError,
    StateLocked,
    TrustError,
)
from lepton_fl.files import BlobStore, sha256_hex
from lepton_fl.plan import RunSpec
from lepton_fl.privacy.head import sign_head
from lepton_fl.privacy.record import FLEET, Policy
from lepton_server.attempts import AttemptLog
from lepton_server.authority import Authority
from lepton_server.backup import Manifest, Progress, create, verify
from lepton_server.config import ServerConfig
from lepton_server.coordinator import Coordinator
from lepton_server.lease import LIFE_S, MARK, claim, refuse_unfinished
from lepton_server.privacy import PrivacyKeys, set_budget
from lepton_server.releases import adopt, online_keys
from lepton_server.restore import restore
from lepton_server.store import Attempt, Received, open_store

OPEN = Attempt("r1", 1, 1)
MODEL, UPDATE, MASKED, RECORD = b"model" * 300, b"update" * 200, b"masked" * 100, b"record" * 9000
PASSPHRASE = b"five random words do it"


def configured(folder, url="", **more):
    sections = {"server": {"state_dir": str(folder / "state")}, "store": {"url": url}}
    return ServerConfig.model_validate(sections | more)


def allow(store, settings, epsilon):
    keys = PrivacyKeys(settings.server.state_dir / "keys", settings.privacy)
    with store.transaction() as change:
        set_budget(change, keys, Policy(FLEET, 1, epsilon, 1e-5))


def head_of(store, settings):
    keys = PrivacyKeys(settings.server.state_dir / "keys", settings.privacy)
    return sign_head(*store.ledger_head(), keys.signer())


def populate(settings, make_variant, folder):
    """A run in the middle of a round, a budget, a release; what lies in each place."""
    Authority.open(settings.server.state_dir / "keys", ["127.0.0.1"])
    blobs = BlobStore(settings.blob_dir)
    with open_store(settings.store_url) as store:
        allow(store, settings, 5.0)
        spec = RunSpec(task="a:b").to_json()
        store.record("run.queued", {"run_id": "r1", "name": "one", "spec": spec})
        store.record("run.started", {"run_id": "r1"})
        model = blobs.put(MODEL)
        store.record("model.created", {"model_sha256": model, "run_id": "r1", "round": 0})
        store.record("round.planned", OPEN._asdict() | {"plan": {}, "model_sha256": model})
        came = BlobStore(settings.attempts_dir)
        with store.transaction() as change:
            for device, update in (("d-one", UPDATE), ("d-two", MASKED)):
                change.add_received(*OPEN, Received(device, came.put(update), len(update), counted=False))
        AttemptLog(store, came, OPEN).append(RECORD, durable=True)
        keys = online_keys(settings)
        signers = {role: [new_release_key(keys if role in ONLINE else folder, role, None)] for role in ROLES}
        shelf = Shelf(settings.release_dir)
        shelf.repository.create(signers, {})
        shelf.publish([make_variant(folder / "variant")], signers["targets"], ungated=True)
        adopt(store, shelf)
        store.take_lease("somewhere", LIFE_S)


@pytest.fixture(scope="module")
def template(tmp_path_factory, make_variant):
    """An installation on SQLite, to be copied."""
    folder = tmp_path_factory.mktemp("installation")
    populate(configured(folder), make_variant, folder)
    return folder / "state"


@pytest.fixture
def live(tmp_path, template):
    """Settings of an installation with everything in it, on SQLite."""
    shutil.copytree(template, tmp_path / "live" / "state")
    return configured(tmp_path / "live")


@pytest.fixture
def backup(live, tmp_path):
    """A backup of it."""
    with open_store(live.store_url) as store:
        create(store, live, tmp_path / "backup")
    return tmp_path / "backup"


def contents(*folders):
    """Every file below some folders, but what does not belong to a state."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if path.is_file() and "tmp" not in parts and not any(p.startswith(".") for p in parts):
                found["/".join((folder.name, *parts))] = path.read_bytes()
    return found


def files(settings):
    return contents(settings.blob_dir, settings.release_dir, settings.server.state_dir / "keys")


def rows(settings):
    """All that the database says, but who leads it."""
    with open_store(settings.store_url) as store:
        assert store.rebuild().equal
        store.verify_journal()
        kept, received = store.kept(OPEN), store.received(*OPEN)
        return store.head(), store.events(), kept, received, store.budgets(), store.runs()


def seal_again(backup, **changes):
    """Let the manifest say what is there now, as an adversary would."""
    names = {name.removeprefix("backup/"): data for name, data in contents(backup).items()}
    names.pop("manifest.json")
    listed = {name: (len(data), sha256_hex(data)) for name, data in names.items()}
    made = replace(Manifest.read(backup), files=dict(sorted(listed.items())), **changes)
    (backup / "manifest.json").write_bytes(made.to_bytes())


# --- there and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "put"),
    [
        ("sqlite", "sqlite"),
        pytest.param("postgres", "postgres", marks=pytest.mark.postgres),
        pytest.param("sqlite", "postgres", marks=pytest.mark.postgres),
        pytest.param("postgres", "sqlite", marks=pytest.mark.postgres),
    ],
)
def test_what_is_put_back_is_what_was_there(tmp_path, request, make_variant, taken, put):
    def url(engine):
        return request.getfixturevalue("postgres").new_database() if engine == "postgres" else ""

    there, here = configured(tmp_path / "there", url(taken)), configured(tmp_path / "here", url(put))
    (tmp_path / "there" / "state").mkdir(mode=0o700, parents=True)
    populate(there, make_variant, tmp_path / "there")
    with open_store(there.store_url) as store:
        made = create(store, there, tmp_path / "backup")
        assert (made.head, made.ledger, made.engine[:6]) == (
            store.head(),
            store.ledger_head(),
            taken[:6],
        )
    found, key = verify(tmp_path / "backup")
    assert found == made
    assert key
    assert restore(tmp_path / "backup", here) == made
    assert rows(here) == rows(there)
    assert files(here) == files(there)
    assert sorted(path.name for path in here.server.state_dir.iterdir() if path.name != "lepton.db") == [
        "blobs",
        "coordinator.lock",
        "keys",
        "releases",
    ]
    with open_store(here.store_url) as store, open_store(there.store_url) as before:
        assert AttemptLog(store, BlobStore(here.attempts_dir), OPEN).found == (RECORD,)
        lease = store.lease()
        assert lease.holder == ""
        assert lease.token > before.lease().token
        store.record("run.waiting", {"run_id": "r1", "cause": "", "until": 0.0})  # it can be gone on with
    for path in (tmp_path / "backup").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    for path in here.server.state_dir.rglob("*"):
        assert path.name == "coordinator.lock" or not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_it_is_of_one_moment_and_nobody_waits_for_its_end(live, tmp_path):
    blobs, head = BlobStore(live.blob_dir), []
    with open_store(live.store_url) as store:
        before = files(live)

        class Meanwhile(Progress):
            def rows(self, count):
                if not head:  # the moment is over: everything is open, rows are being copied
                    head.append(store.record("server.started", {"version": "2"}))
                    blobs.put(b"a later model")
                    for path in list(live.blob_dir.glob("??/*")) + list(live.attempts_dir.glob("??/*")):
                        path.unlink()

        made = create(store, live, tmp_path / "backup", progress=Meanwhile())
        assert made.head.seq == head[0].seq - 1
        assert store.head_seq() == head[0].seq
    verify(tmp_path / "backup")
    restore(tmp_path / "backup", configured(tmp_path / "here"))
    assert files(configured(tmp_path / "here")) == before


def test_at_the_moment_nobody_else_writes(live, tmp_path):
    with open_store(live.store_url) as store, open_store(live.store_url, lock_timeout=0.05) as other:

        def meanwhile():
            with pytest.raises(StateLocked):
                other.record("server.started", {"version": "2"})

        with store.snapshot(meanwhile) as taken:
            other.record("server.started", {"version": "2"})
            assert taken.head.seq == other.head_seq() - 1


def test_a_backup_is_not_written_over_another(live, backup, tmp_path):
    before = contents(backup)
    with open_store(live.store_url) as store:
        with pytest.raises(StateConflict, match="there already"):
            create(store, live, backup)
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(StateConflict, match="there already"):
            create(store, live, tmp_path / "link")
    assert contents(backup) == before


def test_two_that_make_the_same_backup_do_not_mix(live, tmp_path):
    with open_store(live.store_url) as store:

        class Meanwhile(Progress):
            def rows(self, count):
                with pytest.raises(StateLocked, match="Another process makes"):
                    create(store, live, tmp_path / "backup")

        create(store, live, tmp_path / "backup", progress=Meanwhile())
    verify(tmp_path / "backup")


def test_a_damaged_model_is_told_when_the_backup_is_made(live, tmp_path):
    (path,) = live.blob_dir.glob("??/*")
    path.write_bytes(MODEL + b"x")
    with open_store(live.store_url) as store, pytest.raises(StateCorrupt, match="damaged or altered"):
        create(store, live, tmp_path / "backup")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live"]


# --- what does not pass -----------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found_and_named(backup):
    rng, everything = random.Random(1), sorted(p for p in backup.rglob("*") if p.is_file())
    for path in everything * 12:
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(StateCorrupt) as raised:
            verify(backup)
        assert path.relative_to(backup).as_posix() in str(raised.value)
        path.write_bytes(whole[:at])
        with pytest.raises(StateCorrupt, match=path.name):
            verify(backup)
        path.write_bytes(whole)
    verify(backup)


def test_what_is_missing_or_additional_is_named(backup):
    for path in [p for p in backup.rglob("*") if p.is_file()]:
        path.rename(backup.parent / "aside")
        with pytest.raises((StateCorrupt, NotFound), match=path.name):
            verify(backup)
        (backup.parent / "aside").rename(path)
    (backup / "blobs" / "more").write_bytes(b"")
    with pytest.raises(StateCorrupt, match=r"blobs/more does not belong"):
        verify(backup)
    (backup / "blobs" / "more").unlink()
    (backup / "keys" / "link").symlink_to("/etc")
    with pytest.raises(StateCorrupt, match=r"keys/link is no plain file"):
        verify(backup)


def test_tables_that_are_not_what_the_journal_says(backup):
    with sqlite3.connect(backup / "lepton.db") as database:
        database.execute("UPDATE run SET name = 'other'")
    database.close()
    seal_again(backup)
    with pytest.raises(StateCorrupt, match="name differs"):
        verify(backup)


def test_a_journal_that_was_altered(backup):
    with sqlite3.connect(backup / "lepton.db") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE event SET time = time + 1 WHERE seq = 3")
    database.close()
    seal_again(backup)
    with pytest.raises(StateCorrupt, match=r"[Ee]vent 3"):
        verify(backup)


@pytest.mark.parametrize("which", ["blobs/??/*", "blobs/attempts/??/*", "releases/blobs/??/*"])
def test_a_file_that_the_journal_needs(backup, which):
    for path in backup.glob(which):
        path.unlink()
    seal_again(backup)
    with pytest.raises(LeptonError, match=r"is not in it|no blob"):
        verify(backup)


def test_a_manifest_of_somebody_elses_making(backup, tmp_path):
    (backup / "strange").mkdir()
    (backup / "strange" / "file").write_bytes(b"x")
    seal_again(backup)
    with pytest.raises(StateCorrupt, match="strange/file does not belong"):
        restore(backup, configured(tmp_path / "here"))
    shutil.rmtree(backup / "strange")
    seal_again(backup, head=Manifest.read(backup).ledger)
    with pytest.raises(StateCorrupt, match="its journal is not the one"):
        verify(backup)
    for text in (b"", b"[]", b"{}", b'{"format":"lepton backup 1"}', b"9" * 5000, b'{"format":1'):
        (backup / "manifest.json").write_bytes(text)
        with pytest.raises(StateCorrupt):
            verify(backup)


# --- keys -------------------------------------------------------------------------------------------


def test_under_a_passphrase_no_key_can_be_read(live, tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('[server]\nname = "a secret name"\n')
    sealed = tmp_path / "sealed"
    with open_store(live.store_url) as store:
        with pytest.raises(TrustError, match="at least 12"):
            create(store, live, sealed, passphrase=b"short")
        create(store, live, sealed, config=config, passphrase=PASSPHRASE)
    everything = b"".join(contents(sealed).values())
    assert b"PRIVATE KEY" not in everything
    assert b"a secret name" not in everything
    keys = contents(live.server.state_dir / "keys")
    assert keys
    assert not any(data in everything for data in keys.values())
    verify(sealed)
    verify(sealed, passphrase=PASSPHRASE)
    here = configured(tmp_path / "here")
    with pytest.raises(TrustError, match="does not open"):
        restore(sealed, here, passphrase=PASSPHRASE + b"x")
    with pytest.raises(ConfigError, match="sealed"):
        restore(sealed, here)
    restore(sealed, here, passphrase=PASSPHRASE)
    assert files(here) == files(live)
    assert (here.server.state_dir / "server.toml").read_bytes() == config.read_bytes()


def test_keys_that_lie_elsewhere_are_named_and_not_copied(live, tmp_path):
    noise = tmp_path / "noise.key"
    noise.write_bytes(b"n" * 32)
    inside = live.server.state_dir / "keys" / "budget.key"
    apart = ServerConfig.model_validate(
        live.model_dump() | {"privacy": {"noise_key": str(noise), "budget_key": str(inside)}}
    )
    with open_store(live.store_url) as store:
        made = create(store, apart, tmp_path / "backup")
    assert made.elsewhere == ("privacy.noise_key",)
    assert b"n" * 32 not in b"".join(contents(tmp_path / "backup").values())


# --- where it may be put ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["keys/ca.key", "blobs/ab/cd", "releases/metadata/1.root.json"])
def test_an_installation_that_is_not_empty_is_refused_by_name(backup, tmp_path, place):
    here = configured(tmp_path / "here")
    path = here.server.state_dir / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(StateConflict, match=place):
        restore(backup, here)
    assert contents(here.server.state_dir) == {f"state/{place}": b"mine", "state/coordinator.lock": _pid()}


def _pid():
    return str(os.getpid()).encode()


def test_a_database_that_is_not_empty_is_refused(backup, tmp_path, database):
    here = configured(tmp_path / "here", database if "://" in database else f"sqlite:///{database}")
    with open_store(here.store_url) as store:
        store.record("server.started", {"version": "1"})
    with pytest.raises(StateConflict, match="a database with 1 events"):
        restore(backup, here)
    restore(backup, here, replace=True)
    with open_store(here.store_url) as store:
        assert store.head() == Manifest.read(backup).head
        assert store.rebuild().equal
    assert not (here.server.state_dir / MARK).exists()


def test_what_is_replaced_is_moved_aside(backup, tmp_path):
    here = configured(tmp_path / "here")
    (here.server.state_dir / "keys").mkdir(parents=True)
    (here.server.state_dir / "keys" / "ca.key").write_bytes(b"mine")
    with open_store(here.store_url) as store:
        store.record("server.started", {"version": "1"})
        head = store.head()
    restore(backup, here, replace=True)
    (aside,) = here.server.state_dir.glob("keys.replaced-*")
    assert (aside / "ca.key").read_bytes() == b"mine"
    (old,) = here.server.state_dir.glob("lepton.db.replaced-*")
    with open_store(old) as store:
        assert store.head() == head


def test_never_under_a_coordinator(backup, tmp_path, database):
    here = configured(tmp_path / "here", database if "://" in database else f"sqlite:///{database}")
    here.server.state_dir.mkdir(parents=True)
    with claim(here.server.state_dir), pytest.raises(StateLocked, match="uses"):
        restore(backup, here, replace=True)
    with open_store(here.store_url) as store:
        store.take_lease("another host", LIFE_S)
        with pytest.raises(StateLocked, match="another host holds the lease"):
            restore(backup, here, replace=True)
        with open_store(backup / "lepton.db") as source, pytest.raises(StateLocked, match="another host"):
            store.fill(source, life_s=LIFE_S, replace=True)  # it came between the look and the change
        store.drop_lease()


# --- older ledgers ----------------------------------------------------------------------------------


def test_an_older_ledger_than_the_published_head_is_refused(live, backup, tmp_path):
    here = configured(tmp_path / "here")
    with open_store(live.store_url) as store:
        known = head_of(store, live)
        allow(store, live, 6.0)
        published = head_of(store, live)
    with pytest.raises(StateCorrupt, match="older copy"):
        restore(backup, here, head=published)
    assert not (here.server.state_dir / "lepton.db").exists()
    forged = replace(published, signature=sign_head(1, "ab" * 32, new_key()).signature)
    with pytest.raises(TrustError):
        restore(backup, here, head=forged)
    restore(backup, here, head=known)


def test_an_older_ledger_than_the_one_that_is_there_is_refused(live, backup):
    with open_store(live.store_url) as store:
        store.drop_lease()
        allow(store, live, 6.0)
    before = rows(live)
    with pytest.raises(StateCorrupt, match="which the backup lacks"):
        restore(backup, live, replace=True)
    assert rows(live) == before


def test_the_same_ledger_may_be_put_back(live, backup):
    with open_store(live.store_url) as store:
        store.drop_lease()
        store.record("run.waiting", {"run_id": "r1", "cause": "later", "until": 1.0})  # nothing of the ledger
    before = files(live)
    restore(backup, live, replace=True)
    assert rows(live)[0] == Manifest.read(backup).head
    assert files(live) == before


def test_a_ledger_that_cannot_be_read_is_not_replaced(backup, tmp_path):
    here = configured(tmp_path / "here")
    here.server.state_dir.mkdir(parents=True)
    (here.server.state_dir / "lepton.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 8192)
    with pytest.raises(StateCorrupt, match="cannot be read") as raised:
        restore(backup, here, replace=True)
    assert "by hand" in raised.value.hint


# --- crashes and full disks -------------------------------------------------------------------------


def lepton(*words, crash=""):
    """The command in a process of its own."""
    environment = os.environ | ({VARIABLE: crash} if crash else {})
    command = [str(Path(sys.executable).parent / "lepton"), "backup", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("point", [p for p in OPERATOR if p.startswith("backup.")])
def test_a_backup_that_is_killed_is_not_there(live, tmp_path, point):
    words = ("create", tmp_path / "backup", "--state-dir", live.server.state_dir)
    assert lepton(*words, crash=point).returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".backup.part", "live"]
    assert lepton("verify", tmp_path / "backup").returncode == 9
    with open_store(live.store_url) as store:
        create(store, live, tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "live"]
    verify(tmp_path / "backup")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "over"),
    [
        ("restore.begun", False),
        ("restore.files", False),
        ("restore.database", False),
        ("restore.begun", True),
        ("restore.files", True),
    ],
)
def test_a_restore_that_is_killed_is_not_taken_for_a_whole_one(live, backup, tmp_path, point, over, capsys):
    here = configured(tmp_path / "here")
    if over:
        with open_store(live.store_url) as store:
            store.drop_lease()
        here = live
    state = here.server.state_dir
    more = ["--replace"] if over else []
    killed = lepton("restore", backup, "--state-dir", state, *more, crash=point)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(StateError, match="is not whole"):
        refuse_unfinished(state)
    assert app.run(["run", "list", "--state-dir", str(state)]) == 7
    assert "not whole" in capsys.readouterr().err
    with pytest.raises(StateError, match="is not whole"):
        Coordinator(here).start()
    restore(backup, here, replace=over)
    refuse_unfinished(state)
    assert rows(here)[0] == Manifest.read(backup).head
    assert files(here) == {
        name.removeprefix("backup/"): data for name, data in contents(backup).items() if name.count("/") > 1
    }
    assert not list(state.glob(".lepton-backup-*"))
    aside = list(state.glob("lepton.db.replaced-*"))
    assert len(aside) >= int(over)  # what was there before is never deleted


def test_a_full_disk_leaves_nothing_behind(live, tmp_path, small_files):
    with open_store(live.store_url) as store:
        for limit in (2_000, 20_000, 100_000):
            with small_files(limit), pytest.raises(DiskFull):
                create(store, live, tmp_path / "backup")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["live"]
        create(store, live, tmp_path / "backup")


def test_a_restore_on_a_full_disk_is_marked_and_can_be_repeated(backup, tmp_path, small_files):
    here = configured(tmp_path / "here")
    with small_files(100_000), pytest.raises(DiskFull):
        restore(backup, here)
    restore(backup, here)
    assert rows(here)[0] == Manifest.read(backup).head


# --- the commands -----------------------------------------------------------------------------------


def test_the_commands(live, tmp_path, capsys):
    def call(*words):
        code = app.run(["backup", *map(str, words), "--format", "json"])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, json.loads(out.out) if code == 0 else json.loads(out.err.splitlines()[-1])

    state, folder = live.server.state_dir, tmp_path / "backup"
    code, made = call("create", folder, "--state-dir", state)
    assert (code, made["keys"], made["database"]) == (0, "in the clear", "sqlite")
    assert call("create", folder, "--state-dir", state)[0] == 7
    code, found = call("verify", folder)
    assert (code, found["id"], found["head"]) == (0, made["id"], made["head"])
    with open_store(live.store_url) as store:
        published = tmp_path / "head.json"
        published.write_text(json.dumps(head_of(store, live).to_json()))
        assert call("verify", folder, "--head", published)[0] == 0
        allow(store, live, 7.0)
        published.write_text(json.dumps(head_of(store, live).to_json()))
    assert call("verify", folder, "--head", published)[0] == 7
    assert call("restore", folder, "--head", published, "--state-dir", tmp_path / "here")[0] == 7
    assert call("restore", folder, "--head", tmp_path / "none", "--state-dir", tmp_path / "here")[0] == 3
    assert call("restore", folder, "--state-dir", state)[1]["message"].startswith("The installation is not")
    assert call("restore", tmp_path / "none", "--state-dir", tmp_path / "new")[0] == 9
    assert not (tmp_path / "new").exists()
    assert call("restore", folder, "--state-dir", tmp_path / "here")[0] == 0
