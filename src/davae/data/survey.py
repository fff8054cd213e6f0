"""Look at a set of pictures before training on it: counts, sizes, detail, captions, speed, a contact sheet."""

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

from davae.data.buckets import Bucket, central_crop
from davae.data.entries import PictureEntry
from davae.data.loading import WORKERS, in_threads
from davae.data.pictures import LEFT_OUT, PictureRefused, Refusal, to_floats
from davae.data.sources import PictureSet
from davae.method.metrics import half_size_psnr
from davae.run.progress import track

TIMED_PICTURES = 64
# A picture of more dB of `half_size_psnr` says little about detail.
SOFT_DB = 40.0
QUANTILES = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "greatest": 1}
SHEET_COLUMNS, SHEET_ROWS, THUMBNAIL, LINE = 8, 6, 128, 14


def survey(pictures: PictureSet) -> dict[str, Any]:
    """The facts about a set, as JSON holds them; decodes every picture once.

    `unreadable` pictures are those that are refused for a kind that is not in `LEFT_OUT`. `stored` has the sizes of the
    upright pictures. `loader` has the speed of decoding and fitting files that were just read, by one thread and by
    `threads`; benchmarks/loading.py measures it well.
    """
    sound, softness, damaged = _decode_all(pictures)
    entries = [pictures.entries[index] for index in sound]
    sizes = np.array([(entry.width, entry.height) for entry in entries]).reshape(-1, 2)
    facts: dict[str, Any] = {
        "pictures": len(sound),
        "refused": _count_refused([*pictures.refused, *damaged]),
        "stored": {
            "width": quantiles(sizes[:, 0]),
            "height": quantiles(sizes[:, 1]),
            "megapixels": quantiles(sizes.prod(1) / 1e6),
        },
        "buckets": [_describe_bucket(bucket, entries) for bucket in pictures.buckets],
        "half_size_psnr_db": quantiles(softness),
        "soft": int((np.array(softness) > SOFT_DB).sum()),
        "soft_db": SOFT_DB,
        "captions": _describe_captions([entry.caption for entry in entries]),
    }

    if pictures.classes:
        counts = Counter(entry.label for entry in entries)
        facts["classes"] = {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}
        facts["classes"]["numbers"] = {name: number for number, name in enumerate(pictures.class_names)}
    return {**facts, "loader": _time_loader(pictures, sound)}


def quantiles(values: Sequence[float] | Sequence[int] | np.ndarray) -> dict[str, float]:
    """Least, 5 %, median, 95 % and greatest; empty if there are no values."""
    if not len(values):
        return {}
    numbers = np.quantile(np.asarray(values, np.float64), list(QUANTILES.values()))
    return {name: round(float(number), 3) for name, number in zip(QUANTILES, numbers, strict=True)}


def contact_sheet(pictures: PictureSet) -> UInt8[Tensor, "3 height width"]:
    """Up to 48 pictures, evenly spread over the set, as training sees them, above the beginning of their captions."""
    count = min(len(pictures), SHEET_COLUMNS * SHEET_ROWS)
    rows = -(-count // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL, rows * (THUMBNAIL + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place in range(count):
        index = place * len(pictures) // count
        left, top = place % SHEET_COLUMNS * THUMBNAIL, place // SHEET_COLUMNS * (THUMBNAIL + LINE)

        # The picture in the middle of its field, which is grey if the picture is damaged.
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
    """The sound pictures, their `half_size_psnr`, and the pictures that are damaged behind their headers."""
    sound: list[int] = []
    softness: list[float] = []
    damaged: list[Refusal] = []
    for index in track(range(len(pictures)), "decoding", unit="pictures"):
        try:
            image = to_floats(pictures.decode(index)[None])
        except PictureRefused as error:
            damaged.append(error.refusal)
        else:
            sound.append(index)
            softness.append(half_size_psnr(image).item())
    return sound, softness, damaged


def _count_refused(refused: Sequence[Refusal]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    unreadable, each = 0, []
    for refusal in refused:
        kinds[refusal.kind] += 1
        unreadable += refusal.kind not in LEFT_OUT
        each.append({"name": refusal.name, "kind": refusal.kind, "reason": refusal.reason})
    return {"pictures": len(refused), "unreadable": unreadable, "kinds": dict(kinds.most_common()), "each": each}


def _describe_bucket(bucket: Bucket, entries: Sequence[PictureEntry]) -> dict[str, Any]:
    """Its size, its pictures, and the mean share of them that the crop cuts off."""
    shares = []
    for entry in entries:
        if entry.bucket == bucket:
            crop = central_crop(entry.width, entry.height, bucket)
            shares.append(crop.width * crop.height / (entry.width * entry.height))
    cut_off = round(1 - sum(shares) / len(shares), 4) if shares else None
    return {"width": bucket.width, "height": bucket.height, "pictures": len(shares), "cut_off": cut_off}


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
    megapixels = sum(pictures.entries[index].width * pictures.entries[index].height for index in chosen) / 1e6
    pictures_per_second, megapixels_per_second = [], []
    for alone in (True, False):
        began = time.perf_counter()
        in_threads(pictures.decode, chosen, alone=alone)
        seconds = max(time.perf_counter() - began, 1e-9)
        pictures_per_second.append(round(len(chosen) / seconds, 1))
        megapixels_per_second.append(round(megapixels / seconds, 1))

    rates = {"pictures_per_second": pictures_per_second, "megapixels_per_second": megapixels_per_second}
    return {"pictures": len(chosen), "threads": WORKERS, **rates}
