"""The story of ``lepton demo delivery``: one model becomes variants, and the right one reaches every device.

    train -> variants -> gate -> sign -> rolled out in stages to real processes of three profiles
          -> a bad variant, signed like any other, is noticed at the canaries and taken back
          -> every device is asked what it serves

Nothing is staged but the fault: processes, TLS, signatures, downloads and predictions are those of a fleet.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lepton_fl.compression.card import CARD, MODEL, PARITY, Card, read_variant
from lepton_fl.errors import RunError
from lepton_fl.files import sha256_hex
from lepton_fl.plan import CohortSpec, LocalPlan, RunSpec
from lepton_fl.tasks.data import Dataset
from lepton_fl.tasks.federated import read
from lepton_fl.tasks.partition import PartitionSpec, partition
from lepton_fl.tasks.task import Task, load_task
from lepton_simulations.config import DataConfig, OutputConfig, SimulationConfig
from lepton_simulations.demo import demo_config
from lepton_simulations.demo_fleet import Caller, RealFleet, Watching, in_parallel

CANARY: Final = "canary"
PLANTED: Final = "planted (bad)"
LEAST: Final = 6  # devices: two of each profile
LOOK_S: Final = 1.0  # between two looks at a rollout
PATIENCE_S: Final = 900.0  # with one rollout
BATCH: Final = 256  # rows asked for at once
ROWS: Final = 500  # labelled rows that a device keeps, at most
EPSILON: Final = 6.0  # of one answer of a trial
MEASURED_ON: Final = 2000  # rows

Say = Callable[[str], None]
Show = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Profile:
    """A kind of device: what it can hold, and which of the variants it may have is the best for it."""

    name: str
    flash: float  # bytes of a variant's file, as a part of the float32 weights' bytes
    worth: Callable[[Card], tuple[float, ...]]  # the least wins
    words: str


def _score(card: Card) -> float:
    return card.measured.metrics["accuracy"]


PROFILES: Final = (
    Profile("gateway", 2.0, lambda card: (-_score(card), card.measured.p50_ms), "the most accurate"),
    Profile("phone", 0.7, lambda card: (card.measured.p50_ms, card.model_bytes), "the fastest"),
    Profile("sensor", 0.45, lambda card: (card.model_bytes,), "the smallest"),
)


@dataclass(frozen=True)
class Row:
    """What was found on one device at the end."""

    device: str
    profile: str
    variant: str
    sha256: str  # of the model's file on its disk
    serving: bool  # the endpoint answers with the release that was meant for this profile
    accuracy: float  # of the endpoint's answers, on the device's own labelled rows
    problem: str = ""


@dataclass(frozen=True)
class Story:
    """What a demonstration came to."""

    task: str
    devices: tuple[Row, ...]
    variants: Mapping[str, str]  # by profile
    rollouts: tuple[Mapping[str, Any], ...]
    reached_by_bad: int  # devices
    requests: int  # predictions asked for all the while
    failed: tuple[str, ...]
    memory: Mapping[str, float]  # MB: median of the agents and of the endpoints
    seconds: float
    plot: Path


# --- the model and its variants ---------------------------------------------------------------------


def training(task: str, data: Path | None, folder: Path) -> SimulationConfig:
    """A short run of a task: enough to have a model that is worth delivering."""
    output = OutputConfig(folder=str(folder), plots=False, tensorboard=False)
    if task == "digits":
        small = demo_config()
        return small.model_copy(update={"output": output})
    natural = task == "mnist_by_writer"
    run = RunSpec(
        task=task,
        rounds=15 if natural else 12,
        evaluate_every=5 if natural else 4,
        cohort=CohortSpec(size=20 if natural else 10),
        local=LocalPlan(learning_rate=0.1, batch_size=10 if natural else 32, epochs=2),
    )
    split = PartitionSpec(kind="natural") if natural else PartitionSpec(kind="dirichlet", clients=100)
    return SimulationConfig(run=run, data=DataConfig(folder=str(data or ""), partition=split), output=output)


def build(run: Path, folder: Path, data: Path | None, on_step: Say) -> dict[str, Card]:
    """All variants of a run's model, measured and gated; by name."""
    import torch

    from lepton_fl.compression.build import Build
    from lepton_fl.compression.catalogue import read_report
    from lepton_fl.compression.profiles import Profile as Bounds
    from lepton_fl.compression.recipe import EvaluationSpec, Recipe
    from lepton_fl.compression.source import read_source

    torch.set_num_threads(1)
    size = (run / "model.safetensors").stat().st_size
    bounds = tuple(Bounds(name=p.name, flash=int(p.flash * size), max_drop=0.02) for p in PROFILES)
    recipe = Recipe(evaluation=EvaluationSpec(rows=MEASURED_ON))
    Build(
        *(read_source(run), recipe, bounds, folder, data, [], None, torch.device("cpu"), ""),
        on_step=on_step,
        on_done=lambda name: None,
    ).run()
    return {card.name: card for card in read_report(folder)[1]}


def chosen(cards: Mapping[str, Card]) -> dict[str, str]:
    """The variant of each profile, another one for each where that is possible.

    Raises:
        RunError: No variant passed the gate of a profile.
    """
    found: dict[str, str] = {}
    for profile in PROFILES:
        offered = [card for card in cards.values() if card.offered_to(profile.name)]
        if not offered:
            raise RunError(f"No variant passed the gate of {profile.name}.")
        fresh = [card for card in offered if card.name not in found.values()] or offered
        found[profile.name] = min(fresh, key=profile.worth).name
    return found


def plant(source: Path, folder: Path, name: str) -> Path:
    """A bad variant as a mistake at the builder would make it: it loads, is signed, and computes nonsense.

    Its answers have the wrong sign. It passes its own self-test, and its card praises it with the figures of
    the good one: only labelled rows can tell.
    """
    import onnx
    from safetensors.numpy import load_file, save

    card = read_variant(source)
    model = onnx.load_model_from_string((source / MODEL).read_bytes())
    output = card.output.name
    for node in model.graph.node:
        for index, value in enumerate(node.output):
            if value == output:
                node.output[index] = "right"
    model.graph.node.append(onnx.helper.make_node("Neg", ["right"], [output]))
    wrong = model.SerializeToString()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(wrong)
    vectors = load_file(source / PARITY)
    parity = save({"input": vectors["input"], "output": -vectors["output"]})
    (folder / PARITY).write_bytes(parity)
    update: dict[str, Any] = {"name": name, "model_sha256": sha256_hex(wrong), "model_bytes": len(wrong)}
    update["parity"] = card.parity.model_copy(update={"sha256": sha256_hex(parity)})
    (folder / CARD).write_bytes(card.model_copy(update=update).to_bytes())
    return folder


# --- the fleet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One device before it is started."""

    name: str
    profile: Profile
    groups: tuple[str, ...]
    rows: Dataset  # its own labelled rows, raw


def places(task: Task, data: Path | None, count: int) -> list[Place]:
    """The devices of the demonstration: rows that nothing was trained on, a third of them of each profile."""
    test = read(task, data).test
    parts = partition(PartitionSpec(clients=count), labels=test.y, users=None, seed=0)
    canaries = max(4, count // 4)
    return [
        Place(
            f"d{number:02}",
            PROFILES[number % len(PROFILES)],
            (CANARY,) if number < canaries else (),
            test.take(rows[:ROWS]),
        )
        for number, rows in enumerate(parts)
    ]


def settings_of(place: Place, task: str, folder: Path) -> str:
    """The device's configuration, all but [client]."""
    rows = folder / f"{place.name}.npz"
    np.savez(rows, x=place.rows.x, y=place.rows.y)
    return (
        "[limits]\nnice = 0\n[connection]\nbackoff_max_s = 5.0\n"
        f'[delivery]\ntask = "{task}"\nprofile = "{place.profile.name}"\nretry_min_s = 1.0\n'
        f"[trial]\nbudget = {4 * EPSILON}\nepsilon = {EPSILON}\n"
        f'data = {{ kind = "npz", path = "{rows}" }}\n'
    )


def health(canaries: int) -> str:
    """When a stage of the demonstration has held; seconds instead of hours, and few canaries.

    So few answers mean something only if each is almost the truth: hence the large epsilon.
    """
    return (
        "[health]\nwindow_s = 3\nmin_devices = 1\nmin_share = 1.0\nmax_slowdown = 100\nsettle_s = 2\n"
        f"trial = {{ epsilon = {EPSILON}, max_drop = 0.1, min_answers = {canaries} }}\n"
    )


class Rollouts:
    """Begins rollouts and watches them to their end."""

    def __init__(
        self, fleet: RealFleet, watching: Watching, show: Show, canaries: int, labels: Mapping[str, str]
    ) -> None:
        """Nothing begins yet; ``labels``: what people call a release, by its first 12 digits."""
        self._fleet, self._watching, self._show, self._canaries = fleet, watching, show, canaries
        self._labels = labels
        self.ended: list[Mapping[str, Any]] = []

    def run(self, name: str, releases: Mapping[str, str]) -> Mapping[str, Any]:
        """One rollout, from plan to end; its last status.

        Raises:
            RunError: It does not end, or a process of the fleet does.
        """
        file = self._fleet.folder / f"{name}.toml"
        lines = "".join(f'{profile} = "{release}"\n' for profile, release in releases.items())
        stages = f'[{{ groups = ["{CANARY}"] }}, {{ share = 0.5 }}, {{ share = 1.0 }}]'
        file.write_text(f'id = "{name}"\nstages = {stages}\n[releases]\n{lines}{health(self._canaries)}')
        self._fleet.lepton("rollout", "plan", str(file))
        self._fleet.lepton("rollout", "start", name)
        self._watching.mark(f"{name}: stage 1")
        ends, stage = time.monotonic() + PATIENCE_S, ""
        while time.monotonic() < ends:
            self._fleet.check_alive()
            found = self._fleet.lepton("rollout", "status", name)
            if stage not in ("", found["stage"]):
                self._watching.mark(f"{name}: stage {found['stage'].split()[0]}")
            stage = found["stage"]
            served = {self._labels.get(name, name): n for name, n in self._fleet.served().items()}
            self._show(found | {"served": served})
            if found["phase"] in ("done", "rolled-back", "aborted"):
                self._watching.mark(f"{name}: {found['phase']}")
                self.ended.append(found)
                return dict(found)
            time.sleep(LOOK_S)
        raise RunError(f"The rollout {name} did not end: {found}")


# --- the end ----------------------------------------------------------------------------------------


def inspect(fleet: RealFleet, place: Place, release: str, card: Card, task: Task) -> Row:
    """Ask one device what it serves, and look at the file on its disk."""
    problem, accuracy, digest = "", 0.0, ""
    try:
        told = fleet.ask(place.name, "GET", "/v1/model")
        model = fleet.state(place.name) / "delivery" / "slots" / told["release"] / MODEL
        digest = sha256_hex(model.read_bytes())
        if told["release"] != release:
            problem = f"serves {told['variant']} {told['release'][:12]} instead of {card.name} {release[:12]}"
        elif digest != card.model_sha256:
            problem = f"its file has SHA-256 {digest}, the card says {card.model_sha256}"
        accuracy = _accuracy(fleet, place, task)
    except (RunError, OSError, KeyError) as error:
        problem = problem or str(error)
    return Row(place.name, place.profile.name, card.name, digest, not problem, accuracy, problem)


def _accuracy(fleet: RealFleet, place: Place, task: Task) -> float:
    rows = task.transform(place.rows)
    answers = []
    for start in range(0, len(rows), BATCH):
        part = rows.x[start : start + BATCH].tolist()
        answers += fleet.ask(place.name, "POST", "/v1/predict", {"rows": part})["outputs"]
    sums = task.metrics.count(np.array(answers, np.float32), rows.y)
    return task.metrics.summarise(sums)["accuracy"]


@dataclass(frozen=True)
class Wanted:
    """What is to be shown.

    Attributes:
        task: Its short name.
        data: Folder of its published data; digits needs none.
        run: A trained run's folder; None = train one.
        devices: How many.
        output: Folder of everything that stays: run, variants, report, plot.
    """

    task: str
    data: Path | None
    run: Path | None
    devices: int
    output: Path


def tell(
    wanted: Wanted,
    train: Callable[[SimulationConfig], None],
    say: Say,
    step: Say,
    show: Show,
) -> Story:
    """The whole demonstration.

    Args:
        wanted: What.
        train: Runs a scenario into its folder, and raises if it does not end well.
        say: Told every step, in a sentence.
        step: Told what is made just now, in a word.
        show: Given the status of the rollout in hand, with ``served``: devices by variant.

    Raises:
        RunError: A device does not serve what it should, a request failed, or the bad variant was not caught
            where it should have been.
    """
    began, task = time.monotonic(), load_task(wanted.task)
    here = places(task, wanted.data, wanted.devices)
    run = wanted.run or _trained(wanted, train, say)
    say(f"Variants of the model in {run}, each measured in the runtime of the devices:")
    cards = build(run, wanted.output / "variants", wanted.data, step)
    if len(cards) < 5:
        raise RunError(f"Expected at least 5 variants, got {len(cards)}.")
    choice = chosen(cards)
    for profile in PROFILES:
        card = cards[choice[profile.name]]
        say(f"  {profile.name}: {card.name}, {profile.words}: {card.model_bytes} bytes, {_score(card):.1%}")
    with RealFleet() as fleet:
        story = _deliver(wanted, fleet, here, cards, choice, task, say, show)
    found = Story(**story, seconds=time.monotonic() - began)
    report = json.dumps(asdict(found), indent=2, default=str)
    (wanted.output / "report.json").write_text(report + "\n", encoding="utf-8")
    return found


def _trained(wanted: Wanted, train: Callable[[SimulationConfig], None], say: Say) -> Path:
    folder = wanted.output / "run"
    if (folder / "model.safetensors").exists():
        say(f"The run in {folder} is trained already.")
        return folder
    say(f"A fleet of virtual devices learns {wanted.task}.")
    train(training(wanted.task, wanted.data, folder))
    return folder


def _deliver(
    wanted: Wanted,
    fleet: RealFleet,
    here: Sequence[Place],
    cards: Mapping[str, Card],
    choice: Mapping[str, str],
    task: Task,
    say: Say,
    show: Show,
) -> dict[str, Any]:
    """Everything with real processes."""
    variants, keys = wanted.output / "variants", str(fleet.folder / "disk")
    fleet.lepton("keys", "init", "--keys", keys, "--no-passphrase")
    folders = [str(variants / name) for name in dict.fromkeys(choice.values())]
    made = fleet.lepton("release", "publish", *folders, "--keys", keys)
    names = {row["variant"]: row["release"] for row in made}
    say(f"{len(names)} variants are signed as releases, by a targets key of their own (TUF).")
    fleet.start_server()
    _join(fleet, here, wanted.task)
    say(f"{len(here)} devices have enrolled over TLS: an agent and a prediction endpoint each.")
    rows = {place.name: task.transform(place.rows).x[0].tolist() for place in here}
    good = {profile: names[variant] for profile, variant in choice.items()}
    with Watching(fleet) as watching, Caller(fleet, rows) as caller:
        canaries = sum(CANARY in place.groups for place in here)
        labels = {release[:12]: variant for variant, release in names.items()}
        rollouts = Rollouts(fleet, watching, show, canaries, labels)
        say("Rollout `good`: canaries, then half, then all.")
        if (end := rollouts.run("good", good))["phase"] != "done":
            raise RunError(f"The good rollout was taken back: {end['cause']}")
        planted = plant(variants / choice["sensor"], wanted.output / "planted", "planted")
        (bad,) = fleet.lepton("release", "publish", str(planted), "--keys", keys)
        labels[bad["release"][:12]] = PLANTED
        say("Rollout `bad`: a variant that computes nonsense, signed like the others, praised by its card.")
        end = rollouts.run("bad", dict.fromkeys(bad["profiles"], bad["release"]))
        if end["phase"] != "rolled-back":
            raise RunError(f"The bad variant was not caught: {end}")
        say(f"Taken back: {end['cause']}")
        found = _settled(fleet, here, good, cards, choice, task)
        memory = _memory(fleet)
    reached = sum(_has_heard(fleet, place, bad["release"]) for place in here)
    _require(found, caller, reached, here)
    plot = _plot(wanted, watching, names, bad["release"], choice)
    return {
        "task": wanted.task,
        "devices": tuple(found),
        "variants": dict(choice),
        "rollouts": tuple(rollouts.ended),
        "reached_by_bad": reached,
        "requests": caller.requests,
        "failed": tuple(caller.failures),
        "memory": memory,
        "plot": plot,
    }


def _join(fleet: RealFleet, here: Sequence[Place], task: str) -> None:
    token = fleet.lepton("token", "create", "--uses", str(len(here)))["token"]
    known = {place.name: place for place in here}

    def join(name: str) -> None:
        fleet.join(name, known[name].groups, settings_of(known[name], task, fleet.folder), token)

    in_parallel(join, list(known), max(2, os.cpu_count() or 1))
    ends = time.monotonic() + PATIENCE_S
    while sum(row["profile"] != "" for row in fleet.lepton("release", "status")) < len(here):
        fleet.check_alive()
        if time.monotonic() > ends:
            raise RunError("Not all devices have reported to the coordinator.")
        time.sleep(LOOK_S)


def _settled(
    fleet: RealFleet,
    here: Sequence[Place],
    good: Mapping[str, str],
    cards: Mapping[str, Card],
    choice: Mapping[str, str],
    task: Task,
    patience_s: float = 120.0,
) -> list[Row]:
    """What every device serves, once those that were told to go back have done so."""
    ends = time.monotonic() + patience_s
    while True:
        found = [inspect(fleet, p, good[p.profile.name], cards[choice[p.profile.name]], task) for p in here]
        if all(row.serving for row in found) or time.monotonic() > ends:
            return found
        time.sleep(LOOK_S)


def _has_heard(fleet: RealFleet, place: Place, release: str) -> bool:
    """Whether a device ever had a release in its hands: it is in its record, or in one of its slots."""
    folder = fleet.state(place.name) / "delivery"
    record = (folder / "record.json").read_text() if (folder / "record.json").exists() else ""
    return release in record or any((folder / "slots").glob(f"{release}*"))


def _require(found: Sequence[Row], caller: Caller, reached: int, here: Sequence[Place]) -> None:
    if wrong := [f"{row.device}: {row.problem}" for row in found if not row.serving]:
        raise RunError(
            f"{len(wrong)} of {len(found)} devices do not serve the right file: {'; '.join(wrong)}"
        )
    if caller.failures:
        words = "; ".join(caller.failures[:5])
        raise RunError(f"{len(caller.failures)} of {caller.requests} predictions failed: {words}")
    canaries = sum(CANARY in place.groups for place in here)
    if not 0 < reached <= canaries:
        raise RunError(f"The bad variant reached {reached} devices, expected 1 to {canaries}.")


def _memory(fleet: RealFleet) -> dict[str, float]:
    """MB resident, the median of each kind of process."""
    kinds: dict[str, list[int]] = {"coordinator": [], "agent": [], "endpoint": []}
    for name, size in fleet.memory().items():
        kind = "coordinator" if name == "server" else "endpoint" if name.endswith("-serve") else "agent"
        kinds[kind].append(size)
    return {kind: float(np.median(sizes)) / 1e6 for kind, sizes in kinds.items() if sizes}


def _plot(
    wanted: Wanted, watching: Watching, names: Mapping[str, str], bad: str, choice: Mapping[str, str]
) -> Path:
    from lepton_simulations.plot import plot_rollouts

    labels = {names[variant][:12]: variant for variant in choice.values()} | {bad[:12]: PLANTED}
    counts = {
        label: [(at, float(counts.get(name, 0))) for at, counts in watching.samples]
        for name, label in labels.items()
    }
    title = f"{wanted.task}: what {wanted.devices} devices serve"
    return plot_rollouts(counts, watching.marks, wanted.devices, wanted.output / "delivery.png", title=title)
