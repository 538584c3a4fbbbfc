"""A coordinator whose node of one device can be shut out: SIGUSR2 evicts the device that a file names.

python _evicting.py server.toml evict.txt
"""

import signal
import sys
from pathlib import Path

from lepton_fl.logs import configure
from lepton_server.commands import load
from lepton_server.coordinator import Coordinator


def main() -> None:
    """Serve until SIGTERM."""
    settings = load(Path(sys.argv[1]), {})
    configure("info", "text")
    coordinator = Coordinator(settings)

    def evict(*_: object) -> None:
        driver = coordinator._driver
        assert driver is not None
        driver.expel(Path(sys.argv[2]).read_text())

    signal.signal(signal.SIGTERM, lambda *_: coordinator.stop())
    with coordinator:
        signal.signal(signal.SIGUSR2, evict)
        coordinator.wait()


if __name__ == "__main__":
    main()
