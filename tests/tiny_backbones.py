"""Tiny real transformers, those that are not in `tiny`, random wherever a new model of the class is zero."""

import diffusers
import pytest
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    ModelMixin,
    ZImageTransformer2DModel,
)

from tiny import ports_alive


def stock_class(name: str) -> type:
    """A class of diffusers; if the installed version lacks it, the test is skipped."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


def tiny_flux2(channels: int = 16, *, text_width: int = 16, guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return ports_alive(
        Flux2Transformer2DModel(
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=text_width,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance_embeds,
        )
    )


def tiny_hunyuan(channels: int = 16, *, patch_size: int = 2, learn_sigma: bool = True) -> HunyuanDiT2DModel:
    return ports_alive(
        HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=channels,
            patch_size=patch_size,
            sample_size=8,
            hidden_size=16,
            num_layers=2,
            mlp_ratio=2.0,
            learn_sigma=learn_sigma,
            cross_attention_dim=16,
            cross_attention_dim_t5=8,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=5,
            use_style_cond_and_image_meta_size=False,
        )
    )


def tiny_auraflow(channels: int = 16, *, patch_size: int = 2) -> AuraFlowTransformer2DModel:
    return ports_alive(
        AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=patch_size,
            in_channels=channels,
            out_channels=channels,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
    )


def tiny_cogview4(channels: int = 16) -> CogView4Transformer2DModel:
    return ports_alive(
        CogView4Transformer2DModel(
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            sample_size=8,
            rope_axes_dim=(8, 8),
        )
    )


def tiny_lumina2(channels: int = 16) -> Lumina2Transformer2DModel:
    return ports_alive(
        Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=channels,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(256, 8, 8),
            cap_feat_dim=16,
        )
    )


def tiny_zimage(channels: int = 16) -> ZImageTransformer2DModel:
    return ports_alive(
        ZImageTransformer2DModel(
            in_channels=channels,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[128, 16, 16],
        )
    )


def flux_like(name: str, channels: int, **settings: int) -> ModelMixin:
    """A transformer with FLUX.1's ports, of one block of each kind."""
    return ports_alive(
        stock_class(name)(
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            **settings,
        )
    )


def tiny_chroma(channels: int = 16) -> ModelMixin:
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return flux_like("ChromaTransformer2DModel", channels, **sizes)


def tiny_ovis_image(channels: int = 16) -> ModelMixin:
    return flux_like("OvisImageTransformer2DModel", channels, out_channels=4 * channels)


def tiny_longcat_image(channels: int = 16) -> ModelMixin:
    return flux_like("LongCatImageTransformer2DModel", channels, pooled_projection_dim=16)


def tiny_krea2(channels: int = 16) -> ModelMixin:
    return ports_alive(
        stock_class("Krea2Transformer2DModel")(
            in_channels=4 * channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(2, 2, 4),
        )
    )


def tiny_qwen_image21(channels: int = 16) -> ModelMixin:
    return ports_alive(
        stock_class("QwenImage21Transformer2DModel")(
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    )
