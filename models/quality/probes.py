"""Measures of features: nearest neighbours, retrieval, and alignment and uniformity on the sphere.

N known and M queried samples, F features, P width of an embedding on the unit sphere, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_accuracy(
    known_NF: Tensor,
    label_N: Tensor,
    asked_MF: Tensor,
    label_M: Tensor,
    neighbours: int,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Return the share of queries whose class wins a vote of the nearest known samples, each with
    weight exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""
    known_NF = F.normalize(known_NF, dim=1)
    classes = int(label_N.max()) + 1
    correct = 0
    for asked, labels in zip(F.normalize(asked_MF, dim=1).split(chunk), label_M.split(chunk), strict=True):
        cosine, nearest = (asked @ known_NF.T).topk(min(neighbours, len(known_NF)), dim=1)
        votes_MK = torch.zeros(len(asked), classes, device=asked.device)
        votes_MK.scatter_add_(1, label_N[nearest], (cosine / temperature).exp())
        correct += int((votes_MK.argmax(1) == labels).sum())
    return correct / len(asked_MF)


def recall_at(
    asked_MP: Tensor, known_NP: Tensor, meant_M: Tensor, meaning_N: Tensor, k: int, chunk: int = 1024
) -> float:
    """Return the share of queries that find their own meaning among the `k` most similar known
    samples."""
    hits = 0
    for asked, meant in zip(asked_MP.split(chunk), meant_M.split(chunk), strict=True):
        nearest = (asked @ known_NP.T).topk(min(k, len(known_NP)), dim=1).indices
        hits += int((meaning_N[nearest] == meant[:, None]).any(1).sum())
    return hits / len(asked_MP)


def alignment(a_MP: Tensor, b_MP: Tensor) -> float:
    """Return the mean squared distance within pairs; 0 is perfect (Wang & Isola 2020, section 4.1,
    alpha = 2)."""
    return (a_MP - b_MP).square().sum(1).mean().item()


def uniformity(z_MP: Tensor, chunk: int = 1024) -> float:
    """Return the log of the mean of exp(-2 squared distance) over all pairs (Wang & Isola 2020,
    section 4.1, t = 2): 0 if all embeddings are equal, about -4 if they are evenly spread over a
    sphere."""
    sums = [torch.exp(-2 * torch.cdist(part, z_MP).square()).double().sum() for part in z_MP.split(chunk)]
    pairs = len(z_MP) * (len(z_MP) - 1)
    return ((torch.stack(sums).sum() - len(z_MP)) / pairs).log().item()
