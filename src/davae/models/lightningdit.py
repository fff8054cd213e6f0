"""LightningDiT2DModel: the class-conditional flow transformer of LightningDiT (arXiv 2501.01423) as a diffusers model.

Parameter names are the reference's: a DiT (arXiv 2212.09748) with RMSNorm, SwiGLU and 2D rotary embeddings.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import LabelEmbedding, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.models.precision import at_least_float32

TIMESTEP_FREQUENCIES = 256
"""Width of the sinusoidal embedding of t, before its two linear layers."""
LONGEST_PERIOD = 10_000.0
"""Of all three sinusoidal embeddings: time, fixed positions, rotary positions."""


class LightningDiT2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts data - noise at x_t = t data + (1 - t) noise: t = 0 is noise and t = 1 data, LightningDiT's convention.

    davae's own convention runs the other way; `davae.backbones.lightningdit` turns time and sign at its border.

    Args:
        sample_size: side of the latents; positions are fixed, so this is the only size.
        patch_size: side of a patch; there are (sample_size / patch_size)^2 tokens.
        in_channels: latent channels, in and out.
        num_layers: blocks.
        num_attention_heads: heads; the width is heads times `attention_head_dim`.
        attention_head_dim: width of a head, a multiple of 4.
        mlp_ratio: the SwiGLU's inner width is 2/3 of `mlp_ratio` times the width, as many parameters as a plain MLP.
        num_classes: classes; the embedding has one row more, the null class.
        qk_norm: RMSNorm on each head's queries and keys. Published weights come with and without; `infer_config` tells.

    Raises:
        ValueError: sizes that do not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("LightningDiTBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size={sample_size} must be a multiple of patch_size={patch_size}.")
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim={attention_head_dim} must be a multiple of 4: pairs for two axes.")
        width, side = num_attention_heads * attention_head_dim, sample_size // patch_size

        # Embeddings of patches, positions, time and class.
        self.x_embedder = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width, pos_embed_type=None)
        self.pos_embed = nn.Parameter(position_table(width, side)[None], requires_grad=False)  # [1, tokens, width]
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes + 1, width, dropout_prob=0)  # the last row is the null class
        self.feat_rope = RotaryEmbedding(attention_head_dim, side)

        # The transformer, and the way back to patches.
        self.blocks = nn.ModuleList(
            LightningDiTBlock(width, num_attention_heads, swiglu_width(width, mlp_ratio), qk_norm=qk_norm)
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels)
        self.gradient_checkpointing = False
        self._initialise()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity data - noise of latents x_t, both [B, C, H, W].

        `timestep` is t [B] in [0, 1], 0 = noise, not multiplied by 1000; the label `num_classes` is the null class.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"latents of shape {tuple(hidden_states.shape)}; this model reads [B, "
                f"{', '.join(map(str, expected))}], for its positions are fixed."
            )

        # One token for each patch, in one memory layout: convolutions choose theirs by their channels, and sums over a
        # width would run in another order in a widened model than in its base. Time and class modulate every block.
        tokens = self.x_embedder(hidden_states).contiguous() + self.pos_embed  # [B, tokens, width]
        condition = self.t_embedder(timestep) + self.y_embedder(class_labels)  # [B, width]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, self.feat_rope)
            else:
                tokens = block(tokens, condition, self.feat_rope)

        rows = self.final_layer(tokens, condition)  # [B, tokens, (p q c)]
        sample = _unpatch(rows, config.patch_size, config.sample_size // config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def requires_grad_(self, requires_grad: bool = True) -> "LightningDiT2DModel":
        """As torch's, but for `pos_embed`: it is a parameter by name only, and is never trained."""
        super().requires_grad_(requires_grad)
        self.pos_embed.requires_grad_(False)
        return self

    @torch.no_grad()
    def _initialise(self) -> None:
        """DiT's start: linear layers Xavier-uniform, embeddings small, everything added to the residual stream zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patches' convolution is a linear layer
                module.bias.zero_()
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            layer.weight.normal_(std=0.02)
        modulations = [owner.adaLN_modulation[1] for owner in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            layer.weight.zero_()


class LightningDiTBlock(nn.Module):
    """Attention and SwiGLU, each between a modulated RMSNorm and a gate (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor, rotary: "RotaryEmbedding") -> Tensor:
        """Tokens [B, N, width], condition [B, width] -> tokens."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation

        # Each half adds to the residual stream through its gate, which is zero at the start.
        attended = self.attn(_modulate(self.norm1(tokens), shift_attention, scale_attention), rotary)
        tokens = tokens + gate_attention * attended
        return tokens + gate_mlp * self.mlp(_modulate(self.norm2(tokens), shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Attention over all tokens; queries and keys are normalised, if so configured, and then rotated."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, rotary: "RotaryEmbedding") -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, N, head]
        query, key, value = parts.unbind()
        # Positions are in the angles of queries and keys.
        query, key = rotary(self.q_norm(query)), rotary(self.k_norm(key))
        attended = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x) (arXiv 2002.05202)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * mlp_width)
        self.w3 = nn.Linear(mlp_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), over the last axis and in float32 at least, times a weight (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        exact = at_least_float32(hidden)
        normed = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + 1e-6)
        return normed.to(hidden.dtype) * self.weight


class RotaryEmbedding(nn.Module):
    """Turns neighbouring pairs of a head's channels by angles that grow with the position (arXiv 2104.09864).

    In two dimensions, as in EVA-02 (arXiv 2303.11331); the tables [tokens, head_dim] are no part of a state dict.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, side: int) -> None:
        super().__init__()
        # Angles of each position along a side, each twice: neighbouring channels are a pair.
        frequencies = _frequencies(head_dim // 4)
        angles = torch.outer(torch.arange(side, dtype=torch.float64), frequencies).repeat_interleave(2, dim=1)

        # The first half of the channels turns with the row, the second with the column.
        rows = angles[:, None].expand(side, side, -1)
        columns = angles[None].expand(side, side, -1)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos().float(), persistent=False)
        self.register_buffer("freqs_sin", angles.sin().float(), persistent=False)

    def forward(self, heads: Tensor) -> Tensor:
        """[B, heads, tokens, head_dim] -> the same, each pair (a, b) now (a cos - b sin, b cos + a sin)."""
        exact = at_least_float32(heads)
        first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
        return (exact * self.freqs_cos + quarter_turn * self.freqs_sin).to(heads.dtype)


class TimestepEmbedding(nn.Module):
    """Cosines and sines of t in [0, 1] through two linear layers: DiT's embedding, without its factor of 1000."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """[B] -> [B, width]; angles in float32 at least."""
        exact = at_least_float32(timestep)
        angles = exact[:, None] * _frequencies(TIMESTEP_FREQUENCIES // 2).to(exact)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """Modulated RMSNorm and a linear layer to the patches."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, rows)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, N, width], condition [B, width] -> [B, N, rows]."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(tokens), shift, scale))


def position_table(width: int, side: int) -> Tensor:
    """DiT's fixed positions [side^2, width] in float32: sines, then cosines of the column, then the same of the row."""
    angles = torch.outer(torch.arange(side, dtype=torch.float64), _frequencies(width // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = waves[None].expand(side, side, -1), waves[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """Inner width of the SwiGLU, 2/3 of `mlp_ratio` times `width`, rounded down: 3072 for a width of 1152 and 4."""
    return 2 * int(width * mlp_ratio) // 3


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of the LightningDiT that a state dict in the reference's names belongs to; ValueError if none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        (width,) = shapes["blocks.0.norm1.weight"]
        _, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        tokens, rows = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
        classes = shapes["y_embedder.embedding_table.weight"][0] - 1
        mlp_width = shapes["blocks.0.mlp.w3.weight"][1]
        modulation = shapes["blocks.0.adaLN_modulation.1.weight"][0]
    except KeyError as error:
        raise ValueError("no state dict of a LightningDiT with RMSNorm and SwiGLU: see docs/formats.md.") from error

    # Variants that this class does not have.
    if modulation != 6 * width or rows != patch_size * patch_size * channels:
        raise ValueError(
            f"modulation of {modulation} rows and output of {rows}: allowed are 6 x {width} (with shifts) and "
            f"{patch_size}^2 x {channels} (no variance)."
        )
    # Many ratios round down to this width: the roundest one, or else one that is exact for any width.
    ratio = 1.5 * mlp_width / width
    candidates = round(ratio, 2), round(ratio, 0), round(ratio, 1), (math.ceil(1.5 * mlp_width) + 0.5) / width
    mlp_ratio = next(choice for choice in candidates if swiglu_width(width, choice) == mlp_width)

    # The width of a head: without q_norm, only the rotary tables tell it, which the reference's checkpoints hold.
    q_norm = shapes.get("blocks.0.attn.q_norm.weight")
    head = q_norm or shapes.get("feat_rope.freqs_cos")
    if head is None:
        raise ValueError("neither q_norm nor feat_rope.freqs_cos is there: nothing tells the width of a head.")
    return {
        "sample_size": math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_attention_heads": width // head[-1],
        "attention_head_dim": head[-1],
        "mlp_ratio": mlp_ratio,
        "num_classes": classes,
        "qk_norm": q_norm is not None,
    }


def _frequencies(count: int) -> Tensor:
    """LONGEST_PERIOD^(-i / count), i < count, in float64."""
    return LONGEST_PERIOD ** -(torch.arange(count, dtype=torch.float64) / count)


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale) + shift


def _unpatch(rows: Tensor, patch_size: int, side: int) -> Tensor:
    """[B, (h w), (p q c)] -> [B, c, (h p), (w q)]."""
    patches = rows.unflatten(1, (side, side)).unflatten(-1, (patch_size, patch_size, -1))  # [B, h, w, p, q, c]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


if __name__ == "davae.models.lightningdit":
    # model_index.json stores the module path: "davae" is the frozen public one (docs/formats.md).
    LightningDiT2DModel.__module__ = "davae"
