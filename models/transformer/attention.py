"""Grouped-query attention with rotary positions (Su et al. 2021, in the half-split layout of Llama
and Qwen) and optional QK norm.

Legend: B samples, T positions, S positions seen (T, or more with a cache), D model width, H query
heads, J key-value heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import AutogradContext, Linear, RMSNorm


class KVCache:
    """Keys and values (B, J, S, C) of the positions seen so far, for generation."""

    def __init__(self) -> None:
        self.keys_values: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self.keys_values is None else self.keys_values[0].shape[2]

    def extend(self, k_BJTC: Tensor, v_BJTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, J, T, C); return those of all positions so far, (B, J, S,
        C)."""
        if self.keys_values is not None:
            k_BJTC, v_BJTC = (torch.cat(pair, dim=2) for pair in zip(self.keys_values, (k_BJTC, v_BJTC), strict=True))
        self.keys_values = (k_BJTC, v_BJTC)
        return self.keys_values


class Attention(nn.Module):
    """Softmax attention. One matrix holds the query, key and value projections, in this order."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        qk_norm: bool,
        norm_eps: float,
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.qkv = Linear(d_model, (heads + 2 * kv_heads) * head_dim, std)
        self.out = Linear(heads * head_dim, d_model, out_std)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        rotary_T1C: tuple[Tensor, Tensor],
        mask_BTT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from each position of `x_BTD`: (B, T, D) -> (B, T, D).

        `mask_BTT` is true where a position (row) may see another (column), causality included.
        Without it a position sees all, or all up to itself if `causal`.
        """
        qkv_BTHC = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHC, k_BTJC, v_BTJC = qkv_BTHC.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC = self.q_norm(q_BTHC).to(v_BTJC.dtype)
            k_BTJC = self.k_norm(k_BTJC).to(v_BTJC.dtype)
        q_BTHC = rotate(q_BTHC, rotary_T1C)
        k_BTJC = rotate(k_BTJC, rotary_T1C)
        q_BHTC, k_BJTC, v_BJTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTJC, v_BTJC))
        if cache is not None:
            k_BJTC, v_BJTC = cache.extend(k_BJTC, v_BJTC)
        causal = self.causal and mask_BTT is None and x_BTD.shape[1] > 1
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC,
            k_BJTC,
            v_BJTC,
            attn_mask=None if mask_BTT is None else mask_BTT[:, None],
            is_causal=causal,
            enable_gqa=self.kv_heads != self.heads,
        )
        y_BTD: Tensor = self.out(y_BHTC.transpose(1, 2).flatten(2))
        return y_BTD


def rotary_table(start: int, end: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Build the float32 tables (T, 1, C) of cosines and sines for positions `start` to `end` - 1.

    Angles are position * theta^(-2 i / C) (Su et al. 2021, section 3.2.2). Cosines are repeated for
    both halves; sines are negative in the first half.
    """
    frequency_C = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_TC = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * frequency_C
    cos_TC = angle_TC.cos()
    sin_TC = angle_TC.sin()
    return torch.cat((cos_TC, cos_TC), dim=-1)[:, None], torch.cat((-sin_TC, sin_TC), dim=-1)[:, None]


def rotate(x_BTHC: Tensor, rotary_T1C: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + C/2}) by the angle of its position: (B, T, H, C) -> the same
    shape."""
    cos_T1C, sin_T1C = (table.to(x_BTHC.dtype) for table in rotary_T1C)
    rotated_BTHC: Tensor = _Rotate.apply(x_BTHC, cos_T1C, sin_T1C)
    return rotated_BTHC


class _Rotate(torch.autograd.Function):
    """The rotation, with the opposite rotation as its gradient. Autograd's own path through halves
    and their concatenation costs more than twice as much."""

    @staticmethod
    def forward(ctx: AutogradContext, x_BTHC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1C, sin_T1C)
        return _rotated(x_BTHC, cos_T1C, sin_T1C, 1)

    @staticmethod
    def backward(ctx: AutogradContext, grad_BTHC: Tensor) -> tuple[Tensor, None, None]:
        cos_T1C, sin_T1C = ctx.saved_tensors
        return _rotated(grad_BTHC, cos_T1C, sin_T1C, -1), None, None


def _rotated(x_BTHC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor, sign: int) -> Tensor:
    """Return x cos + (x with its halves exchanged) sin * sign."""
    half = x_BTHC.shape[-1] // 2
    y_BTHC = x_BTHC * cos_T1C
    y_BTHC[..., :half].addcmul_(x_BTHC[..., half:], sin_T1C[..., :half], value=sign)
    y_BTHC[..., half:].addcmul_(x_BTHC[..., :half], sin_T1C[..., half:], value=sign)
    return y_BTHC
