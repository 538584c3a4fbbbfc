"""What is said about what a coordinator sees fits the run."""

from lepton_fl.plan import RunSpec
from lepton_fl.rounds.visible import what_is_seen


def text(**settings) -> str:
    return " ".join(what_is_seen(RunSpec.model_validate({"task": "digits", **settings})))


def test_a_plain_run_hides_no_update_and_says_so():
    assert "can see every device's update" in text()
    assert "does not store it" in text()
    assert "holds it in memory" in text(aggregation={"name": "median"}, weighting="equal")


def test_a_secure_run_names_its_least_sum_and_its_assumptions():
    found = text(secure_aggregation="required", clip_norm=1.0, weighting="equal", cohort={"size": 20})
    assert "of at least 12 devices" in found
    assert "cannot see any single device's update" in found
    assert found.count("Assumption") == 2
    assert "can see every" not in found


def test_a_private_run_says_against_whom():
    privacy = {"noise_multiplier": 1.0, "clip_norm": 1.0}
    assert "device level, central" in text(privacy=privacy, evaluate_every=0)
    assert "No differential privacy" in text()


def test_a_run_of_several_sums_and_an_experiment_are_named():
    settings = {"secure_aggregation": "required", "clip_norm": 1.0, "weighting": "equal"}
    found = text(**settings, cohort={"size": 2500}, secure={"mask_graph": "hidden"})
    assert "3 sums per round of 2500 devices" in found
    assert "of at least 584:" in found
    assert "EXPERIMENTAL" in found
    assert "EXPERIMENTAL" not in text(**settings, cohort={"size": 1000})


def test_noise_of_devices_is_named_with_how_many_must_add_it():
    strong = {"privacy": {"preset": "strong", "colluders": 0.1}, "cohort": {"size": 100}}
    found = text(**strong, evaluate_every=0)
    assert "of the updates of at least 70 devices" in found
    assert "made for 70 devices" in found
    assert "at most 10 of them tell" in found
    assert "none of them tells" in text(privacy="strong", cohort={"size": 100}, evaluate_every=0)
