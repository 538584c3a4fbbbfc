"""Flower's fleet API inside the coordinator: the one place of this process that touches Flower's internals.

Flower 1.41 carries the messages of a round and nothing else. Its link state and object store are kept in
memory and are disposable: what must survive a crash is in our journal. Only the fleet router is mounted,
behind a guard of our own; Flower's control and runtime routers, which have no login, are not.

    link = FlowerLink()
    link.start()
    serve(link.app)                                   # any ASGI server, behind TLS
    node = link.admit(device_public_key_der)
    box = link.mailbox()                              # one for each round
    message = box.post(node, records, message_type="train", ttl_s=60)
    reply = box.get(timeout_s=60)                     # Reply(message_id, node_id, Records or UpdateRejected)
    box.close()                                       # what is still open is withdrawn

Rules: a device is known by its enrolled key, which signs every request; a request is authenticated before
its body is read; a node sends and fetches only what concerns its own messages; the replies that wait in
memory are bounded, whatever the cohort. Deadlines run on the monotonic clock, so a clock jump ends nothing.

The modules: ``link`` (the public class), ``guard`` (the ASGI wrapper), ``gate`` (back-pressure), ``state``
(Flower's state with what we change in it). ``tests/lepton_server/test_flower_contract.py`` fails when Flower
changes what they rely on.
"""

import os

# Read by Flower when it is imported: no telemetry, no update check, no package installation.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"

from lepton_server.flower.guard import Limits
from lepton_server.flower.link import FlowerLink, Keep, Mailbox, Refused, Reply

__all__ = ["FlowerLink", "Keep", "Limits", "Mailbox", "Refused", "Reply"]
