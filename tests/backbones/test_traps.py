"""Single backbones and their traps, as docs/backbones.md names them."""

import math

import pytest
import torch
from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline

import tiny
import tiny_backbones
import tiny_pipelines
from davae.backbones import backbone_of
from davae.backbones.packing import pack
from davae.backbones.sana import read_instruction
from davae.errors import SettingsError
from tiny_upgrades import encode_tiny, numbers, record_calls, upgrade_tiny

C = tiny_pipelines.CHANNELS


@torch.no_grad()
def test_pixart_alpha_is_the_base_where_it_is_told_the_bases_size():
    """Its pipeline tells the transformer the size in pixels, so that the upgraded one has to learn its own."""
    base = tiny_pipelines.quiet(tiny_pipelines.pixart_alpha())
    upgraded = upgrade_tiny(base)
    noise, time = numbers(2, 2 * C, 8, 8), torch.tensor([10, 900])
    predict, condition = backbone_of(base.transformer).noise, encode_tiny(base)
    ours, variance = predict(upgraded.transformer, noise, time, condition)
    theirs, _ = predict(base.transformer, noise[:, :C], time, condition)

    torch.testing.assert_close(ours[:, :C], theirs, atol=1e-5, rtol=1e-5)
    assert not ours[:, C:].any()
    assert not variance[:, C:].any()

    doubled, _ = predict(upgraded.transformer, noise, time, encode_tiny(upgraded))
    assert (doubled[:, :C] - theirs).abs().max() > 1e-3


@torch.no_grad()
def test_flux_dev_is_told_the_stock_pipelines_guidance(monkeypatch: pytest.MonkeyPatch):
    """`velocity` is what the pipeline computes when it is called without a guidance."""
    base = tiny_pipelines.quiet(tiny_pipelines.flux())
    base.transformer = tiny.tiny_flux(C, guidance_embeds=True)
    upgraded, embeds, noise = upgrade_tiny(base), numbers(1, 5, 16), numbers(1, 2 * C, 8, 8, seed=1)
    texts = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    calls = record_calls(monkeypatch, upgraded.scheduler, "step")
    upgraded(**texts, latents=pack(noise), height=64, width=64, num_inference_steps=1, output_type="latent")

    condition = {"encoder_hidden_states": embeds, "pooled_projections": embeds[:, 0]}
    ours = backbone_of(upgraded.transformer).velocity(upgraded.transformer, noise, torch.ones(1), condition)
    torch.testing.assert_close(pack(ours), calls[0][0][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_flux2_dev_is_told_the_stock_pipelines_guidance(monkeypatch: pytest.MonkeyPatch):
    """As above; on embeddings, since the text encoder of FLUX.2-dev is large."""
    klein = tiny_pipelines.flux2()
    transformer = tiny_backbones.tiny_flux2(C, guidance_embeds=True)
    models = {"scheduler": klein.scheduler, "vae": klein.vae, "transformer": transformer}
    base = tiny_pipelines.quiet(Flux2Pipeline(**models, text_encoder=None, tokenizer=None))
    upgraded, embeds, noise = upgrade_tiny(base), numbers(1, 5, 16), numbers(1, 2 * C, 8, 8, seed=1)
    calls = record_calls(monkeypatch, upgraded.scheduler, "step")
    sizes = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    upgraded(prompt_embeds=embeds, latents=torch.nn.functional.pixel_unshuffle(noise, 2), **sizes)

    condition = {"encoder_hidden_states": embeds}
    ours = backbone_of(upgraded.transformer).velocity(upgraded.transformer, noise, torch.ones(1), condition)
    torch.testing.assert_close(pack(ours), calls[0][0][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_the_empty_caption_is_what_the_stock_pipeline_guides_against(name):
    """A prompt follows an instruction, the empty prompt does not, in a batch and alone."""
    pipeline = tiny_pipelines.PIPELINES[name]()
    settings = {"complex_human_instruction": read_instruction()} if name == "sana" else {}
    embeds, mask, blank_embeds, blank_mask = pipeline.encode_prompt(["red apple"], max_sequence_length=400, **settings)
    assert mask.sum() > blank_mask.sum()

    condition = backbone_of(pipeline.transformer).condition
    mixed = condition(pipeline, ["red apple", ""], max_sequence_length=400)
    for row, expected in enumerate(((embeds, mask), (blank_embeds, blank_mask))):
        for ours, theirs in zip(mixed.values(), expected, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-5, rtol=1e-5)
    alone = condition(pipeline, [""], max_sequence_length=400)
    torch.testing.assert_close(alone["encoder_hidden_states"], blank_embeds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_backbone_with_ports_only_makes_images_of_twice_the_side_as_well():
    """davae cannot encode captions for CogView4, so the stock pipeline is called with embeddings."""
    base = CogView4Pipeline(
        vae=tiny.tiny_vae(C, shift_factor=None),
        transformer=tiny_backbones.tiny_cogview4(C),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        text_encoder=None,
        tokenizer=None,
    )
    upgraded = upgrade_tiny(tiny_pipelines.quiet(base))
    settings = {
        "prompt_embeds": numbers(1, 16, 16),
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    assert upgraded(**settings).images.shape == (1, 3, 64, 64)
    assert base(**settings).images.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_classes_are_dropped_by_the_recipe_and_not_by_the_model():
    """DiT's own dropout of labels would act in training mode, on top of `caption_dropout`."""
    base = tiny_pipelines.dit()
    transformer, latents = base.transformer.train(), numbers(64, C, 8, 8)
    condition = {"class_labels": torch.full((64,), 7)}
    predict = backbone_of(transformer).noise
    once, again = (predict(transformer, latents, torch.full((64,), 500), condition)[0] for _ in range(2))
    assert torch.equal(once, again)


@torch.no_grad()
def test_longcat_draws_noise_for_16_channels_so_it_must_be_given_latents():
    upgraded = upgrade_tiny(tiny_pipelines.longcat_image())
    settings = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    settings["enable_prompt_rewrite"] = False
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        upgraded("red apple", **settings)
    images = upgraded("red apple", latents=pack(numbers(1, 2 * C, 8, 8)), **settings).images
    assert images.shape == (1, 3, 64, 64)


def test_a_distilled_krea2_has_one_shift_for_all_sizes():
    pipeline = tiny_pipelines.krea2()
    shift = backbone_of(pipeline.transformer).shift
    assert shift(pipeline, 256) == pytest.approx(math.exp(0.5))
    pipeline.register_to_config(is_distilled=True)
    assert shift(pipeline, 256) == shift(pipeline, 1024) == pytest.approx(math.exp(1.15))


def test_qwen_image_21_is_refused():
    """Its pipeline has the VAE's factor in its code, so an upgrade would decode to the wrong size."""
    base = tiny_pipelines.qwen_image()
    base.transformer = tiny_backbones.tiny_qwen_image21(C)
    with pytest.raises(SettingsError, match="downsample factor of 16 in its code"):
        upgrade_tiny(base)
