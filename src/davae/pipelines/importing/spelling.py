"""Names of AutoencoderKL's layers in the files of LDM and VQGAN, and the config of one from a file's shapes."""

import re
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from davae.pipelines.importing.matching import TensorSource
from davae.pipelines.importing.reading import ForeignCheckpoint, Statistics

NORM_GROUPS = 32  # of every GroupNorm in these autoencoders; no shape tells their number

# diffusers' names of an encoder's or a decoder's layers -> LDM's; applied in this order.
LDM = {
    r"down_blocks\.(\d+)": r"down.\1",
    r"up_blocks\.(\d+)": r"up.\1",  # counted from the other end, see below
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

# A parameter's name in diffusers' AutoencoderKL ("encoder...", "decoder...", "quant_conv...") -> the file's.
Spelling = Callable[[str], str]


def spell_ldm(checkpoint: ForeignCheckpoint, encoder: str) -> Spelling:
    """The names of LDM, in a file whose LDM encoder is under the prefix `encoder`."""
    levels = _count(checkpoint, encoder + "down.{}.block.0.conv1.weight")

    def spell(name: str) -> str:
        # LDM counts the decoder's levels from the image's side.
        name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{levels - 1 - int(level[1])}", name)
        for pattern, replacement in LDM.items():
            name = re.sub(pattern, replacement, name)
        return name

    return spell


def replace_prefix(prefixes: Mapping[str, str], spell: Spelling = str) -> Spelling:
    """`spell`, with the first matching prefix of the name replaced, so that parts can lie anywhere in a file."""

    def spell_with_prefix(name: str) -> str:
        prefix = next(each for each in prefixes if name.startswith(each))
        return prefixes[prefix] + spell(name.removeprefix(prefix))

    return spell_with_prefix


def find_source(target: Tensor, key: str) -> TensorSource:
    """The tensor `key` for a parameter; LDM's attention projections are 1x1 convolutions, diffusers' are linear."""
    if target.ndim == 2 and key.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")):
        return TensorSource(key, lambda weight: weight.flatten(1), "a linear layer", (*target.shape, 1, 1))
    return TensorSource(key)


def _count(checkpoint: ForeignCheckpoint, name: str, spell: Spelling = str) -> int:
    """How many parameters called "... {} ..." are in the file, numbered from 0."""
    return next(number for number in count() if spell(name.format(number)) not in checkpoint.tensors)


def read_kl_config(
    checkpoint: ForeignCheckpoint, spell: Spelling, *, sample_size: int, statistics: Statistics | None = None
) -> dict[str, Any]:
    """The config of an AutoencoderKL, widths, depths and attention read from the file's shapes."""

    def has(name: str) -> bool:
        return spell(name) in checkpoint.tensors

    first_layer = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    checkpoint.shape(spell(first_layer.format(0)))  # refuses a file without it
    widths, down_types, up_types = [], [], []
    for level in range(_count(checkpoint, first_layer, spell)):
        widths.append(checkpoint.shape(spell(first_layer.format(level)))[0])
        down_attention = has(f"encoder.down_blocks.{level}.attentions.0.to_q.weight")
        down_types.append("AttnDownEncoderBlock2D" if down_attention else "DownEncoderBlock2D")
        up_attention = has(f"decoder.up_blocks.{level}.attentions.0.to_q.weight")
        up_types.append("AttnUpDecoderBlock2D" if up_attention else "UpDecoderBlock2D")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": checkpoint.shape(spell("encoder.conv_in.weight"))[1],
        "out_channels": checkpoint.shape(spell("decoder.conv_out.weight"))[0],
        "down_block_types": down_types,
        "up_block_types": up_types,
        "block_out_channels": widths,
        "layers_per_block": _count(checkpoint, "encoder.down_blocks.0.resnets.{}.conv1.weight", spell),
        "latent_channels": checkpoint.shape(spell("encoder.conv_out.weight"))[0] // 2,
        "norm_num_groups": NORM_GROUPS,
        "mid_block_add_attention": has("encoder.mid_block.attentions.0.to_q.weight"),
        "use_quant_conv": has("quant_conv.weight"),
        "use_post_quant_conv": has("quant_conv.weight"),
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": list(statistics.mean) if statistics else None,
        "latents_std": list(statistics.std) if statistics else None,
        "sample_size": sample_size,
    }
