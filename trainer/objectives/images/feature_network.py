"""The network whose features images are compared by: a classifier trained on the data set itself, or Inception from a file of weights.

M images in [-1, 1], D features.
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

_SEED, _EPOCHS, _BATCH = 0, 15, 64


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Inception v3 (Szegedy et al. 2016), whose 2048 pooled features the FID is usually made of."""

    name: Literal["inception"] = "inception"
    """Selects this network."""
    weights: str
    """File with the weights of torchvision's `inception_v3`, .safetensors or .pth."""


FeatureConfig = ClassifierConfig | InceptionConfig


def feature_network(
    config: FeatureConfig, data: "ImageData", share: Share, gather: Gather, device: torch.device
) -> Features:
    """The features that `config` names. Every rank calls it; rank 0 trains the classifier, where it is not in the cache yet."""
    match config:
        case ClassifierConfig():
            network = _classifier(config, data)
            network.load_state_dict(gather(trained_weights(config, data) if share.rank == 0 else {})[0])
            return _batched(network.eval().to(device).features)
        case InceptionConfig():
            return _batched(_inception(Path(config.weights)).eval().to(device))


def _batched(network: Features) -> Features:
    return lambda image_MCHW: torch.cat([network(part) for part in image_MCHW.split(256)])


def _classifier(config: ClassifierConfig, data: "ImageData") -> Classifier:
    assert data.classes is not None, "the objectives' configs refuse a classifier without classes"
    return Classifier(config, data.shape, data.classes)


def trained_weights(config: ClassifierConfig, data: "ImageData") -> dict[str, Tensor]:
    """Weights of the classifier trained on all training images of `data`; from the cache where the same one was trained before."""
    facts = json.dumps(
        [asdict(config), data.config.classes, data.manifest()["digest"], _SEED, _EPOCHS, _BATCH, torch.__version__],
        sort_keys=True,
    )
    file = cache_folder() / f"classifier-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        state = train_classifier(_classifier(config, data), data)
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        save_file(state, scratch)
        scratch.rename(file)
    return load_file(file)


@torch.enable_grad()
def train_classifier(network: Classifier, data: "ImageData") -> dict[str, Tensor]:
    """Adam at 1e-3 over all training images, with a fixed seed: the same weights for every run on this data."""
    from data.images.held_out import image_set

    image_NCHW, label_N = image_set(data.config, "train")
    initialise(network, _SEED)
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=1e-3), torch.Generator().manual_seed(_SEED)
    for _ in range(_EPOCHS):
        for chosen_M in torch.randperm(len(label_N), generator=generator).split(_BATCH):
            loss = classifier_loss(network(image_NCHW[chosen_M].float() / 127.5 - 1), label_N[chosen_M]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach().contiguous() for name, value in network.state_dict().items()}


def _inception(file: Path) -> InceptionFeatures:
    """Raises ValueError where the file is missing, or holds no such weights."""
    network = InceptionFeatures()
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        # The classifier and its helper, which come after the features, are in the file as well.
        network.load_state_dict(
            {name: value for name, value in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        )
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        cause = one_line(error, 160)
        raise ValueError(
            f"quality.network.weights: {file}: {cause}; name a file with the weights of torchvision's inception_v3"
        ) from None
    return network
