"""Moves token rows to their experts and back, by gathers in both directions, forward and backward,
where all tokens have equally many experts.

Legend: N tokens, K experts per token, A assignments (rows sorted by expert), D model width, E
experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.layers import AutogradContext


class Sorted(NamedTuple):
    """The assignments of tokens to experts, sorted by expert."""

    token_A: Tensor
    """Token of each sorted row."""
    order_A: Tensor
    """Assignment of each sorted row."""
    position_A: Tensor
    """Sorted row of each assignment: the inverse of `order_A`."""
    counts_E: Tensor
    """Rows of each expert; the rows beyond their sum belong to dropped assignments."""
    even: bool
    """Whether every token has the same number K of assignments, in turn: assignment a belongs to
    token a // K."""


def sort_by_expert(expert_A: Tensor, token_A: Tensor, experts: int, even: bool) -> Sorted:
    """Sort the assignments by expert, keeping their order within an expert. Expert number `experts`
    marks a dropped assignment."""
    order_A = expert_A.argsort(stable=True)
    position_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=expert_A.device)
    counts.scatter_add_(0, expert_A, torch.ones_like(expert_A))
    return Sorted(token_A[order_A], order_A, position_A, counts[:experts], even)


def dispatch(x_ND: Tensor, rows: Sorted) -> Tensor:
    """Copy the tokens' rows into sorted order: (N, D) -> (A, D)."""
    return gather_rows(x_ND, rows.token_A, rows.position_A) if rows.even else x_ND.index_select(0, rows.token_A)


def combine(y_AD: Tensor, gate_A: Tensor, tokens: int, rows: Sorted) -> Tensor:
    """Sum each token's sorted rows `y_AD`, weighted by `gate_A` (in the order of the assignments):
    (A, D) -> (N, D), for N = `tokens`."""
    if rows.even:
        y_ND: Tensor = _Combine.apply(y_AD, gate_A.view(tokens, -1), rows.token_A, rows.order_A, rows.position_A)
        return y_ND
    weighted_AD = y_AD * gate_A.index_select(0, rows.order_A)[:, None]
    return y_AD.new_zeros(tokens, y_AD.shape[1]).index_add(0, rows.token_A, weighted_AD)


def gather_rows(x_ND: Tensor, token_A: Tensor, position_A: Tensor) -> Tensor:
    """Return `x_ND[token_A]`, where every row is gathered equally often, to positions `position_A`
    (N K). Its gradient is a gather as well, not a scatter-add."""
    x_AD: Tensor = _Gather.apply(x_ND, token_A, position_A)
    return x_AD


class _GatherContext(AutogradContext):
    tokens: int


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, x_ND: Tensor, token_A: Tensor, position_A: Tensor) -> Tensor:
        ctx.save_for_backward(position_A)
        ctx.tokens = len(x_ND)
        return x_ND.index_select(0, token_A)

    @staticmethod
    def backward(ctx: _GatherContext, grad_AD: Tensor) -> tuple[Tensor, None, None]:
        (position_A,) = ctx.saved_tensors
        return _gather_sum(grad_AD, position_A.view(ctx.tokens, -1)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, y_AD: Tensor, gate_NK: Tensor, token_A: Tensor, order_A: Tensor, position_A: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_AD, gate_NK, token_A, order_A, position_A)
        return _gather_sum(y_AD, position_A.view_as(gate_NK), gate_NK)

    @staticmethod
    def backward(ctx: AutogradContext, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_AD, gate_NK, token_A, order_A, position_A = ctx.saved_tensors
        grad_AD = grad_ND.index_select(0, token_A)
        grad_gate_A = torch.linalg.vecdot(grad_AD, y_AD)
        grad_y_AD = grad_AD.mul_(gate_NK.flatten().index_select(0, order_A)[:, None])
        return grad_y_AD, grad_gate_A.index_select(0, position_A).view_as(gate_NK), None, None, None


def _gather_sum(rows_AD: Tensor, position_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """Return sum_k weight[n, k] rows[position[n, k]] as (N, D)."""
    tokens, k = position_NK.shape
    if tokens == 0 or k == 0:
        return rows_AD.new_zeros(tokens, rows_AD.shape[1])
    terms = (rows_AD.index_select(0, position_N) for position_N in position_NK.unbind(1))
    if weight_NK is not None:
        terms = (term_ND.mul_(weight_N[:, None]) for term_ND, weight_N in zip(terms, weight_NK.unbind(1), strict=True))
    total_ND = next(terms)
    for term_ND in terms:
        total_ND += term_ND
    return total_ND
