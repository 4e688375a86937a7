"""Scaling laws: the loss as a function of the number of parameters N of the model.

The laws are L(N) = (N_c / N)^alpha (Kaplan et al. 2020, eq. 1.1) and, with an irreducible loss E,
L(N) = E + (N_c / N)^alpha. The fit is least squares in log L with one point per size. The scatter
about the curve stands for all that makes the law inexact, so intervals are those of Student's t
with n - 2 degrees of freedom (n - 3 with E).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """An estimated value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted scaling law."""

    alpha: Estimate
    n_c: Estimate
    """The size at which (N_c / N)^alpha is 1 nat.

    The interval has no upper end if that of `alpha` reaches zero.
    """
    irreducible: Estimate | None
    """The irreducible loss E, or None if the law has none."""
    squares: float
    """The sum of the squared residuals of log L."""
    freedom: int
    """The number of residual degrees of freedom."""
    inverse: Array
    """The matrix (J^T J)^-1.

    J has a row per size: the derivatives of log L by log N_c, alpha, and E if the law has one.
    """

    def loss(self, size: float) -> float:
        """The loss that the law gives for a model with `size` parameters."""
        return (self.irreducible.value if self.irreducible else 0.0) + math.exp(
            self.alpha.value * (math.log(self.n_c.value) - math.log(size))
        )

    def predict(self, size: float) -> Estimate:
        """The expected loss of one more model, with its prediction interval."""
        (gradient,) = _derivatives(self._theta, np.log([size]))
        spread = math.sqrt(self.squares / self.freedom * (1 + float(gradient @ self.inverse @ gradient)))
        reach = _student(self.freedom) * spread
        value = self.loss(size)
        return Estimate(value, value * math.exp(-reach), value * math.exp(reach))

    @property
    def _theta(self) -> Array:
        return np.array(
            [math.log(self.n_c.value), self.alpha.value, *([self.irreducible.value] if self.irreducible else [])]
        )


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _falling(theta: Array, x: Array) -> Array:
    """The term (N_c / N)^alpha at the log sizes `x`."""
    return np.asarray(np.exp(theta[1] * (theta[0] - x)))


def _derivatives(theta: Array, x: Array) -> Array:
    """The derivatives of log L by theta = (log N_c, alpha[, E]), with a row per log size in `x`."""
    falling = _falling(theta, x)
    loss = falling + (theta[2] if len(theta) > 2 else 0.0)
    columns = [falling * theta[1] / loss, falling * (theta[0] - x) / loss, *([1 / loss] if len(theta) > 2 else [])]
    return np.stack(columns, axis=1)


def fit_power_law(sizes: Sequence[float], losses: Sequence[float]) -> Law:
    """Fit L = (N_c / N)^alpha, a line in log L by log N, to at least three sizes.

    The interval of alpha is that of the regression's slope. The interval of N_c, where the line
    crosses log L = 0, is Fieller's (1954).
    """
    x = np.log(sizes)
    y = np.log(losses)
    n = len(x)
    mean_x = float(np.mean(x))
    mean_y = float(np.mean(y))
    spread_x = float(np.sum((x - mean_x) ** 2))
    slope = float(np.sum((x - mean_x) * (y - mean_y))) / spread_x
    squares = float(np.sum((y - mean_y - slope * (x - mean_x)) ** 2))
    reach = _student(n - 2) * math.sqrt(squares / (n - 2))
    crossing = mean_x - mean_y / slope
    theta = np.array([crossing, -slope])
    jacobian = _derivatives(theta, x)
    return Law(
        alpha=Estimate(-slope, -slope - reach / math.sqrt(spread_x), -slope + reach / math.sqrt(spread_x)),
        n_c=Estimate(_exp(crossing), *map(_exp, _fieller(mean_x, mean_y, slope, reach, spread_x, n))),
        irreducible=None,
        squares=squares,
        freedom=n - 2,
        inverse=np.asarray(np.linalg.inv(jacobian.T @ jacobian), np.float64),
    )


def _fieller(mean_x: float, mean_y: float, slope: float, reach: float, spread_x: float, n: int) -> tuple[float, float]:
    """The interval of x at which the line may be zero.

    There (mean_y + slope d)^2 <= reach^2 (1 / n + d^2 / spread_x), with d = x - mean_x.
    """
    a = slope**2 - reach**2 / spread_x
    if a <= 0:
        return -math.inf, math.inf
    half_b = mean_y * slope
    c = mean_y**2 - reach**2 / n
    root = math.sqrt(max(0.0, half_b**2 - a * c))
    return mean_x + (-half_b - root) / a, mean_x + (-half_b + root) / a


def fit_with_floor(sizes: Sequence[float], losses: Sequence[float]) -> Law:
    """Fit L = E + (N_c / N)^alpha with E >= 0 to at least four sizes.

    The intervals follow from the derivatives at the best fit.
    """
    from scipy.optimize import least_squares

    x = np.log(sizes)
    y = np.log(losses)
    least = min(losses)
    fits = []
    for share in (0.0, 0.3, 0.6, 0.9):
        start = fit_power_law(sizes, [loss - share * least for loss in losses])
        begin = [math.log(max(start.n_c.value, 1e-300)), max(start.alpha.value, 1e-3), share * least]
        bounds = ([-np.inf, 1e-6, 0.0], [np.inf, np.inf, least * (1 - 1e-9)])
        fits.append(
            least_squares(
                lambda theta: np.log(_falling(theta, x) + theta[2]) - y,
                begin,
                lambda theta: _derivatives(theta, x),
                bounds,
                x_scale="jac",
            )
        )
    theta = np.asarray(min(fits, key=lambda fit: fit.cost).x)
    squares = float(2 * min(fit.cost for fit in fits))
    freedom = len(x) - 3
    jacobian = _derivatives(theta, x)
    inverse = np.asarray(np.linalg.pinv(jacobian.T @ jacobian), np.float64)
    crossing, alpha, floor = (float(value) for value in theta)
    reaches = _student(freedom) * np.sqrt(squares / freedom * np.diag(inverse))
    return Law(
        alpha=Estimate(alpha, alpha - reaches[1], alpha + reaches[1]),
        n_c=Estimate(_exp(crossing), _exp(crossing - reaches[0]), _exp(crossing + reaches[0])),
        irreducible=Estimate(floor, max(0.0, floor - reaches[2]), floor + reaches[2]),
        squares=squares,
        freedom=freedom,
        inverse=inverse,
    )


def fit_law(sizes: Sequence[float], losses: Sequence[float]) -> tuple[Law, float | None]:
    """Fit the power law, and choose the law with E if an F test of the nested laws favours it.

    Returns the law and the p-value of the test; p is None for fewer than five sizes, which are too
    few to decide.
    """
    plain = fit_power_law(sizes, losses)
    if len(sizes) < 5:
        return plain, None
    from scipy.stats import f

    floor = fit_with_floor(sizes, losses)
    gain = max(0.0, plain.squares - floor.squares)
    p = float(f.sf(gain / (floor.squares / floor.freedom), 1, floor.freedom)) if floor.squares > 0 else float(gain == 0)
    return (floor if p < 1 - CONFIDENCE else plain), p


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
