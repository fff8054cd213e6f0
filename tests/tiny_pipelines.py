"""Tiny real pipelines, one for each backbone: stock classes, random weights, f4 base autoencoders, 32 px, 16 tokens."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    Lumina2Pipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    ZImagePipeline,
)
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import tiny
import tiny_backbones
from tiny import LETTERS
from tiny_backbones import stock_class

CHANNELS = 16
"""Channels of the base latents. With fewer, kernels may sum the base and the widened model in different orders."""


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def t5(width: int) -> dict:
    """A text encoder and its tokenizer, which knows letters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), *((letter, -1.0) for letter in "\u2581" + LETTERS)]
    torch.manual_seed(3)
    encoder = T5EncoderModel(T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    return {"encoder": encoder, "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0)}


def flux() -> FluxPipeline:
    """With dynamic shifting, as published."""
    texts = t5(16)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny.tiny_vae(CHANNELS),
        text_encoder=CLIPTextModel(tiny.clip_config()).eval(),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=texts["encoder"],
        tokenizer_2=texts["tokenizer"],
        transformer=tiny.tiny_flux(CHANNELS),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return _pixart(PixArtSigmaPipeline)


def pixart_alpha() -> PixArtAlphaPipeline:
    """Its sample size is that of 1024 px, which makes pipeline and transformer take sizes as conditions."""
    return _pixart(PixArtAlphaPipeline, sample_size=128, heads=3)


def _pixart(kind, **settings):
    texts = t5(8)
    return kind(
        tokenizer=texts["tokenizer"],
        text_encoder=texts["encoder"],
        vae=tiny.tiny_vae(CHANNELS, shift_factor=None),
        transformer=tiny.tiny_pixart(CHANNELS, **settings),
        scheduler=DPMSolverMultistepScheduler(),
    )


def dit() -> DiTPipeline:
    vae = tiny.tiny_vae(CHANNELS, shift_factor=None)
    return DiTPipeline(tiny.tiny_dit(CHANNELS), vae, DDIMScheduler(clip_sample=False))


def sd3():
    return tiny.tiny_sd3_pipeline(vae=tiny.tiny_vae(CHANNELS))


def lightningdit():
    return tiny.tiny_class_pipeline(vae=tiny.tiny_vae(CHANNELS))


def gemma(width: int) -> dict:
    """A language model and its tokenizer, which knows letters. Lumina2 reads the last layer but one, so it has two."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    text = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    torch.manual_seed(3)
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    return {"text_encoder": Gemma2Model(text).eval(), "tokenizer": tokenizer}


def sana() -> SanaPipeline:
    """With a deep-compression autoencoder and a DPM solver for flow models."""
    torch.manual_seed(6)
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    ).eval()
    return SanaPipeline(
        **gemma(8),
        vae=vae,
        transformer=tiny.tiny_sana(CHANNELS),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
        ),
    )


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
QWEN_WORDS = (
    "Describe the", " image", " by", " detailing", " the", " color,", " shape,", " size,", " texture,", " quantity,",
    " text,", " spatial", " relationships", " of", " objects", " and", " background:", "assistant",
)  # fmt: skip
"""Words of Qwen-Image's template, a token each, so that the pipeline cuts its 34 tokens off; Krea 2's ends with 5."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """It knows letters, the marks of a conversation, and the words of Qwen-Image's template."""
    letters = [*LETTERS, "\u0120", "\u010a", ".", ",", ":"]  # with a space and a line's end, as byte-level BPE has them
    tokens = ["<|endoftext|>", *letters]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(QWEN_WORDS))
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(7)
    means, deviations = torch.randn(CHANNELS).tolist(), torch.rand(CHANNELS).add(0.5).tolist()
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=means,
        latents_std=deviations,
    ).eval()


QWEN_VL_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
}
QWEN_VL_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def qwen2_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {**QWEN_VL_TEXT, "num_hidden_layers": 1}
    vision = {**QWEN_VL_VISION, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=qwen_vae(),
        text_encoder=qwen2_vl(),
        tokenizer=qwen_tokenizer(),
        transformer=tiny.tiny_qwen(CHANNELS),
    )


def _qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def flux2() -> Flux2KleinPipeline:
    """The pipeline reads up to layer 27 of its text encoder; its autoencoder has statistics of 2x2 patches."""
    torch.manual_seed(8)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen3(27)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=tiny_backbones.tiny_flux2(CHANNELS, text_width=48),
    )


def z_image() -> ZImagePipeline:
    torch.manual_seed(9)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.tiny_vae(CHANNELS),
        text_encoder=Qwen3Model(_qwen3(2)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=tiny_backbones.tiny_zimage(CHANNELS),
    )


def auraflow() -> AuraFlowPipeline:
    texts = t5(16)
    return AuraFlowPipeline(
        tokenizer=texts["tokenizer"],
        text_encoder=texts["encoder"],
        vae=tiny.tiny_vae(CHANNELS, shift_factor=None),
        transformer=tiny_backbones.tiny_auraflow(CHANNELS),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def chroma() -> DiffusionPipeline:
    texts = t5(16)
    return stock_class("ChromaPipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.tiny_vae(CHANNELS),
        text_encoder=texts["encoder"],
        tokenizer=texts["tokenizer"],
        transformer=tiny_backbones.tiny_chroma(CHANNELS),
    )


def ovis_image() -> DiffusionPipeline:
    torch.manual_seed(9)
    return stock_class("OvisImagePipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.tiny_vae(CHANNELS),
        text_encoder=Qwen3Model(_qwen3(1)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=tiny_backbones.tiny_ovis_image(CHANNELS),
    )


def longcat_image() -> DiffusionPipeline:
    """Without the processor that rewrites prompts."""
    torch.manual_seed(9)
    return stock_class("LongCatImagePipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.tiny_vae(CHANNELS),
        text_encoder=qwen2_vl(),
        tokenizer=qwen_tokenizer(),
        text_processor=None,
        transformer=tiny_backbones.tiny_longcat_image(CHANNELS),
    )


def krea2() -> DiffusionPipeline:
    """Its text encoder has two layers, and both are read."""
    torch.manual_seed(10)
    text = {**QWEN_VL_TEXT, "num_hidden_layers": 2, "head_dim": 8}
    vision = {**QWEN_VL_VISION, "deepstack_visual_indexes": []}
    return stock_class("Krea2Pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=tiny_backbones.tiny_krea2(CHANNELS),
        text_encoder_select_layers=(1, 2),
    )


def lumina2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        transformer=tiny_backbones.tiny_lumina2(CHANNELS),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny.tiny_vae(CHANNELS),
        **gemma(16),
    )


PIPELINES = {
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "chroma": chroma,
    "ovis-image": ovis_image,
    "longcat-image": longcat_image,
    "krea2": krea2,
    "qwen-image": qwen_image,
    "sana": sana,
    "z-image": z_image,
    "auraflow": auraflow,
    "lumina2": lumina2,
    "pixart-sigma": pixart_sigma,
    "pixart-alpha": pixart_alpha,
    "dit": dit,
    "lightningdit": lightningdit,
}
