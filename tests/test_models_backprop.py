"""The written-out recursion against autograd, and against finite differences."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from models.backprop import (
    RELU,
    SIGMOID,
    SILU,
    TANH,
    Activation,
    Layer,
    backward,
    cross_entropy_delta,
    forward,
    squared_error_delta,
)

MODULES = [(SIGMOID, nn.Sigmoid), (TANH, nn.Tanh), (RELU, nn.ReLU), (SILU, nn.SiLU)]


def network(sizes: list[int]) -> list[Layer]:
    generator = torch.Generator().manual_seed(len(sizes))
    parameters = []
    for inputs, outputs in pairwise(sizes):
        parameters += [torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5]
        parameters += [torch.randn(outputs, generator=generator, dtype=torch.float64)]
    return [Layer(weight, bias) for weight, bias in zip(parameters[::2], parameters[1::2])]


@pytest.mark.parametrize(
    "sizes", [[3, 2], [5, 7, 4], [6, 9, 9, 9, 9, 9, 9, 9, 3]], ids=["1 layer", "2 layers", "8 layers"]
)
@pytest.mark.parametrize(("activation", "module"), MODULES, ids=["sigmoid", "tanh", "relu", "silu"])
def test_every_gradient_equals_autograd(activation: Activation, module: type[nn.Module], sizes: list[int]) -> None:
    layers = network(sizes)
    x = torch.randn(11, sizes[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target_M = torch.arange(11) % sizes[-1]
    modules: list[nn.Module] = []
    for layer in layers:
        linear = nn.Linear(*reversed(layer.weight_OI.shape), dtype=torch.float64)
        linear.weight.data = layer.weight_OI.clone()
        linear.bias.data = layer.bias_O.clone()
        modules += [linear, module()]
    reference = nn.Sequential(*modules[:-1])
    for delta, loss in (
        (squared_error_delta, lambda z, y: 0.5 * (z - nn.functional.one_hot(y, sizes[-1])).square().sum()),
        (cross_entropy_delta, lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum")),
    ):
        trace = forward(layers, x, activation)
        target = target_M if delta is cross_entropy_delta else nn.functional.one_hot(target_M, sizes[-1]).double()
        found = backward(layers, trace, delta(trace.z[-1], target), activation)
        z = reference(x)
        torch.testing.assert_close(trace.z[-1], z, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(loss(z, target_M), list(reference.parameters()))
        for gradients, weight, bias in zip(found, expected[::2], expected[1::2], strict=True):
            torch.testing.assert_close(gradients.weight_OI, weight, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients.bias_O, bias, rtol=1e-12, atol=1e-12)
            assert gradients.delta_MO.shape == (11, len(bias))


@pytest.mark.parametrize("activation", [SIGMOID, TANH, SILU], ids=["sigmoid", "tanh", "silu"])
def test_gradients_equal_finite_differences(activation: Activation) -> None:
    layers = network([4, 6, 5, 3])
    x = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4)
    target = torch.zeros(7, 3, dtype=torch.float64)

    def loss() -> float:
        return 0.5 * float((forward(layers, x, activation).z[-1] - target).square().sum())

    trace = forward(layers, x, activation)
    found = backward(layers, trace, squared_error_delta(trace.z[-1], target), activation)
    for layer, gradients in zip(layers, found, strict=True):
        for tensor, gradient in ((layer.weight_OI, gradients.weight_OI), (layer.bias_O, gradients.bias_O)):
            place = tuple(size // 2 for size in tensor.shape)
            value = tensor[place].item()
            losses = []
            for step in (1e-6, -1e-6):
                tensor[place] = value + step
                losses.append(loss())
            tensor[place] = value
            assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6, abs=1e-8)
