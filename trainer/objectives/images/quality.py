"""Quality of generated samples: distance from real images, or coverage of the modes of toy data.

Every rank generates its share of the samples, from keys that do not depend on the rank. Gathered
and put in order, they are the same set for every number of ranks.

Legend: M samples, N real images, D features.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.config import ImageConfig
from data.share import Share
from models.quality.classifier import ClassifierConfig
from models.quality.distances import Moments, frechet_distance, in_sample_order, kernel_distance, manifold_overlap
from models.quality.mixtures import ModeCoverage, perfect_sampler
from models.random import normal, sample_keys
from trainer.core.protocols import Gather
from trainer.objectives.images.feature_network import FeatureConfig, Features, feature_network

if TYPE_CHECKING:
    from data.images.held_out import Split
    from trainer.objectives.images.data import ImageData, PointData, ToyConfig

DrawSamples = Callable[[Tensor, Tensor], Tensor]
"""(keys (M,), labels (M,)) -> samples as the networks produce them; images are in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Measures of sample quality."""

    samples: int = 1000
    """Number of generated samples, and the largest number of real training images, to compare."""
    network: FeatureConfig = field(default_factory=ClassifierConfig)
    """The network on whose features images are compared. A classifier is trained on the data set
    itself, once."""
    neighbours: int = 5
    """Number of nearest neighbours for precision, recall, density and coverage."""
    collapse_below: float = 0.5
    """Share of the data's diversity, or of its modes, below which the samples raise an event."""

    def __post_init__(self) -> None:
        if self.samples <= self.neighbours:
            raise ValueError(
                f"quality.samples: {self.samples} is not above the {self.neighbours} neighbours; "
                "use more samples, usually 1000 or more"
            )


def check_quality(config: QualityConfig | None, data: "ImageConfig | ToyConfig") -> None:
    """Raises ValueError if the measures need labels that the data do not have."""
    if config is None or not isinstance(config.network, ClassifierConfig):
        return
    if isinstance(data, ImageConfig) and data.classes is None:
        raise ValueError(
            "objective.quality.network: the classifier needs labels, but data.classes is null; "
            "set data.classes, use the network inception, or set quality to null"
        )


def draw_share(
    config: QualityConfig, classes: int | None, draw_samples: DrawSamples, seed: int, share: Share, device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's part of the `config.samples` samples, and their numbers. Labels take turns."""
    samples: list[Tensor] = []
    numbers = torch.arange(share.rank, config.samples, share.world, device=device)
    for number_M in numbers.split(256):
        labels_M = number_M % classes if classes else torch.zeros_like(number_M)
        samples.append(draw_samples(sample_keys(seed, number_M, "quality"), labels_M))
    return torch.cat(samples), numbers


@torch.no_grad()
def image_quality(
    config: QualityConfig,
    data: "ImageData",
    draw_samples: DrawSamples,
    seed: int,
    share: Share,
    gather: Gather,
    device: torch.device,
) -> dict[str, float]:
    """Frechet distance, KID, precision, recall, density, coverage and diversity of samples.

    They are compared with training images. The same metrics of held-out images, prefixed
    "held_out/", are the floor; those of Gaussian noise are prefixed "noise/".
    """
    network = feature_network(config.network, data, share, gather, device)
    image_MCHW, number_M = draw_share(config, data.classes, draw_samples, seed, share, device)
    # Real images have 256 grey values, so the samples get as many.
    quantised_MCHW = ((image_MCHW.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    parts = gather((network(quantised_MCHW).cpu(), number_M.cpu()))
    generated = in_sample_order(torch.cat([part for part, _ in parts]), torch.cat([numbers for _, numbers in parts]))
    real = _features_of_split(config, data, "train", network, device)
    metrics = _compare(config, real, generated)
    metrics["diversity"] = (Moments.of(generated).covariance().trace() / Moments.of(real).covariance().trace()).item()
    if data.config.eval_source or data.config.held_out:
        held_out = _features_of_split(config, data, "held_out", network, device)
        if len(held_out) > config.neighbours:
            metrics |= {f"held_out/{name}": value for name, value in _compare(config, real, held_out).items()}
    noise_MCHW = normal(sample_keys(seed, torch.arange(config.samples), "noise images"), data.shape).clamp(-1, 1)
    noise = network(noise_MCHW.to(device)).cpu()
    return metrics | {f"noise/{name}": value for name, value in _compare(config, real, noise).items()}


def _features_of_split(
    config: QualityConfig, data: "ImageData", split: "Split", network: Features, device: torch.device
) -> Tensor:
    """Features (N, D), on the CPU, of the first `config.samples` images of a split."""
    from data.images.held_out import image_set

    image_NCHW, _ = image_set(data.config, split, config.samples)
    return network((image_NCHW.float() / 127.5 - 1).to(device)).cpu()


def _compare(config: QualityConfig, real_ND: Tensor, other_MD: Tensor) -> dict[str, float]:
    """Metrics of `other_MD` against real images.

    Features are divided by the root mean square of the real ones, because their scale is arbitrary.
    """
    scale = real_ND.square().mean().sqrt()
    real_ND = real_ND / scale
    other_MD = other_MD / scale
    distances = {
        "frechet_distance": frechet_distance(Moments.of(real_ND), Moments.of(other_MD)),
        "kid": kernel_distance(real_ND, other_MD),
    }
    return distances | manifold_overlap(real_ND, other_MD, config.neighbours)._asdict()


@torch.no_grad()
def point_quality(
    config: QualityConfig,
    data: "PointData",
    draw_samples: DrawSamples,
    seed: int,
    share: Share,
    gather: Gather,
    device: torch.device,
) -> dict[str, float]:
    """Number of modes reached, share of high-quality samples and reverse KL.

    The scores of a perfect sampler are prefixed "perfect/".
    """
    points_MD, _ = draw_share(config, None, draw_samples, seed, share, device)
    coverage = reduce(operator.add, gather(ModeCoverage.of(points_MD, data.mixture)))
    ceiling = perfect_sampler(data.mixture, config.samples)
    return {
        "modes": float(coverage.modes()),
        "high_quality": coverage.high_quality(),
        "reverse_kl": coverage.reverse_kl(data.mixture),
        "modes_share": coverage.modes() / len(data.mixture.weights_K),
        "perfect/modes": ceiling.modes,
        "perfect/high_quality": ceiling.high_quality,
        "perfect/reverse_kl": ceiling.reverse_kl,
    }


def quality_alarms(config: QualityConfig | None, metrics: Mapping[str, float]) -> list[str]:
    """One line per metric that shows a collapse of the samples."""
    if config is None:
        return []
    sentences = {
        "diversity": "samples have {:.0%} of the data's diversity",
        "modes_share": "samples reach {:.0%} of the data's modes",
    }
    return [
        f"collapse: {sentence.format(metrics[name])}, below {config.collapse_below:.0%}"
        for name, sentence in sentences.items()
        if metrics.get(name, 1.0) < config.collapse_below
    ]
