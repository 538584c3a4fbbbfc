"""``lepton privacy budget``, ``show``, ``head``, ``export`` and ``verify``: what privacy has cost, proven.

They join ``lepton privacy plan``. Importing this module imports none of its weight.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, say
from lepton_fl.cli.privacy import app
from lepton_fl.errors import ConfigError, NotFound, StateCorrupt
from lepton_server.commands import ConfigOption, StateOption, load, opened

if TYPE_CHECKING:
    from lepton_fl.privacy.events import Event
    from lepton_fl.privacy.record import LedgerReport
    from lepton_server.store import ChargeRecord, SignedBudget, Store

LEFT_OPEN = ("reserved", "releasing")


@app.command()
def budget(
    account: Annotated[
        str, typer.Argument(help="fleet, group:LABEL, task:NAME, or run:ID (a run opens its own).")
    ],
    epsilon: Annotated[float, typer.Option(help="What its devices may spend in all, for ever.")],
    delta: Annotated[float, typer.Option(help="At most one over the devices.")],
    trust: Annotated[
        str, typer.Option(help="central, or distributed: then no run may show the coordinator more.")
    ] = "central",
    adjacency: Annotated[str, typer.Option(help="zero-out or replace-one.")] = "zero-out",
    note: Annotated[str, typer.Option(help="Kept and signed.")] = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Set what an account may spend, by a new signed row. What was spent before counts."""
    if trust not in ("central", "distributed") or adjacency not in ("zero-out", "replace-one"):
        raise ConfigError(
            f"Expected --trust central or distributed and --adjacency zero-out or replace-one, got {trust!r} "
            f"and {adjacency!r}."
        )
    from lepton_fl.privacy.record import Policy
    from lepton_fl.tasks import resolve
    from lepton_server.privacy import PrivacyKeys, set_budget

    if account.startswith("task:"):
        account = f"task:{resolve(account.removeprefix('task:'))}"
    settings = load(config, {"server.state_dir": state_dir})
    keys = PrivacyKeys(settings.server.state_dir / "keys", settings.privacy)
    wanted = Policy(account, 1, epsilon, delta, "device", trust, adjacency, note=note)  # type: ignore[arg-type]  # checked above
    with opened(settings) as store:
        if account.startswith("run:"):
            store.run(account.removeprefix("run:"))  # a slip of the pen is no budget
        with store.transaction() as change:
            signed = set_budget(change, keys, wanted)
    say(f"Version {signed.version} holds from the next reservation on; see `lepton privacy show`.")
    print_data(_policy_row(signed), format=format)


@app.command()
def show(
    config: ConfigOption = None, state_dir: StateOption = None, format: FormatOption = Format.TEXT
) -> None:
    """Every guarantee with its unit, trust and adjacency, and what is spent of each budget.

    Epsilons of different units or trust say different things; they are never added up.
    """
    with opened(load(config, {"server.state_dir": state_dir})) as store:
        rows = [_budget_row(found, counts, store) for found, counts in store.budgets()]
        rows += _on_devices(store)
        waiting, missed = store.charges(states=LEFT_OPEN), store.missed_head()
    if format == Format.JSON:
        unsettled = [_charge_row(c) for c in waiting]
        print_data({"budgets": rows, "unsettled": unsettled, "missed_event": missed}, format=format)
        return
    if missed is not None:
        say(f"A device has seen event {missed} of this ledger, which is not here: this is an older copy.")
    print_data(rows, title="Privacy budgets", columns=_COLUMNS)
    if waiting:
        print_data([_charge_row(c) for c in waiting], title="Under way or in doubt: they count as spent")


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="File to write: .jsonl (a line an event) or .json.")],
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Write the whole ledger, for somebody who checks it elsewhere: `lepton privacy verify FILE`."""
    if output.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"Expected a file that ends in .jsonl or .json, got {output}.")
    from lepton_fl.files import canonical_json, write_atomic

    with opened(load(config, {"server.state_dir": state_dir})) as store:
        lines = [canonical_json(line) for line in ledger_lines(store)]
    whole = b"[" + b",\n".join(lines) + b"]\n" if output.suffix == ".json" else b"\n".join(lines) + b"\n"
    write_atomic(output, whole)
    print_data({"file": str(output), "events": len(lines) - 1, "bytes": len(whole)}, format=format)


@app.command()
def head(
    file: Annotated[
        Path | None, typer.Argument(help="A head that was printed earlier: is it part of this ledger?")
    ] = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Print the ledger's signed head, to be kept elsewhere; or hold this ledger against one that was kept.

    Exit code 7 if this ledger is an older copy than the one that the head is of.
    """
    from lepton_server.heads import Heads, head_from, refuse_older
    from lepton_server.privacy import PrivacyKeys

    settings = load(config, {"server.state_dir": state_dir})
    with opened(settings) as store:
        if file is not None:
            kept = head_from(_read(file))
            refuse_older(store, kept)
            print_data({"event": kept.seq, "is": "part of this ledger"}, format=format)
            return
        heads = Heads(store, PrivacyKeys(settings.server.state_dir / "keys", settings.privacy))
        heads.refresh()
    if heads.head is None:
        raise NotFound("There is no ledger yet: no budget was set and no private run has begun.")
    print_data(heads.head.to_json(), format=format)


@app.command()
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="An export; default: the coordinator's own state.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Fingerprint of the key that must have signed the budgets.")
    ] = None,
    head: Annotated[str, typer.Option(help="A head that was noted earlier and must still be there.")] = "",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Prove the ledger: its chain, its signatures, every refusal that was due, and all sums, computed anew.

    Of an export this needs no coordinator, no database and no network.
    """
    from lepton_fl.privacy import record

    if file is not None:
        report = record.verify(record.read_export(_read(file)), head=head)
    else:
        with opened(load(config, {"server.state_dir": state_dir})) as store:
            store.verify_journal()
            report = record.verify(ledger_lines(store), head=head)
            _check_releases(store)
    if key is not None and report.key != key:
        raise StateCorrupt(f"The budgets are signed by the key {report.key or 'of nobody'}, not by {key}.")
    _print_report(report, format)


def ledger_lines(store: "Store") -> list[dict[str, Any]]:
    """The ledger as an export has it: a header, then every event, oldest first."""
    from lepton_fl.files import GENESIS
    from lepton_fl.privacy.record import FORMAT, SUBJECT

    events = store.events(subject=SUBJECT)
    head = events[-1].hash if events else GENESIS
    names = ("seq", "time", "kind", "subject", "body", "prev", "hash")
    lines = [{name: getattr(event, name) for name in names} for event in events]
    return [{"format": FORMAT, "events": len(lines), "head": head}, *lines]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error


def _check_releases(store: "Store") -> None:
    """Every model of a private run is the one that its charge was committed with."""
    paid = {(c.run_id, c.round): c.model_sha256 for c in store.charges(states=("committed",))}
    for run in store.runs():
        if (run.spec.get("privacy") or {}).get("unit") == "device":
            for model in store.models(run.id):
                if model.round and paid.get((run.id, model.round)) != model.sha256:
                    raise StateCorrupt(
                        f"The model of run {run.id}, round {model.round} was charged to nobody."
                    )


# --- rows -------------------------------------------------------------------------------------------


_COLUMNS = [
    "budget",
    "unit",
    "trust",
    "adjacency",
    "delta",
    "epsilon",
    "spent",
    "remaining",
    "releases",
    "state",
]


def _policy_row(policy: Any) -> dict[str, Any]:  # noqa: ANN401 - record.Policy, imported late
    return {
        "budget": policy.account,
        "version": policy.version,
        "unit": policy.unit,
        "trust": policy.trust,
        "adjacency": policy.adjacency,
        "delta": policy.delta,
        "epsilon": policy.epsilon,
    }


def _budget_row(found: "SignedBudget", counts: "dict[Event, int]", store: "Store") -> dict[str, Any]:
    from lepton_fl.privacy.budget import epsilon_of
    from lepton_fl.privacy.record import scope_of

    policy = found.policy
    spent = epsilon_of(policy.budget, counts)
    return _policy_row(policy) | {
        "scope": scope_of(policy.account),
        "spent": spent,
        "remaining": max(0.0, policy.epsilon - spent),
        "releases": sum(counts.values()),
        "state": _state(policy.account, spent, policy.epsilon, store),
        "note": policy.note,
    }


def _state(account: str, spent: float, cap: float, store: "Store") -> str:
    if account.startswith("run:"):
        return f"run {store.run(account.removeprefix('run:')).state}"
    return "open" if spent < cap else "spent"


def _on_devices(store: "Store") -> list[dict[str, Any]]:
    """Guarantees whose budget every device keeps for itself: here only the promise is known."""
    rows = []
    for run in store.runs():
        asked = run.spec.get("privacy") or {}
        if asked.get("unit") == "example":
            names = ("unit", "trust", "adjacency", "delta", "epsilon")
            row = {"budget": f"run:{run.id}"} | {name: asked[name] for name in names}
            rows.append(row | {"scope": "model", "spent": None, "remaining": None, "state": "on each device"})
    return rows


def _charge_row(charge: "ChargeRecord") -> dict[str, Any]:
    meaning = "reserved: nothing is released yet" if charge.state == "reserved" else "may have been released"
    return {"run": charge.run_id, "round": charge.round, "attempt": charge.attempt, "state": meaning}


def _print_report(report: "LedgerReport", format: Format) -> None:
    rows = [
        _policy_row(b.policy) | {"spent": b.spent, "charged_later": list(b.overspent_by)}
        for b in report.budgets
    ]
    summary = {
        "events": report.events,
        "releases": report.releases,
        "voided": report.voided,
        "unsettled": report.unsettled,
        "head": report.head,
        "budget_key": report.key,
    }
    if format == Format.JSON:
        print_data(summary | {"budgets": rows}, format=format)
        return
    print_data(summary, title="The ledger is true")
    print_data(
        rows, title="Spent, computed anew", columns=["budget", "unit", "trust", "delta", "epsilon", "spent"]
    )
