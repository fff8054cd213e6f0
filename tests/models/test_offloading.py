"""Group offloading to disk: whatever runs or is read, its tensors are there."""

from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import tiny_pipelines
from autoencoders import BASES, images, trained
from davae import AutoencoderDA
from davae.models.offloading import weights_in_place
from tiny_upgrades import upgrade_tiny

LEVELS = ["block_level", "leaf_level"]


def outcomes(autoencoder: AutoencoderDA, image: Tensor) -> list[Tensor]:
    """Everything that it makes of an image, on tiles, too."""
    with torch.no_grad():
        base, (detail, _) = autoencoder.encode_base(image), autoencoder.encode_detail(image)
        latents = autoencoder.encode(image).latent_dist.mode()
        made = [base, detail, autoencoder.reconstruct(base, detail), latents, autoencoder.decode(latents).sample]
        made += [autoencoder(image).sample, autoencoder.standardise(latents)]
        autoencoder.enable_tiling()
        autoencoder.tile_sample_size = 16
        return [*made, autoencoder.decode(latents).sample]


def settings(offload_type: str, folder: Path) -> dict:
    return {
        "onload_device": torch.device("cpu"),
        "offload_type": offload_type,
        "num_blocks_per_group": 1,
        "offload_to_disk_path": str(folder),
    }


@torch.no_grad()
def lose(tensors: list[Tensor]) -> None:
    """What is not read from its file is missed: without this, a freed tensor may by chance have its old numbers."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


@pytest.mark.parametrize("offload_type", LEVELS)
@pytest.mark.parametrize("base", [*BASES, "upgraded"])
def test_everything_is_there_when_it_runs(base: str, offload_type: str, tmp_path: Path) -> None:
    autoencoder, image = trained("kl" if base == "upgraded" else base), images(1)
    autoencoder.calibrate([image])
    if base == "upgraded":
        autoencoder = AutoencoderDA.from_base(autoencoder.eval(), detail_channels=12)
        autoencoder.detail_std.fill_(2.0)
    expected = outcomes(autoencoder, image)
    autoencoder.disable_tiling()

    apply_group_offloading(autoencoder, **settings(offload_type, tmp_path))
    lose([*autoencoder.parameters(), *autoencoder.buffers()])
    for ours, theirs in zip(outcomes(autoencoder, image), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("offload_type", LEVELS)
def test_stock_pipelines_read_the_statistics_of_patches(offload_type: str, tmp_path: Path) -> None:
    upgraded = upgrade_tiny(tiny_pipelines.flux2())
    call = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}
    expected = upgraded(**call, generator=torch.Generator().manual_seed(0)).images

    upgraded.vae.enable_group_offload(**settings(offload_type, tmp_path))
    lose([*upgraded.vae.parameters(), upgraded.vae.detail_mean, upgraded.vae.detail_std])
    made = upgraded(**call, generator=torch.Generator().manual_seed(0)).images
    assert isinstance(upgraded.vae.bn, nn.BatchNorm2d)
    assert torch.allclose(made, expected, atol=1e-5)


class Counting(ModelHook):
    """A hook of accelerate that counts how often weights came and went."""

    came = went = 0

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple:
        self.came += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: object) -> object:
        self.went += 1
        return output


def test_weights_leave_again_after_an_error() -> None:
    hook = Counting()
    module = add_hook_to_module(nn.Linear(2, 2), hook)
    with pytest.raises(RuntimeError, match="in between"), weights_in_place(module):
        raise RuntimeError("in between")
    assert (hook.came, hook.went) == (1, 1)
