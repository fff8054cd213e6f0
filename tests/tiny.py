"""Builders of tiny real models: the classes are stock, the weights random, the sizes small enough for milliseconds."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from davae import AutoencoderTAEF2, ClassConditionalFlowPipeline, LightningDiT2DModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_vae(latent_channels: int = 4, *, shift_factor: float | None = 0.1) -> AutoencoderKL:
    """An f4 `AutoencoderKL` with the scalars of a real one."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=1.5,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    ).eval()


def tiny_taesd(latent_channels: int = 4) -> AutoencoderTiny:
    """An f4 `AutoencoderTiny`."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=latent_channels,
    ).eval()


def tiny_taef2(latent_channels: int = 4) -> AutoencoderTAEF2:
    """An f4 `AutoencoderTAEF2` with two middle parts on either side, and random weights in their normalisation."""
    torch.manual_seed(0)
    vae = AutoencoderTAEF2(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=latent_channels,
    )
    with torch.no_grad():
        for norm in (module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return vae.eval()


def ports_alive(transformer: ModelMixin) -> ModelMixin:
    """Random numbers wherever a new model of this class is zero, so that its output depends on everything."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return transformer.eval()


def tiny_sd3(channels: int = 16, *, patch_size: int = 2, sample_size: int = 8) -> SD3Transformer2DModel:
    """Two joint blocks, the first with dual attention as in SD 3.5."""
    return ports_alive(
        SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )


def tiny_flux(channels: int = 16, *, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    return ports_alive(
        FluxTransformer2DModel(
            guidance_embeds=guidance_embeds,
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    )


def tiny_qwen(channels: int = 16) -> QwenImageTransformer2DModel:
    return ports_alive(
        QwenImageTransformer2DModel(
            in_channels=4 * channels,
            out_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    )


def tiny_sana(channels: int = 16, *, patch_size: int = 1) -> SanaTransformer2DModel:
    return ports_alive(
        SanaTransformer2DModel(
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
            sample_size=8,
            patch_size=patch_size,
        )
    )


def tiny_pixart(
    channels: int = 16, *, patch_size: int = 2, sample_size: int = 8, heads: int = 2
) -> PixArtTransformer2DModel:
    return ports_alive(
        PixArtTransformer2DModel(
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=1,
            num_attention_heads=heads,
            attention_head_dim=8,
            cross_attention_dim=8 * heads,
            caption_channels=8,
            sample_size=sample_size,
            patch_size=patch_size,
        )
    )


def tiny_dit(channels: int = 16, *, patch_size: int = 2) -> DiTTransformer2DModel:
    return ports_alive(
        DiTTransformer2DModel(
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            sample_size=8,
            patch_size=patch_size,
        )
    )


def tiny_lightningdit(
    channels: int = 16, *, patch_size: int = 2, sample_size: int = 8, qk_norm: bool = True
) -> LightningDiT2DModel:
    """Two blocks of width 16, 10 classes."""
    return ports_alive(
        LightningDiT2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=channels,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_classes=10,
            qk_norm=qk_norm,
        )
    )


def tiny_class_pipeline(*, vae: ModelMixin | None = None) -> ClassConditionalFlowPipeline:
    """10 classes, default size 32 px with `tiny_vae`."""
    vae = tiny_vae() if vae is None else vae
    transformer = tiny_lightningdit(vae.config.latent_channels)
    pipeline = ClassConditionalFlowPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _clip(seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(clip_config()).eval()


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_sd3_pipeline(*, vae: ModelMixin | None = None) -> StableDiffusion3Pipeline:
    """A complete Stable Diffusion 3: two CLIPs, a T5, real tokenizers, default size 32 px with `tiny_vae`."""
    vae = tiny_vae() if vae is None else vae
    t5_vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), *((letter, -1.0) for letter in "\u2581" + LETTERS)]
    torch.manual_seed(3)
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3(vae.config.latent_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip(1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=T5Tokenizer(vocab=t5_vocabulary, extra_ids=0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
