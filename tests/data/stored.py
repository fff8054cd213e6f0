"""Pictures and captions as files and as shards, and what came of them, for the tests of this folder."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from davae.data.sources import PictureSet


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


def reasons(pictures: PictureSet) -> dict[str, str]:
    """Why pictures were refused, by name."""
    return {refusal.name: refusal.reason for refusal in pictures.refused}


def check_reasons(pictures: PictureSet, expected: dict[str, str]) -> None:
    """Exactly these pictures were refused, each for a reason with these words."""
    refused = reasons(pictures)
    assert refused.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in refused[name], name


def digest(pictures: PictureSet) -> str:
    """SHA-256 over keys, captions, classes and the encoded bytes."""
    total = hashlib.sha256()
    for entry in pictures.entries:
        label = [] if entry.label is None else [str(entry.label).encode()]
        for part in (entry.key.encode(), entry.caption.encode(), *label, entry.picture.read()):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


@contextmanager
def peak_memory_below(limit: int) -> Iterator[None]:
    """The process may take so many bytes more than it has now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < limit


def resident(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def tar(path: Path, files: dict[str, bytes], *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        for member in odd:
            shard.addfile(member, io.BytesIO(bytes(member.size)))
    return path
