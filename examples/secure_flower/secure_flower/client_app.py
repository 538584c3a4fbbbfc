"""A node: an ordinary client app of NumPy, and one mod."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits

from lepton_strategies import secure_mod

app = ClientApp(mods=[secure_mod()])


def rows(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """This node's part of the digits."""
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    x, y = load_digits(return_X_y=True)
    return x[part::parts] / 16, y[part::parts]


def loss_of(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities (N, 10) and the mean cross-entropy."""
    scores = x @ w + b
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return odds, float(-np.log(odds[np.arange(len(y)), y] + 1e-12).mean())


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ten steps of gradient descent."""
    (x, y), arrays = rows(context), message.content["arrays"]
    w, b = arrays["w"].numpy().copy(), arrays["b"].numpy().copy()
    for _ in range(10):
        odds, _ = loss_of(w, b, x, y)
        odds[np.arange(len(y)), y] -= 1
        w -= 0.5 * x.T @ odds / len(y)
        b -= 0.5 * odds.mean(axis=0)
    metrics = MetricRecord({"num-examples": len(y), "train_loss": loss_of(w, b, x, y)[1]})
    content = RecordDict({"arrays": ArrayRecord({"w": Array(w), "b": Array(b)}), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on the node's own rows; evaluations are not hidden."""
    (x, y), arrays = rows(context), message.content["arrays"]
    odds, _ = loss_of(arrays["w"].numpy(), arrays["b"].numpy(), x, y)
    metrics = MetricRecord({"num-examples": len(y), "accuracy": float((odds.argmax(axis=1) == y).mean())})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
