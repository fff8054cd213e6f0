"""LoRAs that were trained on a base model: on the upgraded one they do to the base channels what they did there."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_pipelines
from davae import AutoencoderDA, assets, upgrade
from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.base_lora import load_base_lora, pad_lora

C = tiny_pipelines.CHANNELS
PIPELINES = ["sd3", "flux", "flux2", "chroma", "krea2", "qwen_image", "sana", "z_image", "auraflow", "lumina2"]
ATTENTION = ["to_q", "to_v"]
FILE = "pytorch_lora_weights.safetensors"


def built(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        return tiny_pipelines.quiet(getattr(tiny_pipelines, name)())


def upgraded_of(base: DiffusionPipeline) -> DiffusionPipeline:
    return tiny_pipelines.quiet(upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=C)))


def add_lora(pipeline: DiffusionPipeline, targets: list[str], **settings) -> None:
    """Random LoRA of rank 2 and alpha 3 on the transformer."""
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **settings))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    return folder


@torch.no_grad()
def velocity(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    backbone = backbone_of(pipeline.transformer)
    condition = backbone.condition(pipeline, ["red apple", "a pear"], max_sequence_length=32)
    return backbone.velocity(pipeline.transformer, latents, torch.tensor([0.3, 0.8]), condition)


def latents(channels: int) -> Tensor:
    return torch.randn(2, 2 * C, 8, 8, generator=torch.Generator().manual_seed(0))[:, :channels]


def ports_of(pipeline: DiffusionPipeline) -> list[str]:
    ports = backbone_of(pipeline.transformer).ports
    return [ports.input, ports.output]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_lora_of_attention_and_ports_does_what_it_did_on_the_base(name: str, tmp_path: Path) -> None:
    base = built(name)
    upgraded, plain = upgraded_of(base), velocity(base, latents(C))
    add_lora(base, ATTENTION + ports_of(base))
    expected = velocity(base, latents(C))
    assert (expected - plain).abs().max() > 0.01
    load_base_lora(upgraded, save_lora(base, tmp_path))
    result = velocity(upgraded, latents(2 * C))
    torch.testing.assert_close(result[:, :C], expected, atol=2e-5, rtol=2e-5)
    assert not result[:, C:].any()


def test_a_lora_of_attention_needs_the_stock_call_only(tmp_path: Path) -> None:
    base = built("sd3")
    stock, ours = upgraded_of(base), upgraded_of(base)
    add_lora(base, ATTENTION)
    folder = save_lora(base, tmp_path)
    stock.load_lora_weights(folder, weight_name=FILE)
    load_base_lora(ours, folder / FILE, adapter_name="style")
    result = velocity(stock, latents(2 * C))

    assert torch.equal(result, velocity(ours, latents(2 * C)))
    torch.testing.assert_close(result[:, :C], velocity(base, latents(C)), atol=2e-5, rtol=2e-5)

    ours.set_adapters(["style"], [0.0])
    torch.testing.assert_close(velocity(ours, latents(2 * C)), velocity(upgraded_of(built("sd3")), latents(2 * C)))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_second_lora_and_one_of_the_upgraded_model_fit_as_well(tmp_path: Path) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ports_of(base))
    save_lora(base, tmp_path / "base")
    load_base_lora(upgraded, tmp_path / "base", adapter_name="first")
    load_base_lora(upgraded, tmp_path / "base", adapter_name="second")
    upgraded.set_adapters(["first", "second"], [0.5, 0.5])

    torch.testing.assert_close(
        velocity(upgraded, latents(2 * C))[:, :C], velocity(base, latents(C)), atol=2e-5, rtol=2e-5
    )

    own = upgraded_of(built("sd3"))
    add_lora(own, ports_of(own))
    other = upgraded_of(built("sd3"))
    load_base_lora(other, save_lora(own, tmp_path / "own"))

    assert torch.equal(velocity(other, latents(2 * C)), velocity(own, latents(2 * C)))


def test_another_models_lora_and_a_pipeline_without_lora_are_refused(tmp_path: Path) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ports_of(base))
    tensors = load_file(save_lora(base, tmp_path) / FILE)
    tensors["transformer.proj_out.lora_B.weight"] = torch.zeros(4 * 12, 2)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})

    with pytest.raises(SettingsError, match=r"width 48; this pipeline's is 128, and its base's 64: .*another model"):
        load_base_lora(upgraded, tmp_path)
    assert not getattr(upgraded.transformer, "peft_config", {})
    with pytest.raises(SettingsError, match="a DiTPipeline loads no LoRA"):
        load_base_lora(built("dit"), tmp_path)


def test_what_is_no_lora_is_named_and_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    upgraded = upgraded_of(built("sd3"))
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere on this machine"):
        load_base_lora(upgraded, tmp_path / "nowhere")
    wide = {f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}
    for tensors in ({"x": torch.zeros(1)}, wide):
        save_file(tensors, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=f"{FILE} cannot be loaded as a LoRA of this pipeline: "):
            load_base_lora(upgraded, tmp_path / FILE)
    assert not getattr(upgraded.transformer, "peft_config", {})


@pytest.mark.parametrize("kind", ["other prefixes", "peft's own prefix", "one layer of another model", "down and up"])
def test_a_lora_that_would_do_nothing_or_half_is_refused_and_leaves_the_pipeline_as_it_was(
    kind: str, tmp_path: Path
) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ATTENTION)
    tensors = load_file(save_lora(base, tmp_path) / FILE)
    names = {
        "other prefixes": lambda name: name.replace("transformer.", "model.diffusion_model.", 1),
        "peft's own prefix": lambda name: name.replace("transformer.", "base_model.model.", 1),
        "one layer of another model": lambda name: name.replace("_blocks.1.attn.to_q", "_blocks.7.attn.to_q"),
        "down and up": lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    }
    save_file({names[kind](name): tensor for name, tensor in tensors.items()}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}.* cannot be loaded as a LoRA of this pipeline|fit no"):
        load_base_lora(upgraded, tmp_path)
    assert not getattr(upgraded.transformer, "peft_config", {})
    assert not any("lora" in name or "base_layer" in name for name in upgraded.transformer.state_dict())


def test_an_adapter_of_davae_is_no_lora() -> None:
    with pytest.raises(SettingsError, match=r"an adapter of davae's: davae.load_pipeline\(base, adapter=\.\.\.\)"):
        load_base_lora(built("sd3"), assets.upgrade())


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("name", ["sd3", "qwen_image", "sana", "lumina2"])
def test_a_dora_of_the_output_port_leaves_its_new_rows_alone(
    name: str, trained: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = built(name)
    upgraded, plain = upgraded_of(base), upgraded_of(base)
    output = backbone_of(base.transformer).ports.output
    if trained:
        # New rows that are not zero, and base rows that stay.
        for each in (upgraded, plain):
            weight = each.transformer.get_submodule(output).weight
            new = weight.detach().flatten(1).norm(dim=1) == 0
            assert new.sum() == len(new) // 2
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                weight[new] = torch.randn_like(weight[new])
    add_lora(base, [output], use_dora=True)
    load_base_lora(upgraded, save_lora(base, tmp_path))
    assert f"a DoRA gives 1 layers the base's magnitudes, also where the upgrade was trained: transformer.{output}" in (
        caplog.text
    )
    result = velocity(upgraded, latents(2 * C))
    torch.testing.assert_close(result[:, :C], velocity(base, latents(C)), atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(result[:, C:], velocity(plain, latents(2 * C))[:, C:], atol=1e-6, rtol=1e-6)


def test_a_dora_of_other_layers_does_as_on_the_base_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ATTENTION, use_dora=True)
    load_base_lora(upgraded, save_lora(base, tmp_path))
    assert "a DoRA gives 6 layers the base's magnitudes" in caplog.text
    assert "transformer.transformer_blocks.0.attn.to_q" in caplog.text
    result = velocity(upgraded, latents(2 * C))
    torch.testing.assert_close(result[:, :C], velocity(base, latents(C)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_lora_with_numbers_that_are_not_finite_is_refused(number: float, tmp_path: Path) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ATTENTION)
    tensors = load_file(save_lora(base, tmp_path) / FILE)
    name = max(tensors)
    tensors[name].view(-1)[3] = number
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds numbers that are not finite"):
        load_base_lora(upgraded, tmp_path)
    assert not getattr(upgraded.transformer, "peft_config", {})


def test_what_has_no_channel_axis_is_left_alone(tmp_path: Path) -> None:
    base = built("sd3")
    upgraded = upgraded_of(base)
    add_lora(base, ATTENTION + ports_of(base))
    tensors = load_file(save_lora(base, tmp_path) / FILE)
    padded = pad_lora(tensors, upgraded)
    assert sorted(padded) == ["transformer.pos_embed.proj.lora_A.weight", "transformer.proj_out.lora_B.weight"]
    assert padded["transformer.pos_embed.proj.lora_A.weight"].shape == (2, 2 * C, 2, 2)
    assert padded["transformer.proj_out.lora_B.weight"].shape == (4 * 2 * C, 2)
