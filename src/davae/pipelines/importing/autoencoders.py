"""Autoencoders: VA-VAE, and DA-VAE in the two layouts of the reference code (ImageNet, SD3)."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from davae.errors import CheckpointError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import check_base_encoder, load_base_vae
from davae.pipelines.importing.account import Import, Save
from davae.pipelines.importing.reading import ForeignCheckpoint

NORM_GROUPS = 32  # of every GroupNorm in these autoencoders; no shape tells their number

# Reasons why keys are left, by the start of their names in any of these layouts.
REASONS = {
    r"(d[ac]|vae)\.encoder\.conv_out\.": "the detail encoder ends before it",
    r"(d[ac]|vae)\.decoder\.conv_in\.": "the up block takes its place",
    r"original_vae_model\.vae\.decoder\.": "the base's decoder; the joint decoder takes its place",
    r"(loss|discriminator)\.": "of the loss",
    r"(d[ac]\.)?(foundation_model|linear_proj|align_proj|pe_student|encoder_alignment_proj)\b": "of the alignment loss",
    r"(model_ema|ema)\b": "another copy of the weights",
}

# AutoencoderDA's names -> the names of the reference code for ImageNet; older files say `dc` for `da`. The last rows
# are AutoencoderKL's names for the base, from whose shapes its config is read.
IMAGENET = {
    "base_encoder.": "base_encoder.",
    "base_quant_conv.": "base_quant_conv.",
    "detail_encoder.": "{da}.encoder.",
    "detail_downsample.conv.": "{da}.{da}_down.conv.",
    "detail_downsample.shortcut.": "{da}.{da}_down.shortcut_proj.",
    "detail_upsample.conv.": "{da}.{da}_up.conv.",
    "joint_decoder.": "{da}.decoder.",
    "encoder.": "base_encoder.",
    "decoder.": "{da}.decoder.",
    "quant_conv.": "base_quant_conv.",
}

# The same for SD3, where the file has diffusers' names below these.
SD3 = {
    "base_encoder.": "original_vae_model.vae.encoder.",
    "detail_encoder.": "vae.encoder.",
    "detail_downsample.conv.": "dc_down.conv.",
    "detail_downsample.shortcut.": "dc_down.shortcut_proj.",
    "detail_upsample.": "dc_up.",
    "joint_decoder.": "vae.decoder.",
    "encoder.": "original_vae_model.vae.encoder.",
    "decoder.": "vae.decoder.",
    "quant_conv.": "quant_conv.",
}
SD3_SCALARS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}

# diffusers' names of an encoder's or a decoder's layers -> LDM's and VQGAN's; applied in this order.
LDM = {
    r"down_blocks\.(\d+)": r"down.\1",
    r"up_blocks\.(\d+)": r"up.\1",  # counted from the other end, see `spell`
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"\.resnets\.(\d+)": r".block.\1",
    r"\.attentions\.(\d+)": r".attn.\1",
    r"conv_shortcut": "nin_shortcut",
    r"downsamplers\.0": "downsample",
    r"upsamplers\.0": "upsample",
    r"conv_norm_out": "norm_out",
    r"group_norm": "norm",
    r"to_(q|k|v)\b": r"\1",
    r"to_out\.0": "proj_out",
}

DECODER_START = r"joint_decoder\.(mid_block|up_blocks\.0)\."

# Axes of AutoencoderDA's parameters that are rolled when the latents' order turns from detail-first to base-first.
#
# The up block's shortcut repeats each latent channel onto a run of the decoder's channels, without weights to permute.
# So its output changes its order, too, and so does the residual stream behind it, up to the first layer that does not
# add to it: the convolution of the first upsampler. The runs must not tear the groups of the norms.
DETAIL_FIRST = {
    r"detail_upsample\.conv\.weight": {0: "rows", 1: "latents"},
    r"detail_upsample\.conv\.bias": {0: "rows"},
    DECODER_START + r"resnets\.\d+\.norm1\.(weight|bias)": {0: "stream"},
    DECODER_START + r"resnets\.\d+\.conv1\.weight": {1: "stream"},
    DECODER_START + r"resnets\.\d+\.conv2\.(weight|bias)": {0: "stream"},
    DECODER_START + r"attentions\.\d+\.group_norm\.(weight|bias)": {0: "stream"},
    DECODER_START + r"attentions\.\d+\.to_[qkv]\.weight": {1: "stream"},
    DECODER_START + r"attentions\.\d+\.to_out\.0\.(weight|bias)": {0: "stream"},
    r"joint_decoder\.up_blocks\.0\.upsamplers\.0\.conv\.weight": {1: "stream"},
}

# A parameter's name in diffusers -> the file's.
Spelling = Callable[[str], str]


def convert_va_vae(job: Import) -> Save:
    """VA-VAE, in LDM's names -> a stock AutoencoderKL, with per-channel statistics if there are any."""
    spelling = partial(
        spell, prefixes={"": ""}, ldm_levels=_count(job.checkpoint, "encoder.down.{}.block.0.conv1.weight")
    )
    config = _read_kl_config(job.checkpoint, spelling, sample_size=256)
    if job.stats is None:
        job.missing.append({"target": "latents_mean, latents_std", "reason": "none given: units are its own scale"})
    else:
        _check_channels(job.stats, config["latent_channels"], "this autoencoder")
        config["latents_mean"], config["latents_std"] = job.stats.tolist()

    model = job.build(AutoencoderKL, config, spelling)
    job.leave_rest(REASONS, owned=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    return model.save_pretrained


def convert_imagenet_da_vae(job: Import) -> Save:
    """DA-VAE of the reference code for ImageNet -> AutoencoderDA; its latents are base first, as ours."""
    # Older files say "dc" for "da".
    da = "dc" if "dc.dc_up.conv.weight" in job.checkpoint.tensors else "da"
    prefixes = {ours: theirs.format(da=da) for ours, theirs in IMAGENET.items()}
    levels = _count(job.checkpoint, "base_encoder.down.{}.block.0.conv1.weight")
    spelling = partial(spell, prefixes=prefixes, ldm_levels=levels)
    base_config = _read_kl_config(job.checkpoint, spelling, sample_size=256)

    # The statistics are of all latents: the first ones belong to the base.
    total, channels = job.checkpoint.shape(f"{da}.{da}_up.conv.weight")[1], base_config["latent_channels"]
    detail_statistics = None
    if job.stats is None:
        job.missing.append({"target": "base_config.latents_mean, latents_std", "reason": "none given"})
    else:
        _check_channels(job.stats, total, "this autoencoder, base first,")
        base_config["latents_mean"], base_config["latents_std"] = job.stats[:, :channels].tolist()
        detail_statistics = job.stats[:, channels:]

    # The reference does not clamp its base image, and its latents have their own scale.
    model = _build_da_vae(job, spelling, base_config, total, detail_statistics, base_downsample="bicubic-unclamped")
    job.leave_rest(REASONS, owned=("base_", f"{da}."))
    job.notes.append("the reference trains on detail latents plus N(0, 1): detail_noise = 1.0 in stage 2")
    return model.save_pretrained


def convert_sd3_da_vae(job: Import) -> Save:
    """DA-VAE of the reference code for SD3, detail first -> AutoencoderDA, base first, by `DETAIL_FIRST`."""
    file = job.checkpoint
    total, detail_channels = file.shape("dc_up.conv.weight")[1], 2 * file.shape("dc_down.conv.weight")[0]
    if detail_channels == total:
        raise CheckpointError(
            f"{file.path} is of the reference's 'full' mode: dc_down.conv.weight makes all {total} channels that "
            "dc_up.conv.weight reads. There is no base half that a pretrained transformer could start from"
        )

    spelling = partial(spell, prefixes=SD3)
    base_config = _read_kl_config(file, spelling, sample_size=1024)
    if job.stats is not None:
        _check_channels(job.stats, total - base_config["latent_channels"], "the detail half")

    # The file has no scale of the base latents: it is the base pipeline's, or Stable Diffusion 3's.
    vae, scalars = None, SD3_SCALARS
    if job.base is not None:
        vae = load_base_vae(job.base)
        scalars = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor or 0.0}

    model = _build_da_vae(job, spelling, base_config | scalars, total, job.stats, base_downsample="bicubic")
    _put_base_first(model, job)
    if vae is not None:
        check_base_encoder(model, vae)

    job.leave_rest(REASONS, owned=("vae.", "dc_", "original_vae_model."))
    job.notes += [
        "the reference gives images in [0, 1], clamped; this gives (2 x - 1), not clamped, as diffusers' VAEs do",
        f"the file has no scale of the base latents; it is {job.base or 'SD3'}'s: {scalars}",
    ]
    return model.save_pretrained


def _check_channels(statistics: Tensor, channels: int, whose: str) -> None:
    if statistics.shape[1] != channels:
        raise CheckpointError(f"the statistics are of {statistics.shape[1]} channels, but {whose} has {channels}")


def spell(name: str, prefixes: Mapping[str, str], ldm_levels: int | None = None) -> str:
    """A parameter's name -> the file's: its prefix replaced, and if the file is of LDM, the rest in LDM's words."""
    prefix = next(each for each in prefixes if name.startswith(each))
    rest = name.removeprefix(prefix)
    if ldm_levels is not None:
        # LDM counts the decoder's levels from the image's side.
        rest = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{ldm_levels - 1 - int(level[1])}", rest)
        for pattern, replacement in LDM.items():
            rest = re.sub(pattern, replacement, rest)
    return prefixes[prefix] + rest


def _count(checkpoint: ForeignCheckpoint, name: str, spelling: Spelling = str) -> int:
    """How many parameters called "... {} ..." are in the file, numbered from 0."""
    return next(number for number in count() if spelling(name.format(number)) not in checkpoint.tensors)


def _read_kl_config(checkpoint: ForeignCheckpoint, spelling: Spelling, *, sample_size: int) -> dict[str, Any]:
    """The config of an AutoencoderKL, widths, depths and attention read from the file's shapes."""

    def has(name: str) -> bool:
        return spelling(name) in checkpoint.tensors

    def count_channels(name: str, axis: int = 0) -> int:
        return checkpoint.shape(spelling(name))[axis]

    first_layer = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    count_channels(first_layer.format(0))  # refuses a file without it
    widths, down_types, up_types = [], [], []
    for level in range(_count(checkpoint, first_layer, spelling)):
        widths.append(count_channels(first_layer.format(level)))
        down_attention = has(f"encoder.down_blocks.{level}.attentions.0.to_q.weight")
        down_types.append("AttnDownEncoderBlock2D" if down_attention else "DownEncoderBlock2D")
        up_attention = has(f"decoder.up_blocks.{level}.attentions.0.to_q.weight")
        up_types.append("AttnUpDecoderBlock2D" if up_attention else "UpDecoderBlock2D")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": count_channels("encoder.conv_in.weight", 1),
        "out_channels": count_channels("decoder.conv_out.weight"),
        "down_block_types": down_types,
        "up_block_types": up_types,
        "block_out_channels": widths,
        "layers_per_block": _count(checkpoint, "encoder.down_blocks.0.resnets.{}.conv1.weight", spelling),
        "latent_channels": count_channels("encoder.conv_out.weight") // 2,
        "norm_num_groups": NORM_GROUPS,
        "mid_block_add_attention": has("encoder.mid_block.attentions.0.to_q.weight"),
        "use_quant_conv": has("quant_conv.weight"),
        "use_post_quant_conv": has("quant_conv.weight"),
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "sample_size": sample_size,
    }


def _build_da_vae(
    job: Import,
    spelling: Spelling,
    base_config: Mapping[str, Any],
    total: int,
    statistics: Tensor | None,
    *,
    base_downsample: str,
) -> AutoencoderDA:
    """The model with `total` latent channels, the file's weights and these statistics of the detail latents."""
    widths, channels = base_config["block_out_channels"], base_config["latent_channels"]
    config = {
        "base_config": base_config,
        "base_channels": channels,
        "detail_channels": total - channels,
        "latent_channels": total,
        "block_out_channels": [*widths, widths[-1]],
        "base_downsample": base_downsample,
        "scaling_factor": base_config["scaling_factor"],
        "shift_factor": base_config["shift_factor"] or 0.0,
        "linear_blocks": False,
    }
    model = job.build(AutoencoderDA, config, spelling)

    if statistics is None:
        reason = "none given: 0 and 1; AutoencoderDA.calibrate measures"
        job.missing.append({"target": "detail_mean, detail_std", "reason": reason})
        statistics = torch.stack([model.detail_mean, model.detail_std])

    # In float32 at least.
    statistics = statistics.to(torch.promote_types(torch.float32, model.dtype))
    model.detail_mean, model.detail_std = statistics[0].clone(), statistics[1].clone()
    return model


def _put_base_first(model: AutoencoderDA, job: Import) -> None:
    """Turn the order of channels from detail-first to base-first: `DETAIL_FIRST`, in numbers."""
    config = model.config
    base, total, width = config.base_channels, config.latent_channels, config.block_out_channels[-1]
    stream, group = width * base // total, width // NORM_GROUPS
    if len(config.block_out_channels) < 3 or width % total or stream % group:
        raise CheckpointError(
            f"{job.checkpoint.path}: {base} base of {total} latent channels, in front of a decoder of {width}, cannot "
            f"be put first: the groups of its norms, {group} channels each, would be torn"
        )

    shifts = {"latents": base, "stream": stream, "rows": 4 * stream}
    for row in job.used:
        for pattern, axes in DETAIL_FIRST.items():
            if re.fullmatch(pattern, row["target"]):
                parameter = model.get_parameter(row["target"])
                for axis, order in axes.items():
                    parameter.data = parameter.data.roll(shifts[order], axis)
                row["change"] = "base channels first"
