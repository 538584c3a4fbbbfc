"""What is trained: model, data contract, loss and metrics. Importing this package imports no torch."""

from lepton_fl.tasks.contract import ContractReport, DataContract, check
from lepton_fl.tasks.data import Corpus, Dataset
from lepton_fl.tasks.metrics import Classification, Metrics, NextToken, Regression, Sums, TrainingLoss
from lepton_fl.tasks.task import Task, installed_tasks, load_task, resolve

__all__ = [
    "Classification",
    "ContractReport",
    "Corpus",
    "DataContract",
    "Dataset",
    "Metrics",
    "NextToken",
    "Regression",
    "Sums",
    "Task",
    "TrainingLoss",
    "check",
    "installed_tasks",
    "load_task",
    "resolve",
]
