"""Look at a set of pictures before training on it: counts, sizes, detail, captions, speed, a contact sheet."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from torch import Tensor

from davae.data.loading import WORKERS, in_threads
from davae.data.pictures import LEFT_OUT, PictureRefused, Refusal, to_floats
from davae.data.sources import PictureSet
from davae.method.metrics import half_size_psnr

TIMED_PICTURES = 64
# A picture of more dB of `half_size_psnr` says little about detail.
SOFT_DB = 40.0
QUANTILES = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "greatest": 1}
SHEET_COLUMNS, SHEET_ROWS, THUMBNAIL, LINE = 8, 6, 128, 14


def survey(pictures: PictureSet) -> dict[str, Any]:
    """The facts about a set, as JSON holds them; decodes every picture once.

    `refused`: counts by kind, and each picture's reason; `unreadable` are those whose kind is not in `LEFT_OUT`.
    `stored`: widths, heights and megapixels of the upright pictures. `buckets`: size, pictures, and the mean share that
    the crop cuts off. `half_size_psnr_db` at the bucket's size; `soft` counts the pictures above `soft_db`. `loader`:
    pictures and megapixels a second, decoded and fitted, by one thread and by `threads`, from files that were just
    read; not a benchmark (see benchmarks/loading.py).
    """
    sound, softness, damaged = _decode_all(pictures)
    sizes = np.array([pictures.original_size(index) for index in sound]).reshape(-1, 2)
    facts: dict[str, Any] = {
        "pictures": len(sound),
        "refused": _count_refused([*pictures.refused, *damaged]),
        "stored": {
            "width": quantiles(sizes[:, 0]),
            "height": quantiles(sizes[:, 1]),
            "megapixels": quantiles(sizes.prod(1) / 1e6),
        },
        "buckets": _describe_buckets(pictures, sound),
        "half_size_psnr_db": quantiles(softness),
        "soft": int((np.array(softness) > SOFT_DB).sum()),
        "soft_db": SOFT_DB,
        "captions": _describe_captions([pictures.captions[index] for index in sound]),
    }

    if pictures.classes:
        counts = Counter(pictures.classes[index] for index in sound)
        facts["classes"] = {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}
    return {**facts, "loader": _time_loader(pictures, sound)}


def quantiles(values: Sequence[float] | Sequence[int] | np.ndarray) -> dict[str, float]:
    """Least, 5 %, median, 95 % and greatest; empty if there are no values."""
    if not len(values):
        return {}
    numbers = np.quantile(np.asarray(values, np.float64), list(QUANTILES.values()))
    return {name: round(float(number), 3) for name, number in zip(QUANTILES, numbers, strict=True)}


def contact_sheet(pictures: PictureSet) -> UInt8[Tensor, "3 height width"]:
    """Up to 48 pictures, evenly spread over the set, as training sees them, with the beginning of their captions.

    A picture that cannot be decoded is a grey field.
    """
    count = min(len(pictures), SHEET_COLUMNS * SHEET_ROWS)
    rows = -(-count // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL, rows * (THUMBNAIL + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place in range(count):
        index = place * len(pictures) // count
        left, top = place % SHEET_COLUMNS * THUMBNAIL, place // SHEET_COLUMNS * (THUMBNAIL + LINE)

        # The picture, in the middle of its field.
        try:
            image = Image.fromarray(pictures.decode(index).permute(1, 2, 0).contiguous().numpy())
        except PictureRefused:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
        image.thumbnail((THUMBNAIL - 4, THUMBNAIL - 4))
        sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))

        # The caption, cut until it fits in one line below.
        caption = " ".join((pictures.captions[index] or pictures.keys[index]).split())
        while draw.textlength(caption, font=font) > THUMBNAIL - 4:
            caption = caption[:22] if len(caption) > 22 else caption[:-1]
        draw.text((left + 2, top + THUMBNAIL), caption, fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).contiguous()


def source_name(source: Path | str) -> str:
    """A folder's name for a source."""
    return Path(str(source).partition("?")[0].rstrip("/")).name.partition(".")[0] or "data"


def _decode_all(pictures: PictureSet) -> tuple[list[int], list[float], list[Refusal]]:
    """The sound pictures, their softness in dB, and the pictures that are damaged behind their headers."""
    sound: list[int] = []
    softness: list[float] = []
    damaged: list[Refusal] = []
    for index in track(range(len(pictures)), "decoding pictures", console=Console(stderr=True), transient=True):
        try:
            image = to_floats(pictures.decode(index)[None])
        except PictureRefused as error:
            damaged.append(error.refusal)
        else:
            sound.append(index)
            softness.append(half_size_psnr(image).item())
    return sound, softness, damaged


def _count_refused(refused: Sequence[Refusal]) -> dict[str, Any]:
    kinds = Counter(refusal.kind for refusal in refused)
    unreadable = sum(count for kind, count in kinds.items() if kind not in LEFT_OUT)
    each = [{"name": refusal.name, "kind": refusal.kind, "reason": refusal.reason} for refusal in refused]
    return {"pictures": len(refused), "unreadable": unreadable, "kinds": dict(kinds.most_common()), "each": each}


def _describe_buckets(pictures: PictureSet, sound: Sequence[int]) -> list[dict[str, Any]]:
    usable = set(sound)
    rows = []
    for bucket, members in zip(pictures.buckets, pictures.members, strict=True):
        # The share of each picture that its crop keeps.
        shares = []
        for index in usable.intersection(members):
            crop, (width, height) = pictures.crop(index), pictures.original_size(index)
            shares.append(crop.width * crop.height / (width * height))
        cut_off = round(1 - sum(shares) / len(shares), 4) if shares else None
        rows.append({"width": bucket.width, "height": bucket.height, "pictures": len(shares), "cut_off": cut_off})
    return rows


def _describe_captions(captions: Sequence[str]) -> dict[str, Any]:
    counts = Counter(captions)
    return {
        "characters": quantiles(list(map(len, captions))),
        "words": quantiles([len(caption.split()) for caption in captions]),
        "empty": counts[""],
        "repeated": sum(count for caption, count in counts.items() if count > 1 and caption),
    }


def _time_loader(pictures: PictureSet, sound: Sequence[int]) -> dict[str, Any]:
    """Rates of one thread and of several, on pictures from all over the set."""
    chosen = sound[:: -(-len(sound) // TIMED_PICTURES)] if sound else []
    megapixels = sum(math.prod(pictures.original_size(index)) for index in chosen) / 1e6
    rates = []
    for alone in (True, False):
        began = time.perf_counter()
        in_threads(pictures.decode, chosen, alone=alone)
        rates.append(1 / max(time.perf_counter() - began, 1e-9))
    return {
        "pictures": len(chosen),
        "threads": WORKERS,
        "pictures_per_second": [round(len(chosen) * rate, 1) for rate in rates],
        "megapixels_per_second": [round(megapixels * rate, 1) for rate in rates],
    }
