"""Put a trained pair into the package: slim files, half precision, sizes, and a check that it still runs.

    python recipes/avatars/ship.py PIPELINE ADAPTER

writes `src/davae/assets/base_pipeline` and `src/davae/assets/upgrade`, and leaves their README.md as they are. ADAPTER
is what `davae finetune` writes, with LoRA or with whole layers.

Base weights in float32 become bfloat16, by which an adapter recognises its base; those in half precision stay as they
are. The upgrade's become bfloat16, too, which a wheel packs smaller than float16. Both pairs then make images
of two prompts from the same noise, and the script prints how far they are apart.
"""

import json
import shutil
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.data.pictures import to_floats
from davae.demo.prompts import PROMPTS, SAMPLING
from davae.errors import DataError
from davae.method.metrics import psnr
from davae.pipelines.adapter_index import INDEX, read_index
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample
from davae.run.markdown import markdown_table
from davae.run.storage import replaced_whole

PACKAGE = Path(__file__).parents[2] / "src/davae"
CARD = "README.md"
LARGEST_TREE, LARGEST_WHEEL = 48 * 2**20, 36 * 2**20
NEAREST_DB = 40
"""Images of the shipped pair are at least so close to those of the pair as it was trained."""


def ship_base(source: Path, out: Path) -> None:
    """Copy what `model_index.json` names: nothing else, no path of this machine, JSON without air."""
    index = json.loads((source / "model_index.json").read_bytes())
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]

    card = _read_card(out)
    with replaced_whole(out) as unfinished:
        _write_json(unfinished / "model_index.json", {name: value for name, value in index.items() if name != PATH})
        for part in parts:
            _copy_part(source / part, unfinished / part, full=torch.bfloat16)
        _write_card(unfinished, card)


def ship_upgrade(source: Path, out: Path, *, base: str) -> None:
    """Copy an adapter's index, weights and autoencoder; `base` is the name that the index gives its base."""
    index = read_index(source).model_copy(update={"base": base})

    card = _read_card(out)
    with replaced_whole(out) as unfinished:
        (unfinished / INDEX).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for weights in sorted(source.glob("*.safetensors")):
            _copy_weights(weights, unfinished / weights.name, full=torch.bfloat16)
        _copy_part(source / "vae", unfinished / "vae", full=torch.bfloat16)
        _write_card(unfinished, card)


PATH = "_name_or_path"
"""Where diffusers and transformers write the folder that a part was loaded from."""


def _copy_part(source: Path, out: Path, *, full: torch.dtype) -> None:
    """Weights and JSON files of a component."""
    out.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            _copy_weights(path, out / path.name, full=full)
        elif path.suffix == ".json":
            values = json.loads(path.read_bytes())
            values.pop(PATH, None)
            _write_json(out / path.name, values)


def _copy_weights(source: Path, out: Path, *, full: torch.dtype) -> None:
    """A file of weights, with those in float32 as `full`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source).items():
        tensors[name] = tensor.to(full) if tensor.dtype == torch.float32 else tensor
        if not tensors[name].isfinite().all():
            raise DataError(f"{source}: {name} is not finite in {full}")
    save_file(tensors, out, metadata={"format": "pt"})


def _write_json(path: Path, values: Any) -> None:
    """Configs for people to read; a tokenizer is for nobody to read, and a third as large without its air."""
    layout: dict[str, Any] = {"separators": (",", ":")} if path.name == "tokenizer.json" else {"indent": 2}
    path.write_text(json.dumps(values, ensure_ascii=False, **layout) + "\n", encoding="utf-8")


def _read_card(folder: Path) -> str | None:
    """The text about a folder, which a person wrote."""
    card = folder / CARD
    return card.read_text(encoding="utf-8") if card.is_file() else None


def _write_card(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / CARD).write_text(text, encoding="utf-8")


def compare(trained: DiffusionPipeline, shipped: DiffusionPipeline, prompts: Sequence[str]) -> float:
    """The smallest PSNR in dB between images of the two pipelines from the same noise."""
    pair = []
    for pipeline in (trained, shipped):
        pipeline.set_progress_bar_config(disable=True)
        pair.append(to_floats(sample(pipeline, list(prompts), seed=0, **SAMPLING)))
    return float(psnr(*pair).min())


def measure_sizes(package: Path) -> dict[str, int]:
    """Bytes of each large file of the package, of its wheel, and of the working tree around it."""
    files = [path for path in sorted(package.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    sizes = {}
    for path in files:
        if path.stat().st_size > 50_000:
            sizes[path.relative_to(package).as_posix()] = path.stat().st_size

    # A wheel is a zip file of the package, and little more.
    wheel = BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(package.parent))
    return {**sizes, "wheel": len(wheel.getvalue())}


def measure_tree(root: Path, ignored: Sequence[str] = (".git", ".venv", "runs")) -> int:
    """Bytes of the working tree, without what git and tools keep in it."""
    total = 0
    for path in root.rglob("*"):
        hidden = {part for part in path.relative_to(root).parts if part.endswith("_cache") or part == "__pycache__"}
        if path.is_file() and not hidden and path.relative_to(root).parts[0] not in ignored:
            total += path.stat().st_size
    return total


def main(
    pipeline: Annotated[Path, typer.Argument(help="The base pipeline's folder.")],
    adapter: Annotated[Path, typer.Argument(help="The folder of its upgrade.")],
    package: Annotated[Path, typer.Option(help="The package that takes them.")] = PACKAGE,
) -> None:
    """Write both folders, compare, and print the sizes."""
    base, upgrade = package / "assets/base_pipeline", package / "assets/upgrade"
    ship_base(pipeline, base)
    ship_upgrade(adapter, upgrade, base=base.name)

    # What a user loads, beside what was trained.
    prompts = PROMPTS[:2]
    nearness = {
        "base": compare(load_pipeline(pipeline), load_pipeline(base), prompts),
        "upgrade": compare(load_pipeline(pipeline, adapter=adapter), load_pipeline(base, adapter=upgrade), prompts),
    }
    for name, value in nearness.items():
        typer.echo(f"{name}: images at least {value:.1f} dB from those before rounding")
    if min(nearness.values()) < NEAREST_DB:
        raise DataError(f"rounding changes images: {nearness} dB, allowed are {NEAREST_DB} and more")

    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    sizes = {**measure_sizes(package), "working tree": measure_tree(package.parents[1])}
    typer.echo(markdown_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in sizes.items()]))
    if sizes["wheel"] > LARGEST_WHEEL or sizes["working tree"] > LARGEST_TREE:
        raise DataError(f"too large: allowed are {LARGEST_WHEEL:,} for the wheel and {LARGEST_TREE:,} for the tree")


if __name__ == "__main__":
    typer.run(main)
