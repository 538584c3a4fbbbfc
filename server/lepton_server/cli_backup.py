"""``lepton backup``: the coordinator's state, all of it, in one folder, and back.

Importing this module imports none of its weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data, progress, say
from lepton_server.commands import ConfigOption, StateOption, load, opened, read_passphrase

if TYPE_CHECKING:
    from lepton_fl.privacy.head import LedgerHead
    from lepton_server.backup import Manifest, Progress

app = typer.Typer(help="The coordinator's whole state in one folder, and back.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="The backup, a folder.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="Private file (mode 0600) whose first line is the passphrase."),
]
HeadOption = Annotated[
    Path | None,
    typer.Option(
        "--head",
        help="The privacy ledger's head as it was published (`lepton privacy head --format json`): a backup "
        "that lacks it is refused.",
    ),
]


@app.command()
def create(
    folder: Annotated[Path, typer.Argument(help="A new folder, mode 0700; it appears when it is whole.")],
    passphrase_file: PassphraseOption = None,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Back up the database, models, open rounds, releases, keys and configuration, while it runs or not.

    With a passphrase, keys and configuration are sealed. Without one whoever has the backup has the keys.
    """
    from lepton_server import backup

    settings = load(config, {"server.state_dir": state_dir})
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    with opened(settings) as store, _bar("rows", store.head_seq()) as shown:
        made = backup.create(store, settings, folder, config=config, passphrase=passphrase, progress=shown)
    _print(folder, made, format)
    for name in made.elsewhere:
        say(f"Not in it: the file that {name} names lies outside the state folder. Keep a copy of it apart.")
    if not made.sealed:
        say("It holds private keys in the clear: keep it as you keep them, or give --passphrase-file.")


@app.command()
def verify(
    folder: FolderArgument,
    passphrase_file: PassphraseOption = None,
    head: HeadOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check a backup, without a coordinator: every byte, the whole journal, all tables, what they name.

    Nothing is written there. A copy of its database lies in the temporary folder (TMPDIR) meanwhile.
    """
    from lepton_server.backup import checked
    from lepton_server.heads import refuse_older

    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    with _bar("files") as shown, checked(folder, passphrase=passphrase, progress=shown) as found:
        if (published := _head(head)) is not None:
            refuse_older(found.store, published)
    _print(folder, found.manifest, format, {"budget_key": found.budget_key or None}, "The backup is true")


@app.command()
def restore(
    folder: FolderArgument,
    passphrase_file: PassphraseOption = None,
    head: HeadOption = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Move aside what is there (….replaced-TIME); rows of a PostgreSQL database are deleted.",
        ),
    ] = False,
    config: ConfigOption = None,
    state_dir: StateOption = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Put a backup where the configuration says that the state is; `lepton server` then goes on from it.

    The installation must be empty, and no coordinator may run there. A backup whose privacy ledger lacks what
    was published, or what is there, is refused.
    """
    from lepton_server import restore as restoring

    settings = load(config, {"server.state_dir": state_dir})
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    with _bar("files") as shown:
        made = restoring.restore(
            folder, settings, head=_head(head), replace=replace, passphrase=passphrase, progress=shown
        )
    _print(folder, made, format, {"state_dir": str(settings.server.state_dir)}, "Restored")
    for name in made.elsewhere:
        say(f"Not in it: the file that {name} names. Put it back before you start `lepton server`.")


def _head(file: Path | None) -> "LedgerHead | None":
    from lepton_fl.errors import ConfigError
    from lepton_server.heads import head_from

    if file is None:
        return None
    try:
        return head_from(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}.") from error


@contextmanager
def _bar(what: str, total: int | None = None) -> "Iterator[Progress]":
    from lepton_server.backup import Progress

    with progress(what, total) as bar:

        class Shown(Progress):
            """On a terminal."""

            def rows(self, count: int) -> None:
                bar.advance(count, description="rows")

            def file(self) -> None:
                bar.advance(description="files")

        yield Shown()


def _print(
    folder: Path, made: "Manifest", format: Format, more: dict[str, Any] | None = None, title: str = ""
) -> None:
    summary = {
        "folder": str(folder),
        "id": made.id,
        "created": datetime.fromtimestamp(made.created, UTC),
        "version": made.version,
        "database": made.engine,
        "files": len(made.files),
        "bytes": sum(size for size, _ in made.files.values()),
        "head": f"{made.head.seq}:{made.head.hash}",
        "ledger_event": made.ledger.seq or None,
        "keys": "sealed" if made.sealed else "in the clear",
    }
    print_data(summary | (more or {}), format=format, title=title)
