"""Verbs that measure: autoencoders, latents, pipelines, and their speed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli.options import (
    Adapter,
    AutoencoderPath,
    Device,
    DryRun,
    Pictures,
    PictureSize,
    PipelinePath,
    PromptTokens,
    RankTimeout,
    Seed,
    Size,
    device_of,
    quiet,
    say,
    show,
    size_of,
)


def reconstruct(
    autoencoder: AutoencoderPath,
    pictures: Pictures,
    out: Annotated[Path, typer.Option(help="Folder for the numbers and their page.")] = Path("runs/reconstruct"),
    size: Annotated[int, typer.Option(min=1, help="Side of the pictures in pixels.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures.")] = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, for the bounds that it sets.")] = None,
    compare: Annotated[
        list[Path], typer.Option(help="Folder of another autoencoder: AutoencoderKL, -Tiny, -DC or -DA. Repeatable.")
    ] = [],  # noqa: B006 - as above
    patch: Annotated[int, typer.Option(min=1, help="Patch size of a transformer, to count tokens.")] = 2,
    ablate_detail: Annotated[bool, typer.Option(help="Also with the detail zeroed, and randomised.")] = False,
    kid: Annotated[bool, typer.Option(help="Also measure KID of the reconstructions.")] = False,
    device: Device = None,
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Measure PSNR, SSIM and LPIPS on held-out pictures; with --base and --compare beside other tokenizers."""
    settings: dict[str, Any] = {"size": size, "limit": limit, "patch": patch}
    settings |= {"ablate_detail": ablate_detail, "with_kid": kid}
    if dry_run:
        given = {"autoencoder": autoencoder, "pictures": pictures, "out": out, "base": base, "compare": compare}
        return show({**given, **settings})
    from davae.evaluation.reconstruction import reconstruct
    from davae.evaluation.tokenizers import load_tokenizers
    from davae.pipelines.loading import load_autoencoder, load_base_vae
    from davae.run.ranks import join_ranks

    join_ranks(rank_timeout)
    where = device_of(device)
    vae = None if base is None else load_base_vae(base, device=where)
    loaded = load_autoencoder(autoencoder, base=vae, device=where)
    others = load_tokenizers(compare, device=where)
    say(reconstruct(loaded, pictures, out, base=vae, compare=others, **settings))


def latents(
    autoencoders: Annotated[list[Path], typer.Argument(metavar="AUTOENCODER...", help="Folders of AutoencoderDAs.")],
    pictures: Pictures,
    out: Annotated[Path, typer.Option(help="Folder for the plots, the numbers and their page.")] = Path("runs/latents"),
    size: Annotated[int, typer.Option(min=1, help="Side of the pictures in pixels.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures.")] = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, which an adapter's autoencoder needs.")] = None,
    points: Annotated[int, typer.Option(min=16, help="Latent positions that are drawn and compared.")] = 1000,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that are compared.")] = 10,
    seed: Seed = 0,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Draw base and detail latents beside each other (t-SNE, PCA, spectra), and say how alike they are in numbers."""
    settings: dict[str, Any] = {"size": size, "limit": limit, "points": points, "neighbours": neighbours, "seed": seed}
    if dry_run:
        return show({"autoencoders": autoencoders, "pictures": pictures, "out": out, "base": base, **settings})
    from davae.evaluation.latents import draw_latents
    from davae.evaluation.tokenizers import folder_names
    from davae.pipelines.loading import load_autoencoder, load_base_vae

    where = device_of(device)
    vae = None if base is None else load_base_vae(base, device=where)
    names = folder_names(autoencoders)
    folders = zip(names, autoencoders, strict=True)
    loaded = {name: load_autoencoder(path, base=vae, device=where) for name, path in folders}
    say(draw_latents(loaded, pictures, out, **settings))


def evaluate(
    pipeline: PipelinePath,
    pictures: Pictures,
    out: Annotated[Path, typer.Option(help="Folder for the numbers and their page.")] = Path("runs/evaluate"),
    count: Annotated[int, typer.Option(min=4, help="Pictures to generate, from as many captions.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 4.0,
    size: PictureSize = None,
    prompt_tokens: PromptTokens = 256,
    seed: Seed = 0,
    adapter: Adapter = [],  # noqa: B006 - typer reads the default and never changes it
    device: Device = None,
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Generate from the pictures' captions and measure KID against the pictures."""
    settings: dict[str, Any] = {"count": count, "steps": steps, "guidance_scale": guidance_scale}
    settings |= {"size": size_of(size), "prompt_tokens": prompt_tokens, "seed": seed}
    if dry_run:
        return show({"pipeline": pipeline, "adapter": adapter, "pictures": pictures, "out": out, **settings})
    from davae.evaluation.generation import evaluate
    from davae.pipelines.loading import load_pipeline
    from davae.run.ranks import join_ranks

    join_ranks(rank_timeout)
    loaded = load_pipeline(pipeline, adapter=adapter, device=device_of(device))
    say(evaluate(loaded, pictures, out, **settings))


def bench(
    pipeline: Annotated[str | None, typer.Argument(metavar="[PIPELINE]", help="As above; not with --geometry.")] = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="A pipeline that it is compared with.")] = None,
    geometry: Annotated[str | None, typer.Option(help="Instead: random weights of this size, such as sd35m.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks that a --geometry keeps.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.jsonl and bench.md.")] = Path("runs/bench"),
    part: Annotated[list[str], typer.Option(help="Of text, step, decode, to-cpu, whole; all. Repeatable.")] = [],  # noqa: B006
    size: Size = None,
    against_size: Annotated[list[int], typer.Option(help="Of BASE; equal pixels and equal tokens. Repeatable.")] = [],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps, of the whole.")] = 28,
    prompt_tokens: PromptTokens = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, interleaved.")] = 7,
    warm_up: Annotated[int, typer.Option(min=1, help="Calls before them.")] = 3,
    whole_repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements of the whole, after one call; as --repeats.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformers' blocks.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Of the autoencoders' weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on a GPU, float32 on a CPU.")] = None,
    seed: Seed = 0,
    adapter: Adapter = [],  # noqa: B006 - typer reads the default and never changes it
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Time a pipeline's parts, alone or against its base, beside what is counted and what the machine can do."""
    source: dict[str, Any] = {"against": against, "adapter": adapter, "geometry": geometry, "layers": layers}
    source |= {"parts": part, "dtype": dtype}
    case: dict[str, Any] = {"size": size, "against_sizes": against_size, "batch": batch, "steps": steps}
    case |= {"prompt_tokens": prompt_tokens, "seed": seed}
    levers = {"compiled": compile, "channels_last": channels_last}
    counts: dict[str, Any] = {"repeats": repeats, "warm_up": warm_up, "whole_repeats": whole_repeats}
    if dry_run:
        return show({"pipeline": pipeline, **source, **case, **levers, **counts, "out": out})
    quiet()
    from davae.cost.bench import bench, cases_of, load_pair, quicken

    pair = load_pair(pipeline, device=device_of(device), **source)
    cases = cases_of(pair, **case)
    quicken(pair.values(), **levers)
    say(bench(cases, out, parts=part, **counts))
