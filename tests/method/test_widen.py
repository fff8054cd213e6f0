import pytest
import torch
from diffusers import SD3Transformer2DModel
from einops import rearrange

import tiny
from davae.backbones import BACKBONES, backbone_of, widen_transformer
from davae.errors import SettingsError
from davae.method.widen import LatentPorts, lost_directions, pad_channels, start_ports

PORTS = ("pos_embed.proj.weight", "pos_embed.proj.bias", "proj_out.weight", "proj_out.bias")


def test_padding_keeps_each_channel_at_its_place_in_every_patch_position():
    weight = torch.arange(2 * 2 * 2 * 3 * 5.0).view(2 * 2 * 2 * 3, 5) + 1
    padded = pad_channels(weight, "(p q k c) d", 4, patch=2, predictions=2)
    before = rearrange(weight, "(p q k c) d -> p q k c d", p=2, q=2, k=2)
    after = rearrange(padded, "(p q k c) d -> p q k c d", p=2, q=2, k=2)
    assert torch.equal(after[:, :, :, :3], before)
    assert not after[:, :, :, 3:].any()


def test_padding_a_convolution_appends_input_channels():
    weight = torch.randn(6, 3, 2, 2)
    padded = pad_channels(weight, "d c p q", 5)
    assert torch.equal(padded[:, :3], weight)
    assert padded.shape == (6, 8, 2, 2)
    assert not padded[:, 3:].any()


def test_the_widened_model_shares_every_tensor_but_the_ports():
    base = tiny.tiny_sd3()
    widened = widen_transformer(base, base_channels=16, detail_channels=16)
    shared = base.state_dict()
    for name, tensor in widened.state_dict().items():
        assert (tensor.data_ptr() == shared[name].data_ptr()) == (name not in PORTS), name
    assert widened.config.in_channels == widened.config.out_channels == 32
    assert base.config.in_channels == 16


def test_buffers_that_no_state_dict_holds_are_the_bases():
    base = tiny.tiny_pixart()
    base.pos_embed.pos_embed.mul_(3)
    widened = widen_transformer(base, base_channels=16, detail_channels=16)
    assert "pos_embed.pos_embed" not in base.state_dict()
    assert torch.equal(widened.pos_embed.pos_embed, base.pos_embed.pos_embed)
    assert all(tensor.device.type == "cpu" for tensor in [*widened.parameters(), *widened.buffers()])


def test_mode_dtype_gradients_and_checkpointing_are_kept():
    base = tiny.tiny_sd3().to(torch.bfloat16).eval().requires_grad_(False)
    base.proj_out.requires_grad_(True)
    base.transformer_blocks[1].train()
    base.enable_gradient_checkpointing()
    widened = widen_transformer(base, base_channels=16, detail_channels=16)
    assert widened.dtype == torch.bfloat16
    assert not widened.training
    assert widened.transformer_blocks[1].attn.training
    assert widened.is_gradient_checkpointing
    trainable = [name for name, parameter in widened.named_parameters() if parameter.requires_grad]
    assert trainable == ["proj_out.weight", "proj_out.bias"]


def test_a_fresh_model_of_the_widened_config_loads_its_weights_strictly(tmp_path):
    widened = widen_transformer(tiny.tiny_sd3(), base_channels=16, detail_channels=16)
    type(widened).from_config(widened.config).load_state_dict(widened.state_dict(), strict=True)
    widened.save_pretrained(tmp_path)
    reloaded = type(widened).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in widened.state_dict().items())


def test_both_new_parts_learn_from_the_first_step_on():
    """Zeros on both sides are no dead start: the base loss moves the new input, the detail loss the new output."""
    widened = widen_transformer(tiny.tiny_sd3(), base_channels=16, detail_channels=16)
    caption = torch.randn(1, 5, 32)
    output = widened(torch.randn(1, 32, 8, 8), caption, caption[:, 0], torch.tensor([500.0]), return_dict=False)[0]
    (output - torch.randn_like(output)).square().mean().backward()
    assert widened.pos_embed.proj.weight.grad[:, 16:].abs().min() > 0
    assert widened.proj_out.bias.grad.view(2, 2, 32)[..., 16:].abs().min() > 0


def started(start: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The ports of a tiny SD3 widened from 16 to 48 channels, as [base and detail channel, ...]."""
    widened = widen_transformer(tiny.tiny_sd3(), base_channels=16, detail_channels=32)
    ports: LatentPorts = BACKBONES["SD3Transformer2DModel"].ports
    random = torch.Generator().manual_seed(seed)
    start_ports(widened, ports, base_channels=16, start=start, generator=random)
    return {
        "input": widened.pos_embed.proj.weight.transpose(0, 1),
        "input bias": widened.pos_embed.proj.bias,
        "output": rearrange(widened.proj_out.weight, "(p q c) d -> c (p q) d", p=2, q=2),
        "output bias": rearrange(widened.proj_out.bias, "(p q c) -> c (p q)", p=2, q=2),
    }


def test_random_ports_start_as_torch_starts_a_layer_of_that_size_and_leave_the_bases_own():
    zero, random, other = started("zero"), started("random"), started("random", seed=1)
    assert torch.equal(random["input bias"], zero["input bias"])
    # 48 channels of 2x2 come in, 16 features go out: kaiming_uniform_(a=sqrt(5)) is uniform in +-1/sqrt(fan in)
    for name, fan_in in (("input", 48 * 4), ("output", 16), ("output bias", 16)):
        assert torch.equal(random[name][:16], zero[name][:16])
        assert not zero[name][16:].any()
        new = random[name][16:] * fan_in**0.5
        assert 0.95 < new.abs().max() <= 1
        assert new.square().mean().item() == pytest.approx(1 / 3, abs=0.06)
        assert not torch.equal(random[name], other[name])


def test_repeated_ports_keep_the_sum_over_the_input_and_the_output_of_each_channel():
    zero, repeated = started("zero"), started("repeat")
    assert torch.equal(repeated["input bias"], zero["input bias"])
    for channel in (0, 7, 15):
        group = slice(16 + 2 * channel, 18 + 2 * channel)
        assert torch.allclose(repeated["input"][channel], zero["input"][channel] / 3)
        assert torch.allclose(repeated["input"][group], zero["input"][channel].expand(2, -1, -1, -1) / 3)
        for name in ("output", "output bias"):
            assert torch.equal(repeated[name][channel], zero[name][channel])
            assert torch.equal(repeated[name][group], zero[name][[channel, channel]])


def test_channels_that_are_no_multiple_of_the_bases_cannot_be_repeated():
    widened = widen_transformer(tiny.tiny_sd3(), base_channels=16, detail_channels=24)
    ports = BACKBONES["SD3Transformer2DModel"].ports
    with pytest.raises(SettingsError, match=r'24 detail channels are no multiple of 16.*"zero" or "random"'):
        start_ports(widened, ports, base_channels=16, start="repeat", generator=torch.Generator())


@pytest.mark.parametrize(("build", "wrong"), [(tiny.tiny_sd3, 8), (tiny.tiny_sd3, 32), (tiny.tiny_flux, 64)])
def test_a_wrong_number_of_base_channels_is_refused(build, wrong):
    with pytest.raises(SettingsError, match=rf"base_channels={wrong}.*pass base_channels=16"):
        widen_transformer(build(), base_channels=wrong, detail_channels=16)


def test_no_detail_is_refused():
    with pytest.raises(SettingsError, match="detail_channels=0 must be 1 or more"):
        widen_transformer(tiny.tiny_sd3(), base_channels=16, detail_channels=0)


@pytest.mark.parametrize("target", ["proj_out", "to_q"])
def test_a_model_with_adapters_is_refused(target):
    from peft import LoraConfig

    base = tiny.tiny_sd3()
    base.add_adapter(LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(SettingsError, match="fuse or unload adapters"):
        widen_transformer(base, base_channels=16, detail_channels=16)


def test_a_model_that_was_made_with_its_class_defaults_is_widened():
    with torch.device("meta"):
        base = SD3Transformer2DModel(num_layers=1, num_attention_heads=1, caption_projection_dim=64)  # 16 channels
    widened = widen_transformer(base, base_channels=16, detail_channels=16)
    assert widened.config.in_channels == widened.config.out_channels == 32
    assert widened.pos_embed.proj.weight.shape[1] == 32


def of_tokens(latents: torch.Tensor, patch: int = 2) -> torch.Tensor:
    return rearrange(latents, "b c (h p) (w q) -> (b h w) (c p q)", p=patch, q=patch)


@pytest.mark.parametrize(("detail_channels", "lost"), [(1, 0), (2, 0), (4, 8)])
def test_predictions_fill_all_directions_but_those_that_are_lost(detail_channels: int, lost: int):
    widened = widen_transformer(tiny.tiny_sd3(2), base_channels=2, detail_channels=detail_channels)
    tiny.ports_alive(widened).double()
    backbone, generator = backbone_of(widened), torch.Generator().manual_seed(0)
    predictions = []
    for sigma in torch.rand(8, generator=generator).double():
        shapes = {"encoder_hidden_states": (4, 3, 32), "pooled_projections": (4, 32)}
        condition = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
        latents = torch.randn(4, 2 + detail_channels, 8, 8, generator=generator).double()
        with torch.no_grad():
            predictions.append(backbone.velocity(widened, latents, sigma.repeat(4), condition))
    tokens = of_tokens(torch.cat(predictions))
    assert lost_directions(widened, backbone.ports) == lost
    assert torch.linalg.matrix_rank(tokens - tokens[0]) == tokens.shape[1] - lost


@pytest.mark.parametrize(
    ("build", "lost"), [(tiny.tiny_sd3, 4), (tiny.tiny_flux, 4), (tiny.tiny_dit, 4), (tiny.tiny_sana, 0)]
)
def test_what_is_lost_counts_packed_patches_and_one_prediction_of_several(build, lost: int):
    transformer = build(5)  # 20 numbers a token in patches of 2, 5 in SANA's of 1; all are 16 wide
    assert lost_directions(transformer, backbone_of(transformer).ports) == lost
