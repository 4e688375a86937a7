"""Batch normalisation over fixed groups of consecutive samples, so that it does not depend on ranks
or micro-batches.

In training each group of `group` consecutive samples is normalised by its own statistics, which are
added up in `pending`. Once per optimiser step, `fold_batch_statistics(network, reduce)` moves the
running statistics towards the mean over the whole global batch.

M samples, C channels, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GroupedBatchNorm(nn.Module):
    """Normalise (M, C, ...) -> the same shape, without gain and bias (Ioffe & Szegedy 2015,
    algorithm 1)."""

    running_mean: Tensor
    running_var: Tensor
    pending: Tensor

    def __init__(self, channels: int, group: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        """`group` is the number of consecutive samples that share statistics."""
        super().__init__()
        self.group = group
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("pending", torch.zeros(2 * channels + 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            shape = (1, -1, *[1] * (x.ndim - 2))
            return (x - self.running_mean.view(shape)) * torch.rsqrt(self.running_var + self.eps).view(shape)
        if x.shape[0] % self.group:
            raise ValueError(
                f"a batch of {x.shape[0]} samples does not divide into batch-norm groups of {self.group}; "
                "make the micro-batch a multiple of it"
            )
        grouped = x.unflatten(0, (-1, self.group))
        across = [1, *range(3, grouped.ndim)]
        # At least fp32, whatever the activations: means in bf16 lose three digits.
        var, mean = torch.var_mean(
            grouped.to(torch.promote_types(grouped.dtype, torch.float32)), dim=across, correction=0, keepdim=True
        )
        self._add_to_pending(mean.detach(), var.detach())
        y: Tensor = ((grouped - mean) * torch.rsqrt(var + self.eps)).to(x.dtype).flatten(0, 1)
        return y

    def _add_to_pending(self, mean: Tensor, var: Tensor) -> None:
        """Add up the groups' statistics for the next `fold`."""
        channels = len(self.running_mean)
        sums = torch.cat(
            [mean.reshape(-1, channels).sum(0), var.reshape(-1, channels).sum(0), mean.new_tensor([mean.shape[0]])]
        )
        self.pending = self.pending + sums.to(self.pending)

    @torch.no_grad()
    def fold(self, pending: Tensor) -> None:
        """Move the running statistics towards the means in `pending`, which is summed over all
        ranks."""
        channels = len(self.running_mean)
        mean, var = (pending[:-1] / pending[-1].clamp_min(1)).split(channels)
        share = self.momentum * (pending[-1] > 0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
        self.pending = torch.zeros_like(self.pending)


class ScaledBatchNorm(GroupedBatchNorm):
    """Grouped batch norm with a learned gain and bias per channel."""

    def __init__(self, channels: int, group: int) -> None:
        super().__init__(channels, group)
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return super().forward(x) * self.weight.view(shape) + self.bias.view(shape)


class ConditionalBatchNorm(nn.Module):
    """Grouped batch norm whose gain and bias are linear in a condition (M, D) (Brock et al. 2019,
    appendix B)."""

    def __init__(
        self, channels: int, condition: int, group: int, make_linear: Callable[[int, int], nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.norm = GroupedBatchNorm(channels, group)
        self.gain = make_linear(condition, channels)
        self.bias = make_linear(condition, channels)

    def forward(self, x: Tensor, condition_MD: Tensor) -> Tensor:
        shape = (len(x), -1, *[1] * (x.ndim - 2))
        y: Tensor = self.norm(x) * (1 + self.gain(condition_MD).view(shape)) + self.bias(condition_MD).view(shape)
        return y


def fold_batch_statistics(network: nn.Module, reduce: Callable[[Tensor], Tensor] = lambda pending: pending) -> None:
    """Update the running statistics of `network`; call it once per optimiser step. `reduce` sums a
    tensor over ranks, in one call for the whole network."""
    norms = [module for module in network.modules() if isinstance(module, GroupedBatchNorm)]
    if not norms:
        return
    sums = reduce(torch.cat([norm.pending for norm in norms]))
    for norm, pending in zip(norms, sums.split([len(norm.pending) for norm in norms]), strict=True):
        norm.fold(pending)
