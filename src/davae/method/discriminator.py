"""The PatchGAN of pix2pix (Isola et al. 2017, arXiv 1611.07004) at VQGAN's settings (arXiv 2012.09841), for stage 1."""

import math
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

DISCRIMINATOR_MIN_SIDE = 24
"""Pixels; below this no position of the logits map is left."""


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, whose gradient goes back to each of them."""

    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over all ranks' parts of a batch, which have one size; torch's SyncBatchNorm runs on GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None

        # Mean and variance of all ranks' parts.
        wide, ranks = input.float(), dist.get_world_size()
        mean = _SumOverRanks.apply(wide.mean(dim=(0, 2, 3))) / ranks
        centred = wide - mean[:, None, None]
        variance = _SumOverRanks.apply(centred.square().mean(dim=(0, 2, 3))) / ranks

        # Running statistics, with the unbiased variance, as torch keeps them.
        with torch.no_grad():
            count, momentum = ranks * wide.numel() // wide.shape[1], self.momentum or 0.1
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
            self.num_batches_tracked += 1

        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class PatchDiscriminator(nn.Module):
    """Images -> a map of logits, one for each overlapping patch of 70 px: above 0 looks real, below 0 looks made.

    Give a real and a made batch separately, as in the reference: each is then normalised with its own statistics. The
    layers are called `main.0` to `main.11`, as in the reference's checkpoints (`loss.discriminator.main.*`).
    """

    def __init__(self, generator: torch.Generator, *, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for depth, stride in enumerate((2, 2, 1)):
            channels = width * 2**depth
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1, bias=False),
                _GlobalBatchNorm2d(2 * channels),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

        # pix2pix's start, from one generator in the order of the layers; biases as torch starts them.
        for layer in self.main:
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02, generator=generator)
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02, generator=generator)
                if layer.bias is not None:
                    bound = 1 / math.sqrt(layer.weight[0].numel())
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 rows columns"]:
        """Logits of images in [-1, 1], 24 px or more on each side; h // 8 - 2 rows and w // 8 - 2 columns."""
        return self.main(image)
