"""Splitting one data set over simulated devices. Every row goes to exactly one device.

spec = PartitionSpec(kind="dirichlet", clients=100, alpha=0.3)
parts = partition(spec, labels=y, users=None, seed=0)   # a list of row numbers per device
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lepton_fl.errors import ConfigError
from lepton_fl.plan import Frozen
from lepton_fl.tasks.data import Array, Rows

_DRAWS = 100  # Dirichlet draws tried before min_rows is called impossible


class PartitionSpec(Frozen):
    """How rows are split over devices."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "owned"] = "iid"  # natural: by user
    clients: Annotated[int, Field(ge=1, le=1_000_000)] = 10  # natural: the data decide
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5  # dirichlet: smaller is more skewed
    shards_per_client: Annotated[int, Field(ge=1)] = 2  # shards
    owned_class: Annotated[int, Field(ge=0)] = 0  # owned: only the last devices have rows of it
    owners: Annotated[float, Field(gt=0, lt=1)] = 0.3  # owned: they are this share of all
    min_rows: Annotated[int, Field(ge=0)] = 1  # of every device


def partition(spec: PartitionSpec, *, labels: Array, users: Array | None, seed: int) -> list[Rows]:
    """Row numbers per device, each ascending.

    Args:
        spec: how.
        labels: (N, ...) targets; dirichlet and shards go by them.
        users: (N,) user ids, for natural; devices are in ascending order of the id.
        seed: the same seed gives the same split.

    Raises:
        ConfigError: the split is impossible for these data.
    """
    rng = np.random.default_rng(seed)
    n = len(labels)
    if spec.kind == "natural":
        parts = _natural(users)
    elif n < spec.clients * max(1, spec.min_rows):
        raise ConfigError(
            f"{n} rows do not give {spec.clients} devices at least {max(1, spec.min_rows)} each.",
            hint=f"Ask for at most {n // max(1, spec.min_rows)} devices.",
        )
    elif spec.kind == "iid":
        parts = np.array_split(rng.permutation(n), spec.clients)
    elif spec.kind == "dirichlet":
        parts = _dirichlet(_classes(labels, spec.kind), spec, rng)
    elif spec.kind == "owned":
        parts = _owned(_classes(labels, spec.kind), spec, rng)
    else:
        parts = _shards(_classes(labels, spec.kind), spec, rng)
    parts = [np.sort(rows).astype(np.int64) for rows in parts]
    smallest = min(map(len, parts))
    if smallest < spec.min_rows:
        raise ConfigError(
            f"A device would have {smallest} rows, min_rows is {spec.min_rows}.",
            hint="Lower min_rows, or choose another split.",
        )
    return parts


def _natural(users: Array | None) -> list[Rows]:
    if users is None:
        raise ConfigError(
            "This data set has no natural users.", hint="Choose iid, dirichlet or shards as the partition."
        )
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order])) + 1
    return np.split(order, starts)


def _classes(labels: Array, kind: str) -> Array:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"The {kind} partition goes by class labels, the targets are {labels.dtype}{labels.shape}.",
            hint="Choose natural or iid.",
        )
    return labels


def _dirichlet(labels: Array, spec: PartitionSpec, rng: np.random.Generator) -> list[Rows]:
    """Each class is spread over devices by one draw from Dirichlet(alpha) (Hsu et al. 2019).

    Drawn again until every device has ``min_rows``.
    """
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    best = 0
    for _ in range(_DRAWS):
        shares = [rng.dirichlet(np.full(spec.clients, spec.alpha)) for _ in rows]
        ends = [np.rint(np.cumsum(s) * len(r)).astype(np.int64) for s, r in zip(shares, rows, strict=True)]
        sizes = np.sum([np.diff(e, prepend=0) for e in ends], axis=0)
        best = max(best, int(sizes.min()))
        if best >= spec.min_rows:
            dealt = [np.split(rng.permutation(r), e[:-1]) for r, e in zip(rows, ends, strict=True)]
            return [np.concatenate(pieces) for pieces in zip(*dealt, strict=True)]
    raise ConfigError(
        f"In {_DRAWS} draws of Dirichlet(alpha={spec.alpha:g}) over {spec.clients} devices, the smallest "
        f"device had {best} rows at best, min_rows is {spec.min_rows}.",
        hint="Raise alpha, lower min_rows, or ask for fewer devices.",
    )


def _shards(labels: Array, spec: PartitionSpec, rng: np.random.Generator) -> list[Rows]:
    """Rows sorted by class are cut into equal shards, dealt at random (McMahan et al. 2017)."""
    count = spec.clients * spec.shards_per_client
    if count > len(labels):
        raise ConfigError(
            f"{len(labels)} rows cannot be cut into {count} shards.",
            hint=f"clients * shards_per_client may be at most {len(labels)}.",
        )
    by_class = rng.permutation(len(labels))
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    shards = np.array_split(by_class, count)
    deal = rng.permutation(count).reshape(spec.clients, spec.shards_per_client)
    return [np.concatenate([shards[i] for i in hand]) for hand in deal]


def _owned(labels: Array, spec: PartitionSpec, rng: np.random.Generator) -> list[Rows]:
    """One class lies with the last devices only; what else there is makes all devices equally large."""
    owned = rng.permutation(np.flatnonzero(labels == spec.owned_class))
    others = rng.permutation(np.flatnonzero(labels != spec.owned_class))
    owners = max(1, round(spec.owners * spec.clients))
    if not len(owned) or owners >= spec.clients:
        raise ConfigError(
            f"{len(owned)} rows of class {spec.owned_class} cannot be owned by {owners} of {spec.clients} "
            "devices.",
            hint="Name a class that the data have, and fewer owners than devices.",
        )
    hands = [np.empty(0, np.int64)] * (spec.clients - owners) + np.array_split(owned, owners)
    sizes = [part.size for part in np.array_split(np.arange(len(labels)), spec.clients)]
    wanted = np.array([max(0, size - len(hand)) for size, hand in zip(sizes, hands, strict=True)])
    cuts = np.rint(np.cumsum(wanted) * (len(others) / wanted.sum())).astype(np.int64)[:-1]
    return [np.concatenate(pair) for pair in zip(hands, np.split(others, cuts), strict=True)]
