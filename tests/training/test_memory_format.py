"""A resumed run of a channels-last model: the fused optimiser must find its moments where the weights are."""

from pathlib import Path

import torch
from torch import nn

from davae.seeds import generator
from davae.training.state import TrainingState
from davae.training.tensors import fastest_layout, laid_out


def trained(folder: Path, *, stop_after: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    state = TrainingState(
        folder,
        {"model": model},
        model.parameters(),
        total_steps=8,
        learning_rate=lambda step: 1e-2,
        seed=0,
        recipe_digest="same",
        checkpoint_every=4,
    )
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
        assert laid_out(model, fastest_layout(torch.device(device))) is model
        assert model[0].weight.is_contiguous(memory_format=layout)
        assert model[1].weight.is_contiguous()
        for parameter, values in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, values)
