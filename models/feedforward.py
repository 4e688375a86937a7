"""Layers shared by several families: linear layers with normal initial weights, and the dense
SwiGLU feed-forward network."""

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
