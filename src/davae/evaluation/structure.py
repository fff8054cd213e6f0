"""How alike base and detail latents are: neighbours, correlations, spectra, and maps to two dimensions. In float64."""

from importlib.util import find_spec

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from davae.errors import SettingsError
from davae.method.losses import channel_group_mean

PERPLEXITY = 30.0


def neighbourhood_agreement(
    one: Float[Tensor, "n a"], other: Float[Tensor, "n b"], neighbours: int = 10
) -> Float[Tensor, ""]:
    """The mean share of each vector's nearest others in `one` that are among its nearest in `other`.

    Distances are Euclidean. Two unrelated sets have the agreement `by_chance`.
    """
    # Of n points each has n - 1 others, and with all but one of them agreement means nothing.
    count = len(one)
    if not 1 <= neighbours < count - 1:
        raise SettingsError(f"neighbours={neighbours}: of {count} points allowed are 1 to {count - 2}")
    common = _find_nearest(one.double(), neighbours) & _find_nearest(other.double(), neighbours)
    return common.sum().double() / (count * neighbours)


def by_chance(count: int, neighbours: int) -> float:
    """The neighbourhood agreement that `count` vectors in a random order are expected to have: k / (n - 1)."""
    return neighbours / (count - 1)


def _find_nearest(vectors: Tensor, neighbours: int) -> Bool[Tensor, "n n"]:
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    # No vector is its own neighbour.
    distances.fill_diagonal_(torch.inf)
    nearest = torch.zeros_like(distances, dtype=torch.bool)
    return nearest.scatter_(1, distances.topk(neighbours, largest=False).indices, True)


def channel_correlation(
    base: Float[Tensor, "n base h w"], detail: Float[Tensor, "n detail h w"]
) -> Float[Tensor, "base detail"]:
    """Pearson's correlation of every base channel with every detail channel over images and positions."""
    channels = torch.cat([at_positions(base), at_positions(detail)], dim=1).double().T
    return torch.corrcoef(channels)[: base.shape[1], base.shape[1] :]


def group_mean_correlation(base: Float[Tensor, "n base h w"], detail: Float[Tensor, "n detail h w"]) -> float:
    """The mean correlation of a base channel with the mean of its group of detail channels.

    Raises:
        SettingsError: D is no multiple of C.
    """
    return channel_correlation(base, channel_group_mean(detail, base.shape[1])).diagonal().mean().item()


def at_positions(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "p c"]:
    """One vector for each position of each image, row by row."""
    return rearrange(latents, "n c h w -> (n h w) c")


def radial_spectrum(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "k"]:
    """Power of latents by spatial frequency: k = 1 .. min(h, w) / 2 cycles across them.

    |FFT2|^2 / (h w), averaged over images, channels, and the frequencies whose length rounds to k. White noise of
    unit variance has 1 at every k. There is no window: the jump at the borders adds to every k.
    """
    height, width = latents.shape[-2:]
    power = (torch.fft.fft2(latents.double()).abs().square() / (height * width)).mean(dim=(0, 1))

    # The ring of frequencies that each coefficient is in.
    vertical = torch.fft.fftfreq(height, d=1 / height, dtype=torch.float64)
    horizontal = torch.fft.fftfreq(width, d=1 / width, dtype=torch.float64)
    ring = torch.hypot(vertical[:, None], horizontal).round().long()
    return torch.stack([power[ring == k].mean() for k in range(1, min(height, width) // 2 + 1)])


def principal_components(vectors: Float[Tensor, "n width"], count: int = 2) -> Float[Tensor, "n {count}"]:
    """Coordinates of centred vectors along their `count` directions of largest variance.

    The sign of a direction is free; here its largest weight is positive. Directions that `vectors` lack give zeros.
    """
    # Eigenvectors of the covariance; `eigh` sorts its eigenvalues upwards.
    centred = vectors.double() - vectors.double().mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))

    components = centred @ (directions * largest.sign())
    return torch.nn.functional.pad(components, (0, count - components.shape[1]))


def tsne(vectors: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n 2"], float]:
    """scikit-learn's t-SNE (van der Maaten and Hinton 2008), from the first two principal components.

    Returns:
        The embedding, and the divergence KL(P || Q) that it reached, in nats.

    Raises:
        SettingsError: the extra `davae[latents]` is not installed.
    """
    check_tsne_is_installed()
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # The start of the method's authors: principal components, the first with a deviation of 1e-4.
    components = principal_components(vectors)
    start = components / components[:, 0].std() * 1e-4
    method = TSNE(perplexity=min(PERPLEXITY, (len(vectors) - 1) / 3), init=start.numpy(), random_state=0)

    # With one thread its sums have one order, and the same vectors the same picture.
    with threadpool_limits(1, user_api="openmp"):
        embedding = torch.from_numpy(method.fit_transform(vectors.double().numpy())).double()
    return embedding - embedding.mean(dim=0), float(method.kl_divergence_)


def check_tsne_is_installed() -> None:
    """Refuse to begin what `tsne` could not finish."""
    if find_spec("sklearn") is None:
        raise SettingsError("t-SNE needs scikit-learn, which is not installed: run pip install 'davae[latents]'")
