"""``lepton task list|check``: which tasks are installed, and would this data do for one of them?"""

from importlib.metadata import entry_points

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data

app = typer.Typer(help="Look at the tasks that are installed.", no_args_is_help=True)

GROUP = "lepton.tasks"


@app.command("list")
def list_(format: FormatOption = Format.TEXT) -> None:
    """List the tasks that installed packages announce; other package.module:attribute names work as well."""
    rows = [
        {"name": entry.name, "reference": entry.value, "package": entry.dist.name if entry.dist else None}
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    ]
    print_data(rows, format=format, title="Tasks", columns=["name", "reference", "package"])
