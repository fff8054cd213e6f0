"""Models out of their folders, whole or not at all: autoencoders, base VAEs, and whatever else diffusers saves."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn

from davae.backbones import check_parts
from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import base_class
from davae.pipelines.adapter import (
    INDEX,
    VAE,
    check_base,
    digest_base,
    digest_tensors,
    load_adapter,
    read_index,
    select_frozen_half,
)
from davae.pipelines.class_conditional import ClassConditionalFlowPipeline
from davae.pipelines.saving import ENTRY
from davae.pipelines.upgrade import replace_parts, upgrade
from davae.run.storage import read_json

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
"""What `from_pretrained` calls the precision of the weights."""

LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)
"""What diffusers raises for a folder of something else, or a damaged one."""


OWN_PIPELINES = {"ClassConditionalFlowPipeline": ClassConditionalFlowPipeline}
"""By the `_class_name` of model_index.json, which diffusers would look for in itself."""


def load_pipeline(
    path_or_base: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    without: str | Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a pipeline, upgraded or not, or a base pipeline with an adapter applied to it.

    Args:
        path_or_base: a folder that `save_pretrained` wrote, or a name on the Hub. Components that were None when it
            was saved are None again. A class-conditional pipeline must be a folder; from the Hub it loads by
            `ClassConditionalFlowPipeline.from_pretrained`.
        adapter: an adapter folder for the base pipeline at `path_or_base`; see `davae.pipelines.adapter`. Several are
            applied in their order, each an upgrade of what is there by then.
        fuse: add the last adapter's LoRA to the weights, for a plain transformer; otherwise it stays apart, as the LoRA
            "default": the stock call that loads another one switches it off, and `set_adapters` on.
        dtype: of all weights; float32 if None.
        device: where the pipeline goes; the CPU if None.
        without: names of components, or one, that are not loaded, and None.

    Raises:
        CheckpointError: if something is missing or damaged, or the adapter belongs to another base.
        SettingsError: if the pipeline has no component of a name in `without`, or an adapter needs one of them.
    """
    folder = Path(path_or_base)
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    without = [without] if isinstance(without, str) else list(without)
    wanted = dtype or torch.float32
    # A later adapter knows its base by its weights in float32, and the first one by those in float32 or bfloat16.
    exact = bool(adapters[1:]) or (bool(adapters) and wanted == torch.float16)
    dtype = torch.float32 if exact else wanted
    absent: dict[str, None] = {}
    kind, portable = DiffusionPipeline, False
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(f"{folder} is no pipeline: it has no model_index.json; give a save_pretrained folder")
        index = read_json(folder / "model_index.json")
        absent = {name: None for name, entry in index.items() if entry == [None, None]}
        if portable := index.get("vae") == ENTRY and "vae" not in without:
            absent["vae"] = None  # its code is the folder's own: ours is used instead
        kind = OWN_PIPELINES.get(str(index.get("_class_name")), DiffusionPipeline)
    absent |= dict.fromkeys(without)
    dtypes = {"vae": dtype, "transformer": dtype, "default": wanted} if exact else wanted
    settings = {**absent, DTYPE: dtypes, "use_safetensors": True}
    try:
        pipeline = kind.from_pretrained(str(path_or_base), **settings)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path_or_base} cannot be loaded as a pipeline: {error}") from error
    if unknown := sorted(set(without) - pipeline.components.keys()):
        raise SettingsError(f"without={', '.join(unknown)}: no such part; allowed are {', '.join(pipeline.components)}")
    if portable:
        pipeline = replace_parts(pipeline, vae=load_autoencoder(folder / VAE, dtype=dtype))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_whole(module, f"{name} of {path_or_base}")
    for place in adapters:
        pipeline = _with_adapter(pipeline, Path(place), fuse=fuse or place is not adapters[-1])
    if exact:
        for module in (pipeline.vae, pipeline.transformer):
            nn.Module.to(module, dtype=wanted)
    return pipeline if device is None else pipeline.to(device)


def _with_adapter(pipeline: DiffusionPipeline, folder: Path, *, fuse: bool) -> DiffusionPipeline:
    check_parts(pipeline)
    check_base(digest_base(pipeline.transformer), folder)
    upgraded = upgrade(pipeline, load_autoencoder(folder, base=pipeline.vae, dtype=pipeline.vae.dtype))
    load_adapter(upgraded.transformer, folder, fuse=fuse)
    return upgraded


def load_autoencoder(
    folder: Path,
    *,
    base: ModelMixin | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoencoderDA:
    """An AutoencoderDA that `save_pretrained` wrote, or an adapter folder's, in evaluation mode.

    Args:
        folder: the autoencoder's, or the adapter's.
        base: the base pipeline's VAE; an adapter's autoencoder has its frozen half from there.
        dtype: of the weights; float32 if None.
        device: where they go.

    Raises:
        CheckpointError: the folder is missing, damaged or holds something else, or the adapter is another base's.
        SettingsError: an adapter without its base.
    """
    half: dict[str, torch.Tensor] = {}
    if (folder / INDEX).is_file():
        digest = read_index(folder).base_encoder_sha256
        if digest is not None:
            half = _half_of(base, folder, digest)
        folder = folder / VAE
    return load_model(AutoencoderDA, folder, given=half, dtype=dtype, device=device)


def load_model(
    kind: type[ModelMixin],
    folder: Path,
    *,
    given: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ModelMixin:
    """A diffusers model of class `kind` out of its own folder, in `dtype` (float32 if None), in evaluation mode.

    `given` are weights that the folder may lack; they are copied, and frozen.

    Raises:
        CheckpointError: the folder is missing, damaged or holds something else.
    """
    if not (folder / "config.json").is_file():  # diffusers would take "runs/autoencoder" for a name on the Hub
        raise CheckpointError(f"{folder} has no config.json: give the folder of an {kind.__name__} on this machine")
    given = given or {}
    loading = logging.getLogger("diffusers.models.modeling_utils")
    level = loading.level
    if given:  # it would advise to train what is lacking
        loading.setLevel(logging.ERROR)
    try:
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **{DTYPE: dtype or torch.float32}
        )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be loaded as an {kind.__name__}: {error}") from error
    finally:
        loading.setLevel(level)
    if lacking := sorted(set(found["missing_keys"]) - given.keys()):
        advice = "copy it anew"
        if (folder.parent / INDEX).is_file():
            advice = f"it is an adapter's: give {folder.parent} and the base pipeline, or, if they are given, {advice}"
        raise CheckpointError(f"{folder} lacks the weights {', '.join(lacking[:3])}: {advice}")
    if given:  # assigned, since diffusers may have left them on "meta"
        own = {name: tensor.to(dtype or torch.float32, copy=True) for name, tensor in given.items()}
        model.load_state_dict(own, strict=False, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in given)
    return model.to(device).eval()


def load_base_vae(base: str, *, device: torch.device | str = "cpu") -> ModelMixin:
    """The autoencoder of a base pipeline (folder or Hub name), in float32 and evaluation mode.

    A folder without `model_index.json` but with a `config.json` is the autoencoder itself.

    Raises:
        CheckpointError: there is no pipeline, and no autoencoder.
        SettingsError: the autoencoder is of a class that cannot be upgraded.
    """
    bare = (Path(base) / "config.json").is_file() and not (Path(base) / "model_index.json").exists()
    try:
        if bare:
            name = read_json(Path(base) / "config.json")["_class_name"]
        else:
            name = DiffusionPipeline.load_config(base)["vae"][1]
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{base} cannot be loaded as a pipeline: {error}") from error
    try:
        kind = base_class(name)
    except ValueError as error:
        raise SettingsError(f"the VAE of {base}: {error}") from error
    place = {} if bare else {"subfolder": "vae"}
    try:
        vae = kind.from_pretrained(base, use_safetensors=True, **place, **{DTYPE: torch.float32})
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{base} cannot be loaded as a pipeline: {error}") from error
    check_whole(vae, f"VAE of {base}")
    return vae.to(device).eval()


def _half_of(base: nn.Module | None, folder: Path, digest: str) -> dict[str, torch.Tensor]:
    if base is None:
        raise SettingsError(f"{folder} is an adapter, whose autoencoder is half the base pipeline's: give that, too")
    half = select_frozen_half(base)
    if (found := digest_tensors(half)) != digest:
        raise CheckpointError(
            f"the autoencoder of {folder} was made from another base than this one: from an encoder with SHA-256 "
            f"{digest}, and this one's is {found}. Give the base pipeline that the adapter names"
        )
    return half


def check_whole(module: nn.Module, name: str) -> None:
    """Refuse a model some of whose weights were not in its file: diffusers leaves them on "meta"."""
    lacking = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if lacking:
        raise CheckpointError(f"the {name} lacks the weights {', '.join(lacking[:3])}: copy the folder anew")
