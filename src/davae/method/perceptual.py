"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) in plain torch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from davae import assets
from davae.errors import CheckpointError, SettingsError
from davae.method.losses import Images
from davae.models.tiling import tile_starts

PerImage = Float[Tensor, "b"]
LPIPS_MIN_SIDE = 32
"""Pixels; below this the last stage has no position left."""


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images; frozen, and differentiable with respect to both.

    Images run through an ImageNet classifier. At five depths the feature vectors of each position are scaled to unit
    length; the distance is their squared difference, weighted per channel by a trained head, averaged over positions
    and summed over depths. Under autocast only the convolutions are not in float32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, stages: Sequence[nn.Sequential], weights: Path | None) -> None:
        """Five stages, each [B,C,h,w] -> [B,C',h',w']; without `weights` they only show what a comparison costs."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        for index, stage in enumerate(stages):
            self.register_buffer(f"head_{index}", torch.zeros(find_convolutions(stage)[-1].out_channels, 1, 1))

        # The published scaling of images in [-1, 1] to the classifiers' input.
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(3, 1, 1))
        if weights is not None:
            self._load(weights)
        self.requires_grad_(False)

    def _load(self, weights: Path) -> None:
        try:
            tensors = load_file(weights)
            for index, convolution in enumerate(find_convolutions(self)):
                convolution.load_state_dict({name: tensors[f"conv_{index}.{name}"] for name in ("weight", "bias")})
            for index in range(len(self.stages)):
                head = self.get_buffer(f"head_{index}")
                head.copy_(tensors[f"head_{index}"].view_as(head))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"no LPIPS weights can be read from {weights} for this network ({error}): write them with "
                "recipes/lpips/build_lpips.py"
            ) from error

    @classmethod
    def alex(cls) -> "LPIPS":
        """The AlexNet variant, whose weights ship with davae (all convolutions but the first at half precision)."""
        return cls(alex_stages(), assets.lpips() / "alexnet.safetensors")

    @classmethod
    def vgg(cls, path: Path | str) -> "LPIPS":
        """The VGG16 variant from a local file (29 MB) that recipes/lpips/build_lpips.py writes."""
        return cls(vgg_stages(), Path(path))

    def forward(self, image: Images, other: Images) -> PerImage:
        """The distance of each pair of images in [-1, 1], 0 for equal images, about 1 for unrelated ones."""
        height, width = image.shape[-2:]
        if min(height, width) < LPIPS_MIN_SIDE:
            raise SettingsError(
                f"LPIPS was given images of {height}x{width} px, but needs at least {LPIPS_MIN_SIDE} px a side: "
                "use larger images or crops, or set the perceptual weight to 0"
            )

        # Two passes instead of one joined batch: an image that needs no gradient then keeps no activations.
        pairs = zip(self._features(image), self._features(other), strict=True)
        distance = image.new_zeros(len(image), dtype=torch.float32)
        for index, (features, other_features) in enumerate(pairs):
            difference = (features - other_features).square() * self.get_buffer(f"head_{index}")
            distance = distance + difference.sum(1).mean((1, 2))
        return distance

    def _features(self, image: Tensor) -> list[Tensor]:
        features, hidden = [], (image.float() - self.shift) / self.scale
        for stage in self.stages:
            hidden = stage(hidden)
            vectors = hidden.float()
            # The reference adds 1e-10 to the length. Under the root, a constant also bounds the gradient of a short
            # vector; both agree to float32 precision, because measured lengths are 1 and more.
            features.append(vectors * torch.rsqrt(vectors.square().sum(1, keepdim=True) + 1e-8))
        return features


def find_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """All convolutions, in the order in which they were built."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def alex_stages() -> list[nn.Sequential]:
    """AlexNet's convolutions, without weights."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def vgg_stages() -> list[nn.Sequential]:
    """VGG16's convolutions, without weights."""
    stages: list[nn.Sequential] = []
    width = 3
    for depth, next_width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        layers: list[nn.Module] = [nn.MaxPool2d(2, 2)] if stages else []
        for _ in range(depth):
            layers += [nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU()]
            width = next_width
        stages.append(nn.Sequential(*layers))
    return stages


def patchwise_lpips(lpips: LPIPS, image: Images, other: Images, *, patch: int, stride: int) -> PerImage:
    """The mean of LPIPS over a grid of overlapping square patches, for images larger than LPIPS was made for.

    LPIPS was trained on patches of 64 px; the paper's SD3 set-up has patches of 256 px at a stride of 128. Every patch
    weighs the same, so positions under more patches weigh more.
    """
    height, width = image.shape[-2:]
    if not LPIPS_MIN_SIDE <= patch <= min(height, width) or not 1 <= stride <= patch:
        raise SettingsError(
            f"patches of {patch} px every {stride} px on images of {height}x{width} px: allowed are patches from "
            f"{LPIPS_MIN_SIDE} px up to the images' smaller side, and strides from 1 up to the patch"
        )

    # Every pair of starts is a patch of both images.
    distances = []
    for top in tile_starts(height, patch, stride):
        for left in tile_starts(width, patch, stride):
            rows, columns = slice(top, top + patch), slice(left, left + patch)
            distances.append(lpips(image[..., rows, columns], other[..., rows, columns]))
    return torch.stack(distances).mean(0)
