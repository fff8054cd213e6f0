"""Transformers that predict noise, and beside it, on as many channels again, its variance."""

from jaxtyping import Float
from torch import Tensor


def split_variance(
    output: Float[Tensor, "b outputs h w"], channels: int
) -> tuple[Float[Tensor, "b latent h w"], Float[Tensor, "b latent h w"] | None]:
    """Noise [B, channels, h, w], and the variance if there are twice the channels; None if it is not learned."""
    noise, variance = output[:, :channels], output[:, channels:]
    return noise, (variance if variance.shape[1] else None)
