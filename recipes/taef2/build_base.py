"""Make the folder of the base autoencoder out of TAEF2's two weight files (madebyollin/taesd, MIT licence).

    python recipes/taef2/build_base.py WEIGHTS runs/taef2/base

WEIGHTS holds `encoder.safetensors` and `decoder.safetensors`, whose keys are numbered by position. The folder is what
`save_pretrained` writes, in float32, and a recipe's `base`.
"""

from pathlib import Path

import typer
from safetensors.torch import load_file
from torch import Tensor

from davae import AutoencoderTAEF2


def renamed(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under diffusers' names; the original's decoder begins with a clamp, so its layers count one more."""
    skipped = 1 if part == "decoder" else 0
    names = {}
    for key, tensor in weights.items():
        position, _, rest = key.partition(".")
        names[f"{part}.layers.{int(position) - skipped}.{rest}"] = tensor.float()
    return names


def load_taef2(folder: Path) -> AutoencoderTAEF2:
    """TAEF2 in float32 from the two files in `folder`; a missing, superfluous or misshapen weight is an error."""
    autoencoder = AutoencoderTAEF2()
    weights: dict[str, Tensor] = {}
    for part in ("encoder", "decoder"):
        weights |= renamed(part, load_file(folder / f"{part}.safetensors"))
    autoencoder.load_state_dict(weights, strict=True)
    return autoencoder.eval()


def main(weights: Path, output: Path) -> None:
    """Write the autoencoder in the folder WEIGHTS to the folder OUTPUT."""
    load_taef2(weights).save_pretrained(output)
    typer.echo(f"{output}")


if __name__ == "__main__":
    typer.run(main)
