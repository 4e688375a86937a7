"""Contrastive losses whose candidates are the whole global batch, with their gradients, block by block and without autograd.

The gradient is taken with respect to the embeddings, so that it can be kept while each micro-batch is encoded again (Gao et al. 2021, "Scaling
deep contrastive learning batch size under memory limited setup", section 3). A process holds the logits of its own rows beside one chunk of
candidates at a time: memory grows with own rows x chunk, never with the square of the batch. `gather` gives the rows of all processes, in any
order: who belongs to whom is told by the samples' numbers. A sample is anchor and candidate; both parts of its gradient are in its row.

Legend: M own samples, R own rows, N rows of the whole batch, C rows of a chunk, P width of an embedding. All is float32 at least.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.losses import binary_cross_entropy

Gather = Callable[[Tensor], Tensor]
"""The rows of this process -> the rows of all, the same on each."""


class Embedded(NamedTuple):
    """What a network says of M pairs."""

    a_MP: Tensor
    """The first of each pair, on the unit sphere."""
    b_MP: Tensor
    """The second."""
    log_scale: Tensor
    """Logarithm of 1 / temperature as it is learned, (1,); it counts as `clamped` says."""
    bias: Tensor
    """Added to all logits, (1,)."""


class PairLoss(NamedTuple):
    """Loss of M pairs, in nats, and the gradients of the whole batch's summed loss."""

    loss_M: Tensor
    a_MP: Tensor
    """By the first of each pair."""
    b_MP: Tensor
    """By the second."""
    log_scale_M: Tensor
    """By the logarithm of 1 / temperature: the part of each pair; they add up to the whole."""
    bias_M: Tensor
    """The same by the bias."""


class _Rows(NamedTuple):
    z_RP: Tensor
    id_R: Tensor
    positive_R: Tensor
    """Which id is the positive candidate."""
    never_R: Tensor
    """Which id is no candidate; -1: all are."""


def clamped(log_scale: Tensor, least_temperature: float) -> Tensor:
    """1 / temperature, kept between 1 and 1 / least_temperature (Radford et al. 2021, section 2.5)."""
    return log_scale.clamp(0.0, -math.log(least_temperature)).exp()


def leads_out(log_scale: Tensor, gradient: Tensor, least_temperature: float) -> Tensor:
    """Whether descent along the whole batch's `gradient` would take a clamped temperature further out: such a gradient is to be left out."""
    above, below = log_scale >= -math.log(least_temperature), log_scale <= 0
    return (above & (gradient < 0)) | (below & (gradient > 0))


def nt_xent(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """The mean of both views' -log softmax over the 2N - 1 other views at the sample's other view (Chen et al. 2020, equation 1)."""
    id_R = torch.cat([2 * number_M, 2 * number_M + 1])
    own = _Rows(_precise(torch.cat([z.a_MP, z.b_MP])), id_R, id_R ^ 1, id_R)
    others_NP, id_N = gather(own.z_RP), gather(id_R)
    lse_R, positive_R = _normalisers(own, others_NP, id_N, scale, chunk)
    gradient_RP, scale_R = _softmax_gradient(own, lse_R, others_NP, id_N, gather(lse_R), scale, chunk)
    a_MP, b_MP = gradient_RP.chunk(2)
    loss_M, scale_M = (values_R.view(2, -1).mean(0) for values_R in (lse_R - positive_R, scale_R))
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, torch.zeros_like(scale_M))


def symmetric_info_nce(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """The mean of -log softmax of each a over all b, and of each b over all a, at its own partner (Radford et al. 2021, figure 3)."""
    own_a, own_b, all_a_NP, all_b_NP, number_N = _two_sides(z, number_M, gather)
    lse_a_M, positive_M = _normalisers(own_a, all_b_NP, number_N, scale, chunk)
    lse_b_M, _ = _normalisers(own_b, all_a_NP, number_N, scale, chunk)
    a_MP, scale_M = _softmax_gradient(own_a, lse_a_M, all_b_NP, number_N, gather(lse_b_M), scale, chunk)
    b_MP, _ = _softmax_gradient(own_b, lse_b_M, all_a_NP, number_N, gather(lse_a_M), scale, chunk)
    loss_M = 0.5 * (lse_a_M + lse_b_M) - positive_M
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, torch.zeros_like(loss_M))


def sigmoid_pairs(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """-log sigmoid(y (scale a b + bias)) of each a with every b, y = 1 for its partner and -1 for the rest, summed (Zhai et al. 2023, algorithm 1)."""
    own_a, own_b, all_a_NP, all_b_NP, number_N = _two_sides(z, number_M, gather)
    loss_M, scale_M, bias_M = (torch.zeros_like(own_a.z_RP[:, 0]) for _ in range(3))
    a_MP, b_MP = torch.zeros_like(own_a.z_RP), torch.zeros_like(own_b.z_RP)
    for part, similar_MC, positive_MC in _blocks(own_a, all_b_NP, number_N, chunk):
        logits_MC, target_MC = scale * similar_MC + z.bias, positive_MC.to(similar_MC)
        slope_MC = logits_MC.sigmoid() - target_MC
        loss_M += binary_cross_entropy(logits_MC, target_MC).sum(1)
        a_MP += scale * slope_MC @ all_b_NP[part]
        scale_M += (slope_MC * similar_MC).sum(1)
        bias_M += slope_MC.sum(1)
    for part, similar_MC, positive_MC in _blocks(own_b, all_a_NP, number_N, chunk):
        b_MP += scale * ((scale * similar_MC + z.bias).sigmoid() - positive_MC.to(similar_MC)) @ all_a_NP[part]
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, bias_M)


def _precise(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _two_sides(z: Embedded, number_M: Tensor, gather: Gather) -> tuple[_Rows, _Rows, Tensor, Tensor, Tensor]:
    """Own rows of both sides, then all a, all b and their numbers."""
    never_M = torch.full_like(number_M, -1)
    own_a, own_b = _Rows(_precise(z.a_MP), number_M, number_M, never_M), _Rows(_precise(z.b_MP), number_M, number_M, never_M)
    return own_a, own_b, gather(own_a.z_RP), gather(own_b.z_RP), gather(number_M)


def _blocks(own: _Rows, others_NP: Tensor, id_N: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of candidates: where it is, similarities (R, C), and which are the positive ones (R, C)."""
    for start in range(0, len(others_NP), chunk):
        part = slice(start, start + chunk)
        yield part, own.z_RP @ others_NP[part].T, own.positive_R[:, None] == id_N[part]


def _normalisers(own: _Rows, others_NP: Tensor, id_N: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """log sum exp of each row's logits over its candidates, and its positive logit, both (R,)."""
    lse_R = torch.full_like(own.z_RP[:, 0], -math.inf)
    positive_R = torch.zeros_like(lse_R)
    for part, similar_RC, positive_RC in _blocks(own, others_NP, id_N, chunk):
        logits_RC = scale * similar_RC
        positive_R += torch.where(positive_RC, logits_RC, 0.0).sum(1)
        lse_R = torch.logaddexp(lse_R, logits_RC.masked_fill_(own.never_R[:, None] == id_N[part], -math.inf).logsumexp(1))
    return lse_R, positive_R


def _softmax_gradient(own: _Rows, lse_R: Tensor, others_NP: Tensor, id_N: Tensor, lse_N: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The gradient by each own row, as anchor and as candidate, (R, P), and each row's part of that by the scale, (R,)."""
    gradient_RP, scale_R = torch.zeros_like(own.z_RP), torch.zeros_like(lse_R)
    for part, similar_RC, positive_RC in _blocks(own, others_NP, id_N, chunk):
        logits_RC = (scale * similar_RC).masked_fill_(own.never_R[:, None] == id_N[part], -math.inf)
        slope_RC = 0.5 * ((logits_RC - lse_R[:, None]).exp() + (logits_RC - lse_N[part]).exp()) - positive_RC.to(similar_RC)
        gradient_RP += scale * slope_RC @ others_NP[part]
        scale_R += (slope_RC * similar_RC).sum(1)
    return gradient_RP, scale_R
