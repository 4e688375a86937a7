"""The error signal of the reference on its way, and a second witness: where layers are fully connected, backpropagation written out (models/backprop.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
    """Sum of (dL / d output)^2."""
    size: int = 0

    @property
    def norm(self) -> float:
        norm: float = self.squares**0.5
        return norm


@dataclass
class Observed:
    """What was seen of a backward pass in the reference."""

    signals: dict[str, Signal] = field(default_factory=dict)
    """Of every layer with parameters, in the order of the forward pass."""
    written_out: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the fully connected parts by the explicit recursion."""
    twice: bool = False
    """Whether gradients were differentiated again, of which the recursion knows nothing."""


@contextmanager
def observing(reference: Reference, phase: str) -> Iterator[Observed]:
    """For the block, the error signals of the network of `phase`, and the recursion beside every fully connected part of it."""
    network, seen = reference.objective.networks[phase], Observed()
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
                if gradient.requires_grad:  # a gradient penalty's own: no part of dL / d output
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
    """The fully connected parts of `network`: `Linear, f, Linear, ...` in a row where they stand so, and every other linear layer by itself."""
    found, taken = [], set()
    for path, module in network.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        index = 0
        while index < len(children):
            name, child = children[index]
            index += 1
            if not _plain_linear(child):
                continue
            row, activation = [(name, child)], None
            while (
                index + 1 < len(children)
                and type(children[index][1]) in _ACTIVATIONS
                and _plain_linear(children[index + 1][1])
            ):
                following = _ACTIVATIONS[type(children[index][1])]
                if activation not in (None, following):
                    break
                activation = following
                row.append(children[index + 1])
                index += 2
            found.append(Chain(row, activation or SIGMOID))  # type: ignore[arg-type]
            taken |= {name for name, _ in row}
    return found + [
        Chain([(path, module)], SIGMOID)
        for path, module in network.named_modules()
        if _plain_linear(module) and path not in taken
    ]


def _plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, SpectralLinear)


def _watch_chain(chain: Chain, seen: Observed, phase: str) -> list[RemovableHandle]:
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())

    def witness(module: nn.Module, args: object, output: Tensor) -> None:
        x = inputs.pop()
        if output.requires_grad:
            output.register_hook(lambda delta: _recursion(chain, x, delta, seen, phase))

    first, last = chain.layers[0][1], chain.layers[-1][1]
    return [first.register_forward_pre_hook(keep), last.register_forward_hook(witness)]


@torch.no_grad()
def _recursion(chain: Chain, x: Tensor, delta: Tensor, seen: Observed, phase: str) -> None:
    """Add the gradients that the explicit recursion makes of dL/dz of the last layer."""
    zero = x.new_zeros(())
    layers = [Layer(linear.weight, zero if linear.bias is None else linear.bias) for _, linear in chain.layers]
    trace = forward(layers, x.flatten(0, -2), chain.activation)
    for (path, linear), gradients in zip(
        chain.layers, backward(layers, trace, delta.flatten(0, -2), chain.activation), strict=True
    ):
        for leaf, value in (("weight", gradients.weight_OI), ("bias", gradients.bias_O)):
            if leaf == "weight" or linear.bias is not None:
                name = f"{phase}/{path}.{leaf}"
                seen.written_out[name] = seen.written_out.get(name, torch.zeros_like(value)) + value
