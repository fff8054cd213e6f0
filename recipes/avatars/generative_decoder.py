"""The rival that invents detail after the fact: a small flow model draws the detail latents of a finished base image.

    python recipes/avatars/generative_decoder.py PIPELINE ADAPTER SHARDS RUN --steps 3000 --count 1000

It is the base's transformer with other ports: told base latents and caption, it turns noise into the detail latents of
ADAPTER's autoencoder, in 4 steps, and the joint decoder makes the image. So it has the upgrade's autoencoder, images
and, step for step, training FLOPs; the base stays as it is. RUN gets checkpoints, an image for each held-out caption
that measure.py uses, from the same noise, and result.json with times. The same command resumes.

    python recipes/avatars/measure.py PIPELINE MEASURED --upgrade ADAPTER --other "generative decoder=RUN/images"

compares it.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from measure import SAMPLING, held_out_attributes
from torch import Tensor
from word_tokenizers import PROMPT_TOKENS

from davae.backbones import sd3
from davae.data.avatar_captions import full_caption
from davae.data.order import batch_indices
from davae.data.pictures import to_bytes, write_png
from davae.data.sources import open_pictures
from davae.method.flow import interpolate, sample_timesteps, velocity_target
from davae.models.base_autoencoders import downsample_factor
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import draw_shared_noise, to_vae_scale
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator
from davae.training.devices import attention_on
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_two_inputs import cache_latents
from davae.training.state import TrainingState

DECODER_STEPS = 4
"""Euler steps to the detail latents."""


class DecoderRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-3
    final_learning_rate: float = 5e-6
    warmup_steps: int = 100
    base_noise: float = 0.3
    """Deviation |N(0, 1)| times this on the base latents that it is told, so that it forgives the base's errors."""


def start_from_base(base: SD3Transformer2DModel, *, detail_channels: int) -> SD3Transformer2DModel:
    """The base's transformer that reads base and noisy detail latents, and writes a velocity of the detail only."""
    channels = base.config.in_channels
    config = {**base.config, "in_channels": channels + detail_channels, "out_channels": detail_channels}
    transformer = SD3Transformer2DModel.from_config(config)

    # All but the ports is the base's; so is the port's half that reads base latents.
    ports = ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias")
    weights = {name: value for name, value in base.state_dict().items() if name not in ports}
    transformer.load_state_dict(weights, strict=False)
    with torch.no_grad():
        transformer.pos_embed.proj.weight[:, :channels] = base.pos_embed.proj.weight
        transformer.pos_embed.proj.weight[:, channels:] = 0
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer


def predict_velocity(
    transformer: SD3Transformer2DModel, latents: Tensor, sigma: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    """The velocity of the detail latents; `sd3.velocity` is for as many channels out as in."""
    return transformer(hidden_states=latents, timestep=1000 * sigma, **condition, return_dict=False)[0]


def train(
    transformer: SD3Transformer2DModel,
    upgraded: StableDiffusion3Pipeline,
    shards: Path,
    run: Path,
    recipe: DecoderRecipe,
) -> TrainingState:
    """Take the steps that are left."""
    size = upgraded.transformer.config.sample_size * downsample_factor(upgraded.vae.config)
    pictures = open_pictures(shards, size=size, split="train")
    read_latents = cache_latents(upgraded.vae, pictures, run / "cache")
    base_channels = upgraded.vae.config.base_channels
    state = TrainingState(
        recipe, run, {"transformer": transformer}, transformer.parameters(), label="generative decoder"
    )
    transformer.train()
    for step in state.steps():
        # Clean latents with their captions, one caption in ten empty.
        indices = batch_indices(len(pictures), recipe.batch_size, seed=recipe.seed, step=step, version=1)
        latents = read_latents(indices, step)
        base, detail = latents[:, :base_channels], latents[:, base_channels:]
        draw = generator(recipe.seed, "flow", step)
        kept = torch.rand(len(indices), generator=draw) >= 0.1
        captions = [pictures.captions[index] if keep else "" for index, keep in zip(indices, kept, strict=True)]

        # The base latents are told with errors as a transformer makes them.
        level = recipe.base_noise * torch.randn(len(indices), 1, 1, 1, generator=draw).abs()
        told = base + level * torch.randn(base.shape, generator=draw)
        noise = torch.randn(detail.shape, generator=draw)
        sigma = sample_timesteps(len(indices), shift=upgraded.scheduler.config.shift, generator=draw)
        noisy = torch.cat([told, interpolate(detail, noise, sigma)], dim=1)

        with torch.no_grad():
            condition = sd3.condition(upgraded, captions, max_sequence_length=PROMPT_TOKENS)
        with state.autocast(), attention_on(state.device):
            velocity = predict_velocity(transformer, noisy, sigma, condition)
        state.update(F.mse_loss(velocity.float(), velocity_target(detail, noise)))
    return state


@torch.no_grad()
def draw_detail(
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    base: Tensor,
    noise: Tensor,
    condition: dict[str, Tensor],
) -> Tensor:
    """Detail latents for finished base latents, by the steps of the scheduler, without guidance."""
    detail = noise
    scheduler.set_timesteps(DECODER_STEPS)
    for time_step in scheduler.timesteps:
        sigma = (time_step / scheduler.config.num_train_timesteps).expand(len(base))
        velocity = predict_velocity(transformer, torch.cat([base, detail], dim=1), sigma, condition)
        detail = scheduler.step(velocity, time_step, detail).prev_sample
    return detail


@torch.no_grad()
def write_images(
    transformer: SD3Transformer2DModel,
    base: StableDiffusion3Pipeline,
    upgraded: StableDiffusion3Pipeline,
    prompts: list[str],
    out: Path,
) -> list[float]:
    """An image for each prompt, from the noise that the other pipelines start from; the seconds of each."""
    side = upgraded.transformer.config.sample_size
    channels = upgraded.vae.config.base_channels
    settings = {"num_inference_steps": SAMPLING["steps"], "guidance_scale": SAMPLING["guidance_scale"]}
    seconds = []
    for index, prompt in enumerate(track(prompts, "generative decoder", unit="images")):
        began = time.perf_counter()
        noise = draw_shared_noise(upgraded, [index], seed=SAMPLING["seed"], height=side, width=side)
        latents = base(
            prompt, latents=noise[:, :channels], max_sequence_length=PROMPT_TOKENS, output_type="latent", **settings
        ).images
        condition = sd3.condition(upgraded, [prompt], max_sequence_length=PROMPT_TOKENS)
        detail = draw_detail(transformer, upgraded.scheduler, latents, noise[:, channels:], condition)
        whole = to_vae_scale(upgraded.vae, torch.cat([latents, detail], dim=1))
        image = to_bytes(upgraded.vae.decode(whole).sample)[0]
        seconds.append(time.perf_counter() - began)
        write_png(out / f"{index:05d}.png", image)
    return seconds


def main(
    pipeline: Annotated[Path, typer.Argument(help="The base pipeline's folder.")],
    adapter: Annotated[Path, typer.Argument(help="Its upgrade, whose autoencoder is used.")],
    shards: Annotated[Path, typer.Argument(help="The images of `davae data avatars`.")],
    run: Annotated[Path, typer.Argument(help="The folder for checkpoints, images and numbers.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3000,
    count: Annotated[int, typer.Option(help="Prompts.")] = 1000,
    start: Annotated[int, typer.Option(help="The first held-out image to take its caption from.")] = 512,
) -> None:
    """Train, and draw the images."""
    base, upgraded = load_pipeline(pipeline), load_pipeline(pipeline, adapter=adapter)
    for each in (base, upgraded):
        each.set_progress_bar_config(disable=True)
    recipe = DecoderRecipe(steps=steps)
    transformer = start_from_base(base.transformer, detail_channels=upgraded.vae.config.detail_channels)
    state = train(transformer, upgraded, shards, run, recipe)

    prompts = [full_caption(attributes) for attributes in held_out_attributes(start, count)]
    with state.ema_weights():
        transformer.eval()
        seconds = write_images(transformer, base, upgraded, prompts, run / "images")
    values = {"seconds_per_image": statistics.median(seconds), "count": count, "first held-out image": start}
    write_json(run / "result.json", {**values, "steps": steps, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
