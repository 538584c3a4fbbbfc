"""Secure aggregation: masks, secret sharing, client and server time, memory; against Flower's functions.

    python benchmarks/secagg.py                       # some minutes
    python benchmarks/secagg.py --plot secagg.png     # and time against n and d, ours and Flower's
    python benchmarks/secagg.py --thousand            # and a round of 1,000 devices: a quarter of an hour

Rounds are real: every device's session and the coordinator's run in one process of its own per row, one after
the other on one thread, with the time of each side added up (processor seconds; medians over the devices of
each stage, added). Devices keep nothing but their session; memory is the growth of the process's peak over
what it used after its imports, so it holds all devices' sessions, too.

Flower 1.41 is measured by its own functions (``pseudo_rand_gen``, ``parameters_addition``, ``create_shares``,
``combine_shares``, ``generate_shared_key``) in the same run, and scaled by how often its protocol calls them
for the same n, k and drop-outs: its ``SecAggPlusWorkflow`` does at least that.

The bound of the mask engine is ``openssl speed -evp aes-256-ctr``; without the program, the same cipher of
the ``cryptography`` package. Like ``openssl speed``, everything counts processor time, best of several, so
that a machine that does other things as well disturbs less.

Exit code 1 if a target is missed.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

MASKS = 60
MILLION = 1_000_000


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    figure: str
    measured: str
    target: str
    good: bool | None  # None: no target


def best(work: Callable[[], object], seconds: float = 1.0) -> float:
    """The shortest processor time of as many runs as fit, at least three."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


# --- single functions ----------------------------------------------------------------------------------


def openssl_gb_s() -> tuple[float, str]:
    """Keystream alone, GB/s, and where it was measured."""
    program = shutil.which("openssl")
    if program:
        command = [program, "speed", "-seconds", "1", "-bytes", "16384", "-evp", "aes-256-ctr"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("AES-256-CTR")]
        if done.returncode == 0 and lines:
            return float(lines[0].split()[-1].rstrip("k")) / 1e6, "openssl speed"
    from lepton_fl.secagg.masks import SEGMENT, measure

    return SEGMENT / measure("ctr", 1.0, time.process_time) / 1e9, "cryptography, AES-256-CTR"


def mask_gb_s() -> float:
    """Keystream and addition of 60 masks to a million uint32, GB/s, one thread."""
    from lepton_fl.secagg.masks import add_masks

    vector = np.zeros(MILLION, "<u4")
    seeds = [(os.urandom(32), 1) for _ in range(MASKS)]
    return MASKS * vector.nbytes / best(lambda: add_masks(vector, seeds)) / 1e9


def shamir_ms(n: int) -> tuple[float, float]:
    """Share both secrets of one device, and combine those of all n devices: milliseconds."""
    from lepton_fl.secagg.field import combine, draw, lagrange_at_zero, share

    threshold, secrets = n // 2 + 1, draw(os.urandom, 32)
    sharing = best(lambda: share(secrets, n, threshold, os.urandom))
    holders = tuple(range(threshold))
    rows = draw(os.urandom, threshold * n * 16).reshape(threshold, -1)

    def cold() -> None:
        lagrange_at_zero.cache_clear()
        combine(holders, rows)

    return sharing * 1e3, best(cold) * 1e3


@dataclass(frozen=True)
class FlowerCosts:
    """Seconds of Flower 1.41's functions; masks per million coordinates."""

    mask: float
    agree: float
    share_seed: float
    share_key: float
    combine_seed: float
    combine_key: float

    @classmethod
    def measure(cls, n: int, threshold: int, coordinates: int = MILLION) -> "FlowerCosts":
        """Measure for ``n`` neighbours."""
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

        total = [np.zeros(coordinates, np.int64)]
        seed = os.urandom(32)

        def mask() -> None:
            parameters_addition(total, pseudo_rand_gen(seed, 1 << 32, [(coordinates,)]))

        mine, _ = generate_key_pairs()
        _, theirs = generate_key_pairs()
        pem = private_key_to_bytes(mine)
        seeds, keys = create_shares(seed, threshold, n), create_shares(pem, threshold, n)
        return cls(
            best(mask) * MILLION / coordinates,
            best(lambda: generate_shared_key(mine, theirs), 0.3),
            best(lambda: create_shares(seed, threshold, n), 0.5),
            best(lambda: create_shares(pem, threshold, n), 0.5),
            best(lambda: combine_shares(seeds[:threshold]), 0.5),
            best(lambda: combine_shares(keys[:threshold]), 0.5),
        )

    def client(self, k: int, d: int) -> float:
        """Seconds of a client with k neighbours."""
        return 2 * k * self.agree + self.share_seed + self.share_key + (k + 1) * self.mask * d / MILLION

    def server(self, n: int, k: int, d: int, dropped: int) -> float:
        """Seconds of a server after drop-outs past the sharing of keys."""
        alive = n - dropped
        masks = (alive + dropped * k * alive / n) * self.mask * d / MILLION
        return alive * self.combine_seed + dropped * (self.combine_key + k * self.agree) + masks


# --- a whole round ----------------------------------------------------------------------------------------


def peak_mb(reset: bool = False) -> float:
    """The process's peak since it was last reset, or what it has now if it is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def play(n: int, d: int, dropped: int, bits: int, hidden: bool) -> dict[str, Any]:
    """One round in this process; ``dropped`` devices leave after the sharing of keys."""
    from lepton_fl.secagg.client import ClientSession, MemoryLedger, Policy
    from lepton_fl.secagg.context import COMPLETE, RoundContext, Rules, hidden_odds
    from lepton_fl.secagg.encoding import Exact
    from lepton_fl.secagg.rehearsal import make_members
    from lepton_fl.secagg.server import ServerSession
    from lepton_fl.secagg.uploads import Intake, MemorySpool

    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, work: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - of any work
        start = time.process_time()
        result = work(*arguments)
        spent[name].append(time.process_time() - start)
        return result

    rules = Rules(edge_odds=hidden_odds(n) if hidden else COMPLETE)
    context = RoundContext("b", "r", 1, 1, bytes(32), bytes(32), Exact(d, n, 1, 7, bits=bits), rules)
    base = peak_mb(reset=True)
    members, trust = make_members(tuple(f"d{i:04}" for i in range(n)), "b", os.urandom)
    spool, sent = MemorySpool(), 0
    cores = len(os.sched_getaffinity(0)) if n >= 500 else 1
    server = ServerSession(context, trust, Intake(context, spool), cores)

    def accept(device: str, message: bytes) -> None:
        timed(f"server {server.stage.name}", server.accept, device, message, 0.0, lambda _: None)

    def close() -> None:
        timed(f"server {server.stage.name} close", server.close, lambda _: None)

    sessions = {}
    for m in members:
        accept(m.device, m.prekey.advert)
        sessions[m.device] = ClientSession(
            context, m.prekey, m.signing, trust, MemoryLedger(), Policy(hidden_graph=True)
        )
    close()
    roster = server.roster()
    for device, session in sessions.items():
        message = timed("client shares", session.share_keys, roster, os.urandom, 0.0)
        sent = len(message) + len(members[0].prekey.advert)
        accept(device, message)
    close()
    alive = dict(list(sessions.items())[: n - dropped])
    for device, session in alive.items():
        timed("client delivery", session.deliver, timed("server deliver", server.delivery, device))
        vector = np.ones(context.length, f"<u{bits // 8}")
        tail, body = timed("client mask", session.mask, vector)
        timed("server chunk", server.chunk, device, 0, body)
        accept(device, tail)
        spool.discard(device)
        session.release()
    upload = sent + len(tail) + len(body)
    close()
    for device, session in alive.items():
        message = timed("client consent", session.consent, server.survivors())
        accept(device, message)
    upload += len(message)
    close()
    for device, session in alive.items():
        message = timed("client reveal", session.reveal, server.certificate())
        accept(device, message)
    upload += len(message)
    began = time.perf_counter()
    outcome = timed("server unmask", server.finish)
    unmask_wall = time.perf_counter() - began
    if outcome.total is None or not (outcome.total[:d] == n - dropped).all():
        raise SystemExit(f"wrong sum: {outcome.reason}")
    clients = {k: statistics.median(v) for k, v in spent.items() if k.startswith("client")}
    servers = {k: sum(v) for k, v in spent.items() if k.startswith("server")}
    return {
        "client_s": sum(clients.values()),
        "client": clients,
        "server_s": sum(servers.values()),
        "server": servers,
        "unmask_wall_s": unmask_wall,
        "peak_mb": peak_mb() - base,
        "upload": upload,
    }


def round_of(n: int, d: int, dropped: int, bits: int = 32, hidden: bool = True) -> dict[str, Any]:
    """One round in a process of its own."""
    arguments = [str(n), str(d), str(dropped), str(bits), str(int(hidden))]
    command = [sys.executable, __file__, "--play", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"round of {arguments} failed: {done.stderr[-2000:]}{done.stdout[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- the table ----------------------------------------------------------------------------------------------


def engine_rows(console: Console) -> list[Verdict]:
    """Masks and shares."""
    pairs = [(mask_gb_s(), *openssl_gb_s()) for _ in range(3)]
    ours, bound, source = max(p[0] for p in pairs), max(p[1] for p in pairs), pairs[0][2]
    sharing, combining = shamir_ms(1000)
    console.print(f"masks {ours:.2f} GB/s, {source} {bound:.2f} GB/s")
    return [
        Verdict(
            f"mask engine, keystream + add, of {source} ({bound:.2f} GB/s)",
            f"{ours:.2f} GB/s = {ours / bound:.2f}",
            ">= 0.9",
            ours >= 0.9 * bound,
        ),
        Verdict("Shamir, n=1,000, t=501: share", f"{sharing:.2f} ms", "<= 2 ms", sharing <= 2),
        Verdict("Shamir, n=1,000: combine all", f"{combining:.1f} ms", "<= 50 ms", combining <= 50),
    ]


def round_rows(console: Console) -> list[Verdict]:
    """Whole rounds at n = 100 and d = 1 M, and d = 10 M."""
    flower = FlowerCosts.measure(61, 31)
    theirs, server_theirs = flower.client(60, MILLION), flower.server(100, 60, MILLION, 20)
    console.print(f"Flower: {flower}")
    hidden = min((round_of(100, MILLION, 20) for _ in range(2)), key=lambda r: r["server_s"])
    complete = round_of(100, MILLION, 20, hidden=False)
    half = round_of(100, MILLION, 20, bits=16, hidden=False)
    large = round_of(21, 10 * MILLION, 4, hidden=False)
    for name, row in (("k~60", hidden), ("complete", complete), ("b=16", half), ("d=10M", large)):
        console.print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    client, server = hidden["client_s"] * 1e3, hidden["server_s"]
    mib = half["upload"] / 2**20
    ratio = f"Flower {theirs * 1e3:,.0f} ms: {theirs / hidden['client_s']:.0f}x"
    server_ratio = f"Flower {server_theirs:.1f} s: {server_theirs / server:.0f}x"
    return [
        Verdict(f"client CPU, n=100, d=1 M, k~60 ({ratio})", f"{client:.0f} ms", "<= 100 ms", client <= 100),
        Verdict(
            f"server CPU, same, 20 dropped ({server_ratio})", f"{server:.2f} s", "<= 1.3 s", server <= 1.3
        ),
        Verdict("client CPU, complete graph", f"{complete['client_s'] * 1e3:.0f} ms", "", None),
        Verdict("server CPU, complete graph", f"{complete['server_s']:.2f} s", "", None),
        Verdict("client CPU, complete graph, b=16", f"{half['client_s'] * 1e3:.0f} ms", "", None),
        Verdict(
            "peak memory, n=100, d=1 M, above imports",
            f"{hidden['peak_mb']:.0f} MB",
            "<= 90 MB",
            hidden["peak_mb"] <= 90,
        ),
        Verdict(
            "peak memory, n=21, d=10 M, above imports",
            f"{large['peak_mb']:.0f} MB",
            "<= 260 MB",
            large["peak_mb"] <= 260,
        ),
        Verdict("upload, b=16, d=1 M, n=100, all messages", f"{mib:.3f} MiB", "<= 2.1 MiB", mib <= 2.1),
    ]


def thousand_rows() -> list[Verdict]:
    """A round of 1,000 devices, 300 of them lost after the sharing of keys."""
    row = round_of(1000, 100_000, 300)
    return [
        Verdict("n=1,000, d=100 k, k~88: client CPU", f"{row['client_s']:.2f} s", "", None),
        Verdict("same: server CPU, 300 dropped", f"{row['server_s']:.1f} s", "", None),
        Verdict("same: unmask, wall, every core", f"{row['unmask_wall_s']:.1f} s", "", None),
        Verdict("same: peak memory, all devices' sessions included", f"{row['peak_mb']:.0f} MB", "", None),
    ]


_SIMULATED = """\
[run]
task = "digits"
rounds = 1
weighting = "equal"
clip_norm = 2.0
secure_aggregation = "required"
[run.cohort]
size = {n}
[engine]
secure_aggregation = "full"
[data.partition]
kind = "iid"
clients = {n}
"""


def simulated_rows(n: int = 1000) -> list[Verdict]:
    """``lepton simulate``: a round of ``n`` virtual devices, every key, share, mask and signature."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = Path(folder) / "scenario.toml"
        scenario.write_text(_SIMULATED.format(n=n))
        command = [str(Path(sys.executable).parent / "lepton"), "simulate", str(scenario)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([*command, "--output", f"{folder}/run"], check=True, capture_output=True)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        Verdict(
            f"n={n:,} in lepton simulate, complete graph: CPU of all processes", f"{cpu:.0f} s", "", None
        ),
        Verdict("same: wall, start included", f"{wall:.0f} s", "", None),
    ]


# --- the plot -------------------------------------------------------------------------------------------


def plot(path: Path) -> None:
    """Client and server time against n (d = 100 k) and against d (n = 50), ours and Flower's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cohorts, lengths = [16, 32, 64, 100], [10_000, 100_000, 300_000, MILLION]
    sweeps = (
        ("devices n (d = 100 k, 20 % dropped)", cohorts, [(n, 100_000) for n in cohorts]),
        ("coordinates d (n = 50, 20 % dropped)", lengths, [(50, d) for d in lengths]),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for column, (label, xs, points) in enumerate(sweeps):
        rows = [round_of(n, d, n // 5, hidden=False) for n, d in points]
        costs = {n: FlowerCosts.measure(n, n // 2 + 1, 200_000) for n in {n for n, _ in points}}
        theirs = [(costs[n].client(n - 1, d), costs[n].server(n, n - 1, d, n // 5)) for n, d in points]
        for side, key in enumerate(("client_s", "server_s")):
            axis = axes[side][column]
            axis.loglog(xs, [row[key] for row in rows], marker="o", label="Lepton FL")
            axis.loglog(xs, [pair[side] for pair in theirs], marker="s", label="Flower 1.41 functions")
            axis.set_xlabel(label)
            axis.set_ylabel(f"{('client', 'server')[side]}, CPU seconds")
            axis.grid(visible=True, which="major", alpha=0.3)
            axis.legend()
    figure.suptitle("Secure aggregation, complete mask graph, 32 bits")
    figure.savefig(path, dpi=120)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--thousand", action="store_true")
    parser.add_argument("--play", nargs=5, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        n, d, dropped, bits, hidden = options.play
        print(json.dumps(play(n, d, dropped, bits, bool(hidden))))
        return 0
    console = Console()
    verdicts = engine_rows(console) + round_rows(console)
    if options.thousand:
        verdicts += thousand_rows() + simulated_rows()
    table = Table("figure", "measured", "target", "")
    for v in verdicts:
        table.add_row(v.figure, v.measured, v.target, {True: "ok", False: "MISSED", None: ""}[v.good])
    console.print(table)
    if options.plot:
        plot(options.plot)
        console.print(f"plot: {options.plot}")
    return 1 if any(v.good is False for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
