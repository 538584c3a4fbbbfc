"""What an operator asks for is checked before it is queued."""

import pytest

from lepton_fl.errors import ConfigError
from lepton_server.requests import run_spec


def test_a_buffered_run_is_refused_with_where_it_works(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[run]\ntask = "digits"\nmode = "buffered"\nweighting = "equal"\n')
    with pytest.raises(ConfigError, match="synchronous") as caught:
        run_spec(path, {})
    assert "lepton simulate" in caught.value.hint


def test_a_private_run_is_refused_with_all_that_stands_in_its_way(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\ntask = "digits"\nweighting = "examples"\n[run.privacy]\nepsilon = 8.0\ndelta = 1e-5\n'
    )
    with pytest.raises(ConfigError, match="weighting") as caught:
        run_spec(path, {})
    assert "evaluate_every" in str(caught.value)
    path.write_text(
        '[run]\ntask = "digits"\nevaluate_every = 0\n[run.privacy]\nepsilon = 8.0\ndelta = 1e-5\n'
    )
    assert run_spec(path, {}).clip_norm == 1.0


@pytest.mark.parametrize(
    ("local", "words"),
    [("control_variates = true\nmomentum = 0.9", "plain SGD"), ('personal = [""]', "personal")],
)
def test_settings_that_do_not_go_together_are_named(tmp_path, local, words):
    path = tmp_path / "run.toml"
    path.write_text(f'[run]\ntask = "digits"\n[run.local]\n{local}\n')
    with pytest.raises(ConfigError, match=words):
        run_spec(path, {})


def test_a_secure_run_needs_an_authority_and_never_becomes_a_plain_one(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\ntask = "digits"\nsecure_aggregation = "required"\nclip_norm = 1.0\nweighting = "equal"\n'
        "cohort.size = 20\n"
    )
    with pytest.raises(ConfigError, match="enrolment authority") as refused:
        run_spec(path, {}, authority=False)
    assert "lepton authority create" in refused.value.hint
    assert run_spec(path, {}).secure_aggregation == "required"
