"""Verbs that make something of a pipeline: the demo, a report, an upgrade, an import, pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli.options import (
    Adapter,
    AutoencoderPath,
    Device,
    DryRun,
    PictureSize,
    PipelinePath,
    PromptTokens,
    RankTimeout,
    Seed,
    device_of,
    quiet,
    say,
    show,
    size_of,
)
from davae.errors import SettingsError


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; it goes on where it stopped.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="tiny (a check that all runs) or short (the demo).")] = "short",
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Do the whole main job on the shipped pair and pictures, and write a page to look at."""
    if dry_run:
        return show({"out": out, "budget": budget, "seed": seed})
    quiet()
    from davae.demo import run_demo

    page = run_demo(out, budget, seed)
    say(page)
    say(page.with_name("figure.png"))


def inspect(
    pipeline: PipelinePath,
    adapter: Adapter = [],  # noqa: B006 - typer reads the default and never changes it
    size: PictureSize = None,
    dry_run: DryRun = False,
) -> None:
    """Print factor, channels, tokens per size and ports of a pipeline, and what an upgrade would change."""
    if dry_run:
        return show({"pipeline": pipeline, "adapter": adapter, "size": size_of(size)})
    from davae.pipelines.inspection import describe
    from davae.pipelines.loading import load_pipeline

    show(describe(load_pipeline(pipeline, adapter=adapter), size_of(size)))


def upgrade(
    pipeline: PipelinePath,
    autoencoder: AutoencoderPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the upgraded pipeline.")],
    portable: Annotated[bool, typer.Option("--portable", help="Loads without davae, by trust_remote_code.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="Upload OUT to NAME on the Hub, too.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Where NAME is new, nobody else sees it.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write the upgraded pipeline, warm-started: a stock pipeline for twice the side length at the same tokens."""
    if dry_run:
        given = {"pipeline": pipeline, "autoencoder": autoencoder, "out": out, "portable": portable}
        return show({**given, "push_to_hub": push_to_hub, "private": private})
    from davae.pipelines.loading import load_autoencoder, load_pipeline
    from davae.pipelines.publishing import check_repository_name, make_upgrade_card, push_folder, write_card
    from davae.pipelines.saving import save_pipeline
    from davae.pipelines.upgrade import upgrade

    if any(Path(read).resolve().is_relative_to(out.resolve()) for read in (pipeline, autoencoder)):
        raise SettingsError(f"OUT={out} holds what is read, and would be replaced: give another folder")
    if push_to_hub is not None:
        check_repository_name(push_to_hub)
    base = load_pipeline(pipeline)
    upgraded = upgrade(base, load_autoencoder(autoencoder, base=base.vae))
    save_pipeline(upgraded, out, portable=portable)
    write_card(out, make_upgrade_card(pipeline, portable=portable))
    say(out)
    if push_to_hub is not None:
        say(push_folder(out, push_to_hub, private=private))


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint: .safetensors, .bin, .pt, .pth or .ckpt.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for what it becomes, and import.json.")],
    kind: Annotated[str | None, typer.Option(help="Layout of the file; by default found by its keys.")] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Latent statistics, mean and std: .pt, .safetensors, .json.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, for the weights of the SD3 set-up.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Folder of the imported DA-VAE, for stage 2.")] = None,
    lora: Annotated[Path | None, typer.Option(help="File of stage 2's LoRA, if FILE holds the ports only.")] = None,
    ema: Annotated[bool, typer.Option(help="Take the moving average where FILE has one.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and report, and write nothing.")] = False,
) -> None:
    """Turn another program's checkpoint into a folder of diffusers' or davae's, and account for every key."""
    quiet()
    from davae.pipelines.importing.kinds import import_checkpoint

    report = import_checkpoint(
        file, out, kind=kind, stats=stats, base=base, autoencoder=autoencoder, lora=lora, ema=ema, dry_run=dry_run
    )
    say(report.to_text())
    if not dry_run:
        say(out)


def generate(
    pipeline: PipelinePath,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One picture is made for each.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their page.")] = Path("runs/generate"),
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 4.0,
    size: PictureSize = None,
    prompt_tokens: PromptTokens = 256,
    seed: Seed = 0,
    adapter: Adapter = [],  # noqa: B006 - typer reads the default and never changes it
    lora: Annotated[
        str | None, typer.Option(help="A LoRA of the base, or of this model: file, folder or name.")
    ] = None,
    device: Device = None,
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Generate pictures from prompts."""
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size_of(size)}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    if dry_run:
        read = {"pipeline": pipeline, "adapter": adapter, "lora": lora}
        return show({**read, "prompts": prompts, "out": out, **settings})
    from davae.evaluation.generation import generate
    from davae.pipelines.base_lora import load_base_lora
    from davae.pipelines.loading import load_pipeline
    from davae.run.ranks import join_ranks

    join_ranks(rank_timeout)
    loaded = load_pipeline(pipeline, adapter=adapter, device=device_of(device))
    if lora is not None:
        load_base_lora(loaded, lora)
    say(generate(loaded, prompts, out, **settings))
