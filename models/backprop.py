"""Backpropagation written out, for a fully connected network of any depth (Rumelhart, Hinton &
Williams 1986, "Learning representations by back-propagating errors", equations 4 to 7; the notation
is Nielsen's, "Neural networks and deep learning", chapter 2).

    forward    a_0 = x,    z_l = W_l a_(l-1) + b_l,    a_l = f(z_l)    (linear at last: a_L = z_L)
    backward   delta_L = dL / dz_L,    delta_l = (W_(l+1)^T delta_(l+1)) * f'(z_l)
               dL / dW_l = delta_l a_(l-1)^T,    dL / db_l = delta_l    (summed over samples)

Nothing here uses autograd, so it checks autograd independently: `trainer/audit` runs it. The deltas
of the losses are checked by tests, not used in training.

Legend: M samples, I inputs of a layer, O outputs of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An elementwise function of z, and its derivative."""

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


SIGMOID = Activation(torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z)))
TANH = Activation(torch.tanh, lambda z: 1 - torch.tanh(z).square())
RELU = Activation(lambda z: z.clamp_min(0), lambda z: (z > 0).to(z.dtype))
SILU = Activation(lambda z: z * torch.sigmoid(z), lambda z: torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z))))


@dataclass(frozen=True)
class Layer:
    """Weight (O, I) and bias (O,) of a fully connected layer."""

    weight_OI: Tensor
    bias_O: Tensor


@dataclass(frozen=True)
class Trace:
    """Record of a forward pass: z of every layer, and every layer's input (a_0 = x first)."""

    z: list[Tensor]
    inputs: list[Tensor]


@dataclass(frozen=True)
class Gradients:
    """Gradients of one layer: dL/dz (M, O), dL/dW (O, I) and dL/db (O,)."""

    delta_MO: Tensor
    weight_OI: Tensor
    bias_O: Tensor


def forward(layers: Sequence[Layer], x_MI: Tensor, activation: Activation) -> Trace:
    """Run the forward pass on `x_MI`, recording every z and every layer's input; the network's
    output is the last z."""
    z = []
    inputs = []
    a = x_MI
    for layer in layers:
        inputs.append(a)
        z.append(a @ layer.weight_OI.T + layer.bias_O)
        a = activation.f(z[-1])
    return Trace(z, inputs)


def backward(layers: Sequence[Layer], trace: Trace, delta_MO: Tensor, activation: Activation) -> list[Gradients]:
    """Compute the gradients of every layer, first layer first, from `delta_MO` = dL/dz of the last
    layer, by the recursion above."""
    last = Gradients(delta_MO, delta_MO.T @ trace.inputs[-1], delta_MO.sum(0))
    if len(layers) == 1:
        return [last]
    below = (delta_MO @ layers[-1].weight_OI) * activation.slope(trace.z[-2])
    return [*backward(layers[:-1], Trace(trace.z[:-1], trace.inputs[:-1]), below, activation), last]


def squared_error_delta(z_MO: Tensor, target_MO: Tensor) -> Tensor:
    """Return dL/dz (M, O) of L = 1/2 sum (z - target)^2 (Rumelhart et al., equation 3)."""
    return z_MO - target_MO


def cross_entropy_delta(z_MO: Tensor, target_M: Tensor) -> Tensor:
    """Return dL/dz (M, O) of L = sum of -log softmax(z)[target]: softmax minus the one-hot target
    (Bishop 2006, equation 4.109)."""
    return z_MO.softmax(1) - torch.nn.functional.one_hot(target_M, z_MO.shape[1]).to(z_MO.dtype)
