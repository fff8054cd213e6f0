"""Both stages on the tiny pair: their recipes, and what their runs leave."""

from pathlib import Path

from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_two_recipe import FinetuneRecipe
from hashes import digests

ADVERSARIAL = LossWeights(
    adversarial=0.1, adversarial_start=2, adversarial_ramp_steps=4, adaptive_adversarial=True, adaptive_alignment=True
)
SHARED = {"size": 64, "batch_size": 2, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 3}


def autoencoder_recipe(base: Path, pictures: Path, **changes: object) -> AutoencoderRecipe:
    """10 steps, two epochs."""
    own = {"crop": 32, "detail_channels": 12, "steps": 10, "fit_pictures": 4, "evaluate_every": 4}
    return AutoencoderRecipe(**{"base": str(base), "pictures": str(pictures), **SHARED, **own, **changes})


STAGE_ONE_STEPS = 41


def stage_one_recipe(base: Path, pictures: Path, **changes: object) -> AutoencoderRecipe:
    """A run that is long enough to learn something."""
    settings = {
        "base": str(base),
        "pictures": str(pictures),
        "size": 64,
        "crop": 32,
        "detail_channels": 12,
        "fit_pictures": 8,
        "steps": STAGE_ONE_STEPS,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.8,
        "precision": "float32",
        "checkpoint_every": 20,
        "evaluate_every": 20,
        "heldout_pictures": 3,
        "calibration_pictures": 100,
    }
    return AutoencoderRecipe(**(settings | changes))


def finetune_recipe(base: Path, autoencoder: Path, pictures: Path, **changes: object) -> FinetuneRecipe:
    """12 steps, two epochs."""
    own = {"autoencoder": str(autoencoder), "steps": 12, "lora_rank": 2, "detail_warmup_steps": 4, "prompt_tokens": 8}
    return FinetuneRecipe(**{"base": str(base), "pictures": str(pictures), **SHARED, **own, **changes})


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, sound or not; 0 if there is none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-????????")), default=0)


def steps_done(folder: Path) -> int:
    """How many steps metrics.jsonl tells of, if each has a line."""
    path = folder / "metrics.jsonl"
    return max((line["step"] + 1 for line in read_metrics(path)), default=0) if path.exists() else 0


def outcome(folder: Path) -> dict[str, object]:
    """SHA-256 of every tensor file outside and inside the last checkpoint, and the metrics without their times.

    The cache is left out: what is in which of its files depends on when a run was killed (test_caching.py).
    """
    last = folder / "checkpoints" / f"step-{newest_step(folder):08d}"
    tensors = {name: value for name, value in digests(folder).items() if not name.startswith(("checkpoints", "cache"))}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
    return {"tensors": tensors, "last": (last.name, digests(last)), "metrics": lines}
