"""The operator's commands, as typed: text, JSON and exit codes; they need no running coordinator."""

import json

import pytest

from lepton_fl.cli import app
from lepton_fl.compression.source import read_source
from lepton_server.store import open_store


@pytest.fixture
def lepton(works, capsys):
    """``lepton("run", "list")`` -> exit code, standard output, standard error; on the works' own state."""

    def call(*words, state=True):
        extra = ["--state-dir", str(works.folder)] if state else []
        code = app.run([*words, *extra])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    return call


@pytest.fixture
def data(lepton):
    def call(*words):
        code, out, err = lepton(*words, "--format", "json")
        assert code == 0, err
        return json.loads(out)

    return call


def start(data, *options):
    return data("run", "start", "--task", "digits", "--rounds", "2", "--cohort", "3", *options)["id"]


def test_a_run_from_its_start_to_its_end(works, lepton, data):
    assert data("run", "list") == []
    run_id = start(data, "--name", "first", "--min-reports", "2")
    assert data("run", "show", "last")["state"] == "queued"
    works.driver().start()
    code, out, _ = lepton("run", "watch", run_id, "--timeout", "60", "--format", "json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "run.started"
    assert kinds[-1] == "run.finished"
    assert kinds.count("round.committed") == kinds.count("round.evaluated") == 2
    shown = data("run", "show", run_id[:16])
    assert (shown["state"], shown["round"], shown["rounds"]) == ("completed", 2, 2)
    assert [r["state"] for r in shown["rounds_done"]] == ["committed"] * 2
    assert {p["outcome"] for p in shown["participation"]} == {"counted"}
    (row,) = data("run", "list")
    assert row["name"] == "first"
    code, out, _ = lepton("run", "show")
    assert code == 0
    assert "Devices in round 2" in out
    assert "The coordinator can see every device's update" in " ".join(out.split())
    assert any("data" in sentence for sentence in shown["seen"])
    code, out, _ = lepton("run", "watch", run_id)
    assert code == 0
    assert "3 of 3 reports" in out
    target = works.folder / "model.safetensors"
    assert data("run", "export", str(target), "--best")["bytes"] == target.stat().st_size
    model = read_source(target)  # what variants are made from
    (best,) = {m.round for m in works.store.models(run_id) if m.sha256 == model.sha256}
    assert (model.run, model.round, model.privacy) == (run_id, best, None)
    assert model.journal_sha256 in {event.hash for event in works.store.events(subject=run_id)}


def test_why_a_run_waits_is_shown(works, lepton, data):
    works.check_in(*works.ids, ready=False, reason="12 rows, 50 needed")
    run_id = start(data)
    works.driver().start()
    works.until(lambda: works.store.run(run_id).waiting)
    cause = "0 of 3 eligible (1 needed): 3 data contract"
    assert cause in data("run", "show")["waiting"]
    assert cause in data("run", "list")[0]["waiting"]
    code, _, err = lepton("run", "watch", "--timeout", "0.1")
    assert code == 8
    assert cause in err
    assert data("run", "stop", run_id)["state"] == "stopping"
    assert works.finished(run_id).state == "stopped"
    code, _, err = lepton("run", "watch", run_id)
    assert code == 8
    assert "stopped" in err


def test_tokens_and_devices(works, data):
    made = data("token", "create", "--uses", "2", "--hours", "1", "--note", "hall 3")
    with open_store(works.folder / "lepton.db") as store:
        (token,) = [t for t in store.tokens() if t.id == made["id"]]
        assert (token.note, token.uses, token.used) == ("hall 3", 2, 0)
        assert made["token"] not in str(list(store.events()))  # only its hash is kept
    works.fleet.flush(everything=True)
    rows = data("devices", "list")
    assert [r["id"] for r in rows] == sorted(works.ids)
    assert rows[0]["tasks"] == ["digits ready"]
    shown = data("devices", "show", "device 1")
    assert shown["id"] == works.ids[1]
    assert data("devices", "revoke", "device 1", "--reason", "lost")["state"] == "revoked"
    assert data("devices", "show", works.ids[1])["reason"] == "lost"
    works.unharmed()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "show", "nosuch"), 9, "There is no run 'nosuch'"),
        (("run", "show"), 9, "There is no run 'last'"),
        (("run", "stop", "nosuch"), 9, "There is no run 'nosuch'"),
        (("run", "watch", "nosuch"), 9, "There is no run 'nosuch'"),
        (("run", "start"), 3, "No task was given"),
        (("run", "start", "--task", "digit"), 4, "Did you mean 'digits'"),
        (("run", "start", "--task", "nowhere.tasks:x"), 4, "is not installed"),
        (("run", "start", "--task", "digits", "--cohort", "0"), 2, "--cohort"),
        (("run", "start", "--task", "digits", "--cohort", "2", "--min-reports", "3"), 3, "min_reports=3"),
        (("run", "start", "--task", "digits", "--deadline", "nan"), 3, "deadline_s"),
        (("devices", "show", "nosuch"), 9, "There is no device 'nosuch'"),
        (("devices", "revoke", "d-" + "a" * 24), 9, "no device"),
        (("token", "create", "--hours", "0"), 2, "--hours"),
        (("token", "create", "--note", "a\nb"), 7, "control character"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_changes_nothing(works, lepton, words, code, said):
    before = works.store.head_seq()
    found, out, err = lepton(*words)
    assert found == code, err
    assert said in " ".join(err.split())
    assert out == ""
    found, out, err = lepton(*words, "--format", "json")
    assert found == code
    assert json.loads(err)["error"]
    assert works.store.head_seq() == before


def test_what_is_over_cannot_be_done_again(works, lepton, data):
    run_id = start(data)
    data("run", "stop", run_id)
    code, _, err = lepton("run", "stop", run_id)
    assert (code, "is stopping" in err) == (7, True)
    data("devices", "revoke", works.ids[0])
    code, _, err = lepton("devices", "revoke", works.ids[0])
    assert (code, "revoked already" in err) == (7, True)


def test_a_typing_error_in_the_folder_makes_no_new_state(lepton, tmp_path):
    for words in (("run", "list"), ("devices", "list"), ("run", "start", "--task", "digits")):
        code, _, err = lepton(*words, "--state-dir", str(tmp_path / "typo"), state=False)
        assert code == 9
        assert "no coordinator's state in" in err
    assert not (tmp_path / "typo").exists()
