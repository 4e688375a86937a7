"""Spectral normalisation (Miyato et al. 2018) whose power iteration runs once per optimiser step,
not once per forward pass.

torch's own runs in every forward pass, so that gradient accumulation and extra passes (of the other
network's phase, of a gradient penalty) change the result. Here `renew_spectral_norms(network)` is
called after each optimiser step, and the next forward pass in training runs one iteration. It runs
inside the layer's own call, because there the weight is complete even if it is sharded between
calls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNorm(nn.Module):
    """Estimates the largest singular value of a weight, as a matrix of shape (outputs, all other
    dimensions)."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.register_buffer("u", torch.zeros(rows))
        self.register_buffer("v", torch.zeros(columns))
        self.due = True
        """Whether the next forward pass in training iterates. True at the start of a resumed run,
        as after any step."""

    @torch.no_grad()
    def restart(self, weight: Tensor, iterations: int = 15) -> None:
        """Draw u from torch's global generator, and iterate until it fits `weight` well."""
        self.u.copy_(F.normalize(torch.randn_like(self.u), dim=0))
        for _ in range(iterations):
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Run one power iteration (Miyato et al. 2018, algorithm 1)."""
        matrix = weight.flatten(1).to(self.u)
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight divided by its largest singular value. The gradient flows through both
        (Miyato et al. 2018, section 2.1)."""
        if self.due and self.training:
            self.iterate(weight)
            self.due = False
        with torch.autocast(weight.device.type, enabled=False):
            # Clones, because the next power iteration would otherwise change the tensors saved for
            # the backward pass.
            sigma = self.u.clone() @ (weight.flatten(1).to(self.u) @ self.v.clone())
        return weight / sigma.to(weight.dtype)


class SpectralLinear(nn.Linear):
    """A linear layer of spectral norm 1."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.spectral_norm = SpectralNorm(self.weight)
        self.spectral_norm.restart(self.weight)

    def reset_parameters(self) -> None:
        _orthogonal(self, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.spectral_norm(self.weight), self.bias)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose kernel, as a matrix of shape (outputs, inputs * height * width), has
    spectral norm 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        self.spectral_norm = SpectralNorm(self.weight)
        self.spectral_norm.restart(self.weight)

    def reset_parameters(self) -> None:
        _orthogonal(self, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.spectral_norm(self.weight), self.bias)
        return y


class SpectralEmbedding(nn.Embedding):
    """An embedding whose table has spectral norm 1."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.spectral_norm = SpectralNorm(self.weight)
        self.spectral_norm.restart(self.weight)

    def reset_parameters(self) -> None:
        _orthogonal(self, None)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.spectral_norm(self.weight))


SpectralLayer = SpectralLinear | SpectralConv2d | SpectralEmbedding


def _orthogonal(layer: SpectralLayer, bias: Tensor | None) -> None:
    """Initialise with orthogonal weights (Brock et al. 2019, section 3), zero biases, and singular
    vectors that fit."""
    nn.init.orthogonal_(layer.weight)
    if bias is not None:
        nn.init.zeros_(bias)
    # torch's constructors call this before the sub-module exists.
    if "spectral_norm" in dict(layer.named_children()):
        layer.spectral_norm.restart(layer.weight)


def renew_spectral_norms(network: nn.Module) -> None:
    """Let every spectrally normalised layer of `network` run one power iteration in its next
    forward pass in training. Call it once after each optimiser step."""
    for module in network.modules():
        if isinstance(module, SpectralNorm):
            module.due = True


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, *, spectral: bool, bias: bool = True
) -> nn.Conv2d:
    """Build a convolution, spectrally normalised or plain."""
    kind = SpectralConv2d if spectral else nn.Conv2d
    return kind(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)


def linear(inputs: int, outputs: int, *, spectral: bool, bias: bool = True) -> nn.Linear:
    """Build a linear layer, spectrally normalised or plain."""
    return (SpectralLinear if spectral else nn.Linear)(inputs, outputs, bias)
