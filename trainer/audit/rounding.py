"""What a precision allows, measured: Monte Carlo arithmetic (Parker 1997; Stott Parker, Pierce & Eggert 2000).

A float64 computation is repeated with the result of every operation, forward and backward, multiplied by 1 + e xi, where xi is uniform in [-1, 1] and
e = u + u32 sqrt(n - 1): u is the unit roundoff of the job's arithmetic, and the second term is what a sum of n terms collects in float32 when its
roundings are independent, in whatever order (Higham & Mary 2019, theorem 2.4). A sum over whole dimensions, whose terms often cancel, is off by what its
partial sums in the order of memory come to. By how much the gradients move is how much they may differ in that precision,
for these weights and this batch: where terms cancel, by more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.moe.router import Router

FP32 = 2.0**-24
TF32 = 2.0**-11
BF16 = 2.0**-8

_EXACT = set(
    "arange cat clone constant_pad_nd copy copy_ embedding empty_like fill fill_ full full_like gather index index_select masked_fill masked_fill_ max maximum "
    "minimum neg new_empty new_empty_strided new_full new_zeros ones_like relu repeat scalar_tensor select_backward slice_backward split_with_sizes_copy "
    "threshold_backward topk tril upsample_nearest2d where zero_ zeros zeros_like _to_copy _unsafe_view".split()
)
"""Operations whose results are copies of their inputs, or nothing: no rounding."""


def drift(values: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """By how much a float32 sum of `values` over `dims`, of that `shape`, drifts: u32 times the root of the sum of its squared partial sums."""
    kept = [dim for dim in range(values.ndim) if dim not in {each % values.ndim for each in dims}]
    rows = values.permute(*kept, *(dim for dim in range(values.ndim) if dim not in kept)).reshape(
        *(values.shape[dim] for dim in kept), -1
    )
    norms: Tensor = torch.linalg.vector_norm(rows.cumsum(-1), dim=-1)
    return FP32 * norms.view(shape)


def terms(name: str, args: Sequence[Any], results: Sequence[Tensor | None]) -> list[int]:
    """Of how many terms an element of each of the `results` of the operation `name` is the sum."""
    match name:
        case "mm" | "bmm":
            return [args[1].shape[-2]]
        case "addmm" | "baddbmm":
            return [args[2].shape[-2]]
        case "convolution":
            weight, transposed = args[1], args[6]
            return [weight.numel() // weight.shape[1 if transposed else 0]]
        case "convolution_backward":
            gradient, _, weight, *_, transposed = args[:8]
            return [weight.numel() // weight.shape[0 if transposed else 1], gradient.numel() // gradient.shape[1], 1]
        case "sum":
            return [1]
        case _ if name.startswith("_scaled_dot_product"):
            return [max(each.shape[-2] for each in args[:3])] * len(results)
        case _:
            largest = max(
                (each.numel() for each in tree_leaves(args) if isinstance(each, Tensor) and each.is_floating_point()),
                default=1,
            )
            return [max(1, largest // max(1, each.numel())) if each is not None else 1 for each in results]


class Rounded(TorchDispatchMode):
    """While entered, every floating-point result is off by a random relative error, as `roundoff` and float32 sums would have it."""

    def __init__(self, roundoff: float, seed: int):
        super().__init__()
        self.roundoff = roundoff
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        if view or name in _EXACT:
            return found
        results = [
            each if isinstance(each, Tensor) else None
            for each in (found if isinstance(found, tuple | list) else [found])
        ]
        for value, count in zip(results, terms(name, args, results)):
            if value is not None and value.is_floating_point() and value.numel():
                reach = self.roundoff + FP32 * max(0, count - 1) ** 0.5
                value.mul_(1 + reach * self._uniform(value))
        if name == "sum" and results[0] is not None and results[0].is_floating_point() and args[0].ndim:
            dims = args[1] if len(args) > 1 and args[1] else range(args[0].ndim)
            results[0].add_(drift(args[0], dims, results[0].shape) * self._uniform(results[0]))
        if name == "convolution_backward" and results[2] is not None:
            results[2].add_(
                drift(args[0], [dim for dim in range(args[0].ndim) if dim != 1], results[2].shape)
                * self._uniform(results[2])
            )
        return found

    def _uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1]."""
        return torch.empty(like.shape, dtype=like.dtype).uniform_(-1, 1, generator=self.generator).to(like.device)


@contextmanager
def rounded(network: nn.Module, roundoff: float, seed: int) -> Iterator[None]:
    """The block in arithmetic of `roundoff`; routers compute their scores in fp32 whatever the rest does, as they do in training."""
    mode, handles = Rounded(roundoff, seed), []

    def finer(module: nn.Module, args: object) -> None:
        mode.roundoff = min(roundoff, FP32)

    def coarser(module: nn.Module, args: object, output: object) -> None:
        mode.roundoff = roundoff

    for module in network.modules():
        if isinstance(module, Router):
            handles += [module.register_forward_pre_hook(finer), module.register_forward_hook(coarser)]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def arithmetic(bf16: bool, device: torch.device, convolutions: bool) -> float:
    """Unit roundoff of the coarsest arithmetic that a job allows: bf16 autocast, TF32 where torch may use it, or fp32."""
    if bf16:
        return BF16
    tf32 = torch.backends.cuda.matmul.allow_tf32 or (torch.backends.cudnn.allow_tf32 and convolutions)
    return TF32 if device.type == "cuda" and tf32 else FP32
