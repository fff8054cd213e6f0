"""Pictures and captions as files and as shards, for the tests of this folder."""

import io
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def captioned(count: int) -> dict[str, bytes]:
    files = {f"{index:03d}.png": picture(index) for index in range(count)}
    return files | {f"{index:03d}.txt": f"picture {index}\n".encode() for index in range(count)}


def tar(path: Path, files: dict[str, bytes], *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        for member in odd:
            shard.addfile(member, io.BytesIO(bytes(member.size)))
    return path
