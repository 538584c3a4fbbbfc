"""Predictions of the release in service, in this process, without torch.

    with Predictor("/var/lib/lepton-client") as predictor:
        scores = predictor.predict(rows)          # (n, …) -> (n, …), rows prepared as for training
        scores = predictor.predict_one(row)       # (…) -> (…)
        predictor.release, predictor.card         # what answered

A predictor follows the device: when another release comes into service it is loaded beside the old one, and
the next call uses it. No call fails because of that, and none waits. Everything works offline.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from lepton_client.config import default_state_dir
from lepton_fl.compression.card import CARD, MODEL, Card
from lepton_fl.delivery.slots import Slots, served
from lepton_fl.errors import DataError, Fault, LeptonError, NotFound, ReleaseRefused

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5  # between two looks for another release
BATCH: Final = 32  # rows computed at once: what a model needs for 256 costs 30 MB more, and no less time

Array = NDArray[np.generic]


class Model:
    """One release, loaded; any number of threads may predict."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Load it.

        Args:
            folder: A slot, verified by the caller.
            threads: That one prediction computes with.

        Raises:
            ReleaseRefused: ONNX Runtime is not installed, or does not take it.
        """
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise ReleaseRefused(
                Fault.RUNTIME,
                f"This device cannot run releases: {error}.",
                hint="pip install 'lepton-fl[serve]'",
            ) from error
        self.release = folder.name
        self.card = Card.from_bytes((folder / CARD).read_bytes())
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what goes wrong is raised
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(
                os.fspath(folder / MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ReleaseRefused(
                Fault.SELF_TEST, f"ONNX Runtime does not take the model: {error}."
            ) from error

    def check(self, rows: Array) -> None:
        """Raise DataError unless ``rows`` may be given to the model."""
        spec = self.card.input
        if rows.dtype != spec.dtype or not spec.fits(rows) or len(rows) == 0:
            shape = ", ".join("n" if size is None else str(size) for size in spec.shape)
            raise DataError(
                f"Expected {spec.dtype} rows of shape ({shape}) with n > 0, got {rows.dtype} {rows.shape}.",
                hint="One row more or less? The first axis counts rows.",
            )
        if rows.dtype.kind == "f" and not np.isfinite(rows).all():
            raise DataError("Expected finite numbers, got NaN or infinity.")

    def predict(self, rows: Array) -> Array:
        """What the model makes of rows.

        Args:
            rows: (n, …), of the type and shape that ``card.input`` says.

        Returns:
            (n, …), as ``card.output`` says.

        Raises:
            DataError: The rows do not fit, or the model refuses them.
        """
        self.check(rows)
        name, wanted = self.card.input.name, [self.card.output.name]
        parts = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        try:
            answers = [self._session.run(wanted, {name: part})[0] for part in parts]
        except Exception as error:
            raise DataError(f"The model refuses the rows: {str(error)[:300]}.") from error
        found: Array = np.concatenate(answers)
        return found


class Predictor:
    """The release that a device serves, whichever it is; safe for any number of threads."""

    def __init__(
        self,
        state_dir: Path | str | None = None,
        *,
        threads: int = 1,
        follow: bool = True,
        loading: Callable[[str], None] = lambda name: None,
        refused: Callable[[str, ReleaseRefused], None] = lambda name, error: None,
        first: str = "",
    ) -> None:
        """Load the release in service.

        Args:
            state_dir: Of the device; None = the default one.
            threads: That one prediction computes with.
            follow: Look for another release in the background; else only :meth:`refresh` does.
            loading: Called with the name of a release before it is loaded.
            refused: Called with another release that came into service and cannot be loaded, and why.
            first: The release to begin with; empty = the one in service.

        Raises:
            NotFound: No release is in service yet.
            ReleaseRefused: Its files were altered, or it does not load.
        """
        self._slots = Slots(Path(state_dir or default_state_dir()) / "delivery")
        self._threads, self._loading, self._on_refused = threads, loading, refused
        self._stop = threading.Event()
        self._lock = threading.Lock()
        current = served(self._slots.folder)
        self._refused = current if first not in ("", current) else ""  # a release not to be loaded here
        self._model = self._load(first or self._wanted())
        self._follower: threading.Thread | None = None
        if follow:
            self._follower = threading.Thread(target=self._follow, name="lepton-predictor", daemon=True)
            self._follower.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop following; predictions go on with what is loaded."""
        self._stop.set()
        if self._follower is not None:
            self._follower.join()

    @property
    def model(self) -> Model:
        """The release that answers now; hold it to have several calls answered by one."""
        return self._model

    @property
    def release(self) -> str:
        """Its name: SHA-256 (hex) of its manifest."""
        return self._model.release

    @property
    def card(self) -> Card:
        """What is known of it."""
        return self._model.card

    def predict(self, rows: Array) -> Array:
        """What the release in service makes of rows, (n, …); raises DataError (see :meth:`Model.predict`)."""
        return self._model.predict(rows)

    def predict_one(self, row: Array) -> Array:
        """The same for one row, without the first axis."""
        one: Array = self._model.predict(row[np.newaxis])[0]
        return one

    def refresh(self) -> bool:
        """Look whether another release is in service, and load it; returns whether one was.

        Raises:
            LeptonError: It cannot be loaded; the old one goes on.
        """
        with self._lock:
            name = served(self._slots.folder)
            if name == self._model.release:
                self._refused = ""  # what was refused is out of service; if it comes back, it is tried again
            if name in ("", self._model.release, self._refused):
                return False
            try:
                self._model = self._load(name)
            except LeptonError as error:
                self._refused = name
                if isinstance(error, ReleaseRefused):
                    self._on_refused(name, error)
                raise
            self._refused = ""
            return True

    def _wanted(self) -> str:
        name = served(self._slots.folder)
        if not name:
            raise NotFound(
                "No release is in service on this device yet.",
                hint="Set delivery.task, let `lepton client run` work, and have a release assigned.",
            )
        return name

    def _load(self, name: str) -> Model:
        """Nothing is opened before its hash was compared with the manifest's."""
        try:
            self._slots.verified(name)
        except FileNotFoundError as error:
            raise NotFound(
                f"The slot of release {name[:12]} is gone.", hint="It is fetched again."
            ) from error
        self._loading(name)
        return Model(self._slots.path(name), self._threads)

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                if self.refresh():
                    log.info("release %s answers from now on", self.release[:12])
            except LeptonError as error:
                log.error("another release is in service and cannot be loaded, going on: %s", error)
            except Exception:  # a follower that died would serve an old release for ever
                log.exception("looking for another release failed")


def describe(model: Model) -> dict[str, Any]:
    """What answers, as JSON types."""
    card = model.card
    return {
        "release": model.release,
        "variant": card.name,
        "task": card.task,
        "task_version": card.task_version,
        "input": json.loads(card.input.model_dump_json()),
        "output": json.loads(card.output.model_dump_json()),
        "lineage": card.lineage.to_json(),
    }
