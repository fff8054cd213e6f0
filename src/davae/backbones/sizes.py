"""Sizes of images in pixels."""

from davae.errors import SettingsError

Size = int | tuple[int, int]
"""Side of a square in pixels, or width and height, in the order of "320x192" and of Pillow's sizes."""

UNBINNED = (
    "call it with use_resolution_binning=False and with height and width: its tables of sizes are the base's, by which "
    "it would make a small picture and enlarge it"
)
"""Advice for pipelines that have such tables."""


def checked_side(side: int, *, unit: int, largest: int | None = None) -> int:
    """The side itself, in pixels, if it is a multiple of `unit`, that of one token, and at most `largest`.

    Raises:
        SettingsError: it is not.
    """
    if side < unit or side % unit or (largest is not None and side > largest):
        limit = "" if largest is None else f", up to {largest}"
        raise SettingsError(f"size={side}: allowed are multiples of {unit}, downsample factor x patch size{limit}")
    return side
