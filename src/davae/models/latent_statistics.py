"""Scales of AutoencoderDA's latents: the two scalars of stock pipelines, and statistics of each channel."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.models.offloading import weights_in_place


class LatentStatistics:
    """The part of AutoencoderDA that knows three scales of latents.

    Networks and losses work *inside*, before standardisation. `encode` and `decode` work *outside*: stock pipelines
    turn their latents into *units*, at which the transformer works, with two scalars.
    """

    config: Any
    bn: Any
    detail_mean: Tensor
    detail_std: Tensor

    def to_units(self, latents: Tensor) -> Tensor:
        """(latents - shift_factor) * scaling_factor: from the autoencoder's scale to the transformer's."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def from_units(self, latents: Tensor) -> Tensor:
        """Latents / scaling_factor + shift_factor: the inverse of `to_units`."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents of `encode` -> units, as stock pipelines do it."""
        if self.bn is None:
            return self.to_units(latents)
        with weights_in_place(self.bn):
            mean, variance = _per_channel(self.bn.running_mean).clone(), _per_channel(self.bn.running_var).clone()
        return F.pixel_shuffle((F.pixel_unshuffle(latents, 2) - mean) / (variance + self.bn.eps).sqrt(), 2)

    def _to_outside(self, base: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Base latents and moments of the detail latents, inside -> outside."""
        outside, statistics = self.from_units(base), self._base_affine(base)
        if statistics is not None:
            outside = (outside - statistics[0]) / statistics[1] + self.config.shift_factor

        # Twice the logarithm, because a variance scales with the square.
        shift, scale = self._detail_affine(mean)
        log_variance = log_variance - 2 * (scale * self.config.scaling_factor).log()
        return outside, self.from_units((mean - shift) / scale), log_variance

    def _to_inside(self, base: Tensor, detail: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `_to_outside`, for latents."""
        statistics = self._base_affine(base)
        if statistics is not None:
            base = (base - self.config.shift_factor) * statistics[1] + statistics[0]
        shift, scale = self._detail_affine(detail)
        return self.to_units(base), self.to_units(detail) * scale + shift

    def _detail_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Copies at the latents, because group offloading has buffers in place for `forward`, or here, alone.
        with weights_in_place(self):
            mean, std = self.detail_mean.to(like, copy=True), self.detail_std.to(like, copy=True)
        return _per_channel(mean), _per_channel(std)

    def _base_affine(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """The base's own mean and deviation of each channel; None where it has none."""
        mean, std = self.config.base_config.get("latents_mean"), self.config.base_config.get("latents_std")
        if std is None or not self.config.base_channels:
            return None
        return _per_channel(like.new_tensor(mean)), _per_channel(like.new_tensor(std))


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def measure_channels(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over batches of latents [B, D, h, w], in float64."""
    # Sums of all positions, so that the batches do not matter.
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in batches:
        latents = batch.double().cpu()
        count += latents[:, 0].numel()
        total = total + latents.sum(dim=(0, 2, 3))
        squares = squares + latents.square().sum(dim=(0, 2, 3))
    if count == 0:
        raise ValueError("calibrate() was given no images; it needs some hundred of the training set.")

    # A channel that says nothing cannot be brought to unit scale.
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    useless = (~(deviation > 1e-6)).nonzero().flatten().tolist()  # NaN compares false
    if useless:
        raise ValueError(f"detail channels {useless} do not vary, or are not finite: train the detail encoder.")
    return mean, deviation
