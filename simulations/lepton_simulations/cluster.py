"""Several machines: each holds all rows, trains its shard of a cohort and returns one exact sum.

A leader runs the rounds; followers compute. What carries the messages is an engine that exists already:

* ``torchrun`` starts the same command everywhere, and the first process leads (``torch.distributed``, gloo):
  ``torchrun --nnodes 2 ... --no-python lepton simulate scenario.toml --set engine.backend=torchrun``
* a Ray cluster runs one follower per core, and this process leads:
  ``lepton simulate scenario.toml --set engine.backend=ray``

Sums are integers, so the result is that of one machine, bit for bit, wherever the same kind of processor
computes.
"""

import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, ConnectionFailed, RunError, UpdateRejected
from lepton_fl.plan import RoundPlan
from lepton_fl.rounds.accumulator import Subtotal
from lepton_fl.wire.messages import Request
from lepton_fl.wire.records import Records
from lepton_simulations.backend import Backend, Outcome, Part, refusal_from_json, refusal_to_json

log = logging.getLogger(__name__)

DTYPES = ("float32", "int32", "int64")  # of arrays between machines


@dataclass(frozen=True)
class Note:
    """A message between machines: plain JSON, and arrays of one dimension."""

    body: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Link(Protocol):
    """Carries notes between the leader and its followers."""

    @property
    def followers(self) -> int:
        """How many there are."""
        ...

    def send(self, notes: Sequence[Note]) -> None:
        """One note to each follower."""
        ...

    def receive(self) -> Generator[Note, None, None]:
        """The answers to the notes sent last, one from each follower, in the order of the followers."""
        ...

    def close(self) -> None:
        """Part; may be called again."""
        ...


class Cluster:
    """A backend whose shards are on other machines; implements ``backend.Backend``."""

    def __init__(self, link: Link, own: Backend | None = None) -> None:
        """Lead.

        Args:
            link: to the followers.
            own: computes a share here as well; None = the followers do all.
        """
        self._link = link
        self._own = own
        self._size = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the followers go; may be called again."""
        if self._closed:
            return
        self._closed = True
        with suppress(ConnectionFailed):  # who is gone need not be told
            self._link.send([Note({"do": "leave"})] * self._link.followers)
        self._link.close()
        if self._own:
            self._own.close()

    def begin(self, plan: RoundPlan, request: Request) -> None:
        """See ``Backend``."""
        self._size = plan.update_size
        records = request.to_records()
        settings = plan.model_copy(update={"cohort": ()}).to_json()
        body = {"do": "begin", "plan": settings, "config": dict(records.config)}
        self._tell([Note(body, records.arrays)] * self._link.followers)
        if self._own:
            self._own.begin(plan, request)

    def train(self, devices: Sequence[str], costs: Sequence[int]) -> Generator[Part, None, None]:
        """See ``Backend``; every machine gets an even share."""
        own, shares = self._shares(devices)
        cost = dict(zip(devices, costs, strict=True))
        orders = [{"do": "train", "devices": share, "costs": [cost[d] for d in share]} for share in shares]
        self._link.send([Note(order) for order in orders])
        with self._answers() as answers:
            if self._own and own:
                yield from self._own.train(own, [cost[d] for d in own])
            for answer in answers:
                yield Part.from_json(answer.body)

    def answer(self, devices: Sequence[str]) -> Generator[tuple[str, Outcome], None, None]:
        """See ``Backend``."""
        own, shares = self._shares(devices)
        self._link.send([Note({"do": "answer", "devices": share}) for share in shares])
        with self._answers() as answers:
            found: dict[str, Outcome] = dict(self._own.answer(own)) if self._own else {}
            for note in answers:
                found |= _outcomes(note)
        for device_id in devices:
            yield device_id, found.pop(device_id)

    def subtotal(self) -> Subtotal:
        """See ``Backend``."""
        self._link.send([Note({"do": "subtotal"})] * self._link.followers)
        total, weight, reports = np.zeros(self._size, np.int64), 0, 0
        with self._answers() as answers:
            for answer in answers:
                if answer.body["reports"]:
                    total += answer.arrays["total"]
                weight, reports = weight + answer.body["weight"], reports + answer.body["reports"]
        if self._own:
            own = self._own.subtotal()
            total += own.total
            weight, reports = weight + own.weight, reports + own.reports
        return Subtotal(total, weight, reports)

    def _shares(self, devices: Sequence[str]) -> tuple[Sequence[str], list[list[str]]]:
        """Like sizes lie beside one another, so taking turns makes even shares."""
        machines = self._link.followers + (self._own is not None)
        shares = [list(devices[first::machines]) for first in range(machines)]
        return (shares.pop(0), shares) if self._own else ([], shares)

    def _tell(self, notes: Sequence[Note]) -> None:
        self._link.send(notes)
        with self._answers() as answers:
            for _ in answers:
                pass

    @contextmanager
    def _answers(self) -> Iterator[Iterator[Note]]:
        """The answers to what was sent last, checked; whatever happens, nobody is left with one in hand."""
        answers = self._link.receive()
        try:
            yield map(_checked, answers)
        finally:
            for _ in answers:
                pass


class Follower:
    """What a follower does with the leader's notes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def handle(self, note: Note) -> Note:
        """The answer to a note; an error becomes one, too."""
        try:
            return self._do(note)
        except Exception as error:  # the leader must hear of it, whatever it is
            log.exception("a follower failed")
            return Note({"error": f"{type(error).__name__}: {error}"})

    def _do(self, note: Note) -> Note:
        if note.body["do"] == "begin":
            plan = RoundPlan.from_json(note.body["plan"])
            self._backend.begin(plan, Request.read(Records(note.arrays, note.body["config"], {})))
            return Note({})
        if note.body["do"] == "train":
            parts = list(self._backend.train(note.body["devices"], note.body["costs"]))
            refused = {d: r for part in parts for d, r in part.refused.items()}
            return Note(Part([t for part in parts for t in part.trained], refused).to_json())
        if note.body["do"] == "answer":
            return _note_of(dict(self._backend.answer(note.body["devices"])))
        subtotal = self._backend.subtotal()
        arrays = {"total": subtotal.total} if subtotal.reports else {}
        return Note({"weight": subtotal.weight, "reports": subtotal.reports}, arrays)


def _checked(answer: Note) -> Note:
    if "error" in answer.body:
        raise RunError(f"A machine of the cluster failed: {answer.body['error']}", hint="See its log.")
    return answer


def _note_of(outcomes: Mapping[str, Outcome]) -> Note:
    body: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for number, (device_id, outcome) in enumerate(outcomes.items()):
        if isinstance(outcome, UpdateRejected):
            body[device_id] = {"refused": refusal_to_json(outcome)}
            continue
        names = {f"{number} {name}": array for name, array in outcome.arrays.items()}
        arrays |= names
        body[device_id] = {
            "config": dict(outcome.config),
            "metrics": dict(outcome.metrics),
            "arrays": list(names),
        }
    return Note({"outcomes": body}, arrays)


def _outcomes(note: Note) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for device_id, body in note.body["outcomes"].items():
        if "refused" in body:
            found[device_id] = refusal_from_json(body["refused"])
            continue
        arrays = {name.partition(" ")[2]: note.arrays[name] for name in body["arrays"]}
        found[device_id] = Records(arrays, body["config"], body["metrics"])
    return found


# --- torchrun -----------------------------------------------------------------------------------------


class TorchLink:
    """Notes over ``torch.distributed``: tensors from process to process, nothing pickled."""

    def __init__(self) -> None:
        """Join the group that torchrun's environment describes.

        Raises:
            ConfigError: this process was not started by torchrun.
            ConnectionFailed: the group cannot be joined.
        """
        import torch.distributed as dist

        if not dist.is_torchelastic_launched():
            raise ConfigError(
                "engine.backend = 'torchrun', but this process was not started by torchrun.",
                hint="torchrun --nproc-per-node 2 --no-python lepton simulate SCENARIO.toml "
                "--set engine.backend=torchrun",
            )
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise ConnectionFailed(f"The process group cannot be joined: {error}.") from error
        self.rank = dist.get_rank()
        self._size = dist.get_world_size()

    @property
    def followers(self) -> int:
        """All but the first process."""
        return self._size - 1

    def send(self, notes: Sequence[Note]) -> None:
        """See ``Link``."""
        for rank, note in enumerate(notes, start=1):
            self._put(note, rank)

    def receive(self) -> Generator[Note, None, None]:
        """See ``Link``."""
        for rank in range(1, self._size):
            yield self._get(rank)

    def follow(self, follower: Follower) -> None:
        """Answer the first process until it leaves."""
        while (note := self._get(0)).body.get("do") != "leave":
            self._put(follower.handle(note), 0)
        self.close()

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def _put(self, note: Note, rank: int) -> None:
        shapes = [[name, array.dtype.name, len(array)] for name, array in note.arrays.items()]
        head = np.frombuffer(json.dumps({"body": note.body, "arrays": shapes}).encode(), np.uint8)
        arrays: list[NDArray[Any]] = [np.array([len(head)], np.int64), head, *note.arrays.values()]
        for array in arrays:
            self._carry(array, lambda dist, tensor: dist.send(tensor, rank))

    def _get(self, rank: int) -> Note:
        length = np.zeros(1, np.int64)
        self._carry(length, lambda dist, tensor: dist.recv(tensor, rank))
        head = np.zeros(int(length[0]), np.uint8)
        self._carry(head, lambda dist, tensor: dist.recv(tensor, rank))
        said, arrays = json.loads(head.tobytes()), {}
        for name, kind, size in said["arrays"]:
            if kind not in DTYPES:
                raise RunError(f"A machine of the cluster sent an array of {kind}.")
            arrays[name] = np.zeros(size, kind)
            self._carry(arrays[name], lambda dist, tensor: dist.recv(tensor, rank))
        return Note(said["body"], arrays)

    def _carry(self, array: NDArray[Any], move: Callable[[Any, Any], object]) -> None:
        import torch
        import torch.distributed as dist

        if not len(array):
            return
        if not array.flags.writeable:  # torch warns of memory that it might write to, though it only reads
            array = array.copy()
        try:
            move(dist, torch.from_numpy(np.ascontiguousarray(array)))
        except RuntimeError as error:
            raise ConnectionFailed(
                f"A machine of the cluster cannot be reached: {error}.",
                hint="Resume the run when it is back.",
            ) from error


# --- Ray ----------------------------------------------------------------------------------------------


class RayLink:
    """Notes to actors of a Ray cluster; the cluster is its owner's, and trusted as such."""

    def __init__(self, scenario: Mapping[str, Any], address: str, actors: int) -> None:
        """Start the followers.

        Args:
            scenario: the JSON of the ``SimulationConfig``; data folders are looked up on each machine.
            address: of the cluster; "" = one on this machine, for the length of the run.
            actors: how many, one core each; below 1 = as many as the cluster has cores.

        Raises:
            ConfigError: Ray is not installed.
            ConnectionFailed: the cluster cannot be reached, or a follower cannot be started.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "engine.backend = 'ray', but Ray is not installed.",
                hint="Install it with: pip install 'lepton-fl[ray]'",
            ) from None
        self._ray = ray
        try:
            ray.init(
                address=address or "local",
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionFailed(f"The Ray cluster {address!r} cannot be joined: {error}.") from error
        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        count = actors if actors > 0 else max(1, int(resources().get("CPU", 1)))
        kind: Any = ray.remote(num_cpus=1)(RayFollower)  # what Ray makes of a class has other types
        self._actors = [kind.remote(json.dumps(scenario)) for _ in range(count)]
        self._pending: list[Any] = []

    @property
    def followers(self) -> int:
        """The actors."""
        return len(self._actors)

    def send(self, notes: Sequence[Note]) -> None:
        """See ``Link``."""
        shared: dict[int, Any] = {}  # one copy of an array in the cluster, however many are sent it
        self._pending = []
        for actor, note in zip(self._actors, notes, strict=True):
            for array in note.arrays.values():
                if id(array) not in shared:
                    shared[id(array)] = self._ray.put(array)
            refs = [shared[id(array)] for array in note.arrays.values()]
            self._pending.append(actor.handle.remote(json.dumps(note.body), list(note.arrays), *refs))

    def receive(self) -> Generator[Note, None, None]:
        """See ``Link``."""
        pending, self._pending = self._pending, []
        for reference in pending:
            try:
                body, arrays = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                raise ConnectionFailed(
                    f"A machine of the Ray cluster failed: {error}.", hint="Resume the run when it is back."
                ) from error
            yield Note(json.loads(body), arrays)

    def close(self) -> None:
        """Leave the cluster, which ends the actors."""
        self._ray.shutdown()


class RayFollower:
    """A Ray actor: builds the fleet of the scenario and answers the leader."""

    def __init__(self, scenario: str) -> None:
        """Build everything, once.

        Args:
            scenario: JSON of the ``SimulationConfig``.
        """
        from lepton_simulations.api import build_fleet
        from lepton_simulations.backend import Alone
        from lepton_simulations.config import SimulationConfig
        from lepton_simulations.threads import one_thread

        self._threads = (
            one_thread()
        )  # held, for it ends with whoever holds it: this process does nothing else
        self._threads.__enter__()
        self._follower = Follower(Alone(build_fleet(SimulationConfig.model_validate_json(scenario))))

    def handle(self, body: str, names: list[str], *arrays: NDArray[Any]) -> tuple[str, dict[str, Any]]:
        """Answer one note."""
        note = Note(json.loads(body), dict(zip(names, arrays, strict=True)))
        if note.body["do"] == "leave":
            return "{}", {}
        answer = self._follower.handle(note)
        return json.dumps(answer.body), dict(answer.arrays)
