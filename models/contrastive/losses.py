"""Contrastive losses over the whole global batch, and their gradients, computed block by block
without autograd.

The gradient is taken with respect to the embeddings, so that it can be kept while each micro-batch
is encoded again (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
limited setup", section 3). A process holds the logits of its own rows for one chunk of candidates
at a time: memory grows with own rows x chunk, never with the square of the batch. `gather` returns
the rows of all processes in any order, because sample numbers tell which rows belong together. A
sample is both anchor and candidate; its row holds both parts of its gradient.

The objectives are trainer/objectives/contrastive.py (SimCLR) and trainer/objectives/two_towers.py
(CLIP, SigLIP).

Legend: M own samples, R own rows, N rows of the whole batch, C rows of a chunk, P width of an
embedding. All values are at least float32.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.losses import binary_cross_entropy

Gather = Callable[[Tensor], Tensor]
"""Maps the rows of this process to the rows of all processes; the result is the same on each."""


class Embedded(NamedTuple):
    """Embeddings of M pairs, with the scale and bias of their logits."""

    a_MP: Tensor
    """First of each pair, on the unit sphere."""
    b_MP: Tensor
    """Second of each pair, on the unit sphere."""
    log_scale: Tensor
    """Learned logarithm of 1 / temperature, (1,); `clamped` turns it into the scale."""
    bias: Tensor
    """Bias added to all logits, (1,)."""


class PairLoss(NamedTuple):
    """Loss of M pairs in nats, and the gradients of the loss summed over the whole batch."""

    loss_M: Tensor
    a_MP: Tensor
    """Gradient with respect to the first of each pair."""
    b_MP: Tensor
    """Gradient with respect to the second of each pair."""
    log_scale_M: Tensor
    """Gradient with respect to log(1 / temperature), as one term per pair; the terms add up."""
    bias_M: Tensor
    """Gradient with respect to the bias, as one term per pair."""


class _Rows(NamedTuple):
    """Embeddings of this process, with the ids of their candidates."""

    z_RP: Tensor
    id_R: Tensor
    positive_R: Tensor
    """Id of the positive candidate."""
    never_R: Tensor
    """Id excluded from the candidates; -1 excludes none."""


def clamped(log_scale: Tensor, least_temperature: float) -> Tensor:
    """Return 1 / temperature, clamped to between 1 and 1 / `least_temperature` (Radford et al.
    2021, section 2.5)."""
    return log_scale.clamp(0.0, -math.log(least_temperature)).exp()


def leads_out(log_scale: Tensor, gradient: Tensor, least_temperature: float) -> Tensor:
    """Return whether descent along the whole batch's `gradient` would move a clamped temperature
    further out, in which case the gradient must be dropped."""
    above = log_scale >= -math.log(least_temperature)
    below = log_scale <= 0
    return (above & (gradient < 0)) | (below & (gradient > 0))


def nt_xent(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """NT-Xent: -log softmax over the 2N - 1 other views at the sample's other view, averaged over
    both views (Chen et al. 2020, equation 1)."""
    id_R = torch.cat([2 * number_M, 2 * number_M + 1])
    own = _Rows(_precise(torch.cat([z.a_MP, z.b_MP])), id_R, id_R ^ 1, id_R)
    others_NP = gather(own.z_RP)
    id_N = gather(id_R)
    lse_R, positive_R = _normalisers(own, others_NP, id_N, scale, chunk)
    gradient_RP, scale_R = _softmax_gradient(own, lse_R, others_NP, id_N, gather(lse_R), scale, chunk)
    a_MP, b_MP = gradient_RP.chunk(2)
    loss_M, scale_M = (values_R.view(2, -1).mean(0) for values_R in (lse_R - positive_R, scale_R))
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, torch.zeros_like(scale_M))


def symmetric_info_nce(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """Symmetric InfoNCE: -log softmax of each a over all b, and of each b over all a, at its own
    partner, averaged (Radford et al. 2021, figure 3)."""
    own_a, own_b, all_a_NP, all_b_NP, number_N = _two_sides(z, number_M, gather)
    lse_a_M, positive_M = _normalisers(own_a, all_b_NP, number_N, scale, chunk)
    lse_b_M, _ = _normalisers(own_b, all_a_NP, number_N, scale, chunk)
    a_MP, scale_M = _softmax_gradient(own_a, lse_a_M, all_b_NP, number_N, gather(lse_b_M), scale, chunk)
    b_MP, _ = _softmax_gradient(own_b, lse_b_M, all_a_NP, number_N, gather(lse_a_M), scale, chunk)
    loss_M = 0.5 * (lse_a_M + lse_b_M) - positive_M
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, torch.zeros_like(loss_M))


def sigmoid_pairs(z: Embedded, number_M: Tensor, scale: Tensor, chunk: int, gather: Gather) -> PairLoss:
    """SigLIP: -log sigmoid(y (scale a b + bias)) of each a with every b, summed; y = 1 for its
    partner and -1 for all others (Zhai et al. 2023, algorithm 1)."""
    own_a, own_b, all_a_NP, all_b_NP, number_N = _two_sides(z, number_M, gather)
    loss_M, scale_M, bias_M = (torch.zeros_like(own_a.z_RP[:, 0]) for _ in range(3))
    a_MP = torch.zeros_like(own_a.z_RP)
    b_MP = torch.zeros_like(own_b.z_RP)
    for part, similar_MC, positive_MC in _blocks(own_a, all_b_NP, number_N, chunk):
        logits_MC = scale * similar_MC + z.bias
        target_MC = positive_MC.to(similar_MC)
        slope_MC = logits_MC.sigmoid() - target_MC
        loss_M += binary_cross_entropy(logits_MC, target_MC).sum(1)
        a_MP += scale * slope_MC @ all_b_NP[part]
        scale_M += (slope_MC * similar_MC).sum(1)
        bias_M += slope_MC.sum(1)
    for part, similar_MC, positive_MC in _blocks(own_b, all_a_NP, number_N, chunk):
        b_MP += scale * ((scale * similar_MC + z.bias).sigmoid() - positive_MC.to(similar_MC)) @ all_a_NP[part]
    return PairLoss(loss_M, a_MP, b_MP, scale * scale_M, bias_M)


def _precise(z: Tensor) -> Tensor:
    """Cast to at least float32."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _two_sides(z: Embedded, number_M: Tensor, gather: Gather) -> tuple[_Rows, _Rows, Tensor, Tensor, Tensor]:
    """Return the own rows of both sides, then all a, all b and their sample numbers."""
    never_M = torch.full_like(number_M, -1)
    own_a = _Rows(_precise(z.a_MP), number_M, number_M, never_M)
    own_b = _Rows(_precise(z.b_MP), number_M, number_M, never_M)
    return own_a, own_b, gather(own_a.z_RP), gather(own_b.z_RP), gather(number_M)


def _blocks(own: _Rows, others_NP: Tensor, id_N: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield, for each chunk of candidates, its slice, its similarities (R, C), and a mask of the
    positive candidates (R, C)."""
    for start in range(0, len(others_NP), chunk):
        part = slice(start, start + chunk)
        yield part, own.z_RP @ others_NP[part].T, own.positive_R[:, None] == id_N[part]


def _normalisers(own: _Rows, others_NP: Tensor, id_N: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp of each row's logits over its candidates, and its positive logit, both
    (R,)."""
    lse_R = torch.full_like(own.z_RP[:, 0], -math.inf)
    positive_R = torch.zeros_like(lse_R)
    for part, similar_RC, positive_RC in _blocks(own, others_NP, id_N, chunk):
        logits_RC = scale * similar_RC
        positive_R += torch.where(positive_RC, logits_RC, 0.0).sum(1)
        logits_RC.masked_fill_(own.never_R[:, None] == id_N[part], -math.inf)
        lse_R = torch.logaddexp(lse_R, logits_RC.logsumexp(1))
    return lse_R, positive_R


def _softmax_gradient(
    own: _Rows, lse_R: Tensor, others_NP: Tensor, id_N: Tensor, lse_N: Tensor, scale: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to each own row, as anchor and as candidate, (R, P), and
    each row's term of the gradient with respect to the scale, (R,)."""
    gradient_RP = torch.zeros_like(own.z_RP)
    scale_R = torch.zeros_like(lse_R)
    for part, similar_RC, positive_RC in _blocks(own, others_NP, id_N, chunk):
        logits_RC = (scale * similar_RC).masked_fill_(own.never_R[:, None] == id_N[part], -math.inf)
        softmaxes_RC = (logits_RC - lse_R[:, None]).exp() + (logits_RC - lse_N[part]).exp()
        slope_RC = 0.5 * softmaxes_RC - positive_RC.to(similar_RC)
        gradient_RP += scale * slope_RC @ others_NP[part]
        scale_R += (slope_RC * similar_RC).sum(1)
    return gradient_RP, scale_R
