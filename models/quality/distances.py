"""Distances between sets of samples, computed from their features: Frechet distance, KID,
precision, recall, density, coverage.

N real and M generated samples, D features. All values are computed in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over samples from which the Frechet distance is computed. `+` merges them in any order,
    also across ranks."""

    count: Tensor
    """Number of samples, a float64 scalar."""
    sum_D: Tensor
    """Sum of the features."""
    product_DD: Tensor
    """Sum of the outer products of the features."""

    @staticmethod
    def of(features_ND: Tensor) -> "Moments":
        """Compute the sums of one batch."""
        features = features_ND.detach().double()
        return Moments(
            count=features.new_tensor(len(features)), sum_D=features.sum(0), product_DD=features.T @ features
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            count=self.count + other.count,
            sum_D=self.sum_D + other.sum_D,
            product_DD=self.product_DD + other.product_DD,
        )

    def mean(self) -> Tensor:
        """Return the mean of the features, shape (D,)."""
        return self.sum_D / self.count

    def covariance(self) -> Tensor:
        """Return the unbiased covariance of the features, shape (D, D)."""
        mean_D = self.mean()
        return (self.product_DD - self.count * torch.outer(mean_D, mean_D)) / (self.count - 1)


def _root(matrix_DD: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix whose eigenvalues are negative only by
    rounding."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    root_DD: Tensor = (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return root_DD


def frechet_distance(real: Moments, generated: Moments) -> float:
    """Return ||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al. 2017, eq. 6), which for
    Inception features is the FID.

    Raises ValueError for fewer than 2 samples.
    """
    if real.count < 2 or generated.count < 2:
        raise ValueError(
            "a Frechet distance needs at least 2 samples of both kinds, "
            f"but there are {int(real.count)} real and {int(generated.count)} generated"
        )
    root_DD = _root(real.covariance())
    # tr (C C')^(1/2) = tr (C^(1/2) C' C^(1/2))^(1/2), and that matrix is symmetric.
    values_D = torch.linalg.eigvalsh(root_DD @ generated.covariance() @ root_DD)
    cross = values_D.clamp_min(0).sqrt().sum()
    shift = (real.mean() - generated.mean()).square().sum()
    distance: float = (shift + real.covariance().trace() + generated.covariance().trace() - 2 * cross).item()
    return distance


def _kernel_sum(x_ND: Tensor, y_MD: Tensor, chunk: int) -> Tensor:
    """Sum the polynomial kernel (x y / D + 1)^3 over all pairs."""
    return torch.stack([((part @ y_MD.T) / x_ND.shape[1] + 1).pow(3).sum() for part in x_ND.split(chunk)]).sum()


def kernel_distance(real_ND: Tensor, generated_MD: Tensor, chunk: int = 4096) -> float:
    """Return the KID: the unbiased squared maximum mean discrepancy with a cubic kernel, over all
    pairs (Binkowski et al. 2018, section 4 and eq. 4).

    Raises ValueError for fewer than 2 samples.
    """
    x = real_ND.detach().double()
    y = generated_MD.detach().double()
    n = len(x)
    m = len(y)
    if n < 2 or m < 2:
        raise ValueError(
            f"a kernel distance needs at least 2 samples of both kinds, but there are {n} real and {m} generated"
        )

    def within(z: Tensor) -> Tensor:
        own = (z.square().sum(1) / z.shape[1] + 1).pow(3).sum()
        return (_kernel_sum(z, z, chunk) - own) / (len(z) * (len(z) - 1))

    return (within(x) + within(y) - 2 * _kernel_sum(x, y, chunk) / (n * m)).item()


class Manifold(NamedTuple):
    """Overlap of two sets of samples; for equal distributions every value is 1 up to sampling
    noise."""

    precision: float
    """Share of generated samples inside the balls of real ones (Kynkaanniemi et al. 2019, eq.
    2)."""
    recall: float
    """Share of real samples inside the balls of generated ones."""
    density: float
    """Number of real balls around a generated sample, divided by k (Naeem et al. 2020, eq. 5)."""
    coverage: float
    """Share of real balls with a generated sample inside (Naeem et al. 2020, eq. 6)."""


def _radii(x_ND: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Return the distance of each sample to its `neighbours`-th nearest other sample, shape
    (N,)."""
    return torch.cat([torch.cdist(part, x_ND).kthvalue(neighbours + 1, dim=1).values for part in x_ND.split(chunk)])


def manifold_overlap(real_ND: Tensor, generated_MD: Tensor, neighbours: int = 5, chunk: int = 4096) -> Manifold:
    """Return precision, recall, density and coverage, with balls that reach the k-th nearest
    neighbour.

    Raises ValueError unless both sets have more than `neighbours` samples.
    """
    x = real_ND.detach().double()
    y = generated_MD.detach().double()
    if min(len(x), len(y)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more than {neighbours} samples of both kinds, "
            f"but there are {len(x)} real and {len(y)} generated"
        )
    real_radii_N = _radii(x, neighbours, chunk)
    generated_radii_M = _radii(y, neighbours, chunk)
    inside_real_M = y.new_zeros(len(y))
    recalled = covered = 0.0
    for part, radii in zip(x.split(chunk), real_radii_N.split(chunk), strict=True):
        distances = torch.cdist(part, y)
        in_ball = distances <= radii[:, None]
        inside_real_M += in_ball.sum(0)
        covered += in_ball.any(1).sum().item()
        recalled += (distances <= generated_radii_M).any(1).sum().item()
    return Manifold(
        precision=(inside_real_M > 0).double().mean().item(),
        recall=recalled / len(x),
        density=inside_real_M.mean().item() / neighbours,
        coverage=covered / len(x),
    )


def in_sample_order(features_ND: Tensor, sample_N: Tensor) -> Tensor:
    """Sort features gathered from several ranks by sample number and drop repeated samples, so that
    every world size gives the same set."""
    order_N = torch.argsort(sample_N, stable=True)
    numbers_N = sample_N[order_N]
    first_N = torch.ones_like(numbers_N, dtype=torch.bool)
    first_N[1:] = numbers_N[1:] != numbers_N[:-1]
    return features_ND[order_N[first_N]]
