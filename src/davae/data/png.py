"""Pictures of the models' range into PNG files, and back."""

import io
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from davae.run.storage import write_atomically

ORIGIN = "davae-origin"
"""Name of the text in a PNG file that says what it was made from."""


def to_bytes(image: Float[Tensor, "*batch 3 h w"]) -> UInt8[Tensor, "*batch 3 h w"]:
    """Pictures in [-1, 1] as bytes."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_png(path: Path, picture: UInt8[Tensor, "3 h w"], *, origin: str = "") -> None:
    """Write one picture, whole or not at all; `origin` goes into its metadata.

    Raises:
        StorageError: it cannot be written.
    """
    text, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(ORIGIN, origin)
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(stream, format="PNG", pnginfo=text)
    write_atomically(path, stream.getvalue())


def read_png(path: Path) -> UInt8[Tensor, "3 h w"]:
    """Read a picture that `write_png` wrote."""
    with Image.open(path) as image:
        data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
