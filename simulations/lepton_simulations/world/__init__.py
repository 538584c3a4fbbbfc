"""Virtual time: devices, links, availability, faults, attacks and replays; see ``world.world``."""

from lepton_simulations.world.clock import VirtualClock
from lepton_simulations.world.config import (
    Availability,
    DeviceClass,
    DevicesConfig,
    FaultsConfig,
    Spread,
    WorldConfig,
)
from lepton_simulations.world.replay import Attempt, Part, RecordedWorld, Replay
from lepton_simulations.world.world import Fate, World

__all__ = [
    "Attempt",
    "Availability",
    "DeviceClass",
    "DevicesConfig",
    "Fate",
    "FaultsConfig",
    "Part",
    "RecordedWorld",
    "Replay",
    "Spread",
    "VirtualClock",
    "World",
    "WorldConfig",
]
