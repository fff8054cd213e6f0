"""Upgrades: a stock pipeline of twice the size at the same tokens, and every pair that is none is refused."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, FluxPipeline
from einops import rearrange

import tiny
import tiny_backbones
import tiny_pipelines
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from tiny_adapters import disturb, generate


class OnlyParts(DiffusionPipeline):
    """A pipeline of an older kind: nothing in it is a transformer."""

    def __init__(self, vae, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)


def test_the_default_size_doubles_and_the_tokens_stay(base, autoencoder):
    pipeline = upgrade(base, autoencoder)
    tokens = []
    for model in (base.transformer, pipeline.transformer):
        model.transformer_blocks[0].register_forward_pre_hook(
            lambda _, __, inputs: tokens.append(inputs["hidden_states"].shape[1]), with_kwargs=True
        )

    assert type(pipeline) is type(base)
    assert generate(base).shape == (32, 32, 3)
    assert generate(pipeline).shape == (64, 64, 3)
    assert set(tokens) == {16}


def test_the_base_half_of_the_latents_runs_as_in_the_base_pipeline(base, autoencoder):
    pipeline = upgrade(base, autoencoder)
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = generate(base, latents=noise[:, :4], output_type="latent")
    latents = generate(pipeline, latents=noise, output_type="latent")
    assert torch.equal(latents[:4], expected)
    assert torch.equal(latents[4:], noise[0, 4:])  # no velocity: noise stays noise until it is trained


def test_the_input_pipeline_is_left_as_it_is(base, autoencoder):
    before, image = dict(base.components), generate(base)
    pipeline = upgrade(base, autoencoder)
    assert base.components == before
    assert base.transformer.config.in_channels == 4
    assert np.array_equal(generate(base), image)
    shared = before.keys() - {"vae", "transformer"}
    assert all(pipeline.components[name] is before[name] for name in shared)


def test_the_small_autoencoder_works_as_well():
    base = tiny.tiny_sd3_pipeline(vae=tiny.tiny_taesd())
    pipeline = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4).eval())
    assert generate(pipeline).shape == (64, 64, 3)


def test_a_flux_pipeline_is_upgraded_as_well(base):
    flux = FluxPipeline(
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny.tiny_flux(4),
    )
    pipeline = upgrade(flux, AutoencoderDA.from_base(flux.vae, detail_channels=4).eval())
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    image = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=embeds[:, 0],
        num_inference_steps=2,
        height=64,
        width=64,
        output_type="np",
    ).images[0]

    assert type(pipeline) is FluxPipeline
    assert image.shape == (64, 64, 3)


def test_a_dit_pipeline_is_upgraded_as_well(tmp_path):
    """Class-conditional, noise with learned variance: its samples' base half is the base pipeline's own."""
    base = DiTPipeline(tiny.tiny_dit(4), tiny.tiny_vae(), DDIMScheduler(clip_sample=False), id2label={1: "cat, tabby"})
    pipeline = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=12).eval())
    assert type(pipeline) is DiTPipeline
    assert pipeline.get_label_ids(["tabby"]) == [1]

    save_pipeline(pipeline, tmp_path / "saved")
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs_seen, noises, classes = {}, iter((noise[:, :4], noise, noise)), [1, 7]

    for name, model in (("base", base), ("upgraded", pipeline), ("saved", load_pipeline(tmp_path / "saved"))):
        model.set_progress_bar_config(disable=True)
        model.transformer.register_forward_pre_hook(
            lambda _, inputs, name=name: inputs_seen.setdefault(name, []).append(inputs[0]) or None
        )
        with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            start = next(noises)
            patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, start=start, **__: start)
            image = model(classes, num_inference_steps=3, guidance_scale=2.0, output_type="pt").images
        assert image.shape == (2, 3, *((32, 32) if name == "base" else (64, 64)))

    for name in ("upgraded", "saved"):
        for ours, theirs in zip(inputs_seen[name], inputs_seen["base"], strict=True):
            torch.testing.assert_close(ours[:, :4], theirs, atol=1e-5, rtol=0)
            assert ours.shape[1] == 16
    assert (inputs_seen["base"][-1] - inputs_seen["base"][0]).abs().max() > 0.1


def test_a_pipeline_that_cannot_run_upgraded_is_refused_and_says_why(base, autoencoder):
    base.transformer = tiny_backbones.tiny_hunyuan(4)
    with pytest.raises(SettingsError, match=r"positions for a downsample factor of 8.*davae.widen_transformer"):
        upgrade(base, autoencoder)


def test_a_pipeline_without_a_transformer_is_told_what_it_lacks(base, autoencoder):
    parts = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    with pytest.raises(SettingsError, match=r"has no transformer.*It has .*vae.*allowed are .*FluxTransformer2DModel"):
        upgrade(OnlyParts(**parts), autoencoder)


def test_offloaded_weights_are_refused(base, autoencoder):
    cpu_offload(base.transformer, execution_device="cpu")  # what `enable_sequential_cpu_offload` does
    with pytest.raises(SettingsError, match="SD3Transformer2DModel's weights are offloaded"):
        upgrade(base, autoencoder)


def test_an_upgrade_says_what_the_stock_pipeline_must_be_told(caplog):
    pixart = tiny_pipelines.pixart_sigma()
    upgrade(pixart, AutoencoderDA.from_base(pixart.vae, detail_channels=16).eval())
    assert "PixArtSigmaPipeline: call it with use_resolution_binning=False" in caplog.text


def test_with_too_many_detail_channels_the_starting_noise_stays_where_an_upgrade_says(base, autoencoder, caplog):
    pipeline = upgrade(base, autoencoder)  # 4 + 4 channels in patches of 2: 32 numbers a token, at a width of 16
    assert "cannot predict the noise in 16 directions of each token" in caplog.text

    disturb(pipeline.transformer.parameters())
    start = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(5))
    settings = {"num_images_per_prompt": 2, "latents": start, "output_type": "latent", "max_sequence_length": 8}
    end = pipeline("red apple", num_inference_steps=3, guidance_scale=4.0, **settings).images
    change = rearrange(end - start, "b c (h p) (w q) -> (b h w) (p q c)", p=2, q=2).double()
    lost = torch.linalg.svd(pipeline.transformer.proj_out.weight.double())[0][:, 16:]

    assert (change @ lost).std(dim=0).max() < 1e-5
    assert change.std(dim=0).mean() > 0.1


def test_an_autoencoder_of_another_vae_is_refused(base):
    other = tiny.tiny_vae()
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.1)
    with pytest.raises(SettingsError, match="frozen base encoder is not this pipeline's"):
        upgrade(base, AutoencoderDA.from_base(other, detail_channels=4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scaling_factor": 1.0}, "scaling_factor is 1.0, the pipeline's VAE has 1.5"),
        ({"shift_factor": 0.0}, "shift_factor is 0.0, the pipeline's VAE has 0.1"),
    ],
)
def test_an_autoencoder_with_other_scalars_is_refused(base, autoencoder, setting, message):
    autoencoder.register_to_config(**setting)
    with pytest.raises(SettingsError, match=message):
        upgrade(base, autoencoder)


def test_an_autoencoder_with_other_channels_is_refused(base):
    with pytest.raises(SettingsError, match="base_channels is 8, the pipeline's VAE has 4"):
        upgrade(base, AutoencoderDA.from_base(tiny.tiny_vae(8), detail_channels=8))


def test_what_is_no_pair_is_refused(base, autoencoder):
    upgraded = upgrade(base, autoencoder)
    with pytest.raises(SettingsError, match="base_channels is 4, the pipeline's VAE has 8"):
        upgrade(upgraded, autoencoder)
    with pytest.raises(SettingsError, match="AutoencoderKL is no AutoencoderDA"):
        upgrade(base, base.vae)
    base.transformer = tiny.tiny_vae()
    with pytest.raises(SettingsError, match="AutoencoderKL is no backbone that davae knows"):
        upgrade(base, autoencoder)


def test_an_upgrade_brings_the_autoencoder_to_the_precision_of_the_pipeline(base, autoencoder):
    pipeline = upgrade(base.to(torch.bfloat16), autoencoder)
    assert pipeline.vae.dtype == torch.bfloat16
    assert np.isfinite(generate(pipeline)).all()
