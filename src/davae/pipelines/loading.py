"""Load pipelines, with or without adapters, and autoencoders: whole, or not at all."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn

from davae.backbones import check_parts
from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import (
    INDEX,
    VAE_FOLDER,
    check_base,
    digest_base,
    digest_tensors,
    load_adapter,
    read_index,
    select_frozen_half,
)
from davae.pipelines.saving import PORTABLE_ENTRY
from davae.pipelines.upgrade import load_base_class, replace_parts, upgrade
from davae.run.storage import read_json

# The argument of `from_pretrained` for the precision of the weights.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"

# Errors that diffusers raises for a folder that is damaged or holds something else.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)


def load_pipeline(
    path_or_base: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    without: str | Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a pipeline, upgraded or not, or a base pipeline with one or more adapters applied to it.

    Args:
        path_or_base: a folder that `save_pretrained` wrote, or a name on the Hub. Components that were None when it
            was saved are None again. A class-conditional pipeline must be a folder; from the Hub it loads by
            `ClassConditionalFlowPipeline.from_pretrained`.
        adapter: an adapter folder for the base pipeline; see `davae.pipelines.adapter`. Several are applied in order,
            each an upgrade of the pipeline so far.
        fuse: add the last adapter's LoRA to the weights, so that the transformer is a plain one. Otherwise it stays
            apart, as the LoRA "default": loading another one by the stock call switches it off, `set_adapters` on.
        dtype: of all weights; float32 if None.
        device: where the pipeline goes; the CPU if None.
        without: names of components, or one name, that are not loaded but None.

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
    pipeline = _load_stock(path_or_base, names, dtypes)
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


def _load_stock(path_or_base: str | Path, without: Sequence[str], dtypes: Any) -> DiffusionPipeline:
    """A pipeline as it was saved, without adapters; all of its weights are there."""
    folder = Path(path_or_base)
    absent, pipeline_class, portable = set(without), DiffusionPipeline, False
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(f"{folder} is no pipeline: it has no model_index.json; give a save_pretrained folder")
        index = read_json(folder / "model_index.json")
        absent.update(name for name, entry in index.items() if entry == [None, None])
        if index.get("_class_name") == "ClassConditionalFlowPipeline":  # diffusers would look for it in itself
            from davae.pipelines.class_conditional import ClassConditionalFlowPipeline

            pipeline_class = ClassConditionalFlowPipeline

        # The code in a portable folder is never run: the autoencoder is loaded with ours, below.
        portable = index.get("vae") == PORTABLE_ENTRY and "vae" not in absent
        if portable:
            absent.add("vae")

    # diffusers takes None for "not loaded".
    settings: dict[str, Any] = {**dict.fromkeys(absent), DTYPE: dtypes, "use_safetensors": True}
    try:
        pipeline = pipeline_class.from_pretrained(str(path_or_base), **settings)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path_or_base} cannot be loaded as a pipeline: {error}") from error
    unknown = sorted(set(without) - pipeline.components.keys())
    if unknown:
        raise SettingsError(f"without={', '.join(unknown)}: no such part; allowed are {', '.join(pipeline.components)}")

    if portable:
        vae_dtype = dtypes["vae"] if isinstance(dtypes, dict) else dtypes
        pipeline = replace_parts(pipeline, vae=load_autoencoder(folder / VAE_FOLDER, dtype=vae_dtype))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            _check_whole(module, f"{name} of {path_or_base}")
    return pipeline


def load_autoencoder(
    folder: Path,
    *,
    base: ModelMixin | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoencoderDA:
    """Load the AutoencoderDA of a folder that `save_pretrained` wrote, or of an adapter folder, in evaluation mode.

    Args:
        folder: the autoencoder's, or the adapter's.
        base: the base pipeline's VAE, whose encoder is the frozen half of an adapter's autoencoder.
        dtype: of the weights; float32 if None.
        device: where they go.

    Raises:
        CheckpointError: the folder is damaged or holds something else, or the adapter belongs to another base.
        SettingsError: an adapter without its base.
    """
    frozen: dict[str, Tensor] = {}
    if (folder / INDEX).is_file():
        expected = read_index(folder).base_encoder_sha256
        if expected is not None:
            frozen = _take_frozen_half(base, folder, expected)
        folder = folder / VAE_FOLDER
    return load_model(AutoencoderDA, folder, frozen=frozen, dtype=dtype, device=device)


def _take_frozen_half(base: nn.Module | None, folder: Path, expected: str) -> dict[str, Tensor]:
    if base is None:
        raise SettingsError(f"{folder} is an adapter, whose autoencoder is half the base pipeline's: give that, too")
    frozen = select_frozen_half(base)
    digest = digest_tensors(frozen)
    if digest != expected:
        raise CheckpointError(
            f"the autoencoder of {folder} was made from another base than this one: from an encoder with SHA-256 "
            f"{expected}, and this one's is {digest}. Give the base pipeline that the adapter names"
        )
    return frozen


def load_model(
    model_class: type[ModelMixin],
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ModelMixin:
    """Load a diffusers model from its own folder, in `dtype` (float32 if None) and evaluation mode.

    The folder may lack the weights in `frozen`; these are copied into the model, and frozen.
    """
    if not (folder / "config.json").is_file():  # diffusers would take "runs/autoencoder" for a name on the Hub
        name = model_class.__name__
        raise CheckpointError(f"{folder} has no config.json: give the folder of an {name} on this machine")
    frozen, dtype = frozen or {}, dtype or torch.float32

    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    if frozen:
        logger.setLevel(logging.ERROR)  # no advice to train the weights that the file lacks
    try:
        settings = {"use_safetensors": True, "output_loading_info": True, DTYPE: dtype}
        model, loading_info = model_class.from_pretrained(folder, **settings)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be loaded as an {model_class.__name__}: {error}") from error
    finally:
        logger.setLevel(level)

    missing = sorted(set(loading_info["missing_keys"]) - frozen.keys())
    if missing:
        advice = "copy it anew"
        if (folder.parent / INDEX).is_file():
            advice = f"it is an adapter's: give {folder.parent} and the base pipeline, or, if they are given, {advice}"
        raise CheckpointError(f"{folder} lacks the weights {', '.join(missing[:3])}: {advice}")

    # Assigned, because diffusers may have left these parameters on "meta".
    copies = {name: tensor.to(dtype, copy=True) for name, tensor in frozen.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return model.to(device).eval()


def load_base_vae(base: str, *, device: torch.device | str = "cpu") -> ModelMixin:
    """Load the autoencoder of a base pipeline (folder or Hub name), in float32 and evaluation mode.

    A folder with a `config.json` and no `model_index.json` is the autoencoder itself.
    """
    folder = Path(base)
    is_autoencoder = (folder / "config.json").is_file() and not (folder / "model_index.json").exists()
    settings: dict[str, Any] = {"use_safetensors": True, DTYPE: torch.float32}
    try:
        if is_autoencoder:
            class_name = read_json(folder / "config.json")["_class_name"]
        else:
            class_name = DiffusionPipeline.load_config(base)["vae"][1]
            settings["subfolder"] = "vae"
        vae = load_base_class(class_name, f"the VAE of {base}").from_pretrained(base, **settings)
    except SettingsError:  # also a ValueError
        raise
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{base} cannot be loaded as a pipeline: {error}") from error

    _check_whole(vae, f"VAE of {base}")
    return vae.to(device).eval()


def _check_whole(module: nn.Module, name: str) -> None:
    """Refuse a model some of whose weights were not in its file: diffusers leaves them on "meta"."""
    missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"the {name} lacks the weights {', '.join(missing[:3])}: copy the folder anew")
