"""The two things that the loop binds, an objective and its engines, and the types between them.

An objective defines the loss, the metrics and the samples; it knows no optimiser, engine, rank or
tracker. An engine updates one network, and knows no objective. `trainer.objectives` and
`trainer.engines` build them.
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
"""Sums over micro-batches and ranks, by name; `Objective.report` turns them into metrics."""

GatherRows = Callable[[Tensor], Tensor]
"""Takes this rank's rows; returns the rows of all ranks, in rank order, on every rank."""


class Gather(Protocol):
    """Takes one object per rank; returns all of them, in rank order, on every rank."""

    def __call__(self, thing: _T, /) -> list[_T]: ...


@dataclass(frozen=True)
class SampleSet:
    """Samples for a person to look at."""

    text: dict[str, str] = field(default_factory=dict)
    """Texts, by name."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """Grids of images, by name: (3, H, W) in [0, 1]."""


class Stream(Protocol):
    """Endless steps: this rank's micro-batches, and the state to resume after them."""

    def __iter__(self) -> Iterator[Step]: ...
    def close(self) -> None: ...


class Objective(Protocol):
    """The loss, the metrics and the samples of a training, with its networks and data.

    `trainer.objectives.base.BaseObjective` holds the answers of an objective with one network.
    """

    seed: int
    """The run's seed, from which everything random is derived."""
    phases: tuple[str, ...]
    """Names of the networks, in update order: ("model",) for all objectives but the GAN."""
    networks: dict[str, nn.Module]
    """The networks by name, as plain modules without an engine."""
    averaged: tuple[str, ...]
    """Names of the networks that make samples; a run with `ema` keeps their moving average."""
    rates: Mapping[str, float]
    """Learning rate of each network, divided by that of the run."""
    tokens_per_sample: int
    """Tokens that one sample trains on; 0 if the data are not tokens."""
    flops_per_sample: float
    """Model FLOPs per sample in training, for model FLOPs utilisation; 0 if no formula is known."""
    group: int
    """Number of consecutive samples that must stay together: a micro-batch holds whole groups."""

    @property
    def frozen_bytes(self) -> int:
        """Bytes of frozen networks, such as a teacher: on every rank, and in no checkpoint."""

    @property
    def frozen_flops_per_sample(self) -> float:
        """FLOPs per sample of the frozen networks' forward passes in training."""

    def stream(self, share: Share, state: RunState | None) -> Stream:
        """Return this rank's part of the training data, from the start or from `state` on."""

    def held_out(self, share: Share) -> Iterable[Batch]:
        """Return this rank's part of the held-out samples.

        The set is the same for every number of ranks, and every rank gets the same number of
        batches.
        """

    def weight(self, phase: str, batch: Batch) -> Tensor:
        """Return the number of targets, or of samples, in `batch`, as a float64 on the CPU.

        The loss is divided by the sum of the weights of the global batch.
        """

    def is_due(self, phase: str, step: int) -> bool:
        """Whether the network of this phase is updated in optimiser step `step` (from 0)."""

    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        """Return this rank's micro-batches of one step, ready for `loss`.

        A loss that depends on the other samples of the global batch adds here, with `rows`, what it
        needs of them. All others return `batches` as they are.
        """

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        """Return the loss of `batch`, summed over it, and metrics.

        `net` is networks[phase] inside its engine.
        """

    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        """Return the sums of one held-out batch; `nets` are the networks inside their engines."""

    def report(self, sums: Sums) -> dict[str, float]:
        """Turn sums over all ranks, of training or of evaluation, into metrics."""

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Update the state that changes by a rule rather than a gradient, after an optimiser step.

        `sums` are this rank's metrics of the step; `add_over_ranks` sums a tensor across ranks.
        """

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        """Return metrics of how good generated samples are; empty if nothing is measured.

        Each rank makes the part that `share` gives it, and `gather` collects the others' parts.
        """

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        """Return a line for each problem that the metrics of `quality` show."""

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """Return `n` samples to look at. Called on every rank, with the same arguments."""

    def baselines(self) -> dict[str, float]:
        """Return metrics to compare the evaluation with."""

    def manifest(self) -> Mapping[str, object]:
        """Describe the data: files, sizes, tags, digests."""


class Engine(Protocol):
    """Updates one network."""

    module: nn.Module
    """The network inside the engine, which the objective's loss calls."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this rank's scalar; its mean across ranks is minimised."""

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        """Clip, update with the learning rate `lr`, and set the gradients to zero.

        Returns the global gradient norm before clipping. If that norm is not finite, or `update` is
        False (on all ranks alike), no rank changes anything but the gradients.
        """

    def fragments(self) -> list[Fragment]:
        """Return every piece of weights, moments and buffers that this rank holds.

        The pieces are views: writing to them changes the state.
        """

    def refresh(self) -> None:
        """Bring the network up to date after its fragments were written to."""
