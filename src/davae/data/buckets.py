"""Aspect-ratio buckets: the few sizes that pictures are brought to, so that those of a batch have the same."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from davae.errors import SettingsError

MAX_ASPECT_RATIO = 8.0


class Bucket(NamedTuple):
    """Height and width of pictures in pixels, and the aspect ratio that they stand for."""

    height: int
    width: int
    # Width over height before the sides are rounded.
    aspect_ratio: float = 1.0


class Crop(NamedTuple):
    """The part of an upright picture that is used, in its own pixels."""

    top: int
    left: int
    height: int
    width: int


def bucket_table(sizes: Sequence[int], aspect_ratios: Sequence[str] = (), *, multiple: int = 1) -> tuple[Bucket, ...]:
    """The buckets of some sizes and aspect ratios: an area of about size^2, both sides multiples of `multiple`.

    Aspect ratios are width:height, such as "3:2"; without any there are squares only. `multiple` is the downsample
    factor times the patch side of the model.
    """
    ratios = list(map(_read_ratio, aspect_ratios or ("1:1",)))
    buckets = set()
    for size in sizes:
        if size % multiple or size < multiple:
            raise SettingsError(f"size={size}: allowed are multiples of {multiple}, the step of the buckets")
        for ratio in ratios:
            # Same area, this ratio, sides rounded to multiples.
            height = max(multiple, round(size / math.sqrt(ratio) / multiple) * multiple)
            width = max(multiple, round(size * math.sqrt(ratio) / multiple) * multiple)
            buckets.add(Bucket(height, width, ratio))
    return tuple(sorted(buckets))


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket | None:
    """The bucket of a picture, or None if it fills none without being scaled up.

    Among the buckets that it fills this is the nearest by the logarithm of the aspect ratio, then the largest.
    """
    fitting = [bucket for bucket in buckets if bucket.width <= width and bucket.height <= height]
    ratio = math.log(width / height)
    return min(
        fitting,
        key=lambda bucket: (abs(math.log(bucket.aspect_ratio) - ratio), -bucket.height * bucket.width),
        default=None,
    )


def central_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """The largest part of the bucket's shape, in the middle of a picture."""
    if width * bucket.height >= height * bucket.width:
        crop_height, crop_width = height, max(bucket.width, height * bucket.width // bucket.height)
    else:
        crop_height, crop_width = max(bucket.height, width * bucket.height // bucket.width), width
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def fit(picture: UInt8[Tensor, "3 height width"], bucket: Bucket) -> UInt8[Tensor, "3 h w"]:
    """The central crop, scaled down to the bucket by Pillow's antialiased bicubic filter on 8 bits."""
    height, width = picture.shape[1:]
    if height < bucket.height or width < bucket.width:
        size = f"{bucket.width}x{bucket.height}"
        raise SettingsError(f"a picture of {width}x{height} pixels is not scaled up to {size}; take a smaller size")

    crop = central_crop(width, height, bucket)
    part = picture[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if part.shape[1:] == bucket[:2]:
        return part.contiguous()
    image = Image.fromarray(part.permute(1, 2, 0).contiguous().numpy())
    scaled = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()


def _read_ratio(text: str) -> float:
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height or not 1 / MAX_ASPECT_RATIO <= width / height <= MAX_ASPECT_RATIO:
        most = f"{MAX_ASPECT_RATIO:.0f}"
        raise SettingsError(f'aspect ratio "{text}": allowed is width:height, from "1:{most}" to "{most}:1"')
    return width / height
