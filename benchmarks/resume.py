"""Seconds from the start of a coordinator to a run that goes on, with 10,000 devices and 100 rounds.

    python benchmarks/resume.py [--devices 10000] [--rounds 100]

The state is made by the store's own events: devices that joined one by one, a run of ``--rounds`` committed
rounds with a cohort of 100, and an attempt that was cut off. Then ``lepton server`` is started in a process
of its own, twice. Ready: ``/readyz`` answers. Going on: the run's log line.

Exit code 1 if the second start takes more than 5 s until the run goes on.
"""

import argparse
import base64
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from lepton_fl import crypto
from lepton_fl.files import BlobStore
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.rounds.optimizers import ServerState
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_server.book import save_model
from lepton_server.store import Store, open_store

TARGET_S = 5.0
COHORT = 100
TASK, VERSION = "lepton_fl.tasks.images:digits", "1"


def enrol_all(store: Store, count: int) -> list[str]:
    """Devices with keys of their own."""
    ids = []
    with store.transaction() as change:
        secret = crypto.secret_sha256(b"x" * 32)
        token = {"token_id": "t", "secret_sha256": secret, "expires_at": time.time() + 3600, "uses": count}
        change.record("token.created", token)
        for number in range(count):
            key = crypto.new_key().public_key()
            ids.append(crypto.device_id(key))
            change.record("token.used", {"token_id": "t", "device_id": ids[-1]})
            body = {"device_id": ids[-1], "name": f"device {number}", "cert_serial": "1f", "token_id": "t"}
            body |= {"public_key": base64.b64encode(crypto.public_der(key)).decode()}
            change.record("device.enrolled", body | {"cert_not_after": time.time() + 86_400})
    return sorted(ids)


def run_all(store: Store, blobs: BlobStore, ids: list[str], rounds: int) -> None:
    """A run of so many rounds, and one attempt that is open."""
    from lepton_fl.tasks import load_task
    from lepton_fl.training.trainer import Trainer

    model = Trainer(load_task(TASK)).initial(0)
    spec = RunSpec.model_validate({"task": TASK, "rounds": rounds + 5, "cohort": {"size": COHORT}})
    store.record("run.queued", {"run_id": "r", "name": "r", "spec": spec.to_json()})
    store.record("run.started", {"run_id": "r"})
    sha256 = save_model(blobs, model)
    created = {"run_id": "r", "model_sha256": sha256, "round": 0}
    store.record("model.created", created)
    work = Work(TASK, VERSION, "ab" * 32, model.size, TrainingLoss())
    state, rng = RunState(model, ServerState()), np.random.default_rng(0)
    for number in range(1, rounds + 2):
        cohort = [ids[i] for i in rng.choice(len(ids), min(COHORT, len(ids)), replace=False)]
        state = state.on(attempt=1)
        plan = plan_round(spec, "r", work, "train", number, state, cohort, COHORT, "ab" * 16)
        at = {"run_id": "r", "round": number, "attempt": 1}
        with store.transaction() as change:
            change.record("round.planned", at | {"plan": plan.to_json(), "model_sha256": sha256})
            if number > rounds:
                break
            for phase in ("offered", "collecting", "aggregated"):
                change.record("round.moved", at | {"phase": phase})
            parts = [{"device_id": device, "outcome": "counted", "examples": 9} for device in cohort]
            change.record("round.committed", at | {"model_sha256": sha256, "participation": parts})
            change.record("round.moved", at | {"phase": "released"})
            change.record("model.created", created | {"round": number, "parent_sha256": sha256})


def start(folder: Path, log: Path, port: int) -> tuple[float, float]:
    """Seconds until the coordinator is ready, and until the run goes on."""
    lepton = Path(sys.executable).parent / "lepton"
    log.unlink(missing_ok=True)
    began, ready = time.monotonic(), 0.0
    with open(log, "wb") as output:
        command = [str(lepton), "server", "--config", str(folder / "server.toml")]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not re.search(r"run r: .* from round", log.read_text()):
            if process.poll() is not None or time.monotonic() - began > 300:
                raise RuntimeError(log.read_text()[-2000:])
            if not ready and answers(port):
                ready = time.monotonic() - began
            time.sleep(0.02)
        return ready, time.monotonic() - began
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    """Whether the coordinator says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as found:
            return bool(found.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    """The exit code."""
    from lepton_simulations.demo_fleet import free_ports

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lepton-resume-") as name:
        folder = Path(name)
        (folder / "server").mkdir(mode=0o700)
        ports = dict(zip(("enrolment", "device", "fleet", "ops"), free_ports(4), strict=True))
        listen = "".join(f"{key}_port = {port}\n" for key, port in ports.items())
        head = f'[server]\nstate_dir = "{folder}/server"\n[listen]\nhost = "127.0.0.1"\n'
        (folder / "server.toml").write_text(head + 'public_names = ["127.0.0.1"]\n' + listen)
        with open_store(folder / "server" / "lepton.db") as store:
            run_all(
                store, BlobStore(folder / "server" / "blobs"), enrol_all(store, chosen.devices), chosen.rounds
            )
            print(f"{chosen.devices} devices, {chosen.rounds} rounds, {store.head_seq()} events", flush=True)
        for which in ("first start", "second start"):
            ready, on = start(folder, folder / "log", ports["ops"])
            print(f"{which}: ready after {ready:.1f} s, the run goes on after {on:.1f} s", flush=True)
    return int(on > TARGET_S)


if __name__ == "__main__":
    sys.exit(main())
