"""Principal components and t-SNE against independent calculations in numpy, float64."""

import math

import numpy as np
import pytest
import torch

from davae.errors import SettingsError
from davae.evaluation.embedding import (
    divergence,
    divergence_gradient,
    joint_probabilities,
    principal_components,
    starting_embedding,
    tsne,
)


def cloud(count: int = 60, width: int = 5, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Three groups of 40 points in 8 dimensions, far apart; and which group each is of."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 40)
    return 8 * random.normal(size=(3, 8))[labels] + random.normal(size=(120, 8)), labels


def student_divergence(target: np.ndarray, embedding: np.ndarray) -> float:
    """KL(P || Q), van der Maaten and Hinton 2008, Eq. 2 and 4, pair by pair."""
    count = len(embedding)
    kernel = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                kernel[i, j] = 1 / (1 + ((embedding[i] - embedding[j]) ** 2).sum())
    likelihood = kernel / kernel.sum()
    return sum(
        target[i, j] * math.log(target[i, j] / likelihood[i, j])
        for i in range(count)
        for j in range(count)
        if i != j and target[i, j] > 0
    )


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    points = cloud()
    found = principal_components(torch.from_numpy(points), 3).numpy()
    centred = points - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for component in range(3):
        expected = left[:, component] * values[component]
        sign = np.sign(expected @ found[:, component])  # up to sign
        np.testing.assert_allclose(found[:, component], sign * expected, atol=1e-10)
    assert np.array_equal(found, principal_components(torch.from_numpy(points), 3).numpy())
    np.testing.assert_allclose(np.abs(principal_components(torch.from_numpy(-points), 3).numpy()), np.abs(found))


@pytest.mark.parametrize("perplexity", [2.0, 12.5])
def test_every_point_has_the_perplexity_asked_for(perplexity: float) -> None:
    points, count = cloud(), 60
    points[:20] *= 50  # widths differ from point to point
    found = joint_probabilities(torch.from_numpy(points), perplexity).numpy()
    # The widths by a search of our own, in numpy: p(j|i) of Eq. 1, 2^H = exp(H in nats) = perplexity.
    conditional = np.zeros((count, count))
    for i in range(count):
        squared = ((points - points[i]) ** 2).sum(axis=1)

        def probabilities(log_width: float, squared: np.ndarray = squared, i: int = i) -> np.ndarray:
            exponents = -squared / (2 * math.exp(2 * log_width))
            exponents[i] = -np.inf
            weights = np.exp(exponents - exponents.max())
            return weights / weights.sum()

        low, high = -20.0, 20.0
        for _ in range(200):
            middle = (low + high) / 2
            row = probabilities(middle)
            entropy = -sum(p * math.log(p) for p in row if p > 0)
            low, high = (middle, high) if math.exp(entropy) < perplexity else (low, middle)
        conditional[i] = probabilities((low + high) / 2)
    np.testing.assert_allclose(found, (conditional + conditional.T) / (2 * count), atol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_the_divergence_and_its_gradient_are_those_of_the_paper() -> None:
    target = joint_probabilities(torch.from_numpy(cloud(20)), 4.0)
    embedding = torch.from_numpy(np.random.default_rng(2).normal(size=(20, 2)))
    value = student_divergence(target.numpy(), embedding.numpy())
    assert divergence(target, embedding) == pytest.approx(value, rel=1e-12)
    gradient = divergence_gradient(target, embedding).numpy()
    for point, axis in ((0, 0), (7, 1), (19, 0)):
        ends = []
        for side in (1e-6, -1e-6):
            moved = embedding.numpy().copy()
            moved[point, axis] += side
            ends.append(student_divergence(target.numpy(), moved))
        assert gradient[point, axis] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_tsne_brings_the_divergence_down_and_keeps_clusters_apart() -> None:
    points, labels = clusters()
    vectors = torch.from_numpy(points)
    embedding, reached = tsne(vectors, perplexity=15.0)
    target = joint_probabilities(vectors, 15.0)
    assert reached == pytest.approx(divergence(target, embedding), rel=1e-9)
    assert reached < 0.5 * divergence(target, starting_embedding(vectors))
    assert abs(embedding.mean().item()) < 1e-9
    distances = torch.cdist(embedding, embedding).numpy()
    same = labels[:, None] == labels
    assert distances[same].max() < distances[~same].min()
    # In the plane, a point's nearest others are those of its own cloud; within it, no collapse.
    assert np.median(distances[same & (distances > 0)]) > 0.5
    again, _ = tsne(vectors, perplexity=15.0)
    assert torch.equal(again, embedding)


def test_refusals() -> None:
    with pytest.raises(SettingsError, match=r"perplexity=30.0: of 60 points allowed are 1 to 19.67"):
        tsne(torch.from_numpy(cloud()))
    with pytest.raises(SettingsError, match="2001 points: t-SNE takes 2000 at most"):
        tsne(torch.zeros(2001, 2))
