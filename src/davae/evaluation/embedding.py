"""Many numbers to two, to look at: principal components and t-SNE, both without randomness."""

import torch
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError

MOST_POINTS = 2000
"""Of t-SNE, which is exact here: time and memory grow with the square."""
EXAGGERATION, EXAGGERATED_STEPS = 12.0, 250
STEPS = 750


def principal_components(vectors: Float[Tensor, "n width"], count: int = 2) -> Float[Tensor, "n {count}"]:
    """Coordinates of centred vectors along their `count` directions of largest variance, in float64.

    The sign of a direction is free; here its largest weight is positive.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return centred @ (directions * largest.sign())


def joint_probabilities(vectors: Float[Tensor, "n width"], perplexity: float) -> Float[Tensor, "n n"]:
    """Similarities of t-SNE (van der Maaten and Hinton 2008, Eq. 1 and Sec. 3.1), symmetric, of sum 1, in float64.

    p(j|i) is a Gaussian of the distance from i, of the width at which its perplexity, exp of its entropy in nats, is
    `perplexity`; p(ij) = (p(j|i) + p(i|j)) / 2n.

    Raises:
        SettingsError: `perplexity` is not between 1 and a third of the number of other points.
    """
    count = len(vectors)
    if not 1 <= perplexity <= (count - 1) / 3:
        raise SettingsError(f"perplexity={perplexity}: of {count} points allowed are 1 to {(count - 1) / 3:.4g}")
    distances = _squared_distances(vectors.double()).fill_diagonal_(torch.inf)
    distances = distances - distances.min(dim=1, keepdim=True).values  # a factor of every p(j|i): nothing underflows
    precision = 1 / distances.where(distances.isfinite(), 0).mean(dim=1, keepdim=True).clamp_min(1e-300)
    lower, upper = torch.zeros_like(precision), torch.full_like(precision, torch.inf)
    for _ in range(100):
        too_wide = _entropy(distances, precision) > torch.tensor(perplexity).double().log()
        lower, upper = lower.where(~too_wide, precision), upper.where(too_wide, precision)
        precision = torch.where(upper.isinf(), 2 * precision, (lower + upper) / 2)
    conditional = torch.softmax(-precision * distances, dim=1)
    return (conditional + conditional.T) / (2 * count)


def tsne(vectors: Float[Tensor, "n width"], *, perplexity: float = 30.0) -> tuple[Float[Tensor, "n 2"], float]:
    """Exact t-SNE (van der Maaten and Hinton 2008) of at most `MOST_POINTS` vectors.

    Gradient descent from the first two principal components, as the method's authors and scikit-learn do it: early
    exaggeration of 12 for 250 of 750 steps, momentum 0.5 and then 0.8, a gain for each coordinate, step size n / 48 and
    at least 50.

    Returns:
        The embedding in float64, and the divergence KL(P || Q) that it was brought down to, in nats.

    Raises:
        SettingsError: too many points, or a `perplexity` that they do not allow.
    """
    if len(vectors) > MOST_POINTS:
        raise SettingsError(f"{len(vectors)} points: t-SNE takes {MOST_POINTS} at most; give fewer")
    target = joint_probabilities(vectors, perplexity)
    embedding, single = starting_embedding(vectors).float(), target.float()  # twice as fast, and lost in the steps
    update, gains = torch.zeros_like(embedding), torch.ones_like(embedding)
    step_size = max(len(vectors) / EXAGGERATION / 4, 50.0)
    for step in range(STEPS):
        early = step < EXAGGERATED_STEPS
        gradient = divergence_gradient(single * EXAGGERATION if early else single, embedding)
        gains = torch.where(update * gradient < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
        update = (0.5 if early else 0.8) * update - step_size * gains * gradient
        embedding = embedding + update
    embedding = embedding.double() - embedding.double().mean(dim=0)
    return embedding, divergence(target, embedding)


def starting_embedding(vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n 2"]:
    """Two principal components, the first of deviation 1e-4."""
    components = principal_components(vectors, 2)
    return components / components[:, 0].std() * 1e-4


def divergence(target: Float[Tensor, "n n"], embedding: Float[Tensor, "n 2"]) -> float:
    """KL(P || Q) in nats; Q is a Student t kernel of one degree of freedom (t-SNE paper, Eq. 2 and 4)."""
    kernel = _kernel(embedding)
    likelihood = (kernel / kernel.sum()).clamp_min(1e-300)
    return torch.xlogy(target, target / likelihood).sum().item()


def divergence_gradient(target: Float[Tensor, "n n"], embedding: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2) (t-SNE paper, Eq. 5), for a `target` of sum 1."""
    kernel = _kernel(embedding)
    forces = torch.addcmul(target * kernel, kernel, kernel, value=-1 / kernel.sum().item())
    return 4 * (forces.sum(dim=1, keepdim=True) * embedding - forces @ embedding)


def _kernel(embedding: Tensor) -> Tensor:
    return _squared_distances(embedding).add_(1).reciprocal_().fill_diagonal_(0.0)


def _squared_distances(vectors: Tensor) -> Tensor:
    squares = vectors.square().sum(dim=1)
    return torch.addmm(squares[:, None] + squares, vectors, vectors.T, alpha=-2).clamp_min_(0)


def _entropy(distances: Tensor, precision: Tensor) -> Tensor:
    logarithms = torch.log_softmax(-precision * distances, dim=1)
    probabilities = logarithms.exp()
    return -(probabilities * logarithms.where(probabilities > 0, 0)).sum(dim=1, keepdim=True)
