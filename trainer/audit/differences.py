"""A witness of the reference that uses no autograd: central differences of its loss along random directions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.audit.evidence import group_of, norm_of, relative
from trainer.audit.reference import Reference

_STEPS = (1e-6, 1e-8)
"""Of a direction as long as the weights. Where a kink (ReLU) lies between the two ends, a difference is wrong by the kink's share of the slope, however
right the gradient is: then the smaller step is taken, with a hundredth of the kinks between its ends. A wrong gradient is wrong at any step."""
SLOPE = 1e-3
"""Relative error of a central difference that may be left to kinks; where there are none, 1e-8 is usual. Rounding comes on top."""
_DOUBLE = 2.0**-53


@dataclass
class Slope:
    """The derivative of the first micro-batch's loss along one random direction of a group of parameters."""

    differences: float
    """By central differences."""
    gradient: float
    """By the reference's gradient."""
    scale: float
    """What a random direction would give, |gradient| |direction| / sqrt(elements), or this one where it gives more."""
    rounding: float
    """Of the two losses, over `scale`."""

    @property
    def error(self) -> float:
        """Relative to `scale`."""
        return relative(abs(self.differences - self.gradient), self.scale)


class Held(TorchFunctionMode):
    """Remembers what an objective detaches outside of its networks in a first computation, and gives it again in later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.next, self.inside = 0, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.detach or self.inside:
            return found
        self.next += 1
        if self.next > len(self.kept):
            self.kept.append(found.clone())
        return self.kept[self.next - 1].detach()

    @contextmanager
    def by(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """One computation of a loss over `networks`."""
        self.next, handles = 0, []
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
    """Central differences against the reference's gradient, along `directions` random directions of every group of parameters of `phase`.

    What the objective itself holds constant on purpose (`detach` outside of the networks) is held constant here as well.
    """
    batch, held = reference.step.batches[0], Held()
    with held.by(reference.objective.networks):
        loss = abs(float(reference.loss_as_decided(phase, batch).detach()))
    _, gradients, _ = reference.gradients(phase, [batch])
    network, generator = reference.objective.networks[phase], torch.Generator().manual_seed(seed)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in network.named_parameters():
        groups.setdefault(group_of(f"{phase}/{path}"), []).append((f"{phase}/{path}", parameter))
    found: dict[str, list[Slope]] = {}
    for group, members in groups.items():
        found[group] = []
        for _ in range(directions):
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
            tried = []
            for step in _STEPS:
                ahead, behind = (_moved(reference, phase, batch, members, away, end, held) for end in (step, -step))
                tried.append(
                    Slope((ahead - behind) / (2 * step), gradient, scale, relative(_DOUBLE * loss / step, scale))
                )
                if tried[-1].error <= SLOPE:
                    break
            found[group].append(min(tried, key=lambda each: each.error))
    return found


def _moved(
    reference: Reference,
    phase: str,
    batch: dict[str, Tensor],
    members: list[tuple[str, nn.Parameter]],
    away: list[Tensor],
    step: float,
    held: Held,
) -> float:
    """The loss with `members` moved by `step` times `away`; they are put back."""
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
