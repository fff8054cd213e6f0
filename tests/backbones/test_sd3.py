import pytest
import torch

import tiny
from davae.backbones import backbone_of


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
