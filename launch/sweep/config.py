"""The sweep file: a job, the keys that vary, and the rule for which trials continue."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.parsing import parse

_RESERVED = ("run.name", "run.root", "run.tracking", "cluster.address")
_EXAMPLE = "run.optimizer.lr"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class Range:
    """A range that values are drawn from."""

    low: int | float
    """The lowest value."""
    high: int | float
    """The highest value. If `low` and `high` are whole numbers, so are the drawn values."""
    log: bool = False
    """Draw uniformly in the logarithm of the value."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; with log it must be above 0")

    def at(self, share: float) -> int | float:
        """The value `share` (0 to 1) of the way from `low` to `high`.

        Values that are not whole numbers have four digits, enough to tell trials apart.
        """
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(math.floor(self._between(self.low, self.high + 1, share)), self.high)
        return float(f"{self._between(self.low, self.high, share):.4g}")

    def _between(self, low: float, high: float, share: float) -> float:
        if self.log:
            return math.exp(math.log(low) + share * math.log(high / low))
        return low + share * (high - low)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every trial trains to its last step."""

    name: Literal["grid"] = "grid"


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, algorithm 2).

    At each rung a trial continues only if it is among the best of the trials that have reached it.
    """

    name: Literal["asha"] = "asha"
    grace_steps: int
    """The step of the first rung; no trial is stopped before it.

    The other rungs are at this number times the powers of `reduction_factor`.
    """
    reduction_factor: float = 3.0
    """One trial in this many continues from a rung to the next."""

    def __post_init__(self) -> None:
        if self.grace_steps < 1:
            raise ValueError(f"grace_steps is {self.grace_steps}; it must be at least 1")
        if self.reduction_factor <= 1:
            raise ValueError(f"reduction_factor is {self.reduction_factor}; it must be above 1")


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """A scaling law L(N) = (N_c / N)^alpha (Kaplan et al. 2020, eq. 1.1).

    It is fitted to the losses of the sizes in `variants` at the end of the sweep: see
    launch/sweep/scaling_law.py.
    """

    name: Literal["scaling_law"] = "scaling_law"
    hold_out: int = 1
    """The number of largest sizes that are left out of the fit and predicted from it."""

    def __post_init__(self) -> None:
        if self.hold_out < 0:
            raise ValueError(f"hold_out is {self.hold_out}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over the keys of a job.

    Each of `variants` is combined with each combination of the lists in `over`, each of these with
    `samples` draws of the ranges in `over`, and each of those with all seeds.
    """

    job: str
    """The path of the job file, relative to the sweep file."""
    over: dict[str, Any] = field(default_factory=dict)
    """The values of each key of the job that varies, such as run.optimizer.lr.

    The values are a list, or a range {low, high, log} to draw from.
    """
    variants: tuple[dict[str, Any], ...] = ()
    """Sets of keys that change together.

    Each variant has a `name`, and the keys of the job with their values.
    """
    samples: int = 0
    """The number of draws from the ranges in `over`."""
    sample_seed: int = 0
    """The seed of the draws. If `samples` grows, the first draws stay the same."""
    seeds: int = 1
    """The number of consecutive seeds per setting, starting with the seed of the job."""
    metric: str = "eval/loss"
    """The metric in metrics.jsonl that the trials are judged by."""
    mode: Literal["min", "max"] = "min"
    """Whether lower (min) or higher (max) values of `metric` are better."""
    scheduler: Grid | Asha = Grid()
    """The rule that decides which trials train to their last step."""
    concurrent: int | None = None
    """The number of trials at a time; null runs as many as the cluster has room for."""
    fit: ScalingLaw | None = None
    """The law to fit to the results; null fits none."""

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("concurrent", self.concurrent)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._check_variants()
        self._check_keys()
        if bool(self.ranges) != (self.samples > 0):
            advice = "leave it out, or give a key in over a range {low, high}"
            if self.ranges:
                advice = "set it to the number of draws"
            raise ValueError(f"samples is {self.samples} and over has {len(self.ranges)} ranges; {advice}")
        if not self.over and not self.variants and self.seeds == 1:
            raise ValueError("over: nothing is varied; give over, variants or seeds")
        if self.fit is not None and self.over:
            problem = f"over has {', '.join(self.over)}, but only the size may differ between settings"
            raise ValueError(f"fit.scaling_law: {problem}; move the keys that set the size into variants")

    @property
    def lists(self) -> dict[str, list[Any]]:
        """The keys of `over` that take listed values."""
        return {key: values for key, values in self.over.items() if isinstance(values, list)}

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges in `over` by key."""
        drawn = {key: values for key, values in self.over.items() if not isinstance(values, list)}
        return {key: parse(Range, values, f"over.{key}") for key, values in drawn.items()}

    def _check_variants(self) -> None:
        names = [variant.get("name") for variant in self.variants]
        for name, variant in zip(names, self.variants):
            if not isinstance(name, str) or not re.fullmatch(_NAME, name):
                advice = "use letters, digits, '.', '_' and '-', with a letter or digit first"
                raise ValueError(f"variants: {variant} has the name {name!r}; {advice}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"variants: the name {twice[0]} is given twice; give each variant a name of its own")

    def _check_keys(self) -> None:
        for key, values in self.over.items():
            if not isinstance(values, list | Mapping) or not values:
                raise ValueError(f"over.{key}: got {values!r}; give a list of values, or {{low, high, log}}")
        for variant in self.variants:
            if both := sorted(variant.keys() & self.over.keys()):
                raise ValueError(f"over.{both[0]}: the variant {variant['name']} sets it as well; keep one of the two")
        keys = [*self.over, *(key for variant in self.variants for key in variant if key != "name")]
        for key in keys:
            if not key.startswith(("run.", "cluster.")):
                raise ValueError(f"over.{key}: not a key of a job; start it with run or cluster, as in {_EXAMPLE}")
            if reserved := [name for name in _RESERVED if f"{key}.".startswith(f"{name}.")]:
                problem = f"{reserved[0]} is the same for all trials, or set by the sweep"
                raise ValueError(f"over.{key}: {problem}; leave it out, or set it in the job")
        if self.seeds > 1 and "run.seed" in keys:
            raise ValueError(f"seeds is {self.seeds}, and over or variants set run.seed; keep one of the two")
