"""Grouped-query attention with rotary positions (Su et al. 2021, in the half-split layout of Llama and Qwen) and optional QK norm.

Legend: B samples, T positions, S positions seen (T, or more with a cache), D model width, H query heads, J key-value heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feedforward import Linear


class KVCache:
    """Keys and values (B, J, S, C) of the positions seen so far, for generation."""

    def __init__(self) -> None:
        self.keys_values: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self.keys_values is None else self.keys_values[0].shape[2]

    def extend(self, k_BJTC: Tensor, v_BJTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return all."""
        if self.keys_values is not None:
            k_BJTC, v_BJTC = (torch.cat(pair, dim=2) for pair in zip(self.keys_values, (k_BJTC, v_BJTC), strict=True))
        self.keys_values = (k_BJTC, v_BJTC)
        return self.keys_values


class Attention(nn.Module):
    """Softmax attention; query, key and value projections lie in one matrix, in this order."""

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, causal: bool, qk_norm: bool, norm_eps: float, std: float = 0.02, out_std: float = 0.02
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.causal = heads, kv_heads, head_dim, causal
        self.qkv = Linear(d_model, (heads + 2 * kv_heads) * head_dim, std)
        self.out = Linear(heads * head_dim, d_model, out_std)
        self.q_norm = nn.RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(self, x_BTD: Tensor, rotary_TC: tuple[Tensor, Tensor], mask_BTT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """`mask_BTT` is true where a position (row) may see another (column), causality included; None: all, or all up to itself."""
        heads = self.heads + self.kv_heads
        qkv_BTHC = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk_BTHC, v_BTJC = qkv_BTHC.split((heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTJC = qk_BTHC.to(self.q_norm.weight.dtype).split((self.heads, self.kv_heads), dim=2)
            qk_BTHC = torch.cat((self.q_norm(q_BTHC), self.k_norm(k_BTJC)), dim=2)
        q_BHTC, k_BJTC = rotate(qk_BTHC.transpose(1, 2).to(v_BTJC.dtype), *rotary_TC).split((self.heads, self.kv_heads), dim=1)
        v_BJTC = v_BTJC.transpose(1, 2)
        if cache is not None:
            k_BJTC, v_BJTC = cache.extend(k_BJTC, v_BJTC)
        causal = self.causal and mask_BTT is None and x_BTD.shape[1] > 1
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BJTC, v_BJTC, attn_mask=None if mask_BTT is None else mask_BTT[:, None], is_causal=causal, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(y_BHTC.transpose(1, 2).flatten(2))


def rotary_table(start: int, end: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, C / 2) of position * theta^(-2 i / C), for the positions from `start` to before `end`, in float32."""
    frequency_C = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_TC = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * frequency_C
    return angle_TC.cos(), angle_TC.sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + C/2}) by its position's angle."""
    cos_TC, sin_TC = cos_TC.to(x_BHTC.dtype), sin_TC.to(x_BHTC.dtype)
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.cat((first * cos_TC - second * sin_TC, second * cos_TC + first * sin_TC), dim=-1)
