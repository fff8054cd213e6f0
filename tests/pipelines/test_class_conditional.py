"""The class-conditional pipeline: its grid, its steps, its guidance, and what it saves."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

import tiny
from davae import AutoencoderDA, ClassConditionalFlowPipeline, load_pipeline, upgrade
from davae.errors import SettingsError
from davae.pipelines.adapter import add_lora, digest_base, save_adapter
from davae.pipelines.class_conditional import make_time_grid
from davae.pipelines.inspection import describe
from davae.pipelines.saving import save_pipeline

LABELS = [3, 7]


@pytest.fixture
def pipeline():
    return tiny.tiny_class_pipeline()


def noise(channels=4, dtype=torch.float32):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def sample(pipeline, **settings):
    channels = pipeline.transformer.config.in_channels
    defaults = {"num_inference_steps": 8, "latents": noise(channels), "output_type": "latent"}
    return pipeline(LABELS, **{**defaults, **settings}).images


def evaluations(pipeline):
    """A list that fills with (batch size, time) of every evaluation of the transformer."""
    calls = []

    def remember(module, args, kwargs):
        calls.append((len(kwargs["hidden_states"]), kwargs["timestep"][0].item()))

    pipeline.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    return calls


def reference_grid(points, shift):
    """The reference's times: t' = s t / (1 + (s - 1) t) of linspace(0, 1, points), in LightningDiT's direction."""
    t = np.linspace(0, 1, points)
    return shift * t / (1 + (shift - 1) * t)


def euler(transformer, latents, times, guidance, interval=(0.0, 1.0)):
    """Euler's method in LightningDiT's own convention: t from 0 (noise) to 1, dx/dt = data - noise; numpy, float64."""
    x, null = latents.numpy(), torch.tensor([10, 10])

    for time, after in pairwise(times):
        state, t = torch.from_numpy(x), torch.full((2,), time, dtype=torch.float64)
        with torch.no_grad():
            velocity = transformer(state, t, torch.tensor(LABELS)).sample.numpy()
            if interval[0] <= time <= interval[1]:
                without = transformer(state, t, null).sample.numpy()
                velocity = without + guidance * (velocity - without)
        x = x + (after - time) * velocity

    return x


def test_the_grid_is_the_references():
    assert np.allclose(make_time_grid(249, 0.3), reference_grid(250, 0.3), rtol=1e-12)
    assert np.allclose(make_time_grid(10, 1.0), np.linspace(0, 1, 11), rtol=1e-12)
    assert (make_time_grid(7, 0.3)[0], make_time_grid(7, 0.3)[-1]) == (0, 1)
    assert make_time_grid(10, 0.3)[5] < 0.5  # a shift below 1 spends more steps near the noise


def test_by_default_the_stock_scheduler_steps_over_the_references_grid(pipeline):
    calls = evaluations(pipeline)
    pipeline([3], output_type="latent", generator=torch.Generator().manual_seed(0))
    grid = reference_grid(250, 0.3)
    assert np.allclose(pipeline.scheduler.sigmas.numpy(), 1 - grid, atol=1e-6)
    assert len(calls) == 249
    assert np.allclose([time for _, time in calls], grid[:-1], atol=1e-6)
    assert [batch for batch, _ in calls] == [2 if time >= 0.2 else 1 for time in grid[:-1]]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_steps_are_eulers(pipeline, guidance):
    """The stock scheduler rounds to float32 at every step, and so do its sigmas; all else here is float64."""
    pipeline.transformer.double()
    expected = euler(pipeline.transformer, noise(dtype=torch.float64), reference_grid(13, 0.3), guidance, (0.2, 1.0))
    result = sample(
        pipeline, num_inference_steps=12, guidance_scale=guidance, latents=noise(dtype=torch.float64)
    ).numpy()
    assert np.allclose(result, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - noise().numpy()).max() > 0.1


def test_without_guidance_the_null_class_is_not_computed(pipeline):
    calls = evaluations(pipeline)
    result = sample(pipeline, guidance_scale=1.0)
    assert {batch for batch, _ in calls} == {2}
    calls.clear()
    nearly = sample(pipeline, guidance_scale=1 + 1e-6, guidance_interval=(0.0, 1.0))
    assert {batch for batch, _ in calls} == {4}
    assert torch.allclose(result, nearly, atol=1e-4)


def test_guidance_at_zero_is_the_null_class(pipeline):
    null = pipeline([10, 10], num_inference_steps=4, latents=noise(), guidance_scale=1.0, output_type="latent").images
    result = sample(pipeline, num_inference_steps=4, guidance_scale=0.0, guidance_interval=(0.0, 1.0))
    assert torch.allclose(result, null, atol=1e-4)
    assert not torch.allclose(result, sample(pipeline, num_inference_steps=4, guidance_scale=1.0), atol=1e-2)


def test_the_interval_bounds_guidance(pipeline):
    everywhere = sample(pipeline, guidance_interval=(0.0, 1.0))
    nowhere = sample(pipeline, guidance_interval=(1.0, 1.0))  # no step starts at t' = 1
    late = sample(pipeline, guidance_interval=(0.2, 1.0))

    assert torch.equal(nowhere, sample(pipeline, guidance_scale=1.0))
    assert torch.equal(late, sample(pipeline))
    for one, other in ((everywhere, nowhere), (everywhere, late), (late, nowhere)):
        assert not torch.allclose(one, other, atol=1e-3)

    calls = evaluations(pipeline)
    sample(pipeline, num_inference_steps=5, timestep_shift=1.0, guidance_interval=(0.2, 0.6))  # both ends on the grid
    assert [batch for batch, _ in calls] == [2, 4, 4, 4, 2]


@pytest.mark.parametrize("settings", [{"scaling_factor": 1.5, "shift_factor": 0.1}, {"scaling_factor": 2.0}])
@torch.no_grad()
def test_latents_are_decoded_in_the_autoencoders_scale(settings):
    """With statistics, units are (z - mean) / std * scaling_factor; without, (z - shift) * scaling_factor."""
    plain = tiny.tiny_vae()
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 0.5, 2.0, 3.0]
    statistics = {} if "shift_factor" in settings else {"latents_mean": mean, "latents_std": std}
    vae = AutoencoderKL(
        **{name: value for name, value in plain.config.items() if name[0] != "_"}
        | {"shift_factor": None, **settings, **statistics}
    ).eval()
    vae.load_state_dict(plain.state_dict())
    pipeline = tiny.tiny_class_pipeline(vae=vae)
    units = sample(pipeline).numpy().astype(np.float64)
    if statistics:
        raw = units / 2.0 * np.reshape(std, (1, 4, 1, 1)) + np.reshape(mean, (1, 4, 1, 1))
    else:
        raw = units / 1.5 + 0.1
    expected = vae.decode(torch.from_numpy(raw).float()).sample.add(1).div(2).clamp(0, 1)

    assert torch.allclose(sample(pipeline, output_type="pt"), expected, atol=1e-5)


def test_outputs(pipeline):
    images = sample(pipeline, output_type="pil")
    assert [image.size for image in images] == [(32, 32)] * 2
    assert sample(pipeline, output_type="np").shape == (2, 32, 32, 3)
    (same,) = pipeline(LABELS, num_inference_steps=8, latents=noise(), output_type="np", return_dict=False)
    assert np.array_equal(same, sample(pipeline, output_type="np", height=32, width=32))


def test_a_generator_decides_the_noise(pipeline):
    one, other, again = (
        sample(pipeline, latents=None, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 0)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)


def test_many_small_steps_add_up_in_float32():
    """In bfloat16 a step of 1 / 249 of the velocity would vanish beside the latents."""
    pipeline = tiny.tiny_class_pipeline()
    exact = sample(pipeline, num_inference_steps=60, guidance_scale=1.0)
    pipeline.to(torch.bfloat16)
    half = sample(pipeline, num_inference_steps=60, guidance_scale=1.0)
    assert half.dtype == torch.float32
    assert (half - exact).square().mean() < 1e-4 * (exact - noise()).square().mean()
    assert sample(pipeline, output_type="pt").isfinite().all()


# ------------------------------------------------------------------------------------------------------------ upgrade


def test_an_upgraded_pipeline_has_twice_the_side_and_the_base_inside(pipeline):
    upgraded = upgrade(pipeline, AutoencoderDA.from_base(pipeline.vae, detail_channels=8).eval())
    assert type(upgraded) is ClassConditionalFlowPipeline
    assert sample(upgraded, output_type="np").shape == (2, 64, 64, 3)
    latents = sample(upgraded, latents=noise(12))
    assert torch.allclose(latents[:, :4], sample(pipeline, latents=noise(12)[:, :4]), atol=1e-5)
    assert torch.equal(latents[:, 4:], noise(12)[:, 4:])  # no velocity: noise stays noise until it is trained


def test_a_saved_pipeline_loads_with_the_same_images(pipeline, tmp_path):
    upgraded = upgrade(pipeline, AutoencoderDA.from_base(pipeline.vae, detail_channels=4).eval())

    for name, original in (("base", pipeline), ("upgraded", upgraded)):
        save_pipeline(original, tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == "ClassConditionalFlowPipeline"
        assert index["transformer"] == ["davae", "LightningDiT2DModel"]
        assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        loaded = load_pipeline(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ClassConditionalFlowPipeline
        assert np.array_equal(sample(loaded, output_type="np"), sample(original, output_type="np"))

    assert ClassConditionalFlowPipeline.from_pretrained(tmp_path / "upgraded").vae_scale_factor == 8
    half = load_pipeline(tmp_path / "upgraded", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16


def test_an_adapter_with_lora_is_loaded_and_fused(pipeline, tmp_path):
    """LoRA is no part of the reference's recipe here, but has to work where it is asked for."""
    save_pipeline(pipeline, tmp_path / "base")
    upgraded = upgrade(pipeline, AutoencoderDA.from_base(pipeline.vae, detail_channels=4).eval())
    digest = digest_base(pipeline.transformer)
    trainable = add_lora(upgraded.transformer, 2, 2.0, ["attn.qkv", "attn.proj", "mlp.w3"])

    assert not upgraded.transformer.pos_embed.requires_grad
    with torch.no_grad():
        for index, parameter in enumerate(trainable):  # stands for training
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    save_adapter(tmp_path / "adapter", upgraded, base="tiny", base_sha256=digest)
    loaded = load_pipeline(tmp_path / "base", adapter=tmp_path / "adapter")
    loaded.set_progress_bar_config(disable=True)

    assert loaded.transformer.state_dict().keys() == pipeline.transformer.state_dict().keys()
    assert torch.allclose(sample(loaded), sample(upgraded), atol=1e-4)
    assert not torch.allclose(sample(loaded)[:, :4], sample(pipeline, latents=noise(8)[:, :4]), atol=1e-2)


def test_it_can_be_inspected(pipeline):
    facts = describe(pipeline)
    assert (facts["default_size"], facts["tokens"]["32"], facts["patch_size"]) == (32, 16, 2)
    assert facts["upgrade"]["default_size"] == [32, 64]


# ------------------------------------------------------------------------------------------------------------ borders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 64}, "size=64: this LightningDiT2DModel's positions fit one size, so allowed is 32"),
        ({"width": 0}, "size=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"timestep_shift": 0.0}, "timestep_shift=0.0: allowed are 1 or more, and above 0"),
        ({"output_type": "jpeg"}, "output_type='jpeg': allowed are pil, np, pt, latent"),
    ],
)
def test_what_cannot_be_made_is_refused(pipeline, settings, message):
    with pytest.raises(SettingsError, match=message):
        sample(pipeline, **settings)


def test_a_class_that_is_none_is_refused(pipeline):
    with pytest.raises(SettingsError, match="class 11: allowed are 0 to 9, and 10 for none"):
        pipeline([11])


def test_a_scheduler_that_shifts_again_is_refused(pipeline):
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler()):
        scheduler.set_shift(3.0)
        pipeline.scheduler = scheduler
        with pytest.raises(SettingsError, match=r"'shift': 3\.0.*timestep_shift"):
            sample(pipeline)
