"""A run goes on with the inputs that it began with; others are refused and named."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from davae.data import order
from davae.data.sources import open_pictures
from davae.data.split import heldout
from davae.errors import CheckpointError
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import finetune
from hashes import digests
from rank_forks import run_ranks
from stages import autoencoder_recipe, finetune_recipe
from trials import Trials

Change = Callable[[Path], object]
Program = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Finished:
    """A finished run, with the folder that holds everything that it began with."""

    program: Program
    inputs: Path
    run: Path

    def copy(self, target: Path, *, stopped: bool = False) -> tuple[Path, Path]:
        """Copies of the inputs and of the run; a stopped one has neither results nor the last checkpoint."""
        inputs, run = shutil.copytree(self.inputs, target / "inputs"), shutil.copytree(self.run, target / "run")
        if stopped:
            (run / "result.json").unlink()
            for name in ("pipeline", "adapter", "autoencoder"):
                shutil.rmtree(run / name, ignore_errors=True)
            shutil.rmtree(max((run / "checkpoints").glob("step-*")))
        return inputs, run


def run_stage_one(inputs: Path, run: Path) -> Path:
    short = {"steps": 2, "checkpoint_every": 1, "evaluate_every": 2, "heldout_pictures": 2, "calibration_pictures": 4}
    return train_autoencoder(autoencoder_recipe(inputs / "base", inputs / "pictures", **short), run)


def run_stage_two(inputs: Path, run: Path, **changes: object) -> Path:
    settings = {"steps": 2, "checkpoint_every": 1, "validation_steps": 1, **changes}
    return finetune(finetune_recipe(inputs / "base", inputs / "autoencoder", inputs / "pictures", **settings), run)


@pytest.fixture(scope="module")
def inputs(base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "inputs"
    for name, source in {"base": base_folder, "autoencoder": autoencoder_folder, "pictures": picture_folder}.items():
        shutil.copytree(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def two(inputs: Path) -> Finished:
    run_stage_two(inputs, inputs.with_name("two"))
    return Finished(run_stage_two, inputs, inputs.with_name("two"))


@pytest.fixture(scope="module")
def one(inputs: Path) -> Finished:
    run_stage_one(inputs, inputs.with_name("one"))
    return Finished(run_stage_one, inputs, inputs.with_name("one"))


def nudge(weights: Path) -> None:
    """Change the last bit of one number in a file of weights."""
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    values = tensors[name].view(-1).clone()
    values[-1] *= 1 + 1e-6
    tensors[name] = values.view(tensors[name].shape)
    save_file(tensors, weights, metadata={"format": "pt"})


def set_value(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def redraw(pictures: Path) -> None:
    """Other bytes under the same name, in all pictures."""
    for path in pictures.glob("*.png"):
        redraw_one(path)


def redraw_one(path: Path) -> None:
    image = Image.open(path)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)


def swap(pictures: list[Path]) -> None:
    """Every picture and its caption under the name of another one."""
    for path in pictures:
        for suffix in (".png", ".txt"):
            path.with_suffix(suffix).rename(path.with_suffix(f"{suffix}.old"))
    for path, other in zip(pictures, reversed(pictures), strict=True):
        for suffix in (".png", ".txt"):
            path.with_suffix(f"{suffix}.old").rename(other.with_suffix(suffix))


def tell_otherwise(pictures: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.write_text(path.read_text() + " at night")


CHANGES: dict[str, Change] = {
    "autoencoder": lambda inputs: nudge(inputs / "autoencoder" / "diffusion_pytorch_model.safetensors"),
    "transformer of the base": lambda inputs: nudge(
        inputs / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    ),
    "scheduler of the base": lambda inputs: set_value(
        inputs / "base" / "scheduler" / "scheduler_config.json", "shift", 2.5
    ),
    "text_encoder of the base": lambda inputs: nudge(inputs / "base" / "text_encoder" / "model.safetensors"),
    "base": lambda inputs: nudge(inputs / "base" / "vae" / "diffusion_pytorch_model.safetensors"),
    "pictures": lambda inputs: redraw(inputs / "pictures"),
    "order of the pictures": lambda inputs: swap(sorted((inputs / "pictures").glob("*.png"))),
    "captions or classes": lambda inputs: tell_otherwise(inputs / "pictures"),
}
STAGES = {
    "one": ("base", "pictures", "order of the pictures"),
    "two": tuple(name for name in CHANGES if name != "base"),
}


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in STAGES.items() for name in names])
def test_a_changed_input_is_named_and_nothing_is_written(
    stage: str, name: str, stopped: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    finished: Finished = request.getfixturevalue(stage)
    inputs, run = finished.copy(tmp_path, stopped=stopped)
    before = digests(run, "*")
    CHANGES[name](inputs)
    with pytest.raises(CheckpointError, match=f"Changed since then: .*{name}"):
        finished.program(inputs, run)
    assert digests(run, "*") == before


def change_something(draw: random.Random, inputs: Path) -> str:
    """One input changes, or something beside them that is none; returns what."""
    pictures = sorted((inputs / "pictures").glob("*.png"))
    chosen, other = draw.sample(pictures, 2)
    weights = draw.choice(sorted(inputs.rglob("*.safetensors")))
    changes: dict[str, Callable[[], object]] = {
        f"a weight in {weights.relative_to(inputs)}": lambda: nudge(weights),
        f"a pixel of {chosen.name}": lambda: redraw_one(chosen),
        f"no {chosen.name}": chosen.unlink,
        f"a copy of {chosen.name}": lambda: shutil.copy(chosen, chosen.with_stem("copy")),
        f"{chosen.name} and {other.name} swapped": lambda: swap([chosen, other]),
        f"the caption of {chosen.name}": lambda: chosen.with_suffix(".txt").write_text("another one"),
        "the scheduler": lambda: CHANGES["scheduler of the base"](inputs),
        "a note beside the pictures": lambda: (inputs / "pictures" / "notes.md").write_text("seen"),
        "another time of all files": lambda: [os.utime(path, (1, 1)) for path in inputs.rglob("*")],
    }
    name = draw.choice(sorted(changes))
    changes[name]()
    return name


@pytest.mark.soak("R21", ci=8, full=400)
def test_a_change_at_random_is_refused_or_changes_no_bit(
    one: Finished, two: Finished, tmp_path: Path, trials: Trials
) -> None:
    for number, draw in enumerate(trials):
        finished, stopped = draw.choice([one, two]), draw.random() < 0.5
        inputs, run = finished.copy(tmp_path / str(number), stopped=stopped)
        before, what = digests(run, "*"), f"{change_something(draw, inputs)}: {trials.replay}"
        result, refusal = None, ""
        try:
            result = finished.program(inputs, run)
        except CheckpointError as error:
            refusal = str(error)
        if result is None:
            assert "Changed since then: " in refusal or "pictures, and there are" in refusal, what
            assert digests(run, "*") == before, what
        else:
            assert digests(result) == digests(finished.run / result.name), what


def test_places_and_intervals_may_change(two: Finished, tmp_path: Path) -> None:
    """The same bits from other places, with other intervals and with activations that are computed again."""
    inputs, run = two.copy(tmp_path, stopped=True)
    changes = {"checkpoint_every": 7, "log_every": 2, "validation_every": 2, "max_unreadable": 0.5}
    run_stage_two(inputs, run, **changes, gradient_checkpointing=True, cache=str(tmp_path / "cache"))
    assert digests(run / "pipeline") == digests(two.run / "pipeline")


def test_without_a_record_a_place_is_fixed_but_for_a_slash(two: Finished, tmp_path: Path) -> None:
    inputs, run = two.copy(tmp_path)
    (run / "inputs.json").unlink()
    with pytest.raises(CheckpointError, match=r"another recipe, .* where pictures = .*base = .*autoencoder = "):
        run_stage_two(inputs, run)
    places = {name: f"{two.inputs / name}/" for name in ("base", "autoencoder", "pictures")}
    finetune(finetune_recipe(**places, steps=2, validation_steps=1), run)
    assert digests(run / "pipeline") == digests(two.run / "pipeline")


def test_a_run_of_an_older_davae_gains_the_record_and_then_holds_to_it(two: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(two.run, tmp_path / "run")
    (run / "inputs.json").unlink()
    run_stage_two(two.inputs, run)
    assert json.loads((run / "inputs.json").read_text()) == json.loads((two.run / "inputs.json").read_text())
    inputs = shutil.copytree(two.inputs, tmp_path / "inputs")
    tell_otherwise(inputs / "pictures")
    with pytest.raises(CheckpointError, match=r"Changed since then: captions or classes\. "):
        run_stage_two(inputs, run)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_keeps_the_order_that_it_began_with(
    stage: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both orders are the same for few pictures, so here only one picture is few."""
    finished: Finished = request.getfixturevalue(stage)
    monkeypatch.setattr(order, "SHUFFLED", 1)
    inputs, run = finished.copy(tmp_path / "old", stopped=True)
    record = json.loads((run / "pictures.json").read_text())
    assert record.pop("order") == 2

    # Without a version in its record a run has the old order.
    (run / "pictures.json").write_text(json.dumps(record))
    result = finished.program(inputs, run)
    assert digests(result) == digests(finished.run / result.name)
    assert json.loads((run / "pictures.json").read_text()) == {**record, "order": 1}

    # A new one has not.
    inputs, run = finished.copy(tmp_path / "new", stopped=True)
    assert digests(finished.program(inputs, run)) != digests(finished.run / result.name)

    # One that is not known yet is refused.
    set_value(run / "pictures.json", "order", 3)
    with pytest.raises(CheckpointError, match="has the order 3, davae knows 1 to 2: update davae"):
        finished.program(inputs, run)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_keeps_the_split_that_it_began_with(
    stage: str, inputs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of equal pictures under two names a former version held one out and trained on the other."""
    finished: Finished = request.getfixturevalue(stage)
    doubled = shutil.copytree(inputs, tmp_path / "inputs")
    first, second = (next(n for n in map(str, range(99)) if heldout(n) is held) for held in (False, True))
    for name in (first, second):
        source = min((doubled / "pictures").glob("*.png"))
        for suffix in (".png", ".txt"):
            shutil.copy(source.with_suffix(suffix), doubled / "pictures" / f"{name}{suffix}")
    finished.program(doubled, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "pictures.json").read_text())["split"] == 2

    # A record without the rule is one of before.
    former = open_pictures(doubled / "pictures", size=64, split="train", captions=False, keys_alone=True)
    assert (first in former.keys, second in former.keys) == (True, False)
    record = {"count": len(former), "sha256_of_names": hashlib.sha256("\n".join(former.keys).encode()).hexdigest()}
    (tmp_path / "new" / "inputs.json").unlink()
    (tmp_path / "new" / "pictures.json").write_text(json.dumps(record))
    finished.program(doubled, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "pictures.json").read_text()) == {**record, "order": 1, "split": 1}


def test_a_stage_one_run_needs_no_more_what_its_start_holds(one: Finished, tmp_path: Path) -> None:
    inputs, run = one.copy(tmp_path, stopped=True)
    shutil.rmtree(inputs / "base")
    one.program(inputs, run)
    assert digests(run / "autoencoder") == digests(one.run / "autoencoder")


@pytest.mark.parametrize(
    ("change", "name"), [(tell_otherwise, "captions or classes"), (redraw, "pictures")], ids=["captions", "pictures"]
)
def test_ranks_that_see_different_sets_stop(
    change: Change, name: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(inputs, tmp_path / "inputs")
    change(other / "pictures")

    def program() -> None:
        run_stage_two(other if os.environ["RANK"] == "1" else inputs, tmp_path / "run")

    assert run_ranks(program, 2) == [4, 4]
    assert capfd.readouterr().err.count(f"rank 1 differs from rank 0 in: {name}") == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
