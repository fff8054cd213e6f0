"""Upgrade: a base pipeline and an AutoencoderDA become a stock pipeline of s times the side length, at equal tokens."""

import inspect
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from torch import nn

from davae.backbones import backbone_of, check_parts
from davae.backbones import widen_transformer as widen_transformer  # its public home: davae.widen_transformer
from davae.errors import CheckpointError, SettingsError, StorageError
from davae.method.widen import lost_directions
from davae.models.autoencoder_da import DECODING, AutoencoderDA
from davae.models.base_autoencoders import base_class, base_facts, downsample_factor
from davae.pipelines.adapter import (
    VAE,
    base_digest,
    check_base,
    load_adapter,
    tensors_digest,
)
from davae.pipelines.class_conditional import ClassConditionalFlowPipeline
from davae.pipelines.loading import DTYPE, LOADING_ERRORS, check_whole, load_autoencoder
from davae.pipelines.portable import ENTRY, make_portable
from davae.run.storage import read_json, replaced_whole

logger = logging.getLogger(__name__)

OWN_PIPELINES = {"ClassConditionalFlowPipeline": ClassConditionalFlowPipeline}
"""By the `_class_name` of model_index.json, which diffusers would look for in itself."""


def upgrade(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> DiffusionPipeline:
    """The same pipeline class with an AutoencoderDA for its VAE, and a widened transformer that starts as the base's.

    The default size grows by itself, since stock pipelines count the autoencoder's stages; the token count stays.
    `pipeline` may be an upgraded one, if `autoencoder` was made from its VAE: an upgrade of the upgrade.
    All other components, and all weights of the transformer but its two ports, are shared with `pipeline`, which is
    left as it is: if you go on needing the base, take a copy of it before you train, fuse a LoRA or change the dtype.
    `autoencoder` is moved to the dtype and device of the VAE whose place it takes.

    Raises:
        SettingsError: if the transformer's family is unknown, its stock pipeline cannot run upgraded, its weights are
            offloaded, or `autoencoder` was not made from this pipeline's VAE.
    """
    check_parts(pipeline)
    for part in (pipeline.transformer, pipeline.vae):
        if any(parameter.is_meta for parameter in part.parameters()):
            raise SettingsError(
                f"the {type(part).__name__}'s weights are offloaded, or on the device meta: upgrade first, and offload "
                "the upgraded pipeline"
            )
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
    if lost := lost_directions(transformer, backbone.ports):
        logger.warning(
            "detail_channels=%d is too many for this %s: in %d directions of each token it can never tell the noise, "
            "which stays in every picture. Fewer detail channels have fewer of them (docs/method.md)",
            autoencoder.config.detail_channels, type(transformer).__name__, lost,
        )  # fmt: skip
    if backbone.advice:
        logger.warning("the upgraded %s: %s", type(pipeline).__name__, backbone.advice)
    return upgraded


def with_autoencoder(pipeline: DiffusionPipeline, autoencoder: AutoencoderDA) -> DiffusionPipeline:
    """An upgraded pipeline with another autoencoder of the same latents in the place of its own, all else shared.

    So a finished transformer gets a slim decoder, or a refined one. `autoencoder` is moved to the dtype and device of
    the one whose place it takes.

    Raises:
        SettingsError: `pipeline` is not upgraded, or the two autoencoders differ in more than their decoding half.
    """
    if not (isinstance(pipeline.vae, AutoencoderDA) and isinstance(autoencoder, AutoencoderDA)):
        kinds = " and ".join(type(vae).__name__ for vae in (pipeline.vae, autoencoder))
        raise SettingsError(f"both autoencoders must be AutoencoderDAs: the pipeline's and the new one are {kinds}")
    ours, theirs = (encoding_half(vae) for vae in (autoencoder, pipeline.vae))
    if differing := sorted(name for name in ours if ours[name] != theirs[name]):
        raise SettingsError(
            f"the autoencoder differs from the pipeline's in {', '.join(differing)}: the transformer was not trained "
            "on its latents. Train the decoder alone, by decoder_only = true and the pipeline's autoencoder as a start"
        )
    nn.Module.to(autoencoder, dtype=pipeline.vae.dtype, device=pipeline.vae.device)
    return _with_parts(pipeline, vae=autoencoder)


def encoding_half(autoencoder: AutoencoderDA) -> dict[str, str]:
    """What decides an autoencoder's latents: settings, and digests of weights and statistics."""
    settings = {
        name: json.dumps(value) for name, value in autoencoder.config.items() if not name.startswith(("_", "decoder_"))
    }
    kept = {name: tensor for name, tensor in autoencoder.state_dict().items() if not name.startswith(DECODING)}
    statistics = {name: kept.pop(name) for name in ("detail_mean", "detail_std")}
    return {
        **settings,
        "weights of the encoders": tensors_digest(kept),
        "latent statistics": tensors_digest(statistics),
    }


def _with_parts(pipeline: DiffusionPipeline, **parts: ModelMixin) -> DiffusionPipeline:
    """A new pipeline of the same class, settings and other components: stock ones count the VAE's stages when made."""
    settings = inspect.signature(type(pipeline).__init__).parameters.keys() & pipeline.config.keys()
    arguments = {name: pipeline.config[name] for name in settings} | pipeline.components
    made = type(pipeline)(**{**arguments, **parts})
    if isinstance(pipeline, DiTPipeline):
        made.labels = dict(pipeline.labels)  # the names of its classes are in no config of it
    return made


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
        pipeline = _with_parts(pipeline, vae=load_autoencoder(folder / VAE, dtype=dtype))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_whole(module, f"{name} of {path_or_base}")
    for place in adapters:
        pipeline = _with_adapter(pipeline, Path(place), fuse=fuse or place is not adapters[-1])
    if exact:
        for module in (pipeline.vae, pipeline.transformer):
            nn.Module.to(module, dtype=wanted)
    return pipeline if device is None else pipeline.to(device)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, *, portable: bool = False) -> None:
    """`pipeline.save_pretrained(folder)`, whole or not at all; a pipeline that is there already is replaced.

    With `portable` the autoencoder's code goes along, and the folder loads without davae (`make_portable`).

    Raises:
        SettingsError: `folder` holds something else than a pipeline, `pipeline` has a LoRA that is not fused, or it
            cannot be portable.
        StorageError: it cannot be written.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(".base_layer." in tensor for tensor in part.state_dict()):
            raise SettingsError(
                f"the {name} has a LoRA beside its weights, and no folder with it could be loaded: fuse it and unload "
                "it first (pipeline.fuse_lora(), then pipeline.unload_lora_weights()), or unload it only"
            )
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


def _with_adapter(pipeline: DiffusionPipeline, folder: Path, *, fuse: bool) -> DiffusionPipeline:
    check_parts(pipeline)
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
