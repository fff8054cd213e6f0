"""The rival at equal tokens: a network that enlarges the base's latents, so that its decoder gives twice the side.

    python recipes/small_pair/latent_upscaler.py RUN --steps 3200 --count 1000

trains it on the shipped pictures (RUN holds checkpoints; the same command resumes), samples the base pipeline's latents
for COUNT prompts with the seeds of measure.py, enlarges and decodes them, and writes KID and held-out reconstruction to
RUN/result.json. It is regression with stage 1's pixel losses and its noise on the latents. There is no second diffusion
model, so an image costs as much as the base's plus the decoder at full size.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from davae import assets, demo
from davae.data.order import batch_indices, random_crops
from davae.data.pictures import to_bytes
from davae.data.sources import open_pictures
from davae.evaluation import generation, reconstruction
from davae.method.losses import gradient_l1, reconstruction_l1
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import draw_shared_noise
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState


class UpscalerRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    width: int = 160
    blocks: int = 4
    """Residual blocks at either size."""
    crop: int = 128
    """Side of the training crops in pixels of the large picture."""
    batch_size: int = 4
    latent_noise: float = 0.3
    """As in stage 1: deviation |N(0, 1)| times this, so that it forgives a transformer's small errors."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width, h, w] -> the same."""
        return hidden + self.second(F.silu(self.first(F.silu(self.norm(hidden)))))


class LatentUpscaler(nn.Module):
    """[B, C, h, w] -> [B, C, 2h, 2w] in units: a least-squares map, and a convolutional correction that starts at 0."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, 4 * channels, 1)
        self.small = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *(Block(width) for _ in range(blocks)))
        self.grow = nn.Conv2d(width, 4 * width, 1)
        self.large = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Full-size latents in units."""
        hidden = self.large(F.pixel_shuffle(self.grow(self.small(latents)), 2))
        return F.pixel_shuffle(self.linear(latents), 2) + self.out(hidden)


def encode(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Latents in units, the posterior's mode."""
    config = vae.config
    return (vae.encode(image).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] of latents in units."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample


def reduce_to_half(image: Tensor) -> Tensor:
    """The picture at half size, as the base saw pictures."""
    return F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def start_linear(upscaler: LatentUpscaler, vae: AutoencoderKL, image: Tensor) -> None:
    """Least squares of the unshuffled full-size latents on the base latents."""
    full, base = F.pixel_unshuffle(encode(vae, image), 2), encode(vae, reduce_to_half(image))
    source, target = (latents.double().transpose(0, 1).flatten(1).T for latents in (base, full))
    found = torch.linalg.lstsq(F.pad(source, (0, 1), value=1.0), target).solution
    upscaler.linear.weight.copy_(found[:-1].T[:, :, None, None])
    upscaler.linear.bias.copy_(found[-1])


def train(recipe: UpscalerRecipe, vae: AutoencoderKL, run: Path) -> tuple[LatentUpscaler, int]:
    """The trained network, and its steps."""
    pictures = open_pictures(assets.pictures(), size=demo.SIZE, split="train")

    torch.manual_seed(recipe.seed)
    upscaler = LatentUpscaler(vae.config.latent_channels, recipe.width, recipe.blocks)
    start_linear(upscaler, vae, pictures.batch(range(0, len(pictures), len(pictures) // 128)))
    lpips = LPIPS.alex()

    models, parameters = {"upscaler": upscaler}, upscaler.parameters()
    state = TrainingState(recipe, run, models, parameters, label="latent upscaler")
    for step in state.steps():
        indices = batch_indices(len(pictures), recipe.batch_size, seed=recipe.seed, step=step)
        image = random_crops(pictures.batch(indices), recipe.crop, seed=recipe.seed, step=step)

        # Enlarge noisy latents of the half-size image, and decode.
        random = generator(recipe.seed, "latent noise", step)
        with state.autocast():
            with torch.no_grad():
                base, full = encode(vae, reduce_to_half(image)), encode(vae, image)
            level = recipe.latent_noise * torch.randn(len(base), 1, 1, 1, generator=random).abs()
            latents = upscaler(base + level * torch.randn(base.shape, generator=random))
            made = decode(vae, latents)
            perceptual = lpips(made, image).mean()

        parts = {
            "l1": reconstruction_l1(made, image),
            "gradient": gradient_l1(made, image),
            "lpips": perceptual,
            "latents": (latents.float() - full.float()).square().mean(),
        }
        total = parts["l1"] + 0.5 * parts["gradient"] + 0.15 * parts["lpips"] + 0.05 * parts["latents"]
        state.update(total, parts)
    with state.ema_weights():
        return upscaler.eval(), state.step


@torch.no_grad()
def sample_base_latents(pipeline: StableDiffusion3Pipeline, prompts: list[str], path: Path) -> Tensor:
    """Latents in units [N, C, h, w] of measure.py's prompts and seeds, kept in `path`."""
    if path.is_file():
        return load_file(path)["latents"]

    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.transformer.config.sample_size
    rows = []

    for start in track(range(0, len(prompts), 16), "base latents"):
        batch = prompts[start : start + 16]
        noise = draw_shared_noise(pipeline, range(start, start + len(batch)), seed=0, height=side, width=side)
        made = pipeline(
            batch, num_inference_steps=20, guidance_scale=2.5, latents=noise, max_sequence_length=demo.PROMPT_TOKENS,
            output_type="latent",
        )  # fmt: skip
        rows.append(made.images)
    save_file({"latents": torch.cat(rows)}, path)
    return torch.cat(rows)


@torch.no_grad()
def main(
    run: Path,
    steps: Annotated[int, typer.Option(help="Of training.")] = 3200,
    count: Annotated[int, typer.Option(help="Prompts.")] = 1000,
) -> None:
    """Train, sample, measure."""
    recipe = UpscalerRecipe(steps=steps, learning_rate=6e-4, ema_decay=0.998)
    vae = load_base_vae(str(assets.base_pipeline())).requires_grad_(False)
    with torch.enable_grad():
        upscaler, done = train(recipe, vae, run)

    # Reconstruction of held-out images.
    heldout = open_pictures(assets.pictures(), size=demo.SIZE, split="heldout")
    ways = {"latent upscaler": lambda image: decode(vae, upscaler(encode(vae, reduce_to_half(image))))}
    quality = reconstruction.measure(heldout, ways, lpips=LPIPS.alex())

    # Images from prompts.
    real = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    prompts = generation.repeat_captions(real, count)
    latents = sample_base_latents(load_pipeline(assets.base_pipeline()), prompts, run / "base_latents.safetensors")
    made = [picture for batch in latents.split(16) for picture in to_bytes(decode(vae, upscaler(batch)))]
    kid = demo.measure_kid({"latent upscaler": made}, real, 0)

    parameters = sum(parameter.numel() for parameter in upscaler.parameters())
    facts = {"reconstruction_256": quality, "kid": kid, "steps": done, "parameters": parameters}
    write_json(run / "result.json", {**facts, "count": count, "environment": environment()})
    typer.echo(facts)


if __name__ == "__main__":
    typer.run(main)
