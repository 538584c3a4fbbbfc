"""What of a result is simulated, in words: the fleet, time, faults, the engine, privacy.

    simulated(config, devices=539)
    # ("539 virtual devices: natural users of the data", "no virtual time: ...", "drop-out 10 %", ...)

A figure without these words would claim more than was done.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lepton_simulations.config import SimulationConfig

PRIVACY_IS_SIMULATED = (
    "privacy is simulated: devices, server and noise share one process and one seed, so it protects nobody; "
    "epsilon is what a real fleet with these settings would spend"
)
_PARTITIONS = {
    "natural": "the data set's own users",
    "iid": "rows dealt at random",
    "dirichlet": "Dirichlet({alpha:g}) over classes",
    "shards": "{shards_per_client} class shards each",
    "owned": "class {owned_class} with the last {owners:.0%} of the devices only",
}
_SHARES = {
    "drop_out": "drop-out",
    "drop_download": "drop-out while downloading",
    "drop_training": "drop-out while training",
    "drop_upload": "drop-out while uploading",
    "drop_adverts": "drop-out before the roster",
    "drop_shares": "drop-out before sharing keys",
    "drop_consents": "drop-out before signing",
    "drop_reveals": "drop-out before revealing",
    "bad_shares": "devices that deal garbage",
    "wrong_shares": "devices that reveal false shares",
    "repeats": "repeated messages",
    "stragglers": "stragglers",
    "corrupt": "corrupt devices",
    "corrupt_data": "devices with bad data",
}
_PRIVATE = ("privacy", "secure_aggregation", "secagg")  # settings that protect devices in a real fleet


def simulated(config: SimulationConfig, devices: int, engine: str = "") -> tuple[str, ...]:
    """One short phrase for each thing that is simulated.

    Args:
        config: the scenario.
        devices: how many there are.
        engine: the tier that trains; '' = as configured.
    """
    body = config.to_json()
    split = config.data.partition
    how = _PARTITIONS[split.kind].format_map(split.model_dump())
    labels = [f"{devices} virtual devices: {how}"]
    if config.replay.file:
        labels.append("times and drop-outs replayed from a journal")
    else:
        labels += _time(body["devices"])
        labels += _faults(body["faults"])
    labels.append(f"engine {engine or config.engine.tier}")
    labels += _privacy(body)
    return tuple(labels)


def one_line(labels: tuple[str, ...]) -> str:
    """All of them, as in a footer."""
    return "; ".join(labels)


def _time(devices: Mapping[str, Any]) -> Iterator[str]:
    classes = devices.get("classes") or ()
    if classes:
        kinds = len(classes)
        yield f"virtual time of {kinds} device class{'es' if kinds > 1 else ''}"
    else:
        yield "no virtual time: devices answer at once"


def _faults(faults: Mapping[str, Any]) -> Iterator[str]:
    found = [f"{name} {100 * faults[key]:.3g} %" for key, name in _SHARES.items() if faults.get(key)]
    if faults.get("malicious"):
        found.append(f"{100 * faults['malicious']:.3g} % malicious ({faults['attack'].replace('_', ' ')})")
    if faults.get("crash_rounds"):
        many = len(faults["crash_rounds"])
        found.append(f"{many} coordinator crash{'es' if many > 1 else ''}")
    yield from found or ["no faults"]


def _privacy(body: Mapping[str, Any]) -> Iterator[str]:
    run = body["run"]
    if run.get("secure_aggregation") == "required":
        how = body.get("engine", {}).get("secure_aggregation", "ideal")
        yield f"secure aggregation: {'the whole protocol' if how == 'full' else 'its ideal functionality'}"
    settings = [run.get(key) or body.get(key) for key in _PRIVATE]
    if any(_is_on(setting) for setting in settings):
        yield PRIVACY_IS_SIMULATED
        if privacy := run.get("privacy"):
            yield (
                f"what is protected: one {privacy['unit']}, trust {privacy['trust']}, "
                f"adjacency {privacy['adjacency']}, delta {privacy['delta']:g}"
            )
    else:
        yield "privacy: none"


def _is_on(setting: object) -> bool:
    """Whether a section that may be there says anything: noise, a mechanism, or simply true."""
    if isinstance(setting, Mapping):
        if "enabled" in setting:
            return bool(setting["enabled"])
        return any(
            bool(setting.get(key)) for key in ("mechanism", "noise_multiplier", "epsilon", "target_epsilon")
        )
    return bool(setting) and setting != "off"
