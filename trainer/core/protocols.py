"""What the loop asks of an objective and of an engine, and the types that pass between them.

An objective says what is minimised, measured and looked at; it knows no optimiser, engine, rank or tracker.
An engine updates one network, and knows no objective. `trainer.objectives` and `trainer.engines` build them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from data.batches import Step
from data.share import Batch, RunState, Share
from trainer.checkpoint.fragments import Fragment

_T = TypeVar("_T")

Sums = dict[str, Tensor]
"""Metrics as sums that add up over micro-batches and ranks; `Objective.report` makes figures of them."""

GatherRows = Callable[[Tensor], Tensor]
"""The rows of this rank's tensor -> those of all ranks, one rank behind the other, on each of them."""


class Gather(Protocol):
    """The things that all ranks pass in, as a list in the order of the ranks, returned on each of them."""

    def __call__(self, thing: _T, /) -> list[_T]: ...


@dataclass(frozen=True)
class SampleSet:
    """What a person looks at."""

    text: dict[str, str] = field(default_factory=dict)
    """Texts by name."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """Grids by name: (3, H, W) in [0, 1]."""


class Stream(Protocol):
    """Steps without end; each holds this rank's micro-batches, and the state to resume after it."""

    def __iter__(self) -> Iterator[Step]: ...
    def close(self) -> None: ...


class Objective(Protocol):
    """What is minimised, measured and looked at."""

    seed: int
    """The run's: decides whatever is random."""
    phases: tuple[str, ...]
    """Networks in update order: ("model",) for all but the GAN."""
    networks: dict[str, nn.Module]
    """Plain modules."""
    averaged: tuple[str, ...]
    """Networks whose moving average is kept, where the run has one: those that samples are made with."""
    rates: Mapping[str, float]
    """Learning rate of each network, over that of the run."""
    tokens_per_sample: int
    """Tokens that one sample trains on; 0 where there are none."""
    flops_per_sample: float
    """Model FLOPs of one sample in training, for model FLOPs utilisation; 0 where no formula is stated."""
    group: int
    """Consecutive samples that must stay together: a micro-batch holds whole groups."""

    @property
    def frozen_bytes(self) -> int:
        """Bytes of networks that are only read, a teacher's: whole on every rank, and in no checkpoint."""

    @property
    def frozen_flops_per_sample(self) -> float:
        """FLOPs of their forward passes over one sample in training."""

    def stream(self, share: Share, state: RunState | None) -> Stream:
        """This rank's part of the training data, from the start or from where `state` left it."""

    def held_out(self, share: Share) -> Iterable[Batch]:
        """This rank's part of the held-out samples: the same set for every world, as many batches on every rank."""

    def weight(self, phase: str, batch: Batch) -> Tensor:
        """What the loss of `batch` is divided by, once summed over the global batch: targets, samples. On the CPU, float64."""

    def is_due(self, phase: str, step: int) -> bool:
        """Whether this network is updated in the optimiser step number `step` (from 0)."""

    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        """This rank's micro-batches of one step, each with what its loss needs to know of all the others: `batches` as they are, where that is nothing."""

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        """The summed loss of `batch` through `net`, which is networks[phase] inside its engine, and metrics."""

    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        """Measures of one held-out batch."""

    def report(self, sums: Sums) -> dict[str, float]:
        """Figures from sums over all ranks, of training or of evaluation."""

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Whatever changes by a rule and not by a gradient, once after each optimiser step; `sums` are this rank's of the step."""

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        """Figures of how good samples are, from this rank's part of them and what `gather` brings of the others; empty where nothing is measured."""

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        """What these figures say is going wrong, a line each."""

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """`n` samples to look at. Called on every rank alike."""

    def baselines(self) -> dict[str, float]:
        """Figures to read the evaluation against."""

    def manifest(self) -> Mapping[str, object]:
        """What data this is: files, sizes, tags, digests."""


class Engine(Protocol):
    """How one network is updated."""

    module: nn.Module
    """What the objective's loss calls."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar of this rank, whose mean over the ranks is minimised)."""

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        """Clip, update at the learning rate `lr`, set the gradients to zero; returns the global gradient norm before clipping.

        Nothing but the gradients changes, on any rank, unless `update` (the same on all ranks), or where that norm is not finite.
        """

    def fragments(self) -> list[Fragment]:
        """Every piece of weights, moments and buffers that this rank holds, as views: writing to them changes the state."""

    def refresh(self) -> None:
        """Bring the network up to date after the fragments were written to."""
