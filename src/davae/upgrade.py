"""Upgrade: a base pipeline and an AutoencoderDA become a stock pipeline of s times the side length, at equal tokens."""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from safetensors import SafetensorError
from torch import nn

from davae.adapter import (
    INDEX,
    VAE,
    base_digest,
    check_base,
    frozen_half,
    load_adapter,
    read_index,
    tensors_digest,
)
from davae.autoencoder_bases import base_class, base_facts, downsample_factor
from davae.autoencoder_da import AutoencoderDA
from davae.backbones import backbone_of, check_parts
from davae.backbones import widen_transformer as widen_transformer  # its public home: davae.widen_transformer
from davae.class_conditional import ClassConditionalFlowPipeline
from davae.errors import CheckpointError, SettingsError, StorageError
from davae.portable import ENTRY, make_portable
from davae.storage import read_json, replaced_whole

logger = logging.getLogger(__name__)

OWN_PIPELINES = {"ClassConditionalFlowPipeline": ClassConditionalFlowPipeline}
"""By the `_class_name` of model_index.json, which diffusers would look for in itself."""

LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)
"""What diffusers raises for a folder of something else, or a damaged one."""


def upgrade(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> DiffusionPipeline:
    """The same pipeline class with an AutoencoderDA for its VAE, and a widened transformer that starts as the base's.

    The default size grows by itself, since stock pipelines count the autoencoder's stages; the token count stays.
    `pipeline` may be an upgraded one, if `autoencoder` was made from its VAE: an upgrade of the upgrade.
    All other components, and all weights of the transformer but its two ports, are shared with `pipeline`, which is
    left as it is: train a copy of it if you go on needing the base. `autoencoder` is moved to the dtype and device of
    the VAE whose place it takes.

    Raises:
        SettingsError: if the transformer's family is unknown, its stock pipeline cannot run upgraded, or `autoencoder`
            was not made from this pipeline's VAE.
    """
    check_parts(pipeline)
    backbone = backbone_of(pipeline.transformer)
    if backbone.refusal:
        raise SettingsError(
            f"{type(pipeline).__name__} cannot be upgraded: {backbone.refusal}. What is missing is a pipeline that "
            "asks its VAE; davae.widen_transformer widens the transformer for one of your own"
        )
    _check_autoencoder(pipeline, autoencoder)
    nn.Module.to(autoencoder, dtype=pipeline.vae.dtype, device=pipeline.vae.device)  # diffusers' `to` warns for nothing
    transformer = widen_transformer(
        pipeline.transformer,
        base_channels=autoencoder.config.base_channels,
        detail_channels=autoencoder.config.detail_channels,
    )
    upgraded = _with_parts(pipeline, vae=autoencoder, transformer=transformer)
    if isinstance(pipeline, DiTPipeline):
        upgraded.labels = dict(pipeline.labels)  # the names of its classes are in no config of it
    if backbone.advice:
        logger.warning("the upgraded %s: %s", type(pipeline).__name__, backbone.advice)
    return upgraded


def _with_parts(pipeline: DiffusionPipeline, **parts: ModelMixin) -> DiffusionPipeline:
    """A new pipeline of the same class, settings and other components: stock ones count the VAE's stages when made."""
    settings = inspect.signature(type(pipeline).__init__).parameters.keys() & pipeline.config.keys()
    arguments = {name: pipeline.config[name] for name in settings} | pipeline.components
    return type(pipeline)(**{**arguments, **parts})


def load_pipeline(
    path_or_base: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    without: Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a pipeline, upgraded or not, or a base pipeline with an adapter applied to it.

    Args:
        path_or_base: a folder that `save_pretrained` wrote, or a name on the Hub. Components that were None when it
            was saved are None again. A class-conditional pipeline must be a folder; from the Hub it loads by
            `ClassConditionalFlowPipeline.from_pretrained`.
        adapter: an adapter folder for the base pipeline at `path_or_base`; see `davae.adapter`. Several are applied in
            their order, each an upgrade of what is there by then.
        fuse: add the last adapter's LoRA to the weights, for a plain transformer; otherwise it stays apart.
        dtype: of all weights; float32 if None.
        device: where the pipeline goes; the CPU if None.
        without: components that are not loaded, and None.

    Raises:
        CheckpointError: if something is missing or damaged, or the adapter belongs to another base.
    """
    folder = Path(path_or_base)
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    asked, dtype = dtype or torch.float32, torch.float32 if len(adapters) > 1 else dtype or torch.float32
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
    settings = {**absent, "dtype": dtype, "use_safetensors": True}
    try:
        pipeline = kind.from_pretrained(str(path_or_base), **settings)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path_or_base} cannot be loaded as a pipeline: {error}") from error
    if portable:
        pipeline = _with_parts(pipeline, vae=load_autoencoder(folder / VAE, dtype=dtype))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            _check_whole(module, f"{name} of {path_or_base}")
    for place in adapters:
        pipeline = _with_adapter(pipeline, Path(place), fuse=fuse or place is not adapters[-1])
    for module in pipeline.components.values() if asked != dtype else ():
        if isinstance(module, nn.Module):  # a later adapter knows its base by weights that were added up in float32
            nn.Module.to(module, dtype=asked)
    return pipeline if device is None else pipeline.to(device)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, *, portable: bool = False) -> None:
    """`pipeline.save_pretrained(folder)`, whole or not at all; a pipeline that is there already is replaced.

    With `portable` the autoencoder's code goes along, and the folder loads without davae (`make_portable`).

    Raises:
        SettingsError: `folder` holds something else than a pipeline, or `pipeline` cannot be portable.
        StorageError: it cannot be written.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise SettingsError(f"{folder} exists and holds no pipeline: choose another folder, or remove it yourself")
    with replaced_whole(folder) as partial:
        try:
            pipeline.save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:  # tokenizers raise no other class, on a full disk, too
            raise StorageError(f"{folder} was not written: {error}. Free space, or choose another folder") from error
        if portable:
            make_portable(partial)


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
    given = given or {}
    loading = logging.getLogger("diffusers.models.modeling_utils")
    level = loading.level
    if given:  # it would advise to train what is lacking
        loading.setLevel(logging.ERROR)
    try:
        model, found = kind.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True
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
        vae = kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **place)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{base} cannot be loaded as a pipeline: {error}") from error
    _check_whole(vae, f"VAE of {base}")
    return vae.to(device).eval()


def _check_whole(module: nn.Module, name: str) -> None:
    """Refuse a model some of whose weights were not in its file: diffusers leaves them on "meta"."""
    lacking = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if lacking:
        raise CheckpointError(f"the {name} lacks the weights {', '.join(lacking[:3])}: copy the folder anew")


def _with_adapter(pipeline: DiffusionPipeline, folder: Path, *, fuse: bool) -> DiffusionPipeline:
    check_base(base_digest(pipeline.transformer), folder)
    upgraded = upgrade(pipeline, load_autoencoder(folder, base=pipeline.vae, dtype=pipeline.vae.dtype))
    load_adapter(upgraded.transformer, folder, fuse=fuse)
    return upgraded


def _check_autoencoder(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> None:
    vae = pipeline.vae
    try:
        base_class(type(vae).__name__)
    except ValueError as error:
        raise SettingsError(f"the pipeline's VAE: {error}") from error
    if not isinstance(autoencoder, AutoencoderDA):
        raise SettingsError(
            f"a {type(autoencoder).__name__} is no AutoencoderDA: make one with AutoencoderDA.from_base"
        )
    config = autoencoder.config
    if not config.base_channels:
        raise SettingsError(
            "all latents of this autoencoder are new (base_channels=0): a transformer knows none of them, so there is "
            "no warm start. Use one with a base half, or train a transformer on its latents from scratch"
        )
    facts, factor = base_facts(vae.config), downsample_factor(vae.config)
    for name, ours, theirs in (
        ("base_channels", config.base_channels, facts.latent_channels),
        ("scaling_factor", config.scaling_factor, facts.scaling_factor),
        ("shift_factor", config.shift_factor, facts.shift_factor),
        ("downsample factor / resolution factor", autoencoder.downsample_factor // config.resolution_factor, factor),
    ):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise SettingsError(
                f"the autoencoder is not of this pipeline: its {name} is {ours}, the pipeline's VAE has {theirs}. "
                "Make it with AutoencoderDA.from_base(pipeline.vae, ...)"
            )
    for name in ("latents_mean", "latents_std"):
        numbers, wanted = (found.get(name) for found in (config.base_config, vae.config))
        if (numbers is None) != (wanted is None) or not np.allclose(numbers or 0, wanted or 0, rtol=1e-4, atol=1e-6):
            raise SettingsError(
                f"the autoencoder's {name} of the base latents is {numbers}, and the pipeline's VAE has {wanted}: the "
                "transformer would see its latents at another scale. Make it with AutoencoderDA.from_base(pipeline.vae)"
            )
    patches = getattr(vae, "bn", None)
    for name in ("running_mean", "running_var") if patches is not None else ():
        ours = None if autoencoder.bn is None else getattr(autoencoder.bn, name)[: 4 * config.base_channels].cpu()
        theirs = getattr(patches, name).cpu()
        if ours is None or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
            raise SettingsError(
                f"the autoencoder's {name} of 2x2 patches of the base latents is not that of the pipeline's VAE: the "
                "transformer would see its latents at another scale. Make it with AutoencoderDA.from_base(pipeline.vae)"
            )
    check_base_encoder(autoencoder, vae)


def check_base_encoder(autoencoder: AutoencoderDA, vae: ModelMixin) -> None:
    """Refuse an autoencoder that was made from another VAE.

    Raises:
        SettingsError: its frozen encoder, or what follows that, is not `vae`'s.
    """
    for ours, name in ((autoencoder.base_encoder, "encoder"), (autoencoder.base_quant_conv, "quant_conv")):
        theirs = getattr(vae, name, None)
        digests = [None if module is None else tensors_digest(module.state_dict()) for module in (ours, theirs)]
        if digests[0] != digests[1]:
            raise SettingsError(
                f"the autoencoder's frozen base {name} is not this pipeline's "
                f"(SHA-256 {digests[0]} against {digests[1]}). "
                "Use the pipeline that it was made from, or train one on this pipeline's VAE"
            )
