"""What a set of pictures is made of, before anybody trains on it: counts, sizes, detail, captions, speed, a picture."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from davae.data.loading import WORKERS, in_threads
from davae.data.pictures import LEFT_OUT, PictureRefused, to_floats
from davae.data.sources import PictureSet
from davae.data.stored import Refusal
from davae.method.metrics import half_size_psnr
from davae.run.progress import track

TIMED_PICTURES = 64
SOFT_DB = 40.0
"""Above so many dB of `half_size_psnr` a picture says little about detail."""
SHEET_COLUMNS, SHEET_ROWS, THUMBNAIL, LINE = 8, 6, 128, 14


def survey(pictures: PictureSet) -> dict[str, Any]:
    """The facts about a set, as JSON holds them; decodes every picture once.

    - `refused`: how many by kind, and each one's name, kind and reason; `unreadable` are those whose kind is not in
      `LEFT_OUT`.
    - `stored`: quantiles of the upright pictures' widths, heights and megapixels.
    - `buckets`: size, pictures, and the mean share of a picture that the crop cuts off.
    - `half_size_psnr_db`: quantiles of `davae.method.metrics.half_size_psnr` at the bucket's size; `soft`: how many
      are above `soft_db`.
    - `captions`: quantiles of their lengths in characters and words; how many are empty or not the only of their kind.
    - `classes`: how many there are, and the fewest and most pictures of one.
    - `loader`: pictures and megapixels of the stored size a second, decoded and fitted, by one thread and by `threads`,
      from files that were just read. Not a benchmark: see benchmarks/loading.py.
    """
    softness: dict[int, float] = {}
    damaged: list[Refusal] = []
    for index in track(range(len(pictures)), "decoding images", unit="images"):
        try:
            image = to_floats(pictures.decode(index)[None])
        except PictureRefused as error:
            damaged.append(Refusal(error.name, error.reason, error.kind))
        else:
            softness[index] = half_size_psnr(image).item()
    refused = [*pictures.refused, *damaged]
    sound = list(softness)
    sizes = np.array([pictures.original_size(index) for index in sound]).reshape(-1, 2)
    facts: dict[str, Any] = {
        "pictures": len(sound),
        "refused": {
            "pictures": len(refused),
            "unreadable": sum(refusal.kind not in LEFT_OUT for refusal in refused),
            "kinds": dict(Counter(refusal.kind for refusal in refused).most_common()),
            "each": [{"name": item.name, "kind": item.kind, "reason": item.reason} for item in refused],
        },
        "stored": {
            "width": quantiles(sizes[:, 0]),
            "height": quantiles(sizes[:, 1]),
            "megapixels": quantiles(sizes.prod(1) / 1e6),
        },
        "buckets": _buckets(pictures, sound),
        "half_size_psnr_db": quantiles(list(softness.values())),
        "soft": sum(value > SOFT_DB for value in softness.values()),
        "soft_db": SOFT_DB,
        "captions": _captions([pictures.captions[index] for index in sound]),
    }
    if pictures.classes:
        counts = Counter(pictures.classes[index] for index in sound)
        facts["classes"] = {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}
    return {**facts, "loader": _speed(pictures, sound)}


def quantiles(values: Sequence[float] | Sequence[int] | np.ndarray) -> dict[str, float]:
    """Least, 5 %, median, 95 % and greatest; empty of no values."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), (0, 0.05, 0.5, 0.95, 1))
    names = ("least", "5 %", "median", "95 %", "greatest")
    return {name: round(float(value), 3) for name, value in zip(names, found, strict=True)}


def contact_sheet(pictures: PictureSet) -> UInt8[Tensor, "3 height width"]:
    """Up to 48 pictures, evenly spread over the set, as training sees them, the beginning of the caption under each.

    What cannot be decoded is a grey field.
    """
    count = min(len(pictures), SHEET_COLUMNS * SHEET_ROWS)
    rows = -(-count // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL, rows * (THUMBNAIL + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place in range(count):
        index = place * len(pictures) // count
        left, top = place % SHEET_COLUMNS * THUMBNAIL, place // SHEET_COLUMNS * (THUMBNAIL + LINE)
        try:
            image = Image.fromarray(pictures.decode(index).permute(1, 2, 0).contiguous().numpy())
        except PictureRefused:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
        image.thumbnail((THUMBNAIL - 4, THUMBNAIL - 4))
        sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))
        caption = " ".join((pictures.captions[index] or pictures.keys[index]).split())
        while draw.textlength(caption, font=font) > THUMBNAIL - 4:
            caption = caption[:22] if len(caption) > 22 else caption[:-1]
        draw.text((left + 2, top + THUMBNAIL), caption, fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).contiguous()


def source_name(source: Path | str) -> str:
    """A folder's name for a source."""
    return Path(str(source).partition("?")[0].rstrip("/")).name.partition(".")[0] or "data"


def _buckets(pictures: PictureSet, sound: Sequence[int]) -> list[dict[str, Any]]:
    usable = set(sound)
    rows = []
    for bucket, members in zip(pictures.buckets, pictures.members, strict=True):
        kept = []
        for index in usable.intersection(members):
            crop, (width, height) = pictures.crop(index), pictures.original_size(index)
            kept.append(crop.width * crop.height / (width * height))
        cut = round(1 - sum(kept) / len(kept), 4) if kept else None
        rows.append({"width": bucket.width, "height": bucket.height, "pictures": len(kept), "cut_off": cut})
    return rows


def _captions(captions: Sequence[str]) -> dict[str, Any]:
    counts = Counter(captions)
    return {
        "characters": quantiles([len(caption) for caption in captions]),
        "words": quantiles([len(caption.split()) for caption in captions]),
        "empty": counts[""],
        "repeated": sum(count for caption, count in counts.items() if count > 1 and caption),
    }


def _speed(pictures: PictureSet, sound: Sequence[int]) -> dict[str, Any]:
    chosen = sound[:: -(-len(sound) // TIMED_PICTURES)] if sound else []
    pixels = sum(width * height for width, height in map(pictures.original_size, chosen)) / 1e6
    seconds = []
    for alone in (True, False):
        began = time.perf_counter()
        in_threads(pictures.decode, chosen, alone=alone)
        seconds.append(time.perf_counter() - began)
    return {
        "pictures": len(chosen),
        "threads": WORKERS,
        "pictures_per_second": [round(len(chosen) / max(value, 1e-9), 1) for value in seconds],
        "megapixels_per_second": [round(pixels / max(value, 1e-9), 1) for value in seconds],
    }
