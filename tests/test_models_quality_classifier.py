"""The feature network learns, and gives features of the width it promises."""

import torch
from sklearn.datasets import load_digits

from models.init import initialise
from models.quality.classifier import Classifier, ClassifierConfig, classifier_loss


def test_reads_the_digits_after_a_few_epochs() -> None:
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    network = Classifier(ClassifierConfig(channels=(16, 32), features=24), (1, 8, 8), 10)
    initialise(network, seed=0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        index = torch.randint(0, 1500, (64,), generator=generator)
        optimiser.zero_grad()
        classifier_loss(network(x[index]), labels[index]).mean().backward()
        optimiser.step()
    with torch.no_grad():
        accuracy = (network(x[1500:]).argmax(1) == labels[1500:]).float().mean().item()
        assert network.features(x[:5]).shape == (5, 24)
    assert accuracy > 0.85
