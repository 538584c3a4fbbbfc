"""A device whose owner demands secure aggregation is never seen by itself."""

import numpy as np
import pytest

from lepton_client.config import ClientConfig, LimitsSection
from lepton_client.desk import Office
from lepton_fl.plan import RunSpec
from lepton_fl.rounds.campaign import RunState, Work, plan_round
from lepton_fl.tasks.metrics import TrainingLoss
from lepton_fl.wire.messages import Request


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plain_round_is_refused_before_any_data_are_touched(kind):
    work, model = Work("pkg:task", "1", "ab" * 32, 4, TrainingLoss()), np.zeros(4, np.float32)
    plan = plan_round(RunSpec(task="pkg:task"), "r", work, kind, 1, RunState(model), ("d",), 1, "5a" * 16)
    request = Request.of(plan, model).to_records()
    reply = Office((), LimitsSection(), lambda: None, secure=True)(request, lambda: False)
    assert reply.config["failed"] == "failed"
    assert "secure aggregation only" in reply.config["detail"]
    assert not reply.arrays
    plain = Office((), LimitsSection(), lambda: None)(request, lambda: False)
    assert "does not allow the task" in plain.config["detail"]


def test_the_default_is_off():
    assert ClientConfig.model_fields["client"].annotation().secure_aggregation == "off"
