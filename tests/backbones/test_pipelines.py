"""Every backbone end to end, on a tiny real pipeline: upgrade, sample, one step of fine-tuning, save, load, sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CogView4Pipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from torch import Tensor

import tiny
import tiny_backbones
import tiny_pipelines
from davae.backbones import backbone_of
from davae.backbones.packing import pack, unpack
from davae.backbones.sana import read_instruction
from davae.data.pictures import to_bytes
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import find_target_layers
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import draw_shared_noise, sample
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from davae.seeds import sample_generators
from davae.training.stage_two_loss import choose_objective

# Of diffusers' DPM solver: numpy is given a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["red apple", "a pear"]
CLASSES = [1, 7]
TEXT_TOKENS = 32
C = tiny_pipelines.CHANNELS


IMG2IMG = {
    "StableDiffusion3Pipeline": (StableDiffusion3Img2ImgPipeline, {"guidance_scale": 1.0}),
    "FluxPipeline": (FluxImg2ImgPipeline, {}),
    "QwenImagePipeline": (QwenImageImg2ImgPipeline, {"true_cfg_scale": 1.0}),
    "ZImagePipeline": (ZImageImg2ImgPipeline, {"guidance_scale": 0.0}),
}
"""Stock pipelines that start from a picture, and how to call them without guidance."""


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def base(request: pytest.FixtureRequest) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        return tiny_pipelines.quiet(tiny_pipelines.PIPELINES[request.param]())


def upgrade_of(base: DiffusionPipeline) -> DiffusionPipeline:
    """Widened by as many channels, its detail encoder such that its latents vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=C, linear_blocks=True).eval()
        torch.nn.init.normal_(autoencoder.detail_downsample.shortcut.weight, std=0.3)
    return tiny_pipelines.quiet(upgrade(base, autoencoder))


@pytest.fixture(scope="module")
def upgraded(base: DiffusionPipeline) -> DiffusionPipeline:
    return upgrade_of(base)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(pipeline: DiffusionPipeline, size: int | tuple[int, int], *, steps: int = 2, seed: int = 1) -> Tensor:
    """Two pictures in bytes, without guidance, by the stock pipeline; base and upgraded ones share their noise."""
    if backbone_of(pipeline.transformer).classes:
        if isinstance(size, tuple):
            pytest.skip("makes squares of one size")
        assert pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == size
        # The numbers of a narrow sample are the first of a wide one's.
        generator = [torch.Generator().manual_seed(seed + index) for index in (0, 1)]
        settings = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "pt"}
        return to_bytes(pipeline(CLASSES, generator=generator, **settings).images * 2 - 1)
    settings = {"guidance_scale": 1.0, "prompt_tokens": TEXT_TOKENS}
    return sample(pipeline, PROMPTS, size=size, seed=seed, steps=steps, **settings)


def condition_of(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    backbone = backbone_of(pipeline.transformer)
    if backbone.classes:
        return backbone.condition(pipeline, CLASSES)
    return backbone.condition(pipeline, PROMPTS, max_sequence_length=TEXT_TOKENS)


def recorded(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[tuple[tuple, object]]:
    """The positional arguments and the result of every call of a method from now on; it does what it did."""
    calls, method = [], getattr(owner, name)

    def seen(*arguments, **settings):
        calls.append((arguments, method(*arguments, **settings)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, seen)
    return calls


def seen_tokens(pipeline: DiffusionPipeline, size: int) -> list[tuple[int, ...]]:
    """Shapes of what the input port is given while a picture of this size is made."""
    shapes = []
    port = pipeline.transformer.get_submodule(backbone_of(pipeline.transformer).ports.input)
    hook = port.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    made(pipeline, size)
    hook.remove()
    return shapes


def test_the_same_class_makes_twice_the_side_of_the_same_tokens(base, upgraded):
    assert type(upgraded) is type(base)
    assert made(base, 32).shape == (2, 3, 32, 32)
    assert made(upgraded, 64).shape == (2, 3, 64, 64)
    narrow, wide = seen_tokens(base, 32), seen_tokens(upgraded, 64)
    assert len(narrow) == len(wide) == 2
    for before, after in zip(narrow, wide, strict=True):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1  # the channels, and nothing else
        assert np.prod(after) == 2 * np.prod(before)


def test_the_default_size_doubles_and_others_are_checked(base, upgraded):
    side = backbone_of(base.transformer).picture_side
    assert side(upgraded, None) == 2 * side(base, None)
    assert side(upgraded, 64) == 64
    with pytest.raises(SettingsError, match=r"size=65: .*allowed"):
        side(upgraded, 65)


def test_a_pipeline_that_davae_does_not_sample_from_is_named(upgraded):
    """Sizes and calls are known for the pipelines that are tested, not for others with the same backbone."""
    backbone = backbone_of(upgraded.transformer)
    if backbone.classes or type(upgraded).__name__ not in IMG2IMG:
        pytest.skip("no other pipeline with this backbone is tried here")
    kind, _ = IMG2IMG[type(upgraded).__name__]
    with pytest.raises(SettingsError, match=rf"a {kind.__name__} was given; allowed is {type(upgraded).__name__}"):
        backbone.picture_side(kind(**upgraded.components), 64)


@torch.no_grad()
def test_sampling_starts_as_the_bases_on_the_base_half(base, upgraded):
    """With the noise shared, the input port gives the base's tokens in every step: the detail half has no say yet."""
    if base.transformer.config.get("sample_size") == 128:
        pytest.skip("PixArt-alpha is told the size of the picture, which has doubled: see the next test")
    tokens: dict[str, list[Tensor]] = {"base": [], "upgraded": []}
    for name, pipeline, size in (("base", base, 32), ("upgraded", upgraded, 64)):
        port = pipeline.transformer.get_submodule(backbone_of(pipeline.transformer).ports.input)
        hook = port.register_forward_hook(lambda _, __, output, name=name: tokens[name].append(output))
        made(pipeline, size, steps=3)
        hook.remove()
    assert len(tokens["base"]) == 3
    for theirs, ours in zip(tokens["base"], tokens["upgraded"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (tokens["base"][0] - tokens["base"][-1]).abs().max() > 0.01


@torch.no_grad()
def test_pixart_alpha_is_the_base_where_it_is_told_the_bases_size():
    """Its pipeline tells the transformer the size in pixels, so that the upgraded one has to learn its own."""
    base = tiny_pipelines.quiet(tiny_pipelines.pixart_alpha())
    upgraded = upgrade_of(base)
    noise, time = numbers(2, 2 * C, 8, 8), torch.tensor([10, 900])
    models = [(base.transformer, noise[:, :C]), (upgraded.transformer, noise)]
    predict = backbone_of(base.transformer).noise
    told = condition_of(base)
    (ours, variance), (theirs, _) = (predict(model, latents, time, told) for model, latents in reversed(models))
    torch.testing.assert_close(ours[:, :C], theirs, atol=1e-5, rtol=1e-5)
    assert not ours[:, C:].any()
    assert not variance[:, C:].any()
    doubled, _ = predict(upgraded.transformer, noise, time, condition_of(upgraded))
    assert (doubled[:, :C] - theirs).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("size", [64, (96, 64)])
def test_the_prediction_in_training_is_what_the_stock_pipeline_computes(upgraded, size, monkeypatch):
    """What the scheduler is given in the first step of sampling is `velocity`, or `noise`, at that time."""
    backbone, transformer = backbone_of(upgraded.transformer), upgraded.transformer
    given = recorded(monkeypatch, upgraded.scheduler, "step")
    made(upgraded, size, seed=2)
    start = draw_shared_noise(upgraded, [0, 1], seed=2, height=8, width=8 if size == 64 else 12)
    if backbone.classes:
        draws = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
        start = torch.cat([torch.randn(1, 2 * C, 8, 8, generator=draw) for draw in draws])
    theirs, timestep, *_ = given[0][0]
    if backbone.noise is None:
        ours = backbone.velocity(transformer, start, timestep.expand(2) / 1000, condition_of(upgraded))
    else:
        ours, _ = backbone.noise(transformer, start, timestep.expand(2), condition_of(upgraded))
    assert ours.shape == start.shape
    assert ours[:, :C].std() > 0.01
    torch.testing.assert_close(pack(ours) if theirs.ndim == 3 else ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_training_shift_is_the_one_that_sampling_has(upgraded):
    """The scheduler's own sigmas of a picture are evenly spaced once the shift is taken back."""
    backbone, scheduler = backbone_of(upgraded.transformer), upgraded.scheduler
    if backbone.noise is not None or backbone.classes:
        pytest.skip("predicts noise, or has times of its own")
    made(upgraded, 64, steps=50)  # FLUX.2's shift depends on how many they are
    shift, sigmas = backbone.shift(upgraded, 16), scheduler.sigmas[:50]
    plain = sigmas / (shift - (shift - 1) * sigmas)
    assert shift > 1.2
    assert plain[0] == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(plain.diff(), plain.diff().mean().expand(49), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [64, (96, 64)])
def test_the_stock_pipeline_decodes_what_training_would_encode(upgraded, size, monkeypatch):
    """What it gives the autoencoder, standardised as in training, are the latents of its last step."""
    steps = recorded(monkeypatch, upgraded.scheduler, "step")
    given = recorded(monkeypatch, upgraded.vae, "decode")
    picture = made(upgraded, size)
    width = 64 if size == 64 else 96
    assert picture.shape == (2, 3, 64, width)
    final = steps[-1][1][0]
    if backbone_of(upgraded.transformer).ports.packed > 1:
        final = unpack(final, 8, width // 8)
    (((latents, *_), _),) = given
    standardised = upgraded.vae.standardise(latents.squeeze(2) if latents.ndim == 5 else latents)
    torch.testing.assert_close(standardised, final, atol=1e-4, rtol=1e-4)
    assert final.std() > 0.1


def test_a_picture_is_where_img2img_starts(upgraded):
    """With little noise the latents stay near the picture's own; with much they do not."""
    if type(upgraded).__name__ not in IMG2IMG:
        pytest.skip("diffusers has no such pipeline, or it was not tried")
    kind, settings = IMG2IMG[type(upgraded).__name__]
    pipeline = tiny_pipelines.quiet(kind(**upgraded.components))
    image = numbers(1, 3, 64, 64, seed=6).mul(0.3).add(0.5).clamp(0, 1)
    with torch.no_grad():
        encoded = upgraded.vae.standardise(upgraded.vae.encode(image * 2 - 1).latent_dist.mode())[:, :C]
    settings = {**settings, "height": 64, "width": 64, "num_inference_steps": 50, "max_sequence_length": TEXT_TOKENS}
    distances = []
    for strength in (0.02, 0.98):
        random = torch.Generator().manual_seed(0)
        arguments = {"image": image, "strength": strength, "generator": random, **settings}
        latents = pipeline("red apple", output_type="latent", **arguments).images
        latents = unpack(latents, 8, 8) if latents.ndim == 3 else latents
        distances.append((latents[:, :C] - encoded).abs().mean())
        arguments["generator"] = torch.Generator().manual_seed(0)
        assert pipeline("red apple", output_type="pt", **arguments).images.shape == image.shape
    assert distances[0] < 0.25 * distances[1]


def test_one_step_lowers_the_loss_and_the_result_is_saved_and_loaded(base, tmp_path: Path):
    upgraded = upgrade_of(base)
    autoencoder, backbone = upgraded.vae, backbone_of(upgraded.transformer)
    before = made(upgraded, 64)
    pictures = numbers(2, 3, 64, 64, seed=3).clamp(-1, 1)
    autoencoder.calibrate([pictures])
    with torch.no_grad():
        clean = autoencoder.standardise(autoencoder.encode(pictures).latent_dist.mode())
        condition = condition_of(upgraded)
    assert clean.shape == (2, 2 * C, 8, 8)
    torch.testing.assert_close(clean[:, C:].mean(dim=(0, 2, 3)), torch.zeros(C), atol=1e-4, rtol=0)
    torch.testing.assert_close(clean[:, C:].std(dim=(0, 2, 3), correction=0), torch.ones(C), atol=1e-3, rtol=0)
    objective = choose_objective(upgraded, base_channels=C, positions=64)
    noise, time = numbers(*clean.shape, seed=4), objective.draw_times(sample_generators(5, "test", range(2)))
    ports = [upgraded.transformer.get_submodule(name) for name in (backbone.ports.input, backbone.ports.output)]
    optimiser = torch.optim.SGD([p for port in ports for p in port.parameters()], lr=1e-3)

    def loss() -> Tensor:
        prediction = objective.predict(upgraded.transformer, clean, noise, time, condition)
        return objective.loss(prediction, clean, noise, time, detail_weight=1.0)[0]

    first = loss()
    first.backward()
    optimiser.step()
    assert loss().item() < first.item()
    for port in ports:
        assert port.weight.grad.abs().max() > 0

    after = made(upgraded, 64)
    assert not torch.equal(after, before)
    save_pipeline(upgraded, tmp_path / "saved")
    loaded = tiny_pipelines.quiet(load_pipeline(tmp_path / "saved"))
    assert type(loaded) is type(base)
    assert torch.equal(made(loaded, 64), after)


@pytest.mark.parametrize("name", ["flux", "flux2"])
@torch.no_grad()
def test_a_distilled_model_is_told_the_stock_pipelines_guidance(name, monkeypatch: pytest.MonkeyPatch):
    """FLUX.1-dev and FLUX.2-dev: `velocity` is what their pipelines compute when they are called without a guidance."""
    base = tiny_pipelines.PIPELINES[name]()
    embeds = numbers(1, 5, 16)
    told = {"prompt_embeds": embeds}
    if name == "flux":
        base.transformer = tiny.tiny_flux(C, guidance_embeds=True)
        told["pooled_prompt_embeds"] = embeds[:, 0]
    else:
        models = {"scheduler": base.scheduler, "vae": base.vae}
        transformer = tiny_backbones.tiny_flux2(C, guidance_embeds=True)
        base = Flux2Pipeline(**models, transformer=transformer, text_encoder=None, tokenizer=None)
    pipeline = upgrade_of(tiny_pipelines.quiet(base))
    given, noise = recorded(monkeypatch, pipeline.scheduler, "step"), numbers(1, 2 * C, 8, 8, seed=1)
    latents = pack(noise) if name == "flux" else torch.nn.functional.pixel_unshuffle(noise, 2)
    pipeline(**told, latents=latents, height=64, width=64, num_inference_steps=1, output_type="latent")
    condition = {"encoder_hidden_states": embeds}
    if name == "flux":
        condition["pooled_projections"] = embeds[:, 0]
    ours = backbone_of(pipeline.transformer).velocity(pipeline.transformer, noise, torch.ones(1), condition)
    torch.testing.assert_close(pack(ours), given[0][0][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_the_empty_caption_is_what_the_stock_pipeline_guides_against(name):
    """It stands alone, where a prompt stands behind an instruction; in a batch and by itself."""
    pipeline = tiny_pipelines.PIPELINES[name]()
    condition = backbone_of(pipeline.transformer).condition
    mixed = condition(pipeline, ["red apple", ""], max_sequence_length=400)
    embeds, mask, none, no_mask = pipeline.encode_prompt(
        ["red apple"],
        max_sequence_length=400,
        **({"complex_human_instruction": read_instruction()} if name == "sana" else {}),
    )
    for row, expected in enumerate(((embeds, mask), (none, no_mask))):
        for made, theirs in zip(mixed.values(), expected, strict=True):
            torch.testing.assert_close(made[row : row + 1], theirs, atol=1e-5, rtol=1e-5)
    alone = condition(pipeline, [""], max_sequence_length=400)
    torch.testing.assert_close(alone["encoder_hidden_states"], none, atol=1e-5, rtol=1e-5)
    assert mask.sum() > no_mask.sum()


@torch.no_grad()
def test_a_backbone_with_ports_only_makes_pictures_of_twice_the_side_as_well():
    """CogView4, of which davae knows no captions: its stock pipeline is called with what somebody has encoded."""
    base = CogView4Pipeline(
        vae=tiny.tiny_vae(C, shift_factor=None),
        transformer=tiny_backbones.tiny_cogview4(C),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        text_encoder=None,
        tokenizer=None,
    )
    upgraded = upgrade_of(tiny_pipelines.quiet(base))
    told = {"prompt_embeds": numbers(1, 16, 16), "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "pt"}
    assert upgraded(**told).images.shape == (1, 3, 64, 64)
    assert base(**told).images.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_classes_are_dropped_by_the_recipe_and_not_by_the_model():
    """DiT's own dropout of labels would act in training mode, on top of `caption_dropout`."""
    base = tiny_pipelines.dit()
    transformer, latents = base.transformer.train(), numbers(64, C, 8, 8)
    condition = {"class_labels": torch.full((64,), 7)}
    predict = backbone_of(transformer).noise
    once, again = (predict(transformer, latents, torch.full((64,), 500), condition)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_the_shapes_of_a_condition_are_known(upgraded):
    backbone = backbone_of(upgraded.transformer)
    if backbone.condition_shapes is None:
        pytest.skip("davae does not know them")
    shapes = backbone.condition_shapes(upgraded.transformer, backbone.clip_tokens + TEXT_TOKENS)
    assert shapes == {name: tuple(values.shape[1:]) for name, values in condition_of(upgraded).items()}


def test_the_default_lora_targets_are_layers_and_no_ports(upgraded):
    targets = backbone_of(upgraded.transformer).lora_targets
    if not targets:
        pytest.skip("has none")
    assert len(find_target_layers(upgraded.transformer, targets)) >= len(targets)


GUIDED = ["sd3", "chroma", "ovis-image", "longcat-image", "krea2", "qwen-image", "sana", "z-image", "auraflow"]
GUIDED += ["lumina2", "pixart-sigma", "pixart-alpha"]


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_of_one_or_less_is_none(name):
    pipeline = tiny_pipelines.PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    none, less, much = (
        sample(pipeline, PROMPTS, size=32, seed=0, steps=2, guidance_scale=scale, prompt_tokens=TEXT_TOKENS)
        for scale in (1.0, 0.5, 6.0)
    )
    assert torch.equal(none, less)
    assert not torch.equal(none, much)
