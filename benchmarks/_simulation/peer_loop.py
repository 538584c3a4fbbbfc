"""The plain loop: one process, one thread, one client after the other; all others must equal its models.

python -m _simulation.peer_loop WORK MODEL COHORT ROUNDS CLIP OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch

from _simulation.work import Record, Work, clip_factor, flat, train


def main(folder: str, model: str, cohort: str, rounds: str, clip: str, out: str) -> None:
    """Train and keep the model after every round."""
    record = Record()
    torch.set_num_threads(1)
    work, size = Work(Path(folder), model), int(cohort)
    module = work.initial()
    weights, models = list(module.parameters()), []
    start = [w.detach().clone() for w in weights]
    for number in range(int(rounds)):
        total = [torch.zeros_like(w) for w in start]
        for client, order in work.round(size, number):
            with torch.no_grad():
                for weight, value in zip(weights, start, strict=True):
                    weight.copy_(value)
            train(module, *work.rows(client, order))
            with torch.no_grad():
                delta = [w - value for w, value in zip(weights, start, strict=True)]
                norm = float(
                    torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in delta]))
                )
                for sums, part in zip(total, delta, strict=True):
                    sums.add_(part, alpha=clip_factor(norm, float(clip)))
        with torch.no_grad():
            for weight, value, sums in zip(weights, start, total, strict=True):
                value.add_(sums, alpha=1 / size)
                weight.copy_(value)
        record.commit()
        models.append(flat(module).copy())
    record.save(Path(out), np.stack(models))


if __name__ == "__main__":
    main(*sys.argv[1:])
