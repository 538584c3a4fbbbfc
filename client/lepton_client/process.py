"""The agent as a process of its own: a fresh interpreter with nothing in it but the agent.

``lepton client run`` checks the configuration and then replaces itself by this module, so that the command
line's libraries do not stay in the memory of a device for months. The process id stays the same.
"""

import os
import signal
import sys
from typing import NoReturn

from lepton_client.config import ClientConfig


def become(config: ClientConfig) -> NoReturn:
    """Replace this process by an agent with ``config``."""
    descriptor = os.memfd_create("lepton-client")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(config.model_dump_json().encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.set_inheritable(descriptor, True)
    environment = {
        # Read by glibc at start: arenas for many threads cost megabytes and buy an idle process nothing.
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
    }
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "lepton_client.process", str(descriptor)]
    os.execve(sys.executable, command, environment)  # noqa: S606 - our own interpreter and module


def main() -> int:
    """Run the agent until it is stopped; returns the exit code."""
    from lepton_client.agent import Agent
    from lepton_fl.errors import LeptonError
    from lepton_fl.logs import configure

    with os.fdopen(int(sys.argv[1]), "rb") as file:
        config = ClientConfig.model_validate_json(file.read())
    configure(config.log.level, config.log.format)
    agent = Agent(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    try:
        ended = agent.run()
    except LeptonError as error:
        from lepton_fl.cli.output import report

        return report(error)
    if not ended:
        sys.stderr.flush()
        os._exit(0)  # the state is saved; code of a task that does not return must not keep us here
    return 0


if __name__ == "__main__":
    sys.exit(main())
