"""The client app of ``peer_flower``; the Ray actors import it by name, so that they keep rows and model."""

from functools import cache, lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from _simulation.work import Work, clip_factor, train

app = ClientApp()


@cache
def _desk(folder: str, model: str) -> tuple[Work, nn.Module]:
    torch.set_num_threads(1)
    work = Work(Path(folder), model)
    return work, work.initial()


@lru_cache(1)
def _round(folder: str, model: str, cohort: int, number: int) -> list[tuple[int, torch.Tensor]]:
    return list(_desk(folder, model)[0].round(cohort, number))


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Train the client that the message names; equal weights."""
    job = message.content["config"]
    work, module = _desk(job["work"], job["model"])
    state = message.content["arrays"].to_torch_state_dict()
    module.load_state_dict(state)
    client, order = _round(job["work"], job["model"], job["cohort"], job["round"])[job["place"]]
    train(module, *work.rows(client, order))
    if job["clip"]:
        _clip(module, state, job["clip"])
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


def _clip(module: nn.Module, start: dict[str, torch.Tensor], bound: float) -> None:
    with torch.no_grad():
        deltas = {name: p - start[name] for name, p in module.named_parameters()}
        norm = float(torch.linalg.vector_norm(torch.cat([d.reshape(-1) for d in deltas.values()])))
        for name, parameter in module.named_parameters():
            parameter.copy_(start[name] + deltas[name] * clip_factor(norm, bound))
