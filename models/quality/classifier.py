"""A small convolutional classifier, whose features score generative models where no Inception
weights are available.

Its objective is trainer/objectives/images/feature_network.py. M samples, images in [-1, 1], F
features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import check_halvings
from models.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A convolutional classifier."""

    name: Literal["classifier"] = "classifier"
    """Selects this network."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of each level; every level halves the resolution."""
    features: int = 64
    """Width of the last hidden layer, from which sample quality is measured."""


class Classifier(nn.Module):
    """Images (M, C, H, W) -> logits (M, classes)."""

    def __init__(self, config: ClassifierConfig, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        check_halvings(shape, len(config.channels))
        layers: list[nn.Module] = []
        inputs = shape[0]
        for channels in config.channels:
            layers += [
                nn.Conv2d(inputs, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            inputs = channels
        width = inputs * (shape[1] >> len(config.channels)) * (shape[2] >> len(config.channels))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, config.features))
        self.head = nn.Linear(config.features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer of each image, shape (M, F)."""
        return F.relu(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def classifier_loss(logits: Tensor, labels_M: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, shape (M,)."""
    return cross_entropy(logits, labels_M)
