"""Bytes that autograd keeps from a transformer's forward pass until its backward pass, computed
from the config alone.

The method is that of Korthikanti et al. 2022 ("Reducing activation recomputation in large
transformer models", section 4.1): add up what each operation of a block keeps. The operations are
those of models/transformer/attention.py, models/layers.py and models/moe/layer.py.

Legend: D model width, H query heads, J key-value heads, C head width, F inner width, E experts, K
experts per token, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from models.moe.layer import MoEConfig
from models.moe.policies import ExpertChoiceRouting, NoisyTopKRouting, experts_per_token
from models.transformer.model import TransformerConfig

_INT64 = 8
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Precision and device, which decide how many bytes an operation keeps."""

    bf16: bool
    """Whether autocast to bfloat16 is on. Matrix products and their saved inputs then take 2 bytes
    per number; norms, router and loss take 4."""
    cuda: bool
    """Whether the device is CUDA. Its RMSNorm keeps its input, where the CPU's keeps the normalised
    rows; its grouped experts keep two more inner rows."""

    zero3: bool = False
    """Whether ZeRO 3 is on. DeepSpeed then replaces `F.linear` by a function that keeps its input
    unconverted, in fp32, and no copy of the weights."""

    @property
    def casts(self) -> bool:
        """Whether autocast's copies of the linear layers' weights and inputs are kept."""
        return self.bf16 and not self.zero3

    @property
    def normed(self) -> int:
        """Bytes per number of a norm's output, for each linear layer that keeps it."""
        return 2 if self.casts else _FP32

    @property
    def size(self) -> int:
        """Bytes per number in a matrix product."""
        return 2 if self.bf16 else _FP32


class Kept(NamedTuple):
    """Bytes that one micro-batch keeps."""

    activations: float
    """Bytes kept from the whole forward pass. With activation checkpointing: the blocks' inputs,
    and everything outside the blocks."""
    recomputed: float
    """With activation checkpointing, the bytes that the largest block keeps while its backward pass
    runs; otherwise 0."""
    weight_copies: float
    """Bytes of the bfloat16 copies of weights that autocast makes in the forward pass and keeps
    until the backward pass."""


def kept(
    config: TransformerConfig,
    vocab_size: int,
    samples: int,
    seq_len: int,
    kernels: Kernels,
    ep: int = 1,
    load: float = 1.0,
    document_mask: bool = False,
) -> Kept:
    """Compute the bytes that one rank keeps for `samples` windows of `seq_len` tokens.

    The rank holds 1 / `ep` of the experts, and they receive `load` times their equal share of the
    tokens.
    """
    tokens = samples * seq_len
    mask = kernels.size * seq_len if document_mask else 0
    dense = _attention(config, kernels) + mask
    attention = config.d_model * config.head_width * (2 * config.heads + 2 * config.kv_head_count)
    blocks = [dense + _dense(config.d_model, config.ffn, kernels)]
    copies = [2 * (attention + 3 * config.d_model * config.ffn) * kernels.casts]
    if config.moe is not None:
        blocks.append(dense + _moe(config.moe, config.d_model, kernels, ep > 1, load))
        experts = 3 * config.d_model * config.moe.experts // ep * config.moe.ffn
        shared = 3 * config.d_model * config.moe.shared_expert
        copies.append(2 * (attention + shared) * kernels.casts + 2 * experts * kernels.bf16)
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
    """Bytes of RMSNorm for one row: the row or its normalised copy, and 1 / rms."""
    return _FP32 * (width + 1)


def _attention(config: TransformerConfig, kernels: Kernels) -> float:
    """Bytes per token of attention: the norm; its output, as input of the first product; that
    product; rotated queries and keys; log-sum-exp and output of the softmax."""
    c = kernels.size
    width = config.head_width
    heads = config.heads
    kv_heads = config.kv_head_count
    inner = config.heads * width
    total = _norm(config.d_model) + kernels.normed * config.d_model + c * (heads + 2 * kv_heads) * width
    if config.qk_norm:
        # CUDA keeps the norm's input, which in fp32 is a part of the first product's output and
        # kept anyway.
        total += (heads + kv_heads) * (_FP32 if kernels.cuda and not kernels.bf16 else _norm(width))
    return total + c * (heads + kv_heads) * width + _FP32 * heads + c * inner


def _dense(d_model: int, ffn: int, kernels: Kernels) -> float:
    """Bytes per token of a dense feed-forward: the norm; its output (twice under autocast, for gate
    and up); gate, silu(gate), up and their product."""
    return _norm(d_model) + _FP32 * d_model + 4 * kernels.size * ffn


def _moe(moe: MoEConfig, d_model: int, kernels: Kernels, sharded: bool, load: float) -> float:
    """Bytes per token of a mixture of experts: the norm; the router's fp32 input and scores; rows
    sorted by expert and inner rows, both proportional to `load`; rows that come back; indices of
    the sorting."""
    c = kernels.size
    k = experts_per_token(moe.router)
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
    """Bytes per token of the router: scores and probabilities of all experts, the log-normaliser,
    index and gate of the chosen experts."""
    match moe.router:
        case NoisyTopKRouting():
            rows = 7  # also the noise and its scale
        case ExpertChoiceRouting():
            rows = 4  # experts choose tokens on a transposed copy
        case _:
            rows = 2
    return _FP32 * (rows * moe.experts + 2) + k * (_INT64 + 2 * _FP32 + (moe.capacity_factor is not None))


def _ends(d_model: int, vocab_size: int, kernels: Kernels) -> float:
    """Bytes per token outside the blocks: token ids; the last norm and its output; the log-softmax
    of the cross-entropy in fp32, and its targets."""
    return _INT64 + _norm(d_model) + kernels.normed * d_model + _FP32 * vocab_size + _INT64


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    """All parameters."""
    active: float
    """Parameters that one token uses, including embeddings and norms. Of the routed experts only
    the token's own count (on average, for expert_choice)."""
    matmul: float
    """Active parameters that a matrix product uses: N in 6 N. Excludes norms and embedding look-up,
    includes the output matrix."""


def parameters(config: TransformerConfig, vocab_size: int) -> Parameters:
    """Count the parameters of `Transformer(config, vocab_size)`."""
    layers = config.layers
    moe_layers = len(config.moe_indices)
    width = config.d_model
    head_width = config.head_width
    # D (H + 2J) C for query, key and value, H C D for the output.
    attention = layers * width * head_width * (2 * config.heads + 2 * config.kv_head_count)
    norms = (2 * layers + 1) * width + 2 * layers * head_width * config.qk_norm
    dense = (layers - moe_layers) * 3 * width * config.ffn
    used, held = _moe_parameters(config.moe, width) if config.moe else (0, 0)
    vocabulary = vocab_size * width
    shared = attention + dense + vocabulary
    matmul = shared + moe_layers * used
    unused = norms + (0 if config.tie_embeddings else vocabulary)
    return Parameters(round(shared + moe_layers * held + unused), matmul + unused, matmul)


def non_embedding(config: TransformerConfig) -> int:
    """Count the parameters without the token embedding and the output matrix: N of Kaplan et al.
    2020, section 2.1."""
    return parameters(config, vocab_size=0).total


def _moe_parameters(moe: MoEConfig, width: int) -> tuple[float, float]:
    """Count the parameters of one mixture-of-experts layer: (used per token, all)."""
    expert = 3 * width * moe.ffn
    matrices = 2 if isinstance(moe.router, NoisyTopKRouting) else 1
    always = width * moe.experts * matrices + 3 * width * moe.shared_expert
    return always + experts_per_token(moe.router) * expert, always + moe.experts * expert


def forward_flops_per_token(config: TransformerConfig, vocab_size: int, seq_len: int) -> float:
    """Return the FLOPs per token of a forward pass, 2 N + 4 L H C T: a multiplication and an
    addition per parameter (Kaplan et al. 2020, table 1), and the two products of attention.

    Attention counts all T positions, masked or not, as is usual (Chowdhery et al. 2022, PaLM,
    appendix B). Drops are not subtracted.
    """
    attention = 4 * config.layers * config.heads * config.head_width * seq_len
    return 2 * parameters(config, vocab_size).matmul + attention


def flops_per_token(config: TransformerConfig, vocab_size: int, seq_len: int) -> float:
    """Return the model FLOPs per token in training, 6 N + 12 L H C T (PaLM, appendix B): the
    forward pass, and twice that for the backward pass.

    Recomputation by activation checkpointing does not count: divided by time and peak, this is
    model FLOPs utilisation.
    """
    return 3 * forward_flops_per_token(config, vocab_size, seq_len)
