"""Names of the layers of diffusers' AutoencoderKL in the files of LDM and VQGAN, and its config from shapes."""

import re
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from davae.pipelines.importing.matching import Source
from davae.pipelines.importing.reading import Checkpoint, Statistics

GROUPS = 32
"""Of every GroupNorm in these autoencoders; no shape tells it."""

LDM = {
    r"down_blocks\.(\d+)": r"down.\1",
    r"up_blocks\.(\d+)": r"up.\1",  # counted from the other end: see `ldm`
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
"""diffusers' names of an encoder's or a decoder's layers -> LDM's; applied in this order."""

Spelling = Callable[[str], str]
"""A parameter's name in diffusers' AutoencoderKL ("encoder...", "decoder...", "quant_conv...") -> the file's."""


def ldm(name: str, *, levels: int) -> str:
    """The LDM name of an AutoencoderKL parameter; LDM counts the decoder's `levels` from the picture's side."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
    for pattern, replacement in LDM.items():
        name = re.sub(pattern, replacement, name)
    return name


def prefixed(prefixes: Mapping[str, str], spell: Spelling = str) -> Spelling:
    """`spell`, with the first matching prefix of the name replaced, so that parts can lie anywhere in a file."""

    def spelled(name: str) -> str:
        prefix = next(each for each in prefixes if name.startswith(each))
        return prefixes[prefix] + spell(name.removeprefix(prefix))

    return spelled


def source_of(wanted: Tensor, key: str) -> Source:
    """The tensor `key` for the parameter `wanted`; LDM's attention projections are 1x1 convolutions, ours linear."""
    if wanted.ndim == 2 and key.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")):
        return Source(key, lambda weight: weight.flatten(1), "a linear layer", (*wanted.shape, 1, 1))
    return Source(key)


def kl_config(
    checkpoint: Checkpoint, spell: Callable[[int], Spelling], statistics: Statistics | None
) -> dict[str, Any]:
    """The config of an AutoencoderKL, widths, depths and attention read from the file's shapes.

    Args:
        checkpoint: the file.
        spell: levels -> spelling.
        statistics: of its latents, or None.

    Raises:
        CheckpointError: a layer that every such autoencoder has is missing.
    """
    shapes = checkpoint.tensors
    first = spell(0)
    levels = next(i for i in count() if first(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") not in shapes)
    checkpoint.shape(first("encoder.down_blocks.0.resnets.0.conv1.weight"))
    name = spell(levels)
    depth = next(j for j in count() if name(f"encoder.down_blocks.0.resnets.{j}.conv1.weight") not in shapes)
    widths = [checkpoint.shape(name(f"encoder.down_blocks.{i}.resnets.0.conv1.weight"))[0] for i in range(levels)]
    attended = {
        side: [name(f"{side}_blocks.{i}.attentions.0.to_q.weight") in shapes for i in range(levels)]
        for side in ("encoder.down", "decoder.up")
    }
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": checkpoint.shape(name("encoder.conv_in.weight"))[1],
        "out_channels": checkpoint.shape(name("decoder.conv_out.weight"))[0],
        "down_block_types": [f"{'Attn' * has}DownEncoderBlock2D" for has in attended["encoder.down"]],
        "up_block_types": [f"{'Attn' * has}UpDecoderBlock2D" for has in attended["decoder.up"]],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "latent_channels": checkpoint.shape(name("encoder.conv_out.weight"))[0] // 2,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": name("encoder.mid_block.attentions.0.to_q.weight") in shapes,
        "use_quant_conv": name("quant_conv.weight") in shapes,
        "use_post_quant_conv": name("quant_conv.weight") in shapes,
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": list(statistics.mean) if statistics else None,
        "latents_std": list(statistics.std) if statistics else None,
    }
