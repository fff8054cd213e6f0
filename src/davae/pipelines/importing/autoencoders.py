"""Autoencoders: VA-VAE, and DA-VAE in the two layouts of the reference code (ImageNet, SD3); and LightningDiT."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL

from davae.errors import CheckpointError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.lightningdit import LightningDiT2DModel, infer_config
from davae.pipelines.autoencoders import check_base_encoder, load_base_vae
from davae.pipelines.importing.matching import ImportReport, Options, Save, TensorSource, build_empty, leave_rest, match
from davae.pipelines.importing.reading import ForeignCheckpoint, Statistics, mismatch
from davae.pipelines.importing.spelling import Spelling, find_source, read_kl_config, replace_prefix, spell_ldm

# Reasons why keys are left, by the start of their names in any of these layouts.
REASONS = {
    r"(d[ac]|vae)\.encoder\.conv_out\.": "the detail encoder ends before it",
    r"(d[ac]|vae)\.decoder\.conv_in\.": "the up block takes its place",
    r"original_vae_model\.vae\.decoder\.": "the base's decoder; the joint decoder takes its place",
    r"(loss|discriminator)\.": "of the loss",
    r"(d[ac]\.)?(foundation_model|linear_proj|align_proj|pe_student|encoder_alignment_proj)\b": "of the alignment loss",
    r"(model_ema|ema)\b": "another copy of the weights",
}

# AutoencoderDA's names -> the names of the reference code for ImageNet; older files say `dc` for `da`.
IMAGENET = {
    "base_encoder.": "base_encoder.",
    "base_quant_conv.": "base_quant_conv.",
    "detail_encoder.": "{da}.encoder.",
    "detail_downsample.conv.": "{da}.{da}_down.conv.",
    "detail_downsample.shortcut.": "{da}.{da}_down.shortcut_proj.",
    "detail_upsample.conv.": "{da}.{da}_up.conv.",
    "joint_decoder.": "{da}.decoder.",
}

# AutoencoderDA's names -> the names of the reference code for SD3, which has diffusers' names below these.
SD3 = {
    "base_encoder.": "original_vae_model.vae.encoder.",
    "detail_encoder.": "vae.encoder.",
    "detail_downsample.conv.": "dc_down.conv.",
    "detail_downsample.shortcut.": "dc_down.shortcut_proj.",
    "detail_upsample.": "dc_up.",
    "joint_decoder.": "vae.decoder.",
}
SD3_SCALARS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}

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


def convert_va_vae(checkpoint: ForeignCheckpoint, options: Options, report: ImportReport) -> Save:
    """VA-VAE, in LDM's names -> a stock AutoencoderKL, with per-channel statistics if there are any."""
    spell = spell_ldm(checkpoint, "encoder.")
    config = read_kl_config(checkpoint, spell, sample_size=256, statistics=options.stats)
    if options.stats is not None:
        options.stats.check_channels(config["latent_channels"], "this autoencoder")

    model = build_empty(AutoencoderKL, config, checkpoint)
    targets = model.state_dict()
    sources = {name: find_source(tensor, spell(name)) for name, tensor in targets.items()}
    model.load_state_dict(match(checkpoint, targets, sources, report), assign=True)

    leave_rest(checkpoint, report, REASONS, owned=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    if options.stats is None:
        report.missing.append({"target": "latents_mean, latents_std", "reason": "none given: units are its own scale"})
    return model.save_pretrained


def convert_imagenet_da_vae(checkpoint: ForeignCheckpoint, options: Options, report: ImportReport) -> Save:
    """DA-VAE of the reference code for ImageNet -> AutoencoderDA; its latents are base first, as ours."""
    # Older files say "dc" for "da".
    da = "dc" if "dc.dc_up.conv.weight" in checkpoint.tensors else "da"
    names = {ours: theirs.format(da=da) for ours, theirs in IMAGENET.items()}
    ldm = spell_ldm(checkpoint, "base_encoder.")
    parts = {"encoder.": "base_encoder.", "decoder.": f"{da}.decoder.", "quant_conv.": "base_quant_conv."}
    base_config = read_kl_config(checkpoint, replace_prefix(parts, ldm), sample_size=256)

    # The statistics are of all latents: the first ones belong to the base.
    total, channels = checkpoint.shape(f"{da}.{da}_up.conv.weight")[1], base_config["latent_channels"]
    detail_statistics = None
    if options.stats is None:
        report.missing.append({"target": "base_config.latents_mean, latents_std", "reason": "none given"})
    else:
        options.stats.check_channels(total, "this autoencoder, base first,")
        mean, std = options.stats.mean, options.stats.std
        base_config |= {"latents_mean": list(mean[:channels]), "latents_std": list(std[:channels])}
        detail_statistics = Statistics(mean[channels:], std[channels:])

    # The reference does not clamp its base image, and its latents have their own scale.
    spell = replace_prefix(names, ldm)
    model = _build_da_vae(
        checkpoint, base_config, total, spell, detail_statistics, report, base_downsample="bicubic-unclamped"
    )

    leave_rest(checkpoint, report, REASONS, owned=("base_", f"{da}."))
    report.notes.append("the reference trains on detail latents plus N(0, 1): detail_noise = 1.0 in stage 2")
    return model.save_pretrained


def convert_sd3_da_vae(checkpoint: ForeignCheckpoint, options: Options, report: ImportReport) -> Save:
    """DA-VAE of the reference code for SD3, detail first -> AutoencoderDA, base first, by `DETAIL_FIRST`."""
    total, detail_channels = checkpoint.shape("dc_up.conv.weight")[1], 2 * checkpoint.shape("dc_down.conv.weight")[0]
    if detail_channels == total:
        raise CheckpointError(
            f"{checkpoint.path} is of the reference's 'full' mode: dc_down.conv.weight makes all {total} channels that "
            "dc_up.conv.weight reads. There is no base half that a pretrained transformer could start from"
        )

    # Below its prefixes the file has diffusers' names.
    parts = {"encoder.": SD3["base_encoder."], "decoder.": SD3["joint_decoder."], "quant_conv.": "quant_conv."}
    base_config = read_kl_config(checkpoint, replace_prefix(parts), sample_size=1024)
    if options.stats is not None:
        options.stats.check_channels(total - base_config["latent_channels"], "the detail half")

    # The file has no scale of the base latents: it is the base pipeline's, or Stable Diffusion 3's.
    vae, scalars = None, SD3_SCALARS
    if options.base is not None:
        vae = load_base_vae(options.base)
        scalars = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor or 0.0}
    base_config |= scalars

    spell = replace_prefix(SD3)
    model = _build_da_vae(
        checkpoint, base_config, total, spell, options.stats, report, base_downsample="bicubic", detail_first=True
    )
    if vae is not None:
        check_base_encoder(model, vae)

    leave_rest(checkpoint, report, REASONS, owned=("vae.", "dc_", "original_vae_model."))
    report.notes += [
        "the reference gives images in [0, 1], clamped; this gives (2 x - 1), not clamped, as diffusers' VAEs do",
        f"the file has no scale of the base latents; it is {options.base or 'SD3'}'s: {scalars}",
    ]
    return model.save_pretrained


def convert_lightningdit(checkpoint: ForeignCheckpoint, options: Options, report: ImportReport) -> Save:
    """LightningDiT, base or DA-VAE's -> LightningDiT2DModel, whose parameters have the file's names."""
    try:
        config = infer_config(checkpoint.tensors)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    model = build_empty(LightningDiT2DModel, config, checkpoint)
    targets = model.state_dict()
    tensors = match(checkpoint, targets, {name: TensorSource(name) for name in targets}, report)

    # The rotary tables are computed here, not stored; the file's must be the same.
    tables = [name for name, _ in model.named_buffers() if name in checkpoint.tensors]
    for name in tables:
        computed, stored = model.get_buffer(name).double(), checkpoint.tensors[name].double()
        if computed.shape != stored.shape or not torch.allclose(computed, stored, atol=1e-2):
            angles = "with the rotary embedding's angles at the base resolution"
            difference = f"found {list(stored.shape)}, wanted {list(computed.shape)} {angles}"
            raise mismatch(checkpoint.path, name, difference)

    model.load_state_dict(tensors, assign=True)
    leave_rest(checkpoint, report, dict.fromkeys(tables, "computed; compared, and the same"), owned=("",))
    return model.save_pretrained


def _build_da_vae(
    checkpoint: ForeignCheckpoint,
    base_config: dict[str, Any],
    total: int,
    spell: Spelling,
    statistics: Statistics | None,
    report: ImportReport,
    *,
    base_downsample: str,
    detail_first: bool = False,
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
    model = build_empty(AutoencoderDA, config, checkpoint)
    targets = model.state_dict()
    for name in ("detail_mean", "detail_std"):
        del targets[name]
    sources = {name: find_source(tensor, spell(name)) for name, tensor in targets.items()}
    if detail_first:
        sources = _put_base_first(sources, config, checkpoint)
    tensors = match(checkpoint, targets, sources, report)

    # Statistics in float32 at least.
    if statistics is None:
        reason = "none given: 0 and 1; AutoencoderDA.calibrate measures"
        report.missing.append({"target": "detail_mean, detail_std", "reason": reason})
        statistics = Statistics((0.0,) * (total - channels), (1.0,) * (total - channels))
    dtype = torch.promote_types(torch.float32, tensors["detail_upsample.conv.weight"].dtype)
    tensors["detail_mean"] = torch.tensor(statistics.mean, dtype=dtype)
    tensors["detail_std"] = torch.tensor(statistics.std, dtype=dtype)
    model.load_state_dict(tensors, assign=True)
    return model


def _put_base_first(
    sources: Mapping[str, TensorSource], config: Mapping[str, Any], checkpoint: ForeignCheckpoint
) -> dict[str, TensorSource]:
    """Sources that turn the order of channels from detail-first to base-first: `DETAIL_FIRST`, in numbers."""
    base, total, width = config["base_channels"], config["latent_channels"], config["block_out_channels"][-1]
    stream, group = width * base // total, width // config["base_config"]["norm_num_groups"]
    if len(config["block_out_channels"]) < 3 or width % total or stream % group:
        raise CheckpointError(
            f"{checkpoint.path}: {base} base of {total} latent channels, in front of a decoder of {width}, cannot be "
            f"put first: the groups of its norms, {group} channels each, would be torn"
        )
    shifts = {"latents": base, "stream": stream, "rows": 4 * stream}

    turned = dict(sources)
    for name, source in sources.items():
        for pattern, axes in DETAIL_FIRST.items():
            if re.fullmatch(pattern, name):
                roll = partial(torch.roll, shifts=[shifts[order] for order in axes.values()], dims=list(axes))
                turned[name] = replace(source, change=roll, change_name="base channels first")
    return turned
