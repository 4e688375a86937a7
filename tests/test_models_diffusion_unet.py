"""The U-Net against diffusers' UNet2DModel on the same weights."""

import pytest
import torch
from diffusers import UNet2DModel

from models.diffusion.diffusers_format import unet_arguments
from models.diffusion.unet import UNet, UNetConfig
from models.init import initialise


@pytest.mark.parametrize(
    ("config", "classes", "multiple"),
    [
        (UNetConfig(channels=(16, 32, 32), attention_levels=(1, 2), head_channels=8, norm_groups=8), None, 1),
        (UNetConfig(channels=(8, 16), layers_per_level=1, attention_levels=(0,), norm_groups=4), 10, 2),
    ],
)
def test_equals_diffusers_on_copied_weights(config: UNetConfig, classes: int | None, multiple: int) -> None:
    torch.manual_seed(0)
    ours = UNet(config, 3, 3 * multiple, classes)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = UNet2DModel(**unet_arguments(ours, 8))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 8, 8)
    t_M = torch.tensor([0, 3, 500, 999])
    labels_M = None if classes is None else torch.tensor([0, 3, 9, classes])
    actual = ours(x, t_M, labels_M)
    expected = theirs(x, t_M, class_labels=labels_M).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in ours.named_parameters()]
    for name, mine, other in zip(
        names,
        torch.autograd.grad(actual.square().mean(), list(ours.parameters())),
        torch.autograd.grad(expected.square().mean(), [theirs.get_parameter(name) for name in names]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5, msg=name)


def test_starts_by_predicting_nothing_and_every_parameter_learns() -> None:
    network = UNet(UNetConfig(channels=(8, 8), norm_groups=4), 1, 1, 10)
    initialise(network, seed=0)
    x = torch.randn(2, 1, 8, 8)
    t_M = torch.tensor([1, 700])
    assert network(x, t_M).abs().max() == 0
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (network(x, t_M, torch.tensor([3, 10])) - x).square().mean().backward()
        optimiser.step()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_missing_labels_mean_the_null_label() -> None:
    network = UNet(UNetConfig(channels=(8, 8), norm_groups=4), 1, 1, 10)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 1, 8, 8)
    t_M = torch.tensor([1, 700])
    torch.testing.assert_close(network(x, t_M), network(x, t_M, torch.tensor([10, 10])), rtol=0, atol=0)
    assert not torch.allclose(network(x, t_M), network(x, t_M, torch.tensor([3, 4])))


def test_what_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 20, not a multiple of norm_groups 8"):
        UNetConfig(channels=(16, 20), norm_groups=8)
    with pytest.raises(ValueError, match="attention_levels has 2, but channels has 2 levels"):
        UNetConfig(channels=(32, 32), attention_levels=(2,))
    network = UNet(UNetConfig(channels=(8, 8, 8), norm_groups=4), 1, 1)
    with pytest.raises(ValueError, match="6x6 cannot be halved 2 times"):
        network(torch.zeros(1, 1, 6, 6), torch.tensor([0]))
