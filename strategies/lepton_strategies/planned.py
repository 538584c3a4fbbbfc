"""The messages of a plan and the replies to them, without making any message that nobody looks at.

A strategy hands ``PlannedMessages`` to a grid. Any grid can iterate over them: then they are messages like
others. A grid in the same process as the nodes (``LocalGrid``) takes the plan out of them instead and hands
back ``PlannedReplies``, out of which the strategy takes an exchange: a thousand devices train, and one exact
sum comes back. Whoever else looks at the replies finds messages.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.exchange import Exchange
from lepton_fl.wire.messages import Request
from lepton_strategies.grid import to_messages

if TYPE_CHECKING:
    from flwr.app import Message


class PlannedMessages:
    """One plan's request to its cohort, as an iterable of messages."""

    def __init__(self, plan: RoundPlan, request: Request) -> None:
        self.plan = plan
        self.request = request
        self._messages: list[Message] = []

    def __iter__(self) -> "Iterator[Message]":
        """The messages, one per node of the cohort, in its order; made when first looked at, then the same.

        Flower's own grid goes through them twice: first it gives each its id, then it sends them.
        """
        self._messages = self._messages or to_messages(self.plan, self.request)
        return iter(self._messages)

    def devices(self) -> dict[str, str]:
        """The node that was asked, by the id of the message: an error's sender may be the server itself."""
        pairs = zip(self._messages, self.plan.cohort, strict=False)  # not looked at: none were made
        ids = ((message.metadata.message_id, device_id) for message, device_id in pairs)
        return {message_id: device_id for message_id, device_id in ids if message_id}


class PlannedReplies:
    """The replies to ``PlannedMessages`` from nodes in this process; nothing is trained before it is used."""

    def __init__(self, exchange: Exchange, messages: "Callable[[], Iterable[Message]]") -> None:
        """Hold what will answer.

        Args:
            exchange: answers the plan.
            messages: makes the replies for whoever looks at them one by one.
        """
        self.exchange = exchange
        self._messages = messages

    def __iter__(self) -> "Iterator[Message]":
        """One reply per node that answers."""
        return iter(self._messages())
