"""How an AutoencoderDA is made: the settings that it refuses, and the weights that an untrained one starts from."""

import inspect
from collections.abc import Mapping
from math import lcm
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from davae.models.base_autoencoders import base_facts, find_base

DOWNSAMPLE_FILTERS = {"bicubic": False, "bicubic-antialias": True, "bicubic-unclamped": False}
"""`base_downsample` of the config -> torch's `antialias`; the reference has the first on SD3, the last on ImageNet."""


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse settings of an AutoencoderDA that do not fit each other, with a ValueError."""
    base_config = config["base_config"]
    base = find_base(base_config["_class_name"])
    channels = base_facts(base_config).latent_channels

    # The two new blocks and the groups of the alignment loss have to divide.
    s = config["resolution_factor"]
    if s not in (2, 4):
        raise ValueError(f"resolution_factor={s}: allowed are 2 and 4. For more, upgrade the upgraded again.")

    # An unshuffle makes s^2 channels of one; mean and log-variance are two for each detail channel.
    groups, half = config["base_channels"] or channels, s**2 // 2
    unit, detail_channels = lcm(groups, half), config["detail_channels"]
    if detail_channels <= 0 or detail_channels % unit:
        nearest = max(1, round(detail_channels / unit)) * unit
        raise ValueError(
            f"detail_channels={detail_channels} must be a positive multiple of base_channels={groups}, because the "
            f"alignment loss averages groups, and of {half}, half of resolution_factor^2. The nearest is {nearest}."
        )

    # Statistics of the base: of each channel, or none.
    mean, std = base_config.get("latents_mean"), base_config.get("latents_std")
    absent = mean is None and std is None
    complete = mean is not None and std is not None and len(mean) == len(std) == channels
    if not absent and not (complete and all(deviation > 0 for deviation in std)):
        raise ValueError(
            f"latents_mean and latents_std of base_config must be {channels} numbers each, one for each base channel, "
            f"with deviations above 0; or both None. They are {mean} and {std}."
        )

    # Choices.
    if config["base_downsample"] not in DOWNSAMPLE_FILTERS:
        allowed = ", ".join(DOWNSAMPLE_FILTERS)
        raise ValueError(f"base_downsample={config['base_downsample']!r}: allowed are {allowed}.")
    if config["base_in_detail"] and not config["base_channels"]:
        raise ValueError("base_in_detail=True: with base_channels=0 (all_new) there are no base latents to add.")
    if not config["linear_blocks"] and base.drop_latent_layers is None:
        name = base_config["_class_name"]
        raise ValueError(f"linear_blocks=False: a {name} can be upgraded with linear_blocks=True only.")


def refuse_newer(kind: type[ModelMixin], config: Mapping[str, Any]) -> None:
    """Refuse settings that `kind` does not know, with a ValueError: the weights may depend on them."""
    known = {
        *inspect.signature(kind.__init__).parameters,
        "quantization_config",
    }  # diffusers' own, of quantised weights
    unknown = sorted(name for name in config if not name.startswith("_") and name not in known)
    if unknown:
        raise ValueError(
            f"this {kind.__name__} was saved by a newer davae: its config has {', '.join(unknown)}, which this version "
            "does not know. Update davae (for a portable folder: take the code beside its weights)"
        )


@torch.no_grad()
def start_from(autoencoder: ModelMixin, vae: ModelMixin) -> None:
    """Copy the base's weights into the parts of an untrained AutoencoderDA, and set linear blocks."""
    # base_encoder, detail_encoder and joint_decoder are named after the base's own parts.
    for name, part in autoencoder.named_children():
        source = getattr(vae, name.partition("_")[2], None)
        if isinstance(source, nn.Module):
            own = part.state_dict()
            part.load_state_dict({key: weight for key, weight in source.state_dict().items() if key in own})

    # Statistics of 2x2 patches: the base's channels come first.
    patch_channels = 4 * autoencoder.config.base_channels
    if autoencoder.bn is not None and patch_channels:
        autoencoder.bn.running_mean[:patch_channels] = vae.bn.running_mean
        autoencoder.bn.running_var[:patch_channels] = vae.bn.running_var

    # Linear blocks: the decoder sees the base latents, enlarged; detail latents have no effect.
    if autoencoder.detail_from_base is not None:
        autoencoder.detail_from_base.weight.zero_()
    if not autoencoder.config.linear_blocks:
        return
    down, up = autoencoder.detail_downsample, autoencoder.detail_upsample
    for parameter in (*down.parameters(), *up.parameters()):
        parameter.zero_()
    down.shortcut.bias[autoencoder.config.detail_channels :] = -5.0  # log-variance before any fit or training

    # Each base channel goes to its own s^2 places of the pixel shuffle.
    channels, places = base_facts(vae.config).latent_channels, autoencoder.config.resolution_factor**2
    up.shortcut.weight[:, :channels, 0, 0] = torch.eye(channels).repeat_interleave(places, dim=0)
    if autoencoder.base_encoder is None:
        down.shortcut.weight[:channels, :, 0, 0] = torch.eye(channels).repeat_interleave(places, dim=1) / places
