"""How much of the noise that sampling starts from is left in the latents of an upgraded Stable Diffusion 3 pipeline.

    python recipes/larger_steps/left_noise.py runs/larger_steps/s=4/stage2/pipeline --out runs/left_noise

A token has (C + D) p^2 numbers, and an output port of fewer columns says nothing of some directions (docs/method.md,
"How many channels a transformer holds"). For those and for the others: the correlation of the latents at the end with
the noise at the start, the mean over directions; and the velocity's error on training pictures at half noise, the
mean square. Writes OUT/result.json (copied into experiments/results/left_noise.json).
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from einops import rearrange
from torch import Tensor

from davae import assets, demo
from davae.backbones import backbone_of
from davae.data.sources import open_pictures
from davae.evaluation.generation import repeat_captions
from davae.method.flow import interpolate, velocity_target
from davae.method.widen import lost_directions, patch_side
from davae.pipelines.loading import load_pipeline
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator


def directions(pipeline: Any) -> dict[str, Tensor]:
    """Orthonormal directions of a token [n, k], by whether the output port's columns reach them."""
    numbers = pipeline.transformer.proj_out.weight.shape[0]
    kept = numbers - lost_directions(pipeline.transformer, backbone_of(pipeline.transformer).ports)
    basis = torch.linalg.svd(pipeline.transformer.proj_out.weight.double())[0]
    return {"kept": basis[:, :kept], "lost": basis[:, kept:]}


@torch.no_grad()
def main(
    folder: Path,
    out: Annotated[Path, typer.Option()],
    pictures: Annotated[Path, typer.Option(help="The set it was trained on.")] = assets.pictures(),
    count: Annotated[int, typer.Option(help="Pictures.")] = 16,
) -> None:
    """Measure, print, and write."""
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    backbone, vae = backbone_of(pipeline.transformer), pipeline.vae
    patch = patch_side(pipeline.transformer, backbone.ports)
    training = open_pictures(pictures, size=backbone.picture_side(pipeline, None), split="train")
    prompts = repeat_captions(training, count)

    def tokens(latents: Tensor) -> Tensor:
        return rearrange(latents, "b c (h p) (w q) -> (b h w) (p q c)", p=patch, q=patch).double()

    clean = torch.cat([vae.to_units(vae.encode(training.batch([i])).latent_dist.mode()) for i in range(count)])
    noise = torch.randn(clean.shape, generator=generator(0, "left noise"))
    settings = {"num_inference_steps": 20, "guidance_scale": 2.5, "max_sequence_length": demo.PROMPT_TOKENS}
    end = pipeline(prompts, latents=noise, output_type="latent", **settings).images
    condition = backbone.condition(pipeline, prompts, max_sequence_length=demo.PROMPT_TOKENS)
    half = torch.full((count,), 0.5)
    velocity = backbone.velocity(pipeline.transformer, interpolate(clean, noise, half), half, condition)
    error = tokens(velocity - velocity_target(clean, noise))
    found: dict[str, Any] = {}
    for name, basis in directions(pipeline).items():
        before, after = (tokens(each) @ basis for each in (noise, end))
        before, after = before - before.mean(dim=0), after - after.mean(dim=0)
        correlation = (before * after).sum(dim=0) / (before.norm(dim=0) * after.norm(dim=0))
        found[name] = {
            "directions": basis.shape[1],
            "correlation": correlation.mean().item() if basis.shape[1] else None,
            "squared_error": (error @ basis).square().mean().item() if basis.shape[1] else None,
        }
    typer.echo(found)
    write_json(out / "result.json", {**found, "count": count, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
