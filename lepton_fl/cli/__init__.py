"""The ``lepton`` command: one command line for every role.

``app`` builds it, ``output`` prints (for every command, of every package), ``task``, ``config``,
``privacy``, ``variants`` and ``doctor`` are the library's own commands. Roles add theirs through the
entry-point group ``lepton.commands``.
"""

import sys


def main() -> None:
    """Entry point of the ``lepton`` script."""
    from lepton_fl.cli.app import run

    sys.exit(run(sys.argv[1:]))
