"""Builds the ``lepton`` command and runs it.

Light on purpose: ``lepton --help`` must not load torch, flwr, SciPy, gRPC or SQL. A role's ``app`` is found
by name in the entry-point group ``lepton.commands``, and its commands appear at the top level. A role that
cannot be loaded becomes one command that says why; the rest goes on working.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import click
import typer

from lepton_fl import __version__
from lepton_fl.cli import config, doctor, output, privacy, task, variants
from lepton_fl.errors import ConfigError

GROUP = "lepton.commands"


def run(argv: Sequence[str]) -> int:
    """Run one command line; return the exit code. Nothing is raised, not even SystemExit."""
    wanted = wanted_format(argv)
    try:
        command = typer.main.get_command(build())
        result = command.main(list(argv), prog_name="lepton", standalone_mode=False)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        output.say("interrupted")
        return output.INTERRUPTED
    except click.ClickException as error:
        return _usage(error, wanted)
    except BrokenPipeError:
        output.close_output()
        return 0  # the reader has gone: that is its right
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # noqa: BLE001 -- the outermost frame: every error ends as one readable block
        return output.report(error, format=wanted)
    return result if isinstance(result, int) else 0


def wanted_format(argv: Sequence[str]) -> output.Format:
    """The format asked for, read before parsing so that parsing errors have it, too."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    asked = any(word == "--format=json" or (word, after) == ("--format", "json") for word, after in pairs)
    return output.Format.JSON if asked else output.Format.TEXT


def build() -> typer.Typer:
    """The whole command, with every role that is installed."""
    app = typer.Typer(
        name="lepton",
        help="Federated learning for cloud-edge fleets.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(task.app, name="task")
    app.add_typer(config.app, name="config")
    app.add_typer(privacy.app, name="privacy")
    app.add_typer(variants.app, name="variants")
    app.command("doctor")(doctor.doctor)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        _mount(app, entry)
    return app


def _mount(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        role = entry.load()
    except Exception as error:  # noqa: BLE001 -- a broken role must not take the others with it
        _mount_placeholder(app, entry.name, error)
    else:
        app.add_typer(role)  # no name: its commands join ours


def _mount_placeholder(app: typer.Typer, name: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"

    def unavailable(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(
                f"the {name} commands cannot be loaded ({reason})",
                hint=f"pip install 'lepton-fl[{_extra(name)}]'",
            ) from error
        raise error

    app.command(
        name,
        help=f"Not available: {reason}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(unavailable)


def _extra(name: str) -> str:
    return {"simulations": "sim"}.get(name, name)


def _version(value: bool) -> None:
    if value:
        output.print_data(f"lepton {__version__}")
        raise typer.Exit


def _no_color(value: bool) -> None:
    if value:
        os.environ["NO_COLOR"] = "1"


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
    no_color: Annotated[
        bool,
        typer.Option("--no-color", help="No colours (as NO_COLOR=1).", callback=_no_color, is_eager=True),
    ] = False,
) -> None: ...


def _usage(error: click.ClickException, wanted: output.Format) -> int:
    """A wrong command line: say what is wrong and how the command is meant to be used."""
    hint = "`lepton --help` lists the commands"
    context: click.Context | None = getattr(error, "ctx", None)
    if context is not None:
        usage = context.get_usage().removeprefix("Usage: ")
        hint = f"usage is: {usage}; `{context.command_path} --help` explains"
    return output.fail(error.format_message(), hint, "usage", output.USAGE, format=wanted)
