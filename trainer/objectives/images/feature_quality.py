"""Quality of learned features: accuracy of classifiers on them, and alignment and recall of pairs.

Every rank computes the features of its share of the images. Gathered and put in order, they are the
same for every number of ranks.

Legend: N known images, M other images, F features, P width of an embedding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.share import Share
from models.quality.probes import alignment, knn_accuracy, recall_at, uniformity
from trainer.core.protocols import Gather

if TYPE_CHECKING:
    from data.images.held_out import Split
    from trainer.objectives.images.data import ImageData

Parts = dict[str, Tensor]
"""Named tensors with one row per image, such as "features" and "label"."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measures of features."""

    samples: int = 10_000
    """Largest number of training images, and of held-out images, that are measured."""
    neighbours: int = 20
    """Number of training images that vote on the class of a held-out image."""
    recall: tuple[int, ...] = (1, 5)
    """Values of k for which recall@k is measured."""

    def __post_init__(self) -> None:
        if min(self.samples, self.neighbours, *self.recall) < 1:
            values = f"samples {self.samples}, neighbours {self.neighbours} and recall {list(self.recall)}"
            raise ValueError(f"quality: {values} must be at least 1; use larger values")


def compute_over_split(
    data: "ImageData",
    split: "Split",
    samples: int,
    compute: Callable[[Tensor, Tensor, Tensor], Parts],
    share: Share,
    gather: Gather,
) -> Parts:
    """Applies `compute(images in [-1, 1], numbers, labels)` to a split's first `samples` images.

    Returns the results of all ranks, in the images' order, with "label" and "number".
    """
    from data.images.held_out import image_set

    image_NCHW, label_N = image_set(data.config, split, samples)
    own: list[Parts] = []
    for number_M in torch.arange(share.rank, len(label_N), share.world).split(256):
        parts = compute(image_NCHW[number_M].float() / 127.5 - 1, number_M, label_N[number_M])
        on_cpu = {name: value.cpu() for name, value in parts.items()}
        own.append(on_cpu | {"label": label_N[number_M], "number": number_M})
    batches = list(chain.from_iterable(gather(own)))
    order_N = torch.cat([batch["number"] for batch in batches]).argsort()
    return {name: torch.cat([batch[name] for batch in batches])[order_N] for name in batches[0]}


def class_figures(config: ProbeConfig, names: Iterable[str], known: Parts, asked: Parts) -> dict[str, float]:
    """k-NN and linear-probe accuracy of the features `names`.

    The metrics carry the name of their features as a prefix, except those of "features".
    """
    figures: dict[str, float] = {}
    for name in names:
        arguments = known[name], known["label"], asked[name], asked["label"]
        prefix = "" if name == "features" else f"{name}/"
        figures[f"{prefix}knn_accuracy"] = knn_accuracy(*arguments, config.neighbours)
        figures[f"{prefix}linear_accuracy"] = linear_probe(*arguments)
    return figures


def linear_probe(known_NF: Tensor, label_N: Tensor, asked_MF: Tensor, label_M: Tensor) -> float:
    """Accuracy of logistic regression on the standardised features.

    The penalty is 1/2 ||w||^2 on the summed loss.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the measure is defined by 200 steps
        probe.fit(known_NF.numpy(), label_N.numpy())
    return float(probe.score(asked_MF.numpy(), label_M.numpy()))


def pair_figures(config: ProbeConfig, a_MP: Tensor, b_MP: Tensor, meaning_M: Tensor, what: str) -> dict[str, float]:
    """Alignment, mean uniformity of both sides, and recall@k of b by a.

    `what` names b in the metrics' names.
    """
    figures = {"alignment": alignment(a_MP, b_MP), "uniformity": 0.5 * (uniformity(a_MP) + uniformity(b_MP))}
    for k in config.recall:
        figures[f"{what}_recall_at_{k}"] = recall_at(a_MP, b_MP, meaning_M, meaning_M, k)
    return figures


def once(figures: Callable[[], Mapping[str, float]], share: Share, gather: Gather) -> dict[str, float]:
    """Computes `figures` on rank 0 alone; returns its result on every rank."""
    return gather(dict(figures()) if share.rank == 0 else {})[0]
