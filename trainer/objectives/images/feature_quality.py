"""What learned features are worth, beside those of the same network as it started and beside the pixels themselves.

Every rank computes the features of its share of the images; gathered and put in order they are the same for every world.
M images, F features, P width of an embedding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from data.share import Share
from models.quality.probes import alignment, knn_accuracy, recall_at, uniformity
from trainer.core.protocols import Gather

if TYPE_CHECKING:
    from trainer.objectives.images.data import ImageData

Split = Literal["train", "held_out"]
Parts = dict[str, Tensor]
"""What is known of images, by name, a row each."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measures of features."""

    samples: int = 10_000
    """Training images, and held-out ones, at most."""
    neighbours: int = 20
    """That vote on the class of a held-out image."""
    recall: tuple[int, ...] = (1, 5)
    """k of recall@k."""

    def __post_init__(self) -> None:
        if min(self.samples, self.neighbours, *self.recall) < 1:
            raise ValueError(
                f"quality: samples {self.samples}, neighbours {self.neighbours} and recall {list(self.recall)} must be at least 1"
            )


def compute_over_split(
    data: "ImageData",
    split: Split,
    samples: int,
    compute: Callable[[Tensor, Tensor, Tensor], Parts],
    share: Share,
    gather: Gather,
) -> Parts:
    """`compute(images in [-1, 1], numbers, labels)` of the first `samples` images of a split, and their "label", over all ranks and in order."""
    from data.images.held_out import image_set

    image_NCHW, label_N = image_set(data.config, split, samples)
    found: list[Parts] = []
    for number_M in torch.arange(share.rank, len(label_N), share.world).split(256):
        parts = compute(image_NCHW[number_M].float() / 127.5 - 1, number_M, label_N[number_M])
        found.append(
            {name: value.cpu() for name, value in parts.items()} | {"label": label_N[number_M], "number": number_M}
        )
    everything = [part for rank in gather(found) for part in rank]
    order_N = torch.cat([part["number"] for part in everything]).argsort()
    return {name: torch.cat([part[name] for part in everything])[order_N] for name in everything[0]}


def class_figures(config: ProbeConfig, names: Iterable[str], known: Parts, asked: Parts) -> dict[str, float]:
    """k-NN and linear-probe accuracy of each of the features `names`; those of "features" without its name in front."""
    figures = {}
    for name in names:
        arguments = known[name], known["label"], asked[name], asked["label"]
        prefix = "" if name == "features" else f"{name}/"
        figures[f"{prefix}knn_accuracy"] = knn_accuracy(*arguments, config.neighbours)
        figures[f"{prefix}linear_accuracy"] = linear_probe(*arguments)
    return figures


def linear_probe(known_NF: Tensor, label_N: Tensor, asked_MF: Tensor, label_M: Tensor) -> float:
    """Accuracy of logistic regression on the standardised features, with the penalty 1/2 ||w||^2 on the summed loss."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are the measure
        probe.fit(known_NF.numpy(), label_N.numpy())
    return float(probe.score(asked_MF.numpy(), label_M.numpy()))


def pair_figures(config: ProbeConfig, a_MP: Tensor, b_MP: Tensor, meaning_M: Tensor, what: str) -> dict[str, float]:
    """Alignment, uniformity of both sides, and recall@k of b, which is `what`, by a."""
    figures = {"alignment": alignment(a_MP, b_MP), "uniformity": 0.5 * (uniformity(a_MP) + uniformity(b_MP))}
    for most in config.recall:
        figures[f"{what}_recall_at_{most}"] = recall_at(a_MP, b_MP, meaning_M, meaning_M, most)
    return figures


def once(figures: Callable[[], Mapping[str, float]], share: Share, gather: Gather) -> dict[str, float]:
    """What rank 0 computes, on every rank."""
    return gather(dict(figures()) if share.rank == 0 else {})[0]
