"""Typical mistakes: each is one message that names it, what is allowed and what to type, before anything is loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from davae.cli.checks import check_pictures
from hub_server import RefusingHub, serving

KEPT = Path(__file__).parents[1] / "fixtures" / "0.1.0"
SECONDS = 10.0
"""Of the processor, for a verb that refuses its arguments: 1 to 2 on an idle machine, where loading takes more."""


class Mistake(NamedTuple):
    """A command line in the folder of `places`, its exit code and words of its only message."""

    command: str
    code: int
    words: tuple[str, ...]


MISTAKES = {
    "no such verb": Mistake(
        "train-autoencodre x.toml", 2, ("No such command 'train-autoencodre'", "train-autoencoder")
    ),
    "no such option": Mistake("generate base cat --step 3", 2, ("No such option", "--steps")),
    "no such pipeline": Mistake("generate ./nowhere cat", 4, ("no ./nowhere on this machine", "OWNER/NAME")),
    "an empty folder": Mistake("inspect empty", 4, ("empty is no pipeline", "an empty folder", "save_pretrained")),
    "an autoencoder as a pipeline": Mistake(
        "inspect autoencoder", 4, ("an AutoencoderDA", "davae upgrade BASE autoenc")
    ),
    "an adapter as a pipeline": Mistake("inspect adapter", 4, ("an adapter", "--adapter adapter")),
    "a checkpoint as a pipeline": Mistake(
        "inspect model.safetensors", 4, ("a .safetensors file", "davae import model")
    ),
    "a run as a pipeline": Mistake("generate runs/one cat", 4, ("the folder of a run", "runs/one/autoencoder")),
    "a pipeline without text encoders": Mistake(
        "generate base cat", 4, ("base has no text_encoder, text_encoder_2, tok", "says null", "again with")
    ),
    "a pipeline without text encoders, to serve": Mistake("serve base", 4, ("base has no text_encoder", "says null")),
    "a revision of a folder": Mistake(
        "inspect base --revision v2", 2, ("--revision v2", "on this machine", "leave it out")
    ),
    "a name that is not in the cache": Mistake(
        "inspect someone/tiny", 4, ("someone/tiny is not in this machine's cache", "HF_HUB_OFFLINE", "unset it")
    ),
    "a plain VAE as an autoencoder": Mistake(
        "upgrade base base/vae out", 4, ("a plain AutoencoderKL, not an AutoencoderDA", "davae train-autoencoder")
    ),
    "a pipeline as an autoencoder": Mistake(
        "reconstruct upgraded pictures", 4, ("a pipeline, not an AutoencoderDA", "its autoencoder is in upgraded/vae")
    ),
    "no such autoencoder": Mistake("upgrade base runs/two out", 4, ("there is no runs/two", "runs/NAME/autoencoder")),
    "a run as an autoencoder": Mistake("upgrade base runs/one out", 4, ("its result is runs/one/autoencoder",)),
    "no such pictures": Mistake("reconstruct autoencoder photos", 3, ("there is no photos", "a folder of images")),
    "pictures without a picture": Mistake("evaluate base empty", 3, ("empty has no images", "tar shards")),
    "one picture as a folder": Mistake("data inspect photo.jpg", 3, ("photo.jpg is one image", "give its folder")),
    "OUT is a file": Mistake("upgrade base autoencoder photo.jpg", 2, ("photo.jpg is a file", "another folder")),
    "OUT holds an input": Mistake("upgrade base autoencoder .", 2, ("OUT=. holds an input", "another folder")),
    "a size without its second side": Mistake("generate base cat --size 320x", 2, ("320x", "320x192")),
    "no prompt": Mistake("generate base", 2, ("there is no prompt", "in quotes", "--prompts FILE")),
    "an empty prompt": Mistake("generate base ''", 2, ("prompt 1 is empty",)),
    "no such file of prompts": Mistake(
        "generate base --prompts p.txt", 2, ("--prompts p.txt cannot be read", "text file")
    ),
    "a file without prompts": Mistake("generate base --prompts blank.txt", 2, ("blank.txt has no prompt", "each line")),
    "a negative prompt without guidance": Mistake(
        "generate base cat --negative dog --guidance-scale 1", 2, ("--negative needs --guidance-scale above 1",)
    ),
    "no such LoRA": Mistake("generate base cat --lora style.safetensors", 4, ("no style.safetensors on this machine",)),
    "a LoRA's weight in words": Mistake(
        "generate base cat --lora lora:strong", 2, ("'strong' is no number", "FILE:0.7")
    ),
    "an adapter as a LoRA": Mistake(
        "generate base cat --lora adapter", 2, ("no LoRA but an adapter", "--adapter adapter")
    ),
    "a LoRA as an adapter": Mistake("generate base cat --adapter lora", 4, ("not an adapter", "--lora lora")),
    "no such picture to start from": Mistake(
        "generate base cat --image cat.png", 2, ("cat.png is not on this machine",)
    ),
    "too little strength": Mistake(
        "generate base cat --image photo.jpg --steps 4 --strength 0.1", 2, ("strength=0.1 of 4 steps is none",)
    ),
    "a device that is none": Mistake("generate base cat --device tpu", 2, ("--device tpu", "allowed are gpu", "cuda")),
    "a device that is not here": Mistake("generate base cat --device gpu", 2, ("--device gpu", "Here is cpu", "MPS")),
    "offload without a GPU": Mistake(
        "generate base cat --offload model", 2, ("--offload is for a GPU", "leave it out")
    ),
    "a precision that is none": Mistake("generate base cat --dtype int8", 2, ("'int8' is not one of", "'bfloat16'")),
    "too few images": Mistake("evaluate base pictures --count 2", 2, ("--count", "greater than or equal to 4")),
    "no such recipe": Mistake("finetune mine.toml", 2, ("mine.toml cannot be read", "TOML file")),
    "a recipe in YAML": Mistake("finetune recipe.yaml", 2, ("recipe.yaml is no valid TOML",)),
    "a recipe of stage 1 for stage 2": Mistake(
        "finetune stage1.toml",
        2,
        ("is of stage 1, by its crop, detail_channels", "davae train-autoencoder stage1.toml"),
    ),
    "a recipe of stage 2 for stage 1": Mistake(
        "train-autoencoder stage2.toml", 2, ("is of stage 2, by its lora_rank", "davae finetune stage2.toml")
    ),
    "an unknown key": Mistake("finetune stage2.toml --set lerning_rate=1e-4", 2, ('did you mean "learning_rate"',)),
    "a setting without a value": Mistake("finetune stage2.toml --set steps", 2, ("give it as KEY=VALUE",)),
    "a recipe's pictures are not there": Mistake(
        "train-autoencoder stage1.toml --set pictures=photos", 3, ("there is no photos on this machine",)
    ),
    "a recipe's base is not there": Mistake(
        "finetune stage2.toml --set base=./nowhere", 4, ("no ./nowhere on this machine", "OWNER/NAME")
    ),
    "no such folder of runs": Mistake("runs elsewhere", 4, ("elsewhere: no run",)),
    "nothing to measure": Mistake("bench", 2, ("give a PIPELINE, or a --geometry",)),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have them: a base, an autoencoder, an adapter, a run, and what they take for these."""
    folder = tmp_path_factory.mktemp("places")
    for name, place in {
        "upgraded": KEPT / "upgraded",
        "autoencoder": KEPT / "upgraded" / "vae",
        "adapter": KEPT / "adapter_lora",
        "lora": KEPT / "attention_lora",
    }.items():
        (folder / name).symlink_to(place)
    shutil.copytree(KEPT / "base", folder / "base")
    for name in ("empty", "pictures", "runs/one/autoencoder"):
        (folder / name).mkdir(parents=True)
    (folder / "pictures" / "a.png").touch()
    for name in ("recipe.toml", "environment.json"):
        (folder / "runs" / "one" / name).write_text("{}" if name.endswith("json") else "")

    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "recipe.yaml").write_text("steps: 10\n")
    (folder / "stage1.toml").write_text("steps = 10\ndetail_channels = 16\ncrop = 64\n")
    (folder / "stage2.toml").write_text("steps = 10\nlora_rank = 8\n")
    return folder


def run(command: str, folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The answer of `davae COMMAND`, and the seconds of the processor that it took."""
    environment = {**os.environ, "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", **variables}
    began = os.times()
    answer = subprocess.run(
        f"{sys.executable} -m davae {command}",
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ended = os.times()
    return answer, ended.children_user + ended.children_system - began.children_user - began.children_system


def check(answer: subprocess.CompletedProcess[str], mistake: Mistake) -> None:
    """One message with these words, and nothing of what Python or a library says."""
    message = " ".join(answer.stderr.replace("│", " ").split())
    assert answer.returncode == mistake.code, message
    assert not [words for words in mistake.words if words not in message], message
    assert answer.stderr.startswith("error ") + answer.stderr.count("─ Error ─") == 1, message
    assert len(message) < 700, message
    assert answer.stdout == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_anything_is_loaded(name: str, places: Path) -> None:
    answer, seconds = run(MISTAKES[name].command, places)
    check(answer, MISTAKES[name])
    assert seconds < SECONDS


def test_there_are_thirty() -> None:
    assert len({mistake.command for mistake in MISTAKES.values()}) >= 30


@pytest.mark.parametrize("name", ["a.JPG", "b.tiff", "shards/c.tar.gz", "d.parquet", "saved/data.arrow"])
def test_what_may_hold_pictures_is_let_through(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    check_pictures(tmp_path)


def test_no_runs_yet_is_no_mistake(tmp_path: Path) -> None:
    assert "no runs yet" in run("runs", tmp_path)[0].stderr
    answer, _ = run("runs --json", tmp_path)
    assert (answer.returncode, json.loads(answer.stdout)) == (0, {"runs": []})


def test_a_verb_that_only_lists_works_where_nothing_can_be_written(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "runs" / "one", tmp_path / "runs" / "one")
    assert "runs/one" in run("runs", tmp_path)[0].stdout


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub() -> Iterator[RefusingHub]:
    with serving(RefusingHub()) as server:
        yield server


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("GatedRepo", ("someone/tiny@v2 is gated", "accept its licence", "hf auth login")),
        ("RepoNotFound", ("the Hub knows no someone/tiny", "mend the name")),
        ("RevisionNotFound", ("no revision v2", "commit, tag or branch")),
        ("EntryNotFound", ("has no model_index.json",)),
        ("unreachable", ("not in this machine's cache, and the Hub cannot be reached",)),
    ],
)
def test_what_the_hub_says_is_told_apart(code: str, words: tuple[str, ...], hub: RefusingHub, tmp_path: Path) -> None:
    hub.code = code
    port = 1 if code == "unreachable" else hub.server_address[1]
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    answer, seconds = run("inspect someone/tiny --revision v2", tmp_path, **variables)
    check(answer, Mistake("", 4, words))
    assert seconds < SECONDS
