"""Jobs on the cores of one host: processor sharing, as an operating system does it.

At each moment every unfinished job gets the same rate, min(1, cores / jobs) seconds of work per second
(Kleinrock 1967, "Time-shared systems: a theoretical treatment", with a bound of one core per job).

    ready, work = np.array([0.0, 0.0]), np.array([[1.0], [3.0]])
    finished(ready, work, cores=1.0)       # [[2.0], [4.0]]
"""

import heapq

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def finished(ready: Floats, work: Floats, cores: float) -> Floats:
    """When each phase of each job is done.

    Args:
        ready: (n,) seconds at which a job comes.
        work: (n, phases) seconds of one core for its phases, one after the other.
        cores: shared by all jobs; 0 = each has its own.

    Returns:
        (n, phases) seconds.
    """
    total = np.cumsum(work, axis=1)
    if not cores or len(ready) == 0:
        return np.asarray(ready[:, None] + total)
    order = np.argsort(ready, kind="stable")
    served, times, at_arrival = _service(ready[order], total[order, -1], cores)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    # A job's phase is done when the service common to all has grown by its work since the job came.
    done = np.interp(at_arrival[back][:, None] + total, served, times)
    return np.asarray(np.maximum(done, ready[:, None]))


def _service(ready: Floats, work: Floats, cores: float) -> tuple[Floats, Floats, Floats]:
    """The service S(t) that a job present all the time would have got: piecewise linear.

    Returns:
        S and t at its corners, strictly ascending in S, and S at each arrival.
    """
    now = served = 0.0
    ends: list[float] = []  # heap of S at which the jobs in hand are done
    corners, times, at_arrival = [0.0], [0.0], np.empty(len(ready))
    coming = 0
    while coming < len(ready) or ends:
        arrival = float(ready[coming]) if coming < len(ready) else np.inf
        if not ends:
            # Nobody is there. S jumps, to tell the end of one busy time from the start of the next.
            now, served = max(now, arrival), served + 1.0
            corners.append(served)
            times.append(now)
        else:
            rate = min(1.0, cores / len(ends))
            leaves = now + (ends[0] - served) / rate
            moment = min(arrival, leaves)
            served = ends[0] if leaves <= arrival else served + (moment - now) * rate
            now = moment
            if served > corners[-1]:
                corners.append(served)
                times.append(now)
            while ends and ends[0] <= served:
                heapq.heappop(ends)
        while coming < len(ready) and ready[coming] <= now:
            at_arrival[coming] = served
            heapq.heappush(ends, served + float(work[coming]))
            coming += 1
    return np.array(corners), np.array(times), at_arrival
