"""Apple's pfl with its PyTorch model, in one process or, under torchrun, in several.

    python -m _simulation.peer_pfl WORK MODEL COHORT ROUNDS CLIP OUT
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m _simulation.peer_pfl ...

As its guide to fast simulations says: tensors in memory (``Dataset``), no evaluation, one thread per process,
and clients spread over the processes by their number of rows where these differ.
"""

import os
import sys
from pathlib import Path

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.privacy_mechanism import NormClippingOnly
from torch import Tensor, nn

from _simulation.work import BATCH, LEARNING_RATE, Record, Work, flat


class Model(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of one mini-batch."""
        return nn.functional.cross_entropy(self.module(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, object]:
        """Nothing is evaluated."""
        return {}


class Turns:
    """pfl's user sampler: the planned clients one after the other, round by round."""

    def __init__(self, turns: list[tuple[int, int]]) -> None:
        self.turns = turns
        self.next = 0

    def __call__(self) -> int:
        """The number of the next turn; pfl prepares many more than it will use."""
        number = self.next % len(self.turns)
        self.next += 1
        return number


class Timer(TrainingProcessCallback):
    """Notes when each round is over."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        """Go on."""
        self.record.commit()
        return False, Metrics()


def main(folder: str, model: str, cohort: str, rounds: str, clip: str, out: str) -> None:
    """Train; the first process writes the record."""
    record = Record()
    torch.set_num_threads(1)
    work, size, count = Work(Path(folder), model), int(cohort), int(rounds)
    module = Model(work.initial())
    plan = [turn for number in range(count) for turn in work.round(size, number)]
    sizes = {place: work.size(client) for place, (client, _) in enumerate(plan)}

    def dataset(place: int) -> Dataset:
        client, order = plan[place]
        return Dataset(raw_data=work.rows(client, order), user_id=str(client))

    balanced = sizes if len(set(sizes.values())) > 1 else None
    federation = FederatedDataset(dataset, Turns(plan), user_id_to_weight=balanced)
    steps = [WeightByUser()]
    if float(clip):
        steps.insert(0, NormClippingOnly(order=2, clipping_bound=float(clip)))
    backend = SimulatedBackend(training_data=federation, val_data=federation, postprocessors=steps)
    trained = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=count,
            evaluation_frequency=10**9,
            train_cohort_size=size,
            val_cohort_size=0,
        ),
        backend=backend,
        model=trained,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
        ),
        model_eval_params=None,
        callbacks=[Timer(record)],
        send_metrics_to_platform=False,
    )
    if os.environ.get("RANK", "0") == "0":
        record.save(Path(out), flat(module.module))


if __name__ == "__main__":
    main(*sys.argv[1:])
