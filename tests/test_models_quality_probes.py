"""Measures of features against scikit-learn, SciPy and by hand; views of images."""

import math

import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from models.contrastive.augment import AugmentConfig, augment
from models.quality.probes import alignment, knn_accuracy, recall_at, uniformity
from models.random import sample_keys


def test_nearest_neighbours_vote_as_in_scikit_learn() -> None:
    digits = load_digits()
    x = normalize(torch.from_numpy(digits.data).float() + 1, dim=1)
    y = torch.from_numpy(digits.target).long()

    def weights(distance):  # of unit vectors: squared distance = 2 - 2 cosine
        import numpy as np

        return np.exp((1 - distance**2 / 2) / 0.07)

    theirs = KNeighborsClassifier(9, weights=weights).fit(x[:800], y[:800]).score(x[800:], y[800:])
    assert knn_accuracy(x[:800], y[:800], x[800:], y[800:], 9, chunk=100) == pytest.approx(theirs, abs=2 / 997)


def test_alignment_uniformity_and_recall() -> None:
    z = normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    assert uniformity(z, chunk=7) == pytest.approx(
        math.log((torch.from_numpy(pdist(z.double()) ** 2) * -2).exp().mean().item()), abs=1e-5
    )
    assert alignment(z, z.roll(1, 0)) == pytest.approx((z - z.roll(1, 0)).square().sum(1).mean().item())
    assert alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])) == pytest.approx(2.0)
    known = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    asked = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    meaning = torch.tensor([5, 6, 7])
    assert recall_at(asked, known, torch.tensor([6, 7]), meaning, 1) == 0.5
    assert recall_at(asked, known, torch.tensor([6, 7]), meaning, 2) == 1.0


def test_views_depend_on_the_key_alone() -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keys = sample_keys(0, torch.arange(6), "view")
    config = AugmentConfig(rotate=20, flip=True, noise=0.1)
    whole = augment(config, x, keys)
    torch.testing.assert_close(torch.cat([augment(config, x[:2], keys[:2]), augment(config, x[2:], keys[2:])]), whole)
    assert (whole - augment(config, x, keys + 1)).abs().amax((1, 2, 3)).min() > 0.1


def test_views_that_change_nothing_and_that_mirror() -> None:
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keys = sample_keys(0, torch.arange(64), "view")
    still = {"crop": (1.0, 1.0), "ratio": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    torch.testing.assert_close(augment(AugmentConfig(**still, grey=0.0), x, keys), x, atol=1e-5, rtol=0)
    mirrored = augment(AugmentConfig(**still, grey=0.0, flip=True), x, keys)
    as_they_were = (mirrored - x).abs().amax((1, 2, 3)) < 1e-4
    assert 15 < as_they_were.sum() < 49
    torch.testing.assert_close(mirrored[~as_they_were], x.flip(3)[~as_they_were], atol=1e-5, rtol=0)
    grey = augment(AugmentConfig(**still, grey=1.0), x, keys)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    cut = augment(AugmentConfig(**still | {"crop": (0.25, 0.25)}, grey=0.0), x, keys)
    assert all(
        part.min() >= image.min() - 1e-5 and part.max() <= image.max() + 1e-5
        for part, image in zip(cut, x, strict=True)
    )
