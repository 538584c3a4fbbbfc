"""A staged rollout over real processes: a good release reaches all, a bad one stays with the canary."""

import pytest

from lepton_fl.delivery.rollout import draw

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

DEVICES = ("a", "b", "c")


def test_a_good_release_reaches_all_and_a_bad_one_is_taken_back(real_fleet, make_variant):
    fleet = real_fleet
    keys = str(fleet.folder / "disk")
    fleet.lepton("keys", "init", "--keys", keys, "--no-passphrase")
    fleet.start_server()

    def join(name):
        fleet.join(name)
        config = fleet.folder / f"{name}.toml"
        config.write_text(
            f'[client]\nstate_dir = "{fleet.state(name)}"\n[limits]\nnice = 0\n'
            "[connection]\nbackoff_max_s = 2.0\n"
            '[delivery]\ntask = "digits"\nprofile = "gateway"\nretry_min_s = 1.0\n'
        )
        fleet.start(name, "client", "run", "--config", str(config))

    for name in DEVICES:
        join(name)

    def publish(number, **changes):
        folder = make_variant(fleet.folder / f"v{number}", seed=number, round=number, **changes)
        return fleet.lepton("release", "publish", str(folder), "--keys", keys)[0]["release"]

    def begin(name, release):
        file = fleet.folder / f"{name}.rollout.toml"
        file.write_text(
            f'id = "{name}"\nstages = [{{ share = 0.001 }}, {{ share = 1.0 }}]\n'
            f'[releases]\ngateway = "{release}"\n'
            "[health]\nwindow_s = 2\nmin_devices = 1\nmin_share = 1.0\n"
        )
        planned = fleet.lepton("rollout", "plan", str(file))
        assert [stage["devices"] for stage in planned["stages"]] == [1, 2]
        fleet.lepton("rollout", "start", name)

    def devices():
        return {row["device"]: row for row in fleet.lepton("release", "status")}

    def status(name):
        return fleet.lepton("rollout", "status", name)

    fleet.until(lambda: all(row["profile"] == "gateway" for row in devices().values()), "all have reported")
    good = publish(1)
    begin("good", good)
    fleet.until(lambda: status("good")["stages"][0]["told"] == 1, "the canary is told")
    fleet.kill("server")  # in the middle of a stage: the next one goes on with it
    fleet.start_server()
    fleet.until(lambda: status("good")["phase"] == "done", "the good release has reached all")
    assert {row["serving_release"] for row in devices().values()} == {good}

    fleet.kill("c")  # away while the bad one is tried and taken back
    bad = publish(2, damage="parity")
    begin("bad", bad)
    canary = min(devices(), key=lambda name: draw("bad", name))
    named = {row["name"]: row["device"] for row in devices().values()}
    if canary == named["c"]:  # nobody hears of it before the canary is back
        fleet.start("c", "client", "run", "--config", str(fleet.folder / "c.toml"))
    fleet.until(lambda: status("bad")["phase"] == "rolled-back", "the bad release is taken back")
    assert "self-test" in status("bad")["cause"]
    found = devices()
    assert {row["assigned_release"] for row in found.values()} == {good}
    assert {row["serving_release"] for row in found.values()} == {good}
    join("late")  # nobody assigns anything to it
    fleet.until(
        lambda: {row["assigned_release"] for row in devices().values()} == {good} and len(devices()) == 4,
        "the late device has what its profile has in service",
    )
    fleet.kill("server", 15)  # reports are in the journal after an orderly end
    assert [name for name, row in devices().items() if row["failures"]] == [canary]
