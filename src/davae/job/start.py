"""`davae init`: looks at the base, the images and the machine, and writes the recipe of a job."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from jinja2 import Environment, PackageLoader, StrictUndefined

from davae import assets
from davae.backbones import backbone_of
from davae.cost.geometry import Geometry, read_geometry
from davae.cost.workload import count_parameters
from davae.data.pictures import MIN_PICTURE_SIDE
from davae.data.sources import are_too_many, open_pictures
from davae.data.survey import survey
from davae.errors import CheckpointError, DataError, SettingsError
from davae.evaluation.reconstruction import measure
from davae.evaluation.tokenizers import make_tokenizer
from davae.job.doctor import list_devices
from davae.job.estimate import Estimate, check_disk, estimate_job, in_words, size_in_words
from davae.job.plan import Request, choose_size, fit_time, parse_memory, plan_job
from davae.job.recipe import JobRecipe
from davae.job.trial import try_job
from davae.job.verdicts import judge_base
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_base_vae
from davae.pipelines.folders import check_reads_prompts
from davae.pipelines.loading import load_pipeline
from davae.pipelines.places import fetch_files, find_on_hub
from davae.run.progress import announce
from davae.run.ranks import Ranks
from davae.run.storage import write_atomically
from davae.training.recipes import PicturesRecipe
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import name_base

# Images that the base's autoencoder renders as a trial.
RENDERED = 16
FEW = 30
HUB = "https://huggingface.co"
# Parameters of a transformer from which a CPU takes weeks.
LARGE = 500_000_000
# Column of the notes in a recipe.
NOTES_AT = 38
DEFAULT_TOKENS = FinetuneRecipe.model_fields["prompt_tokens"].default


@dataclass(frozen=True)
class Start:
    """The screen of `davae init`: lines with names, warnings, and the recipe's path."""

    lines: dict[str, str]
    warnings: list[str]
    path: Path

    def to_text(self) -> str:
        """One screen."""
        width = max(map(len, self.lines)) + 2
        text = [f"{name:<{width}}{line}" for name, line in self.lines.items()]
        return "\n".join([*text, *(f"warning: {warning}" for warning in self.warnings)])


def start_job(
    base: str, pictures: str, out: Path, *, memory: str | None, hours: float | None, size: int | None, force: bool
) -> Start:
    """Write the recipe `out` for these images and this base, after timing three steps of each stage here.

    Args:
        base: folder or Hub name of the base pipeline; "" is the shipped one.
        pictures: what `davae.data.sources.open_pictures` opens.
        out: the recipe's file, which must not be there yet.
        memory: of the GPU on which the job will run, such as "24GB"; None is this machine's.
        hours: that the job may take; None is as many as the images are good for.
        size: of the upgraded images in pixels; None is chosen by the base and the images.
        force: write the recipe, too, if the base's own autoencoder cannot render these images.

    Raises:
        SettingsError: the recipe is there already, the base cannot render these images or needs more memory.
        DataError: the images cannot be used.
        DavaeError: errors of the base and of storage.
    """
    if out.exists():
        raise SettingsError(f"{out} is there already, and is not written over: give another --out, or remove it")
    device = list_devices()[-1]
    available = device["memory_bytes"] if memory is None else parse_memory(memory)

    # The base's configs, then the images, then the base's autoencoder on them: each may end this early.
    geometry = open_base(base, out)
    check_reads_prompts(base or assets.base_pipeline())
    classes = backbone_of(geometry.transformer).classes
    chosen = choose_size(geometry, list_sides(pictures, classes=classes), size)
    facts = look_at(pictures, chosen, classes=classes)
    rendered, warnings = judge_renderings(base, pictures, chosen, force=force)

    # A recipe for the memory, three steps of each stage, and then as many steps as the time allows.
    count = len(open_pictures(pictures, size=chosen, split="train", classes=classes))
    wanted = plan_job(Request(base, pictures, chosen, count, available), geometry)
    pipeline = load_pipeline(name_base(wanted.stage_two))
    wanted = with_prompt_tokens(wanted, pipeline, pictures)
    announce("three steps of each stage are timed")
    with tempfile.TemporaryDirectory() as folder:
        trial = try_job(wanted, pipeline, Path(folder))
    recipe = fit_time(wanted, hours, lambda recipe: estimate_job(recipe, trial, pipeline, count))
    estimate = estimate_job(recipe, trial, pipeline, count)
    check_disk(out.absolute().parent, estimate.disk_bytes)

    # The file, and the screen.
    write_atomically(out, render(recipe, estimate, out, device["name"], facts).encode())
    warnings += warn(facts, recipe, wanted, device["device"], geometry)
    lines = {
        "base": f"{Path(base).name or 'the shipped one'}, from {chosen // 2} to {chosen} px at equal tokens",
        "images": describe_images(facts, count),
        "autoencoder": rendered,
        "machine": f"{device['name']}, {device['precision']}; planned for {size_in_words(available)}",
        **describe_recipe(recipe),
        "takes": estimate.to_text(),
        "recipe": str(out),
    }
    return Start(lines, warnings, out)


def describe_recipe(recipe: JobRecipe) -> dict[str, str]:
    """The lines about steps and batches."""
    one, two = recipe.stage_one, recipe.stage_two
    batches = [f"{stage.batch_size} x {stage.gradient_accumulation}" for stage in (one, two)]
    again = ", with gradient checkpointing" if two.gradient_checkpointing else ""
    return {
        "steps": f"stage 1 {one.steps:,}, stage 2 {two.steps:,}",
        "batches": f"stage 1 {batches[0]} images, stage 2 {batches[1]}{again}",
    }


def open_base(base: str, beside: Path) -> Geometry:
    """The base's models without weights, from its configs; a gated base says how to be let in, before anything else."""
    hub = find_on_hub(base) if base else None
    if hub is not None:
        try:
            fetch_files(hub, ("model_index.json",))
        except CheckpointError as error:
            if isinstance(error.__cause__, GatedRepoError):
                page = f"{HUB}/{hub.repository}"
                raise CheckpointError(
                    f"{base} is gated: open {page}, accept its licence there, then log in here with hf auth login (or "
                    "set HF_TOKEN), and run this again"
                ) from error
            raise
    return read_geometry(base, beside)


def list_sides(pictures: str, *, classes: bool) -> list[int]:
    """The shorter sides of all images that can be read, in pixels."""
    entries = open_pictures(pictures, size=MIN_PICTURE_SIDE, classes=classes).entries
    return [min(entry.width, entry.height) for entry in entries]


def look_at(pictures: str, size: int, *, classes: bool) -> dict[str, Any]:
    """The facts of `davae data inspect`; refuses a set that both stages would refuse."""
    facts = survey(open_pictures(pictures, size=size, classes=classes))
    unreadable = facts["refused"]["unreadable"]
    share = PicturesRecipe.model_fields["max_unreadable"].default
    if not facts["pictures"] or are_too_many(unreadable, facts["pictures"] + unreadable, share):
        raise DataError(
            f"{unreadable} of {facts['pictures'] + unreadable} images in {pictures} cannot be read, which is too many: "
            "mend or remove them; davae data inspect lists them with reasons"
        )
    return facts


def judge_renderings(base: str, pictures: str, size: int, *, force: bool) -> tuple[str, list[str]]:
    """How well the base's own autoencoder renders some of the images at full size; refuses one that cannot."""
    device = Ranks().device
    vae = load_base_vae(base or str(assets.base_pipeline()), device=device)
    chosen = open_pictures(pictures, size=size, captions=False, limit=RENDERED).sound()
    values = measure(chosen, {"base": make_tokenizer(vae)}, lpips=LPIPS.alex().to(device))["base"]
    verdict, will_do = judge_base(values["psnr"], values["lpips"])

    numbers = f"{values['psnr']:.1f} dB, LPIPS {values['lpips']:.3f} on {len(chosen)} of them"
    sentence = f"the base's own autoencoder {verdict}: {numbers}"
    if not will_do and not force:
        raise SettingsError(
            f"{sentence}. An upgrade keeps this autoencoder's latents: choose a base that was trained on such images, "
            "or give --force to write the recipe all the same"
        )
    return sentence, [] if will_do else [f"{sentence}, and an upgrade keeps its latents"]


def with_prompt_tokens(recipe: JobRecipe, pipeline: DiffusionPipeline, pictures: str) -> JobRecipe:
    """Small bases, which have seen short prompts only, get the length of the longest caption."""
    tokenizers = [
        part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None
    ]
    if recipe.stage_two.trained != "layers" or not tokenizers:
        return recipe
    captions = open_pictures(pictures, size=recipe.stage_two.size).captions
    longest = max(len(tokenizer(caption).input_ids) for tokenizer in tokenizers for caption in captions)
    tokens = min(recipe.stage_two.prompt_tokens, longest)
    return replace(recipe, stage_two=recipe.stage_two.model_copy(update={"prompt_tokens": tokens}))


def describe_images(facts: dict[str, Any], training: int) -> str:
    """Usable and refused images, with the reasons."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["refused"]["kinds"].items())
    refused = f"{facts['refused']['pictures']} refused" + (f" ({kinds})" if kinds else "")
    return f"{facts['pictures']} usable, {training} of them to train on and the rest held out; {refused}"


def warn(facts: dict[str, Any], recipe: JobRecipe, wanted: JobRecipe, device: str, geometry: Geometry) -> list[str]:
    """What a user should know before spending hours."""
    warnings = []

    # The images.
    if facts["pictures"] < FEW:
        warnings.append(f"{facts['pictures']} images are few: the upgrade learns their detail, and little beyond them")
    if facts["soft"] > facts["pictures"] // 2:
        warnings.append(f"{facts['soft']} images are soft: they have little detail that half their size would not show")
    if facts["captions"]["repeated"] > facts["pictures"] // 2:
        warnings.append("most captions are repeated: prompts have little to tell images apart")

    # The time, the machine and the base.
    for name in ("stage_one", "stage_two"):
        asked, given = getattr(wanted, name).steps, getattr(recipe, name).steps
        if given < asked:
            title = name.replace("_one", " 1").replace("_two", " 2")
            warnings.append(
                f"the time allows {given:,} of {asked:,} steps of {title}: give more --hours for more detail"
            )
    if device == "cpu" and count_parameters(geometry.transformer) > LARGE:
        warnings.append("there is no GPU, and this base is large: run the recipe on a machine with one")
    if backbone_of(geometry.transformer).advice:
        warnings.append(backbone_of(geometry.transformer).advice)
    return warnings


def write_setting(value: Any, name: str, note: str = "") -> str:
    """A line of TOML; numbers, texts and lists are written as in JSON."""
    line = f"{name} = {json.dumps(value, ensure_ascii=False)}"
    return f"{line:<{NOTES_AT}}  # {note}" if note else line


def render(recipe: JobRecipe, estimate: Estimate, path: Path, machine: str, facts: dict[str, Any]) -> str:
    """The recipe as commented TOML."""
    environment = Environment(loader=PackageLoader("davae.job"), undefined=StrictUndefined, trim_blocks=True)
    environment.filters["setting"] = write_setting
    two = recipe.stage_two

    # Comments behind settings.
    notes = {
        "layers": "the weights of these layers themselves, as the transformer is small",
        "lora": "both latent ports, and a LoRA of the transformer",
    }
    longest = "as long as the longest caption" if two.prompt_tokens < DEFAULT_TOKENS else "as the stock pipeline pads"

    return (
        environment.get_template("recipe.toml").render(
            title=f"{Path(two.base or 'the shipped pair').name} upgraded to {two.size} px with {two.pictures}",
            machine=machine,
            path=path,
            one=recipe.stage_one,
            two=two,
            results=recipe.results,
            pictures_note=f"{facts['pictures']} usable images",
            one_time=f"about {in_words(estimate.seconds['stage 1'])}",
            two_time=f"about {in_words(estimate.seconds['stage 2'])}, validation pictures included",
            trained_note=notes[two.trained],
            tokens_note=longest,
        )
        + "\n"
    )
