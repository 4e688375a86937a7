"""The decisions of routing: written down where they are made, and made again as written.

Which experts a token goes to is a step function of its scores: where two of them are nearly equal, any rounding may decide. So that gradients of
different precision can be compared at all, the reference takes the workers' decisions, and says by how much it would have decided otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.moe.layer import MoELayer


class _Choices(TorchFunctionMode):
    """Sees every choice by score (`topk`, `max` over a dimension, `argsort` of floating-point numbers) while it is entered."""

    layer = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.argsort and args[0].is_floating_point():
            return self.decide(
                args[0],
                found,
                -1 if len(args) < 2 and "dim" not in (kwargs or {}) else (kwargs or {}).get("dim", *args[1:2]),
            )
        if func is torch.Tensor.topk:
            chosen = self.decide(args[0], found.indices, -1)
            return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
        if func is torch.Tensor.max and isinstance(found, torch.return_types.max):
            chosen = self.decide(args[0], found.indices.unsqueeze(-1), -1)
            return torch.return_types.max((args[0].gather(-1, chosen).squeeze(-1), chosen.squeeze(-1)))
        return found

    def decide(self, scores: Tensor, indices: Tensor, dim: int) -> Tensor:
        """The indices to take, where `scores` would choose `indices` along the last dimension `dim`."""
        raise NotImplementedError


class Recorded(_Choices):
    """Writes decisions down, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def decide(self, scores: Tensor, indices: Tensor, dim: int) -> Tensor:
        self.found.append(indices.detach().cpu().clone())
        return indices


class Replayed(_Choices):
    """Decides as written (by itself where nothing is written), and notes by how much `scores` would have it otherwise."""

    def __init__(self, written: Sequence[Tensor]):
        super().__init__()
        self.written, self.next = written, 0
        self.flips: dict[str, int] = {}
        """Rows of each layer that would have been decided otherwise."""
        self.margins: dict[str, float] = {}
        """Of those, the largest difference between the scores of the two choices, over the largest score of the row."""

    def decide(self, scores: Tensor, indices: Tensor, dim: int) -> Tensor:
        if not self.written:
            return indices
        taken = self.written[self.next].to(indices.device)
        self.next += 1
        assert taken.shape == indices.shape, "the reference took another path than the workers"
        with torch.no_grad():
            other = (taken != indices).any(-1)
            if other.any():
                difference = (scores.gather(-1, taken) - scores.gather(-1, indices)).abs().amax(-1)
                margin = float((difference / scores.abs().amax(-1).clamp_min(1e-300))[other].max())
                self.flips[self.layer] = self.flips.get(self.layer, 0) + int(other.sum())
                self.margins[self.layer] = max(self.margins.get(self.layer, 0.0), margin)
        return taken


@contextmanager
def deciding(network: nn.Module, mode: _Choices) -> Iterator[None]:
    """For the block, `mode` sees the decisions of every mixture-of-experts layer of `network`."""
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, MoELayer):

            def begin(module: nn.Module, args: object, name: str = name) -> None:
                mode.layer = name
                mode.__enter__()

            def end(module: nn.Module, args: object, output: object) -> None:
                mode.__exit__(None, None, None)

            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
