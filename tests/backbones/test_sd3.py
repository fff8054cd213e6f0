"""Stable Diffusion 3: its conditions, LoRA targets and velocity are those of the stock pipeline and the reference."""

import pytest
import torch

import tiny
from davae.backbones import backbone_of
from davae.pipelines.adapter import add_lora


@pytest.fixture(scope="module")
def pipeline():
    return tiny.tiny_sd3_pipeline()


@torch.no_grad()
def test_condition_is_what_the_pipeline_itself_encodes(pipeline):
    backbone = backbone_of(pipeline.transformer)
    condition = backbone.condition(pipeline, ["red apple", ""], max_sequence_length=16)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        ["red apple", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert torch.equal(condition["encoder_hidden_states"], embeds)
    assert torch.equal(condition["pooled_projections"], pooled)
    assert condition["encoder_hidden_states"].shape == (2, 77 + 16, 32)


def test_condition_has_a_gradient_for_text_encoders_that_are_trained(pipeline):
    condition = backbone_of(pipeline.transformer).condition(pipeline, ["a"], max_sequence_length=16)
    assert all(tensor.requires_grad for tensor in condition.values())


def test_lora_is_on_the_layers_that_the_reference_names(pipeline):
    """All named layers of the image stream, attn2 included (docs/method.md 10)."""
    transformer = tiny.tiny_sd3(4)  # two blocks, the first with dual attention
    add_lora(transformer, 2, 2.0, backbone_of(transformer).lora_targets)
    attentions = [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")]
    expected = {f"{attention}.{layer}" for attention in attentions for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    expected |= {f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in ("ff.net.2", "norm1.linear")}
    assert {
        name.removesuffix(".lora_A") for name, _ in transformer.named_modules() if name.endswith(".lora_A")
    } == expected
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    ports = {f"{port}.{kind}" for port in ("pos_embed.proj", "proj_out") for kind in ("weight", "bias")}
    assert trained == ports | {f"{layer}.lora_{half}.default.weight" for layer in expected for half in "AB"}


@torch.no_grad()
def test_euler_steps_of_our_velocity_are_the_pipelines_latents(pipeline):
    """The whole convention at once: timestep units, sign, condition, order of the caption's parts."""
    backbone = backbone_of(pipeline.transformer)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        "red apple",
        latents=noise,
        num_inference_steps=4,
        guidance_scale=0,
        output_type="latent",
        max_sequence_length=16,
    ).images
    condition = backbone.condition(pipeline, ["red apple"], max_sequence_length=16)
    latents = noise
    for sigma, after in zip(pipeline.scheduler.sigmas[:-1], pipeline.scheduler.sigmas[1:], strict=True):
        latents = latents + (after - sigma) * backbone.velocity(
            pipeline.transformer, latents, sigma.expand(1), condition
        )
    assert torch.allclose(latents, expected, atol=1e-5)
    assert not torch.allclose(noise, expected, atol=0.1)
