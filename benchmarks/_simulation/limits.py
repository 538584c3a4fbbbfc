"""What this machine can do at all: large matrix products in single precision.

python -m _simulation.limits THREADS     # prints GFLOP/s
"""

import sys
import time

import torch

SIDE, REPEATS = 2048, 12
# Multiply-adds counted as two, forward and backward, for one row; the first layer needs no input gradient.
# 14 % of the CNN's are with the zeros around an image, which a good convolution leaves out.
FLOP_PER_ROW = {"mlp": 409_088, "cnn": 72_384_512}


def sgemm(threads: int) -> float:
    """The best of some products of two 2048 x 2048 matrices, in GFLOP/s."""
    torch.set_num_threads(threads)
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    out = a @ b
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best / 1e9


if __name__ == "__main__":
    print(sgemm(int(sys.argv[1])))
