"""How good samples are: distances and overlaps between real and generated images on the features of a network, and modes found in toy data.

Every rank draws its share of the samples, all from keys that know no rank; gathered and put in order they are the same set for every world.
M samples, N real images, D features.
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
from trainer.objectives.images.feature_network import FeatureConfig, feature_network

if TYPE_CHECKING:
    from trainer.objectives.images.data import ImageData, PointData, ToyConfig

Draw = Callable[[Tensor, Tensor], Tensor]
"""(keys (M,), labels (M,)) -> samples as networks give them, images in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Measures of sample quality."""

    samples: int = 1000
    """Generated samples, and real training images at most, that are compared."""
    network: FeatureConfig = field(default_factory=ClassifierConfig)
    """The network whose features images are compared by; a classifier is trained on the data set itself, once."""
    neighbours: int = 5
    """Nearest neighbours of precision, recall, density and coverage."""
    collapse_below: float = 0.5
    """An event is raised where samples have less than this share of the diversity, or of the modes, of the data."""

    def __post_init__(self) -> None:
        if self.samples <= self.neighbours:
            raise ValueError(
                f"quality.samples is {self.samples}; it must be above the {self.neighbours} neighbours, and is usually 1000 or more"
            )


def check_quality(config: QualityConfig | None, data: "ImageConfig | ToyConfig") -> None:
    """Raises ValueError where the measures need what the data do not have."""
    if (
        config is not None
        and isinstance(config.network, ClassifierConfig)
        and isinstance(data, ImageConfig)
        and data.classes is None
    ):
        raise ValueError(
            "quality.network: the classifier needs labels, but data.classes is null; set data.classes, use the network inception, or quality null"
        )


def drawn(
    config: QualityConfig, classes: int | None, draw: Draw, seed: int, share: Share, device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's part of the `config.samples` samples, and their numbers; labels are dealt out in turn."""
    samples, numbers = [], torch.arange(share.rank, config.samples, share.world, device=device)
    for number_M in numbers.split(256):
        labels_M = number_M % classes if classes else torch.zeros_like(number_M)
        samples.append(draw(sample_keys(seed, number_M, "quality"), labels_M))
    return torch.cat(samples), numbers


@torch.no_grad()
def image_quality(
    config: QualityConfig, data: "ImageData", draw: Draw, seed: int, share: Share, gather: Gather, device: torch.device
) -> dict[str, float]:
    """Frechet distance, KID, precision, recall, density and coverage of samples against training images, with the scores of held-out images
    (the floor) and of Gaussian noise beside them."""
    from data.images.held_out import image_set

    network = feature_network(config.network, data, share, gather, device)
    image_MCHW, number_M = drawn(config, data.classes, draw, seed, share, device)
    quantised = (
        (image_MCHW.clamp(-1, 1) + 1) * 127.5
    ).round() / 127.5 - 1  # real images have 256 grey values: so have the samples
    parts = gather((network(quantised).cpu(), number_M.cpu()))
    generated = in_sample_order(torch.cat([part for part, _ in parts]), torch.cat([numbers for _, numbers in parts]))
    real = network((image_set(data.config, "train", config.samples)[0].float() / 127.5 - 1).to(device)).cpu()
    figures = _figures(config, real, generated)
    figures["diversity"] = (Moments.of(generated).covariance().trace() / Moments.of(real).covariance().trace()).item()
    if data.config.eval_source or data.config.held_out:
        held_out = network((image_set(data.config, "held_out", config.samples)[0].float() / 127.5 - 1).to(device)).cpu()
        if len(held_out) > config.neighbours:
            figures |= {f"held_out/{name}": value for name, value in _figures(config, real, held_out).items()}
    noise = network(
        normal(sample_keys(seed, torch.arange(config.samples), "noise images"), data.shape).clamp(-1, 1).to(device)
    ).cpu()
    return figures | {f"noise/{name}": value for name, value in _figures(config, real, noise).items()}


def _figures(config: QualityConfig, real_ND: Tensor, other_MD: Tensor) -> dict[str, float]:
    """In units of the real features' root mean square, as the scale of a network's features means nothing."""
    scale = real_ND.square().mean().sqrt()
    real_ND, other_MD = real_ND / scale, other_MD / scale
    distances = {
        "frechet_distance": frechet_distance(Moments.of(real_ND), Moments.of(other_MD)),
        "kid": kernel_distance(real_ND, other_MD),
    }
    return distances | manifold_overlap(real_ND, other_MD, config.neighbours)._asdict()


@torch.no_grad()
def point_quality(
    config: QualityConfig, data: "PointData", draw: Draw, seed: int, share: Share, gather: Gather, device: torch.device
) -> dict[str, float]:
    """Modes found, share of high-quality samples and reverse KL, with what a perfect sampler gets beside them."""
    points_MD, _ = drawn(config, None, draw, seed, share, device)
    coverage = reduce(operator.add, gather(ModeCoverage.of(points_MD, data.mixture)))
    ceiling = perfect_sampler(data.mixture, config.samples)
    found = {
        "modes": float(coverage.modes()),
        "high_quality": coverage.high_quality(),
        "reverse_kl": coverage.reverse_kl(data.mixture),
    }
    return found | {
        "modes_share": coverage.modes() / len(data.mixture.weights_K),
        "perfect/modes": ceiling.modes,
        "perfect/high_quality": ceiling.high_quality,
        "perfect/reverse_kl": ceiling.reverse_kl,
    }


def quality_alarms(config: QualityConfig | None, figures: Mapping[str, float]) -> list[str]:
    """A line for each figure that says that the samples collapse."""
    if config is None:
        return []
    words = {
        "diversity": "samples have {:.0%} of the diversity of the data",
        "modes_share": "samples reach {:.0%} of the modes of the data",
    }
    return [
        f"collapse: {text.format(figures[name])}, below {config.collapse_below:.0%}"
        for name, text in words.items()
        if figures.get(name, 1.0) < config.collapse_below
    ]
