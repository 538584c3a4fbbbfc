"""The work that everybody does, as files: rows, initial models, cohorts, the order of every client's rows.

    work = Work(folder)
    for number in range(rounds):
        for client, order in work.round(cohort_size, number):
            x, y = work.rows(client, order)      # already in the order of the mini-batches

Nothing here imports Lepton FL: peers load it in their own environments. Times are those of the system's
monotonic clock, which all processes of a machine share.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from _simulation import BEGAN

BATCH, LEARNING_RATE = 10, 0.1
Vector = NDArray[np.float32]


class MLP(nn.Sequential):
    """784-128-10, 101,770 parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


class CNN(nn.Sequential):
    """Two 5x5 convolutions and a hidden layer of 512, 1,663,370 parameters (McMahan et al. 2017)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


class Nothing(nn.Sequential):
    """Four parameters: what is left of the time is the engine's own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 2))


MODELS: Mapping[str, type[nn.Sequential]] = {"mlp": MLP, "cnn": CNN, "nothing": Nothing}
SHAPES: Mapping[str, tuple[int, ...]] = {"mlp": (784,), "cnn": (1, 28, 28), "nothing": (1,)}


class Work:
    """One folder of prepared work."""

    def __init__(self, folder: Path, model: str) -> None:
        """Open the folder; rows are mapped, not read."""
        self.folder = folder
        self.model = model
        rows = np.load(folder / "x.npy", mmap_mode="c").reshape(-1, *SHAPES[model])
        self._x = torch.from_numpy(rows)
        self._y = torch.from_numpy(np.load(folder / "y.npy"))
        self._starts = np.load(folder / "starts.npy")  # (clients + 1,): where each client's rows begin

    @property
    def clients(self) -> int:
        """Clients of the fleet."""
        return len(self._starts) - 1

    def size(self, client: int) -> int:
        """Rows of a client."""
        return int(self._starts[client + 1] - self._starts[client])

    def rows(self, client: int, order: Tensor) -> tuple[Tensor, Tensor]:
        """A client's inputs and labels, in this order."""
        first, stop = self._starts[client], self._starts[client + 1]
        return self._x[first:stop][order], self._y[first:stop][order]

    def round(self, cohort: int, number: int) -> Iterator[tuple[int, Tensor]]:
        """Who trains in a round (first: 0), each with the order of its rows."""
        plan = self._plan(cohort)
        stop = plan.starts[number]
        for client in plan.cohorts[number]:
            start, stop = stop, stop + self.size(client)
            yield int(client), torch.from_numpy(plan.orders[start:stop].astype(np.int64))

    def initial(self) -> nn.Module:
        """The model that everybody starts from."""
        module = MODELS[self.model]()
        with np.load(self.folder / f"{self.model}.npz") as saved:
            module.load_state_dict({name: torch.from_numpy(saved[name]) for name in saved.files})
        return module

    def _plan(self, cohort: int) -> "Plan":
        if not hasattr(self, "_plans"):
            self._plans: dict[int, Plan] = {}
        if cohort not in self._plans:
            with np.load(self.folder / f"plan_{cohort}.npz") as saved:
                self._plans[cohort] = Plan(saved["cohorts"], saved["starts"], saved["orders"])
        return self._plans[cohort]


@dataclass(frozen=True, eq=False)
class Plan:
    """The rounds of one cohort size."""

    cohorts: NDArray[np.int32]  # (rounds, cohort)
    starts: NDArray[np.int64]  # (rounds,): where each round begins in ``orders``
    orders: NDArray[np.int16]  # the rows of all clients of all rounds, one after the other


@dataclass
class Record:
    """What a run leaves behind: when the process began, when each round was over, and the model."""

    commits: list[float] = field(default_factory=list)

    def commit(self) -> None:
        """A round is over."""
        self.commits.append(time.monotonic())

    def save(self, out: Path, models: Vector) -> None:
        """Write everything: the model (P,), or those after every round (rounds, P)."""
        np.save(out / "model.npy", models)
        (out / "record.json").write_text(json.dumps({"began": BEGAN, "commits": self.commits}))


def flat(module: nn.Module) -> Vector:
    """All parameters in the module's order."""
    with torch.no_grad():
        return torch.cat([p.reshape(-1) for p in module.parameters()]).numpy()


def clip_factor(norm: float, bound: float) -> float:
    """What an update of this L2 norm is multiplied by; a bound of 0 clips nothing."""
    return min(1.0, bound / norm) if bound and norm else 1.0


def train(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """One epoch of plain SGD as anybody would write it."""
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE)
    for first in range(0, len(x), BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x[first : first + BATCH]), y[first : first + BATCH])
        loss.backward()
        optimizer.step()
