"""Both stages on several ranks: what one process does, by DDP's means of gradients or with weights sharded by FSDP2."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from davae.data.pictures import read_png
from davae.method.stage_one_loss import adversarial_ramp
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from forks import exit_code, forked
from rank_forks import FSDP2, run_ranks

STEPS = 6
# Without LPIPS, as is `SMOOTH`: where inputs of its max pools and ReLUs differ by rounding, its gradient jumps.
ADVERSARIAL = LossWeights(
    lpips=0.0,
    adversarial=0.1,
    adversarial_start=2,
    adversarial_ramp_steps=4,
    adaptive_adversarial=True,
    adaptive_alignment=True,
    discriminator_learning_rate=1e-5,
)
SMOOTH = LossWeights(lpips=0.0)


@dataclass(frozen=True)
class Stage:
    """A stage as a program of a recipe's folder and number of steps, and what one process made of it."""

    program: Callable[[Path], object]
    whole: Path
    bounds: dict[str, float]


def programs(
    base: Path, autoencoder: Path, pictures: Path, steps: int, loss: LossWeights | None = None
) -> dict[str, Callable[[Path], object]]:
    shared = {"base": str(base), "pictures": str(pictures), "size": 64, "batch_size": 4, "warmup_steps": 2}
    shared |= {"precision": "float32", "steps": steps, "checkpoint_every": 4, "learning_rate": 1e-5}
    shared["log_every"] = 1
    shared["final_learning_rate"] = 1e-6  # rounding errors grow by what a step changes
    one = AutoencoderRecipe(
        **shared, crop=32, detail_channels=12, fit_pictures=4, evaluate_every=5, heldout_pictures=3,
        latent_noise=0.1, detail_dropout=0.2, loss=loss or LossWeights(),
    )  # fmt: skip
    two = FinetuneRecipe(
        **shared, autoencoder=str(autoencoder), lora_rank=2, detail_warmup_steps=4, prompt_tokens=8,
        caption_dropout=0.3, validation_every=5, validation_steps=1,
    )  # fmt: skip
    adversarial = one.model_copy(update={"loss": ADVERSARIAL})
    twice = two.model_copy(update={"trained": "full", "gradient_accumulation": 2})
    return {
        "stage 1": lambda folder: train_autoencoder(one, folder),
        "stage 1, adversarial": lambda folder: train_autoencoder(adversarial, folder),
        "stage 2": lambda folder: finetune(two, folder),
        "stage 2, full, accumulated": lambda folder: finetune(twice, folder),
    }


@pytest.fixture(scope="module")
def stage(request, base_folder, autoencoder_folder, picture_folder, tmp_path_factory) -> Stage:
    program = programs(base_folder, autoencoder_folder, picture_folder, STEPS)[request.param]
    folder = tmp_path_factory.mktemp("one")
    assert exit_code(forked(lambda: program(folder))) == 0
    return Stage(program, folder, ADAPTIVE if "adversarial" in request.param else EXACT)


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, the EMA and moments with them, and of what the run made."""
    files = [*max((folder / "checkpoints").glob("step-*")).glob("*.safetensors"), *folder.glob("autoencoder/*.saf*")]
    files += folder.glob("pipeline/transformer/*.saf*")
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


EXACT = {"loss": 1e-6, "grad_norm": 1e-2}
"""How far logged values of two runs may lie apart, one on one process and one on two."""
ADAPTIVE = {
    "l1": 1e-5,
    "gradient": 1e-5,
    "kl": 1e-5,
    "alignment": 1e-5,
    "adversarial": 1e-4,
    "discriminator": 1e-4,
    "alignment_factor": 1e-2,
    "adversarial_factor": 1e-2,
    "loss": 1e-3,
    "grad_norm": 1e-2,
}
"""The same with adaptive weights. They are ratios of gradients' norms, and L1 and the discriminator's ReLUs let a
gradient jump where an input differs by rounding: the sum of the losses then moves by far more than its parts."""


def assert_alike(folder: Path, whole: Path, steps: int, *, bounds: dict[str, float], weight_bound: float) -> None:
    """Within `bounds` in every step's logged values; in weights, moments and EMA within `weight_bound`."""
    assert len(logged(folder, "loss")) == steps
    for name, bound in bounds.items():
        ours, theirs = logged(folder, name), logged(whole, name)
        assert ours, name
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=bound), name

    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < weight_bound, name


def assert_sum_of_terms(folder: Path) -> None:
    """The total is the sum of the logged terms with their weights and factors, so bounds of these are bounds of it."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert any("adversarial" in line for line in lines)

    for line in lines:
        ramp = adversarial_ramp(
            line["step"], start=ADVERSARIAL.adversarial_start, ramp_steps=ADVERSARIAL.adversarial_ramp_steps
        )
        total = ADVERSARIAL.l1 * line["l1"] + ADVERSARIAL.gradient * line["gradient"] + ADVERSARIAL.kl * line["kl"]
        total += ADVERSARIAL.alignment * line["alignment_factor"] * line["alignment"]
        if "adversarial" in line:
            total += ADVERSARIAL.adversarial * ramp * line["adversarial_factor"] * line["adversarial"]
        assert abs(line["loss"] - total) < 1e-6, line["step"]


NAMES = ["stage 1", "stage 1, adversarial", "stage 2", "stage 2, full, accumulated"]
LONG = [pytest.mark.slow, pytest.mark.timeout(1200)]
BY_DDP = [pytest.param(name, {}, id=f"{name}, DDP") for name in NAMES]
BY_FSDP2 = [
    pytest.param(name, FSDP2, id=f"{name}, FSDP2", marks=LONG if "adversarial" in name else []) for name in NAMES
]


@pytest.mark.parametrize(("stage", "settings"), BY_DDP + BY_FSDP2, indirect=["stage"])
def test_two_ranks_do_what_one_does(stage: Stage, settings: dict[str, str], tmp_path: Path) -> None:
    assert run_ranks(lambda: stage.program(tmp_path), 2, settings) == [0, 0]
    assert_alike(tmp_path, stage.whole, STEPS, bounds=stage.bounds, weight_bound=1e-3)
    if stage.bounds is ADAPTIVE:
        assert_sum_of_terms(tmp_path)
        assert_sum_of_terms(stage.whole)

    kinds = [{key for line in read_metrics(f / "metrics.jsonl") for key in line} for f in (tmp_path, stage.whole)]
    assert kinds[0] == kinds[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path, stage.whole)]
    assert results[0]["values"].keys() == results[1]["values"].keys()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in stage.whole.iterdir()}
    drawn, expected = (sorted((folder / "pictures").glob("*.png")) for folder in (tmp_path, stage.whole))
    assert [path.name for path in drawn] == [path.name for path in expected]
    for ours, theirs in zip(drawn, expected, strict=True):
        assert (read_png(ours).float() - read_png(theirs).float()).abs().mean() < 1
    if (tmp_path / "autoencoder").is_dir():
        load_autoencoder(tmp_path / "autoencoder")
    else:
        load_pipeline(str(tmp_path / "pipeline"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_fifty_steps_of_two_ranks_are_those_of_one(
    name: str, base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    program = programs(base_folder, autoencoder_folder, picture_folder, 50, SMOOTH)[name]
    assert exit_code(forked(lambda: program(tmp_path / "one"))) == 0
    for way, settings in {"DDP": {}, "FSDP2": FSDP2}.items():
        assert run_ranks(lambda way=way: program(tmp_path / way), 2, settings) == [0, 0]
        assert_alike(tmp_path / way, tmp_path / "one", 50, bounds=EXACT, weight_bound=1e-3)
