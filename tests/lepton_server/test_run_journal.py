"""`lepton run journal`: what happened in one run, as JSON lines that can be checked, and nothing else."""

import json

import pytest

from lepton_fl.cli import app
from lepton_fl.files import canonical_json, event_hash
from lepton_server.store.events import KINDS, parse_body


@pytest.fixture
def export(works, capsys):
    def call(*words):
        code = app.run(["run", "journal", *words, "--state-dir", str(works.folder)])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    return call


def test_a_run_is_exported_whole_and_checkable(works, export, tmp_path):
    run_id, other = works.queue("r1"), works.queue("r2", rounds=1)
    works.driver().start()
    works.finished(run_id)
    works.finished(other)
    path = tmp_path / "run.jsonl"
    assert export(run_id, "--output", str(path))[:2] == (0, "")
    code, printed, _ = export(run_id)
    assert (code, printed) == (0, path.read_text())
    header, *events = map(json.loads, printed.splitlines())
    assert header == {"format": "lepton run journal 1", "run_id": run_id, "state": "completed"}
    assert {e["subject"] for e in events} == {run_id}
    assert [e["seq"] for e in events] == [e.seq for e in works.store.events(subject=run_id)]
    kinds = [e["kind"] for e in events]
    assert (kinds[0], kinds[-1]) == ("run.queued", "run.finished")
    for kind in ("round.planned", "round.committed", "round.evaluated", "run.best", "model.created"):
        assert kind in kinds
    for event in events:
        body = canonical_json(event["body"]).decode()
        place = (event["prev"], event["seq"], event["time"], event["kind"], event["subject"])
        assert event_hash(*place, body) == event["hash"]
        assert event["kind"] in KINDS
        parse_body(event["kind"], event["body"])


def test_no_secret_is_in_it(works, export):
    run_id = works.queue()
    works.driver().start()
    works.finished(run_id)
    _, text, _ = export(run_id)
    for token in works.store.tokens():
        assert token.secret_sha256 not in text
    for device in works.store.devices():
        assert device.name not in text
        assert device.cert_serial not in json.loads(text.splitlines()[1])["body"].values()
    assert "public_key" not in text
    assert str(works.folder) not in text


def test_there_is_no_such_run(works, export):
    code, out, err = export("r-none")
    assert (code, out) == (9, "")
    assert "r-none" in err


def test_a_long_journal_is_read_page_by_page(works, monkeypatch):
    from lepton_server import requests

    run_id = works.queue()
    works.driver().start()
    works.finished(run_id)
    whole = list(requests.journal_lines(works.store, works.store.run(run_id)))
    monkeypatch.setattr(requests, "_PAGE", 2)
    assert list(requests.journal_lines(works.store, works.store.run(run_id))) == whole
