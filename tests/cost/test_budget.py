"""Budgets against the counts of the literature and against arithmetic that is written out here."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from torch import nn

from davae import assets
from davae.backbones import BACKBONES, widen_transformer
from davae.cli import main
from davae.cost.budget import (
    estimate_stage_one,
    estimate_stage_two,
    estimate_stage_two_memory,
    plan_autoencoder,
    read_memory,
)
from davae.cost.geometry import META, Geometry, read_geometry
from davae.cost.workload import count_parameters, count_stage_one, counting, make_condition, meta, to_half
from davae.errors import CheckpointError, SettingsError
from davae.method.discriminator import PatchDiscriminator
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.recipe import load_recipe
from davae.training.stage_one import choose_trained
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_two_recipe import FinetuneRecipe
from tiny import tiny_flux, tiny_sd3_pipeline, tiny_vae
from tiny_backbones import tiny_lumina2

RECIPES = Path(__file__).parents[2] / "recipes"
SD35M = RECIPES / "sd35m_1024.toml"
HUB_WARNS = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers, asking for a name on the Hub


@pytest.fixture(scope="module")
def sd35m() -> Geometry:
    return read_geometry("stabilityai/stable-diffusion-3.5-medium", SD35M)


@pytest.fixture(scope="module")
def finetune_figures(sd35m: Geometry) -> dict[str, float]:
    recipe = load_recipe(FinetuneRecipe, SD35M)
    figures = estimate_stage_two(recipe, sd35m, plan_autoencoder(recipe, sd35m, SD35M))
    return {f"{figure.name}, {figure.unit}": figure.value for figure in figures}


def blank_autoencoder(vae: ModelMixin, detail_channels: int) -> AutoencoderDA:
    with META:
        return AutoencoderDA.from_base(vae, detail_channels=detail_channels, linear_blocks=False)


def va_vae() -> AutoencoderKL:
    folder = assets.geometry() / "vavae-lightningdit-xl"
    with META:
        return AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))


# ------------------------------------------------------------------------------------------------- full-size counts


def test_sd35m_has_the_published_number_of_parameters(sd35m, finetune_figures) -> None:
    assert sd35m.transformer.num_parameters() == 2_243_171_520
    assert finetune_figures["base transformer, parameters"] == 2_243_171_520
    assert finetune_figures["widened transformer, parameters"] == 2_243_368_192
    # A patch of 2 x 2, 16 channels more, width 1536: the input's columns, the output's rows and their biases.
    assert 2_243_368_192 - 2_243_171_520 == 4 * 16 * 1536 + 4 * 16 * 1536 + 4 * 16


def test_the_references_lora_has_196_layers(finetune_figures) -> None:
    width, rank, blocks, dual = 1536, 256, 24, 13
    attention = 4 * (blocks + dual)
    modulations = [9] * dual + [6] * (blocks - dual)  # rows of norm1.linear, in widths
    pairs = attention * [(width, width)] + blocks * [(4 * width, width)] + [(width, m * width) for m in modulations]
    assert len(pairs) == finetune_figures["LoRA, modules"] == 196
    assert sum(rank * (a + b) for a, b in pairs) == finetune_figures["LoRA, parameters"] == 244_973_568
    ports = (4 * 32 + 1) * width + (width + 1) * 4 * 32
    assert finetune_figures["both latent ports, parameters"] == ports
    assert finetune_figures["trained in this stage, parameters"] == 244_973_568 + ports


def closed_form(tokens: int) -> float:
    """FLOPs of SD3.5-M's linear layers, joint and dual attention, for image tokens and 333 of text."""
    n, t, d = tokens, 77 + 256, 1536
    linear = 2 * d**2 * (24 * 12 + 13 * 4) * n + (2 * d**2 * (23 * 12 + 3) + 2 * 4096 * d) * t
    return linear + 24 * 4 * (n + t) ** 2 * d + 13 * 4 * n**2 * d


def test_a_forward_pass_costs_what_was_counted_before(sd35m, finetune_figures) -> None:
    small = finetune_figures["transformer, one picture, forward, TFLOP"]
    assert small == pytest.approx(2.443, rel=0.01)
    assert small == pytest.approx(closed_form(32**2) / 1e12, rel=0.005)
    backbone, transformer = BACKBONES["SD3Transformer2DModel"], to_half(sd35m.transformer)
    with torch.no_grad(), counting(transformer) as work:
        backbone.velocity(transformer, meta(1, 16, 128, 128), meta(1), make_condition(transformer, 256))
    assert work.flops / 1e12 == pytest.approx(11.25, rel=0.01)
    assert work.flops == pytest.approx(closed_form(64**2), rel=0.005)


def test_the_budget_of_sd35m_at_1024_px(finetune_figures) -> None:
    figures = finetune_figures
    assert figures["tokens, 32 x 32, "] == 1024
    assert figures["numbers in a token, 1536 being the transformer's width, "] == 128
    assert figures["text tokens beside them, "] == 333

    forward_and_backward = figures["transformer, one picture, forward and backward, TFLOP"]
    assert forward_and_backward == pytest.approx(6.41, rel=0.01)
    assert figures["encoding one picture of 1024 px, TFLOP"] == pytest.approx(6.00, rel=0.01)
    assert figures["decoding it, TFLOP"] == pytest.approx(10.48, rel=0.01)
    days = 20_000 * 256 * forward_and_backward / (989 * 0.40) / 86_400
    assert figures["so the run takes, GPU-days"] == pytest.approx(days)

    assert figures["weights, 4 bytes each, GiB"] == pytest.approx((2_243_368_192 + 244_973_568) * 4 / 2**30)
    trained = figures["trained in this stage, parameters"]
    assert figures["the optimiser's moments, 8 bytes each, GiB"] == pytest.approx(trained * 8 / 2**30)
    activations = figures["activations kept for the backward pass, batch of 16, GiB"]
    assert activations / 16 == pytest.approx(2.76, rel=0.01)

    kept = (32 * 64**2 + 333 * 4096 + 2048) * 4 / 2**20
    assert figures["inputs that are encoded once and kept, on the host, for a picture, MiB"] == pytest.approx(kept)


def test_the_budget_of_stage_1_at_1024_px(sd35m) -> None:
    whole = load_recipe(AutoencoderRecipe, SD35M, {"loss.lpips_patch": 1024})
    figures = {figure.name: figure.value for figure in estimate_stage_one(whole, sd35m)}
    # L1, VGG-LPIPS of the whole picture and a discriminator's two steps: counted before.
    assert figures["one crop of 1024 px, forward and backward"] == pytest.approx(50.6, rel=0.01)
    assert figures["activations kept for the backward pass, batch of 2"] / 2 == pytest.approx(19.2, rel=0.01)
    assert figures["discriminator"] == 2_765_633
    assert figures["new block of the detail encoder"] == 36_872
    assert figures["new block of the joint decoder"] == 591_872


def test_imagenets_autoencoder_has_the_published_numbers_of_parameters() -> None:
    autoencoder = blank_autoencoder(va_vae(), 96)
    assert count_parameters(autoencoder.base_encoder) == 28_413_248
    assert count_parameters(autoencoder.base_quant_conv) == 4_160
    assert count_parameters(autoencoder.detail_encoder) == 28_118_272
    assert count_parameters(autoencoder.detail_downsample) == 221_232 + 393_216
    assert count_parameters(autoencoder.joint_decoder) == 41_269_635
    assert count_parameters(autoencoder.detail_upsample) == 2_361_344
    assert autoencoder.detail_parameters() == [p for p in autoencoder.parameters() if p.requires_grad]
    assert count_parameters(autoencoder, trained=True) == 28_118_272 + 614_448 + 41_269_635 + 2_361_344


@pytest.mark.parametrize(
    ("vae", "detail", "size", "patch", "tokens"),
    [("sd3", 16, 1024, 2, 32), ("sd3", 16, 2048, 2, 64), ("va-vae", 96, 512, 1, 16)],
)
def test_token_grids_of_the_two_set_ups(sd35m, vae: str, detail: int, size: int, patch: int, tokens: int) -> None:
    base = sd35m.vae if vae == "sd3" else va_vae()
    autoencoder = blank_autoencoder(base, detail)
    with torch.no_grad():
        latents = to_half(autoencoder).encode(meta(1, 3, size, size)).latent_dist.mode()
    assert latents.shape == (1, base.config.latent_channels + detail, tokens * patch, tokens * patch)


@pytest.mark.skipif(find_spec("davae.models.lightningdit") is None, reason="davae.models.lightningdit is not there yet")
def test_imagenets_transformer_has_the_published_numbers_of_parameters() -> None:
    geometry = read_geometry("runs/vavae-lightningdit-xl", RECIPES / "imagenet512.toml")
    with META:
        wide = widen_transformer(geometry.transformer, base_channels=32, detail_channels=96)
    assert (geometry.transformer.num_parameters(), wide.num_parameters()) == (675_260_768, 675_482_048)


def test_widening_on_the_meta_device_is_widening(sd35m) -> None:
    with META:
        wide = widen_transformer(sd35m.transformer, base_channels=16, detail_channels=16)
    assert wide.num_parameters() == 2_243_368_192
    assert all(tensor.is_meta for tensor in wide.state_dict().values())
    assert BACKBONES["SD3Transformer2DModel"].lora_targets == load_recipe(FinetuneRecipe, SD35M).lora_targets


# --------------------------------------------------------------------------------------------------------- counting


def test_flops_and_kept_bytes_of_a_network_that_is_counted_by_hand() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(META)
    with counting(network) as work:
        network(meta(5, 8, dtype=torch.float32)).sum().backward()
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    backward = forward + 2 * 5 * 16 * 4  # to both weights, and to the hidden layer; not to the input
    assert work.flops == forward + backward
    assert work.kept_bytes == 4 * (5 * 8 + 5 * 16)  # both layers' inputs; the ReLU keeps the second one, too


def test_a_convolutions_flops_and_nothing_kept_without_a_gradient() -> None:
    network = nn.Conv2d(3, 8, 3, padding=1, device=META)
    with torch.no_grad(), counting(network) as work:
        network(meta(2, 3, 16, 16, dtype=torch.float32))
    assert work.flops == 2 * 2 * 16 * 16 * 3 * 8 * 9
    assert work.kept_bytes == 0


def test_the_backward_pass_of_a_depthwise_convolution_costs_as_much_as_its_forward_pass() -> None:
    network = nn.Conv2d(8, 8, 3, padding=1, groups=8, device=META)
    with counting(network) as work:
        network(meta(2, 8, 16, 16, dtype=torch.float32)).sum().backward()
    assert work.flops == 2 * (2 * 2 * 16 * 16 * 8 * 9)


def test_attention_is_counted_and_keeps_no_scores() -> None:
    query, key, value = (meta(1, 2, 64, 8).requires_grad_() for _ in range(3))
    with counting() as work:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    forward = 4 * 2 * 64 * 64 * 8
    assert work.flops == forward + 2.5 * forward  # its backward pass computes the scores again
    linear = 4 * 2 * (2 * 64 * 8)  # queries, keys, values and outputs, in bfloat16
    assert linear <= work.kept_bytes < linear + 2 * (2 * 64 * 64)


# ------------------------------------------------------------------------------------------------ tiny, every option


@pytest.fixture(scope="module")
def tiny() -> Geometry:
    pipeline = tiny_sd3_pipeline(vae=tiny_vae(16))
    return Geometry("tiny", pipeline.vae.to(META), pipeline.transformer.to(META))


def cost(tiny: Geometry, **changes: object) -> float:
    """TFLOP of one crop; without LPIPS unless `changes` has it."""
    settings = {"size": 64, "crop": 32, "start": "random", "loss": LossWeights(lpips=0.0)}
    recipe = AutoencoderRecipe(**(settings | changes))
    autoencoder = blank_autoencoder(tiny.vae, 16)
    choose_trained(autoencoder, recipe)
    discriminator = PatchDiscriminator(torch.Generator()).to(META) if recipe.loss.adversarial else None
    return count_stage_one(autoencoder, discriminator, tiny, recipe).flops / 1e12


@pytest.fixture(scope="module")
def plain_cost(tiny: Geometry) -> float:
    return cost(tiny)


@pytest.mark.parametrize(
    "more",
    [
        {"loss": LossWeights(lpips=1.0)},
        {"loss": LossWeights(lpips=0.0, adversarial=0.1)},
        {"loss": LossWeights(lpips=0.0, adaptive_alignment=True)},
        {"target": "base reconstruction"},
    ],
    ids=["lpips", "adversarial", "adaptive alignment", "base reconstruction"],
)
def test_what_a_recipe_switches_on_costs(tiny, plain_cost, more) -> None:
    assert cost(tiny, **more) > plain_cost


def test_noise_and_dropout_of_the_latents_cost_no_products(tiny, plain_cost) -> None:
    assert cost(tiny, latent_noise=0.5, detail_dropout=0.1) == plain_cost


def test_adaptive_adversarial_weights_cost(tiny) -> None:
    loss = LossWeights(lpips=0.0, adversarial=0.1)
    assert cost(tiny, loss=loss.model_copy(update={"adaptive_adversarial": True})) > cost(tiny, loss=loss)


def test_vgg_and_its_patches_cost_what_they_cost_by_hand(tiny) -> None:
    vgg = LossWeights(lpips=1.0, lpips_weights="vgg")
    patches = cost(tiny, crop=64, loss=vgg.model_copy(update={"lpips_patch": 32, "lpips_stride": 16}))
    without = cost(tiny, crop=64)
    # Convolutions of 3 x 3 at five sizes; 3 x 3 patches of 32 px; seen twice, and once back.
    channels = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512)]
    channels += 5 * [(512, 512)]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    once = sum(2 * 9 * a * b * side**2 for (a, b), side in zip(channels, sides, strict=True)) / 1e12
    assert patches - without == pytest.approx(9 * 3 * once, rel=1e-6)


def test_patches_overlap_by_half_where_no_stride_is_given(tiny) -> None:
    half, given = LossWeights(lpips_patch=32), LossWeights(lpips_patch=32, lpips_stride=16)
    assert cost(tiny, crop=64, loss=half) == cost(tiny, crop=64, loss=given)


def test_what_is_frozen_is_neither_trained_nor_paid_for(tiny, plain_cost) -> None:
    frozen, decoder = cost(tiny, frozen_trunk=True), cost(tiny, decoder_only=True)
    assert decoder < frozen < plain_cost
    recipe = AutoencoderRecipe(size=64, crop=32, start="random", loss=LossWeights(lpips=0.0), frozen_trunk=True)
    figures = {figure.name: figure.value for figure in estimate_stage_one(recipe, tiny)}
    new = figures["new block of the detail encoder"] + figures["new block of the joint decoder"]
    assert figures["trained in this stage"] == new + figures["joint decoder without its new block"]


def test_a_step_is_batch_times_accumulation(tiny, plain_cost) -> None:
    recipe = AutoencoderRecipe(
        size=64, crop=32, start="random", loss=LossWeights(lpips=0.0), batch_size=3, gradient_accumulation=4, steps=7
    )
    figures = {figure.name: figure.value for figure in estimate_stage_one(recipe, tiny)}
    assert figures["pictures a step: 3 x 4"] == 12
    assert figures["one step of the optimiser"] == pytest.approx(12 * plain_cost)
    assert figures["all 7 steps"] == pytest.approx(7 * 12 * plain_cost / 1e6)
    autoencoder = blank_autoencoder(tiny.vae, 16)
    work = count_stage_one(autoencoder, None, tiny, recipe)  # accumulation holds one batch at a time
    kept = figures["activations kept for the backward pass, batch of 3"]
    assert kept == pytest.approx(3 * work.kept_bytes / 2**30)


def test_trained_layers_are_counted(tiny) -> None:
    autoencoder = blank_autoencoder(tiny.vae, 16)
    recipe = FinetuneRecipe(size=64, trained="layers", lora_targets=("attn.to_q",))
    figures = {figure.name: figure.value for figure in estimate_stage_two(recipe, tiny, autoencoder)}
    assert "LoRA" not in figures
    assert figures["trained in this stage"] == figures["both latent ports"] + 2 * 16 * 16  # two blocks of width 16


@pytest.mark.parametrize("changes", [{}, {"trained": "full"}, {"gradient_checkpointing": True, "batch_size": 3}])
def test_the_memory_alone_is_that_of_the_whole_budget(tiny, changes) -> None:
    geometry = Geometry("x", tiny.vae, tiny_flux(tiny.vae.config.latent_channels).to(META))
    for case in (tiny, geometry):
        recipe = FinetuneRecipe(size=64, **changes)
        autoencoder = blank_autoencoder(tiny.vae, 16)
        whole = read_memory(estimate_stage_two(recipe, case, autoencoder))
        alone = estimate_stage_two_memory(recipe, case, autoencoder)
        assert alone.activations > 0
        assert alone == whole


def test_a_budget_of_flux_is_counted_too(tiny) -> None:
    autoencoder = blank_autoencoder(tiny.vae, 16)
    channels = tiny.vae.config.latent_channels
    geometry = Geometry("x", tiny.vae, tiny_flux(channels).to(META))
    recipe = FinetuneRecipe(size=64, trained="full", prompt_tokens=24)
    figures = {figure.name: figure.value for figure in estimate_stage_two(recipe, geometry, autoencoder)}
    assert figures["tokens, 4 x 4"] == 16
    assert figures["text tokens beside them"] == 24
    assert figures["transformer, one picture, forward and backward"] > 2 * figures["transformer, one picture, forward"]


def test_a_backbone_whose_captions_have_unknown_shapes_is_refused(tiny) -> None:
    autoencoder = blank_autoencoder(tiny.vae, 16)
    channels = tiny.vae.config.latent_channels
    with pytest.raises(SettingsError, match="budget of a Lumina2Transformer2DModel cannot be counted"):
        estimate_stage_two(
            FinetuneRecipe(size=64), Geometry("x", tiny.vae, tiny_lumina2(channels).to(META)), autoencoder
        )


# ----------------------------------------------------------------------------------------------------- where from


def test_the_planned_autoencoder_is_the_saved_one_or_that_of_the_files_stage_1(tiny, tmp_path) -> None:
    path = tmp_path / "both.toml"
    path.write_text("[autoencoder]\ndetail_channels = 32\n[finetune]\n")
    recipe = FinetuneRecipe(autoencoder=str(tmp_path / "made"))
    planned = plan_autoencoder(recipe, tiny, path)
    assert (planned.config.detail_channels, planned.config.linear_blocks) == (32, True)

    AutoencoderDA.from_base(tiny_vae(), detail_channels=8).save_pretrained(tmp_path / "made")
    assert plan_autoencoder(recipe, tiny, path).config.detail_channels == 8
    shipped = assets.upgrade()  # an adapter folder
    assert plan_autoencoder(FinetuneRecipe(autoencoder=str(shipped)), tiny, path).config.detail_channels == 16

    path.write_text("")
    with pytest.raises(SettingsError, match=r"no autoencoder in .*nowhere yet, and .* no section \[autoencoder\]"):
        plan_autoencoder(FinetuneRecipe(autoencoder="nowhere"), tiny, path)


@HUB_WARNS
def test_configs_come_from_the_folder_or_lie_beside_the_recipe(tmp_path) -> None:
    tiny_sd3_pipeline().save_pretrained(tmp_path / "pair")
    assert read_geometry(str(tmp_path / "pair"), tmp_path / "x.toml").source == str(tmp_path / "pair")
    (tmp_path / "geometry").mkdir()
    (tmp_path / "pair").rename(tmp_path / "geometry" / "pair")
    found = read_geometry("someone/pair", tmp_path / "x.toml")
    assert found.source == str(tmp_path / "geometry" / "pair")
    assert all(p.is_meta for model in (found.vae, found.transformer) for p in model.parameters())
    with pytest.raises(CheckpointError, match=r"someone/else cannot be read .*--set base=FOLDER"):
        read_geometry("someone/else", tmp_path / "x.toml")


@pytest.mark.parametrize("verb", ["train-autoencoder", "finetune"])
def test_a_dry_run_prints_the_recipe_and_its_budget_as_toml(verb, capsys, tmp_path) -> None:
    tiny_sd3_pipeline(vae=tiny_vae(16)).save_pretrained(tmp_path / "pair")
    twin = RECIPES / "tiny" / "sd35m_1024.toml"
    with pytest.raises(SystemExit) as left:
        main([verb, str(twin), "--dry-run", "--set", f"base={tmp_path / 'pair'}"])
    assert left.value.code == 0

    text = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(text)
    kind = AutoencoderRecipe if verb == "train-autoencoder" else FinetuneRecipe
    assert load_recipe(kind, tmp_path / "again.toml") == load_recipe(kind, twin, {"base": str(tmp_path / "pair")})

    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert f"configs of {tmp_path / 'pair'}" in comments[0]
    assert all(line.split()[-1] in ("counted", "derived", "assumed") for line in comments[1:])
    assert any("GPU-days" in line for line in comments)


@pytest.mark.parametrize(("verb", "setting"), [("train-autoencoder", "crop=100"), ("finetune", "size=255")])
def test_a_dry_run_says_what_the_run_would_refuse(verb, setting, capsys, tmp_path) -> None:
    (tmp_path / "plain.toml").write_text("")
    with pytest.raises(SystemExit) as left:
        main([verb, str(tmp_path / "plain.toml"), "--dry-run", "--set", setting])
    assert left.value.code == 0
    assert f"# No budget: {setting}: allowed are multiples of" in capsys.readouterr().out


@HUB_WARNS
def test_a_dry_run_without_configs_says_why_there_is_no_budget(capsys, tmp_path) -> None:
    (tmp_path / "plain.toml").write_text('base = "someone/else"\nsteps = 3\n')
    with pytest.raises(SystemExit) as left:
        main(["finetune", str(tmp_path / "plain.toml"), "--dry-run"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["steps"] == 3
    assert "# No budget: the configs of someone/else cannot be read" in text


@HUB_WARNS
@pytest.mark.parametrize(
    ("verb", "settings", "sentence"),
    [
        (
            "finetune",
            ["steps=9", "detail_warmup_steps=0", "warmup_steps=10"],
            "warmup_steps = 10: the learning rate never",
        ),
        (
            "finetune",
            ["steps=9", "warmup_steps=0"],
            "detail_warmup_steps = 200: the detail channels never weigh in full",
        ),
        ("train-autoencoder", ["steps=90", "loss.adversarial=1", "loss.adversarial_start=90"], "discriminator never"),
        ("train-autoencoder", ["steps=90", "loss.adversarial=1", "loss.adversarial_ramp_steps=91"], "never reaches 1"),
        ("train-autoencoder", ["steps=90", "loss.adversarial_start=90", "warmup_steps=90"], None),
    ],
)
def test_a_dry_run_names_what_comes_after_the_runs_end(verb, settings, sentence, capsys, tmp_path) -> None:
    (tmp_path / "plain.toml").write_text('base = "someone/else"')  # without a budget it is fast
    with pytest.raises(SystemExit):
        main([verb, str(tmp_path / "plain.toml"), "--dry-run", *(f"--set={setting}" for setting in settings)])
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# Too late: ")]
    assert [sentence in comment for comment in comments] == ([] if sentence is None else [True])
