"""The simulation's speed against Flower on Ray, Apple's pfl and a plain loop, at identical work in one run.

    python benchmarks/simulation.py --data FOLDER                  # everything; half an hour
    python benchmarks/simulation.py --data FOLDER --only mlp-100 --only start
    python benchmarks/simulation.py --data FOLDER --skip-peers

Work: 1000 clients with 60 rows of MNIST each (or lognormal numbers of rows, sigma 0.8, 5 to 600),
mini-batches of 10, one epoch, SGD with learning rate 0.1, equal weights; an MLP 784-128-10 or a CNN of
1.66 M parameters. Everybody gets the same files: rows, the initial model, the cohort of every round and the
order of every client's rows. That the work is the same is checked: everybody's model is held against the
plain loop's.

Ours trains with the tier that it chooses, ``native`` for the MLP; those rows have one with ``fused``, too,
which trains in PyTorch alone (updates are added up by the same functions in both).

Peers run in environments of their own, which are installed once into ``--cache``. Figures are medians over
the rounds after the first, everybody on ``--cores`` cores, ours through ``run_scenario`` and so by the round
code of a real fleet. The bound is the speed of a 2048 x 2048 matrix product, measured before and after each
row. On a machine that does other things as well, let everybody take turns with ``--sweeps 3``: the best
median counts, for all alike.

Exit code 1 if a target is missed, or if the work was not the same.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _simulation.limits import FLOP_PER_ROW
from _simulation.ours import scenario
from _simulation.prepare import Kind, plan, prepare
from _simulation.runner import Outcome, RunFailed, gflops, start
from _simulation.venvs import PEERS, InstallFailed, default_cache, python_of
from _simulation.work import Vector

OURS, FUSED, LOOP, FLOWER = "Lepton FL", "Lepton FL, tier fused", "plain loop", "Flower on Ray"
GRID, STOCK_GRID = "Flower's loop, our FedAvg and Grid", "Flower's loop and FedAvg, our Grid"
CLIP = 0.5  # L2 norm of an update
CHECKED = 3  # rounds after which our model is held against the loop's
# Largest difference of two models that did the same work. Rounding differs by 1e-7 and grows where a ReLU or
# a pool decides otherwise; the rows in another order make 2e-3 of it in one round of ten MLPs.
SAME = {"mlp": 1e-4, "cnn": 2e-3, "nothing": 1e-6}


@dataclass(frozen=True)
class Line:
    """One line of the results."""

    row: str
    who: str
    clients_s: float | None = None  # clients per second
    round_ms: float | None = None
    bound: float | None = None  # share of what matrix products would allow
    difference: float | None = None  # largest, of any coordinate, from the plain loop's model
    after: int | None = None  # rounds
    figure: str = ""  # what is neither of these
    target: str = ""
    met: bool | None = None
    load: float | None = None  # the machine's load average at the end of the run, our own included


@dataclass(frozen=True)
class Speed:
    """A row about clients per second."""

    kind: Kind
    model: str
    cohort: int
    rounds: int  # of ours and of the loop, besides the first
    peer_rounds: tuple[int, int]  # pfl's, Flower's
    at_least: float
    bound: float = 0.0  # share of the bound that is wanted as well
    fused_at_least: float = 0.0  # of the tier that trains in PyTorch alone, where another one is chosen


SPEEDS: Mapping[str, Speed] = {
    "mlp-100": Speed("equal", "mlp", 100, 60, (20, 5), 3000, fused_at_least=3000),
    "mlp-10": Speed("equal", "mlp", 10, 150, (60, 12), 2500),
    "cnn-10": Speed("equal", "cnn", 10, 12, (8, 5), 31, 0.75),
    "cnn-100": Speed("equal", "cnn", 100, 4, (3, 2), 34, 0.75),
    "lognormal": Speed("lognormal", "mlp", 100, 60, (20, 5), 2700),
}


class Bench:
    """What all rows share: the prepared work, the peers' interpreters, and the lines so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.lines: list[Line] = []
        self.pythons: dict[str, Path] = {}
        self._plans: dict[tuple[Kind, int], tuple[int, float]] = {}
        self._runs = 0

    def work(self, kind: Kind, cohort: int, rounds: int) -> tuple[Path, float]:
        """The folder of prepared work and the mean rows per client; more rounds than asked do not matter."""
        folder = self.folder / kind
        if not folder.exists():
            say(f"preparing the work '{kind}'")
            prepare(self.options.data, folder, kind)
        made, rows = self._plans.get((kind, cohort), (0, 0.0))
        if made < rounds:
            made, rows = rounds, plan(folder, kind, cohort, rounds)
            self._plans[kind, cohort] = made, rows
        return folder, rows

    def ours(self, body: Mapping[str, Any], *, memory: bool = False) -> Outcome:
        """Run a scenario by our engine."""
        place = self.place()
        path = place.with_suffix(".json")
        path.write_text(json.dumps(body))
        return start(
            [sys.executable, "-m", "_simulation.ours", path, place], place, memory=memory, one_thread=False
        )

    def grid(self, body: Mapping[str, Any], strategy: str) -> Outcome:
        """Run Flower's own Strategy loop over our Grid, with our strategy or Flower's."""
        place = self.place()
        path = place.with_suffix(".json")
        path.write_text(json.dumps(body))
        return start(
            [sys.executable, "-m", "_simulation.ours_grid", path, place, strategy], place, one_thread=False
        )

    def loop(self, *work: object) -> Outcome:
        """Run the plain loop: folder, model, cohort, rounds, clip."""
        place = self.place()
        return start([sys.executable, "-m", "_simulation.peer_loop", *work, place], place)

    def pfl(self, processes: int, *work: object, memory: bool = False) -> Outcome:
        """Run pfl in so many processes."""
        place = self.place()
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
        module = [*(torchrun if processes > 1 else []), "_simulation.peer_pfl"]
        return start([self.pythons["pfl"], "-m", *module, *work, place], place, memory=memory)

    def flower(self, *work: object, memory: bool = False) -> Outcome:
        """Run Flower on Ray."""
        place = self.place()
        command = [self.pythons["flower"], "-m", "_simulation.peer_flower", *work, place]
        return start([*command, self.options.cores], place, memory=memory)

    def peers(
        self,
        folder: Path,
        model: str,
        cohort: int,
        pfl_rounds: int,
        flower_rounds: int,
        clip: float = 0.0,
        *,
        memory: bool = False,
    ) -> dict[str, Callable[[], Outcome]]:
        """How to run each peer that is there; rounds include the first."""
        found: dict[str, Callable[[], Outcome]] = {}
        work = folder, model, cohort
        if "pfl" in self.pythons:
            for count in sorted({1, self.options.cores}):
                name = f"pfl, {count} process{'es' * (count > 1)}"
                found[name] = partial(self.pfl, count, *work, pfl_rounds, clip, memory=memory)
        if "flower" in self.pythons:
            found[FLOWER] = partial(self.flower, *work, flower_rounds, clip, memory=memory)
        return found

    def place(self) -> Path:
        """A folder that is not there yet."""
        self._runs += 1
        return self.folder / f"run{self._runs}"

    def add(self, line: Line) -> Line:
        """Keep a line and show it."""
        self.lines.append(line)
        say(f"{line.row}: {plain(line)}")
        return line

    def attempt(self, row: str, who: str, run: Callable[[], Outcome]) -> Outcome | None:
        """Run one; a peer that fails is a line, not the end."""
        say(f"{row}: {who} ...")
        try:
            return run()
        except RunFailed as error:
            if who in (OURS, FUSED, LOOP):
                raise
            is_peer = who not in (GRID, STOCK_GRID)
            self.add(Line(row, who, figure=f"failed: {error}", met=None if is_peer else False))
            return None

    def limit(self, model: str, rows: float) -> float:
        """Clients per second, of so many rows, that matrix products alone would allow just now."""
        return gflops(self.options.cores) * 1e9 / (FLOP_PER_ROW[model] * rows)


# -- speed ------------------------------------------------------------------------------------------------


def speed(bench: Bench, name: str) -> None:
    """Clients per second of everybody, and whether their work was the same."""
    row = SPEEDS[name]
    rounds = 1 + (bench.options.rounds or row.rounds)
    peer_rounds = [1 + min(r, bench.options.rounds or r) for r in row.peer_rounds]
    most = max(rounds, CHECKED, *peer_rounds)
    folder, rows = bench.work(row.kind, row.cohort, most)
    body = scenario(row.model, folder, row.cohort, rounds, bench.options.cores, {})
    tiers = {OURS: body} | ({FUSED: with_tier(body, "fused")} if row.model == "mlp" else {})
    runs: dict[str, Callable[[], Outcome]] = {
        **{who: partial(bench.ours, own) for who, own in tiers.items()},
        GRID: lambda: bench.grid(body, "ours"),
        STOCK_GRID: lambda: bench.grid(with_rounds(body, peer_rounds[0]), "stock"),
        LOOP: lambda: bench.loop(folder, row.model, row.cohort, most, 0),
        **bench.peers(folder, row.model, row.cohort, *peer_rounds),
    }
    limit = bench.limit(row.model, rows)
    found = best(bench, name, runs)
    limit = max(limit, bench.limit(row.model, rows))
    checks = {who: bench.ours(with_rounds(own, CHECKED)) for who, own in tiers.items()}
    bench.add(Line(name, f"bound, {bench.options.cores} cores", clients_s=limit))
    wanted = {OURS: row.at_least, FUSED: row.fused_at_least}
    compare = Compare(bench, name, row.cohort, limit, found[LOOP].model, SAME[row.model])
    for who, outcome in found.items():
        if who in tiers and wanted[who]:
            words = f">= {wanted[who]:,.0f}/s" + (f" and {row.bound:.0%} of bound" if row.bound else "")
            compare.line(who, outcome, checks[who], words, partial(reaches, wanted[who], row.bound))
        elif who in tiers:
            compare.line(who, outcome, checks[who])
        else:
            compare.line(who, outcome, same_work=who not in (GRID, STOCK_GRID))


def reaches(at_least: float, bound: float, line: Line) -> bool:
    """Whether a line is as fast as its row asks."""
    return (line.clients_s or 0) >= at_least and (line.bound or 0) >= bound


@dataclass(frozen=True)
class Compare:
    """Holds runs against the bound and against the plain loop."""

    bench: Bench
    row: str
    cohort: int
    limit: float  # clients per second
    models: Vector  # (rounds, P), the loop's
    same: float

    def line(
        self,
        who: str,
        outcome: Outcome,
        check: Outcome | None = None,
        target: str = "",
        judge: Callable[[Line], bool] | None = None,
        *,
        same_work: bool = True,
    ) -> None:
        """Add a line.

        Args:
            who: did it.
            outcome: is measured.
            check: a shorter run, whose model is compared in place of ``outcome``'s.
            target: in words.
            judge: whether it is reached; None = there is none.
            same_work: off: of the same amount, but by other cohorts, so models cannot be compared.
        """
        rate = self.cohort / outcome.round_s
        line = Line(self.row, who, rate, outcome.round_s * 1e3, rate / self.limit, load=outcome.load)
        same = True
        if same_work:
            compared = check or outcome
            model = compared.model if compared.model.ndim == 1 else compared.model[-1]
            difference = float(np.abs(model - self.models[compared.rounds - 1]).max())
            line = replace(line, difference=difference, after=compared.rounds)
            same = difference <= self.same
        if judge is not None or not same:
            wanted = target if same else f"{target} difference <= {self.same:g}".strip()
            line = replace(line, target=wanted, met=same and (judge is None or judge(line)))
        self.bench.add(line)


def best(bench: Bench, row: str, runs: Mapping[str, Callable[[], Outcome]]) -> dict[str, Outcome]:
    """Everybody's best median of some sweeps, in which all take turns; a peer that fails is left out.

    Raises:
        RunFailed: ours or the plain loop failed.
    """
    found: dict[str, Outcome] = {}
    failed: set[str] = set()
    for _ in range(bench.options.sweeps):
        for who in [who for who in runs if who not in failed]:
            if (outcome := bench.attempt(row, who, runs[who])) is None:
                failed.add(who)
            elif who not in found or outcome.round_s < found[who].round_s:
                found[who] = outcome
    return found


def with_rounds(body: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """The same scenario, shorter or longer."""
    return {**body, "run": {**body["run"], "rounds": rounds}}


def with_tier(body: Mapping[str, Any], tier: str) -> dict[str, Any]:
    """The same scenario, trained by this engine."""
    return {**body, "engine": {**body["engine"], "tier": tier}}


# -- the other rows ---------------------------------------------------------------------------------------


def clipping(bench: Bench, name: str) -> None:
    """What clipping every client's update costs; plain and clipped runs take turns."""
    rounds, cohort = 1 + (bench.options.rounds or 60), 100
    folder, rows = bench.work("equal", cohort, max(rounds, CHECKED))

    def body(clip: float, count: int) -> dict[str, Any]:
        return scenario("mlp", folder, cohort, count, bench.options.cores, {"clip_norm": clip})

    limit = bench.limit("mlp", rows)
    runs: dict[float, list[Outcome]] = {0.0: [], CLIP: []}
    for _ in range(max(2, bench.options.sweeps)):
        for clip, outcomes in runs.items():
            say(f"{name}: {OURS}, bound {clip:g} ...")
            outcomes.append(bench.ours(body(clip, rounds)))
    without, clipped = (min(outcomes, key=lambda o: o.round_s) for outcomes in runs.values())
    loop = bench.loop(folder, "mlp", cohort, CHECKED, CLIP)
    compare = Compare(bench, name, cohort, limit, loop.model, SAME["mlp"])
    compare.line(OURS, clipped, bench.ours(body(CLIP, CHECKED)))
    slower = clipped.round_s / without.round_s - 1
    figure = f"{slower:+.1%} time per round"
    bench.add(Line(name, OURS, figure=figure, target="<= +8 %", met=slower <= 0.08, load=clipped.load))
    compare.line(LOOP, loop)
    for who, run in bench.peers(folder, "mlp", cohort, CHECKED, CHECKED, CLIP).items():
        if outcome := bench.attempt(name, who, run):
            compare.line(who, outcome)


def memory(bench: Bench, name: str) -> None:
    """Peak memory with a cohort of 100 and of 1000."""
    cohorts, rounds = (100, 1000), 3
    works = {cohort: bench.work("equal", cohort, rounds)[0] for cohort in cohorts}
    found: dict[str, list[float]] = {}
    for cohort, folder in works.items():
        body = scenario("mlp", folder, cohort, rounds, bench.options.cores, {})
        runs = {
            OURS: partial(bench.ours, body, memory=True),
            **bench.peers(folder, "mlp", cohort, 2, 2, memory=True),
        }
        for who, run in runs.items():
            if outcome := bench.attempt(f"{name}, {cohort}", who, run):
                found.setdefault(who, []).append(outcome.peak_mb or 0.0)
    for who, peaks in found.items():
        if len(peaks) == len(cohorts):
            _memory_line(bench, name, who, peaks, target=who == OURS)


def _memory_line(bench: Bench, name: str, who: str, peaks: list[float], target: bool = False) -> None:
    ratio = peaks[1] / peaks[0]
    figure = f"{peaks[0]:.0f} MB with 100, {peaks[1]:.0f} MB with 1000 ({ratio - 1:+.0%})"
    wanted, met = ("within 10 %", 1 / 1.1 <= ratio <= 1.1) if target else ("", None)
    bench.add(Line(name, who, figure=figure, target=wanted, met=met))


def first_round(bench: Bench, name: str) -> None:
    """From the start of a process to the end of its first round, everything in the file cache."""
    folder, _ = bench.work("equal", 100, 1)
    body = scenario("mlp", folder, 100, 1, bench.options.cores, {})
    runs = {OURS: partial(bench.ours, body), **bench.peers(folder, "mlp", 100, 1, 1)}
    for who, run in runs.items():
        repeats = 4 if who == OURS else 2
        outcomes = [outcome for _ in range(repeats) if (outcome := bench.attempt(name, who, run))]
        if len(outcomes) == repeats:  # the first one filled the cache
            warm = sorted(outcomes[1:], key=lambda outcome: outcome.first_s)
            _first_line(bench, name, who, warm[len(warm) // 2], target=who == OURS)


def _first_line(bench: Bench, name: str, who: str, run: Outcome, target: bool = False) -> None:
    figure = f"{run.first_s:.2f} s, {run.first_without_interpreter_s:.2f} s without the interpreter's start"
    wanted, met = ("<= 3 s", run.first_s <= 3) if target else ("", None)
    bench.add(Line(name, who, figure=figure, target=wanted, met=met, load=run.load))


def overhead(bench: Bench, name: str) -> None:
    """Time per client where a client has one row, and a model of four parameters, to train."""
    cohort, rounds = 100, 1 + (bench.options.rounds or 30)
    folder, _ = bench.work("nothing", cohort, rounds)
    body = scenario("nothing", folder, cohort, rounds, bench.options.cores, {})
    runs = {
        OURS: partial(bench.ours, body),
        LOOP: partial(bench.loop, folder, "nothing", cohort, rounds, 0),
        **bench.peers(folder, "nothing", cohort, min(rounds, 11), min(rounds, 5)),
    }
    for who, outcome in best(bench, name, runs).items():
        _overhead_line(bench, name, who, outcome, cohort, target=who == OURS)


def _overhead_line(
    bench: Bench, name: str, who: str, run: Outcome, cohort: int, target: bool = False
) -> None:
    each = run.round_s / cohort * 1e3
    wanted, met = ("<= 0.2 ms", each <= 0.2) if target else ("", None)
    bench.add(Line(name, who, figure=f"{each:.3f} ms per client", target=wanted, met=met, load=run.load))


def endurance(bench: Bench, name: str) -> None:
    """10,000 devices of two kinds, 50 rounds of 200, with drop-outs, stragglers and damaged replies."""
    run = {"cohort": {"size": 200, "over_selection": 1.2, "min_reports": 100}, "evaluate_every": 10}
    body = scenario("fleet", Path(), 200, 50, bench.options.cores, run)
    body["data"]["folder"] = ""
    link = {"down": 2e6, "up": 5e5, "latency_s": 0.05, "jitter": 0.3}
    body["devices"] = {
        "classes": [
            {
                "name": "phone",
                "share": 7,
                "speed": {"kind": "lognormal", "median": 400, "sigma": 0.5},
                **link,
            },
            {"name": "board", "share": 3, "speed": {"kind": "uniform", "low": 50, "high": 200}, **link},
        ]
    }
    body["faults"] = {
        "drop_out": 0.02, "drop_training": 0.03, "drop_upload": 0.02, "stragglers": 0.05, "corrupt": 0.01,
        "corrupt_data": 0.005,
    }  # fmt: skip
    say(f"{name}: {OURS} ...")
    outcome = bench.ours(body)
    bench.add(
        Line(
            name,
            OURS,
            clients_s=200 / outcome.round_s,
            round_ms=outcome.round_s * 1e3,
            figure=f"{outcome.total_s:.1f} s in all",
            target="<= 300 s",
            met=outcome.total_s <= 300,
            load=outcome.load,
        )
    )


ROWS: Mapping[str, Callable[[Bench, str], None]] = {
    **dict.fromkeys(SPEEDS, speed),
    "clipping": clipping,
    "memory": memory,
    "start": first_round,
    "fleet": endurance,
    "overhead": overhead,
}


# -- output -----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Show progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def plain(line: Line) -> str:
    """A line's figures in words."""
    return ", ".join(cell for cell in cells(line)[1:-1] if cell)


def cells(line: Line) -> list[str]:
    """The table's cells of a line."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rate = number(line.clients_s, ",.0f" if (line.clients_s or 0) >= 100 else ".1f")
    difference = f"{line.difference:.0e} after {line.after}" if line.difference is not None else ""
    verdict = "" if line.met is None else ("met" if line.met else "MISSED")
    figure = line.figure.splitlines()[0] if line.figure else ""
    return [
        line.row, line.who, rate, number(line.round_ms, ",.1f"), number(line.bound, ".0%"), difference,
        figure, line.target, verdict, number(line.load, ".1f"),
    ]  # fmt: skip


def table(lines: list[Line]) -> str:
    """All results in Markdown."""
    head = ["row", "", "clients/s", "ms/round", "of bound", "model differs by", "", "target", "verdict"]
    rules = ["--", "--", "--:", "--:", "--:", "--:", "--", "--", "--", "--:"]
    rows = [[*head, "load"], rules, *map(cells, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(lines: list[Line], path: Path) -> None:
    """Clients per second of everybody, and the bound, one panel per row; logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in SPEEDS if any(line.row == name and line.who == OURS for line in lines)]
    if not names:
        return
    figure, panels = pyplot.subplots(len(names), figsize=(8, 2.2 * len(names)), squeeze=False)
    for name, panel in zip(names, panels[:, 0], strict=True):
        found = [line for line in lines if line.row == name and line.clients_s]
        limit = next(line.clients_s for line in found if line.who.startswith("bound"))
        bars = [line for line in found if not line.who.startswith("bound")][::-1]
        colours = ["tab:blue" if line.who in (OURS, FUSED, GRID, STOCK_GRID) else "tab:grey" for line in bars]
        drawn = panel.barh([line.who for line in bars], [line.clients_s for line in bars], color=colours)
        panel.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        panel.axvline(limit, color="tab:red", linestyle="--", label=f"bound {limit:,.0f}")
        panel.set(xscale="log", title=f"{name}: clients per second")
        panel.margins(x=0.15)
        panel.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def install(bench: Bench) -> list[str]:
    """Find or make the peers' environments; the names of those that are left out."""
    missing = []
    for peer in PEERS:
        try:
            bench.pythons[peer] = python_of(peer, bench.options.cache)
        except (InstallFailed, OSError) as error:
            say(f"{peer} is left out, it could not be installed: {error}")
            missing.append(peer)
    return missing


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LEPTON_DATA"))
    parser.add_argument("--only", choices=ROWS, action="append", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=0, help="besides the first, instead of each row's own")
    parser.add_argument("--sweeps", type=int, default=1, help="runs of everybody, of which the best counts")
    parser.add_argument("--cores", type=int, default=2, help="for everybody; the targets are for 2")
    parser.add_argument("--nice", type=int, default=0, help="priority of everybody; below 0 needs rights")
    parser.add_argument("--skip-peers", action="store_true", help="only ours and the plain loop")
    parser.add_argument("--strict", action="store_true", help="fail if a peer cannot be installed")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="for the peers' environments")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw clients per second into this PNG file")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of mnist_by_writer.npz with --data or LEPTON_DATA")
    options.data = Path(options.data)
    if options.cores < 1 or options.sweeps < 1 or options.rounds < 0:
        parser.error("--cores and --sweeps must be at least 1, --rounds at least 0")
    return options


def _leave(*_: object) -> None:
    raise SystemExit(143)


def main() -> int:
    """The exit code."""
    options = parse()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > options.cores:
        os.sched_setaffinity(0, allowed[: options.cores])  # everybody who is started inherits it
    os.nice(options.nice)
    signal.signal(signal.SIGTERM, _leave)  # so that a benchmark that is stopped cleans up, too
    folder = Path(tempfile.mkdtemp(prefix="lepton-sim-"))
    bench = Bench(options, folder)
    try:
        missing = [] if options.skip_peers else install(bench)
        speeds = ", ".join(f"{gflops(n):.0f} with {n}" for n in sorted({1, options.cores}))
        load = os.getloadavg()[0]
        say(f"{len(allowed)} cores, load average {load:.1f}, SGEMM GFLOP/s by threads: {speeds}")
        for name in options.only or ROWS:
            try:
                ROWS[name](bench, name)
            except RunFailed as error:
                bench.add(Line(name, OURS, figure=f"failed: {error}", target="a result", met=False))
                print(error, file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(bench.lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in bench.lines], indent=2))
    if options.plot:
        draw(bench.lines, options.plot)
    missed = any(line.met is False for line in bench.lines)
    return 1 if missed or (missing and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
