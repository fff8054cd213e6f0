"""Models out of their folders, whole or not at all: autoencoders, base VAEs, and whatever else diffusers saves."""

import logging
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn

from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import base_class
from davae.pipelines.adapter import INDEX, VAE, frozen_half, read_index, tensors_digest
from davae.run.storage import read_json

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
"""What `from_pretrained` calls the precision of the weights."""

LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)
"""What diffusers raises for a folder of something else, or a damaged one."""


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
    half = frozen_half(base)
    if (found := tensors_digest(half)) != digest:
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
