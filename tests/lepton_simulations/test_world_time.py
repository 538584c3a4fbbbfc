"""Virtual time costs nothing: a simulation jumps over nights."""

from lepton_simulations import simulate
from lepton_simulations.fleet import VirtualRoster


def test_waiting_for_the_day_is_one_jump(monkeypatch):
    waits, wait = [], VirtualRoster.wait

    def counted(roster, seconds):
        waits.append(seconds)
        wait(roster, seconds)

    monkeypatch.setattr(VirtualRoster, "wait", counted)
    day = {"kind": "daily", "phase_spread": 0.0, "start_s": 40_000.0, "on_fraction": 0.001}
    result = simulate(
        "digits",
        clients=4,
        rounds=3,
        cohort={"size": 4, "quorum_wait_s": 100_000.0},
        workers=0,
        devices={"classes": [{"speed": 10.0, "availability": day}]},  # 86 s a day: two rounds
        local={"epochs": 1},
        evaluate_every=0,
    )
    assert result.verdict.outcome == "completed"
    assert len(waits) <= 4
