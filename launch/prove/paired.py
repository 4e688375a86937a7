"""Differences between variants that share their seeds.

A difference has a mean, a confidence interval over the seeds, and the verdict that these allow.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["ahead", "behind", "not decided"]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, or a ratio of two such means, with its confidence interval.

    The interval of a mean is Student's (1908): mean ± t(n - 1) s / sqrt(n). That of a ratio is
    Fieller's (1954), see `share`.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> Verdict:
        """The verdict on a difference "their loss minus ours".

        It is ahead or behind where the interval excludes zero, and not decided otherwise.
        """
        if self.low > 0:
            return "ahead"
        if self.high < 0:
            return "behind"
        return "not decided"


def lead(theirs: Sequence[float], ours: Sequence[float]) -> Difference:
    """Return how far the losses `ours` lie below `theirs`, seed by seed, for at least two seeds."""
    from scipy.stats import t

    differences = [their - our for their, our in zip(theirs, ours, strict=True)]
    n = len(differences)
    mean = statistics.fmean(differences)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - reach, mean + reach, n)


def share(parts: Sequence[float], wholes: Sequence[float]) -> Difference:
    """Return the mean of `parts` divided by that of `wholes`, with its interval (Fieller 1954).

    The interval holds every r for which Student's test does not distinguish the mean of
    parts - r * wholes, taken pair by pair, from zero. Where the test does not distinguish the mean
    of the wholes from zero either, any share is possible, and the interval is -inf to inf.
    """
    from scipy.stats import t

    n = len(parts)
    part = statistics.fmean(parts)
    whole = statistics.fmean(wholes)
    square = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) ** 2 / n
    a = whole**2 - square * statistics.variance(wholes)
    b = part * whole - square * statistics.covariance(parts, wholes)
    c = part**2 - square * statistics.variance(parts)
    if a <= 0:
        return Difference(part / whole, -math.inf, math.inf, n)
    reach = math.sqrt(max(0.0, b**2 - a * c)) / a
    return Difference(part / whole, b / a - reach, b / a + reach, n)
