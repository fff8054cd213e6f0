"""The results of stage 2: a stock pipeline, an adapter, their model cards, result.json."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from davae.pipelines.adapter import save_adapter
from davae.pipelines.publishing import make_model_card, write_card
from davae.pipelines.saving import save_pipeline
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.state import TrainingState


def save_upgrade(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: FinetuneRecipe,
    targets: Sequence[str],
    *,
    base: str,
    base_sha256: str,
) -> None:
    """Write the stock pipeline with LoRA fused and, unless everything was trained, the adapter beside it."""
    pipeline.transformer.eval()
    if recipe.trained != "full":
        layers = targets if recipe.trained == "layers" else ()
        save_adapter(folder / "adapter", pipeline, base=name_base(base), base_sha256=base_sha256, layers=layers)

    # A stock pipeline has no LoRA layers.
    if recipe.trained == "lora":
        pipeline.transformer.fuse_lora(safe_fusing=True)
        pipeline.transformer.unload_lora()
    save_pipeline(pipeline, folder / "pipeline")


def name_base(base: str) -> str:
    """The base for other people: the last part of a folder's path, or its name on the Hub."""
    return Path(base).name if Path(base).is_dir() else base


def finish_record(state: TrainingState, folder: Path, recipe: FinetuneRecipe, *, base: str, pictures: int) -> None:
    """Write result.json with the last step's losses, and the model cards."""
    losses = read_last_losses(state)
    counts = {"pictures": pictures, "batch_size": recipe.batch_size}
    state.finish(losses, counts=counts)
    write_cards(folder, recipe, base=base, metrics=losses, counts=counts)


def read_last_losses(state: TrainingState) -> dict[str, float | None]:
    """The last line's losses in metrics.jsonl, which a finished run that is started again has, too."""
    path = state.record.metrics_path
    lines = read_metrics(path) if path.exists() else []
    losses = {}
    for name, value in lines[-1].items() if lines else ():
        if name.endswith("loss"):
            losses[name] = value
    return losses


def write_cards(
    folder: Path, recipe: FinetuneRecipe, *, base: str, metrics: dict[str, float | None], counts: dict[str, int]
) -> None:
    """Write a model card into the pipeline's folder and, if there is one, into the adapter's."""
    name = "base" if Path(base).is_dir() else base
    calls = {"pipeline": 'load_pipeline("this folder")', "adapter": f'load_pipeline("{name}", adapter="this folder")'}
    source = Path(recipe.pictures).name or "the set that davae ships (Fluent Emoji 3D, MIT)"
    data = f"{counts['pictures']:,} pictures of {source}"

    # Both cards show the same facts and their own line of Python.
    for result, call in calls.items():
        if (folder / result).is_dir():
            usage = f"from davae import load_pipeline\n\npipe = {call}"
            card = make_model_card(recipe, usage=usage, base=base, data=data, metrics=metrics, counts=counts)
            write_card(folder / result, card)
