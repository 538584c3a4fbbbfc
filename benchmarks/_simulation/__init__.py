"""The work of the simulation benchmark, and everybody who does it: ours and the peers.

``work`` and the ``peer_*`` modules run in the peers' own environments and import nothing of Lepton FL;
``task``, ``prepare`` and ``ours`` run in ours. All of them are started as ``python -m _simulation.NAME``, so
this file is the first that a process reads.
"""

import time

BEGAN = time.monotonic()  # the interpreter is up, nothing else has been imported
