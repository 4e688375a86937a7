"""Losses shared by several families: squared error, cross-entropy, Kullback-Leibler,
Jensen-Shannon, InfoNCE, in nats unless the data give the unit.

None averages over samples: an objective adds up, and the loop divides by the weight of the whole
global batch. `full_gaussian_kl`, `monte_carlo_kl`, `jensen_shannon` and `info_nce` are checked by
tests, not used in training.

Legend: M samples, N candidates, K classes or draws, D dimensions, V vocabulary; ... any leading
dimensions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample over its dimensions, (M, ...) -> (M,), in
    squared units of the data (Legendre 1805; Ho et al. 2020, equation 14)."""
    return (prediction - target).square().flatten(1).mean(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] of each sample, (M, K) and int64 (M,) -> (M,), in nats
    (Bishop 2006, equation 4.108)."""
    return F.cross_entropy(logits, targets, reduction="none")


def cross_entropy_sum(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Return the cross-entropy of (..., V) and (...) in at least float32, summed over the targets
    that are not `ignore`: a scalar in nats."""
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore,
        reduction="sum",
    )


def binary_cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Return -x log p - (1 - x) log(1 - p) with p = sigmoid(logit), elementwise, x in [0, 1], in
    nats (Bishop 2006, equation 4.90)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k) of log-probabilities (..., K) -> (...), in
    nats (Kullback & Leibler 1951); 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def standard_gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) of every dimension, elementwise, in nats (Kingma
    & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var)


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """Return KL(p || q) of Gaussians with diagonal covariances, elementwise, in nats; sum over
    dimensions for the total (Nichol & Dhariwal 2021, their code)."""
    return 0.5 * (
        log_var_q
        - log_var_p
        + torch.exp(log_var_p - log_var_q)
        + (mean_p - mean_q).square() * torch.exp(-log_var_q)
        - 1.0
    )


def full_gaussian_kl(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """Return KL(p || q) of Gaussians with means (..., D) and positive-definite covariances (..., D,
    D) -> (...), in nats (Duchi 2007, section 9).

    0.5 (tr(S_q^-1 S_p) + (m_q - m_p)^T S_q^-1 (m_q - m_p) - D + log det S_q / det S_p), by Cholesky
    factors.
    """
    root_p = torch.linalg.cholesky(cov_p)
    root_q = torch.linalg.cholesky(cov_q)
    ratio = torch.linalg.solve_triangular(root_q, root_p, upper=False)
    shift = torch.linalg.solve_triangular(root_q, (mean_q - mean_p).unsqueeze(-1), upper=False)
    log_det = 2 * (root_q.diagonal(dim1=-2, dim2=-1).log() - root_p.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    kl: Tensor = 0.5 * (ratio.square().sum((-2, -1)) + shift.square().sum((-2, -1)) - mean_p.shape[-1] + log_det)
    return kl


def monte_carlo_kl(log_p_K: Tensor, log_q_K: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate KL(p || q) from the log-densities (K, ...) of K draws from p: the mean of log p -
    log q and its standard error, each (...), in nats.

    Unbiased, for any pair of densities without a closed form (Hershey & Olsen 2007, section 2).
    """
    ratio_K = log_p_K - log_q_K
    return ratio_K.mean(0), ratio_K.std(0) / math.sqrt(len(ratio_K))


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, of log-probabilities (..., K) ->
    (...), in nats, at most log 2 (Lin 1991, equation 4.1)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (categorical_kl(log_p, log_m) + categorical_kl(log_q, log_m))


def info_nce(similarity_MN: Tensor, positive_M: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return -log softmax over N candidates of similarity / temperature at the positive candidate,
    int64 (M,) -> (M,), in nats (van den Oord et al. 2018, equation 4)."""
    return cross_entropy(similarity_MN / temperature, positive_M)
