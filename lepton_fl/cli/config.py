"""``lepton config show|schema``: what a role can be told, and what it has been told, by whom."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fl.cli.output import Format, FormatOption, print_data
from lepton_fl.errors import NotFound

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(help="Look at a role's configuration.", no_args_is_help=True)

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="server, client or simulation.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The role's TOML file; without it, defaults.")
]


@app.command()
def show(
    role: RoleArgument,
    config: ConfigOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Say of each value where it came from.")
    ] = False,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check a configuration and show it, with the environment applied and secrets masked."""
    from lepton_fl.config import load

    loaded = load(role_model(role), config)
    if not resolved and format == Format.JSON:
        print_data(loaded.to_json(), format=format)
        return
    rows = [
        {
            "key": setting.key,
            "value": setting.value,
            **({"source": setting.source.kind, "where": setting.source.where} if resolved else {}),
        }
        for setting in loaded.settings()
    ]
    print_data(rows, format=format, title=f"{role} configuration")


@app.command()
def schema(role: RoleArgument) -> None:
    """Print the JSON Schema of a role's configuration: every key, its type, bounds, default and meaning."""
    from lepton_fl.cli.schema import schema_of

    print_data(schema_of(role_model(role)), format=Format.JSON)


def role_model(role: str) -> "type[BaseModel]":
    """The configuration model of an installed role.

    Raises:
        NotFound: There is no such role, or its extra is not installed.
    """
    from lepton_fl.config import roles

    models = roles()
    if role not in models:
        close = get_close_matches(role, models, n=1)
        raise NotFound(
            f"there is no role {role!r}",
            hint=f"did you mean {close[0]!r}?"
            if close
            else f"the installed roles are: {', '.join(models) or 'none'}",
        )
    return models[role]
