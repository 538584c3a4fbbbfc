"""Privacy: integer noise, releases at the coordinator, accountants, the ledger's arithmetic, planning.

    python benchmarks/privacy.py              # half a minute
    python benchmarks/privacy.py --only ledger

Everything but the ledger counts processor time, best of several, so that a machine that does other things
as well disturbs less. numpy's normal and Poisson generators, which are not cryptographic, are measured in
the same run. A reservation in the ledger is also timed by the clock, in turns with a bare synced transaction
of SQLite on the same disk, which nothing in SQLite can be faster than.

Exit code 1 if a target is missed.
"""

import argparse
import contextlib
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lepton_fl.privacy import factorization
from lepton_fl.privacy.accounting import GdpExact, PldReport, RdpGate
from lepton_fl.privacy.budget import Budget, admit
from lepton_fl.privacy.events import Gaussian, PoissonGaussian
from lepton_fl.privacy.mechanisms import Correlated, Independent
from lepton_fl.privacy.noise import DiscreteGaussian, Keystream, Skellam

MILLION = 1_000_000
GRID = 2.0**24  # grid steps to one clip norm
QUANTILES = (("median", 0.5), ("p99", 0.99))


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    figure: str
    milliseconds: float
    target: float = 0.0  # milliseconds; 0 = none


def best(work: Callable[[], object], seconds: float = 0.5) -> float:
    """The shortest processor time, in ms, of as many runs as fit, at least three."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def sampler_rows() -> list[Row]:
    """A million draws of each law."""
    total, stream, rng = np.zeros(MILLION, np.int64), Keystream(), np.random.default_rng()
    rows = [
        Row("numpy normal, PCG64", best(lambda: rng.normal(size=MILLION))),
        Row(
            "numpy Poisson difference, PCG64",
            best(lambda: rng.poisson(50, MILLION) - rng.poisson(50, MILLION)),
        ),
    ]
    for sigma in (1.0, 10.0, 100.0, 1000.0, 2.0**14, 2.0**24, 2.0**34):
        gaussian = DiscreteGaussian(sigma)
        rows.append(
            Row(f"discrete Gaussian, sigma {sigma:g}", best(lambda g=gaussian: g.add_to(total, stream)), 65)
        )
    for sigma in (1.0, 10.0, 100.0, 1000.0, 2.0**14):
        skellam = Skellam(sigma**2)
        rows.append(Row(f"Skellam, sigma {sigma:g}", best(lambda s=skellam: s.add_to(total, stream)), 65))
    return rows


def release_rows() -> list[Row]:
    """A release of a million coordinates, with the mechanism's memory."""
    total = np.zeros(MILLION, np.int64)
    independent = Independent(1.0, GRID)
    blt = Correlated.blt(
        rounds=2000,
        min_separation=100,
        max_participations=20,
        noise_multiplier=7.4,
        norm_bound=GRID,
        coordinates=MILLION,
    )
    blt = blt.release(total, 1).following
    return [
        Row("release, independent, 1 M coordinates", best(lambda: independent.release(total, 1)), 100),
        Row("release, BLT, 1 M coordinates", best(lambda: blt.release(total, 2)), 100),
    ]


def accounting_rows() -> list[Row]:
    """One question to each accountant, and one to a ledger's budget."""
    plain, sampled = {Gaussian(5.0): 100}, {PoissonGaussian(0.01, 1.0): 1000}
    mixed = {Gaussian(5.0 + i / 10): 10 for i in range(50)}
    budget = Budget("model", epsilon=50.0, delta=1e-6)
    return [
        Row("exact, one event", best(lambda: GdpExact().epsilon(plain, 1e-6))),
        Row("Rényi, 50 distinct events", best(lambda: RdpGate().epsilon(mixed, 1e-6))),
        Row("PLD 1e-3, sampled, 1000 rounds", best(lambda: PldReport(step=1e-3).epsilon(sampled, 1e-5))),
        Row("reserve, 50 distinct events", best(lambda: admit(budget, mixed, Gaussian(9.0))), 5),
    ]


def ledger_rows(entries: int = 100_000, samples: int = 300) -> list[Row]:
    """A reservation in the coordinator's ledger when it is long already; the disk is part of it."""
    from sqlalchemy import insert

    from lepton_fl.files import GENESIS
    from lepton_fl.plan import RunSpec
    from lepton_fl.privacy.record import FLEET, SUBJECT, Policy
    from lepton_server.config import PrivacySection
    from lepton_server.privacy import Ledger, PrivacyKeys, set_budget
    from lepton_server.store import open_store, tables

    privacy = {"mechanism": "independent", "noise_multiplier": 500.0, "delta": 1e-6}
    spec = RunSpec.model_validate({"task": "a:b", "evaluate_every": 0, "privacy": privacy})
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "lepton.db") as store:
        keys = PrivacyKeys(Path(folder), PrivacySection())
        with store.transaction() as change:
            for run_id in ("r", "old"):
                change.record("run.queued", {"run_id": run_id, "name": run_id, "spec": spec.to_json()})
            change.record("run.started", {"run_id": "r"})
            for account in (FLEET, "task:a:b", "run:r"):
                set_budget(change, keys, Policy(account, 1, 50.0, 1e-6))
        start = store.head_seq()
        names = ("state", "events", "extra", "accounts", "unit", "trust", "evidence", "reserved_at")
        charge = dict(zip(names, ("committed", "[]", "[]", "[]", "device", "central", "", 0.0), strict=True))
        event = {"time": 0.0, "kind": "privacy.voided", "subject": SUBJECT, "body": "{}", "prev": GENESIS}
        with store._engine.begin() as connection:  # as many rows as a ledger of years has
            rows = [charge | {"run_id": "old", "round": i, "attempt": 1} for i in range(1, entries + 1)]
            connection.execute(insert(tables.CHARGE), rows)
            events = [event | {"seq": start + i, "hash": f"{i:064x}"} for i in range(1, entries + 1)]
            connection.execute(insert(tables.EVENT), events)
            connection.execute(tables.HEAD.update().values(seq=start + entries, hash=f"{entries:064x}"))
        ledger = Ledger(store, "r", spec, keys.public())

        def reserve(number: int) -> None:
            ledger.reserve("r", number, 1, Gaussian(500.0 + number % 50))
            with store.transaction() as change:
                ledger.write_reserved(change)

        with bare_database(Path(folder) / "bare.db") as bare:
            ours, theirs = Times(), Times()
            for number in range(1, samples + 1):  # in turns, so that both meet the same disk
                theirs.measure(lambda: bare.execute("INSERT INTO t VALUES (?)", (bytes(1000),)))
                ours.measure(partial(reserve, number))
    title = f"reserve in the store, {entries:,} rows, 3 budgets"
    rows = [Row(f"{title}: {name}", ours.at(share, "cpu")) for name, share in QUANTILES]
    rows += [
        Row(f"  by the clock: {name}", ours.at(share, "wall"), 5 * (share > 0.9)) for name, share in QUANTILES
    ]
    rows += [
        Row(f"  a bare synced transaction: {name}", theirs.at(share, "wall")) for name, share in QUANTILES
    ]
    share = ours.at(0.5, "wall") / theirs.at(0.5, "wall")
    print(
        f"A reservation takes {share:.2f} times a bare synced transaction of this disk, by the clock, median."
    )
    return rows


class Times:
    """How long something took, each time: processor and clock, ms."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def measure(self, work: Callable[[], object]) -> None:
        """Do it once."""
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.cpu.append(1e3 * (time.process_time() - cpu))

    def at(self, share: float, kind: str) -> float:
        """A quantile."""
        times = sorted(getattr(self, kind))
        return float(times[int(share * len(times))])


@contextlib.contextmanager
def bare_database(path: Path) -> Iterator[sqlite3.Connection]:
    """One table, and a commit that is on the disk: what no ledger in SQLite can be faster than."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE t (body BLOB)")
        yield connection
    finally:
        connection.close()


def planning_rows() -> list[Row]:
    """The best factorisations; the papers' library needs 30 to 50 s for the first."""
    return [
        Row(
            "best BLT, n=2000, b=100, k=20",
            best(lambda: factorization.optimise_blt.__wrapped__(2000, 100, 20)),
        ),
        Row(
            "best bands, n=2000, b=100, k=20",
            best(lambda: factorization.optimise_banded.__wrapped__(2000, 100, 20)),
        ),
    ]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "sampler": sampler_rows,
    "release": release_rows,
    "accounting": accounting_rows,
    "ledger": ledger_rows,
    "planning": planning_rows,
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append")
    rows = [row for name in parser.parse_args().only or PARTS for row in PARTS[name]()]
    table = Table("figure", "ms", "target", "", title="Privacy, one thread")
    for row in rows:
        verdict = "" if not row.target else "met" if row.milliseconds <= row.target else "MISSED"
        table.add_row(row.figure, f"{row.milliseconds:.2f}", f"{row.target:g}" if row.target else "", verdict)
    Console(width=100).print(table)
    return int(any(row.target and row.milliseconds > row.target for row in rows))


if __name__ == "__main__":
    sys.exit(main())
