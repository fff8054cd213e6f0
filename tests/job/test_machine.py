"""`davae recipes` and `davae doctor`, and a base that is gated: what is here, and what they say."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from davae import assets
from davae.cli import main
from davae.job.doctor import list_extras
from davae.job.plan import USABLE
from davae.job.recipe import load_job
from hub_server import RefusingHub, serving

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_all_recipes_that_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = sorted(path.name for path in (ROOT / "recipes").glob("*.toml"))
    assert included == {f"recipes/{name}": f"davae/assets/recipes/{name}" for name in names}

    main_without_exit("recipes", "--json")
    assert sorted(f"{name}.toml" for name in json.loads(capsys.readouterr().out)) == names


def main_without_exit(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (None, 0)


@pytest.mark.parametrize("name", ["sd35m_1024", "sd35m_2048.toml"])
def test_a_recipe_is_printed_as_it_is_and_runs_as_a_job(name: str, capsys, tmp_path: Path) -> None:
    main_without_exit("recipes", name)
    printed = capsys.readouterr()
    path = assets.recipes() / f"{name.removesuffix('.toml')}.toml"
    assert printed.out == path.read_text()
    assert printed.err.endswith("next: davae run mine.toml\n")
    job = load_job(path, tmp_path)
    assert Path(job.stage_two.autoencoder) == tmp_path / "autoencoder" / "autoencoder"


def test_an_unknown_recipe_names_those_there_are(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["recipes", "sd35"])
    assert "allowed are imagenet512, sd35m_1024, sd35m_2048" in capsys.readouterr().err


def test_an_extra_that_is_missing_comes_with_its_command() -> None:
    rows = {row["extra"]: row for row in list_extras()}
    assert rows["datasets"]["missing"] == []
    assert rows["eval"]["command"] == "pip install 'davae[eval]'"
    assert "dev" not in rows


def run_against(server: RefusingHub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "davae", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_a_gated_base_says_how_to_be_let_in_before_anything_is_read(tmp_path: Path) -> None:
    with serving(RefusingHub("GatedRepo")) as server:
        arguments = ("init", "--base", "someone/gated", "--pictures", tmp_path / "none", "--out", tmp_path / "a.toml")
        answer = run_against(server, tmp_path, *arguments)
    assert answer.returncode == 4
    assert "open https://huggingface.co/someone/gated, accept its licence there" in answer.stderr
    assert "hf auth login" in answer.stderr


def test_doctor_tells_all_as_json(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    main_without_exit("doctor", "--json")
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["hub"] == {"login": None, "says": "a token is there, and not tried: HF_HUB_OFFLINE is set"}
    assert {row["for"] for row in facts["disk"]} == {"runs", "Hub's cache"}

    # What fits follows from the memory.
    needed = [row["needed_bytes"] for row in facts["fits"]]
    assert needed[0] < 1 << 30 < needed[1] < 20 << 30 < needed[2]
    memory = facts["devices"][-1]["memory_bytes"]
    assert [row["fits"] for row in facts["fits"]] == [each <= USABLE * memory for each in needed]
    assert printed.err.endswith("next: davae init --base BASE --pictures FOLDER\n")
