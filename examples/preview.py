"""Watch an upgraded pipeline at work: python examples/preview.py PIPELINE BASE OUT PROMPT [STEPS].

After every fourth step the base's decoder makes a picture of the base half of the latents, at half the size: a quarter
of the work of decoding. BASE is the base pipeline; only its VAE is loaded. The callback is stock diffusers.
"""

import sys
from pathlib import Path

import torch
from PIL.Image import Image

from davae import load_pipeline
from davae.pipelines.autoencoders import load_base_vae
from davae.pipelines.sampling import preview_callback


def main(folder: str, base: str, out: str, prompt: str, steps: str = "28") -> None:
    pipeline = load_pipeline(folder)
    pictures = Path(out)
    pictures.mkdir(parents=True, exist_ok=True)

    def show(step: int, previews: list[Image]) -> None:
        previews[0].save(pictures / f"step-{step:02d}.png")
        print(f"step {step}: {previews[0].width} x {previews[0].height} px")

    image = pipeline(
        prompt,
        num_inference_steps=int(steps),
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=preview_callback(load_base_vae(base), show, every=4),
    ).images[0]
    image.save(pictures / "picture.png")
    print(f"picture: {image.width} x {image.height} px")


if __name__ == "__main__":
    main(*sys.argv[1:])
