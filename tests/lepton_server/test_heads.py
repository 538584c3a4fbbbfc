"""The head of the privacy ledger: told to devices, and missed by an old copy."""

import shutil
from dataclasses import replace

import pytest

from lepton_fl.cli import app
from lepton_fl.crypto import new_key
from lepton_fl.errors import BudgetRefused, StateCorrupt, TrustError
from lepton_fl.plan import RunSpec
from lepton_fl.privacy.events import Gaussian
from lepton_fl.privacy.head import LedgerHead, sign_head
from lepton_fl.privacy.record import FLEET, Policy
from lepton_server.config import PrivacySection
from lepton_server.heads import Heads, refuse_older
from lepton_server.privacy import Ledger, PrivacyKeys, set_budget
from lepton_server.store import open_store

PRIVACY = {"mechanism": "independent", "noise_multiplier": 20.0, "delta": 1e-5}
SPEC = RunSpec.model_validate({"task": "a:b", "evaluate_every": 0, "cohort": {"size": 2}, "privacy": PRIVACY})


@pytest.fixture
def keys(tmp_path):
    return PrivacyKeys(tmp_path / "keys", PrivacySection())


def budget(store, keys, epsilon):
    with store.transaction() as change:
        set_budget(change, keys, Policy(FLEET, 1, epsilon, 1e-5))


def reserve(store, keys, number):
    ledger = Ledger(store, "r", SPEC, keys.public())
    ledger.reserve("r", number, 1, Gaussian(20.0))
    with store.transaction() as change:
        ledger.write_reserved(change)


@pytest.fixture
def store(tmp_path, keys):
    with open_store(tmp_path / "lepton.db") as opened:
        with opened.transaction() as change:
            change.record("run.queued", {"run_id": "r", "name": "r", "spec": SPEC.to_json()})
            change.record("run.started", {"run_id": "r"})
        yield opened


def head_of(store, keys):
    heads = Heads(store, keys)
    heads.refresh()
    return heads.head


def test_an_empty_ledger_has_no_head_and_needs_no_key(store, keys, tmp_path):
    heads = Heads(store, keys)
    heads.refresh()
    assert heads.told is None
    assert heads.head is None
    assert not (tmp_path / "keys").exists()


def test_the_head_is_the_newest_line_of_the_ledger_and_signed(store, keys):
    budget(store, keys, 5.0)
    store.record("server.started", {})  # no line of the ledger
    heads = Heads(store, keys)
    heads.refresh()
    event = store.events(kinds=["budget.set"])[-1]
    assert (heads.head.seq, heads.head.hash.hex()) == (event.seq, event.hash)
    heads.head.check()
    assert heads.told.seq == event.seq
    reserve(store, keys, 1)
    heads.refresh()
    assert heads.head.objection(head_of(store, keys)) == ""
    assert heads.head.seq == store.head_seq()


def test_what_an_older_copy_has_forgotten_is_missed_and_nothing_is_reserved_any_more(store, keys, tmp_path):
    budget(store, keys, 5.0)
    reserve(store, keys, 1)
    early = head_of(store, keys)
    with open_store(tmp_path / "lepton.db") as other:  # the copy, made while it was so
        other._engine.raw_connection().execute("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    reserve(store, keys, 2)
    seen = head_of(store, keys)
    with open_store(tmp_path / "copy.db") as copy:
        reserve(copy, keys, 2)  # the same charge, another event: another branch
        reserve(copy, keys, 3)
        heads = Heads(copy, keys)
        heads.refresh()
        assert heads.head.seq > seen.seq  # the device alone could not tell
        assert heads.head.objection(seen) == ""
        heads.judge("d1", early)
        assert heads.fits(early)
        assert copy.missed_head() is None
        heads.judge("d1", seen)
        heads.judge("d2", seen)  # once is enough
        assert not heads.fits(seen)
        assert [e.body["device_id"] for e in copy.events(kinds=["ledger.missed"])] == ["d1"]
        assert copy.missed_head() == seen.seq
        with pytest.raises(BudgetRefused, match="older copy"):
            reserve(copy, keys, 4)
        assert len(copy.charges("r")) == 3
        refuse_older(copy, early)
        with pytest.raises(StateCorrupt, match="older copy"):
            refuse_older(copy, seen)
        copy.verify_journal()
        assert copy.rebuild().equal
    refuse_older(store, seen)
    with pytest.raises(TrustError):
        refuse_older(store, replace(seen, seq=seen.seq + 1))


def test_a_head_that_nobody_here_has_signed_changes_nothing(store, keys, caplog):
    budget(store, keys, 5.0)
    heads = Heads(store, keys)
    heads.refresh()
    real = heads.head
    for strange in (
        sign_head(1000, "a" * 64, new_key()),
        replace(real, seq=real.seq + 1),
        replace(real, hash=bytes(32)),
        LedgerHead(5, bytes(32), b"x", b"y"),
    ):
        heads.judge("d1", strange)
    assert store.missed_head() is None
    assert caplog.text.count("not signed") == 1
    reserve(store, keys, 1)


def test_a_head_of_a_moment_ago_by_another_process_is_no_alarm(store, keys, tmp_path):
    budget(store, keys, 5.0)
    heads = Heads(store, keys)
    heads.refresh()
    with open_store(tmp_path / "lepton.db") as other:
        reserve(other, keys, 1)
        seen = head_of(other, keys)
    assert not heads.fits(seen)
    heads.judge("d1", seen)
    assert heads.told.seq == seen.seq  # and the answer is not older
    assert store.missed_head() is None


def test_a_lost_database_is_missed_too(store, keys, tmp_path):
    budget(store, keys, 5.0)
    seen = head_of(store, keys)
    with open_store(tmp_path / "new.db") as fresh:
        heads = Heads(fresh, keys)
        heads.refresh()
        heads.judge("d1", seen)
        assert fresh.missed_head() == seen.seq
    shutil.rmtree(tmp_path / "keys")  # with the key it is a stranger's: another installation
    with open_store(tmp_path / "newer.db") as fresh:
        heads = Heads(fresh, keys)
        heads.refresh()
        heads.judge("d1", seen)
        budget(fresh, keys, 1.0)
        heads.refresh()
        heads.judge("d1", seen)
        assert fresh.missed_head() is None


def test_the_command_prints_the_head_and_holds_the_ledger_against_one(tmp_path, capsys):
    state = tmp_path / "state"
    state.mkdir()
    open_store(state / "lepton.db").close()

    def lepton(*words):
        code = app.run([*words, "--state-dir", str(state)])
        return code, capsys.readouterr()

    assert lepton("privacy", "head")[0] == 9
    budget = ("privacy", "budget", "fleet", "--delta", "1e-5", "--epsilon")
    assert lepton(*budget, "2")[0] == 0
    kept = tmp_path / "head.json"
    kept.write_text(lepton("privacy", "head", "--format", "json")[1].out)
    shutil.copytree(state, tmp_path / "copy")
    assert lepton(*budget, "3")[0] == 0
    code, said = lepton("privacy", "head", str(kept))
    assert (code, "part of this ledger" in said.out) == (0, True)
    kept.write_text(lepton("privacy", "head", "--format", "json")[1].out)
    shutil.rmtree(state)
    (tmp_path / "copy").rename(state)
    code, said = lepton("privacy", "head", str(kept))
    assert (code, "older copy" in said.err) == (7, True)
    kept.write_text("{}")
    assert lepton("privacy", "head", str(kept))[0] == 7
