"""Where a run stands is a fold over its events; writes insist, and only on what passes."""

import threading

import numpy as np
import pytest

from lepton_fl.errors import ConnectionFailed, DiskFull, NotFound, StateConflict, StateCorrupt
from lepton_fl.files import BlobStore
from lepton_fl.rounds.campaign import Best
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.vector import vector_digest
from lepton_server import patience
from lepton_server.book import (
    Checkpoints,
    Progress,
    fold,
    load_model,
    load_server_state,
    save_model,
    save_server_state,
)
from lepton_server.ops import Meters
from lepton_server.patience import Interrupted, Patience, Stopped, one_line
from lepton_server.store import Event

A, B = "aa" * 32, "bb" * 32


def event(kind, **body):
    return Event(1, 0.0, kind, "r1", body, "", "")


def test_a_runs_position_follows_from_its_events():
    steps = [
        (event("model.created", round=0, model_sha256=A), {"model_sha256": A}),
        (event("round.planned", attempt=1), {"attempt": 1, "open": True}),
        (event("round.abandoned"), {"open": False}),
        (event("round.planned", attempt=2), {"attempt": 2, "open": True}),
        (
            event("round.committed", round=1, attempt=2, model_sha256=B, state_sha256=A),
            {
                "round": 1,
                "attempt": 0,
                "open": False,
                "model_sha256": B,
                "state_sha256": A,
                "retried": ((1, 2),),
            },
        ),
        (event("model.created", round=1, model_sha256=B), {}),
        (event("round.evaluated", round=1, stale=3), {"evaluated": 1, "stale": 3}),
        (event("run.best", round=1, model_sha256=B, value=0.5), {"best": Best(1, B, 0.5)}),
        (event("run.waiting", cause="x"), {}),
        (event("round.planned", attempt=1), {"attempt": 1, "open": True}),
        (
            event("round.committed", round=2, attempt=1, model_sha256=A, state_sha256=A),
            {"round": 2, "attempt": 0, "open": False, "model_sha256": A},
        ),
        (event("round.planned", attempt=1), {"attempt": 1, "open": True}),
        (  # updates in few bits: what to expect of the next sum
            event(
                "round.committed",
                round=3,
                attempt=1,
                model_sha256=A,
                state_sha256=A,
                expected=2.5,
            ),
            {"round": 3, "attempt": 0, "open": False, "expected": 2.5},
        ),
        (event("round.planned", attempt=1), {"attempt": 1, "open": True}),
        (event("round.abandoned", wrapped=True, burnt=False), {"open": False, "expected": 0.0}),
    ]
    progress, expected = Progress(), {}
    for happened, changes in steps:
        progress, expected = fold(progress, happened), expected | changes
        assert progress == Progress(**expected)


def test_models_and_optimiser_states_come_back_bit_for_bit(tmp_path):
    blobs = BlobStore(tmp_path)
    model = np.array([0.1, -0.0, 1e-45, 3e38], np.float32)
    name = save_model(blobs, model)
    assert name == vector_digest(model)
    assert load_model(blobs, name).tobytes() == model.tobytes()
    assert save_server_state(blobs, ServerState()) is None
    assert load_server_state(blobs, None) == ServerState()
    kept = save_server_state(blobs, ServerState({"momentum": model}))
    assert load_server_state(blobs, kept).slots["momentum"].tobytes() == model.tobytes()
    with pytest.raises(StateCorrupt, match="does not decode"):
        load_server_state(blobs, blobs.put(b"no safetensors"))
    blobs.path(name).write_bytes(b"damaged")
    with pytest.raises(StateCorrupt):
        load_model(blobs, name)


def test_what_two_runs_share_is_not_dropped(works):
    checkpoints = Checkpoints(works.store, works.blobs)
    model = works.blobs.put(b"model")
    for run_id in ("a", "b"):
        works.queue(run_id)
        works.store.record("model.created", {"run_id": run_id, "round": 0, "model_sha256": model})
    checkpoints.drop_model(model)
    assert works.blobs.has(model)
    lone = works.blobs.put(b"lone")
    checkpoints.drop_model(lone)
    checkpoints.drop_state(works.blobs.put(b"state"))
    assert not works.blobs.has(lone)


# --- patience -----------------------------------------------------------------------------------------


@pytest.fixture
def patient(works, monkeypatch):
    monkeypatch.setattr(patience, "RETRY_S", 0.01)
    works.queue()

    def make(**options):
        return Patience(works.store, "r1", Meters(), closing=threading.Event(), **options)

    return make


def failing(*errors):
    left = list(errors)

    def write():
        if left:
            raise left.pop(0)

    return write


def test_trouble_that_passes_is_waited_for_and_shown_once(works, patient):
    before = works.store.head_seq()
    patient().insist(failing(DiskFull("full"), DiskFull("full"), ConnectionFailed("gone")))
    causes = [e.body["cause"] for e in works.store.events(before, kinds=["run.waiting"])]
    assert causes == ["full", "gone", ""]


def test_trouble_that_stays_is_raised_at_once(patient):
    for error in (StateConflict("twice"), NotFound("none"), StateCorrupt("hash")):
        with pytest.raises(type(error)):
            patient().insist(failing(error))


def test_a_commit_whose_answer_was_lost_is_done(patient):
    patient().insist(
        failing(ConnectionFailed("lost in the commit"), StateConflict("it is committed already"))
    )


def test_a_shutdown_and_a_stop_end_the_wait(patient):
    made = patient()
    made._closing.set()
    with pytest.raises(Interrupted):
        made.insist(failing(DiskFull("full")))
    with pytest.raises(Stopped, match="full"):
        patient(stopping=lambda: True).insist(failing(DiskFull("full")))
    patient(stopping=lambda: True).insist(failing(DiskFull("full")), even_if_stopped=True)


def test_words_for_the_journal_are_one_clean_line():
    assert one_line("a\nb\t c\x1b[0m\x00\ud800 ü " + "x" * 5000, 20) == "a b c [0m ü xxxxxxxx"
