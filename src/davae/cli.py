"""The command line: verbs that parse, call and print. What they do is in the modules that they import when called."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from davae import __version__
from davae.errors import DavaeError, SettingsError

app = typer.Typer(
    name="davae",
    help="Double the resolution of a latent diffusion pipeline at the same token count.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_stdout = Console(soft_wrap=True, highlight=False)
_stderr = Console(soft_wrap=True, highlight=False, stderr=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, as resolved, and leave.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random number of the run.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's setting.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")]
RunFolder = Annotated[
    Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE; of a section, runs/RECIPE/SECTION.")
]
PipelinePath = Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's folder, or its name on the Hub.")]
AutoencoderPath = Annotated[
    Path, typer.Argument(metavar="AUTOENCODER", help="Folder of a trained AutoencoderDA, or of an adapter.")
]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder, to apply to the (base) pipeline.")]
Device = Annotated[str | None, typer.Option(help="Where it runs, such as cuda; by default a GPU if there is one.")]
PromptTokens = Annotated[int, typer.Option(min=1, max=512, help="Length that T5 pads to.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the pictures in pixels; by default the pipeline's.")]
Pictures = Annotated[Path, typer.Argument(metavar="PICTURES", help="A folder of pictures, or WebDataset shards.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; a user's mistake is its message on stderr and the error's exit code, never a traceback."""
    try:
        app(arguments)
    except DavaeError as error:
        stopped = error.exit_code > 128  # by a signal, with everything saved
        if not stopped:
            _stderr.print("[bold red]error[/]", end=" ")
        _stderr.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        _say(f"davae {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; it goes on where it stopped.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="tiny (a check that all runs) or short (the demo).")] = "short",
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Do the whole main job on the shipped pair and pictures, and write a page to look at."""
    if dry_run:
        return _show({"out": out, "budget": budget, "seed": seed})
    _quiet()
    from davae.demo import run_demo

    page = run_demo(out, budget, seed)
    _say(page)
    _say(page.with_name("figure.png"))


@app.command()
def inspect(pipeline: PipelinePath, adapter: Adapter = None, dry_run: DryRun = False) -> None:
    """Print factor, channels, tokens per size and ports of a pipeline, and what an upgrade would change."""
    if dry_run:
        return _show({"pipeline": pipeline, "adapter": adapter})
    from davae.inspection import describe
    from davae.upgrade import load_pipeline

    _show(describe(load_pipeline(pipeline, adapter=adapter)))


@app.command()
def train_autoencoder(
    recipe: RecipePath,
    out: RunFolder = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    dry_run: DryRun = False,
) -> None:
    """Stage 1: train the detail-aligned autoencoder, then calibrate its latent statistics."""
    _quiet()
    from davae.budget import plan_of
    from davae.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.autoencoder import AutoencoderRecipe, train_autoencoder

    resolved = load_recipe(AutoencoderRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return _say(plan_of(resolved, recipe))
    _say(train_autoencoder(resolved, out or run_folder(AutoencoderRecipe, recipe)))


@app.command()
def upgrade(
    pipeline: PipelinePath,
    autoencoder: AutoencoderPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the upgraded pipeline.")],
    portable: Annotated[bool, typer.Option("--portable", help="Loads without davae, by trust_remote_code.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write the upgraded pipeline, warm-started: a stock pipeline for twice the side length at the same tokens."""
    if dry_run:
        return _show({"pipeline": pipeline, "autoencoder": autoencoder, "out": out, "portable": portable})
    from davae.upgrade import load_autoencoder, load_pipeline, save_pipeline, upgrade

    if any(Path(read).resolve().is_relative_to(out.resolve()) for read in (pipeline, autoencoder)):
        raise SettingsError(f"OUT={out} holds what is read, and would be replaced: give another folder")
    base = load_pipeline(pipeline)
    save_pipeline(upgrade(base, load_autoencoder(autoencoder, base=base.vae)), out, portable=portable)
    _say(out)


@app.command(name="import")
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
    _quiet()
    from davae.importing.kinds import import_checkpoint

    report = import_checkpoint(
        file, out, kind=kind, stats=stats, base=base, autoencoder=autoencoder, lora=lora, ema=ema, dry_run=dry_run
    )
    _say(report.to_text())
    if not dry_run:
        _say(out)


@app.command()
def finetune(
    recipe: RecipePath,
    out: RunFolder = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    dry_run: DryRun = False,
) -> None:
    """Stage 2: teach the upgraded transformer the detail latents (LoRA and ports, layers and ports, or all of it)."""
    _quiet()
    from davae.budget import plan_of
    from davae.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.finetune import FinetuneRecipe, finetune

    resolved = load_recipe(FinetuneRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return _say(plan_of(resolved, recipe))
    _say(finetune(resolved, out or run_folder(FinetuneRecipe, recipe)))


@app.command()
def generate(
    pipeline: PipelinePath,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One picture is made for each.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their page.")] = Path("runs/generate"),
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 4.0,
    size: Size = None,
    prompt_tokens: PromptTokens = 256,
    seed: Seed = 0,
    adapter: Adapter = None,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Generate pictures from prompts."""
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    if dry_run:
        return _show({"pipeline": pipeline, "adapter": adapter, "prompts": prompts, "out": out, **settings})
    from davae.evaluation.generation import generate
    from davae.upgrade import load_pipeline

    loaded = load_pipeline(pipeline, adapter=adapter, device=_device(device))
    _say(generate(loaded, prompts, out, **settings))


@app.command()
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
    dry_run: DryRun = False,
) -> None:
    """Measure PSNR, SSIM and LPIPS on held-out pictures; with --base and --compare beside other tokenizers."""
    settings: dict[str, Any] = {"size": size, "limit": limit, "patch": patch}
    settings |= {"ablate_detail": ablate_detail, "with_kid": kid}
    if dry_run:
        given = {"autoencoder": autoencoder, "pictures": pictures, "out": out, "base": base, "compare": compare}
        return _show({**given, **settings})
    from davae.evaluation.reconstruction import reconstruct
    from davae.evaluation.tokenizers import load_tokenizers
    from davae.upgrade import load_autoencoder, load_base_vae

    where = _device(device)
    vae = None if base is None else load_base_vae(base, device=where)
    loaded = load_autoencoder(autoencoder, base=vae, device=where)
    others = load_tokenizers(compare, device=where)
    _say(reconstruct(loaded, pictures, out, base=vae, compare=others, **settings))


@app.command()
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
        return _show({"autoencoders": autoencoders, "pictures": pictures, "out": out, "base": base, **settings})
    from davae.evaluation.latents import draw_latents
    from davae.evaluation.tokenizers import folder_names
    from davae.upgrade import load_autoencoder, load_base_vae

    where = _device(device)
    vae = None if base is None else load_base_vae(base, device=where)
    names = folder_names(autoencoders)
    folders = zip(names, autoencoders, strict=True)
    loaded = {name: load_autoencoder(path, base=vae, device=where) for name, path in folders}
    _say(draw_latents(loaded, pictures, out, **settings))


@app.command()
def evaluate(
    pipeline: PipelinePath,
    pictures: Pictures,
    out: Annotated[Path, typer.Option(help="Folder for the numbers and their page.")] = Path("runs/evaluate"),
    count: Annotated[int, typer.Option(min=4, help="Pictures to generate, from as many captions.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 4.0,
    prompt_tokens: PromptTokens = 256,
    seed: Seed = 0,
    adapter: Adapter = None,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Generate from the pictures' captions and measure KID against the pictures."""
    settings: dict[str, Any] = {"count": count, "steps": steps, "guidance_scale": guidance_scale}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    if dry_run:
        return _show({"pipeline": pipeline, "adapter": adapter, "pictures": pictures, "out": out, **settings})
    from davae.evaluation.generation import evaluate
    from davae.upgrade import load_pipeline

    loaded = load_pipeline(pipeline, adapter=adapter, device=_device(device))
    _say(evaluate(loaded, pictures, out, **settings))


@app.command()
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
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on a GPU, float32 on a CPU.")] = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Time a pipeline's parts, alone or against its base, beside what is counted and what the machine can do."""
    source: dict[str, Any] = {"against": against, "adapter": adapter, "geometry": geometry, "layers": layers}
    source |= {"parts": part, "dtype": dtype}
    case: dict[str, Any] = {"size": size, "against_sizes": against_size, "batch": batch, "steps": steps}
    case |= {"prompt_tokens": prompt_tokens, "seed": seed}
    if dry_run:
        return _show({"pipeline": pipeline, **source, **case, "repeats": repeats, "warm_up": warm_up, "out": out})
    _quiet()
    from davae.benchmark.bench import bench, cases_of, load_pair

    pair = load_pair(pipeline, device=_device(device), **source)
    _say(bench(cases_of(pair, **case), out, parts=part, repeats=repeats, warm_up=warm_up))


def _device(name: str | None) -> str:
    import torch

    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name is not None and name.partition(":")[0] not in allowed:
        raise SettingsError(f"--device {name}: allowed here are {', '.join(allowed)}")
    return name or allowed[-1]


def _quiet() -> None:
    """Keep the libraries' notes on torchvision, casts and cut captions out of a run's progress; errors are shown."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _say(text: object) -> None:
    _stdout.print(str(text), markup=False)


def _show(facts: dict[str, Any]) -> None:
    _say(json.dumps(facts, indent=2, default=str))
