"""Sizes of pictures, for families that make many."""

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline

from davae.errors import SettingsError

UNBINNED = (
    "call it with use_resolution_binning=False and with height and width: its tables of sizes are the base's, by which "
    "it would make a small picture and enlarge it"
)
"""Advice for families whose pipelines have such tables."""

Size = int | tuple[int, int]
"""Side of a square in pixels, or width and height, in the order of "320x192" and of Pillow's sizes."""


def width_and_height(
    pipeline: DiffusionPipeline, size: Size | None, *, picture_side: Callable[[Any, int | None], int]
) -> tuple[int, int]:
    """`size` in pixels, or the pipeline's default square if it is None; `picture_side` is the family's.

    Raises:
        SettingsError: as `picture_side`, of either side.
    """
    if isinstance(size, tuple):
        width, height = size
        return picture_side(pipeline, width), picture_side(pipeline, height)
    side = picture_side(pipeline, size)
    return side, side


def side_of(
    pipeline: DiffusionPipeline,
    size: int | None,
    *,
    kinds: tuple[type[DiffusionPipeline], ...],
    default: int,
    unit: int,
    largest: int | None = None,
) -> int:
    """`size` in pixels, or `default` if it is None.

    Args:
        pipeline: whose picture it is.
        size: side in pixels.
        kinds: the pipelines of this family that davae trains and samples from.
        default: side in pixels of the stock pipeline, or what that should be.
        unit: side in pixels of one token: downsample factor x patch.
        largest: side in pixels; None if nothing limits it.

    Raises:
        SettingsError: a pipeline of another class, or a size that it cannot make.
    """
    if not isinstance(pipeline, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise SettingsError(
            f"a {type(pipeline).__name__} was given; allowed is {allowed}: davae upgrades others of the family, "
            "too, but neither trains them nor samples from them yet"
        )
    return checked_side(default if size is None else size, unit=unit, largest=largest)


def checked_side(side: int, *, unit: int, largest: int | None = None) -> int:
    """The side itself, in pixels, if a picture can have it: `unit` and `largest` as in `side_of`.

    Raises:
        SettingsError: it cannot.
    """
    if side < unit or side % unit or (largest is not None and side > largest):
        raise SettingsError(
            f"size={side}: allowed are multiples of {unit}, downsample factor x patch size"
            + ("" if largest is None else f", up to {largest}")
        )
    return side
