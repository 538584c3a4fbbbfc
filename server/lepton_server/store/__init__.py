"""The coordinator's state: an append-only, hash-chained journal and the tables that follow from it.

The only package that speaks SQL. ``events`` says what can happen, ``projection`` what it does and when it is
allowed, ``tables`` and ``migrations`` how it lies on disk, ``journal`` how it is checked, ``ledger`` what
privacy has cost, ``attempts`` what open rounds have heard, ``snapshot`` how all is copied, ``store`` how it
is used.
"""

from lepton_server.store.engine import file_of
from lepton_server.store.events import KINDS, Participation, TaskRegistered
from lepton_server.store.snapshot import Snapshot
from lepton_server.store.store import Store, Transaction, open_store
from lepton_server.store.views import (
    ActiveDevice,
    Attempt,
    ChargeRecord,
    Device,
    Event,
    Head,
    Kept,
    Lease,
    Model,
    Part,
    RebuildReport,
    Received,
    Rollout,
    Round,
    Run,
    SignedBudget,
    Task,
    Token,
    Told,
)

__all__ = [
    "KINDS",
    "ActiveDevice",
    "Attempt",
    "ChargeRecord",
    "Device",
    "Event",
    "Head",
    "Kept",
    "Lease",
    "Model",
    "Part",
    "Participation",
    "RebuildReport",
    "Received",
    "Rollout",
    "Round",
    "Run",
    "SignedBudget",
    "Snapshot",
    "Store",
    "Task",
    "TaskRegistered",
    "Token",
    "Told",
    "Transaction",
    "file_of",
    "open_store",
]
