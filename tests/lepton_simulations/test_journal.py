"""The journal of a simulation: chained, canonical, in virtual time."""

import hashlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import NotFound, StateCorrupt
from lepton_fl.files import canonical_json
from lepton_simulations.api import simulate
from lepton_simulations.journal import CONTEXT, EMPTY, Chain, Head, event_hash, read_journal, verify_journal

LOCAL = {"learning_rate": 0.1, "batch_size": 256}


def write(path, count=5):
    chain = Chain()
    lines = [chain.append(1.5 * n, "round.committed", "run", {"round": n, "x": [0.1]}) for n in range(count)]
    path.write_bytes(b"".join(lines))
    return chain.head


def test_the_formula_is_known():
    """SHA-256 over the canonical array of context, previous hash, number, exact time, kind, subject, body."""
    text = '["lepton simulation journal v1","' + "0" * 64 + '",1,"0x1.8000000000000p+0","k","s","{}"]'
    assert CONTEXT == "lepton simulation journal v1"
    assert event_hash("0" * 64, 1, 1.5, "k", "s", "{}") == hashlib.sha256(text.encode()).hexdigest()
    assert event_hash("0" * 64, 1, 1.5000000000000002, "k", "s", "{}") != event_hash(
        "0" * 64, 1, 1.5, "k", "s", "{}"
    )


def test_what_is_written_is_read(tmp_path):
    head = write(tmp_path / "j")
    events = list(read_journal(tmp_path / "j"))
    assert [event.seq for event in events] == [1, 2, 3, 4, 5]
    assert [event.time for event in events] == [0.0, 1.5, 3.0, 4.5, 6.0]
    assert events[2].body == {"round": 2, "x": [0.1]}
    assert verify_journal(tmp_path / "j", expected=head) == head
    for line in (tmp_path / "j").read_bytes().splitlines():
        assert canonical_json(json.loads(line)) == line


def test_a_chain_goes_on_where_it_ended(tmp_path):
    head = write(tmp_path / "j")
    with open(tmp_path / "j", "ab") as file:
        file.write(Chain(head).append(9.0, "k", "run", {}))
    assert verify_journal(tmp_path / "j").seq == 6


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_change_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "j"
    head = write(path)
    body = path.read_bytes()
    lines = body.splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 1))
    change = data.draw(st.sampled_from(["flip", "drop", "swap", "twice", "cut", "space"]))
    if change == "flip":
        at = data.draw(st.integers(0, len(body) - 1))
        altered = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    elif change == "drop":
        altered = b"".join(lines[:place] + lines[place + 1 :])
    elif change == "swap":
        other = (place + 1) % len(lines)
        lines[place], lines[other] = lines[other], lines[place]
        altered = b"".join(lines)
    elif change == "twice":
        altered = b"".join([*lines[: place + 1], *lines[place:]])
    elif change == "cut":
        altered = body[: data.draw(st.integers(0, len(body) - 1))]
    else:
        altered = (
            b"".join(lines[:place]) + lines[place].replace(b":", b": ", 1) + b"".join(lines[place + 1 :])
        )
    path.write_bytes(altered)
    with pytest.raises(StateCorrupt):
        verify_journal(path, expected=head)


def test_a_history_written_anew_has_another_head(tmp_path):
    head = write(tmp_path / "j", 5)
    chain = Chain()
    (tmp_path / "j").write_bytes(b"".join(chain.append(0.0, "k", "run", {}) for _ in range(5)))
    assert verify_journal(tmp_path / "j").seq == 5
    with pytest.raises(StateCorrupt, match="was noted"):
        verify_journal(tmp_path / "j", expected=head)


@pytest.mark.parametrize(
    "line", [b"[]\n", b"{}\n", b"\xff\n", b"null\n", b"[" * 100_000, b'{"seq":1}\n', b"\n"]
)
def test_what_is_no_event_is_named_by_its_line(tmp_path, line):
    head = write(tmp_path / "j", 2)
    with open(tmp_path / "j", "ab") as file:
        file.write(line)
    with pytest.raises(StateCorrupt, match="line 3"):
        verify_journal(tmp_path / "j")
    assert verify_journal(tmp_path / "j", length=(tmp_path / "j").stat().st_size - len(line)) == head


def test_an_empty_journal_and_none(tmp_path):
    (tmp_path / "j").touch()
    assert verify_journal(tmp_path / "j") == EMPTY == Head(0, "0" * 64)
    with pytest.raises(NotFound):
        verify_journal(tmp_path / "none")


# --- of a run -----------------------------------------------------------------------------------------


def small(**changes):
    settings_ = {"clients": 6, "rounds": 3, "cohort": 3, "workers": 0, "local": LOCAL, "drop_out": 0.2}
    return simulate("digits", **settings_ | changes)


def test_three_runs_have_one_hash_whatever_the_clock_says(tmp_path, monkeypatch):
    first = small()
    jumping = iter(range(0, 10**9, 12_345))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(jumping)))
    second = small()
    third = small(folder=tmp_path / "run")
    hashes = {(r.weights_sha256, r.journal_sha256) for r in (first, second, third)}
    assert len(hashes) == 1
    assert verify_journal(tmp_path / "run/journal.jsonl").sha256 == first.journal_sha256
    assert small(seed=1).journal_sha256 != first.journal_sha256


def test_virtual_time_is_in_the_journal_and_in_the_rows(tmp_path):
    devices = {"classes": [{"speed": 50.0, "up": 1e5}]}
    result = small(devices=devices, folder=tmp_path / "run")
    events = list(read_journal(tmp_path / "run/journal.jsonl"))
    commits = [event.time for event in events if event.kind == "round.committed"]
    assert commits == [row.time_s for row in result.rows] == sorted(commits)
    assert sum(row.round_s for row in result.rows) == pytest.approx(commits[-1])
    assert commits[0] > 1.0


def test_the_state_does_not_grow_with_the_rounds(tmp_path):
    sizes = {}
    for rounds in (2, 12):
        small(rounds=rounds, folder=tmp_path / str(rounds), evaluate_every=0)
        sizes[rounds] = (tmp_path / str(rounds) / "state.json").stat().st_size
    assert abs(sizes[12] - sizes[2]) < 100  # a few digits


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4, 5, 6])  # callbacks: each round has two
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_hashes(tmp_path, stop_after):
    whole = small()
    seen = []
    first = small(folder=tmp_path / "run", on_round=seen.append, should_stop=lambda: len(seen) >= stop_after)
    assert first.verdict.outcome == ("stopped" if stop_after < 5 else "completed")
    second = small(folder=tmp_path / "run", resume=True)
    assert (second.weights_sha256, second.journal_sha256) == (whole.weights_sha256, whole.journal_sha256)
    assert second.tallies == whole.tallies
    assert [row.metrics for row in second.rows] == [row.metrics for row in whole.rows]


@pytest.mark.parametrize("at", range(1, 16))
def test_killed_at_any_write_and_resumed_it_ends_with_the_same_hashes(tmp_path, killed_at_write, at):
    whole = small(rounds=2)
    with killed_at_write(at):
        small(rounds=2, folder=tmp_path / "run")
    resume = (tmp_path / "run/scenario.json").exists()
    second = small(rounds=2, folder=tmp_path / "run", resume=resume)
    assert (second.weights_sha256, second.journal_sha256) == (whole.weights_sha256, whole.journal_sha256)
    assert second.tallies == whole.tallies


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_run_with_an_altered_journal_is_not_continued(tmp_path, line):
    small(rounds=2, folder=tmp_path / "run")
    path = tmp_path / "run/journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"seq":', b'"seq": ')[:-2] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(StateCorrupt):
        small(rounds=2, folder=tmp_path / "run", resume=True)
