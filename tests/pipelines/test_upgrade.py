import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, FluxPipeline
from einops import rearrange
from safetensors.torch import load_file, save_file

import tiny
import tiny_backbones
import tiny_pipelines
from davae import assets
from davae.backbones import BACKBONES
from davae.errors import CheckpointError, SettingsError, StorageError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import add_lora, digest_base, find_target_layers, load_adapter, save_adapter
from davae.pipelines.loading import load_autoencoder, load_base_vae, load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade


class OnlyParts(DiffusionPipeline):
    """A pipeline of an older kind: nothing in it is a transformer."""

    def __init__(self, vae, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)


TARGETS = BACKBONES["SD3Transformer2DModel"].lora_targets


@pytest.fixture
def base():
    return tiny.tiny_sd3_pipeline()


@pytest.fixture
def autoencoder(base):
    return AutoencoderDA.from_base(base.vae, detail_channels=4).eval()


def generate(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "np"}
    return pipeline("red apple", generator=torch.Generator().manual_seed(0), **{**defaults, **settings}).images[0]


def disturb(parameters):
    """Stands for training: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


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


def test_a_saved_upgrade_loads_as_a_stock_pipeline_with_the_same_image(base, autoencoder, tmp_path):
    pipeline = upgrade(base, autoencoder)
    disturb(pipeline.transformer.parameters())
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["davae", "AutoencoderDA"]
    for reloaded in (DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert np.array_equal(generate(reloaded), generate(pipeline))


def test_a_pipeline_without_t5_loads_without_being_told(base, autoencoder, tmp_path):
    components = {**base.components, "text_encoder_3": None, "tokenizer_3": None}
    pipeline = upgrade(type(base)(**components), autoencoder)
    pipeline.save_pretrained(tmp_path)
    reloaded = load_pipeline(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert reloaded.text_encoder_3 is None
    assert reloaded.transformer.dtype == torch.bfloat16
    assert np.isfinite(generate(reloaded)).all()


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
    made, noises, classes = {}, iter((noise[:, :4], noise, noise)), [1, 7]
    for name, model in (("base", base), ("upgraded", pipeline), ("saved", load_pipeline(tmp_path / "saved"))):
        model.set_progress_bar_config(disable=True)
        model.transformer.register_forward_pre_hook(
            lambda _, inputs, name=name: made.setdefault(name, []).append(inputs[0]) or None
        )
        with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            given = next(noises)
            patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, given=given, **__: given)
            image = model(classes, num_inference_steps=3, guidance_scale=2.0, output_type="pt").images
        assert image.shape == (2, 3, *((32, 32) if name == "base" else (64, 64)))
    for name in ("upgraded", "saved"):
        for ours, theirs in zip(made[name], made["base"], strict=True):
            torch.testing.assert_close(ours[:, :4], theirs, atol=1e-5, rtol=0)
            assert ours.shape[1] == 16
    assert (made["base"][-1] - made["base"][0]).abs().max() > 0.1


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


def test_lora_starts_without_effect_and_trains_the_ports_in_full(base, autoencoder):
    pipeline = upgrade(base, autoencoder)
    before = generate(pipeline)
    pipeline.transformer.to(torch.bfloat16)
    parameters = add_lora(pipeline.transformer, 4, 4.0, TARGETS)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    pipeline.transformer.to(torch.float32)
    names = {name for name, parameter in pipeline.transformer.named_parameters() if parameter.requires_grad}
    ports = {name for name in names if ".lora_" not in name}
    assert ports == {f"{port}.{kind}" for port in ("pos_embed.proj", "proj_out") for kind in ("weight", "bias")}
    # per block 4 attention layers, the MLP's output and the modulation; 4 more where attention is dual (METHOD 5.3)
    assert len(names - ports) == 2 * (2 * 6 + 4)
    assert len(parameters) == len(names)
    assert np.abs(generate(pipeline) - before).max() < 0.05  # the trip through bfloat16


def test_lora_is_the_same_for_the_same_seed_and_leaves_the_global_stream_alone(base):
    torch.manual_seed(0)
    expected = torch.randn(1)
    torch.manual_seed(0)
    one, two = (add_lora(tiny.tiny_sd3(), 2, 2.0, ["to_q"], seed=5)[1:-2] for _ in range(2))
    torch.manual_seed(0)
    add_lora(base.transformer, 2, 2.0, ["to_q"])
    assert torch.equal(torch.randn(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def trained(base, autoencoder, tmp_path):
    """A saved base, an adapter for it, and the image that the trained pipeline makes."""
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    disturb(add_lora(pipeline.transformer, 4, 8.0, TARGETS))
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", base_sha256=digest_base(base.transformer))
    return tmp_path, generate(pipeline)


def test_an_adapter_on_the_base_gives_the_trained_pipeline_in_plain_weights(trained, base):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter")
    assert np.allclose(generate(pipeline), image, atol=1e-4)
    assert not np.allclose(generate(upgrade(load_pipeline(folder / "base"), pipeline.vae)), image, atol=1e-2)
    assert not any("lora" in name or "base_layer" in name for name in pipeline.transformer.state_dict())
    type(base.transformer).from_config(pipeline.transformer.config).load_state_dict(pipeline.transformer.state_dict())
    pipeline.save_pretrained(folder / "fused")
    assert np.array_equal(generate(DiffusionPipeline.from_pretrained(folder / "fused")), generate(pipeline))


def test_fusing_an_adapter_leaves_the_base_alone_that_shares_its_weights(trained, base, autoencoder):
    folder, image = trained
    before = generate(base)
    pipeline = upgrade(base, autoencoder)
    load_adapter(pipeline.transformer, folder / "adapter", fuse=True)
    assert np.allclose(generate(pipeline), image, atol=1e-4)
    assert np.array_equal(generate(base), before)


def test_an_adapter_can_stay_apart_from_the_weights(trained):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=False)
    assert np.array_equal(generate(pipeline), image)
    assert any(".lora_A." in name for name in pipeline.transformer.state_dict())


def test_a_pipeline_with_a_lora_apart_is_saved_once_it_is_fused(trained):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=False)
    with pytest.raises(SettingsError, match="transformer has a LoRA beside its weights"):
        save_pipeline(pipeline, folder / "saved")
    assert not (folder / "saved").exists()
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    save_pipeline(pipeline, folder / "saved")
    assert np.allclose(generate(load_pipeline(folder / "saved")), image, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_for_half_precision_is_recognised(trained, dtype):
    folder, _ = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", dtype=dtype)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {dtype}
    assert {model.dtype for model in (pipeline.vae, pipeline.text_encoder)} == {dtype}
    base = load_pipeline(folder / "base", dtype=dtype)  # transformers keeps some of T5 in float32
    assert pipeline.text_encoder_3.get_memory_footprint() == base.text_encoder_3.get_memory_footprint()
    assert np.isfinite(generate(pipeline)).all()


def test_an_adapter_of_the_ports_alone_is_exact(base, autoencoder, tmp_path):
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    disturb([*pipeline.transformer.pos_embed.proj.parameters(), *pipeline.transformer.proj_out.parameters()])
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", base_sha256=digest_base(base.transformer))
    reloaded = load_pipeline(tmp_path / "base", adapter=tmp_path / "adapter")
    assert np.array_equal(generate(reloaded), generate(pipeline))


@pytest.fixture
def trained_layers(base, autoencoder, tmp_path):
    """A saved base, an adapter of trained layers and ports for it, and the pipeline that these belong to."""
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    digest = digest_base(pipeline.transformer)
    transformer = pipeline.transformer
    for layer in (*find_target_layers(transformer, ["to_q", "ff.net.2"]).values(), transformer.proj_out):
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        disturb([layer.weight])
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", layers=["to_q", "ff.net.2"], base_sha256=digest)
    return tmp_path, pipeline


def test_an_adapter_of_trained_layers_is_exact(trained_layers, base, autoencoder):
    folder, pipeline = trained_layers
    image, before = generate(pipeline), generate(base)
    for fuse in (True, False):
        reloaded = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=fuse)
        assert np.array_equal(generate(reloaded), image)
    assert not np.allclose(generate(upgrade(base, autoencoder)), image, atol=1e-2)
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files == {"adapter.json", "transformer_ports.safetensors", "transformer_layers.safetensors", "vae"}
    shared = upgrade(base, autoencoder)
    load_adapter(shared.transformer, folder / "adapter", fuse=True)
    assert np.array_equal(generate(shared), image)
    assert np.array_equal(generate(base), before)


def test_an_adapter_of_trained_layers_in_half_precision(trained_layers):
    folder, _ = trained_layers
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_trained_layers_that_do_not_fit_are_refused(trained_layers):
    folder, _ = trained_layers
    path = folder / "adapter" / "transformer_layers.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "to_q" in name}, path)
    with pytest.raises(CheckpointError, match=r"transformer_layers.*first at .*ff\.net\.2\.weight"):
        load_pipeline(folder / "base", adapter=folder / "adapter")


def test_an_adapter_on_another_base_is_refused_with_both_hashes(trained):
    folder, _ = trained
    other = tiny.tiny_sd3_pipeline()
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.1)
    other.save_pretrained(folder / "other")
    with pytest.raises(CheckpointError, match=r"tiny/base with SHA-256 [0-9a-f]{64}, but this .* is [0-9a-f]{64}"):
        load_pipeline(folder / "other", adapter=folder / "adapter")


@pytest.mark.parametrize(
    "name", ["adapter.json", "transformer_ports.safetensors", "transformer_lora.safetensors", "vae/config.json"]
)
def test_a_damaged_or_missing_file_of_an_adapter_is_named(trained, name):
    folder, _ = trained
    file = folder / "adapter" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        load_pipeline(folder / "base", adapter=folder / "adapter")
    file.unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        load_pipeline(folder / "base", adapter=folder / "adapter")


def test_saving_again_replaces_an_adapter_and_nothing_else(trained, base, autoencoder):
    folder, _ = trained
    pipeline = upgrade(base, autoencoder)
    save_adapter(folder / "adapter", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert not (folder / "adapter" / "transformer_lora.safetensors").exists()
    with pytest.raises(SettingsError, match="not davae's to replace"):
        save_adapter(folder / "base", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def test_a_failed_save_leaves_the_old_adapter_and_nothing_half_written(trained, base, autoencoder):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.is_file()}
    pipeline = upgrade(base, autoencoder)
    pipeline.vae.save_pretrained = None  # the last of the files cannot be written
    with pytest.raises(TypeError):
        save_adapter(folder / "adapter", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert before == {path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.is_file()}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
    with pytest.raises(StorageError, match="cannot write"):
        save_adapter(folder / "adapter" / "adapter.json" / "inside", pipeline, base="tiny/base", base_sha256="0" * 64)


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


def test_lora_targets_that_are_no_layers_or_ports_are_refused(base):
    with pytest.raises(SettingsError, match="'to_z' is no linear layer"):
        add_lora(base.transformer, 4, 4.0, ["to_q", "to_z"])
    with pytest.raises(SettingsError, match="'proj' is a latent port"):
        add_lora(base.transformer, 2, 2.0, ["proj"])  # of the feed-forward layer, and of the position embedding
    with pytest.raises(SettingsError, match="'proj_out' is a latent port"):
        add_lora(base.transformer, 4, 4.0, ["proj_out"])
    with pytest.raises(SettingsError, match="rank=0"):
        add_lora(base.transformer, 0, 4.0, ["to_q"])


def test_a_folder_that_is_no_pipeline_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline"):
        load_pipeline(tmp_path / "not_there")
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline"):
        load_pipeline("nobody/nothing")
    base.save_pretrained(tmp_path)
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline"):
        load_pipeline(tmp_path)


def test_components_are_left_out_by_name_and_names_that_are_none_are_refused(trained):
    folder, _ = trained
    assert load_pipeline(folder / "base", without="text_encoder_3").text_encoder_3 is None
    with pytest.raises(SettingsError, match=r"without=t5: no such part.* text_encoder_3"):
        load_pipeline(folder / "base", without=["t5"])
    for part in ("transformer", "vae"):
        with pytest.raises(SettingsError, match=f"has no {part}: it cannot be upgraded"):
            load_pipeline(folder / "base", adapter=folder / "adapter", without=part)


def test_a_saved_pipeline_replaces_a_pipeline_and_nothing_else(base, autoencoder, tmp_path):
    upgraded = upgrade(base, autoencoder)
    for _ in range(2):
        save_pipeline(upgraded, tmp_path / "upgraded")
    assert (tmp_path / "upgraded" / "model_index.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="not davae's to replace"):
        save_pipeline(upgraded, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------------------------------------- borders


def test_a_pipeline_that_was_saved_in_half_precision_loads_in_float32_throughout(base, tmp_path):
    base.to(torch.float16).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    models = (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.text_encoder_2, loaded.text_encoder_3)
    assert {model.dtype for model in models} == {torch.float32}
    assert np.isfinite(generate(loaded)).all()


def test_an_upgrade_brings_the_autoencoder_to_the_precision_of_the_pipeline(base, autoencoder):
    pipeline = upgrade(base.to(torch.bfloat16), autoencoder)
    assert pipeline.vae.dtype == torch.bfloat16
    assert np.isfinite(generate(pipeline)).all()


@pytest.mark.parametrize("name", ["detail_mean", "detail_upsample.shortcut.weight"])
def test_an_autoencoder_without_some_of_its_weights_is_refused(autoencoder, tmp_path, name):
    autoencoder.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks the weights {name}"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_pipeline_without_some_of_its_weights_is_refused(base, tmp_path, part):
    base.save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_pipeline(tmp_path)
    if part == "vae":
        with pytest.raises(CheckpointError, match=name):
            load_base_vae(str(tmp_path))


def test_pickled_weights_are_never_read(base, autoencoder, tmp_path):
    base.save_pretrained(tmp_path / "base", safe_serialization=False)
    autoencoder.save_pretrained(tmp_path / "autoencoder", safe_serialization=False)
    with pytest.raises(CheckpointError):
        load_pipeline(tmp_path / "base")
    with pytest.raises(CheckpointError):
        load_base_vae(str(tmp_path / "base"))
    with pytest.raises(CheckpointError):
        load_autoencoder(tmp_path / "autoencoder")


def test_a_config_without_the_bases_class_is_a_typed_refusal(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["base_config"]["_class_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be loaded as an AutoencoderDA"):
        load_autoencoder(tmp_path)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of an AutoencoderDA"):
        load_autoencoder(Path("runs/autoencoder"))


def test_another_models_folder_is_a_typed_refusal(base, tmp_path):
    base.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded as an AutoencoderDA"):
        load_autoencoder(tmp_path / "vae")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline"):
        load_pipeline(tmp_path)


def test_an_adapter_leaves_out_the_bases_half_of_the_autoencoder(trained_layers, base, autoencoder):
    folder, _ = trained_layers
    names = load_file(folder / "adapter" / "vae" / "diffusion_pytorch_model.safetensors").keys()
    assert not [name for name in names if name.startswith(("base_encoder.", "base_quant_conv."))]
    loaded = load_autoencoder(folder / "adapter", base=base.vae)
    assert loaded.state_dict().keys() == autoencoder.state_dict().keys()
    assert all(torch.equal(tensor, autoencoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert {id(parameter) for parameter in loaded.detail_parameters()}.isdisjoint(
        map(id, loaded.base_encoder.parameters())
    )
    assert not loaded.base_encoder.training
    with torch.no_grad():
        next(loaded.base_encoder.parameters()).add_(1)
    assert torch.equal(next(base.vae.encoder.parameters()), next(autoencoder.base_encoder.parameters()))


def test_an_adapters_autoencoder_without_its_base_or_on_another_is_refused(trained_layers):
    folder, _ = trained_layers
    with pytest.raises(SettingsError, match="half the base pipeline's"):
        load_autoencoder(folder / "adapter")
    with pytest.raises(CheckpointError, match=r"lacks the weights base_encoder.*give .*adapter and the base"):
        load_autoencoder(folder / "adapter" / "vae")
    other = tiny.tiny_sd3_pipeline().vae
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.1)
    with pytest.raises(CheckpointError, match="made from another base"):
        load_autoencoder(folder / "adapter", base=other)


def test_an_adapter_of_format_1_has_the_whole_autoencoder_and_is_read(trained_layers, autoencoder):
    folder, pipeline = trained_layers
    autoencoder.save_pretrained(folder / "adapter" / "vae")
    index = json.loads((folder / "adapter" / "adapter.json").read_text())
    del index["base_encoder_sha256"]
    (folder / "adapter" / "adapter.json").write_text(json.dumps({**index, "format_version": 1}))
    assert np.array_equal(generate(load_pipeline(folder / "base", adapter=folder / "adapter")), generate(pipeline))
    assert torch.equal(load_autoencoder(folder / "adapter").detail_std, autoencoder.detail_std)


def test_an_adapters_autoencoder_is_loaded_without_advice_to_train_what_the_base_gives(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, "diffusers.models.modeling_utils")
    vae = load_base_vae(str(assets.base_pipeline()))
    load_autoencoder(assets.upgrade(), base=vae)
    assert "newly initialized" not in caplog.text
    AutoencoderDA.from_pretrained(assets.upgrade() / "vae")
    assert "newly initialized" in caplog.text  # what diffusers says without us
