"""AutoencoderDA under the names of other autoencoders' parts: what it cannot do there it refuses by name."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from torch import nn

import tiny_pipelines
from autoencoders import BASES, images, quantised_kl, trained
from davae import AutoencoderDA

OTHERS = {
    AutoencoderKL: quantised_kl,
    AutoencoderDC: lambda: tiny_pipelines.sana().vae,
    AutoencoderKLQwenImage: tiny_pipelines.qwen_vae,
    AutoencoderKLFlux2: lambda: tiny_pipelines.flux2().vae,
    AutoencoderTiny: AutoencoderTiny,
}


@pytest.mark.parametrize("other", OTHERS, ids=lambda kind: kind.__name__)
def test_no_part_of_another_autoencoder_is_swallowed(other: type) -> None:
    """Each name of a submodule of a stock autoencoder is a part that runs, or is refused by its name."""
    autoencoder = trained("kl")
    names = [name for name, _ in OTHERS[other]().named_children()]
    assert {"encoder", "decoder"} <= set(names)
    for name in names:
        if name == "bn":  # AutoencoderDA has it, too
            continue
        with pytest.raises(ValueError, match=rf"^{name} = Identity: an AutoencoderDA does not run it.*joint_decoder"):
            setattr(autoencoder, name, nn.Identity())
        assert name not in autoencoder._modules


def test_a_compiled_decoder_is_refused_by_name_and_compiles_in_place() -> None:
    autoencoder, image, graphs = trained("tiny").requires_grad_(False), images(1), []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    latents, names = autoencoder.encode(image).latent_dist.mode(), list(autoencoder.state_dict())
    whole = autoencoder.decode(latents).sample
    with pytest.raises(ValueError, match=r"^decoder = OptimizedModule: "):
        autoencoder.decoder = torch.compile(autoencoder.decoder, backend=counting)
    with pytest.raises(ValueError, match=r"names that nothing loads.*vae.detail_upsample.compile\(\)"):
        autoencoder.detail_upsample = torch.compile(autoencoder.detail_upsample, backend=counting)

    autoencoder.decoder.compile(backend=counting)
    assert torch.equal(autoencoder.decode(latents).sample, whole)
    assert graphs
    assert list(autoencoder.state_dict()) == names


def test_stock_code_reads_the_factor_and_the_latents_of_other_classes() -> None:
    autoencoder, image = trained("kl"), images(1)
    encoded = autoencoder.encode(image)
    assert autoencoder.spatial_compression_ratio == autoencoder.downsample_factor == 8
    assert torch.equal(encoded.latent, encoded.latent_dist.mode())  # AutoencoderDC
    assert torch.equal(encoded.latents, encoded.latent)  # AutoencoderTiny


@torch.no_grad()
def test_tiles_take_the_arguments_of_every_base() -> None:
    autoencoder, latents = trained("tiny"), torch.randn(1, 12, 8, 8).double()
    seen: list[tuple[int, ...]] = []
    autoencoder.detail_upsample.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    autoencoder.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=16, tile_sample_stride_height=16)
    assert (autoencoder.tile_sample_stride_height, autoencoder.tile_sample_stride_width) == (16, 12)

    # 64 px in tiles of 32 x 16 px, 16 and 8 apart: the latents have an eighth of that.
    whole = autoencoder.decode(latents).sample
    assert seen == [(4, 2)] * 3 * 7
    assert whole.shape == (1, 3, 64, 64)

    # AutoencoderKL's attributes are the same settings.
    autoencoder.tile_sample_min_size, autoencoder.tile_overlap_factor = 32, 0.5
    assert (autoencoder.tile_sample_size, autoencoder.tile_overlap) == (32, 0.5)
    assert (autoencoder.tile_sample_stride_height, autoencoder.tile_sample_stride_width) == (16, 16)
    with pytest.raises(ValueError, match="tile_latent_min_size: an AutoencoderDA does not read it"):
        autoencoder.tile_latent_min_size = 4
    with pytest.raises(ValueError, match="tile_sample_stride_width=64: allowed are 1 to 32"):
        autoencoder.enable_tiling(tile_sample_stride_width=64)


@torch.no_grad()
def test_attention_is_fused_and_its_processors_are_there() -> None:
    autoencoder, image = trained("quantised kl"), images(1)
    whole, count = autoencoder(image).sample, len(autoencoder.attn_processors)
    assert count == 3  # two encoders and a decoder
    autoencoder.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in autoencoder.named_parameters())
    assert torch.allclose(autoencoder(image).sample, whole, atol=1e-10)
    autoencoder.unfuse_qkv_projections()


@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_runs_and_changes_no_gradient(base: str) -> None:
    autoencoder, image, gradients, calls = trained(base).train(), images(1), [], []

    def run(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    for again in (False, True):
        if again:
            autoencoder.enable_gradient_checkpointing(run)
        base_latents, (detail, _) = autoencoder.encode_base(image), autoencoder.encode_detail(image)
        loss = autoencoder.reconstruct(base_latents, detail).square().mean()
        gradients.append(torch.autograd.grad(loss, autoencoder.detail_parameters(), allow_unused=True))
    assert len(calls) >= 2
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-12)


def test_it_loads_with_a_device_map_and_with_a_config_of_quantised_weights(tmp_path: Path) -> None:
    autoencoder, image = trained("kl").float(), images(1, dtype=torch.float32)
    autoencoder.save_pretrained(tmp_path)
    mapped = AutoencoderDA.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(mapped(image).sample, autoencoder(image).sample)

    config = json.loads((tmp_path / "config.json").read_text())
    AutoencoderDA.from_config({**config, "quantization_config": {"quant_method": "torchao"}})
    with pytest.raises(ValueError, match="saved by a newer davae: its config has surprise"):
        AutoencoderDA.from_config({**config, "surprise": 1})
