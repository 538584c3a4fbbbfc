"""Two coordinators on one database: one writes, the other refuses or waits, and a slow one is shut out."""

import threading

import pytest

from lepton_fl.errors import LeaseLost, StateLocked
from lepton_server.lease import LIFE_S, Leadership
from lepton_server.store import open_store


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def pair(database):
    """Two stores on one database, and their clock; PostgreSQL has its own."""
    clock = Clock()
    with open_store(database, clock=clock) as one, open_store(database, clock=clock) as two:
        yield one, two, clock


def started(store):
    store.record("server.started", "server", {"version": "1"})


def test_the_second_one_refuses_and_says_who_leads(pair, tmp_path):
    one, two, _ = pair
    lead = Leadership.take(one, tmp_path / "a", standby=False, stopped=threading.Event())
    with pytest.raises(StateLocked, match=f"{tmp_path}/a holds the lease.*renewed"):
        Leadership.take(two, tmp_path / "b", standby=False, stopped=threading.Event())
    started(one)
    lead.release()
    Leadership.take(two, tmp_path / "b", standby=False, stopped=threading.Event())
    started(two)
    with pytest.raises(LeaseLost):
        started(one)


def test_its_own_lease_is_taken_back_at_once_after_a_crash(pair):
    one, two, _ = pair
    first, again = one.take_lease("me", LIFE_S), two.take_lease("me", LIFE_S)
    assert again.token == first.token + 1
    with pytest.raises(LeaseLost, match="me"):
        started(one)


def test_one_that_was_only_slow_writes_nothing_more_of_any_kind(pair):
    from lepton_server.store import Attempt, Kept

    one, two, _ = pair
    assert one.take_lease("one", LIFE_S)
    assert two.take_lease("two", LIFE_S) is None
    assert two.take_lease("two", 0.0)  # its life is over
    head = two.head()
    record = Kept(1, b"x", "", "00")
    writes = (
        lambda: started(one),
        one.renew_lease,
        one.drop_lease,
        lambda: one.note_presence([("d", 1.0, "idle")]),
        lambda: one.keep(Attempt("r", 1, 1), record, durable=False),
        lambda: one.rebuild(check_only=False),
    )
    for write in writes:
        with pytest.raises(LeaseLost, match="two"):
            write()
    assert two.head() == head
    assert two.lease().holder == "two"
    assert one.rebuild().equal  # it may still read


def test_a_lease_that_is_renewed_stays_and_an_operator_needs_none(pair, database):
    one, two, _ = pair
    assert one.take_lease("one", LIFE_S)
    one.renew_lease()
    assert two.take_lease("two", LIFE_S) is None
    started(two)  # an operator's command, which has no lease
    with open_store(database) as third:
        assert third.lease().holder == "one"


def test_a_stand_by_waits_until_the_lease_is_free(pair, tmp_path, monkeypatch):
    import lepton_server.lease

    monkeypatch.setattr(lepton_server.lease, "RENEW_S", 0.01)
    one, two, _ = pair
    lead = Leadership.take(one, tmp_path / "a", standby=False, stopped=threading.Event())
    threading.Timer(0.2, lead.release).start()
    Leadership.take(two, tmp_path / "b", standby=True, stopped=threading.Event())
    assert two.lease().holder.endswith("/b")


def test_a_leader_that_was_overtaken_is_told(pair, tmp_path, monkeypatch):
    import lepton_server.lease

    monkeypatch.setattr(lepton_server.lease, "RENEW_S", 0.01)
    one, two, _ = pair
    lead, told = Leadership.take(one, tmp_path, standby=False, stopped=threading.Event()), threading.Event()
    lead.keep(told.set)
    assert two.take_lease("two", 0.0)
    assert told.wait(30)
    assert isinstance(lead.lost, LeaseLost)
    lead.release()
    assert two.lease().holder == "two"
