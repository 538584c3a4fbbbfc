"""``lepton audit``: is the journal what it always was, and what does it say about a model?

Importing this module imports none of its weight.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data
from lepton_fl.errors import ConfigError, StateCorrupt
from lepton_server.commands import ConfigOption, StateOption, find_run, load, opened

if TYPE_CHECKING:
    from lepton_server.audit import AuditReport
    from lepton_server.config import ServerConfig
    from lepton_server.store import Head

app = typer.Typer(help="Evidence: check the journal, and write it down for others.", no_args_is_help=True)

HeadOption = Annotated[
    str,
    typer.Option(metavar="SEQ:HASH", help="A head that was published earlier and must still be there."),
]


@app.command()
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="The journal.jsonl of an export; default: the coordinator's state.")
    ] = None,
    head: HeadOption = "",
    key: Annotated[
        str | None, typer.Option(help="Fingerprint of the key that must have signed the budgets.")
    ] = None,
    releases: Annotated[
        Path | None,
        typer.Option(help="Folder of signed releases, or a copy; default: the coordinator's, if any."),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also every body by its schema, and all tables by a replay: slower."),
    ] = False,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Prove the journal: its chain, the privacy ledger and its signatures, signed releases, stored models.

    Of an export this needs no coordinator, no database and no network; stored models stay unchecked.
    """
    from lepton_server.audit import parse_head

    published = parse_head(head) if head else None
    if file is not None:
        report, more = _of_file(file, published, releases, deep)
    else:
        report, more = _of_state(load(config, {"server.state_dir": state_dir}), published, releases, deep)
    if key is not None and report.ledger.key != key:
        raise StateCorrupt(
            f"The budgets are signed by the key {report.ledger.key or 'of nobody'}, not by {key}."
        )
    summary = {
        "head": f"{report.head.seq}:{report.head.hash}",
        "events": report.head.seq,
        "models": report.models,
        "releases_published": len(report.releases),
        "ledger_events": report.ledger.events,
        "budget_key": report.ledger.key or None,
    }
    print_data(summary | more, format=format, title="The journal is true")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="New folder for the card and the journal, mode 0700.")],
    run: Annotated[str, typer.Option(help="Run id, a unique beginning of it, or 'last'.")] = "last",
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Write a run's model card (JSON and Markdown), and the whole journal that proves it.

    The journal names every device and what it did: it is for an auditor, the card may be published.
    """
    from lepton_fl.delivery.shelf import Shelf
    from lepton_fl.files import canonical_json, make_private_folder, write_atomic
    from lepton_server.audit import export_lines, write_lines
    from lepton_server.model_card import as_markdown, model_card

    settings = load(config, {"server.state_dir": state_dir})
    if folder.exists():
        raise ConfigError(f"{folder} is there already.", hint="Name a new folder.")
    shelf = Shelf(settings.release_dir) if settings.release_dir.is_dir() else None
    with opened(settings) as store:
        found = find_run(store, run)
        make_private_folder(folder)
        with store.journal() as (head, lines):
            size = write_lines(folder / "journal.jsonl", export_lines(head, lines))
        card = model_card(store, store.run(found.id), head, shelf)
    write_atomic(folder / "model_card.json", canonical_json(card) + b"\n")
    write_atomic(folder / "model_card.md", as_markdown(card).encode())
    summary = {"folder": str(folder), "run": found.id, "events": head.seq, "bytes": size}
    print_data(summary | {"head": f"{head.seq}:{head.hash}"}, format=format)


def _of_file(
    file: Path, published: "Head | None", releases: Path | None, deep: bool
) -> "tuple[AuditReport, dict[str, Any]]":
    from lepton_server.audit import verify_export, verify_releases

    try:
        with open(file, "rb") as stream:
            report = verify_export(stream, published, deep=deep)
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {os.strerror(error.errno or 0)}.") from error
    if releases is None:
        return report, {}
    return report, {"releases_signed": verify_releases(releases, report.releases)}


def _of_state(
    settings: "ServerConfig", published: "Head | None", releases: Path | None, deep: bool
) -> "tuple[AuditReport, dict[str, Any]]":
    from lepton_fl.files import BlobStore
    from lepton_server.audit import Auditor, verify_blobs, verify_releases

    auditor = Auditor(published, deep=deep)
    with opened(settings) as store:
        with store.journal() as (_, lines):
            for line in lines:
                auditor.take(line)
        report = auditor.report()
        if deep:
            rebuilt = store.rebuild()
            if not rebuilt.equal:
                raise StateCorrupt(
                    f"{rebuilt.different} rows are not what the journal says: {rebuilt.differences[0]}.",
                    hint="`lepton doctor server --rebuild` shows them.",
                )
        there, dropped = verify_blobs(store, BlobStore(settings.blob_dir, make=False))
    more = {"blobs_intact": there, "blobs_deleted_in_time": dropped}
    folder = releases or settings.release_dir
    if releases is not None or (folder / "metadata").is_dir() or report.releases:
        more["releases_signed"] = verify_releases(folder, report.releases)
    return report, more
