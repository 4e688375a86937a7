"""Spectral normalisation against the singular value decomposition and torch's own."""

import torch
from torch import nn

from models.gan.spectral import SpectralConv2d, SpectralEmbedding, SpectralLinear, renew_spectral_norms
from models.init import initialise


def test_sigma_is_the_largest_singular_value_once_converged() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([SpectralLinear(7, 5), SpectralConv2d(3, 6, 3, padding=1), SpectralEmbedding(4, 9)])
    for layer in layers:
        nn.init.normal_(layer.weight)
    for layer in layers:
        for _ in range(300):
            layer.spectral_norm.iterate(layer.weight)
        normalised = layer.spectral_norm(layer.weight).flatten(1)
        torch.testing.assert_close(torch.linalg.matrix_norm(normalised, ord=2), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_output_and_gradient_equal_torch_with_the_same_vectors() -> None:
    torch.manual_seed(0)
    ours = SpectralLinear(7, 5).eval()
    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(7, 5)).eval()
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "weight": state["parametrizations.weight.original"],
            "bias": state["bias"],
            "spectral_norm.u": state["parametrizations.weight.0._u"],
            "spectral_norm.v": state["parametrizations.weight.0._v"],
        }
    )
    x = torch.randn(3, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    (mine,) = torch.autograd.grad(ours(x).square().sum(), ours.weight)
    (other,) = torch.autograd.grad(theirs(x).square().sum(), theirs.parametrizations.weight.original)
    torch.testing.assert_close(mine, other)


def test_once_after_each_renewal_and_in_training_only() -> None:
    layer = SpectralConv2d(3, 6, 3)
    x = torch.randn(2, 3, 5, 5)
    seen = []
    initialise(layer, seed=0)
    nn.init.normal_(layer.weight)

    def moved(training: bool) -> bool:
        seen.append(layer.spectral_norm.u.clone())
        layer.train(training)(x).sum().backward()
        return not torch.equal(layer.spectral_norm.u, seen[-1])

    assert not moved(training=False)
    assert [moved(training=True) for _ in range(3)] == [True, False, False]
    renew_spectral_norms(layer)
    assert not moved(training=False)
    assert [moved(training=True) for _ in range(2)] == [True, False]


def test_iterating_between_forward_and_backward_does_not_break_the_backward_pass() -> None:
    layer = SpectralLinear(4, 4)
    loss = layer(torch.randn(2, 4)).square().sum()
    layer.spectral_norm.iterate(layer.weight)
    loss.backward()
    assert layer.weight.grad is not None


def test_initial_vectors_depend_on_the_seed_alone() -> None:
    layers = [nn.Sequential(SpectralLinear(4, 4)) for _ in range(2)]
    for layer in layers:
        torch.rand(1)
        initialise(layer, seed=3)
    for name, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[name]), name
