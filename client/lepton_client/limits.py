"""Caps on what this process may take from the machine.

* Niceness: of the whole process; every thread started later inherits it.
* Threads: of numerical libraries, by the variables that they read when they are imported.
* Memory: ``RLIMIT_DATA``, which on Linux (4.7 and later) counts all private writable memory. An allocation
  beyond it fails; Python and torch turn that into an error, and the round hears "ran out of memory". A
  library that cannot stand a failed allocation ends the process, which the service manager restarts. The
  hard wall is the service's ``MemoryMax``.
"""

import os
import resource

from lepton_client.config import LimitsSection

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def apply_limits(limits: LimitsSection) -> None:
    """Set the caps on this process; call before threads are started and libraries are imported."""
    current = os.getpriority(os.PRIO_PROCESS, 0)
    if limits.nice > current:  # only root may become less nice again
        os.setpriority(os.PRIO_PROCESS, 0, limits.nice)
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(limits.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not burn shared cores
    if limits.memory_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        cap = limits.memory_bytes if hard == resource.RLIM_INFINITY else min(limits.memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, hard))


def memory_kills() -> int:
    """How many processes this machine has ended for want of memory since it started; 0 = it does not say."""
    try:
        with open("/proc/vmstat", encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError, IndexError):
        return 0
