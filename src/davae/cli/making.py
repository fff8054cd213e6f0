"""Verbs that make pipelines and images: the demo, a description, an upgrade, an import, images from prompts."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli import options
from davae.cli.checks import check_settings
from davae.cli.options import choose_device, give, print_rows, read_result, say, say_next, say_result, with_dry_run
from davae.cli.sources import check_sampling, load_sampler, read_prompts, repeat_command
from davae.errors import SettingsError


@with_dry_run
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that stopped resumes.")] = Path("runs/demo"),
    budget: Annotated[
        str,
        typer.Option(help="short (stage 2 alone), both (a short stage 1, too) or tiny (a check that everything runs)."),
    ] = "short",
    seed: options.Seed = 0,
) -> None:
    """Upgrade, fine-tune, generate and measure with the shipped pair, and write a page."""
    from davae.demo.run import run_demo

    page = run_demo(out, budget, seed)
    say(page)
    say(page.with_name("figure.png"))
    give({"page": page, "figure": page.with_name("figure.png"), **read_result(out)})


@with_dry_run
def try_(
    prompts: Annotated[list[str], typer.Argument(metavar="[PROMPT]...", help="One row of images for each.")] = [],
    out: options.ResultFolder = Path("runs/try"),
    seed: options.Seed = 0,
) -> None:
    """Show the shipped base enlarged beside its upgrade, for your own prompts, without training."""
    from davae.data.avatar_colors import find_missing_colors
    from davae.demo.prompts import list_ignored_words, try_prompts

    for prompt in prompts:
        if ignored := list_ignored_words(prompt):
            say(f"{prompt!r}: not known, and ignored: {', '.join(ignored)}")
        for remark in find_missing_colors(prompt):
            say(f"{prompt!r}: {remark}")
    page, figure = try_prompts(prompts, out, seed=seed)
    say(page)
    say(figure)
    give({"page": page, "figure": figure, **read_result(out)})


@with_dry_run
def inspect(
    pipeline: options.PipelinePath,
    revision: options.Revision = None,
    adapter: options.Adapter = [],
    size: options.ImageSize = None,
) -> None:
    """Print a pipeline's factor, channels, tokens per size and ports, and what an upgrade would change."""
    from davae.pipelines.inspection import describe, describe_folder, describe_on_hub, tabulate
    from davae.pipelines.places import find_on_hub, pin

    # Configs and headers tell it all; adapters are applied to weights.
    place = pin(pipeline, revision)
    hub = find_on_hub(place)
    if adapter:
        from davae.pipelines.loading import load_pipeline

        facts = describe(load_pipeline(place, adapter=adapter), size)
    else:
        facts = describe_folder(Path(place), size) if hub is None else describe_on_hub(hub, size)
    print_rows(tabulate(facts))
    give(facts)
    if facts["upgraded"]:
        return say_next(f"{pipeline} is upgraded", f'davae generate {pipeline} "a prompt"')
    return say_next(f"{pipeline} can be upgraded", f"davae init --base {pipeline} --pictures FOLDER")


@with_dry_run
def upgrade(
    pipeline: options.PipelinePath,
    autoencoder: options.AutoencoderPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the upgraded pipeline.")],
    revision: options.Revision = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Let OUT load without davae, by trust_remote_code.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="Also upload OUT to the Hub as NAME.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make NAME private if it is new.")] = False,
) -> None:
    """Write the upgraded, warm-started pipeline: a stock pipeline for twice the side length at the same tokens."""
    if any(Path(folder).resolve().is_relative_to(out.resolve()) for folder in (pipeline, autoencoder)):
        raise SettingsError(f"OUT={out} holds an input of the upgrade, and would be replaced: give another folder")
    from davae.pipelines.autoencoders import load_autoencoder
    from davae.pipelines.loading import load_pipeline
    from davae.pipelines.places import pin
    from davae.pipelines.publishing import check_repository_name, make_upgrade_card, push_folder, write_card
    from davae.pipelines.saving import save_pipeline
    from davae.pipelines.upgrade import upgrade
    from davae.run.storage import check_writable

    # Refuse before anything is loaded; OUT is made beside its place, and takes it when it is complete.
    check_writable(out.resolve().parent)
    if push_to_hub is not None:
        check_repository_name(push_to_hub)

    # Upgrade, write, and upload if asked.
    base = load_pipeline(pin(pipeline, revision))
    upgraded = upgrade(base, load_autoencoder(autoencoder, base=base.vae))
    save_pipeline(upgraded, out, portable=portable)
    write_card(out, make_upgrade_card(pipeline, portable=portable))
    say(out)
    url = None if push_to_hub is None else push_folder(out, push_to_hub, private=private)
    give({"pipeline": out, "url": url})
    return say(url) if url else say(f'next: davae generate {out} "a prompt"; davae finetune makes it good')


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint: .safetensors, .bin, .pt, .pth or .ckpt.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the imported model, and import.json.")],
    kind: Annotated[str | None, typer.Option(help="Layout of the file; by default found by its keys.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Latent mean and std: .pt, .safetensors, .json.")] = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, for the weights of the SD3 set-up.")] = None,
    revision: options.Revision = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Folder of the imported DA-VAE, for stage 2.")] = None,
    lora: Annotated[Path | None, typer.Option(help="File of stage 2's LoRA, if FILE holds the ports only.")] = None,
    ema: Annotated[bool, typer.Option(help="Take the moving average where FILE has one.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and report, and write nothing.")] = False,
) -> None:
    """Convert another program's checkpoint to a folder that diffusers or davae loads, and account for every key."""
    from davae.run.storage import check_writable

    check_writable(out)
    check_settings({"file": file, "base": base, "revision": revision})
    from davae.pipelines.importing.kinds import import_checkpoint
    from davae.pipelines.places import pin

    base = base and pin(base, revision)
    report = import_checkpoint(
        file, out, kind=kind, stats=stats, base=base, autoencoder=autoencoder, lora=lora, ema=ema, dry_run=dry_run
    )
    say(report.to_text())
    if not dry_run:
        say(out)
    give({"out": None if dry_run else out, **report.to_dict()})


@with_dry_run
def generate(
    pipeline: options.PipelinePath,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What the images show.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A text file with a prompt on each line.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 1,
    negative: options.Negative = "",
    image: Annotated[Path | None, typer.Option(help="A picture to start from, where diffusers can do that.")] = None,
    strength: Annotated[float, typer.Option(min=0.01, max=1, help="How much of --image changes.")] = 0.6,
    revision: options.Revision = None,
    out: options.ResultFolder = Path("runs/generate"),
    steps: options.Steps = 28,
    guidance_scale: options.GuidanceScale = 4.0,
    size: options.ImageSize = None,
    prompt_tokens: options.PromptTokens = 256,
    seed: options.Seed = 0,
    first_index: Annotated[int, typer.Option(min=0, help="Number of the first image: its noise is of that.")] = 0,
    batch: options.BatchSize = 16,
    adapter: options.Adapter = [],
    lora: options.Lora = [],
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    compiled: options.Compile = False,
    device: options.Device = None,
    rank_timeout: options.RankTimeout = 1800.0,
) -> None:
    """Generate images from prompts."""
    texts = [*(prompts or []), *read_prompts(prompts_file)]
    if not texts:
        raise SettingsError("there is no prompt: give one or more in quotes after PIPELINE, or --prompts FILE")
    if image is not None and int(steps * strength) < 1:
        raise SettingsError(f"strength={strength} of {steps} steps is none: give more of either")
    placing: dict[str, Any] = {"device": device, "offload": offload}
    guidance: dict[str, Any] = {"negative": negative, "guidance_scale": guidance_scale}
    check_sampling(pipeline, texts, revision=revision, **guidance, **placing)
    from davae.data.pictures import read_picture
    from davae.evaluation.generation import generate

    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed, **({"negative": negative} if negative else {})}
    source: dict[str, Any] = {"revision": revision, "adapter": adapter, "lora": lora, "dtype": dtype}
    started = {} if image is None else {"image": image, "strength": strength}
    again = partial(repeat_command, pipeline, {**settings, **source, **started})
    if image is not None:
        settings |= {**started, "image": read_picture(image.read_bytes(), str(image))}

    placing |= {"device": choose_device(device, rank_timeout), "compiled": compiled}
    loaded = load_sampler(pipeline, **source, **placing, from_image=image is not None)
    making: dict[str, Any] = {"count": count, "batch_size": batch, "first_index": first_index, "command": again}
    page = generate(loaded, texts, out, **making, notes={"pipeline": pipeline, **source}, **settings)
    made: dict[str, Any] = {"images": len(texts) * count, "folder": page.parent / "pictures"}
    say_result(page, f"{made['images']} images are in {made['folder']}", made)
