"""Back up a running coordinator in mid-round, lose all of it, restore, and compare the final model's bits.

    python benchmarks/restored.py                    # all modes, 3 seeds: some minutes
    python benchmarks/restored.py --modes plain --seeds 1 --json result.json

The fleet is that of ``chaos.py``: four real devices, pinned batches and noise. One run is left alone. In
another, as soon as an update of round 2 has come, a backup is made, checked, the coordinator gets SIGKILL,
its folder is deleted, the backup is restored there, and the coordinator is started again. What devices had
done since is done again. What cannot be done again is told apart: with secure aggregation or privacy the
coordinator is killed first, so that nobody has seen more than the backup has.

Then a run goes on after its backup, to its end. With privacy the older ledger must be refused: by ``restore``
with the published head, and by devices without it ("older"). With secure aggregation alone devices sign no
second sum of a round: the restored run passes over the rounds that were lost, and does the rest ("passed").

Checked: the run completed, and the model of every round has the SHA-256 of the undisturbed run; all devices
count in every round; the journal's chain holds and all tables are what it says. Of a run that passed over
rounds: these and no others, each after one attempt and for this reason; all devices count in the rest; no
device has signed two sums of a round. Exit code 1 if any fails.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chaos import DEVICES as COUNT
from chaos import (
    PATIENCE_S,
    ROUNDS,
    Case,
    Device,
    Result,
    case,
    finished,
    make_authority,
    make_token,
    pin_devices,
    queue_run,
)

from lepton_fl.errors import StateCorrupt
from lepton_fl.privacy.head import sign_head
from lepton_fl.privacy.record import FLEET, Policy
from lepton_server.backup import checked, create
from lepton_server.config import ServerConfig
from lepton_server.privacy import PrivacyKeys, set_budget
from lepton_server.restore import restore
from lepton_server.store import Attempt, Store, open_store

MODES = ("plain", "secure", "central", "distributed")
LONG = 6  # rounds of a run of which some are lost, ...
LOST = 4  # ... these from the second on: so many are done when the coordinator is lost


class Restored:
    """One case whose coordinator is lost and restored."""

    def __init__(self, made: Case) -> None:
        self.case = made
        self.state, self.backup = made.folder / "server", made.folder / "backup"
        sections = {"server": {"state_dir": str(self.state)}}
        self.settings = ServerConfig.model_validate(sections)
        self.updates = 0  # that had come in the open round when the backup was made
        self.charges = 0  # in it
        self.create_s = 0.0

    def begin(self, rounds: int = ROUNDS) -> str:
        """Start everything; the run's id."""
        make_authority(self.case.folder / "authority.key")
        self.case.start()
        token = make_token(self.case.folder, self.case.ports)
        self.case.devices = [
            Device(self.case.folder, i, self.case.seed, token, self.case.secure) for i in range(COUNT)
        ]
        return queue_run(self.case.folder, self.case.mode, rounds)

    def until(self, met: Callable[[], bool], what: str) -> None:
        """Wait."""
        ends = time.monotonic() + PATIENCE_S
        while not met():
            for device in self.case.devices:
                if device.failure is not None:
                    raise RuntimeError("an agent has ended by itself") from device.failure
            if time.monotonic() > ends:
                raise TimeoutError(f"{what}: not in time; {self.case.log.read_text()[-6000:]}")
            time.sleep(0.01)

    def copy(self, run_id: str, *, kill_first: bool) -> None:
        """Make a backup in the middle of round 2, or later if this machine is slow to look."""
        with open_store(self.state / "lepton.db") as store:
            self.until(
                lambda: store.run(run_id).finished or in_round(store, run_id) > 0, "an update of round 2"
            )
            if kill_first:
                self.kill()
            began = time.monotonic()
            create(store, self.settings, self.backup)
            self.create_s = time.monotonic() - began
        with checked(self.backup) as taken:
            self.updates = max(0, in_round(taken.store, run_id))
            self.charges = len(taken.store.charges(run_id))

    def kill(self) -> None:
        """The coordinator, abruptly."""
        self.case.process.kill()
        self.case.process.join()

    def go_on(self) -> None:
        """Lose all that the coordinator had, restore it, and start it."""
        self.kill()
        shutil.rmtree(self.state)
        restore(self.backup, self.settings)
        self.case.start()

    def finish(self, run_id: str) -> Result:
        """What the run comes to."""
        self.until(lambda: finished(self.case.folder, run_id), "the run finishes")
        result = Result()
        self.case.look(run_id, result)
        committed = {row[:2] for row in result.rounds if row[2] == "committed"}
        with open_store(self.state / "lepton.db") as store:
            parts = [p for p in store.participation(run_id) if p.outcome == "counted"]
        counted = [p.round for p in parts if (p.round, p.attempt) in committed]
        result.counted = [counted.count(number) for number, _ in sorted(committed)]
        return result


def in_round(store: Store, run_id: str) -> int:
    """How much has come in the open attempt of round 2 or later; -1 where none is open."""
    rounds = store.rounds(run_id)
    if not rounds or rounds[-1].round < 2 or rounds[-1].state != "planned":
        return -1
    attempt = Attempt(run_id, rounds[-1].round, rounds[-1].attempt)
    return len(store.received(*attempt)) + len(store.kept(attempt))


def same_bits(mode: str, seed: int, calm: Result) -> tuple[list[str], str]:
    """What went wrong, and what there is to tell."""
    with case(mode, seed) as made:
        lost = Restored(made)
        run_id = lost.begin()
        lost.copy(run_id, kill_first=mode != "plain")
        lost.go_on()
        result = lost.finish(run_id)
    wrong = {
        f"the run is {result.state}": result.state != "completed",
        f"other models: {result.models} instead of {calm.models}": result.models != calm.models,
        f"{result.counted} devices counted": result.counted != calm.counted,
        f"{result.left} files are left": result.left > 0,
        f"noise added to several sums: {result.noise}": any(len(s) > 1 for s in result.noise.values()),
    }
    attempts = [attempt for _, attempt, state in result.rounds if state == "committed"]
    told = f"{lost.updates} records of the open round; made in {lost.create_s:.2f} s; attempts {attempts}"
    return [words for words, is_so in wrong.items() if is_so], told


def lost_rounds_are_passed_over(seed: int) -> tuple[list[str], str]:
    """A secure run that has gone on since its backup, whose devices sign no second sum of a round."""
    with case("secure", seed) as made:
        lost = Restored(made)
        run_id = lost.begin(LONG)
        lost.copy(run_id, kill_first=False)
        with open_store(lost.state / "lepton.db") as store:
            lost.until(lambda: store.run(run_id).committed >= LOST, f"round {LOST} is done")
        lost.kill()
        signed = [rounds_signed(device) for device in made.devices]
        began = time.monotonic()
        lost.go_on()
        result = lost.finish(run_id)
        seconds = time.monotonic() - began
        again = [rounds_signed(device) for device in made.devices]
    passed = [number for number, _, state in result.rounds if state == "abandoned"]
    wrong = {
        f"the run is {result.state}": result.state != "completed",
        f"rounds {result.rounds}": [n for n, _, _ in result.rounds] != list(range(1, LONG + 1)),
        f"{passed} were passed over, {signed} were signed": passed != sorted(set[int]().union(*signed) - {1}),
        f"{result.counted} devices counted": result.counted != [COUNT] * (LONG - len(passed)),
        f"signed twice: {again}": any(len(found) > len(set(found)) for found in again),
        f"{result.left} files are left": result.left > 0,
    }
    told = f"passed over {passed}; to its end in {seconds:.1f} s"
    return [words for words, is_so in wrong.items() if is_so], told


def rounds_signed(device: Device) -> list[int]:
    """The rounds of which a device has signed a sum, once for each signature."""
    lines = map(json.loads, device.agent._state.signed.read_text().splitlines())
    return [json.loads(key)[2] for key, _ in lines if not key.endswith(" given")]


def older_is_refused(mode: str, seed: int) -> tuple[list[str], str]:
    """A private run that has gone on since its backup."""
    with case(mode, seed) as made:
        lost, wrong = Restored(made), []
        run_id = lost.begin()
        lost.copy(run_id, kill_first=False)
        lost.until(lambda: finished(made.folder, run_id), "the run finishes")
        with open_store(lost.state / "lepton.db") as store:
            keys = PrivacyKeys(lost.state / "keys", lost.settings.privacy)
            with store.transaction() as change:  # whatever the run has done since
                set_budget(change, keys, Policy(FLEET, 1, 99.0, 1e-3))
            published = sign_head(*store.ledger_head(), keys.signer())
            newest = store.ledger_head().seq
        lost.until(lambda: all(seen(device) >= newest for device in made.devices), "devices have seen it")
        lost.kill()
        shutil.rmtree(lost.state)
        try:
            restore(lost.backup, lost.settings, head=published)
            wrong.append("an older ledger was restored in spite of the published head")
        except StateCorrupt:
            pass
        restore(lost.backup, lost.settings)
        made.start()
        with open_store(lost.state / "lepton.db") as store:
            lost.until(lambda: store.missed_head() is not None, "a device shows what it has seen")
            lost.until(
                lambda: store.run(run_id).finished or "not eligible" in store.run(run_id).waiting,
                "devices stay away",
            )
            if len(store.charges(run_id)) > lost.charges:
                wrong.append("a release was charged to a ledger that has forgotten")
            told = store.run(run_id).waiting
    return wrong, told


def seen(device: Device) -> int:
    """The number of the newest event of the ledger that a device has been told of."""
    witness = device.agent._witness
    return witness.seen.seq if witness and witness.seen else 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the results")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    pin_devices()
    report: dict[str, dict[str, int]] = {}
    for mode in chosen.modes:
        for seed in range(chosen.seeds):
            with case(mode, seed) as quiet:
                calm = quiet.run()
            tell(report, mode, seed, *same_bits(mode, seed, calm))
            if mode in ("central", "distributed"):
                tell(report, f"{mode}, older", seed, *older_is_refused(mode, seed))
            if mode == "secure":
                tell(report, "secure, passed", seed, *lost_rounds_are_passed_over(seed))
    if chosen.json:
        chosen.json.write_text(json.dumps(report))
    return int(any(found["good"] < found["cases"] for found in report.values()))


def tell(report: dict[str, dict[str, int]], what: str, seed: int, wrong: list[str], told: str) -> None:
    """Print one case and count it."""
    counts = report.setdefault(what, {"good": 0, "cases": 0})
    counts["cases"] += 1
    counts["good"] += not wrong
    print(f"{what} {seed}: {'; '.join(wrong) or 'good'} ({told})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
