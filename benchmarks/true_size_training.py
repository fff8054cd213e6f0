"""A training step at Stable Diffusion 3.5 Medium's true size, random weights and inputs, interleaved.

    python benchmarks/true_size_training.py runs/training.json                               # a GPU; about 3 minutes
    python benchmarks/true_size_training.py runs/try.json --layers 1 --size 128 --batch 1    # tries the script

"lora": stage 2 for 1024 px (32 x 32 tokens) from kept latents and embeddings, eager and compiled, against the
reference's kind of step, which encodes images and captions in every step and checkpoints gradients. "full": all
weights, half the batch. "stage-1": crops of half the size with LPIPS and a discriminator, channels last against
contiguous. A step is davae's whole one: autocast, clipping, optimiser, EMA. Operations are counted for the forward and
backward pass of an image, without the encoding and the recomputation of the second kind.
"""

import contextlib
import copy
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from davae import AutoencoderDA, assets
from davae.backbones import backbone_of
from davae.cost.geometry import META, Geometry, build
from davae.cost.timing import Run, compute_paired_ratios, compute_spread, find_dense_peak, measure_interleaved
from davae.cost.workload import count_stage_one, count_stage_two
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS
from davae.method.stage_one_loss import compared_weights, stage_one_loss
from davae.pipelines.upgrade import upgrade
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator
from davae.training.devices import lay_out
from davae.training.stage_one import make_discriminator
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights, loss_settings
from davae.training.stage_two import choose_objective
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_transformer import choose_parameters, compile_blocks
from davae.training.state import TrainingState

Step = Callable[[], None]
ENDLESS: dict[str, Any] = {"steps": 10**6, "checkpoint_every": 10**6, "log_every": 10**6, "warmup_steps": 0}
SOURCE = assets.geometry() / "stable-diffusion-3.5-medium"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")
"""Of LoRA in the paper's set-up: 196 layers (recipes/sd35m_1024.toml)."""
TOKENS = 333
"""Of a caption: 77 of the CLIPs, 256 of T5."""
CACHED, COMPILED, ONLINE = "cached", "cached, compiled", "online, checkpointing"


def steps_of(state: TrainingState, kinds: Mapping[str, Step]) -> dict[str, Run]:
    """The steps of one run, each of the kind that is asked for: a kind makes the loss and updates the state."""
    steps = state.steps()

    def run_of(step: Step) -> Run:
        def run() -> None:
            with torch.enable_grad():
                next(steps)
                step()

        return run

    return {name: run_of(step) for name, step in kinds.items()}


def build_upgrade(device: torch.device, layers: int | None, *, text: bool) -> DiffusionPipeline:
    """The upgrade in float32, as in training; the text encoders, which only infer, in bfloat16."""
    base = build("sd35m", layers=layers, text=text, dtype=torch.float32, device=device)
    for name, part in base.components.items():
        if name.startswith("text_encoder") and part is not None:
            nn.Module.to(part, dtype=torch.bfloat16)
    return upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=base.vae.config.latent_channels).eval())


def stage_two_flops(pipeline: DiffusionPipeline, recipe: FinetuneRecipe) -> int:
    """Forward and backward of one picture through the transformer, counted on the meta device."""
    with META:
        transformer = type(pipeline.transformer).from_config(pipeline.transformer.config)
        autoencoder = AutoencoderDA.from_config(pipeline.vae.config)
    choose_parameters(transformer, recipe, TARGETS, "")
    return count_stage_two(transformer, autoencoder, recipe).flops


def stage_two(
    trained: str, folder: Path, device: torch.device, *, size: int, batch: int, layers: int | None
) -> tuple[dict[str, Run], int]:
    """Kinds of steps of stage 2, and the operations of an image in them."""
    lora = trained == "lora"
    settings = {"trained": trained, "lora_rank": 256, "lora_alpha": 256.0, "size": size, "batch_size": batch}
    recipe = FinetuneRecipe(**settings, **ENDLESS)
    pipeline = build_upgrade(device, layers, text=lora)
    transformer, vae, backbone = pipeline.transformer, pipeline.vae, backbone_of(pipeline.transformer)
    flops = stage_two_flops(pipeline, recipe)

    side = size // vae.downsample_factor
    objective = choose_objective(pipeline, base_channels=vae.config.base_channels, positions=side * side)
    parameters = choose_parameters(transformer, recipe, TARGETS, "")
    transformer.train()
    state = TrainingState(recipe, folder, {"transformer": transformer}, parameters, label="stage 2")

    # One batch, the same in every step.
    config = transformer.config
    images = 2 * torch.rand(batch, 3, size, size, device=device) - 1
    latents = torch.randn(batch, vae.config.latent_channels, side, side, device=device)
    condition = {
        "encoder_hidden_states": torch.randn(batch, TOKENS, config.joint_attention_dim, device=device),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, device=device),
    }
    random = [generator(0, "benchmark", number) for number in range(batch)]

    def update(latents: Tensor, condition: dict[str, Tensor]) -> None:
        noise, time = torch.randn_like(latents), objective.draw_times(random).to(device)
        with state.autocast():
            prediction = objective.predict(transformer, latents, noise, time, condition)
        state.update(*objective.loss(prediction, latents, noise, time, detail_weight=1.0))

    def cached() -> None:
        with torch.compiler.set_stance("force_eager"):
            update(latents, condition)

    def online() -> None:
        with torch.no_grad(), state.autocast():
            encoded = vae.standardise(vae.encode(images).latent_dist.mode()).float()
            encoded_text = backbone.condition(pipeline, ["a red apple"] * batch, max_sequence_length=256)
        transformer.enable_gradient_checkpointing()
        with torch.compiler.set_stance("force_eager"):
            update(encoded, encoded_text)
        transformer.disable_gradient_checkpointing()

    kinds: dict[str, Step] = {CACHED: cached}
    if lora:
        compile_blocks(transformer, sizes=1)
        kinds |= {COMPILED: lambda: update(latents, condition), ONLINE: online}
    return steps_of(state, kinds), flops


def stage_one(folder: Path, device: torch.device, *, size: int, batch: int) -> tuple[dict[str, Run], int]:
    """Kinds of steps of stage 1, and the operations of a crop in them."""
    losses = LossWeights(l1=2.0, kl=1e-7, kl_reduction="sum", alignment=1.0, adversarial=0.1)
    recipe = AutoencoderRecipe(detail_channels=16, size=size, crop=size, batch_size=batch, loss=losses, **ENDLESS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoencoderKL.from_config(AutoencoderKL.load_config(SOURCE, subfolder="vae"))
    with META:
        vae = AutoencoderKL.from_config(base.config)
        counted = AutoencoderDA.from_base(vae, detail_channels=16)

    discriminator = PatchDiscriminator(torch.Generator()).to(META)
    flops = count_stage_one(counted, discriminator, Geometry(str(SOURCE), vae, counted), recipe).flops

    image = 2 * torch.rand(batch, 3, size, size, device=device) - 1
    lpips = LPIPS.alex().to(device)

    def kind(name: str, autoencoder: AutoencoderDA) -> Run:
        opponent = make_discriminator(recipe)
        assert opponent is not None
        models, parameters = {"autoencoder": autoencoder.train()}, autoencoder.detail_parameters()
        whole = compared_weights(autoencoder).values()
        state = TrainingState(
            recipe, folder / name, models, parameters, label="stage 1", companion=opponent, whole=whole
        )

        def step() -> None:
            loss = stage_one_loss(
                autoencoder,
                image,
                lpips,
                loss_settings(recipe),
                discriminator=opponent.model,
                seed=recipe.seed,
                samples=range(batch),
                autocast=state.autocast(),
            )
            state.update(loss.total, loss.logs)
            opponent.update(loss.discriminator)

        return steps_of(state, {name: step})[name]

    made = AutoencoderDA.from_base(base, detail_channels=16)
    return {
        "channels last": kind("channels last", lay_out(copy.deepcopy(made), torch.channels_last)),
        "contiguous": kind("contiguous", made),
    }, flops


def main(
    out: Path,
    part: Annotated[list[str] | None, typer.Option(help="Some of lora, full, stage-1; all. Repeatable.")] = None,
    size: Annotated[int, typer.Option(help="Of stage 2's pictures; stage 1's crops are half as large.")] = 1024,
    batch: Annotated[int, typer.Option(help="Pictures in a batch.")] = 8,
    layers: Annotated[int | None, typer.Option(help="Blocks that are kept.")] = None,
    repeats: Annotated[int, typer.Option()] = 7,
) -> None:
    """Measure, print and write."""
    device, values = Ranks().device, {}
    peak = find_dense_peak(device, torch.bfloat16)
    for name in part or ["lora", "full", "stage-1"]:
        pictures = max(1, batch // 2) if name == "full" else batch
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
            if name == "stage-1":
                runs, flops = stage_one(Path(folder), device, size=size // 2, batch=pictures)
            else:
                runs, flops = stage_two(name, Path(folder), device, size=size, batch=pictures, layers=layers)
            times = measure_interleaved(runs, device, repeats=repeats, warm_up=2, shortest=0.0)

        first, values[name] = next(iter(times.values())), {}
        for kind, measured in times.items():
            seconds, ratio = compute_spread(measured.seconds), compute_paired_ratios(measured.seconds, first.seconds)
            rate = flops * pictures / seconds.median
            values[name][kind] = {
                "seconds": dataclasses.asdict(seconds),
                "against the first": dataclasses.asdict(ratio),
                "samples_per_second": pictures / seconds.median,
                "flops_per_second": rate,
                "mfu": None if peak is None else rate / peak,
                "peak_bytes": measured.peak_bytes,
                "cold_seconds": measured.cold,
                "batch": pictures,
                "flops": flops,
            }
            typer.echo(
                f"{name}, {kind}: {pictures / seconds.median:.3g} samples/s, {ratio.median:.3f}x "
                f"[{ratio.least:.3f}, {ratio.most:.3f}] the time of the first, {rate / 1e12:.3g} TFLOP/s, "
                f"peak {(measured.peak_bytes or 0) / 2**30:.1f} GiB, first step {measured.cold:.1f} s"
            )

        del runs, times, first
        gc.collect()
        write_json(out, {"values": values, "size": size, "device": str(device), "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
