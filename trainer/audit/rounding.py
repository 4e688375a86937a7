"""The deviation that a precision allows, measured by Monte Carlo arithmetic.

The method is that of Parker (1997) and of Stott Parker, Pierce & Eggert (2000). A float64
computation is repeated with the result of every operation, forward and backward, multiplied by
1 + e xi, where xi is uniform in [-1, 1] and e = u + u32 sqrt(n - 1). Here u is the unit roundoff of
the job's arithmetic. The second term is the error that a sum of n terms collects in float32 when
its roundings are independent, in whatever order they occur (Higham & Mary 2019, theorem 2.4).
A sum over whole dimensions often has terms that cancel, so its error is taken from its partial
sums in the order of memory.

The distance by which the gradients move is the distance by which they may differ in that
precision, for these weights and this batch. Where terms cancel, it is larger.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from models.moe.router import Router

FP32 = 2.0**-24
TF32 = 2.0**-11
BF16 = 2.0**-8

_EXACT = set(
    "arange cat clone constant_pad_nd copy copy_ embedding empty_like fill fill_ full full_like gather index "
    "index_select masked_fill masked_fill_ max maximum minimum neg new_empty new_empty_strided new_full new_zeros "
    "ones_like relu repeat scalar_tensor select_backward slice_backward split_with_sizes_copy threshold_backward "
    "topk tril upsample_nearest2d where zero_ zeros zeros_like _to_copy _unsafe_view".split()
)
"""Operations that copy their inputs, or that compute nothing, and so do not round."""


def drift(values: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """The size of the error in a float32 sum of `values` over `dims`, with that `shape`.

    It is u32 times the root of the sum of the squared partial sums.
    """
    summed = {dim % values.ndim for dim in dims}
    kept = [dim for dim in range(values.ndim) if dim not in summed]
    rest = [dim for dim in range(values.ndim) if dim not in kept]
    rows = values.permute(*kept, *rest).reshape(*(values.shape[dim] for dim in kept), -1)
    norms: Tensor = torch.linalg.vector_norm(rows.cumsum(-1), dim=-1)
    return FP32 * norms.view(shape)


def terms(name: str, args: Sequence[Any], results: Sequence[Tensor | None]) -> list[int]:
    """The number of terms in an element of each of the `results` of the operation `name`."""
    match name:
        case "mm" | "bmm":
            return [args[1].shape[-2]]
        case "addmm" | "baddbmm":
            return [args[2].shape[-2]]
        case "convolution":
            weight = args[1]
            transposed = args[6]
            return [weight.numel() // weight.shape[1 if transposed else 0]]
        case "convolution_backward":
            gradient, _, weight, *_, transposed = args[:8]
            return [weight.numel() // weight.shape[0 if transposed else 1], gradient.numel() // gradient.shape[1], 1]
        case "sum":
            return [1]
        case _ if name.startswith("_scaled_dot_product"):
            return [max(tensor.shape[-2] for tensor in args[:3])] * len(results)
        case _:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max((tensor.numel() for tensor in tensors if tensor.is_floating_point()), default=1)
            return [max(1, largest // max(1, result.numel())) if result is not None else 1 for result in results]


class Rounded(TorchDispatchMode):
    """A mode that gives every floating-point result a random relative error.

    The error is as large as arithmetic of `roundoff` with sums in float32 would make it.
    """

    def __init__(self, roundoff: float, seed: int):
        super().__init__()
        self.roundoff = roundoff
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        if view or name in _EXACT:
            return output
        outputs = output if isinstance(output, tuple | list) else [output]
        results = [value if isinstance(value, Tensor) else None for value in outputs]
        for value, count in zip(results, terms(name, args, results)):
            if value is not None and value.is_floating_point() and value.numel():
                reach = self.roundoff + FP32 * max(0, count - 1) ** 0.5
                value.mul_(1 + reach * self._uniform(value))
        if name == "sum" and results[0] is not None and results[0].is_floating_point() and args[0].ndim:
            dims = args[1] if len(args) > 1 and args[1] else range(args[0].ndim)
            self._add_drift(results[0], args[0], dims)
        if name == "convolution_backward" and results[2] is not None:
            self._add_drift(results[2], args[0], [dim for dim in range(args[0].ndim) if dim != 1])
        return output

    def _add_drift(self, total: Tensor, values: Tensor, dims: Sequence[int]) -> None:
        """Adds a random error as large as its drift to `total`, the sum of `values` over `dims`."""
        total.add_(drift(values, dims, total.shape) * self._uniform(total))

    def _uniform(self, like: Tensor) -> Tensor:
        """Random numbers of the shape, type and device of `like`, uniform in [-1, 1]."""
        return torch.empty(like.shape, dtype=like.dtype).uniform_(-1, 1, generator=self.generator).to(like.device)


@contextmanager
def rounded(network: nn.Module, roundoff: float, seed: int) -> Iterator[None]:
    """Runs the block in arithmetic of `roundoff`.

    Routers compute their scores in fp32 whatever the rest of `network` does, as in training.
    """
    mode = Rounded(roundoff, seed)
    handles: list[RemovableHandle] = []

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
    """The unit roundoff of the coarsest arithmetic that a job allows.

    That is bf16 under autocast, else TF32 where torch may use it, else fp32.
    """
    if bf16:
        return BF16
    tf32 = torch.backends.cuda.matmul.allow_tf32 or (torch.backends.cudnn.allow_tf32 and convolutions)
    return TF32 if device.type == "cuda" and tf32 else FP32
