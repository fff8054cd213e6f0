"""Autoencoders: VA-VAE, and DA-VAE in the two layouts of the reference code (ImageNet, SD3)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from davae.errors import CheckpointError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.importing.matching import (
    Conversion,
    ImportReport,
    Options,
    Source,
    build_empty,
    check_statistics,
    leave_rest,
    match,
    new_report,
)
from davae.pipelines.importing.reading import Checkpoint, Statistics
from davae.pipelines.importing.spelling import GROUPS, Spelling, kl_config, ldm, prefixed, source_of
from davae.pipelines.loading import load_base_vae
from davae.pipelines.upgrade import check_base_encoder

TRAINING_ONLY = {
    r"(loss|discriminator)\.": "of the loss",
    r"(d[ac]\.)?(foundation_model|linear_proj|align_proj|pe_student|encoder_alignment_proj)\b": "of the alignment loss",
    r"(model_ema|ema)\b": "another copy of the weights",
}
"""Why keys are left, by the start of their names."""

IMAGENET = {
    "base_encoder.": "base_encoder.",
    "base_quant_conv.": "base_quant_conv.",
    "detail_encoder.": "{da}.encoder.",
    "detail_downsample.conv.": "{da}.{da}_down.conv.",
    "detail_downsample.shortcut.": "{da}.{da}_down.shortcut_proj.",
    "detail_upsample.conv.": "{da}.{da}_up.conv.",
    "joint_decoder.": "{da}.decoder.",
}
"""AutoencoderDA's names -> those of the reference code for ImageNet; `da` was `dc` in its older files."""

SD3 = {
    "base_encoder.": "original_vae_model.vae.encoder.",
    "detail_encoder.": "vae.encoder.",
    "detail_downsample.conv.": "dc_down.conv.",
    "detail_downsample.shortcut.": "dc_down.shortcut_proj.",
    "detail_upsample.": "dc_up.",
    "joint_decoder.": "vae.decoder.",
}
"""AutoencoderDA's names -> those of the reference code for SD3; below these it has diffusers' names."""
SD3_SCALING, SD3_SHIFT = 1.5305, 0.0609
"""Of Stable Diffusion 3's VAE."""

_DECODER_START = r"joint_decoder\.(mid_block|up_blocks\.0)\."
DETAIL_FIRST = {
    r"detail_upsample\.conv\.weight": {0: "rows", 1: "latents"},
    r"detail_upsample\.conv\.bias": {0: "rows"},
    _DECODER_START + r"resnets\.\d+\.norm1\.(weight|bias)": {0: "stream"},
    _DECODER_START + r"resnets\.\d+\.conv1\.weight": {1: "stream"},
    _DECODER_START + r"resnets\.\d+\.conv2\.(weight|bias)": {0: "stream"},
    _DECODER_START + r"attentions\.\d+\.group_norm\.(weight|bias)": {0: "stream"},
    _DECODER_START + r"attentions\.\d+\.to_[qkv]\.weight": {1: "stream"},
    _DECODER_START + r"attentions\.\d+\.to_out\.0\.(weight|bias)": {0: "stream"},
    r"joint_decoder\.up_blocks\.0\.upsamplers\.0\.conv\.weight": {1: "stream"},
}
"""Axes of AutoencoderDA's parameters that turn when the latents' order turns from detail-first to base-first.

The up block's shortcut repeats each latent channel onto a run of the decoder's channels, and has no weights that could
be permuted. So its output comes in another order, too, and with it the residual stream behind it, up to the first layer
that does not add to it: the convolution of the first upsampler. (The runs must not tear the groups of the norms.)
"""


def va_vae(checkpoint: Checkpoint, options: Options) -> Conversion:
    """VA-VAE, in LDM's names -> a stock AutoencoderKL, with per-channel statistics if there are any.

    Raises:
        CheckpointError: the first mismatch, or statistics of another number of channels.
    """
    report = new_report("va-vae", checkpoint)

    def spell(levels: int) -> Spelling:
        return partial(ldm, levels=levels)

    config = {**kl_config(checkpoint, spell, options.stats), "sample_size": 256}
    check_statistics(options.stats, config["latent_channels"], "this autoencoder")
    model = build_empty(AutoencoderKL, config, checkpoint)
    named, wanted = spell(len(config["block_out_channels"])), model.state_dict()
    sources = {name: source_of(tensor, named(name)) for name, tensor in wanted.items()}
    model.load_state_dict(match(checkpoint, wanted, sources, report), assign=True)
    leave_rest(checkpoint, report, TRAINING_ONLY, owned=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    if options.stats is None:
        report.missing.append({"target": "latents_mean, latents_std", "reason": "none given: units are its own scale"})
    return Conversion(model.save_pretrained, report)


def imagenet_da_vae(checkpoint: Checkpoint, options: Options) -> Conversion:
    """DA-VAE of the reference code for ImageNet -> AutoencoderDA. Its latents are base first, as ours.

    Raises:
        CheckpointError: the first mismatch, or statistics of another number of channels.
    """
    report = new_report("imagenet-da-vae", checkpoint)
    da = "dc" if "dc.dc_up.conv.weight" in checkpoint.tensors else "da"
    table = {ours: theirs.format(da=da) for ours, theirs in IMAGENET.items()}

    def spell(levels: int) -> Spelling:
        parts = {
            "encoder.": table["base_encoder."],
            "decoder.": table["joint_decoder."],
            "quant_conv.": "base_quant_conv.",
        }
        return prefixed(parts, partial(ldm, levels=levels))

    base_config = {**kl_config(checkpoint, spell, None), "sample_size": 256}
    total, channels = checkpoint.shape(f"{da}.{da}_up.conv.weight")[1], base_config["latent_channels"]
    check_statistics(options.stats, total, "this autoencoder, base first,")
    if options.stats is not None:
        base_config["latents_mean"] = list(options.stats.mean[:channels])
        base_config["latents_std"] = list(options.stats.std[:channels])
    else:
        report.missing.append({"target": "base_config.latents_mean, latents_std", "reason": "none given"})
    detail = options.stats and Statistics(options.stats.mean[channels:], options.stats.std[channels:])
    # The reference's picture is not clamped, and its latents have their own scale.
    config = _da_config(base_config, total, base_downsample="bicubic-unclamped", scaling=1.0, shift=0.0)
    named = prefixed(table, partial(ldm, levels=len(base_config["block_out_channels"])))
    model = _filled(checkpoint, config, named, detail, report)
    unused = {
        rf"{da}\.encoder\.conv_out\.": "the detail encoder ends before it",
        rf"{da}\.decoder\.conv_in\.": "the up block takes its place",
    }
    leave_rest(checkpoint, report, {**unused, **TRAINING_ONLY}, owned=("base_", f"{da}."))
    report.notes.append(
        "the reference's training targets add N(0, 1) to the detail latents: detail_noise = 1.0 in stage 2"
    )
    return Conversion(model.save_pretrained, report)


def sd3_da_vae(checkpoint: Checkpoint, options: Options) -> Conversion:
    """DA-VAE of the reference code for SD3, detail first -> AutoencoderDA, base first, by `DETAIL_FIRST`.

    Raises:
        CheckpointError: the first mismatch; "full" mode; statistics of another number of channels; or permuted channels
            that would leave the groups of a norm.
    """
    report = new_report("sd3-da-vae", checkpoint)

    def spell(levels: int) -> Spelling:
        parts = {"encoder.": SD3["base_encoder."], "decoder.": SD3["joint_decoder."], "quant_conv.": "quant_conv."}
        return prefixed(parts)

    total, detail = checkpoint.shape("dc_up.conv.weight")[1], 2 * checkpoint.shape("dc_down.conv.weight")[0]
    if detail == total:
        raise CheckpointError(
            f"{checkpoint.path} is of the reference's 'full' mode: all {total} latent channels are the new encoder's "
            "(dc_down.conv.weight makes as many as dc_up.conv.weight reads), and none are a frozen base's. There is no "
            "base half that a pretrained transformer could start from, so it is not imported"
        )
    base_config = {**kl_config(checkpoint, spell, None), "sample_size": 1024}
    vae = None if options.base is None else load_base_vae(options.base)
    scaling, shift = (
        (SD3_SCALING, SD3_SHIFT) if vae is None else (vae.config.scaling_factor, vae.config.shift_factor or 0.0)
    )
    base_config |= {"scaling_factor": scaling, "shift_factor": shift}
    check_statistics(options.stats, total - base_config["latent_channels"], "the detail half")
    config = _da_config(base_config, total, base_downsample="bicubic", scaling=scaling, shift=shift)
    change = _base_first(config, checkpoint)
    model = _filled(checkpoint, config, prefixed(SD3), options.stats, report, change=change)
    if vae is not None:
        check_base_encoder(model, vae)
    unused = {
        r"vae\.encoder\.conv_out\.": "the detail encoder ends before it",
        r"vae\.decoder\.conv_in\.": "the up block takes its place",
        r"original_vae_model\.vae\.decoder\.": "the base's decoder; the joint decoder takes its place",
    }
    leave_rest(checkpoint, report, {**unused, **TRAINING_ONLY}, owned=("vae.", "dc_", "original_vae_model."))
    report.notes.append(
        "the reference gives pictures in [0, 1], clamped; this gives (2 x - 1), not clamped, as diffusers' VAEs do"
    )
    report.notes.append(
        f"scaling_factor {scaling} and shift_factor {shift} are not in the file: {options.base or 'SD3'}'s"
    )
    return Conversion(model.save_pretrained, report)


def _da_config(
    base_config: dict[str, Any], total: int, *, base_downsample: str, scaling: float, shift: float
) -> dict[str, Any]:
    widths, channels = base_config["block_out_channels"], base_config["latent_channels"]
    return {
        "base_config": base_config,
        "base_channels": channels,
        "detail_channels": total - channels,
        "latent_channels": total,
        "block_out_channels": [*widths, widths[-1]],
        "base_downsample": base_downsample,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "linear_blocks": False,
    }


def _filled(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    named: Spelling,
    statistics: Statistics | None,
    report: ImportReport,
    change: Callable[[str, Source], Source] = lambda name, source: source,
) -> AutoencoderDA:
    model = build_empty(AutoencoderDA, config, checkpoint)
    wanted = model.state_dict()
    ours = ("detail_mean", "detail_std")
    sources = {
        name: change(name, source_of(tensor, named(name))) for name, tensor in wanted.items() if name not in ours
    }
    found = match(checkpoint, wanted, sources, report)
    if statistics is None:
        report.missing.append(
            {"target": ", ".join(ours), "reason": "none given: 0 and 1; AutoencoderDA.calibrate measures"}
        )
        statistics = Statistics((0.0,) * config["detail_channels"], (1.0,) * config["detail_channels"])
    exact = torch.promote_types(torch.float32, found["detail_upsample.conv.weight"].dtype)
    mean, std = (torch.tensor(numbers, dtype=exact) for numbers in (statistics.mean, statistics.std))
    model.load_state_dict({**found, "detail_mean": mean, "detail_std": std}, assign=True)
    return model


def _base_first(config: Mapping[str, Any], checkpoint: Checkpoint) -> Callable[[str, Source], Source]:
    """What turns the order of a parameter's channels from detail-first to base-first: `DETAIL_FIRST`, in numbers."""
    base, total, width = config["base_channels"], config["latent_channels"], config["block_out_channels"][-1]
    stream = width * base // total
    if len(config["block_out_channels"]) < 3 or width % total or stream % (width // GROUPS):
        raise CheckpointError(
            f"{checkpoint.path}: {base} base of {total} latent channels, in front of a decoder of {width}, cannot be "
            f"put first: the groups of its norms, {width // GROUPS} channels each, would be torn"
        )
    shifts = {"latents": base, "stream": stream, "rows": 4 * stream}

    def turned(name: str, source: Source) -> Source:
        axes = next((axes for pattern, axes in DETAIL_FIRST.items() if re.fullmatch(pattern, name)), None)
        if axes is None:
            return source

        def turn(tensor: Tensor) -> Tensor:
            return tensor.roll([shifts[of] for of in axes.values()], list(axes))

        return replace(source, change=turn, said="base channels first")

    return turned


def lightningdit(checkpoint: Checkpoint, options: Options) -> Conversion:
    """A class-conditional LightningDiT; base or DA-VAE's, QK-norm or not, as its keys and shapes say.

    Raises:
        CheckpointError: the first mismatch, a variant that the class is not, or rotary tables other than its own.
    """
    from davae.models.lightningdit import LightningDiT2DModel, config_of

    report = new_report("lightningdit", checkpoint)
    try:
        config = config_of(checkpoint.tensors)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    model = build_empty(LightningDiT2DModel, config, checkpoint)
    wanted = model.state_dict()
    found = match(checkpoint, wanted, {name: Source(name) for name in wanted}, report)
    tables = [name for name, _ in model.named_buffers() if name in checkpoint.tensors]
    for name in tables:  # computed here, not stored; but only if they are the same
        computed, stored = model.get_buffer(name).double(), checkpoint.tensors[name].double()
        if computed.shape != stored.shape or not torch.allclose(computed, stored, atol=1e-2):
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {name}: found {list(stored.shape)}, wanted "
                f"{list(computed.shape)} with the rotary embedding's angles at the base resolution"
            )
    model.load_state_dict(found, assign=True)
    leave_rest(checkpoint, report, dict.fromkeys(tables, "computed; compared, and the same"), owned=("",))
    return Conversion(model.save_pretrained, report)
