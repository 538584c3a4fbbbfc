"""Secure aggregation under Flower's own loop: Flower's strategies, ours, and a client app of anybody."""

import json
import re
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from numpy.testing import assert_allclose, assert_array_equal

import lepton_strategies
from lepton_fl.errors import ConfigError, QuorumError, StateError, TrustError
from lepton_fl.rounds.cohort import Candidate
from lepton_simulations.flower import flower_process
from lepton_strategies import (
    AppNodes,
    LocalGrid,
    SecureAggregation,
    client_app,
    initial_arrays,
    run_campaign,
    secure_mod,
)
from lepton_strategies.grid import LogBook
from lepton_strategies.keeper import Beside, Here, NodeKeys
from lepton_strategies.masking import configured_keys
from lepton_strategies.model import from_arrays
from lepton_strategies.secure_keys import fingerprint, load_key, load_list, main, make_key
from lepton_strategies.secure_wire import RECORD, content_digest

NODES = 16


class Roster:
    def __init__(self, size: int = NODES) -> None:
        self.size = size

    def candidates(self):
        return [Candidate(f"d{i}", "eligible") for i in range(self.size)]

    def wait(self, seconds: float) -> None:
        pass


@pytest.fixture
def keys(tmp_path) -> Path:
    public = [make_key(tmp_path / f"node{i}.key") for i in range(NODES)]
    (tmp_path / "keys.txt").write_text("# the fleet\n" + "\n".join(k.hex() for k in public) + "\n")
    return tmp_path


def keys_for(folder: Path, **more):
    def find(context) -> NodeKeys:
        place = context.node_config["partition-id"]
        return NodeKeys(folder / f"node{place}.key", folder / "keys.txt", **more)

    return find


class Seen(list):
    """What the nodes' own functions were given."""


def app_of(folder: Path, seen: Seen | None = None, broken: tuple[int, ...] = (), mods=None) -> ClientApp:
    """Nodes that move the model by something of their own."""
    app = ClientApp(mods=[secure_mod(keys_for(folder), keep="here")] if mods is None else mods)

    @app.train()
    def train(message, context):
        place = int(context.node_config["partition-id"])
        if seen is not None:
            seen.append(sorted(message.content))
        if place in broken:
            raise ValueError("no luck")
        model = message.content["arrays"]
        moved = {
            name: array.numpy() + np.asarray(0.01 * (place + 1), array.numpy().dtype)
            for name, array in model.items()
        }
        content = RecordDict(
            {
                "arrays": ArrayRecord({n: _array(a) for n, a in moved.items()}),
                "metrics": MetricRecord({"num-examples": place + 1, "train_loss": 0.5 * place}),
            }
        )
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        metrics = MetricRecord({"num-examples": 1, "accuracy": 1.0})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _array(value):
    from flwr.app import Array

    return Array(np.asarray(value))


@pytest.fixture
def short():
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield Path(folder)


@pytest.fixture
def process():
    with flower_process():
        yield


def grid_of(app: ClientApp, size: int = NODES) -> LocalGrid:
    return LocalGrid(None, Roster(size), AppNodes(app, size))


def model() -> ArrayRecord:
    return ArrayRecord({"w": _array(np.zeros((2, 3), np.float32)), "b": _array(np.ones(2, np.float32))})


def wrapped(folder: Path, inner=None, **more) -> SecureAggregation:
    inner = inner or flower.FedAvg(min_train_nodes=NODES)
    return SecureAggregation(inner, keys=load_list(folder / "keys.txt"), clip_norm=4.0, poll_s=0.0, **more)


def plain_app(folder) -> ClientApp:
    return app_of(folder, mods=[])


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_flowers_strategies_get_the_mean_they_would_have_computed(name, keys, process):
    inner = getattr(flower, name)(min_train_nodes=NODES)
    secure = wrapped(keys, inner, max_weight=16, metrics=("train_loss",))
    ours = secure.start(grid_of(app_of(keys)), model(), num_rounds=2)
    theirs = getattr(flower, name)(min_train_nodes=NODES).start(
        grid_of(plain_app(keys)), model(), num_rounds=2
    )
    for part in ("w", "b"):
        assert_allclose(ours.arrays[part].numpy(), theirs.arrays[part].numpy(), atol=2e-4)
    assert_allclose(
        ours.train_metrics_clientapp[2]["train_loss"],
        theirs.train_metrics_clientapp[2]["train_loss"],
        atol=1e-5,
    )
    assert ours.train_metrics_clientapp[2]["reports"] == NODES
    assert ours.evaluate_metrics_clientapp[2]["accuracy"] == 1.0


def test_equal_weights_and_sixteen_bits(keys, process):
    result = wrapped(keys, bits=16).start(grid_of(app_of(keys)), model(), num_rounds=1)
    assert_allclose(result.arrays["w"].numpy(), np.full((2, 3), 0.085), atol=5e-3)


@pytest.mark.parametrize("bits", [12, 20])
def test_rings_of_other_widths_are_packed(keys, process, bits):
    result = wrapped(keys, bits=bits).start(grid_of(app_of(keys)), model(), num_rounds=1)
    assert_allclose(result.arrays["w"].numpy(), np.full((2, 3), 0.085), atol=0.2 if bits == 12 else 1e-3)


def test_quantised_updates_of_any_strategy_follow_their_sums(keys, process):
    strategy = wrapped(keys, quantise=8)
    result = strategy.start(grid_of(app_of(keys)), model(), num_rounds=2)
    exact = wrapped(keys).start(grid_of(app_of(keys)), model(), num_rounds=2)
    for part in ("w", "b"):
        assert_allclose(result.arrays[part].numpy(), exact.arrays[part].numpy(), atol=0.02)
    assert strategy._expected > 0
    with pytest.raises(ConfigError, match="two ways to few bits"):
        wrapped(keys, quantise=4, bits=16)


def test_the_nodes_own_function_sees_an_ordinary_message(keys, process):
    seen = Seen()
    wrapped(keys).start(grid_of(app_of(keys, seen)), model(), num_rounds=1)
    assert seen == [["arrays", "config"]] * NODES


def test_from_the_second_round_on_keys_are_there_ahead(keys, process, monkeypatch):
    from lepton_strategies import secure_aggregation as module

    sent, honest = [], module._Nodes._message

    def counted(self, stage, device, frame):
        sent.append((int(self.name_of_round.split("/")[1]), stage.name))
        return honest(self, stage, device, frame)

    monkeypatch.setattr(module._Nodes, "_message", counted)
    result = wrapped(keys).start(grid_of(app_of(keys)), model(), num_rounds=3)
    assert [r["reports"] for r in result.train_metrics_clientapp.values()] == [NODES] * 3
    assert sent.count((1, "ADVERTS")) == NODES
    assert (2, "ADVERTS") not in sent
    assert (3, "ADVERTS") not in sent
    assert sent.count((3, "SHARES")) == NODES


def test_a_node_that_has_lost_its_keys_sits_out_one_round(keys, process):
    from lepton_strategies import masking

    secure, grid = wrapped(keys), grid_of(app_of(keys))
    secure.start(grid, model(), num_rounds=1)
    masking._here.cache_clear()  # as if all of them had been started again
    result = secure.start(grid, model(), num_rounds=2)
    assert [r["reports"] for r in result.train_metrics_clientapp.values()] == [0, NODES]


class Strict(LocalGrid):
    """As particular as Flower's own grid: it goes through the messages twice, and wants some."""

    def push_messages(self, messages):
        assert list(messages), "the messages must not be empty"
        return super().push_messages(messages)


def test_a_grid_may_go_through_the_messages_twice(keys, process):
    grid = Strict(None, Roster(), AppNodes(app_of(keys), NODES))
    result = wrapped(keys).start(grid, model(), num_rounds=2)
    assert [r["reports"] for r in result.train_metrics_clientapp.values()] == [NODES, NODES]


def test_nodes_that_fail_are_left_out(keys, process):
    result = wrapped(keys).start(grid_of(app_of(keys, broken=(0, 1, 2))), model(), num_rounds=1)
    left = np.mean([0.01 * (i + 1) for i in range(3, NODES)])
    assert_allclose(result.arrays["w"].numpy(), np.full((2, 3), left), atol=1e-5)
    assert result.train_metrics_clientapp[1]["reports"] == NODES - 3


def test_too_many_and_the_round_changes_nothing(keys, process):
    app = app_of(keys, broken=tuple(range(6)))
    result = wrapped(keys).start(grid_of(app), model(), num_rounds=1)
    assert dict(result.train_metrics_clientapp[1]) == {"reports": 0, "asked": NODES, "blamed": 0}
    assert not result.arrays


def test_a_node_with_the_mod_trains_for_no_plain_server(keys, process):
    grid = grid_of(app_of(keys))
    content = RecordDict({"arrays": model(), "config": ConfigRecord({})})
    [reply] = grid.send_and_receive([Message(content, 3, "train")])
    assert "only with secure aggregation" in reply.error.reason


def test_a_server_that_swaps_the_model_after_the_offer_gets_nothing(keys, process, monkeypatch):
    from lepton_strategies import secure_aggregation as module

    honest = module._Nodes._message
    swapped = Seen()

    def lying(self, stage, device, frame):
        message = honest(self, stage, device, frame)
        if stage.name == "UPLOADS":
            swapped.append(device)
            other = ArrayRecord({n: _array(a.numpy() + 1) for n, a in model().items()})
            message.content["arrays"] = other
        return message

    monkeypatch.setattr(module._Nodes, "_message", lying)
    result = wrapped(keys).start(grid_of(app_of(keys)), model(), num_rounds=1)
    assert len(swapped) == NODES
    assert result.train_metrics_clientapp[1]["reports"] == 0


STAGES = ["adverts", "shares", "uploads", "consents", "reveals"]
ANSWERS = ["nothing", "empty", "floats", "reason", "seconds"]


@pytest.mark.parametrize(
    ("stage", "answer"), [*((s, "garbage") for s in STAGES), *(("uploads", a) for a in ANSWERS)]
)
def test_whatever_a_node_answers_the_round_goes_on(stage, answer, keys, process):
    from lepton_strategies.records import to_array_record

    honest = secure_mod(keys_for(keys, least_cohort=15), keep="here")

    def bad(message, context, call_next):
        told = message.content.config_records.get(RECORD, {})
        if int(context.node_config["partition-id"]) != 4 or told.get("stage") != stage:
            return honest(message, context, call_next)
        good = {"frame": b"flsa\x01\x01", "prekey": b"x" * 5000}
        content = {
            "nothing": {},
            "garbage": {"config": ConfigRecord(good), "metrics": MetricRecord({"seconds": 0.0})},
            "empty": {
                "config": ConfigRecord(good),
                "metrics": MetricRecord({"seconds": 0.0}),
                "arrays": to_array_record({"masked": np.empty((0, 3), np.uint32)}),
            },
            "floats": {
                "config": ConfigRecord(good),
                "metrics": MetricRecord({"seconds": 0.0}),
                "arrays": to_array_record({"masked": np.zeros(9)}),
            },
            "reason": {"config": ConfigRecord({"refused": "because", "text": "I say so"})},
            "seconds": {"config": ConfigRecord(good), "metrics": MetricRecord({"seconds": float("nan")})},
        }[answer]
        return Message(content=RecordDict(content), reply_to=message)

    secure = wrapped(keys, min_cohort=15, stage_s=1.0)
    result = secure.start(grid_of(app_of(keys, mods=[bad])), model(), num_rounds=1)
    kept = NODES if stage in ("consents", "reveals") else NODES - 1
    assert result.train_metrics_clientapp[1]["reports"] == kept


def test_an_intruder_whose_key_is_on_no_list_is_not_counted(keys, process):
    (keys / "node2.key").unlink()
    make_key(keys / "node2.key")
    with_intruder = wrapped(keys, min_cohort=15)
    app = app_of(keys, mods=[secure_mod(keys_for(keys, least_cohort=15), keep="here")])
    result = with_intruder.start(grid_of(app), model(), num_rounds=1)
    assert result.train_metrics_clientapp[1]["reports"] == NODES - 1


def test_a_node_takes_part_in_no_smaller_sum_than_its_owner_allows(keys, process):
    secure = wrapped(keys, min_cohort=8)
    result = secure.start(grid_of(app_of(keys)), model(), num_rounds=1)
    assert result.train_metrics_clientapp[1]["reports"] == 0


def test_more_nodes_than_one_sum_takes_make_several(keys, process):
    app = app_of(keys, mods=[secure_mod(keys_for(keys, least_cohort=4), keep="here")])
    result = wrapped(keys, min_cohort=4, max_cohort=8).start(grid_of(app), model(), num_rounds=1)
    assert result.train_metrics_clientapp[1]["reports"] == NODES
    assert_allclose(result.arrays["w"].numpy(), np.full((2, 3), 0.085), atol=1e-6)


def test_the_lines_of_the_documentation_are_those_of_the_example():
    """Which the tests of a stock deployment and of Flower's simulation run as they are."""
    root = Path(__file__).resolve().parents[2]
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (root / "docs" / "flower.md").read_text(), re.S)
    found = {name: text for name, text in blocks if "Secure" in text or "secure" in text}
    app = root / "examples" / "secure_flower" / "secure_flower"
    assert found == {name: (app / f"{name}.py").read_text() for name in ("server_app", "client_app")}
    assert sum(bool(line.strip()) for text in found.values() for line in text.splitlines()) <= 15


def test_keys_are_found_in_the_environment_where_a_node_has_no_configuration(keys, monkeypatch):
    class Context:
        node_config: ClassVar = {"partition-id": 3, "num-partitions": 16}

    monkeypatch.setenv("LEPTON_SECAGG_KEY", f"{keys}/node{{partition-id}}.key")
    with pytest.raises(ConfigError, match="no keys"):
        configured_keys(Context)
    monkeypatch.setenv("LEPTON_SECAGG_PEERS", f"{keys}/keys.txt")
    monkeypatch.setenv("LEPTON_SECAGG_COHORT", "5")
    found = configured_keys(Context)
    assert (found.key, found.peers, found.least_cohort) == (keys / "node3.key", keys / "keys.txt", 5)
    Context.node_config["secagg-cohort"] = 7  # the node's own comes first
    assert configured_keys(Context).least_cohort == 7
    with pytest.raises(ConfigError, match="cannot be read"):
        SecureAggregation(flower.FedAvg(), keys=str(keys / "none.txt"), clip_norm=1.0)


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "QFedAvg"])
def test_strategies_that_need_more_than_a_mean_are_refused(name, keys):
    inner = getattr(flower, name)(**({"client_learning_rate": 0.1} if name == "QFedAvg" else {}))
    with pytest.raises(ConfigError, match=name):
        wrapped(keys, inner)


def test_settings_that_cannot_be_kept_are_refused(keys, process):
    with pytest.raises(ConfigError, match="clip_norm"):
        SecureAggregation(flower.FedAvg(), keys=load_list(keys / "keys.txt"))
    with pytest.raises(QuorumError, match="needs 16"):
        wrapped(keys, flower.FedAvg(min_train_nodes=2)).start(grid_of(app_of(keys), 3), model(), num_rounds=1)
    with pytest.raises(ConfigError, match="steps"):
        wrapped(keys, max_weight=10**7).start(grid_of(app_of(keys)), model(), num_rounds=1)


# --- our own strategies -----------------------------------------------------------------------------


def ours(name: str = "FedAdam", **more):
    local = {"learning_rate": 0.1, "batch_size": 16}
    settings = {"cohort": {"size": NODES}, "local": local, "seed": 5, "weighting": "equal", "clip_norm": 2.0}
    return getattr(lepton_strategies, name)("digits", **settings, evaluate_every=0, **more)


def test_our_strategies_get_the_same_bits_as_without(keys, process):
    spec = ours().spec.model_copy(update={"rounds": 2})
    book = LogBook()
    plain = run_campaign(grid_of(client_app(["digits"])), spec, book=book, poll_s=0.0)
    secure = SecureAggregation(ours(), keys=load_list(keys / "keys.txt"), poll_s=0.0)
    app = client_app(["digits"], mods=[secure_mod(keys_for(keys), keep="here")])
    result = secure.start(grid_of(app), initial_arrays("digits"), num_rounds=2)
    assert_array_equal(from_arrays(result.arrays), plain.model)
    assert result.train_metrics_clientapp[2]["reports"] == NODES
    loss = result.train_metrics_clientapp[2]["loss"]
    assert_allclose(loss, book.train_metrics[2]["loss"], rtol=1e-5)


def test_our_strategies_never_run_plainly_what_must_be_hidden(process, keys):
    bare = ours(secure_aggregation="required")
    with pytest.raises(ConfigError, match="alone would see"):
        bare.start(grid_of(client_app(["digits"])), initial_arrays("digits"), num_rounds=1)


# --- keys and keepers -------------------------------------------------------------------------------


def test_a_key_is_made_once_and_printed(tmp_path, capsys):
    path = tmp_path / "a.key"
    assert main([str(path)]) == 0
    public = capsys.readouterr().out.split()[0]
    assert load_key(path).public_key().public_bytes_raw().hex() == public
    assert path.stat().st_mode & 0o777 == 0o600
    assert main([str(path)]) == 3
    assert main([]) == 2
    (tmp_path / "keys.txt").write_text(f"{public}  # a\n\nabcd\n")
    with pytest.raises(ConfigError, match="32 bytes"):
        load_list(tmp_path / "keys.txt")


def test_the_node_says_what_is_wrong_with_its_keys(keys):
    class Bare:
        node_config: ClassVar = {}

    with pytest.raises(ConfigError, match="no keys"):
        configured_keys(Bare)
    make_key(keys / "other.key")
    with pytest.raises(ConfigError, match="not on the list"):
        Here(NodeKeys(keys / "other.key", keys / "keys.txt"))


def test_a_keeper_outlives_the_question_and_ends_when_asked(keys, short):
    node = NodeKeys(keys / "node0.key", keys / "keys.txt")
    first, second = Beside(node, folder=short), Beside(node, folder=short)
    try:
        advert = bytes(first.call("advert", "1.a/1/1")[0])
        assert bytes(second.call("advert", "1.a/1/1")[0]) == advert
        assert fingerprint(load_key(keys / "node0.key").public_key().public_bytes_raw()).encode() in advert
        with pytest.raises(TrustError, match="no keys for this round"):
            second.call("consent", "1.a/2/1", b"x")
        with pytest.raises(TrustError):
            second.call("consent", "1.a/1/1", b"x")
    finally:
        first.stop()
    with pytest.raises(TrustError, match="gone"):
        second.call("reveal", "1.a/1/1", b"x")
    assert not list(short.glob("*.sock"))


def test_a_keeper_ends_by_itself_and_refuses_a_folder_that_others_can_enter(keys, short):
    node = NodeKeys(keys / "node1.key", keys / "keys.txt")
    idle = Beside(node, idle_s=0.2, folder=short)
    idle.call("advert", "1.a/1/1")
    end = time.monotonic() + 30
    while list(short.glob("*.sock")) and time.monotonic() < end:
        time.sleep(0.05)
    assert not list(short.glob("*.sock"))
    short.chmod(0o755)
    with pytest.raises(StateError, match="others can enter"):
        idle.call("advert", "1.a/1/1")
    with pytest.raises(StateError, match="too long"):
        Beside(node, folder=short / ("x" * 90)).call("advert", "1.a/1/1")


def test_a_content_is_named_whatever_its_order():
    one = RecordDict({"arrays": model(), "config": ConfigRecord({"lr": 0.1, "key": b"x"})})
    two = RecordDict({"config": ConfigRecord({"key": b"x", "lr": 0.1}), "arrays": model()})
    assert content_digest(one) == content_digest(two)
    for change in ({"lr": 0.2, "key": b"x"}, {"lr": 0.1, "key": b"y"}, {"lr": 0.1, "key": "78"}):
        two["config"] = ConfigRecord(change)
        assert content_digest(one) != content_digest(two)
    assert RECORD not in json.dumps(sorted(one))
