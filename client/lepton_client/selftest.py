"""Does a release compute here what it computed where it was measured? Answered by a process of its own.

Run with ``python -m lepton_client.selftest FOLDER``; the verdict is one JSON object on standard output, and a
process that ends without one is a verdict, too. The numbers are the release's own: real rows and what the
model made of them (``parity.safetensors``), compared within the card's tolerance.
"""

import json
import os
import sys
from pathlib import Path

from lepton_fl.errors import Fault, LeptonError, ReleaseRefused


def examine(folder: Path) -> None:
    """Load the release in ``folder`` and run its self-test.

    Raises:
        ReleaseRefused: it cannot be loaded, or computes something else.
    """
    from lepton_client.predictor import Model
    from lepton_fl.compression.card import PARITY, check_parity

    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ReleaseRefused(Fault.RUNTIME, f"This device cannot run releases: {error}.") from error
    model = Model(folder)
    vectors = load_file(folder / PARITY)
    try:
        check_parity(model.card, vectors["output"], model.predict(vectors["input"]))
    except KeyError as error:
        raise ReleaseRefused(Fault.SELF_TEST, f"The self-test has no {error}.") from error
    except LeptonError as error:
        raise ReleaseRefused(Fault.SELF_TEST, str(error)) from error


def main() -> None:
    """The process."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not our answer
    verdict: dict[str, str | None] = {"fault": None, "detail": ""}
    try:
        examine(Path(sys.argv[1]))
    except ReleaseRefused as error:
        verdict = {"fault": error.fault.value, "detail": f"{error} {error.hint}".strip()}
    except LeptonError as error:
        verdict = {"fault": Fault.SELF_TEST.value, "detail": f"{error} {error.hint}".strip()}
    with os.fdopen(answer, "wb") as out:
        out.write(json.dumps(verdict).encode())


if __name__ == "__main__":
    main()
