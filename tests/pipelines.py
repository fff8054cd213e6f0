"""Tiny real pipelines, one of each family: stock classes, random weights, f4 base autoencoders, 32 px, 16 tokens."""

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

import tiny
from tiny import LETTERS

CHANNELS = 16
"""Of the base latents; with fewer, kernels may sum the base and the widened model in different orders."""


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
    """Dynamic shifting, as the published ones have it."""
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
    """As published for 1024 px: its sample size, by which pipeline and transformer know that sizes are conditions."""
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
