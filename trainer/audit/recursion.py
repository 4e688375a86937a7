"""The error signal of the reference on its way through the layers, and a second check of it.

Where layers are fully connected, their gradients are computed once more by backpropagation written
out (models/backprop.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.backprop import RELU, SIGMOID, SILU, TANH, Activation, Layer, backward, forward
from models.gan.spectral import SpectralLinear
from trainer.audit.reference import Reference

_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.Sigmoid: SIGMOID, nn.Tanh: TANH, nn.ReLU: RELU, nn.SiLU: SILU}


@dataclass
class Signal:
    """The error signal as it leaves one layer towards the input, over a whole backward pass."""

    squares: float = 0.0
    """The sum of (dL / d output)^2."""
    size: int = 0
    """The number of elements that were summed."""

    @property
    def norm(self) -> float:
        """The Euclidean norm of the signal."""
        norm: float = self.squares**0.5
        return norm


@dataclass
class Observed:
    """The signals and gradients that were observed in a backward pass of the reference."""

    signals: dict[str, Signal] = field(default_factory=dict)
    """The signal of every layer with parameters, in the order of the forward pass."""
    written_out: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of the fully connected parts, computed by the explicit recursion."""
    twice: bool = False
    """Whether gradients were differentiated again, which the recursion does not cover."""


@contextmanager
def observing(reference: Reference, phase: str) -> Iterator[Observed]:
    """Observes the error signals of the network of `phase` during the block.

    Beside every fully connected part of the network, the explicit recursion runs too.
    """
    network = reference.objective.networks[phase]
    seen = Observed()
    handles: list[RemovableHandle] = []
    for path, module in network.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(_note_signal(seen, path)))
    for chain in chains(network):
        handles += _watch_chain(chain, seen, phase)
    try:
        yield seen
        if seen.twice:
            seen.written_out = {}
    finally:
        for handle in handles:
            handle.remove()


def _note_signal(seen: Observed, path: str) -> Callable[[nn.Module, object, object], None]:
    def note(module: nn.Module, args: object, output: object) -> None:
        signal = seen.signals.setdefault(path, Signal())
        if isinstance(output, Tensor) and output.requires_grad:

            def add(gradient: Tensor) -> None:
                if gradient.requires_grad:
                    # This gradient belongs to a gradient penalty and is no part of dL / d output.
                    seen.twice = True
                    return
                signal.squares += float(gradient.square().sum())
                signal.size += gradient.numel()

            output.register_hook(add)

    return note


@dataclass
class Chain:
    """Linear layers with one activation between them, as models/backprop.py takes them."""

    layers: list[tuple[str, nn.Linear]]
    activation: Activation


def chains(network: nn.Module) -> list[Chain]:
    """The fully connected parts of `network`.

    Each sequence `Linear, f, Linear, ...` within a `Sequential` is one chain, and so is every other
    linear layer by itself.
    """
    rows: list[Chain] = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            rows += _rows([(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()])
    taken: set[str] = set()
    for row in rows:
        taken |= {name for name, _ in row.layers}
    return rows + [
        Chain([(path, module)], SIGMOID)
        for path, module in network.named_modules()
        if _plain_linear(module) and path not in taken
    ]


def _rows(children: list[tuple[str, nn.Module]]) -> Iterator[Chain]:
    """The chains among the `children` of one `Sequential`; a chain has one activation."""
    index = 0
    while index < len(children):
        name, child = children[index]
        index += 1
        if not _plain_linear(child):
            continue
        layers = [(name, child)]
        activation: Activation | None = None
        while index + 1 < len(children):
            following = _ACTIVATIONS.get(type(children[index][1]))
            name, child = children[index + 1]
            if following is None or not _plain_linear(child) or activation not in (None, following):
                break
            activation = following
            layers.append((name, child))
            index += 2
        yield Chain(layers, activation or SIGMOID)


def _plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and not isinstance(module, SpectralLinear)


def _watch_chain(chain: Chain, seen: Observed, phase: str) -> list[RemovableHandle]:
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())

    def witness(module: nn.Module, args: object, output: Tensor) -> None:
        x = inputs.pop()
        if output.requires_grad:
            output.register_hook(lambda delta: _recursion(chain, x, delta, seen, phase))

    first = chain.layers[0][1]
    last = chain.layers[-1][1]
    return [first.register_forward_pre_hook(keep), last.register_forward_hook(witness)]


@torch.no_grad()
def _recursion(chain: Chain, x: Tensor, delta: Tensor, seen: Observed, phase: str) -> None:
    """Adds the gradients that the recursion computes from `delta`, dL/dz of the last layer."""
    zero = x.new_zeros(())
    layers = [Layer(linear.weight, zero if linear.bias is None else linear.bias) for _, linear in chain.layers]
    trace = forward(layers, x.flatten(0, -2), chain.activation)
    by_layer = backward(layers, trace, delta.flatten(0, -2), chain.activation)
    for (path, linear), gradients in zip(chain.layers, by_layer, strict=True):
        for leaf, value in (("weight", gradients.weight_OI), ("bias", gradients.bias_O)):
            if leaf == "weight" or linear.bias is not None:
                name = f"{phase}/{path}.{leaf}"
                seen.written_out[name] = seen.written_out.get(name, torch.zeros_like(value)) + value
