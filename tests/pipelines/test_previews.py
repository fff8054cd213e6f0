"""Previews: the base half of the latents on its way, decoded by the base."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import ImageChops

from davae import AutoencoderDA, upgrade
from davae.errors import SettingsError
from davae.pipelines.sampling import preview_callback
from tiny import tiny_sd3_pipeline, tiny_taesd, tiny_vae

CALL = {"num_inference_steps": 5, "max_sequence_length": 8}


@pytest.fixture
def pair():
    base = tiny_sd3_pipeline()
    return base, upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4))


def are_same(images, others) -> bool:
    pairs = zip(images, others, strict=True)
    return all(ImageChops.difference(image, other).getbbox() is None for image, other in pairs)


def run(pipeline, callback=None, **settings):
    seeded = {"generator": torch.Generator().manual_seed(3), "callback_on_step_end": callback}
    return pipeline(["a", "b"], **CALL, **seeded, **settings).images


def test_the_last_preview_is_the_base_decoders_image_of_the_base_half(pair) -> None:
    base, upgraded = pair
    shown: list = []
    latents = run(upgraded, preview_callback(base.vae, lambda step, images: shown.append(images)), output_type="latent")
    with torch.no_grad():
        image = base.vae.decode(latents[:, :4] / 1.5 + 0.1).sample
    expected = base.image_processor.postprocess(image, output_type="pil")
    assert [image.size for image in shown[-1]] == [(32, 32)] * 2, "half of the upgraded pipeline's 64 px"
    assert are_same(shown[-1], expected)


def test_a_preview_is_the_end_of_the_velocity_of_its_step(pair) -> None:
    base, upgraded = pair
    inputs, velocities, decoded = [], [], []

    def remember(module, args, kwargs, output) -> None:
        inputs.append(kwargs["hidden_states"])
        velocities.append(output[0])

    upgraded.transformer.register_forward_hook(remember, with_kwargs=True)
    base.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    run(upgraded, preview_callback(base.vae, lambda step, images: None), guidance_scale=1.0)
    sigmas = upgraded.scheduler.sigmas

    assert len(decoded) == 4
    for step, latents in enumerate(decoded, 1):
        end = (inputs[step] - sigmas[step] * velocities[step])[:, :4]
        assert torch.allclose((latents - 0.1) * 1.5, end, atol=1e-4)


def test_previews_come_when_they_are_asked_for_and_change_nothing(pair) -> None:
    base, upgraded = pair
    without = run(upgraded)
    for every, expected in ((1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])):
        steps: list[int] = []
        callback = preview_callback(base.vae, lambda step, images, steps=steps: steps.append(step), every=every)
        for _ in range(2):  # the second run begins anew
            images = run(upgraded, callback)
            assert are_same(images, without)
        assert steps == 2 * expected


def test_a_tiny_decoder_and_a_base_with_statistics_of_its_own_do(pair) -> None:
    _, upgraded = pair
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    vae = tiny_vae()
    vae.register_to_config(**statistics)
    seen: list[torch.Tensor] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sizes: list = []
    for decoder in (tiny_taesd(), vae):
        callback = preview_callback(decoder, lambda step, images: sizes.append(images[0].size), every=9)
        latents = run(upgraded, callback, output_type="latent")

    assert sizes == [(32, 32)] * 2
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in statistics.values())
    assert torch.allclose(seen[0], latents[:, :4] / 1.5 * std + mean, atol=1e-5)


@pytest.mark.parametrize("step", ["4", "2 x 2"])
def test_larger_steps_and_wide_images_are_shown_by_each_base(pair, step) -> None:
    base, upgraded = pair
    decoders = {base.vae: (24, 16)}
    if step == "4":
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=8, resolution_factor=4)
        pipeline = upgrade(base, autoencoder)
    else:
        decoders[upgraded.vae] = (48, 32)
        pipeline = upgrade(upgraded, AutoencoderDA.from_base(upgraded.vae, detail_channels=8))

    for decoder, size in decoders.items():
        seen: list = []
        callback = preview_callback(decoder, lambda step, images, seen=seen: seen.append(images[0].size))
        assert run(pipeline, callback, width=96, height=64)[0].size == (96, 64)
        assert seen == 4 * [size]


def test_what_is_refused(pair) -> None:
    base, upgraded = pair
    with pytest.raises(SettingsError, match="every=0: allowed are 1 or more"):
        preview_callback(base.vae, print, every=0)
    callback = preview_callback(base.vae, print)
    with pytest.raises(SettingsError, match=r"latents \[1, 16, 64\]: previews need \[B, 4 or more, h, w\]"):
        callback(upgraded, 0, None, {"latents": torch.zeros(1, 16, 64)})
    for name in ("stochastic_sampling", "invert_sigmas"):  # their steps are no extrapolation of a velocity
        upgraded.scheduler = FlowMatchEulerDiscreteScheduler(**{name: True})
        with pytest.raises(SettingsError, match=f"the scheduler has {name}=True"):
            run(upgraded, callback)
    upgraded.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(SettingsError, match="not a DPMSolverMultistepScheduler"):
        callback(upgraded, 0, None, {"latents": torch.zeros(1, 8, 8, 8)})
