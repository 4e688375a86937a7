"""A check of the reference that uses no autograd.

The slopes of its loss along random directions, by central differences, are compared with the slopes
that its gradient gives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from trainer.audit.evidence import group_of, norm_of, relative
from trainer.audit.reference import Reference

_STEPS = (1e-6, 1e-8)
"""The steps of a central difference, as shares of a direction as long as the weights.

Where a kink (ReLU) lies between the two ends, a difference is wrong by the kink's share of the
slope, however right the gradient is. Then the smaller step is taken, which has a hundredth of the
kinks between its ends. A wrong gradient is wrong at any step.
"""
SLOPE = 1e-3
"""The relative error of a central difference that may be left to kinks.

Where there are none, 1e-8 is usual. The error of rounding comes on top.
"""
_DOUBLE = 2.0**-53


@dataclass
class Slope:
    """The slope of the first micro-batch's loss along a random direction of a parameter group."""

    differences: float
    """The derivative by central differences."""
    gradient: float
    """The derivative by the reference's gradient."""
    scale: float
    """The slope along a typical random direction, |gradient| |direction| / sqrt(elements).

    Where this direction has a larger slope, it is that one.
    """
    rounding: float
    """The error from the rounding of the two losses, relative to `scale`."""

    @property
    def error(self) -> float:
        """The distance between the two derivatives, relative to `scale`."""
        return relative(abs(self.differences - self.gradient), self.scale)


class Held(TorchFunctionMode):
    """Keeps constant the tensors that an objective detaches outside of its networks.

    The first computation remembers them, and later ones get the same values again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.next = 0
        self.inside = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.detach or self.inside:
            return output
        self.next += 1
        if self.next > len(self.kept):
            self.kept.append(output.clone())
        return self.kept[self.next - 1].detach()

    @contextmanager
    def by(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Surrounds one computation of a loss over `networks`."""
        self.next = 0
        handles: list[RemovableHandle] = []
        for network in networks.values():
            handles += [
                network.register_forward_pre_hook(lambda *_: self._count(1)),
                network.register_forward_hook(lambda *_: self._count(-1)),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, change: int) -> None:
        self.inside += change


def slopes(reference: Reference, phase: str, directions: int, seed: int) -> dict[str, list[Slope]]:
    """Slopes along `directions` random directions of every group of parameters of `phase`.

    Tensors that the objective itself holds constant on purpose, by `detach` outside of the
    networks, are held constant here as well.
    """
    batch = reference.step.batches[0]
    held = Held()
    with held.by(reference.objective.networks):
        loss = abs(float(reference.loss_as_decided(phase, batch).detach()))
    _, gradients, _ = reference.gradients(phase, [batch])
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in reference.objective.networks[phase].named_parameters():
        name = f"{phase}/{path}"
        groups.setdefault(group_of(name), []).append((name, parameter))
    return {
        group: [_slope(reference, phase, members, gradients, loss, held, generator) for _ in range(directions)]
        for group, members in groups.items()
    }


def _slope(
    reference: Reference,
    phase: str,
    members: list[tuple[str, nn.Parameter]],
    gradients: Mapping[str, Tensor],
    loss: float,
    held: Held,
    generator: torch.Generator,
) -> Slope:
    """The slope of `members` along the next direction of `generator`, by the better step."""
    batch = reference.step.batches[0]
    size = sum(norm_of(parameter.detach()) ** 2 for _, parameter in members) ** 0.5 or 1.0
    elements = sum(parameter.numel() for _, parameter in members)
    away = [
        torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size / elements**0.5
        for _, parameter in members
    ]
    gradient = sum(
        float((gradients[name] * direction).sum()) for (name, _), direction in zip(members, away, strict=True)
    )
    length = sum(norm_of(gradients[name]) ** 2 for name, _ in members) ** 0.5
    scale = max(length * size / elements**0.5, abs(gradient))
    tried: list[Slope] = []
    for step in _STEPS:
        ahead = _moved(reference, phase, batch, members, away, step, held)
        behind = _moved(reference, phase, batch, members, away, -step, held)
        rounding = relative(_DOUBLE * loss / step, scale)
        tried.append(Slope((ahead - behind) / (2 * step), gradient, scale, rounding))
        if tried[-1].error <= SLOPE:
            break
    return min(tried, key=lambda slope: slope.error)


def _moved(
    reference: Reference,
    phase: str,
    batch: dict[str, Tensor],
    members: list[tuple[str, nn.Parameter]],
    away: list[Tensor],
    step: float,
    held: Held,
) -> float:
    """The loss with `members` moved by `step` times `away`; afterwards they are put back."""
    kept = [parameter.detach().clone() for _, parameter in members]
    with torch.no_grad():
        for (_, parameter), direction in zip(members, away, strict=True):
            parameter.add_(direction, alpha=step)
    with held.by(reference.objective.networks):
        loss = reference.loss_as_decided(phase, batch)
    with torch.no_grad():
        for (_, parameter), value in zip(members, kept, strict=True):
            parameter.copy_(value)
    return float(loss.detach())
