"""The networks that images are compared by: Inception from a file, and a trained classifier."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.config import ImageConfig
from data.share import Share
from models.quality.classifier import ClassifierConfig
from models.quality.inception import InceptionFeatures
from trainer.objectives.images.data import ImageData
from trainer.objectives.images.feature_network import InceptionConfig, feature_network, trained_weights

ALONE = Share(rank=0, world=1, global_batch=1, micro_batch=1)


def features_of(weights: Path) -> torch.Tensor:
    digits = ImageData(ImageConfig(classes=10), seed=0)
    network = feature_network(
        InceptionConfig(weights=str(weights)), digits, ALONE, lambda thing: [thing], torch.device("cpu")
    )
    with torch.no_grad():
        return network(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_inception_has_as_many_weights_as_torchvisions() -> None:
    helper = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000  # AuxLogits
    classifier = 2048 * 1000 + 1000
    assert sum(parameter.numel() for parameter in InceptionFeatures().parameters()) + helper + classifier == 27_161_264


def test_inception_takes_its_weights_from_either_kind_of_file(tmp_path: Path) -> None:
    state = InceptionFeatures().state_dict() | {"fc.weight": torch.zeros(2, 2), "AuxLogits.fc.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "inception.pth")
    save_file(state, tmp_path / "inception.safetensors")
    found = [features_of(tmp_path / name) for name in ("inception.pth", "inception.safetensors")]
    assert found[0].shape == (2, 2048)
    assert torch.equal(found[0], found[1])


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("other.pth", "missing.pth"):
        with pytest.raises(ValueError, match=rf"quality\.network\.weights: .*{name}: .*; name a file") as refusal:
            features_of(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_the_classifier_is_trained_once_and_knows_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.images.held_out import image_set

    monkeypatch.setenv("SWITCHWORK_CACHE", str(tmp_path))
    config = ClassifierConfig(channels=(16,), features=32)
    digits = ImageData(ImageConfig(classes=10), seed=0)
    weights = trained_weights(config, digits)
    (file,) = tmp_path.glob("classifier-*.safetensors")
    written = file.stat().st_mtime_ns
    again = trained_weights(config, digits)
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    from models.quality.classifier import Classifier

    network = Classifier(config, digits.shape, 10)
    network.load_state_dict(weights)
    images, labels = image_set(digits.config, "held_out")
    with torch.no_grad():
        assert (network(images.float() / 127.5 - 1).argmax(1) == labels).float().mean() > 0.93
