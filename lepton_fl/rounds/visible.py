"""What a coordinator can and cannot see of a run, in plain words, and under which assumptions."""

from math import ceil

from lepton_fl.plan import RunSpec


def what_is_seen(spec: RunSpec) -> tuple[str, ...]:
    """One sentence each; for ``lepton run show`` and logs."""
    return (*(_secure(spec) if spec.secure_aggregation == "required" else _plain(spec)), *_privacy(spec))


def _plain(spec: RunSpec) -> tuple[str, ...]:
    kept = (
        "adds it up and does not store it"
        if spec.aggregation.is_sum
        else "holds it in memory until the round ends"
    )
    rows_apart = spec.local.example_privacy is not None
    which = ("neither", "nor") if rows_apart else ("both", "and")
    return (
        f"The coordinator can see every device's update in every round; it {kept}.",
        f"It sees who takes part and when; of each device {which[0]} its number of examples {which[1]} its "
        "training loss.",
        "It cannot see any device's data; an update can still tell something of them.",
        "Assumption: who runs the coordinator is trusted with single updates.",
    )


def _secure(spec: RunSpec) -> tuple[str, ...]:
    lost = f"{100 * spec.secure.max_dropout:g} %"
    return (
        *_sums(spec),
        "It cannot see any single device's update, example count or loss.",
        "It sees who takes part and when, who drops out, and how long messages are.",
        f"If more than {lost} of a sum's devices are lost, there is no sum and nothing is revealed.",
        "Devices evaluate nothing: a single device's counts would be seen.",
        "Assumption: whom devices trust is decided by an authority, or a list of keys, that is not the "
        "coordinator's; else it could invent devices.",
        "Assumption: fewer than a third of a sum's devices side with the coordinator.",
        *_mask_graph(spec),
        "Not covered: what the sums themselves say (differential privacy does that), and devices that send "
        "false updates.",
    )


def _sums(spec: RunSpec) -> tuple[str, ...]:
    sizes = spec.secure.sums(spec.most_asked)
    least = spec.secure.least_survivors(max(spec.secure.min_cohort, min(sizes) if len(sizes) > 1 else 0))
    if len(sizes) == 1:
        return (
            f"The coordinator learns one sum per round, of the {_what(spec)} of at least "
            f"{max(least, spec.cohort.min_reports, spec.noise_survivors)} devices.",
        )
    return (
        f"The coordinator learns {len(sizes)} sums per round of {spec.most_asked} devices, each of the "
        f"{_what(spec)} of at least {max(least, spec.noise_survivors)}: a device hides in its own sum.",
    )


def _what(spec: RunSpec) -> str:
    """What is added up: of a private run, the updates, and what travels behind them under the same noise."""
    return "updates, example counts and losses" if spec.privacy is None else "updates"


def _mask_graph(spec: RunSpec) -> tuple[str, ...]:
    if spec.secure.mask_graph == "complete":
        return ()
    return (
        "EXPERIMENTAL: the hidden mask graph (secure.mask_graph) is argued and simulated, and nobody outside "
        "this project has reviewed it. Devices whose owners have not allowed it refuse.",
    )


def _privacy(spec: RunSpec) -> tuple[str, ...]:
    if spec.privacy is None:
        return ("No differential privacy: the model may remember something of single devices.",)
    if spec.privacy.unit == "example":
        return (
            "Differential privacy (example level, local) bounds what every update tells about a single row "
            "of a device's data, also to the coordinator; each device keeps its own budget and may refuse.",
        )
    bounds = (
        f"Differential privacy ({spec.privacy.unit} level, {spec.privacy.trust}) bounds what the models "
        "tell about one of them.",
    )
    return (*bounds, *_shares(spec))


def _shares(spec: RunSpec) -> tuple[str, ...]:
    """Of noise that devices add."""
    privacy, least = spec.privacy, spec.noise_survivors
    if privacy is None or not least:
        return ()
    colluders = ceil(privacy.colluders / privacy.min_survivors * least - 1e-9)
    return (
        "Every sum has the noise of its devices in it before anybody sees it: the coordinator, too, is told "
        "no more than the bound allows.",
        f"The noise is made for {least} devices of a sum; with fewer there is no sum.",
        f"Assumption: at most {colluders} of them tell the coordinator their share of the noise."
        if colluders
        else "Assumption: none of them tells the coordinator its share of the noise (privacy.colluders).",
    )
