"""Lepton FL, the library: pure, without Flower, gRPC services, SQL or web.

Layers, high to low: ``cli``; ``rounds``; ``training``; ``tasks``; ``wire``;
``crypto``, ``plan``, ``vector``; ``config``; ``files``; ``errors``. Imports point down only.
"""

__version__ = "0.1.0"
