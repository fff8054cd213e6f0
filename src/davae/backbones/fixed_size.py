"""Families whose positions fit one token grid: their pictures have one size."""

from diffusers import DiffusionPipeline

from davae.errors import SettingsError
from davae.models.base_autoencoders import downsample_factor


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the only side that the pipeline has if it is None: sample size x downsample factor.

    Raises:
        SettingsError: another size.
    """
    factor = downsample_factor(pipeline.vae.config)
    side = pipeline.transformer.config.sample_size * factor
    if size not in (None, side):
        raise SettingsError(
            f"size={size}: this {type(pipeline.transformer).__name__}'s positions fit one size, so allowed is {side}"
        )
    return side
