"""Arguments of the stock pipelines' calls, as far as they are the same for all families of captions."""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor


def call(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    noise: Float[Tensor, "..."],
    height: int,
    width: int,
    guidance_scale: float,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Arguments of the stock pipeline's call: pictures of `height` x `width` pixels from `noise`, as it takes it.

    A family whose pipeline wants other arguments, or more, makes its own of these.
    """
    return {
        "prompt": list(prompts),
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        "latents": noise,
        "max_sequence_length": prompt_tokens,
    }
