"""Generate with an upgraded pipeline: python examples/generate.py PIPELINE OUT.png PROMPT [STEPS].

Nothing here but `load_pipeline` is davae's: the pipeline is a stock diffusers pipeline.
"""

import sys

import torch

from davae import load_pipeline


def main(folder: str, out: str, prompt: str, steps: str = "28") -> None:
    pipeline = load_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(prompt, num_inference_steps=int(steps), guidance_scale=4.0, generator=generator).images[0]
    image.save(out)
    print(f"{image.width} x {image.height} px in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
