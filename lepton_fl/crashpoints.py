"""Named places where a test may kill the process, as abruptly as a power cut does; inert otherwise.

    reached("update.kept")      # nothing, unless LEPTON_CRASH_AT names this point

``LEPTON_CRASH_AT=NAME`` or ``NAME:N`` kills the process with SIGKILL when it gets there for the N-th time.
The variable is read once, when this module is first imported, and is taken out of the environment, so that
child processes do not inherit it. Nothing that a peer sends, and no configuration file, can set it: whoever
can set it starts the process and could as well kill it.
"""

import os
import signal
import threading

VARIABLE = "LEPTON_CRASH_AT"

COORDINATOR = (  # in the order in which a round passes them
    "round.planning",  # decided, not recorded
    "round.planned",
    "round.offering",  # one device has its message, the others have not
    "round.offered",
    "update.spooled",  # an update is on the disk, nothing names it
    "update.kept",  # it is recorded, its device has not been told
    "update.acknowledged",  # told
    "update.added",  # in the sum
    "secure.adverts",  # secure: an answer at this stage, or the end of it, is recorded; as the following
    "secure.shares",
    "secure.uploads",
    "secure.consents",
    "round.unmasking",  # secure: a survivor set is signed, shares have been asked for
    "secure.reveals",
    "round.aggregating",  # who counts is decided, not recorded
    "round.aggregated",
    "noise.bound",  # private: what the noise is made of is recorded, nothing is added yet
    "noise.added",
    "model.stored",  # the model is on the disk, nothing names it
    "round.committed",
    "round.released",  # updates and noise are erased
    "round.evaluated",
    "run.finishing",  # the verdict is known, not recorded
)
CLIENT = (
    "enrol.key",  # the device's key is on the disk, no token was spent
    "enrol.answered",  # the coordinator has enrolled it, nothing is kept here
    "train.downloaded",  # a request has come, nothing is written down
    "train.begun",  # written down as begun
    "train.trained",  # nothing is sent yet
    "train.sent",  # the coordinator has it, that is not written down
    "secure.advertised",  # keys for a secure round are made, nobody has them
    "secure.keyed",  # key shares are sent
    "secure.masked",  # the masked update is made
    "secure.signed",  # a survivor set is signed
    "secure.revealed",  # this device's shares are ready, nothing is sent
)
OPERATOR = (  # of `lepton backup`
    "backup.database",  # the snapshot is taken and written, files are being copied
    "backup.written",  # all is there, under another name
    "restore.begun",  # marked as begun, nothing is in place
    "restore.files",  # keys, models and releases are in place, the database is not
    "restore.database",  # everything is in place, and still marked as begun
)
_WANTED, _, _COUNT = os.environ.pop(VARIABLE, "").partition(":")
_lock = threading.Lock()
_left = int(_COUNT or 1)


def reached(name: str) -> None:
    """Die here, if a test has asked for it."""
    global _left
    if name != _WANTED:
        return
    with _lock:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
