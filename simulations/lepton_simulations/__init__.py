"""Simulate a fleet on one machine with the code of a real one.

from lepton_simulations import simulate
result = simulate("digits", clients=20, rounds=10)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_simulations.api import Result, run_scenario, simulate

__all__ = ["Result", "run_scenario", "simulate"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    """Load the engine at first use, so that the command line stays quick."""
    if name in __all__:
        from lepton_simulations import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
