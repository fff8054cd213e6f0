"""Base and upgrade, each with and without a LoRA that was trained on the base: one picture of all four.

python recipes/base_lora/figure.py runs/base_lora docs/base_lora.webp
"""

import io
from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
import typer
from PIL import Image

from davae import assets
from davae.data.pictures import to_bytes
from davae.evaluation.report import ImageGrid, write_figure
from davae.pipelines.base_lora import load_base_lora
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample

PROMPTS = ["red apple", "grinning face", "flag: Japan", "globe showing Americas"]


def main(lora: Path, out: Path, seed: Annotated[int, typer.Option()] = 0) -> None:
    """Sample both pipelines without and with the LoRA in the folder LORA."""
    pipelines = {
        "base": load_pipeline(assets.base_pipeline()),
        "upgraded": load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
    }

    # The base and the upgrade, each without and with the LoRA.
    made, sides = {}, []
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        for title in (name, f"{name} + LoRA"):
            if title != name:
                load_base_lora(pipeline, lora)
            made[title] = sample(pipeline, PROMPTS, seed=seed, steps=20, prompt_tokens=12)
            sides.append(made[title].shape[-1])

    cells = [[_enlarge(pictures[row]) for pictures in made.values()] for row in range(len(PROMPTS))]
    notes = [f"{side} px, bicubic" if side < max(sides) else f"{side} px" for side in sides]
    write_figure(out, ImageGrid(columns=list(made), rows=PROMPTS, cells=cells, notes=notes))
    figure = Image.open(io.BytesIO(out.read_bytes())).convert("RGB")
    figure.resize((figure.width // 2, figure.height // 2), Image.Resampling.LANCZOS).save(out, quality=85)


def _enlarge(picture):
    if picture.shape[-1] == 256:
        return picture
    return to_bytes(F.interpolate(picture[None].float() / 127.5 - 1, size=256, mode="bicubic")[0])


if __name__ == "__main__":
    typer.run(main)
