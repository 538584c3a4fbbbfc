"""From a signed variant to answers on a device: real processes, a link that breaks, releases that are bad."""

import contextlib
import http.client
import json
import socket
import threading

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]


class UnixConnection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


class Caller(threading.Thread):
    """A program on the device that asks and asks."""

    def __init__(self, path, width):
        super().__init__(daemon=True)
        self.path, self.body = str(path), json.dumps({"row": [0.5] * width})
        self.stop, self.failed, self.releases = threading.Event(), [], []

    def run(self):
        connection = UnixConnection(self.path, timeout=60)
        while not self.stop.wait(0.02):
            connection.request("POST", "/v1/predict", self.body, {"content-type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            if answer.status != 200:
                self.failed.append(found)
            elif found["release"] not in self.releases:
                self.releases.append(found["release"])
        connection.close()


LEAN = """import sys
sys.modules.update(dict.fromkeys(["torch", "flwr", "sklearn", "scipy", "pyarrow", "onnx", "opacus", "PIL"]))
"""  # a device that only serves has none of them


@pytest.fixture
def lean(tmp_path, monkeypatch):
    """Processes started within it cannot import what ``.[serve]`` does not install."""
    (tmp_path / "lean").mkdir()
    (tmp_path / "lean" / "sitecustomize.py").write_text(LEAN)

    @contextlib.contextmanager
    def within():
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path / "lean"))
            yield

    return within


def test_a_release_reaches_a_device_and_a_bad_one_does_not(real_fleet, make_variant, lean):
    fleet, width = real_fleet, 3000
    keys = str(fleet.folder / "disk")
    fleet.lepton("keys", "init", "--keys", keys, "--no-passphrase")
    fleet.start_server()
    fleet.join("gate", groups=("lab",))
    config = fleet.folder / "client.toml"
    config.write_text(
        f'[client]\nstate_dir = "{fleet.state("gate")}"\n[limits]\nnice = 0\n'
        '[connection]\nbackoff_max_s = 2.0\n[delivery]\ntask = "digits"\nretry_min_s = 1.0\n'
        "bytes_per_s = 60000\n"
    )
    with lean():
        fleet.start("gate", "client", "run", "--config", str(config))
        fleet.start("serve", "client", "serve", "--config", str(config))

    def publish(number, **changes):
        folder = make_variant(fleet.folder / f"v{number}", seed=number, round=number, width=width, **changes)
        return fleet.lepton("release", "publish", str(folder), "--keys", keys)[0]["release"]

    def serves(release):
        return f'lepton_serving{{release="{release[:12]}"}} 1.0' in fleet.get("/metrics")

    def status():
        return json.loads(fleet.run("client", "status", "--config", str(config), "--format", "json").stdout)[
            "release"
        ]

    first = publish(1)
    fleet.lepton("release", "assign", "int8", "--group", "lab")
    slots = fleet.state("gate") / "delivery" / "slots"
    fleet.until(lambda: list(slots.glob(f"{first}*")), "the download has begun")
    fleet.kill("server")  # the link breaks in the middle of it
    fleet.start_server()
    fleet.until(lambda: serves(first), "the first release is in service after a broken download")
    assert (slots / first).is_dir()
    path = fleet.state("gate") / "serve.sock"

    def answers():
        with socket.socket(socket.AF_UNIX) as trial:
            return trial.connect_ex(str(path)) == 0

    fleet.until(answers, "the endpoint answers")
    caller = Caller(path, width)
    caller.start()

    second = publish(2, like=1)
    fleet.lepton("release", "assign", "int8@2", "--device", "gate")
    fleet.until(lambda: serves(second), "the second release is in service")
    fleet.until(lambda: second in caller.releases, "and it answers")

    bad = publish(3, damage="parity")
    fleet.lepton("release", "assign", "int8@3", "--device", "gate")
    fleet.until(lambda: "self-test" in status(), "the bad release is refused")
    assert serves(second)
    fleet.kill("gate")  # and a device that is killed and comes back still knows
    fleet.start("gate", "client", "run", "--config", str(config))
    fleet.kill("server", 15)  # reports are in the journal after an orderly end
    fleet.start_server()
    fleet.until(lambda: serves(second), "the device is back")

    def row():
        (found,) = fleet.lepton("release", "status")
        return found

    fleet.until(lambda: row()["failed"] == ["int8@3: self-test"], "the refusal is in the journal")
    assert row()["serving_release"] == second
    assert row()["failures"][0]["release"] == bad
    caller.stop.set()
    caller.join(60)
    assert caller.failed == []
    assert caller.releases == [first, second]
