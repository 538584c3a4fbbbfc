"""What the two Flower modules rely on in Flower 1.41 beyond its public API.

A failure here means that Flower has changed: read its new source before touching the modules.
"""

import importlib
import inspect

import pytest

IMPORTS = {
    "flwr.app.message": ["make_message"],
    "flwr.app.message.arraychunk": ["ArrayChunk"],
    "flwr.app.metadata": ["Metadata"],
    "flwr.common.constant": [
        "HEARTBEAT_MAX_INTERVAL",
        "NOOP_ACCOUNT_NAME",
        "NOOP_FLWR_AID",
        "SYSTEM_TIME_TOLERANCE",
        "TIMESTAMP_TOLERANCE",
    ],
    "flwr.common.serde": ["message_to_proto"],
    "flwr.proto.fleet_pb2": ["PushMessagesRequest", "PushMessagesResponse", "PullMessagesRequest"],
    "flwr.proto.message_pb2": ["ObjectTree", "PullObjectRequest", "PushObjectRequest"],
    "flwr.supercore.error": ["http_error_translator"],
    "flwr.supercore.interceptors.http.utils": ["add_headers"],
    "flwr.supercore.primitives.asymmetric": ["public_key_to_bytes", "sign_message"],
    "flwr.superlink.federation": ["NoOpFederationManager"],
    "flwr.superlink.routers.fleet.node_auth": ["NodeAuthMiddleware"],
    "flwr.supercore.protobuf.translation": ["ProtobufTranslationMiddleware", "get_protobuf_request"],
}

CONSTANTS = {
    "flwr.common.constant": {"SUPERLINK_NODE_ID": 1, "TIMESTAMP_HEADER": "flwr-timestamp"},
    "flwr.supercore.constant": {
        "FLEET_HTTP_PUBLIC_KEY_HEADER": "flwr-public-key",
        "FLEET_HTTP_SIGNATURE_HEADER": "flwr-signature",
        "HEAD_BODY_DIVIDER": b"\0",
        "NOOP_FEDERATION_ID": "@none/default",
    },
    "flwr.supercore.protobuf.constants": {"PROTOBUF_MEDIA_TYPE": "application/protobuf"},
}

STATE = "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState"
STORE = "flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore"
INFLATABLE = "flwr.supercore.inflatable.inflatable_object"
SIGNATURES = {
    f"{STATE}.__init__": ["self", "federation_manager", "object_store"],
    f"{STATE}._cleanup_expired_task_tokens_locked": ["self"],
    f"{STATE}._cleanup_push_session": ["self", "session_id", "cleanup_messages"],
    f"{STATE}.activate_node": ["self", "node_id", "heartbeat_interval"],
    f"{STATE}.activate_task": ["self", "task_id"],
    f"{STATE}.claim_task": ["self", "task_id"],
    f"{STATE}.create_node": [
        "self", "owner_aid", "owner_name", "public_key", "heartbeat_interval", "location", "name",
    ],
    f"{STATE}.create_run": [
        "self", "fab_id", "fab_version", "fab_hash", "override_config", "federation_id", "federation_config",
        "flwr_aid", "primary_task_type", "series_id", "series_description", "connector_ids",
        "initial_task_event", "user_prompt",
    ],
    f"{STATE}.deactivate_node": ["self", "node_id"],
    f"{STATE}.delete_messages": ["self", "message_ins_ids"],
    f"{STATE}.get_message_ins": ["self", "node_id", "limit", "run_id"],
    f"{STATE}.start_session": ["self", "run_id"],
    f"{STATE}.store_message_and_object_tree": ["self", "message", "object_tree", "session_id"],
    f"{STATE}.store_object": ["self", "run_id", "session_id", "object_id", "object_content"],
    f"{STORE}.__init__": ["self", "verify"],
    f"{STORE}.delete": ["self", "object_id"],
    f"{STORE}.get": ["self", "object_id"],
    f"{STORE}.preregister": ["self", "run_id", "object_tree"],
    f"{INFLATABLE}:get_all_nested_objects": ["obj"],
    f"{INFLATABLE}:get_object_children_ids_from_object_content": ["object_content"],
    f"{INFLATABLE}:get_object_id": ["object_content"],
    f"{INFLATABLE}:get_object_tree": ["obj"],
    f"{INFLATABLE}:get_object_type_from_object_content": ["object_content"],
    f"{INFLATABLE}:is_valid_sha256_hash": ["object_id"],
    f"{INFLATABLE}:iterate_object_tree": ["tree"],
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": [
        "object_id", "object_contents", "keep_object_contents", "objects",
    ],
    "flwr.supercore.inflatable.inflatable_utils:validate_object_content": ["content"],
    "flwr.superlink.dependencies.linkstate:get_linkstate": ["request"],
    "flwr.superlink.servicer.fleet.fleet_handlers:pull_messages": ["request", "state", "store"],
    "flwr.superlink.servicer.fleet.fleet_handlers:push_messages": ["request", "state"],
    "flwr.superlink.routers.fleet.router:get_enable_supernode_auth": ["request"],
    "flwr.supercore.protobuf.client:ProtobufClient.from_server_address": [
        "server_address", "insecure", "root_certificates", "interceptors", "retry_invoker",
    ],
    "flwr.app.metadata:Metadata.__init__": [
        "self", "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id",
        "created_at", "ttl", "message_type", "src_task_id", "dst_task_id",
    ],
}  # fmt: skip


def find(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def test_the_version_is_the_one_that_was_read():
    from importlib.metadata import version

    assert version("flwr").split(".")[:2] == ["1", "41"]


@pytest.mark.parametrize("module", IMPORTS)
def test_names_are_there(module):
    found = importlib.import_module(module)
    for name in IMPORTS[module]:
        assert hasattr(found, name), f"{module}.{name}"


@pytest.mark.parametrize("module", CONSTANTS)
def test_constants_have_their_values(module):
    found = importlib.import_module(module)
    assert {name: getattr(found, name) for name in CONSTANTS[module]} == CONSTANTS[module]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_unchanged(name):
    parameters = [p for p in inspect.signature(find(name)).parameters if p != "cls"]
    assert parameters == SIGNATURES[name]


def test_the_fleet_router_has_the_paths_that_are_used():
    from flwr.superlink.routers.fleet.router import router

    from lepton_server.flower.guard import PATHS

    assert {route.path for route in router.routes} >= PATHS


def test_the_state_keeps_what_is_reached_into():
    from lepton_server.flower.state import State

    state = State(lambda *_: None, lambda *_: None)
    for name in (
        "nodes",
        "node_public_key_to_node_id",
        "owner_to_node_ids",
        "message_ins_store",
        "message_res_store",
        "message_ins_id_to_message_res_id",
        "_object_push_sessions",
        "_object_push_session_by_root",
    ):
        assert isinstance(getattr(state, name), dict), name
    for name in ("lock", "_lock_object_push_sessions"):
        with getattr(state, name):
            pass
    with state.object_store.lock_store:
        assert state.object_store.verify is False


def test_the_transport_run_outlives_every_heartbeat(monkeypatch):
    """Flower would end it a minute after the last heartbeat; the clock jumps by a year here."""
    import datetime

    import flwr.supercore.corestate.in_memory_corestate as corestate
    from flwr.common.constant import Status

    from lepton_server.flower.state import State

    state = State(lambda *_: None, lambda *_: None)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)
    monkeypatch.setattr(corestate, "now", lambda: later)
    assert state.get_run_status({state.run_id})[state.run_id].status == Status.RUNNING


def test_what_the_client_uses_of_flower_neither_exits_nor_signals():
    import flwr.supercore.protobuf.client as protobuf_client
    import flwr.supernode.fleet_http_client as fleet_client

    for module in (protobuf_client, fleet_client):
        source = inspect.getsource(module)
        for word in ("flwr_exit", "os.kill", "sys.exit", "RunNotRunningException"):
            assert word not in source, f"{module.__name__} uses {word}"


def test_flower_calls_nobody():
    import os

    import lepton_client.flower
    import lepton_server.flower  # noqa: F401 - both set the variables

    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert lepton_client.flower.FlowerNode is not None
