"""Layers shared by several families: linear layers with normal initial weights, and the dense
SwiGLU feed-forward network."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class AutogradContext(FunctionCtx):
    """Type of `ctx` in a `torch.autograd.Function`, whose stub leaves out the saved tensors."""

    saved_tensors: tuple[Tensor, ...]


class Linear(nn.Linear):
    """A linear layer without bias, whose initial weights are normal with standard deviation
    `std`."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.02):
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weights from torch's global generator."""
        self.weight.normal_(0, self.std)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (Shazeer 2020, "GLU variants improve transformer", equation
    6)."""

    def __init__(self, d_model: int, ffn: int, std: float = 0.02, out_std: float = 0.02):
        super().__init__()
        self.gate = Linear(d_model, ffn, std)
        self.up = Linear(d_model, ffn, std)
        self.down = Linear(ffn, d_model, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension: (..., D) -> (..., D)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    """Build linear layers through `sizes` (input first, output last) with `activation` between
    them; a single layer is purely linear."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class RMSNorm(nn.RMSNorm):
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the weight's
    dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension: (..., D) -> (..., D)."""
        x = x.to(self.weight.dtype)
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
            y: Tensor = _RMSNorm.apply(x, self.weight, self.epsilon)
            return y
        return F.rms_norm(x, self.normalized_shape, self.weight, self.epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal: Tensor = x * scale
        ctx.save_for_backward(normal, scale, weight_D)
        y: Tensor = normal * weight_D
        return y

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, scale, weight_D = ctx.saved_tensors
        product = grad * normal
        # The mean over D of the gradient times the normalised input.
        along = (product @ weight_D).div_(len(weight_D)).unsqueeze(-1)
        grad_x = torch.mul(grad, weight_D).addcmul_(normal, along, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None


def check_halvings(shape: Sequence[int], levels: int) -> None:
    """Raise `ValueError` unless images of `shape` (C, H, W) can be halved `levels` times."""
    if len(shape) != 3 or shape[1] % 2**levels or shape[2] % 2**levels:
        raise ValueError(
            f"samples of shape {tuple(shape)} cannot be halved {levels} times; "
            f"use fewer levels, or sides that are multiples of {2**levels}"
        )
