"""Differences between variants that share their seeds: mean, t interval over the seeds, and what may be said of it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["ahead", "behind", "not decided"]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, or a share of them, with its confidence interval (Student 1908: mean ± t(n - 1) s / sqrt(n))."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> Verdict:
        """Of losses, theirs less ours: ahead or behind where the interval is clear of zero."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "not decided"


def lead(theirs: Sequence[float], ours: Sequence[float]) -> Difference:
    """How far the losses `ours` lie below `theirs`, seed by seed; at least two seeds."""
    from scipy.stats import t

    differences = [their - our for their, our in zip(theirs, ours, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - reach, mean + reach, n)


def share(parts: Sequence[float], wholes: Sequence[float]) -> Difference:
    """The mean of `parts` over that of `wholes`, pair by pair, with its confidence interval (Fieller 1954): all r whose parts - r wholes have a mean that
    Student's test does not tell from zero. Where it does not tell that of the wholes from zero either, any share is possible: -inf to inf."""
    from scipy.stats import t

    n, part, whole = len(parts), statistics.fmean(parts), statistics.fmean(wholes)
    square = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) ** 2 / n
    a = whole**2 - square * statistics.variance(wholes)
    b = part * whole - square * statistics.covariance(parts, wholes)
    c = part**2 - square * statistics.variance(parts)
    if a <= 0:
        return Difference(part / whole, -math.inf, math.inf, n)
    reach = math.sqrt(max(0.0, b**2 - a * c)) / a
    return Difference(part / whole, b / a - reach, b / a + reach, n)
