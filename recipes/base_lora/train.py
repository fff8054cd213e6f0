"""Train a style LoRA on the shipped base pipeline, at 128 px; nothing here knows of the upgrade.

    python recipes/base_lora/train.py runs/base_lora
    python recipes/base_lora/figure.py runs/base_lora docs/base_lora.webp

The style is a cyanotype: brightness as a ramp from deep blue to white. The LoRA is a stock one, of attention and MLP,
saved as diffusers saves it, and loads by `pipeline.load_lora_weights` on the base and on its upgrade alike.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from davae import assets
from davae.backbones import sd3
from davae.data.order import batch_indices
from davae.data.sources import open_pictures
from davae.method.flow import interpolate, sample_timesteps, velocity_target
from davae.pipelines.loading import load_pipeline
from davae.run.progress import track
from davae.seeds import generator

PROMPT_TOKENS = 12
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SHADOW, LIGHT = (-0.9, -0.5, 0.1), (1.0, 1.0, 1.0)
"""The ramp's ends, RGB in [-1, 1]."""


def cyanotype(pictures: Tensor) -> Tensor:
    """Brightness as a ramp of two colours: [B, 3, H, W] in [-1, 1]."""
    luma = (pictures * pictures.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    shadow, light = (pictures.new_tensor(colour).view(3, 1, 1) for colour in (SHADOW, LIGHT))
    return torch.lerp(shadow, light, (luma + 1) / 2)


def main(
    out: Path,
    steps: Annotated[int, typer.Option()] = 400,
    count: Annotated[int, typer.Option(help="Pictures, spread over the training set.")] = 400,
    rank: Annotated[int, typer.Option()] = 8,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write the LoRA to OUT/pytorch_lora_weights.safetensors."""
    pipeline = load_pipeline(assets.base_pipeline())
    pictures = open_pictures(assets.pictures(), size=256, split="train", limit=count)
    vae, transformer, shift = pipeline.vae, pipeline.transformer, pipeline.scheduler.config.shift
    latents, conditions = [], []
    with torch.no_grad():
        for batch in torch.arange(len(pictures)).split(20):
            small = F.interpolate(pictures.batch(batch.tolist()), size=128, mode="bicubic", antialias=True)
            latents.append(vae.encode(cyanotype(small.clamp(-1, 1))).latent_dist.mode())
            captions = [pictures.captions[index] for index in batch]
            conditions.append(sd3.condition(pipeline, captions, max_sequence_length=PROMPT_TOKENS))
    clean = (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor
    told = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}

    torch.manual_seed(seed)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=learning_rate / 20)
    for step in track(range(steps), "LoRA"):
        indices, random = batch_indices(len(clean), 16, seed=seed, step=step), generator(seed, "flow", step)
        noise = torch.randn(clean[indices].shape, generator=random)
        sigma = sample_timesteps(len(indices), shift=shift, generator=random)
        noisy = interpolate(clean[indices], noise, sigma)
        velocity = sd3.velocity(transformer, noisy, sigma, {name: tensor[indices] for name, tensor in told.items()})
        (velocity - velocity_target(clean[indices], noise)).square().mean().backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    StableDiffusion3Pipeline.save_lora_weights(
        out,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


if __name__ == "__main__":
    typer.run(main)
