"""A sweep file: which job, what is varied in it, and who decides which trials go on."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.parsing import parse

_OURS = ("run.name", "run.root", "run.tracking", "cluster.address")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values between two ends."""

    low: int | float
    """The least value."""
    high: int | float
    """The greatest; where both are whole numbers, so is what is drawn."""
    log: bool = False
    """Draw evenly over the orders of magnitude."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; with log it must be above 0")

    def at(self, share: float) -> int | float:
        """The value `share` (0 to 1) of the way from `low` to `high`; of other than whole numbers four digits, which is enough to tell trials apart."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)
        value = math.exp(math.log(low) + share * math.log(high / low)) if self.log else low + share * (high - low)
        return min(math.floor(value), int(self.high)) if whole else float(f"{value:.4g}")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every trial does all its steps."""

    name: Literal["grid"] = "grid"


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, algorithm 2): at each rung a trial goes on only if it is among the best of those that came so far."""

    name: Literal["asha"] = "asha"
    grace_steps: int
    """The first rung: no trial is stopped before so many steps. The others are at this times the powers of `reduction_factor`."""
    reduction_factor: float = 3.0
    """One in so many goes on from a rung to the next."""

    def __post_init__(self) -> None:
        if self.grace_steps < 1:
            raise ValueError(f"grace_steps is {self.grace_steps}; it must be at least 1")
        if self.reduction_factor <= 1:
            raise ValueError(f"reduction_factor is {self.reduction_factor}; it must be above 1")


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """At the end L(N) = (N_c / N)^alpha (Kaplan et al. 2020, eq. 1.1) is fitted to the losses of the sizes in `variants`: see launch/sweep/scaling_law.py."""

    name: Literal["scaling_law"] = "scaling_law"
    hold_out: int = 1
    """The largest sizes, so many, take no part in the fit, and are predicted from it."""

    def __post_init__(self) -> None:
        if self.hold_out < 0:
            raise ValueError(f"hold_out is {self.hold_out}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One sweep: each of `variants` with each combination of the lists in `over`, each of these with `samples` draws of its ranges, and each with all seeds."""

    job: str
    """The job file, relative to this one."""
    over: dict[str, Any] = field(default_factory=dict)
    """Key of the job, such as run.optimizer.lr -> its values: a list, or {low, high, log} to draw from."""
    variants: tuple[dict[str, Any], ...] = ()
    """Keys that change together: a name and the keys of the job with their values, for each variant."""
    samples: int = 0
    """Draws of the ranges in `over`."""
    sample_seed: int = 0
    """Decides the draws; with more samples the first ones stay."""
    seeds: int = 1
    """How many, from the job's own on."""
    metric: str = "eval/loss"
    """The figure in metrics.jsonl that trials are judged by."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    scheduler: Grid | Asha = Grid()
    """Who goes on to the end."""
    concurrent: int | None = None
    """Trials at a time; null: as many as there is room for."""
    fit: ScalingLaw | None = None
    """What is fitted to the results."""

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("concurrent", self.concurrent)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._check_variants()
        self._check_keys()
        if bool(self.ranges) != (self.samples > 0):
            fix = (
                "set it to the number of draws"
                if self.ranges
                else "leave it out, or give a key in over a range {low, high}"
            )
            raise ValueError(f"samples is {self.samples} and over has {len(self.ranges)} ranges; {fix}")
        if not self.over and not self.variants and self.seeds == 1:
            raise ValueError("over: nothing is varied; give over, variants or seeds")
        if self.fit is not None and self.over:
            raise ValueError(
                f"fit.scaling_law: over is {', '.join(self.over)}, but the sizes are what differs; put all that differs into variants"
            )

    @property
    def lists(self) -> dict[str, list[Any]]:
        """The keys of `over` that take listed values."""
        return {key: values for key, values in self.over.items() if isinstance(values, list)}

    @property
    def ranges(self) -> dict[str, Range]:
        """Those that are drawn."""
        return {
            key: parse(Range, values, f"over.{key}")
            for key, values in self.over.items()
            if not isinstance(values, list)
        }

    def _check_variants(self) -> None:
        names = [variant.get("name") for variant in self.variants]
        for name, variant in zip(names, self.variants):
            if not isinstance(name, str) or not re.fullmatch(_NAME, name):
                raise ValueError(
                    f"variants: {variant} has the name {name!r}; use letters, digits, '.', '_' and '-', with a letter or digit first"
                )
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"variants: the name {twice[0]} is given twice; a variant's name is its own")

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
                raise ValueError(
                    f"over.{key}: no key of a job; they begin with run or cluster, such as run.optimizer.lr"
                )
            if ours := [each for each in _OURS if f"{key}.".startswith(f"{each}.")]:
                raise ValueError(
                    f"over.{key}: {ours[0]} is the same for all trials, or set by the sweep; leave it out, or set it in the job"
                )
        if self.seeds > 1 and "run.seed" in keys:
            raise ValueError(f"seeds is {self.seeds}, and over or variants set run.seed; keep one of the two")
