"""`davae runs`: how far runs are, and in what they differ."""

import json
from pathlib import Path

import pytest

from davae.cli import main
from davae.errors import CheckpointError, SettingsError
from davae.run.comparison import differences, find_runs, read_run, to_text
from davae.run.record import RunRecord, alone
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe
from forks import exit_code, forked


def run(folder: Path, recipe: FinetuneRecipe | AutoencoderRecipe, lines: list[dict], *, values: dict | None = None):
    record = RunRecord(folder)
    record.start(recipe, device="cpu", precision="float32")
    for line in lines:
        record.append(line)
    if values is not None:
        record.finish(values, recipe=recipe, device="cpu", seed=0, counts={})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    lines = [{"step": step, "loss": 1.0 / (step + 1), "learning_rate": 1e-4, "loss_hex": "0x1p0"} for step in (0, 10)]
    first = FinetuneRecipe(steps=40, learning_rate=1e-3, lora_targets=("to_q",))
    run(folder / "a" / "one", first, lines)
    run(folder / "b", first.model_copy(update={"lora_rank": 8, "steps": 11}), lines, values={"loss": 0.0625})
    run(folder / "c", AutoencoderRecipe(steps=7), [{"step": 3, "loss": 2.0}, {"step": 3, "heldout_psnr": 21.123456}])
    (folder / "no run").mkdir()
    (folder / "no run" / "recipe.toml").write_text("steps = 3\n")
    return folder


def test_runs_are_found_below_the_folders_and_say_how_far_they_are(runs: Path) -> None:
    one, two, three = find_runs([runs, runs / "b"])
    assert [Path(run.folder).name for run in (one, two, three)] == ["one", "b", "c"]
    assert (one.state, one.step, one.steps, one.values) == ("stopped", 11, 40, {"loss": pytest.approx(1 / 11)})
    assert (two.state, two.step, two.steps, two.values) == ("finished", 11, 11, {"loss": 0.0625})
    assert (three.step, three.values) == (4, {"loss": 2.0, "heldout_psnr": 21.123456})
    assert three.settings["loss.l1"] == AutoencoderRecipe().loss.l1
    with pytest.raises(CheckpointError, match=r"no run: no run, which is a folder with recipe\.toml and environment"):
        find_runs([runs / "no run"])


def test_a_run_whose_lock_is_held_is_running(runs: Path) -> None:
    def look() -> None:
        assert read_run(runs / "b").state == "running"

    with alone(runs / "b"):
        assert exit_code(forked(look)) == 0
    assert read_run(runs / "b").state == "finished"


def test_only_settings_that_differ_are_shown(runs: Path) -> None:
    one, two = find_runs([runs / "a", runs / "b"])
    assert differences([one, two]) == {"lora_rank": [32, 8], "steps": [40, 11]}
    assert differences([one]) == {}
    text = to_text([one, two])
    assert "learning_rate" not in text
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert table[0] == ["run", "state", "steps", "loss"]
    assert table[2] == [one.folder, "stopped", "11/40", "0.090909"]
    assert table[3] == [two.folder, "finished", "11/11", "0.0625"]
    assert ["lora_rank", "32", "8"] in table
    assert "| setting " not in to_text([one])


def test_the_verb_prints_the_table_or_json(runs: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["runs", str(runs)])
    assert len([line for line in capsys.readouterr().out.splitlines() if "| stopped " in line]) == 2
    with pytest.raises(SystemExit):
        main(["runs", str(runs / "b"), "--json"])
    (facts,) = json.loads(capsys.readouterr().out)["runs"]
    assert facts["values"] == {"loss": 0.0625}
    assert facts["settings"]["lora_targets"] == ["to_q"]


DAMAGE = {
    "recipe.toml": b"steps =",
    "environment.json": b"\0\0",
    "result.json": b'{"values": 3}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_are_listed(runs: Path, name: str, capsys) -> None:
    (runs / "b" / name).write_bytes(DAMAGE[name])
    one, two, three = find_runs([runs])
    assert (one.state, two.state, three.state) == ("stopped", "unreadable", "stopped")
    assert name in two.problem
    with pytest.raises(CheckpointError if name != "recipe.toml" else SettingsError, match=name):
        read_run(runs / "b")

    with pytest.raises(SystemExit) as left:
        main(["runs", str(runs)])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert text.count("| stopped ") == 2
    assert f"{two.folder}: {two.problem}" in text


def test_a_damaged_log_hides_no_run(runs: Path) -> None:
    with (runs / "c" / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\n\n\xff\xfe\n3\n{"step": 5, "lo\n{"loss": 7.0}\n{"step": 6, "loss": 1.0}\n')
    one, two, three = find_runs([runs])
    assert (three.state, three.step, three.values["loss"]) == ("stopped", 7, 1.0)
    assert not one.problem + two.problem + three.problem
