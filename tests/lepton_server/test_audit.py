"""`lepton audit`: no edit of a journal stays unseen, and a model card says what the journal says."""

import io
import json
import random
import re
import stat

import numpy as np
import pytest

from lepton_fl.cli import app
from lepton_fl.delivery.keys import ROLES, new_key
from lepton_fl.delivery.shelf import Shelf
from lepton_fl.errors import ConfigError, NotFound, StateCorrupt, TrustError
from lepton_fl.files import GENESIS, BlobStore, canonical_json, event_line, sha256_hex
from lepton_fl.privacy.record import Policy
from lepton_fl.vector import to_grid
from lepton_fl.wire.messages import Ticket, TrainReply
from lepton_server.audit import (
    FORMAT,
    Auditor,
    export_lines,
    parse_head,
    verify_blobs,
    verify_export,
    verify_releases,
)
from lepton_server.config import PrivacySection
from lepton_server.privacy import PrivacyKeys, set_budget
from lepton_server.store import Head, open_store

EDITS = 10_000
SHA = "ab" * 32


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The export of a small journal with a signed budget, a paid model and a release."""
    folder = tmp_path_factory.mktemp("state")
    keys = PrivacyKeys(folder / "keys", PrivacySection())
    attempt = {"run_id": "r1", "round": 1, "attempt": 1}
    with open_store(folder / "lepton.db") as store:
        store.record("server.started", {"version": "1"})
        with store.transaction() as change:
            set_budget(change, keys, Policy("fleet", 1, 9.0, 1e-3, note='with "quotes" and \\'))
        spec = {"task": "a:b", "privacy": {"unit": "device"}}
        store.record("run.queued", {"run_id": "r1", "name": "Straße", "spec": spec})
        store.record("run.started", {"run_id": "r1"})
        plan = attempt | {"plan": {}, "model_sha256": SHA}
        reserved = attempt | {"events": ['{"kind":"gaussian","noise_multiplier":9.0}'], "accounts": ["fleet"]}
        with store.transaction() as change:
            change.record("round.planned", plan)
            change.record("privacy.reserved", _spelt(reserved))
        store.record("privacy.releasing", attempt)
        with store.transaction() as change:
            change.record("round.committed", attempt | {"model_sha256": SHA})
            change.record("model.created", {"model_sha256": SHA, "run_id": "r1", "round": 1})
            change.record("privacy.committed", attempt | {"model_sha256": SHA})
        release = {"release": SHA, "task": "a:b", "variant": "v", "sequence": 1}
        store.record("release.published", release)
        for _ in range(4):
            store.record("run.waiting", {"run_id": "r1", "cause": "nobody", "until": 0.5})
        with store.journal() as (head, lines):
            return head, b"".join(export_lines(head, lines))


def _spelt(body):
    from lepton_fl.privacy.events import Gaussian, to_json

    return body | {"events": [to_json(Gaussian(9.0))]}


def check(data, published=None, deep=False):
    return verify_export(io.BytesIO(data), published, deep=deep)


# --- edits ------------------------------------------------------------------------------------------


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def delete(data, rng):
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        return data[:at] + data[at + rng.randint(1, 40) :]
    lines = data.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def reorder(data, rng):
    lines = data.splitlines(keepends=True)
    one, two = rng.sample(range(len(lines)), 2)
    lines[one], lines[two] = lines[two], lines[one]
    return b"".join(lines)


def truncate(data, rng):
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: rng.randrange(len(lines))])


def append(data, rng):
    lines = data.splitlines(keepends=True)
    one = rng.choice(lines)
    added = [one, b"\n", b" ", rng.randbytes(rng.randint(1, 60)), rechained(data, rng)[-1]]
    return data + rng.choice(added)


def rechained(data, rng):
    """The lines with one more event that continues the last one rightly."""
    lines = data.splitlines(keepends=True)
    body = canonical_json({"cause": rng.choice("abc"), "run_id": "r1", "until": 0.0}).decode()
    more = event_line(sha256_hex(lines[-1][:-1]), len(lines), 5.0, "run.waiting", "r1", body)
    return [*lines, more + b"\n"]


def announced(lines):
    """With a first line that fits: what somebody does who can write the file and knows its form."""
    head = sha256_hex(lines[-1][:-1]) if len(lines) > 1 else GENESIS
    first = canonical_json({"format": FORMAT, "events": len(lines) - 1, "head": head})
    return b"".join([first + b"\n", *lines[1:]])


@pytest.mark.parametrize("edit", [flip, delete, reorder, truncate, append])
def test_every_edit_is_found(small, edit):
    head, data = small
    assert check(data, deep=True).head == head
    rng, missed = random.Random(f"edits {edit.__name__}"), []
    for number in range(EDITS // 5):
        changed = edit(data, rng)
        assert changed != data, number
        try:
            check(changed)
        except StateCorrupt:
            continue
        missed.append(number)
    assert missed == []


def test_a_published_head_finds_what_the_chain_alone_cannot(small):
    head, data = small
    lines = data.splitlines(keepends=True)
    for kept in range(1, len(lines)):
        with pytest.raises(StateCorrupt, match=r"cut off|charged to nobody"):
            check(announced(lines[:kept]), head)
    short = announced(lines[:-1])
    assert check(short).head.seq == head.seq - 1  # alone it is a true, shorter history
    forged = announced(rechained(b"".join(lines[:-1]), random.Random(1)))
    assert check(forged).head.seq == head.seq
    with pytest.raises(StateCorrupt, match="another history"):
        check(forged, head)
    longer = announced(rechained(data, random.Random(1)))  # what came after the head is growth
    assert check(longer, head).head.seq == head.seq + 1


def rewritten(data, change):
    """The whole history written anew with one event changed, hashes and all: a forger with the database."""
    last, lines = GENESIS, [b""]
    for seq, line in enumerate(data.splitlines()[1:], start=1):
        _, _, _, time, kind, subject, text = json.loads(line)
        body = change(kind, json.loads(text))
        if kind.startswith(("budget.", "privacy.")):
            body["previous"] = rewritten.ledger if seq > 2 else GENESIS
        text = canonical_json(body).decode()
        lines.append(event_line(last, seq, float.fromhex(time), kind, subject, text) + b"\n")
        last = sha256_hex(lines[-1][:-1])
        if kind.startswith(("budget.", "privacy.")):
            rewritten.ledger = last
    return announced(lines)


def test_a_forged_history_does_not_have_the_budget_keys_signature(small):
    _, data = small
    assert check(rewritten(data, lambda kind, body: body)).ledger.budgets
    with pytest.raises(StateCorrupt, match="not signed by the budget key"):
        check(rewritten(data, lambda kind, body: body | {"epsilon": 99.0} if kind == "budget.set" else body))
    other = {"model_sha256": "cd" * 32}
    with pytest.raises(StateCorrupt, match="charged to nobody"):
        check(rewritten(data, lambda kind, body: body | other if kind == "model.created" else body))


def test_deep_holds_every_body_against_its_schema(small):
    _, data = small
    odd = rewritten(data, lambda kind, body: body | {"more": 1} if kind == "run.waiting" else body)
    check(odd)
    with pytest.raises(StateCorrupt, match="more"):
        check(odd, deep=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b"[" * 900,
        b"\xff" * 2000,
        b'{"format":"lepton run journal 1"}\n',
    ],
)
def test_what_is_no_journal_is_refused(data):
    with pytest.raises(StateCorrupt, match="begins with format"):
        check(data)


@pytest.mark.parametrize(
    "text", ["", "5", ":" + SHA, "x:" + SHA, "-1:" + SHA, "5:" + SHA[1:], "5:" + "G" * 64]
)
def test_what_is_no_head_is_refused(text):
    with pytest.raises(ConfigError, match="SEQ:HASH"):
        parse_head(text)
    assert parse_head(f"5:{SHA}\n") == Head(5, SHA)


def test_a_number_has_one_spelling(small):
    head, data = small
    spelt = data.replace(b'"events":%d,' % head.seq, b'"events":%d.0,' % head.seq)
    with pytest.raises(StateCorrupt, match="begins with format"):
        check(spelt)
    with pytest.raises(StateCorrupt, match="first line"):
        check(data.replace(b'"events":', b'"events": ', 1))
    with pytest.raises(StateCorrupt, match="begins with format"):
        check(data.replace(b'"head":"', b'"head":"\\ud800', 1))


def test_an_empty_journal_is_true(tmp_path):
    with open_store(tmp_path / "lepton.db") as store, store.journal() as (head, lines):
        data = b"".join(export_lines(head, lines))
    assert check(data).head == Head(0, GENESIS)


# --- releases and models ----------------------------------------------------------------------------


def test_releases_are_signed_and_journaled(tmp_path):
    shelf = Shelf(tmp_path / "releases")
    with pytest.raises(NotFound, match="no root"):
        verify_releases(shelf.folder, {})
    keys = {role: [new_key(tmp_path / "keys", role, None)] for role in ROLES}
    shelf.repository.create(keys, {})
    assert verify_releases(shelf.folder, {}) == 0
    with pytest.raises(StateCorrupt, match="not signed"):
        verify_releases(shelf.folder, {SHA: ("a:b", 1)})
    path = shelf.folder / "metadata" / "1.targets.json"
    path.write_bytes(re.sub(rb'("version": ?)1', rb"\g<1>2", path.read_bytes()))
    with pytest.raises(TrustError, match="targets"):
        verify_releases(shelf.folder, {})


@pytest.fixture
def done(works):
    run_id = works.queue("r1")
    works.driver().start()
    works.finished(run_id)
    return works


def test_models_are_there_with_their_hashes(done):
    there, dropped = verify_blobs(done.store, done.blobs)
    assert there >= 2
    assert dropped >= 0
    newest = done.blobs.path(done.store.run("r1").model_sha256)
    kept = newest.read_bytes()
    newest.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(StateCorrupt, match="damaged or altered"):
        verify_blobs(done.store, done.blobs)
    newest.unlink()
    with pytest.raises(StateCorrupt, match="is not in"):
        verify_blobs(done.store, BlobStore(done.blobs.folder))


# --- the commands -----------------------------------------------------------------------------------


@pytest.fixture
def lepton(done, capsys):
    def call(*words):
        code = app.run(["audit", *map(str, words), "--state-dir", str(done.folder), "--format", "json"])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, json.loads(out.out) if code == 0 else out.err

    return call


def test_an_export_is_verified_elsewhere(done, lepton, tmp_path):
    folder = tmp_path / "evidence"
    code, made = lepton("export", folder, "--run", "r1")
    assert code == 0
    assert stat.S_IMODE((folder / "journal.jsonl").stat().st_mode) == 0o600
    code, live = lepton("verify", "--deep", "--head", made["head"])
    assert (code, live["head"]) == (0, made["head"])
    code, found = lepton("verify", folder / "journal.jsonl", "--deep", "--head", made["head"])
    assert (code, found["head"], found["models"]) == (0, made["head"], live["models"])
    assert lepton("export", folder)[0] != 0  # nothing is overwritten
    assert lepton("verify", tmp_path / "none.jsonl")[0] != 0
    code, error = lepton("verify", "--head", f"1:{SHA}")
    assert code != 0
    assert "another history" in error
    code, error = lepton("verify", "--key", "AB:CD")
    assert code != 0
    assert "of nobody" in error


def test_the_card_says_what_the_journal_says(done, lepton, tmp_path):
    lepton("export", tmp_path / "evidence", "--run", "last")
    card = json.loads((tmp_path / "evidence" / "model_card.json").read_text())
    run, models = done.store.run("r1"), done.store.models("r1")
    assert card["model"]["sha256"] == run.model_sha256
    assert [row["model_sha256"] for row in card["lineage"]] == [model.sha256 for model in models]
    events = {event.hash: event for event in done.store.events()}
    for row in card["lineage"]:
        assert events[row["event_hash"]].body["model_sha256"] == row["model_sha256"]
    counted = {part.device_id for part in done.store.participation("r1") if part.outcome == "counted"}
    assert card["cohort"]["devices_contributed"] == len(counted)
    assert card["privacy"] is None
    assert (card["journal"]["seq"], card["journal"]["hash"]) == done.store.head()
    assert card["task"]["versions"]
    words = (tmp_path / "evidence" / "model_card.md").read_text()
    assert run.model_sha256 in words
    assert "No guarantee" in words
    for device in done.store.devices():  # the card can be published
        assert device.id not in words + json.dumps(card)
        assert device.name not in words


def test_altered_tables_and_events_are_found(done, lepton):
    import sqlite3

    with sqlite3.connect(done.folder / "lepton.db") as database:
        database.execute("UPDATE run SET name = 'other'")
    database.close()
    assert lepton("verify")[0] == 0
    code, error = lepton("verify", "--deep")
    assert code != 0
    assert "name differs" in error
    with sqlite3.connect(done.folder / "lepton.db") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE event SET time = time + 1 WHERE seq = 3")
    database.close()
    code, error = lepton("verify")
    assert code != 0
    assert "event 3" in error


def test_an_auditor_takes_a_journal_as_it_comes(done):
    auditor = Auditor()
    with done.store.journal() as (head, lines):
        for line in lines:
            auditor.take(line)
    assert auditor.report().head == head


def test_the_card_of_a_private_run_has_its_guarantee(works, capsys, tmp_path):
    works.exchange.script = _clipped
    privacy = {"mechanism": "independent", "clip_norm": 1.0, "noise_multiplier": 4.0, "delta": 1e-3}
    cohort = {"size": 2, "min_reports": 2}
    works.queue("r1", rounds=2, evaluate_every=0, privacy=privacy, cohort=cohort)
    works.driver()._drive("r1")
    assert works.store.run("r1").state == "completed"
    state = ["--state-dir", str(works.folder)]
    assert app.run(["audit", "export", str(tmp_path / "evidence"), "--run", "r1", *state]) == 0
    assert app.run(["audit", "verify", "--deep", *state]) == 0
    assert app.run(["audit", "verify", str(tmp_path / "evidence" / "journal.jsonl")]) == 0
    assert "Traceback" not in "".join(capsys.readouterr())
    promise = json.loads((tmp_path / "evidence" / "model_card.json").read_text())["privacy"]
    (budget,) = promise["budgets"]
    assert (budget["budget"], budget["unit"], budget["trust"], budget["delta"]) == (
        "run:r1",
        "device",
        "central",
        1e-3,
    )
    assert 0 < promise["spent"] == budget["spent"] <= budget["epsilon"] * (1 + 1e-9)
    words = (tmp_path / "evidence" / "model_card.md").read_text()
    assert "| run:r1 |" in words


def _clipped(device_id, plan, request):
    update = to_grid(np.full(plan.update_size, 1e-4, np.float32), plan.grid_step, plan.clip_norm)
    sums = {"loss_sum": np.array([7.25]), "examples": np.array([4242])}
    return TrainReply(Ticket.of(plan), plan.task_version, 4242, update, sums, 0.125).to_records()
