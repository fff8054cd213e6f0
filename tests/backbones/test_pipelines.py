"""Every backbone end to end, on a tiny real pipeline: upgrade, sample, one step of fine-tuning, save, load, sample."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from torch import Tensor

import tiny_pipelines
from davae.backbones import backbone_of
from davae.backbones.packing import pack, unpack
from davae.errors import SettingsError
from davae.pipelines.adapter import find_target_layers
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import draw_shared_noise, image_to_image, sample
from davae.pipelines.saving import save_pipeline
from davae.seeds import sample_generators
from davae.training.stage_two import choose_objective
from tiny_upgrades import PROMPTS, TEXT_TOKENS, encode_tiny, make_images, numbers, record_calls, upgrade_tiny

# Of diffusers' DPM solver: numpy is given a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

C = tiny_pipelines.CHANNELS


IMG2IMG = {
    "StableDiffusion3Pipeline": (StableDiffusion3Img2ImgPipeline, {"guidance_scale": 1.0}),
    "FluxPipeline": (FluxImg2ImgPipeline, {}),
    "ChromaPipeline": (ChromaImg2ImgPipeline, {"guidance_scale": 1.0}),
    "QwenImagePipeline": (QwenImageImg2ImgPipeline, {"true_cfg_scale": 1.0}),
    "ZImagePipeline": (ZImageImg2ImgPipeline, {"guidance_scale": 0.0}),
}
"""Stock pipelines that start from an image, and how to call them without guidance."""


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def base(request: pytest.FixtureRequest) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        return tiny_pipelines.quiet(tiny_pipelines.PIPELINES[request.param]())


@pytest.fixture(scope="module")
def upgraded(base: DiffusionPipeline) -> DiffusionPipeline:
    return upgrade_tiny(base)


def record_input_port(pipeline: DiffusionPipeline, size: int, *, steps: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the input port in each step while images of this size are made."""
    calls = []
    port = pipeline.transformer.get_submodule(backbone_of(pipeline.transformer).ports.input)
    hook = port.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    make_images(pipeline, size, steps=steps)
    hook.remove()
    return calls


def test_the_same_class_makes_twice_the_side_of_the_same_tokens(base, upgraded):
    assert type(upgraded) is type(base)
    assert make_images(base, 32).shape == (2, 3, 32, 32)
    assert make_images(upgraded, 64).shape == (2, 3, 64, 64)

    narrow, wide = record_input_port(base, 32), record_input_port(upgraded, 64)
    assert len(narrow) == len(wide) == 2
    for (before, _), (after, _) in zip(narrow, wide, strict=True):
        # The shapes differ in the channels only.
        assert sum(a != b for a, b in zip(before.shape, after.shape, strict=True)) == 1
        assert after.numel() == 2 * before.numel()


def test_the_default_size_doubles_and_others_are_checked(base, upgraded):
    side = backbone_of(base.transformer).picture_side
    assert side(upgraded, None) == 2 * side(base, None)
    assert side(upgraded, 64) == 64
    with pytest.raises(SettingsError, match=r"size=65: .*allowed"):
        side(upgraded, 65)


def test_a_pipeline_that_davae_does_not_sample_from_is_named(upgraded):
    """Sizes and calls are known for the pipelines that are tested, not for others with the same backbone."""
    backbone = backbone_of(upgraded.transformer)
    name = type(upgraded).__name__
    kind = getattr(diffusers, name.removesuffix("Pipeline") + "InpaintPipeline", None)
    if backbone.classes or kind is None:
        pytest.skip("no other pipeline with this backbone is tried here")
    with pytest.raises(SettingsError, match=rf"a {kind.__name__} was given; allowed is .*{name}"):
        backbone.picture_side(kind(**upgraded.components), 64)


@torch.no_grad()
def test_sampling_starts_as_the_bases_on_the_base_half(base, upgraded):
    """From the same noise, the input port makes the base's tokens in every step: the detail changes nothing yet."""
    if base.transformer.config.get("sample_size") == 128:
        pytest.skip("PixArt-alpha is told the image's size, which has doubled: see test_traps.py")

    narrow, wide = record_input_port(base, 32, steps=3), record_input_port(upgraded, 64, steps=3)
    assert len(narrow) == 3
    for (_, theirs), (_, ours) in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (narrow[0][1] - narrow[-1][1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("size", [64, (96, 64)])
def test_the_prediction_in_training_is_what_the_stock_pipeline_computes(upgraded, size, monkeypatch):
    """In the first step of sampling, the scheduler gets what `velocity`, or `noise`, predicts at that time."""
    backbone, transformer = backbone_of(upgraded.transformer), upgraded.transformer
    calls = record_calls(monkeypatch, upgraded.scheduler, "step")
    make_images(upgraded, size, seed=2)
    theirs, timestep, *_ = calls[0][0]

    start = draw_shared_noise(upgraded, [0, 1], seed=2, height=8, width=8 if size == 64 else 12)
    if backbone.classes:
        draws = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
        start = torch.cat([torch.randn(1, 2 * C, 8, 8, generator=draw) for draw in draws])

    if backbone.noise is None:
        ours = backbone.velocity(transformer, start, timestep.expand(2) / 1000, encode_tiny(upgraded))
    else:
        ours, _ = backbone.noise(transformer, start, timestep.expand(2), encode_tiny(upgraded))
    assert ours.shape == start.shape
    assert ours[:, :C].std() > 0.01
    torch.testing.assert_close(pack(ours) if theirs.ndim == 3 else ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_training_shift_is_the_one_that_sampling_has(upgraded):
    """The scheduler's own sigmas are evenly spaced once the shift is taken back."""
    backbone, scheduler = backbone_of(upgraded.transformer), upgraded.scheduler
    if backbone.noise is not None or backbone.classes:
        pytest.skip("predicts noise, or has times of its own")
    make_images(upgraded, 64, steps=50)  # FLUX.2's shift depends on the number of steps
    shift, sigmas = backbone.shift(upgraded, 16), scheduler.sigmas[:50]

    plain = sigmas / (shift - (shift - 1) * sigmas)
    assert shift > 1.2
    assert plain[0] == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(plain.diff(), plain.diff().mean().expand(49), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [64, (96, 64)])
def test_the_stock_pipeline_decodes_what_training_would_encode(upgraded, size, monkeypatch):
    """It gives the autoencoder the latents of its last step, if they are standardised as in training."""
    steps = record_calls(monkeypatch, upgraded.scheduler, "step")
    decodings = record_calls(monkeypatch, upgraded.vae, "decode")
    width = 64 if size == 64 else 96
    assert make_images(upgraded, size).shape == (2, 3, 64, width)

    final = steps[-1][1][0]
    if backbone_of(upgraded.transformer).ports.packed > 1:
        final = unpack(final, 8, width // 8)
    assert len(decodings) == 1
    latents = decodings[0][0][0]
    standardised = upgraded.vae.standardise(latents.squeeze(2) if latents.ndim == 5 else latents)
    torch.testing.assert_close(standardised, final, atol=1e-4, rtol=1e-4)
    assert final.std() > 0.1


def test_sample_starts_from_an_image_where_diffusers_can(upgraded):
    if type(upgraded).__name__ not in IMG2IMG:
        with pytest.raises(SettingsError, match=f"no image-to-image pipeline beside {type(upgraded).__name__}"):
            image_to_image(upgraded)
        return
    image = torch.randint(0, 256, (3, 80, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = tiny_pipelines.quiet(image_to_image(upgraded))
    settings = {"seed": 1, "steps": 2, "prompt_tokens": TEXT_TOKENS, "size": 64, "image": image}
    made = [sample(pipeline, ["red apple", "blue box"], strength=strength, **settings) for strength in (0.5, 0.5, 1.0)]
    assert made[0].shape == (2, 3, 64, 64)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_img2img_starts_from_the_image(upgraded):
    """With little noise the latents stay near the image's own; with much they do not."""
    if type(upgraded).__name__ not in IMG2IMG:
        pytest.skip("diffusers has no such pipeline, or it was not tried")
    kind, settings = IMG2IMG[type(upgraded).__name__]
    pipeline = tiny_pipelines.quiet(kind(**upgraded.components))
    image = numbers(1, 3, 64, 64, seed=6).mul(0.3).add(0.5).clamp(0, 1)
    with torch.no_grad():
        encoded = upgraded.vae.standardise(upgraded.vae.encode(image * 2 - 1).latent_dist.mode())[:, :C]
    settings = {**settings, "height": 64, "width": 64, "num_inference_steps": 50, "max_sequence_length": TEXT_TOKENS}

    def call(strength: float, output_type: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"strength": strength, "output_type": output_type, **settings}
        return pipeline("red apple", image=image, generator=generator, **arguments).images

    distances = []
    for strength in (0.02, 0.98):
        assert call(strength, "pt").shape == image.shape
        latents = call(strength, "latent")
        latents = unpack(latents, 8, 8) if latents.ndim == 3 else latents
        distances.append((latents[:, :C] - encoded).abs().mean())
    assert distances[0] < 0.25 * distances[1]


def test_one_step_lowers_the_loss_and_the_result_is_saved_and_loaded(base, tmp_path: Path):
    upgraded = upgrade_tiny(base)
    autoencoder, backbone = upgraded.vae, backbone_of(upgraded.transformer)
    before = make_images(upgraded, 64)

    # Calibrated latents, whose detail half is at unit scale.
    images = numbers(2, 3, 64, 64, seed=3).clamp(-1, 1)
    autoencoder.calibrate([images])
    with torch.no_grad():
        clean = autoencoder.standardise(autoencoder.encode(images).latent_dist.mode())
        condition = encode_tiny(upgraded)
    assert clean.shape == (2, 2 * C, 8, 8)
    torch.testing.assert_close(clean[:, C:].mean(dim=(0, 2, 3)), torch.zeros(C), atol=1e-4, rtol=0)
    torch.testing.assert_close(clean[:, C:].std(dim=(0, 2, 3), correction=0), torch.ones(C), atol=1e-3, rtol=0)

    # One step on both ports.
    objective = choose_objective(upgraded, base_channels=C, positions=64)
    noise, time = numbers(*clean.shape, seed=4), objective.draw_times(sample_generators(5, "test", range(2)))
    ports = [upgraded.transformer.get_submodule(name) for name in (backbone.ports.input, backbone.ports.output)]
    optimizer = torch.optim.SGD([*ports[0].parameters(), *ports[1].parameters()], lr=1e-3)

    def loss() -> Tensor:
        prediction = objective.predict(upgraded.transformer, clean, noise, time, condition)
        return objective.loss(prediction, clean, noise, time, detail_weight=1.0)[0]

    first = loss()
    first.backward()
    optimizer.step()
    assert loss().item() < first.item()
    for port in ports:
        assert port.weight.grad.abs().max() > 0

    after = make_images(upgraded, 64)
    assert not torch.equal(after, before)
    save_pipeline(upgraded, tmp_path / "saved")
    loaded = tiny_pipelines.quiet(load_pipeline(tmp_path / "saved"))
    assert type(loaded) is type(base)
    assert torch.equal(make_images(loaded, 64), after)


def test_the_shapes_of_a_condition_are_known(upgraded):
    backbone = backbone_of(upgraded.transformer)
    if backbone.condition_shapes is None:
        pytest.skip("davae does not know them")
    shapes = backbone.condition_shapes(upgraded.transformer, backbone.clip_tokens + TEXT_TOKENS)
    assert shapes == {name: tuple(values.shape[1:]) for name, values in encode_tiny(upgraded).items()}


def test_the_default_lora_targets_are_layers_and_no_ports(upgraded):
    targets = backbone_of(upgraded.transformer).lora_targets
    if not targets:
        pytest.skip("has none")
    assert len(find_target_layers(upgraded.transformer, targets)) >= len(targets)


GUIDED = ["sd3", "chroma", "ovis-image", "longcat-image", "krea2", "qwen-image", "sana", "z-image", "auraflow"]
GUIDED += ["lumina2", "pixart-sigma", "pixart-alpha"]


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_of_one_or_less_is_none(name):
    pipeline = tiny_pipelines.quiet(tiny_pipelines.PIPELINES[name]())

    def guided(scale: float) -> Tensor:
        settings = {"size": 32, "steps": 2, "prompt_tokens": TEXT_TOKENS}
        return sample(pipeline, PROMPTS, seed=0, guidance_scale=scale, **settings)

    assert torch.equal(guided(1.0), guided(0.5))
    assert not torch.equal(guided(1.0), guided(6.0))
