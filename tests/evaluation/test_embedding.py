"""Principal components against a singular value decomposition; t-SNE by what it promises."""

import sys

import numpy as np
import pytest
import torch

from davae.errors import SettingsError
from davae.evaluation.structure import by_chance, neighbourhood_agreement, principal_components, tsne


def cloud(count: int = 60, width: int = 5) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Three groups of 40 points in 8 dimensions, far apart; and which group each is of."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 40)
    return 8 * random.normal(size=(3, 8))[labels] + random.normal(size=(120, 8)), labels


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    points = cloud()
    components = principal_components(torch.from_numpy(points), 3).numpy()

    centred = points - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for component in range(3):
        expected = left[:, component] * values[component]
        sign = np.sign(expected @ components[:, component])  # up to sign
        np.testing.assert_allclose(components[:, component], sign * expected, atol=1e-10)

    assert np.array_equal(components, principal_components(torch.from_numpy(points), 3).numpy())
    mirrored = principal_components(torch.from_numpy(-points), 3).numpy()
    np.testing.assert_allclose(np.abs(mirrored), np.abs(components))


def test_directions_that_are_not_there_give_zeros() -> None:
    components = principal_components(torch.from_numpy(cloud(width=1)))
    assert components.shape == (60, 2)
    assert (components[:, 1] == 0).all()


def test_tsne_keeps_clusters_apart() -> None:
    points, labels = clusters()
    embedding, divergence = tsne(torch.from_numpy(points))
    assert 0 < divergence < 1
    assert embedding.mean(dim=0).abs().max() < 1e-9

    distances = torch.cdist(embedding, embedding).numpy()
    same = labels[:, None] == labels
    assert distances[same].max() < distances[~same].min()
    assert np.median(distances[same & (distances > 0)]) > 0.5, "no cluster collapses to a point"


def test_tsne_keeps_neighbours() -> None:
    vectors = torch.from_numpy(cloud(120))
    embedding, _ = tsne(vectors)
    assert neighbourhood_agreement(vectors, embedding, 10) > 5 * by_chance(120, 10)


@pytest.mark.parametrize("width", [1, 8])
def test_tsne_draws_the_same_vectors_in_the_same_way(width: int) -> None:
    vectors = torch.from_numpy(clusters()[0][:, :width])
    assert torch.equal(tsne(vectors)[0], tsne(vectors)[0])


def test_without_scikit_learn_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with pytest.raises(SettingsError, match=r"needs scikit-learn.*pip install 'davae\[latents\]'"):
        tsne(torch.zeros(16, 2))
