"""Stacked SwiGLU experts (Shazeer 2020, "GLU variants improve transformer", equation 6): y = W_down
(silu(W_gate x) * W_up x).

Legend: N rows (token copies, sorted by expert), D model width, F expert width, E experts held here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from models.init import stable_hash
from models.layers import AutogradContext


class Experts(nn.Module):
    """`num_experts` experts of width `ffn`: all experts, or a slice of `total` that starts at
    `first_expert`.

    `gate_up` is (E, 2F, D), gate first, and `down` is (E, D, F), as in Hugging Face's layout.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        ffn: int,
        first_expert: int = 0,
        total: int | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.d_model = d_model
        self.ffn = ffn
        self.first_expert = first_expert
        self.total = num_experts if total is None else total
        assert first_expert + num_experts <= self.total, (first_expert, num_experts, self.total)
        self.std = std
        self.out_std = out_std
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * ffn, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, ffn))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill each expert from one draw of the global generator and its global number, so that a
        slice gets the same weights as the whole."""
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        if self.gate_up.is_meta:
            return
        for expert, (gate_up_FD, down_DF) in enumerate(zip(self.gate_up, self.down, strict=True), self.first_expert):
            generator = torch.Generator(self.gate_up.device).manual_seed(stable_hash(seed, expert))
            gate_up_FD.normal_(0, self.std, generator=generator)
            down_DF.normal_(0, self.out_std, generator=generator)

    def part(self, first_expert: int, num_experts: int) -> "Experts":
        """Return a new module with copies of the `num_experts` experts from global number
        `first_expert` on."""
        with torch.device("meta"):
            part = Experts(num_experts, self.d_model, self.ffn, first_expert, self.total, self.std, self.out_std)
        local = slice(first_expert - self.first_expert, first_expert - self.first_expert + num_experts)
        part.gate_up = nn.Parameter(self.gate_up.detach()[local].clone())
        part.down = nn.Parameter(self.down.detach()[local].clone())
        return part

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert e to `counts_E[e]` rows of `x_ND`, which is sorted by expert (int64, same
        device): (N, D) -> (N, D).

        Rows beyond `counts_E.sum()` are padding: their output is zero and no gradient flows through
        them.
        """
        autocast = torch.is_autocast_enabled(x_ND.device.type)
        dtype = torch.get_autocast_dtype(x_ND.device.type) if autocast else self.gate_up.dtype
        x_ND = x_ND.to(dtype)
        gate_up = self.gate_up.to(dtype)
        down = self.down.to(dtype)
        if _grouped_kernel(x_ND, gate_up):
            return grouped_experts(x_ND, counts_E, gate_up, down)
        return looped_experts(x_ND, counts_E, gate_up, down)


def _grouped_kernel(x_ND: Tensor, gate_up: Tensor) -> bool:
    """Whether one grouped kernel can serve all experts: on CUDA, for rows that it can load in
    strides of 16 bytes."""
    aligned = all(size * x_ND.element_size() % 16 == 0 for size in (gate_up.shape[-1], gate_up.shape[-2] // 2))
    return x_ND.is_cuda and x_ND.dtype in (torch.bfloat16, torch.float16, torch.float32) and aligned


def grouped_experts(x_ND: Tensor, counts_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply all experts in two grouped matrix products, without the host knowing the counts."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    # The kernel writes nothing to padding rows, forward or backward; masking both ends keeps stale
    # memory out.
    padding_N1 = (torch.arange(len(x_ND), device=x_ND.device) >= ends_E[-1])[:, None]
    x_ND = x_ND.masked_fill(padding_N1, 0)
    gate_NF, up_NF = F.grouped_mm(x_ND, gate_up.transpose(-2, -1), offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, down.transpose(-2, -1), offs=ends_E).masked_fill(padding_N1, 0)


@_disable_dynamo  # torch.compiler.disable would import the compiler: a second per start
def looped_experts(x_ND: Tensor, counts_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply one expert after the other, in any dtype. Faster on a CPU, because an expert's
    activations stay in cache."""
    y_ND: Tensor = _Loop.apply(x_ND, gate_up, down, counts_E.tolist())
    return y_ND


class _LoopContext(AutogradContext):
    counts: list[int]


class _Loop(torch.autograd.Function):
    """The experts one after the other, forward and backward, in place. Buffers stay small and are
    reused: on a CPU, touching fresh memory costs more than the arithmetic."""

    @staticmethod
    def forward(ctx: _LoopContext, x_ND: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        y_ND = torch.empty_like(x_ND)
        saved = []
        h_NF = x_ND.new_empty(max(counts), down.shape[2])
        x_parts = x_ND[: sum(counts)].split(counts)
        y_parts = y_ND[: sum(counts)].split(counts)
        for x, y, w_gate_up, w_down in zip(x_parts, y_parts, gate_up.unbind(), down.unbind(), strict=True):
            hidden = x @ w_gate_up.T
            gate, up = hidden.chunk(2, dim=-1)
            h = torch.ops.aten.silu.out(gate, out=h_NF[: len(x)]).mul_(up)
            torch.mm(h, w_down.T, out=y)
            saved.append(hidden)
        y_ND[sum(counts) :] = 0
        ctx.save_for_backward(x_ND, gate_up, down, *saved)
        ctx.counts = counts
        return y_ND

    @staticmethod
    def backward(ctx: _LoopContext, grad_y_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, gate_up, down, *saved = ctx.saved_tensors
        counts = ctx.counts
        ffn = down.shape[2]
        grad_x_ND = torch.empty_like(x_ND)
        grad_gate_up = torch.empty_like(gate_up)
        grad_down = torch.empty_like(down)
        h_NF, grad_h_NF, grad_N2F = (x_ND.new_empty(max(counts), width) for width in (ffn, ffn, 2 * ffn))
        rows = [rows_ND[: sum(counts)].split(counts) for rows_ND in (x_ND, grad_x_ND, grad_y_ND)]
        for expert, (hidden, x, grad_x, grad_y) in enumerate(zip(saved, *rows, strict=True)):
            h, grad_h, grad_hidden = (buffer[: len(x)] for buffer in (h_NF, grad_h_NF, grad_N2F))
            _swiglu_backward(torch.mm(grad_y, down[expert], out=grad_h), hidden, h, grad_hidden)
            torch.mm(grad_y.T, h, out=grad_down[expert])
            torch.mm(grad_hidden.T, x, out=grad_gate_up[expert])
            torch.mm(grad_hidden, gate_up[expert], out=grad_x)
        grad_x_ND[sum(counts) :] = 0
        return grad_x_ND, grad_gate_up, grad_down, None


def _swiglu_backward(grad_h: Tensor, hidden: Tensor, h: Tensor, grad: Tensor) -> None:
    """For h = silu(gate) * up with both in `hidden` (n, 2F), write h again (n, F), and the gradient
    of `hidden` to `grad`. Overwrites `grad_h`."""
    gate, up = hidden.chunk(2, dim=-1)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=h)
    torch.mul(grad_h, h, out=grad_up)
    h.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_h.mul_(up), gate, grad_input=grad_gate)
