"""The network on whose features images are compared.

It is a classifier trained on the data set itself, or Inception from a file of weights.

Legend: N training images, M images in [-1, 1], D features.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.share import Share
from data.sources.cache import cache_folder
from models.init import initialise
from models.quality.classifier import Classifier, ClassifierConfig, classifier_loss
from models.quality.inception import InceptionFeatures
from trainer.core.protocols import Gather
from trainer.parsing import one_line

if TYPE_CHECKING:
    from trainer.objectives.images.data import ImageData

Features = Callable[[Tensor], Tensor]
"""Images (M, C, H, W) -> features (M, D)."""

_SEED = 0
_EPOCHS = 15
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Inception v3 (Szegedy et al. 2016), whose 2048 pooled features the FID usually compares."""

    name: Literal["inception"] = "inception"
    """Selects this network."""
    weights: str
    """File (.safetensors or .pth) with the weights of torchvision's `inception_v3`."""


FeatureConfig = ClassifierConfig | InceptionConfig


def feature_network(
    config: FeatureConfig, data: "ImageData", share: Share, gather: Gather, device: torch.device
) -> Features:
    """Builds the function from images to features that `config` names.

    Every rank calls it. Rank 0 trains the classifier unless it is in the cache.
    """
    match config:
        case ClassifierConfig():
            network = _classifier(config, data)
            weights = trained_weights(config, data) if share.rank == 0 else {}
            network.load_state_dict(gather(weights)[0])
            return _batched(network.eval().to(device).features)
        case InceptionConfig():
            return _batched(_inception(Path(config.weights)).eval().to(device))


def _batched(network: Features) -> Features:
    return lambda image_MCHW: torch.cat([network(part) for part in image_MCHW.split(256)])


def _classifier(config: ClassifierConfig, data: "ImageData") -> Classifier:
    assert data.classes is not None, "the objectives' configs refuse a classifier without classes"
    return Classifier(config, data.shape, data.classes)


def trained_weights(config: ClassifierConfig, data: "ImageData") -> dict[str, Tensor]:
    """Weights of the classifier trained on all training images of `data`.

    They come from the cache if the same classifier was trained before.
    """
    identity = json.dumps(
        [asdict(config), data.config.classes, data.manifest()["digest"], _SEED, _EPOCHS, _BATCH, torch.__version__],
        sort_keys=True,
    )
    file = cache_folder() / f"classifier-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        state = train_classifier(_classifier(config, data), data)
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        save_file(state, scratch)
        scratch.rename(file)
    return load_file(file)


@torch.enable_grad()
def train_classifier(network: Classifier, data: "ImageData") -> dict[str, Tensor]:
    """Trains with Adam at 1e-3 on all training images; returns the weights.

    The seed is fixed, so that every run on these data gets the same weights.
    """
    from data.images.held_out import image_set

    image_NCHW, label_N = image_set(data.config, "train")
    initialise(network, _SEED)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_EPOCHS):
        for chosen_M in torch.randperm(len(label_N), generator=generator).split(_BATCH):
            loss = classifier_loss(network(image_NCHW[chosen_M].float() / 127.5 - 1), label_N[chosen_M]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach().contiguous() for name, value in network.state_dict().items()}


def _inception(file: Path) -> InceptionFeatures:
    """Inception with the weights in `file`.

    Raises ValueError if the file is missing or does not hold such weights.
    """
    network = InceptionFeatures()
    try:
        state = _read_weights(file)
        # The file also holds the classifiers that follow the features.
        features = {name: value for name, value in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        network.load_state_dict(features)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        cause = one_line(error, 160)
        raise ValueError(
            f"quality.network.weights: {file}: {cause}; name a file with the weights of torchvision's inception_v3"
        ) from None
    return network


def _read_weights(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state
