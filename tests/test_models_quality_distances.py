"""Sample quality against scipy and direct loops."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from models.quality.distances import Moments, frechet_distance, in_sample_order, kernel_distance, manifold_overlap


def features(samples: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return torch.randn(samples, dimensions, generator=generator, dtype=torch.float64) @ mixing + 0.3 * seed


@pytest.mark.parametrize("samples", [500, 12])
def test_frechet_distance_equals_scipy(samples: int) -> None:
    # With 12 samples of 16 dimensions the covariances are singular.
    x = features(samples, 16, 0)
    y = features(samples, 16, 1)
    a = np.cov(x.numpy(), rowvar=False)
    b = np.cov(y.numpy(), rowvar=False)
    root = linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b - 2 * root)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(
        expected, rel=1e-5 if samples == 500 else 1e-3
    )


def test_frechet_distance_of_equal_and_of_shifted_sets() -> None:
    x = features(300, 8, 0)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(Moments.of(x), Moments.of(x + 2)) == pytest.approx(8 * 4)


def test_merged_moments_equal_one_pass() -> None:
    x = features(301, 16, 0)
    y = features(301, 16, 1)
    merged = Moments.of(x[200:]) + (Moments.of(x[:50]) + Moments.of(x[50:200]))
    torch.testing.assert_close(merged.covariance(), x.T.cov(), rtol=1e-12, atol=1e-12)
    assert frechet_distance(merged, Moments.of(y)) == pytest.approx(
        frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-11
    )


def test_kernel_distance_equals_a_double_loop() -> None:
    x = features(20, 5, 0)
    y = features(15, 5, 1)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (a @ b / 5 + 1).item() ** 3

    within_x = np.mean([kernel(a, b) for a, b in permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in permutations(y, 2)])
    across = np.mean([kernel(a, b) for a, b in product(x, y)])
    assert kernel_distance(x, y, chunk=7) == pytest.approx(within_x + within_y - 2 * across)


def test_kernel_distance_is_unbiased() -> None:
    torch.manual_seed(0)
    distances = torch.tensor([kernel_distance(torch.randn(30, 4), torch.randn(40, 4)) for _ in range(200)])
    assert abs(distances.mean()) < 4 * distances.std() / 200**0.5


def test_manifold_overlap_equals_brute_force() -> None:
    k = 3
    x = features(40, 3, 0).numpy()
    y = features(30, 3, 1).numpy()

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]

    real = [radius(x, i) for i in range(40)]
    fake = [radius(y, i) for i in range(30)]
    distance = np.array([[np.linalg.norm(a - b) for b in y] for a in x])
    in_real = distance <= np.array(real)[:, None]
    in_fake = distance <= np.array(fake)[None]
    overlap = manifold_overlap(torch.from_numpy(x), torch.from_numpy(y), neighbours=k, chunk=7)
    assert overlap == pytest.approx(
        (in_real.any(0).mean(), in_fake.any(1).mean(), in_real.sum(0).mean() / k, in_real.any(1).mean())
    )
    assert 0 < overlap.precision < 1
    assert 0 < overlap.recall < 1


def test_gathered_features_come_in_sample_order_once_each() -> None:
    x = torch.arange(10.0)[:, None]
    sample = torch.tensor([4, 0, 7, 1, 9, 2, 2, 5, 3, 0])
    assert in_sample_order(x[sample], sample).squeeze(1).tolist() == [0, 1, 2, 3, 4, 5, 7, 9]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 1 real and 5 generated"):
        frechet_distance(Moments.of(features(1, 3, 0)), Moments.of(features(5, 3, 0)))
    with pytest.raises(ValueError, match="there are 5 real and 9 generated"):
        manifold_overlap(features(5, 3, 0), features(9, 3, 0), neighbours=5)
