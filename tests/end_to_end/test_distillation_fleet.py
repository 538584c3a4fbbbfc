"""Distillation on real processes: a trained run teaches a student where the rows are, in sums nobody sees."""

import json

import pytest

from lepton_fl.compression.source import taught_on_devices

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

DEVICES = 4
TAUGHT = "lepton_fl.compression.taught:digits"
RUN = f"""
[run]
task = "{{task}}"
rounds = 2
central_data = "built-in"
secure_aggregation = "required"
clip_norm = 10.0
max_weight = 256
{{more}}
[run.cohort]
size = {DEVICES}
deadline_s = 120
fill_wait_s = 60
[run.secure]
min_cohort = {DEVICES}
max_dropout = 0.0
"""
CLIENT = """
[client]
secure_aggregation = "required"
least_cohort = 4
[[tasks]]
reference = "digits"
data = {{ kind = "npz", path = "{path}" }}
[[tasks]]
reference = "lepton_fl.compression.taught:digits"
data = {{ kind = "npz", path = "{path}" }}
"""


def completed(fleet, text):
    run_id = fleet.start_run(text)
    fleet.until(lambda: fleet.show(run_id)["state"] in ("completed", "failed"), "the run ends", 300)
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
    return run_id, shown


def test_a_run_teaches_a_student_on_a_fleet(real_fleet, digit_files, tmp_path):
    fleet = real_fleet
    fleet.make_authority()
    fleet.start_server()
    names = [f"dev{i}" for i in range(DEVICES)]
    fleet.join_all(names)
    for name, rows in zip(names, digit_files, strict=False):
        config = tmp_path / f"{name}.toml"
        config.write_text(CLIENT.format(path=rows))
        fleet.start(name, "client", "run", "--state-dir", str(fleet.state(name)), "--config", str(config))
    # What cannot be is refused before anything is queued.
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(RUN.format(task=TAUGHT, more=""))
    refused = fleet.run("run", "start", str(wrong), "--config", str(fleet.config), check=False)
    assert refused.returncode != 0
    assert "run.teacher" in refused.stderr + refused.stdout
    first, shown = completed(fleet, RUN.format(task="digits", more=""))
    second, taught = completed(fleet, RUN.format(task=TAUGHT, more=f'teacher = "{first}"'))
    ups = [sum(p["bytes_up"] for p in run["participation"]) for run in (shown, taught)]
    assert ups[1] < 0.7 * ups[0]  # of 14,010 weights and of 3,084
    files = {name: tmp_path / f"{name}.safetensors" for name in ("teacher", "student")}
    fleet.run("run", "export", str(files["teacher"]), first, "--best", "--config", str(fleet.config))
    fleet.run("run", "export", str(files["student"]), second, "--config", str(fleet.config))
    cost = taught_on_devices(files["student"])
    assert (cost.run, cost.rounds) == (second, 2)
    assert 0 < cost.bytes_up < cost.bytes_down
    asked = [p for p in taught["participation"] if p["bytes_down"]]
    whole = 4 * (14_010 + 3_084 + 1) * len(asked)
    assert sum(p["bytes_down"] for p in asked) < 0.9 * whole  # the teacher goes to each device once
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[candidates]]\nname = "student"\n'
        f'distil = {{ student = {{ kind = "cnn", width = 8, hidden = 22 }}, weights = "{files["student"]}", '
        "epochs = 0 }\n"
    )
    out = tmp_path / "variants"
    built = fleet.run("variants", "build", str(files["teacher"]), "--recipe", str(recipe), "-o", str(out))
    assert "was taught on the devices" in built.stdout + built.stderr
    card = json.loads((out / "student" / "card.json").read_text())
    assert card["lineage"]["transfer"] == cost.to_json()
