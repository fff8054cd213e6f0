"""How weights lie in memory: stage 1's as is fastest, and a resumed run's moments where its weights are."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from davae.data.sources import open_pictures
from davae.models.detail_blocks import DetailDownsample, DetailUpsample
from davae.run.ranks import Ranks
from davae.seeds import generator
from davae.training.devices import fastest_layout, keep_stream_in_float32, lay_out
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from davae.training.state import TrainingState
from stages import autoencoder_recipe


def trained(folder: Path, *, stop_after: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    rate = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "warmup_steps": 0}
    recipe = OptimisationRecipe(steps=8, checkpoint_every=4, precision="float32", **rate)
    state = TrainingState(recipe, folder, {"model": model}, model.parameters())
    for step in state.steps():
        if step == stop_after:
            break
        image = torch.randn(2, 3, 8, 8, generator=generator(0, "image", step))
        state.update(model(image).square().mean())
    return model.weight.detach()


def test_resumed_channels_last_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    undisturbed = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop_after=5)
    assert torch.equal(trained(tmp_path / "parts"), undisturbed)


def test_a_layout_changes_no_value_and_leaves_other_convolutions_alone() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv3d(3, 8, 3), nn.Linear(4, 2)])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for device, layout in (("cpu", torch.channels_last), ("cuda", torch.contiguous_format)):
        assert lay_out(model, fastest_layout(torch.device(device))) is model
        assert model[0].weight.is_contiguous(memory_format=layout)
        assert model[1].weight.is_contiguous()
        for parameter, values in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, values)


def test_an_autoencoders_residual_stream_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32)  # fmt: skip
    image = torch.rand(1, 3, 32, 32)
    before, names = vae(image).sample, list(vae.state_dict())

    # Without autocast nothing changes, in any precision.
    assert keep_stream_in_float32(vae) is vae
    assert list(vae.state_dict()) == names
    assert torch.equal(vae(image).sample, before)
    assert vae.double()(image.double()).sample.dtype == torch.float64

    # With autocast every stage of encoder and decoder hands on float32.
    kinds: list[torch.dtype] = []
    for stage in (*vae.encoder.down_blocks, vae.encoder.mid_block, vae.decoder.mid_block, *vae.decoder.up_blocks):
        stage.register_forward_hook(lambda module, given, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert vae.float()(image).sample.dtype == torch.float32
    assert kinds == [torch.float32] * 6


def test_stage_one_trains_with_the_layout_of_its_device_whether_its_start_is_new_or_read(
    base_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = autoencoder_recipe(base_folder, picture_folder, steps=2)
    start_autoencoder(recipe, open_pictures(picture_folder, size=64, split="train"), tmp_path / "read" / "start")
    layout, kinds = fastest_layout(Ranks().device), (Encoder, Decoder, DetailDownsample, DetailUpsample)
    for name in ("new", "read"):
        seen: set[tuple[type[nn.Module], bool]] = set()

        def look(module: nn.Module, _: object, seen: set = seen) -> None:
            if torch.is_grad_enabled() and isinstance(module, kinds):
                weights = [weight for weight in module.parameters() if weight.ndim == 4]
                seen |= {(type(module), weight.is_contiguous(memory_format=layout)) for weight in weights}

        hook = register_module_forward_pre_hook(look)
        try:
            train_autoencoder(recipe, tmp_path / name)
        finally:
            hook.remove()
        assert seen == {(kind, True) for kind in kinds}, name
