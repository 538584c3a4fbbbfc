"""A one-run audit of a whole private training (Steinke, Nasr and Jagielski 2023): what the model gives away.

    python benchmarks/one_run_audit.py                         # a few minutes
    python benchmarks/one_run_audit.py --noise 1 --canaries 400 --rounds 20

One device trains with example-level privacy on canaries: images of random signs with random labels, each in
the data or not by a fair coin. The training is that of the edge client (``Trainer.train``, its coins and its
noise), over several rounds; the audit sees all updates, as a coordinator does. A canary's score is its share
in the update when this is written as a sum of the canaries' gradients (ridge regression, at the model that
each round began with). The highest and the lowest scores are guesses, and the guesses' hits bound epsilon
from below, at 95 % confidence.

The same with planted faults shows what the audit can find: three tenths of the noise, and none at all. With
n guesses, all of them right, the bound is about log(n / 3), so the claim under test must be a small one.

The bound is loose: it finds a gross fault, a wrong divisor or noise that is never added, not noise that is a
tenth too low. That is what the audit of a single step is for, at every build.

Exit code 1 if the bound exceeds the claim, or does not where a fault was planted.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np
import torch

from lepton_fl.plan import ExamplePrivacy, LocalPlan
from lepton_fl.privacy.accounting import PldReport
from lepton_fl.privacy.audit import one_run_lower_bound
from lepton_fl.privacy.example import Spent, charge_of
from lepton_fl.privacy.noise import Keystream
from lepton_fl.tasks import Dataset, load_task
from lepton_fl.tasks.models import MLP
from lepton_fl.training.trainer import Trainer
from lepton_fl.vector import Vector

DELTA = 1e-5
LEAST = 1e-3  # multiplier: as good as no noise
SIDE = 28  # of an image: with as many pixels, the gradients of random images hardly overlap
RIDGE = 0.3  # of the canaries' gradients, which have length one


def canaries_of(count: int, rng: np.random.Generator) -> Dataset:
    """Images that look like nothing else."""
    x = rng.choice([-1.0, 1.0], size=(count, 1, SIDE, SIDE)).astype(np.float32)
    return Dataset(x, rng.integers(0, 10, count))


def directions(trainer: Trainer, model: Vector, rows: Dataset) -> np.ndarray:
    """(n, P) what a step along each row's gradient would change, of length one."""
    module = trainer.task.model()
    from lepton_fl.training.bridge import load_vector

    load_vector(module, trainer.layout, model)
    parameters = list(module.parameters())
    found = np.empty((len(rows), len(model)), np.float32)
    for number in range(len(rows)):
        x, y = torch.from_numpy(rows.x[[number]]), torch.from_numpy(rows.y[[number]])
        grads = torch.autograd.grad(trainer.loss(module(x), y), parameters)
        found[number] = -torch.cat([g.reshape(-1) for g in grads]).numpy()
    found /= np.linalg.norm(found, axis=1)[:, None] + 1e-12
    return found


def audit(options: argparse.Namespace, left: float) -> tuple[float, float, str]:
    """The claim, the bound that the run proves when so much of the noise is ``left``, and the guesses."""
    rng = np.random.default_rng()  # nothing that the training uses
    task = replace(load_task("digits"), model=lambda: MLP(SIDE * SIDE, 10, (32,)))
    canaries = canaries_of(options.canaries, rng)
    present = rng.random(options.canaries) < 0.5
    data = canaries.take(np.flatnonzero(present))
    privacy = ExamplePrivacy(noise_multiplier=options.noise, delta=DELTA)
    local = LocalPlan(learning_rate=options.rate, batch_size=options.batch, epochs=1, example_privacy=privacy)
    trainer = Trainer(task)
    model = trainer.initial(0)
    scores = np.zeros(options.canaries)
    for number in range(options.rounds):
        charge = charge_of(local, len(data))
        look = directions(trainer, model, canaries)
        used = replace(charge, noise_multiplier=max(LEAST, left * charge.noise_multiplier))
        result = trainer.train(model, data, local, seed=number, spent=Spent(used, Keystream()))
        gram = look @ look.T + RIDGE * np.eye(len(look), dtype=np.float32)
        scores += np.linalg.solve(gram, look @ result.delta)
        model = model + result.delta
    claimed = PldReport(step=1e-3).epsilon({charge.event: charge.steps * options.rounds}, DELTA)
    order, clear = np.argsort(scores), max(1, int(options.canaries * options.guesses / 2))
    right = int(present[order[-clear:]].sum() + (~present[order[:clear]]).sum())
    found = one_run_lower_bound(right, 2 * clear, DELTA, options.canaries)
    return claimed, found, f"{right} of {2 * clear}"


def main() -> int:
    """Whether the audit said something else than the truth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--guesses", type=float, default=0.1, help="share of the canaries that is guessed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=10**6, help="rows of a step; more = all")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--noise", type=float, default=7.5, help="multiplier")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    print("| noise that is added | guesses right | epsilon from below | claimed | |")
    print("|--|--:|--:|--:|--|", flush=True)
    for name, left in (("all", 1.0), ("0.3 of it", 0.3), ("none", 0.0)):
        claimed, found, guesses = audit(options, left)
        verdict = "refuted" if found > claimed else "not refuted"
        wrong += (found > claimed) == (left == 1.0)
        print(f"| {name} | {guesses} | {found:.2f} | {claimed:.2f} | {verdict} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
