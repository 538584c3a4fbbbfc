"""Partitions use every row once, by seed, and say when they cannot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.errors import ConfigError
from lepton_fl.tasks.partition import PartitionSpec, partition

LABELS = np.random.default_rng(0).integers(0, 10, 1000)
USERS = np.random.default_rng(1).integers(0, 7, 1000) * 3
SPECS = [
    PartitionSpec(kind="natural"),
    PartitionSpec(kind="iid", clients=7),
    PartitionSpec(kind="dirichlet", clients=20, alpha=0.3),
    PartitionSpec(kind="shards", clients=13, shards_per_client=2),
    PartitionSpec(kind="owned", clients=11, owned_class=4, owners=0.3),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_every_row_exactly_once(spec, seed):
    parts = partition(spec, labels=LABELS, users=USERS, seed=seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(len(rows) >= spec.min_rows for rows in parts)
    again = partition(spec, labels=LABELS, users=USERS, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_another_seed_gives_another_split():
    for spec in SPECS[1:]:
        one, two = (partition(spec, labels=LABELS, users=None, seed=s) for s in (1, 2))
        assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_natural_keeps_users_together_in_order():
    parts = partition(SPECS[0], labels=LABELS, users=USERS, seed=0)
    assert [set(USERS[rows]) for rows in parts] == [{u} for u in range(0, 21, 3)]


def test_small_alpha_is_skewed_and_large_is_not():
    def share(alpha):  # of a device's largest class
        spec = PartitionSpec(kind="dirichlet", clients=10, alpha=alpha)
        parts = partition(spec, labels=LABELS, users=None, seed=0)
        return np.mean([np.bincount(LABELS[rows]).max() / len(rows) for rows in parts])

    assert share(0.1) > 0.4
    assert share(1000.0) < 0.2


def test_shards_hold_few_classes():
    parts = partition(PartitionSpec(kind="shards", clients=50), labels=LABELS, users=None, seed=0)
    assert max(len(set(LABELS[rows])) for rows in parts) <= 4


def test_an_owned_class_lies_with_the_last_devices_and_all_are_as_large():
    parts = partition(SPECS[-1], labels=LABELS, users=None, seed=0)
    has = [bool((LABELS[rows] == 4).any()) for rows in parts]
    assert has == [False] * 8 + [True] * 3
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


@pytest.mark.parametrize(
    ("spec", "labels", "users", "message"),
    [
        (PartitionSpec(kind="owned", owned_class=10), LABELS, None, "0 rows of class 10"),
        (PartitionSpec(kind="owned", clients=1, owners=0.9), LABELS, None, "owned by 1 of 1"),
        (PartitionSpec(kind="natural"), LABELS, None, "no natural users"),
        (PartitionSpec(kind="iid", clients=1001), LABELS, None, "1000 rows do not give 1001 devices"),
        (PartitionSpec(kind="iid", clients=1), LABELS[:0], None, "0 rows"),
        (PartitionSpec(kind="natural", min_rows=500), LABELS, USERS, "min_rows is 500"),
        (
            PartitionSpec(kind="dirichlet", clients=900, alpha=0.01),
            LABELS,
            None,
            "smallest device had 0 rows",
        ),
        (PartitionSpec(kind="dirichlet"), LABELS.astype(float), None, "goes by class labels"),
        (PartitionSpec(kind="shards"), LABELS.reshape(-1, 2), None, "goes by class labels"),
        (PartitionSpec(kind="shards", clients=400, shards_per_client=3), LABELS, None, "1200 shards"),
    ],
)
def test_impossible_requests(spec, labels, users, message):
    with pytest.raises(ConfigError, match=message):
        partition(spec, labels=labels, users=users, seed=0)
