"""The decisions of routing: recorded where they are made, and replayed as recorded.

The choice of experts for a token is a step function of its scores: where two scores are nearly
equal, any rounding may decide. Gradients of different precision can only be compared if all of them
follow the same decisions. So the reference takes the workers' decisions, and reports by how much it
would have decided otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from models.moe.layer import MoELayer


class _Choices(TorchFunctionMode):
    """A mode that sees every choice by score.

    Choices are `topk`, `max` over a dimension, and `argsort` of floating-point numbers.
    """

    layer = ""
    """The mixture-of-experts layer that is computed at the moment."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        named = kwargs or {}
        output = func(*args, **named)
        if func is torch.Tensor.argsort and args[0].is_floating_point():
            dim = -1 if len(args) < 2 and "dim" not in named else named.get("dim", *args[1:2])
            return self.decide(args[0], output, dim)
        if func is torch.Tensor.topk:
            chosen = self.decide(args[0], output.indices, -1)
            return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
        if func is torch.Tensor.max and isinstance(output, torch.return_types.max):
            chosen = self.decide(args[0], output.indices.unsqueeze(-1), -1)
            return torch.return_types.max((args[0].gather(-1, chosen).squeeze(-1), chosen.squeeze(-1)))
        return output

    def decide(self, scores: Tensor, indices: Tensor, dim: int) -> Tensor:
        """The indices to take where `scores` would choose `indices` along the dimension `dim`."""
        raise NotImplementedError


class Recorded(_Choices):
    """Records decisions in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Tensor] = []

    def decide(self, scores: Tensor, indices: Tensor, dim: int) -> Tensor:
        self.decisions.append(indices.detach().cpu().clone())
        return indices


class Replayed(_Choices):
    """Decides as recorded, and notes by how much the scores would have decided otherwise.

    Where nothing is recorded, the scores decide.
    """

    def __init__(self, written: Sequence[Tensor]):
        super().__init__()
        self.written = written
        self.next = 0
        self.flips: dict[str, int] = {}
        """The number of rows of each layer that the scores would have decided otherwise."""
        self.margins: dict[str, float] = {}
        """The largest margin of such a row in each layer.

        A margin is the difference between the scores of the two choices, relative to the largest
        score of the row.
        """

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
    """Lets `mode` see the decisions of every mixture-of-experts layer of `network` in the block."""
    handles: list[RemovableHandle] = []
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
