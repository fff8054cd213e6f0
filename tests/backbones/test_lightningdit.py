"""LightningDiT: class numbers as conditions, time and sign, positions of a widened model."""

import pytest
import torch

import tiny
from davae.backbones import backbone_of, widen_transformer
from davae.errors import SettingsError


@pytest.fixture(scope="module")
def pipeline():
    return tiny.tiny_class_pipeline()


def test_a_condition_is_class_numbers(pipeline):
    backbone = backbone_of(pipeline.transformer)
    assert backbone.classes
    assert not backbone.lora_targets
    assert backbone.null_class(pipeline.transformer) == 10
    assert backbone.picture_side(pipeline, None) == backbone.picture_side(pipeline, 32) == 32
    condition = backbone.condition(pipeline, [3, 0, backbone.null_class(pipeline.transformer)])
    assert condition.keys() == {"class_labels"}
    assert condition["class_labels"].dtype == torch.int64
    assert condition["class_labels"].tolist() == [3, 0, 10]


@pytest.mark.parametrize("label", [-1, 11])
def test_a_number_that_is_no_class_is_refused(pipeline, label):
    with pytest.raises(SettingsError, match="allowed are 0 to 9, and 10 for none"):
        backbone_of(pipeline.transformer).condition(pipeline, [1, label])


@torch.no_grad()
def test_time_and_sign_are_turned_at_the_border(pipeline):
    """Ours: x = (1 - sigma) data + sigma noise, dx/dsigma; LightningDiT's: x = t data + (1 - t) noise, dx/dt."""
    backbone = backbone_of(pipeline.transformer)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = backbone.condition(pipeline, [1, 2])
    ours = backbone.velocity(pipeline.transformer, latents, torch.tensor([0.25, 1.0]), condition)
    theirs = pipeline.transformer(latents, torch.tensor([0.75, 0.0]), torch.tensor([1, 2])).sample
    assert torch.equal(ours, -theirs)
    assert not torch.allclose(ours, backbone.velocity(pipeline.transformer, latents, torch.zeros(2), condition))


def test_widening_keeps_the_positions():
    base = tiny.tiny_lightningdit()
    widened = widen_transformer(base, base_channels=16, detail_channels=48)
    own = {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    shared = base.state_dict()
    for name, tensor in widened.state_dict().items():
        assert (tensor.data_ptr() == shared[name].data_ptr()) == (name not in own), name
    changed = {name for name in widened.config if name[0] != "_" and widened.config[name] != base.config[name]}
    assert changed == {"in_channels"}
    fixed = [name for name, parameter in widened.named_parameters() if not parameter.requires_grad]
    assert fixed == ["pos_embed"]
