"""The agent's log: one line per event on standard error, for people or for machines."""

import json
import logging
import sys
from datetime import UTC, datetime

from lepton_client.config import LogSection


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, logger and message; a traceback if there is one."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(section: LogSection) -> None:
    """Send our log to standard error; other libraries' only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    if section.format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    level = section.level.upper()
    for name in ("lepton_client", "lepton_fl"):
        logging.getLogger(name).setLevel(level)
