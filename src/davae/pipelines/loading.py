"""Load pipelines, with or without adapters: whole, or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.backbones import check_parts
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.adapter import check_base, digest_base, load_adapter
from davae.pipelines.adapter_index import VAE_FOLDER
from davae.pipelines.autoencoders import DTYPE, check_whole, find_variant, load_autoencoder
from davae.pipelines.places import fetch_files, fetch_pipeline, find_on_hub, loading
from davae.pipelines.saving import PORTABLE_ENTRY
from davae.pipelines.upgrade import replace_parts, upgrade
from davae.pipelines.vetting import check_files, find_classes
from davae.run.storage import read_json


def load_pipeline(
    path_or_base: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    without: str | Sequence[str] = (),
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline, upgraded or not, or a base pipeline with one or more adapters applied to it.

    Args:
        path_or_base: a folder that `save_pretrained` wrote, or a name on the Hub: OWNER/NAME, or OWNER/NAME@REVISION.
            What looks like a path is never asked of the Hub.
        adapter: a folder (docs/formats.md) for the base pipeline. Several are applied in order, each an upgrade of the
            pipeline so far.
        fuse: add the last adapter's LoRA to the weights, so that the transformer is a plain one. Otherwise it stays
            apart, as the LoRA "default": loading another one by the stock call switches it off, `set_adapters` on.
        dtype: of all weights; float32 if None.
        device: where the pipeline goes; the CPU if None.
        without: names of components, or one name, that are not loaded but None.
        variant: of the base's weights, such as "fp16"; None for the plain ones, or for the only ones of a folder.

    Raises:
        CheckpointError: something is missing or damaged, or the adapter belongs to another base.
        SettingsError: the pipeline has no component of a name in `without`, or an adapter needs one of them.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    dtype = dtype or torch.float32

    # An adapter is recognised by the weights that it was trained on. The first adapter's base may be loaded in
    # float32 or bfloat16; a later adapter's base includes the earlier adapters, exact in float32 only.
    exact = len(adapters) > 1 or (len(adapters) == 1 and dtype == torch.float16)
    dtypes = {"vae": torch.float32, "transformer": torch.float32, "default": dtype} if exact else dtype

    names = [without] if isinstance(without, str) else list(without)
    pipeline = _load_stock(path_or_base, names, dtypes, variant)
    for number, place in enumerate(adapters, 1):
        folder, is_last = Path(place), number == len(adapters)
        check_parts(pipeline)
        check_base(digest_base(pipeline.transformer), folder)
        pipeline = upgrade(pipeline, load_autoencoder(folder, base=pipeline.vae, dtype=pipeline.vae.dtype))
        load_adapter(pipeline.transformer, folder, fuse=fuse or not is_last)

    # All other parts were loaded in `dtype`.
    if exact:
        for module in (pipeline.vae, pipeline.transformer):
            nn.Module.to(module, dtype=dtype)
    return pipeline if device is None else pipeline.to(device)


def _load_stock(
    path_or_base: str | Path, without: Sequence[str], dtypes: Any, variant: str | None
) -> DiffusionPipeline:
    """A pipeline as it was saved, without adapters; all of its weights are there."""
    hub, folder = find_on_hub(path_or_base), Path(path_or_base)
    if hub is not None:
        folder = fetch_files(hub, ["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no pipeline: it has no model_index.json; give a save_pretrained folder")

    index = read_json(folder / "model_index.json")

    # The code in a portable folder is never run: the autoencoder is loaded with ours, below.
    absent = {*without, *(name for name, entry in index.items() if entry == [None, None])}
    portable = index.get("vae") == PORTABLE_ENTRY and "vae" not in absent
    if portable:
        absent.add("vae")
    present = {name: entry for name, entry in index.items() if name not in absent}
    pipeline_class, parts = find_classes(folder, present)

    # Only what was checked is fetched: the same commit as the index.
    if hub is not None:
        folder = fetch_pipeline(hub._replace(revision=folder.name), without, pipeline_class, variant)
    for name, part_class in parts.items():
        check_files(folder / name, part_class)

    # diffusers takes None for "not loaded".
    settings: dict[str, Any] = {**dict.fromkeys(absent), DTYPE: dtypes, "use_safetensors": True}
    settings["variant"] = variant or find_variant(folder)
    with loading(path_or_base, "a pipeline"):
        pipeline = pipeline_class.from_pretrained(folder, **settings)
    unknown = sorted(set(without) - pipeline.components.keys())
    if unknown:
        raise SettingsError(f"without={', '.join(unknown)}: no such part; allowed are {', '.join(pipeline.components)}")

    if portable:
        vae_dtype = dtypes["vae"] if isinstance(dtypes, dict) else dtypes
        pipeline = replace_parts(pipeline, vae=load_autoencoder(folder / VAE_FOLDER, dtype=vae_dtype))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_whole(module, f"{name} of {path_or_base}")
    return pipeline
