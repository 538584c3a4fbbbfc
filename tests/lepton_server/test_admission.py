"""Bounds on callers: each at its pace, so many in hand, and memory that stays small."""

from hypothesis import given
from hypothesis import strategies as st

from lepton_server import admission
from lepton_server.admission import Door, Pace


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_burst_then_the_rate_and_each_caller_for_itself():
    clock = Clock()
    pace = Pace(2, 3, clock=clock)
    assert [pace.take("a") for _ in range(3)] == [0, 0, 0]
    wait = pace.take("a")
    assert 0 < wait <= 0.5
    assert pace.take("b") == 0
    clock.now += wait
    assert pace.take("a") == 0
    assert pace.take("a") > 0
    clock.now += 1000
    assert [bool(pace.take("a")) for _ in range(4)] == [False, False, False, True]


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(0.5, 20), st.integers(1, 20))
def test_never_more_than_burst_and_rate_and_whoever_waits_gets_in(steps, rate, burst):
    clock = Clock()
    pace, served = Pace(rate, burst, clock=clock), 0
    for step in steps:
        clock.now += step
        wait = pace.take("a")
        served += not wait
        assert served <= burst + rate * (clock.now - 100 + 1e-5)
    if wait := pace.take("a"):
        clock.now += wait
        assert pace.take("a") == 0


def test_quiet_callers_are_forgotten(monkeypatch):
    monkeypatch.setattr(admission, "MAX_CALLERS", 10)
    clock = Clock()
    pace = Pace(1, 1, clock=clock)
    for n in range(100):
        clock.now += 1
        assert pace.take(f"caller {n}") == 0
        assert len(pace._due) <= 11
    assert pace.take("caller 99") > 0  # who is still too early is remembered


def test_a_door_bounds_all_and_each():
    door = Door(2, 2)
    assert door.enter("a")
    assert door.enter("a", counted=False)  # a stream: within the caller's bound only
    assert not door.enter("a", counted=False)
    assert door.enter("b")
    assert not door.enter("c")
    assert door.enter("c", counted=False)
    door.leave("a")
    assert door.enter("c")
    for caller, counted in (("a", False), ("b", True), ("c", False), ("c", True)):
        door.leave(caller, counted=counted)
    assert (door._counted, dict(door._inside)) == (0, {})
