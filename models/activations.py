"""Bytes that autograd keeps from a transformer's forward pass until its backward pass, from the config alone.

The method is that of Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer models", section 4.1): go through
the operations of a block, and add up what each keeps. The operations here are those of models/attention.py, feedforward.py and moe.py.

Legend: D model width, H query heads, J key-value heads, C head width, F inner width, E experts, K experts of a token, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from models.moe import MoEConfig
from models.routing import ExpertChoiceRouting, NoisyTopKRouting, experts_per_token
from models.transformer import TransformerConfig

_INT64 = 8
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What decides how much an operation keeps."""

    bf16: bool
    """Autocast: matrix products and what they keep take 2 bytes a number, norms, router and loss 4."""
    cuda: bool
    """CUDA's RMSNorm keeps its input, the CPU's its normalised rows; CUDA's grouped experts keep two more inner rows."""

    zero3: bool = False
    """DeepSpeed's ZeRO 3 replaces `F.linear` by one that keeps its input as it comes, in fp32, and no copy of the weights."""

    @property
    def casts(self) -> bool:
        """Whether autocast's copies of weights and inputs of linear layers are kept."""
        return self.bf16 and not self.zero3

    @property
    def normed(self) -> int:
        """Bytes of a number of a norm's output that one linear layer keeps."""
        return 2 if self.casts else _FP32

    @property
    def size(self) -> int:
        """Bytes of a number in a matrix product."""
        return 2 if self.bf16 else _FP32


class Kept(NamedTuple):
    """Bytes of one micro-batch."""

    activations: float
    """What is kept from the whole forward pass; with activation checkpointing the blocks' inputs, and what is outside blocks."""
    recomputed: float
    """With activation checkpointing, what the largest block keeps while its backward pass runs; else 0."""
    weight_copies: float
    """Copies in bfloat16 of the weights that autocast makes for the forward pass; they stay until the backward pass."""


def kept(
    config: TransformerConfig, vocab_size: int, samples: int, seq_len: int, kernels: Kernels, ep: int = 1, load: float = 1.0, document_mask: bool = False
) -> Kept:
    """What `samples` windows of `seq_len` tokens keep on one rank, whose experts are 1 / `ep` of all and get `load` times their equal share."""
    tokens = samples * seq_len
    mask = kernels.size * seq_len if document_mask else 0
    dense = _attention(config, kernels) + mask
    attention = config.d_model * config.head_width * (2 * config.heads + 2 * config.kv_head_count)
    blocks, copies = [dense + _dense(config.d_model, config.ffn, kernels)], [2 * (attention + 3 * config.d_model * config.ffn) * kernels.casts]
    if config.moe is not None:
        blocks.append(dense + _moe(config.moe, config.d_model, kernels, ep > 1, load))
        experts = 3 * config.d_model * config.moe.experts // ep * config.moe.ffn
        copies.append(2 * (attention + 3 * config.d_model * config.moe.shared_expert) * kernels.casts + 2 * experts * kernels.bf16)
    ends = tokens * _ends(config.d_model, vocab_size, kernels)
    head = 2 * vocab_size * config.d_model * kernels.casts
    counts = [config.layers - len(config.moe_indices), len(config.moe_indices)]
    if config.activation_checkpointing:
        used = [index for index, count in enumerate(counts) if count]
        inputs = config.layers * tokens * _FP32 * config.d_model
        return Kept(inputs + ends, max(tokens * blocks[index] + copies[index] for index in used), head)
    everything = sum(count * tokens * block for count, block in zip(counts, blocks))
    return Kept(everything + ends, 0.0, head + sum(count * copy for count, copy in zip(counts, copies)))


def _norm(width: int) -> float:
    """RMSNorm of one row: the row or its normalised self, and 1 / rms."""
    return _FP32 * (width + 1)


def _attention(config: TransformerConfig, kernels: Kernels) -> float:
    """Norm; its output as input of the first product; that product; rotated queries and keys; log-sum-exp and output of the softmax."""
    c, width = kernels.size, config.head_width
    heads, kv_heads, inner = config.heads, config.kv_head_count, config.heads * width
    total = _norm(config.d_model) + kernels.normed * config.d_model + c * (heads + 2 * kv_heads) * width
    if config.qk_norm:
        # CUDA keeps the norm's input: in fp32 a part of the first product's output, which is kept anyway.
        total += (heads + kv_heads) * (_FP32 if kernels.cuda and not kernels.bf16 else _norm(width))
    return total + c * (heads + kv_heads) * width + _FP32 * heads + c * inner


def _dense(d_model: int, ffn: int, kernels: Kernels) -> float:
    """Norm; its output (under autocast once for the gate and once for up); gate, silu(gate), up and their product."""
    return _norm(d_model) + _FP32 * d_model + 4 * kernels.size * ffn


def _moe(moe: MoEConfig, d_model: int, kernels: Kernels, sharded: bool, load: float) -> float:
    """Norm; the router's fp32 input and scores; rows sorted by expert, and inner rows (both follow `load`); rows that come back; where everything goes."""
    c, k = kernels.size, experts_per_token(moe.router)
    total = _norm(d_model) + _FP32 * d_model + _router(moe, k)
    inner = (4 if kernels.cuda else 2) * moe.ffn
    total += load * k * c * (d_model + inner) + k * (c * d_model + c + 3 * _INT64)
    if sharded:
        total += load * k * 2 * _INT64
    if kernels.cuda:
        total += load * k
    if moe.shared_expert:
        total += (2 * c * d_model if kernels.casts else 0) + 4 * c * moe.shared_expert
    return total


def _router(moe: MoEConfig, k: float) -> float:
    """Scores and probabilities of all experts, the log-normaliser, and index and gate of the chosen ones."""
    match moe.router:
        case NoisyTopKRouting():
            rows = 7  # the noise and its scale, too
        case ExpertChoiceRouting():
            rows = 4  # the choice among tokens is taken on a transposed copy
        case _:
            rows = 2
    return _FP32 * (rows * moe.experts + 2) + k * (_INT64 + 2 * _FP32 + (moe.capacity_factor is not None))


def _ends(d_model: int, vocab_size: int, kernels: Kernels) -> float:
    """Token numbers; the last norm, its output, and the log-softmax of the cross-entropy in fp32 with its targets."""
    return _INT64 + _norm(d_model) + kernels.normed * d_model + _FP32 * vocab_size + _INT64
