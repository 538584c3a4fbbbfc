"""The agent, or the prediction endpoint, as a process of its own: a fresh interpreter and nothing else.

``lepton client run`` and ``serve`` check the configuration and then replace themselves by this module, so
that the command line's libraries do not stay in the memory of a device for months. The process id stays.
"""

import os
import signal
import sys
from typing import Final, NoReturn

from lepton_client.config import ClientConfig

# Read by glibc at start. Arenas for many threads cost megabytes and buy an idle process nothing. What a large
# request took goes back to the system at once; in training that would cost page faults at every step.
_ARENAS: Final = {"MALLOC_ARENA_MAX": "2"}
_MALLOC: Final = {
    "agent": _ARENAS,
    "endpoint": _ARENAS | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
}


def become(config: ClientConfig) -> NoReturn:
    """Replace this process by an agent with ``config``."""
    _become(config, "agent")


def become_server(config: ClientConfig) -> NoReturn:
    """Replace this process by a prediction endpoint with ``config``."""
    _become(config, "endpoint")


def _become(config: ClientConfig, role: str) -> NoReturn:
    descriptor = os.memfd_create("lepton-client")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(config.model_dump_json().encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.set_inheritable(descriptor, True)
    environment = {**_MALLOC[role], **os.environ}
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "lepton_client.process", str(descriptor), role]
    os.execve(sys.executable, command, environment)  # noqa: S606 - our own interpreter and module


def main() -> int:
    """Run until stopped; returns the exit code."""
    from lepton_fl.errors import LeptonError
    from lepton_fl.logs import configure

    with os.fdopen(int(sys.argv[1]), "rb") as file:
        config = ClientConfig.model_validate_json(file.read())
    configure(config.log.level, config.log.format)
    try:
        return _agent(config) if sys.argv[2] == "agent" else _endpoint(config)
    except LeptonError as error:
        from lepton_fl.cli.output import report

        return report(error)


def _agent(config: ClientConfig) -> int:
    from lepton_client.agent import Agent

    agent = Agent(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    if not agent.run():
        sys.stderr.flush()
        os._exit(0)  # the state is saved; code of a task that does not return must not keep us here
    return 0


def _endpoint(config: ClientConfig) -> int:
    import logging
    import threading

    from lepton_client.limits import apply_limits

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    apply_limits(config.limits.model_copy(update={"nice": 0}))  # somebody waits for its answers
    try:
        from lepton_client.serve import serve
    except ImportError as error:
        from lepton_fl.errors import ConfigError

        raise ConfigError(
            f"This device cannot serve: {error}.", hint="pip install 'lepton-fl[serve]'"
        ) from error
    log = logging.getLogger("lepton_client")
    serve(config, stop, lambda address: log.info("answering at %s", address))
    return 0


if __name__ == "__main__":
    sys.exit(main())
