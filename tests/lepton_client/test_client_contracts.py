"""A device keeps its own record of a private run's contract, and refuses what breaks it."""

import json

import pytest

from lepton_client.config import LimitsSection
from lepton_client.contracts import KEEP_RUNS, Contracts
from lepton_client.desk import Office
from lepton_fl.errors import Rejection, StateCorrupt, UpdateRejected
from lepton_fl.plan import PrivatePart
from lepton_fl.wire.messages import Ticket
from lepton_fl.wire.records import Records


def request(number, attempt=1, *, run="r1", b=3, k=2, retried=(), kind="train", private=True):
    config = Ticket(kind, run, number, attempt, "ab").to_config() | {"retried": json.dumps(retried)}
    if private:
        part = PrivatePart(min_separation=b, max_participations=k)
        config["private"] = json.dumps(part.to_json())
    return Records({}, config, {})


@pytest.fixture
def told():
    return []


@pytest.fixture
def contracts(tmp_path, told):
    return Contracts(tmp_path / "contracts.json", lambda *said: told.append(said))


def says(contracts, records):
    answer = contracts.refusal(records)
    return "" if answer is None else answer.config["detail"]


def test_a_round_too_soon_and_one_too_many_are_refused_and_told(contracts, told, tmp_path):
    assert says(contracts, request(1)) == ""
    assert "rests 3 rounds" in says(contracts, request(3))
    assert says(contracts, request(4)) == ""
    again = Contracts(tmp_path / "contracts.json")  # a restart forgets nothing
    assert "took part 2 times" in says(again, request(100))
    assert [(run, number) for run, number, _ in told] == [("r1", 3)]
    answer = again.refusal(request(100))
    assert answer.config["failed"] == Rejection.FAILED.value
    assert (tmp_path / "contracts.json").stat().st_mode & 0o777 == 0o600


def test_a_coordinator_that_was_set_back_is_refused(contracts):
    """As after an old copy of its database: the rounds that it asks for have been."""
    assert says(contracts, request(7, k=0)) == ""
    assert "rests" in says(contracts, request(5, k=0))
    assert says(contracts, request(4, k=0)) == ""


def test_an_attempt_that_did_not_count_is_not_counted(contracts):
    assert says(contracts, request(5)) == ""
    assert says(contracts, request(5, attempt=2)) == ""  # the same round, tried again
    contracts.settle("r1", 5, 2, taken=False)
    assert says(contracts, request(6)) == ""
    # Of round 6 another attempt has counted than the one this device was in.
    assert says(contracts, request(7, retried=[[6, 2]])) == ""
    assert "rests" in says(contracts, request(8, retried=[[6, 2]]))


def test_what_is_not_known_to_be_left_out_has_counted(contracts):
    assert says(contracts, request(5)) == ""
    contracts.settle("r1", 5, 1, taken=True)
    contracts.settle("r1", 4, 1, taken=False)
    contracts.settle("other", 5, 1, taken=False)
    assert "rests" in says(contracts, request(7))
    assert "rests" in says(contracts, request(7, retried=[[5, 1]]))


@pytest.mark.parametrize("laxer", [{"b": 2}, {"k": 3}, {"k": 0}, {"private": False}])
def test_a_laxer_contract_than_the_first_is_refused(contracts, laxer):
    assert says(contracts, request(1)) == ""
    assert "another contract" in says(contracts, request(9, **laxer))
    assert says(contracts, request(9, b=4, k=1)) == ""  # a stricter one is kept, too


def test_other_runs_evaluations_and_runs_without_a_contract_are_not_touched(contracts, tmp_path):
    assert says(contracts, request(1)) == ""
    assert says(contracts, request(2, run="r2")) == ""
    assert says(contracts, request(2, kind="evaluate")) == ""
    for number in (1, 2, 3):
        assert says(contracts, request(number, run="open", private=False)) == ""
        assert says(contracts, request(number, run="free", b=1, k=0)) == ""
    assert set(json.loads((tmp_path / "contracts.json").read_text())["runs"]) == {"r1", "r2"}


def test_the_list_of_runs_is_bounded(contracts):
    for number in range(KEEP_RUNS + 5):
        assert says(contracts, request(1, run=f"r{number}")) == ""
    assert len(contracts._runs) == KEEP_RUNS


def test_a_damaged_file_and_a_damaged_request_are_named(contracts, tmp_path):
    (tmp_path / "bad.json").write_text('{"format": 1, "runs": {"r": [1]}}')
    with pytest.raises(StateCorrupt, match="contracts"):
        Contracts(tmp_path / "bad.json")
    broken = request(1)
    broken.config["private"] = '{"min_separation": 0}'
    with pytest.raises(UpdateRejected, match="does not decode"):
        contracts.refusal(broken)


def test_the_office_asks_before_any_data_are_touched(contracts):
    office = Office((), LimitsSection(), lambda: None)
    office.contracts = contracts
    assert says(contracts, request(1)) == ""
    answer = office(request(2), lambda: False)
    assert "rests" in answer.config["detail"]
