"""Verbs that measure: autoencoders, latents, pipelines, and their speed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli import options
from davae.cli.options import choose_device, give, say, say_result, with_dry_run
from davae.cli.sources import check_sampling, load_sampler
from davae.errors import SettingsError


@with_dry_run
def reconstruct(
    autoencoder: options.AutoencoderPath,
    pictures: options.ImageSource,
    out: options.ResultFolder = Path("runs/reconstruct"),
    size: options.Side = 256,
    limit: options.Limit = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, for the bounds that it sets.")] = None,
    revision: options.Revision = None,
    compare: Annotated[list[Path], typer.Option(help="Folder of another autoencoder. Repeatable.")] = [],
    patch: Annotated[int, typer.Option(min=1, help="Patch size of a transformer, to count tokens.")] = 2,
    ablate_detail: Annotated[bool, typer.Option(help="Also measure with the detail zeroed, and randomised.")] = False,
    with_kid: Annotated[bool, typer.Option("--kid/--no-kid", help="Also measure KID of the reconstructions.")] = False,
    device: options.Device = None,
    rank_timeout: options.RankTimeout = 1800.0,
) -> None:
    """Measure PSNR, SSIM and LPIPS on held-out images, beside the base's bounds and other tokenizers if given."""
    from davae.evaluation.reconstruction import reconstruct
    from davae.evaluation.tokenizers import load_tokenizer, name_folders
    from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
    from davae.pipelines.places import pin

    where = choose_device(device, rank_timeout)
    vae = None if base is None else load_base_vae(pin(base, revision), device=where)
    loaded = load_autoencoder(autoencoder, base=vae, device=where)
    others = {name: load_tokenizer(folder, device=where) for name, folder in name_folders(compare).items()}
    settings: dict[str, Any] = {"size": size, "limit": limit, "patch": patch}
    settings |= {"ablate_detail": ablate_detail, "with_kid": with_kid}
    say_result(
        reconstruct(loaded, pictures, out, base=vae, compare=others, **settings),
        "the numbers are on the page",
    )


@with_dry_run
def latents(
    autoencoders: Annotated[list[Path], typer.Argument(metavar="AUTOENCODER...", help="Folders of AutoencoderDAs.")],
    pictures: options.ImageSource,
    out: options.ResultFolder = Path("runs/latents"),
    size: options.Side = 256,
    limit: options.Limit = None,
    base: Annotated[str | None, typer.Option(help="The base pipeline, which an adapter's autoencoder needs.")] = None,
    revision: options.Revision = None,
    points: Annotated[int, typer.Option(min=16, help="Latent positions that are drawn and compared.")] = 1000,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that are compared.")] = 10,
    seed: options.Seed = 0,
    device: options.Device = None,
) -> None:
    """Draw base and detail latents beside each other (t-SNE, PCA, spectra), and measure how alike they are."""
    from davae.evaluation.latents import draw_latents
    from davae.evaluation.tokenizers import name_folders
    from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
    from davae.pipelines.places import pin

    where = choose_device(device)
    vae = None if base is None else load_base_vae(pin(base, revision), device=where)
    # Two folders of one name are told apart by their parents.
    loaded = {}
    for name, folder in name_folders(autoencoders).items():
        loaded[name] = load_autoencoder(folder, base=vae, device=where)
    settings: dict[str, Any] = {"size": size, "limit": limit, "points": points, "neighbours": neighbours, "seed": seed}
    say_result(draw_latents(loaded, pictures, out, **settings), "the drawings are on the page")


@with_dry_run
def evaluate(
    pipeline: options.PipelinePath,
    pictures: options.ImageSource,
    base: Annotated[
        str | None, typer.Option(help="The base pipeline, to compare with; with --adapter it is PIPELINE.")
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base/--no-base", help="Compare with the base.")] = True,
    revision: options.Revision = None,
    out: options.ResultFolder = Path("runs/evaluate"),
    count: Annotated[int, typer.Option(min=4, help="Images to generate, from as many captions.")] = 1000,
    negative: options.Negative = "",
    steps: options.Steps = 28,
    guidance_scale: options.GuidanceScale = 4.0,
    size: options.ImageSize = None,
    prompt_tokens: options.PromptTokens = 256,
    seed: options.Seed = 0,
    batch: options.BatchSize = 16,
    adapter: options.Adapter = [],
    lora: options.Lora = [],
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    compiled: options.Compile = False,
    device: options.Device = None,
    rank_timeout: options.RankTimeout = 1800.0,
) -> None:
    """Generate from a set's captions, and measure KID against its images, beside base + bicubic and real images."""
    placing: dict[str, Any] = {"device": device, "offload": offload}
    guidance: dict[str, Any] = {"negative": negative, "guidance_scale": guidance_scale}
    check_sampling(pipeline, revision=revision, **guidance, **placing)
    from davae.evaluation.evaluate import evaluate
    from davae.run.storage import read_json

    source: dict[str, Any] = {"lora": lora, "dtype": dtype, "compiled": compiled, **placing}
    source["device"] = choose_device(device, rank_timeout)
    loaded = load_sampler(pipeline, revision=revision, adapter=adapter, **source)

    # Only one of both pipelines is on the device.
    compared = base or (pipeline if adapter else None)

    def load_base() -> Any:
        assert compared is not None, "it is only called then"
        if offload is None:
            loaded.to("cpu")
        return load_sampler(compared, revision=revision if compared == pipeline else None, **source)

    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    if negative:
        settings["negative"] = negative
    making: dict[str, Any] = {"count": count, "batch_size": batch, "notes": {"pipeline": pipeline, "adapter": adapter}}
    comparison = load_base if compared and with_base else None
    page = evaluate(loaded, pictures, out, load_base=comparison, **making, **settings)
    say_result(page, read_json(page.with_name("result.json"))["verdict"])


@with_dry_run
def bench(
    pipeline: Annotated[str | None, typer.Argument(metavar="[PIPELINE]", help="Folder or name on the Hub.")] = None,
    revision: options.Revision = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="The pipeline to compare it with.")] = None,
    geometry: Annotated[str | None, typer.Option(help="Instead of PIPELINE: random weights, such as sd35m.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks that a --geometry keeps.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.jsonl and bench.md.")] = Path("runs/bench"),
    parts: Annotated[
        list[str], typer.Option("--part", help="text, step, decode, to-cpu, whole; default: all. Repeatable.")
    ] = [],
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels; by default the pipeline's.")] = None,
    against_sizes: Annotated[
        list[int], typer.Option("--against-size", help="BASE's; default: equal pixels and tokens. Repeatable.")
    ] = [],
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the part whole.")] = 28,
    prompt_tokens: options.PromptTokens = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved measurements.")] = 7,
    warm_up: Annotated[int, typer.Option(min=1, help="Calls before the measurements.")] = 3,
    whole_repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements of whole; by default --repeats.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the transformers' blocks.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The autoencoders' memory format.")] = False,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on a GPU, float32 on a CPU.")] = None,
    seed: options.Seed = 0,
    adapter: options.Adapter = [],
    device: options.Device = None,
) -> None:
    """Time a pipeline's parts, alone or against its base, beside counted operations and the machine's ceilings."""
    if (pipeline is None) == (geometry is None):
        raise SettingsError("give a PIPELINE, or a --geometry to build one with random weights, and not both")
    from davae.cost.bench import bench, load_pair, make_cases, quicken
    from davae.pipelines.places import pin

    source: dict[str, Any] = {"adapter": adapter, "geometry": geometry, "layers": layers, "dtype": dtype}
    pipeline = pipeline and pin(pipeline, revision)
    pair = load_pair(pipeline, against, parts=parts, device=choose_device(device), **source)
    case: dict[str, Any] = {"batch": batch, "steps": steps, "prompt_tokens": prompt_tokens, "seed": seed}
    cases = make_cases(pair, size=size, against_sizes=against_sizes, **case)
    quicken(pair.values(), compiled=compiled, channels_last=channels_last)
    say(bench(cases, out, parts=parts, repeats=repeats, warm_up=warm_up, whole_repeats=whole_repeats))
    lines = (out / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    give({"table": out / "bench.md", "cases": list(map(json.loads, lines))})
