"""Many numbers to two, to look at: principal components and t-SNE, both without randomness."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError

PERPLEXITY = 30.0


def principal_components(vectors: Float[Tensor, "n width"], count: int = 2) -> Float[Tensor, "n {count}"]:
    """Coordinates of centred vectors along their `count` directions of largest variance, in float64.

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
        The embedding in float64, and the divergence KL(P || Q) that it reached, in nats.

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
    """Refuse to begin what `tsne` could not finish.

    Raises:
        SettingsError: the extra `davae[latents]` is not installed.
    """
    if find_spec("sklearn") is None:
        raise SettingsError("t-SNE needs scikit-learn, which is not installed: run pip install 'davae[latents]'")
