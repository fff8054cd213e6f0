"""Base autoencoders other than AutoencoderKL: AutoencoderDA computes with each as that does itself."""

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

import tiny
import tiny_pipelines
from davae.errors import SettingsError
from davae.evaluation.tokenizers import make_tokenizer
from davae.method.closed_form import fit_closed_form
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import BASE_AUTOENCODERS, base_facts, decode_latents
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.upgrade import upgrade

BUILDERS = {
    "dc": lambda: tiny_pipelines.sana().vae,
    "qwen": lambda: tiny_pipelines.qwen_image().vae,
    "flux2": lambda: tiny_pipelines.flux2().vae,
    "kl": lambda: tiny.tiny_vae(tiny_pipelines.CHANNELS),
}
C = tiny_pipelines.CHANNELS


@pytest.fixture(scope="module", params=BUILDERS)
def base(request: pytest.FixtureRequest):
    with torch.random.fork_rng(devices=[]):
        return BUILDERS[request.param]()


def picture(side: int, seed: int = 0, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def untrained(base, detail_channels: int = C) -> AutoencoderDA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoencoderDA.from_base(base, detail_channels=detail_channels).eval()


@torch.no_grad()
def test_the_base_half_and_the_decoder_are_the_bases_own(base):
    autoencoder, image = untrained(base), picture(64)
    small = make_tokenizer(base).encode(autoencoder.base_picture(image))
    facts = base_facts(base.config)
    units = (small - facts.shift_factor) * facts.scaling_factor
    torch.testing.assert_close(autoencoder.encode_base(image), units, atol=1e-5, rtol=1e-5)
    raw = autoencoder.split(autoencoder.encode(image).latent_dist.mode())[0]
    std, mean = (base.config.get(name) for name in ("latents_std", "latents_mean"))
    if std is not None:  # then the pipeline standardises by channel, and AutoencoderDA has done so already
        small = (small - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    torch.testing.assert_close(raw, small, atol=1e-5, rtol=1e-5)
    full = make_tokenizer(base).encode(image)
    theirs = decode_latents(base, full)
    ours = autoencoder.decode_full((full - facts.shift_factor) * facts.scaling_factor)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert theirs.shape == image.shape
    assert theirs.std() > 1e-3


def test_it_is_saved_and_loaded_with_its_contract(base, tmp_path):
    autoencoder = untrained(base)
    autoencoder.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    tensors = autoencoder.state_dict()
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    for name in ("encoder_block_out_channels", "z_dim", "latents_mean", "latents_std", "batch_norm_eps"):
        assert loaded.config[name] == autoencoder.config[name] or list(loaded.config[name]) == list(
            autoencoder.config[name]
        )
    assert torch.equal(
        loaded.encode(picture(16)).latent_dist.mode(), autoencoder.encode(picture(16)).latent_dist.mode()
    )


def test_a_saved_base_is_found_by_its_class(base, tmp_path):
    base.save_pretrained(tmp_path)
    assert type(load_base_vae(str(tmp_path))) is type(base)


def test_the_closed_form_start_fits_it(base):
    """It reconstructs its pictures better than with no detail, whatever the base."""
    autoencoder, images = untrained(base), picture(64, seed=3, count=4)

    @torch.no_grad()
    def error(detail: bool) -> float:
        z, (d, _) = autoencoder.encode_base(images), autoencoder.encode_detail(images)
        full = autoencoder.encode_pretrained(images)
        made = autoencoder.detail_upsample(torch.cat([z, d if detail else torch.zeros_like(d)], dim=1))
        return (made - full).square().mean().item()

    fit_closed_form(autoencoder, images, metric_pictures=2)
    assert error(detail=True) < 0.9 * error(detail=False)


def test_statistics_of_patches_standardise_as_the_stock_pipeline_does():
    pipeline = tiny_pipelines.flux2()
    autoencoder, image = untrained(pipeline.vae), picture(64)
    with torch.no_grad():
        posterior = autoencoder.encode(image).latent_dist
        base, detail = autoencoder.split(autoencoder.standardise(posterior.mode()))
        theirs = pipeline._encode_vae_image(autoencoder.base_picture(image), torch.Generator())
        raw = autoencoder.split(posterior.mode())[1]
    torch.testing.assert_close(base, Flux2KleinPipeline._unpatchify_latents(theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(detail, raw, atol=1e-5, rtol=1e-5)


def test_a_picture_may_be_a_video_of_one_frame():
    autoencoder, image = untrained(tiny_pipelines.qwen_image().vae), picture(16)
    with torch.no_grad():
        latents = autoencoder.encode(image).latent_dist.mode()
        frames = autoencoder.encode(image.unsqueeze(2)).latent_dist.mode()
        assert torch.equal(frames, latents.unsqueeze(2))
        assert torch.equal(autoencoder.decode(frames).sample, autoencoder.decode(latents).sample.unsqueeze(2))
    with pytest.raises(ValueError, match="a video of 3 frames"):
        autoencoder.encode(image.unsqueeze(2).expand(-1, -1, 3, -1, -1))
    with pytest.raises(ValueError, match="a video of 2 frames"):
        autoencoder.decode(frames.expand(-1, -1, 2, -1, -1))


@pytest.mark.parametrize("name", ["dc", "qwen"])
def test_layers_that_cannot_be_dropped_are_kept(name):
    with pytest.raises(ValueError, match="linear_blocks=False: a Autoencoder"):
        AutoencoderDA.from_base(BUILDERS[name](), detail_channels=C, linear_blocks=False)


def test_patch_statistics_of_another_base_are_refused():
    pipeline = tiny_pipelines.flux2()
    autoencoder = untrained(pipeline.vae)
    pipeline.vae.bn.running_mean.add_(1)
    with pytest.raises(SettingsError, match="running_mean of 2x2 patches"):
        upgrade(pipeline, autoencoder)


@pytest.mark.parametrize("name", BASE_AUTOENCODERS)
def test_a_row_is_found_by_the_name_of_its_class(name: str) -> None:
    assert BASE_AUTOENCODERS[name].load_class().__name__ == name
