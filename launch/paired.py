"""Differences between variants that share their seeds: mean, t interval over the seeds, and what may be said of it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its confidence interval (Student 1908: mean ± t(n - 1) s / sqrt(n))."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> Literal["ahead", "behind", "not decided"]:
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
