"""Root mean square normalisation (Zhang & Sennrich 2019, equation 4), with a fast path for CPUs,
where torch makes a dozen passes over the data.

Legend: D width, ... any number of leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feedforward import AutogradContext


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
