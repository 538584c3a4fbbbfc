"""Which combinations of a guarantee and a run are refused when the configuration is loaded.

spec = PrivacySpec(mechanism="blt", clip_norm=0.5, epsilon=8.0, delta=1e-6, population=100_000,
                   min_separation=100, max_participations=20)
refuse_conflicts(spec, run, secure_aggregation=False)      # ConfigError names every conflict
"""

from collections.abc import Iterable
from math import ceil

from lepton_fl.errors import ConfigError
from lepton_fl.plan import PrivacySpec, RunSpec


def refuse_conflicts(
    spec: PrivacySpec,
    run: RunSpec,
    *,
    secure_aggregation: bool,
    central_evaluation: bool = False,
    also: Iterable[str] = (),
) -> None:
    """Refuse a run in which the guarantee would not be true.

    Args:
        spec: the guarantee.
        run: of which it is promised.
        secure_aggregation: whether the coordinator sees sums only.
        central_evaluation: whether models are evaluated on public rows, and on no device.
        also: further reasons to refuse, which the caller has found.

    Raises:
        ConfigError: names every conflict at once.
    """
    asked = ceil(run.cohort.size * run.cohort.over_selection)
    needed = asked * spec.min_separation
    found = {
        f"aggregation.name={run.aggregation.name!r} is no sum, so one device may move it by more than its "
        "clip: use aggregation.name='mean', which the clip bounds": not run.aggregation.is_sum,
        "mode='buffered' has no rounds to account for: use mode='synchronous'": run.mode == "buffered",
        "weighting='examples' lets one device count for many; use 'equal', or privacy.weight_cap": (
            run.weighting != "equal"
        ),
        "local.control_variates sends a second vector outside the clip: remove it, local.proximal_mu also "
        "holds drift back": run.local.control_variates,
        f"clip_norm={run.clip_norm:g} differs from privacy.clip_norm={spec.clip_norm:g}: remove clip_norm": (
            run.clip_norm not in (0.0, spec.clip_norm) and spec.unit == "device"
        ),
        "trust='distributed' needs secure aggregation: set secure_aggregation='required'": (
            spec.trust == "distributed" and not secure_aggregation
        ),
        "evaluate_every > 0 would release metrics that are not accounted for; evaluate on central_data": (
            run.evaluate_every > 0 and not central_evaluation and not run.local.personal
        ),
        "local.personal is evaluated on devices, whose counts are not accounted for: set evaluate_every=0": (
            run.evaluate_every > 0 and bool(run.local.personal)
        ),
        f"{asked} devices a round, each at most every {spec.min_separation} rounds, need a population of "
        f"{needed}, not {spec.population}: lower min_separation or cohort.size": 0 < spec.population < needed,
    }
    conflicts = [why for why, is_so in found.items() if is_so] + list(also)
    if conflicts:
        raise ConfigError("This run cannot be private: " + "; ".join(conflicts) + ".")
