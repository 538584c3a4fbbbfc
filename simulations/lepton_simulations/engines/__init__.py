"""Engines: train many virtual devices in one call, each exactly as the edge client's trainer would.

    engine, why = choose(trainer, local, samples)
    trained = engine.train(start, clients, local)

``lean`` takes one device after the other through the trainer: any module, any plan. ``fused`` knows chains of
common layers and plain SGD and does without autograd. ``native`` does the same in C, for linear layers.
``vectorised`` runs the whole step of K devices under ``torch.func.vmap``, ``compiled`` the same through
``torch.compile``; they are for a GPU. ``choose`` takes the fastest that is able to, after it has agreed with
autograd on the caller's own samples.
"""

from lepton_simulations.engines.choose import choose
from lepton_simulations.engines.contract import ClientWork, Engine, Trained

__all__ = ["ClientWork", "Engine", "Trained", "choose"]
