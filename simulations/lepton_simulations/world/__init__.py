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
from lepton_simulations.world.world import Fate, World

__all__ = [
    "Availability",
    "DeviceClass",
    "DevicesConfig",
    "Fate",
    "FaultsConfig",
    "Spread",
    "VirtualClock",
    "World",
    "WorldConfig",
]
