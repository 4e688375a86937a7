"""Parts shared by the GAN networks: packing, class projection, self-attention, and the
discriminator around a trunk.

M samples, P packs of consecutive samples (M = P * pack), F features, C channels, N positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gan.spectral import SpectralConv2d, SpectralEmbedding, linear


def pack_samples(x: Tensor, pack: int) -> Tensor:
    """Join each `pack` consecutive samples along channels: (M, C, ...) -> (M / pack, pack * C, ...)
    (Lin et al. 2018, PacGAN).

    Raises ValueError if M is not a multiple of `pack`.
    """
    if x.shape[0] % pack:
        raise ValueError(
            f"a batch of {x.shape[0]} samples does not divide into packs of {pack}; "
            "make the micro-batch a multiple of the pack"
        )
    return x.reshape(x.shape[0] // pack, pack * x.shape[1], *x.shape[2:])


class ClassEmbedding(nn.Embedding):
    """An embedding of classes whose vectors have a length of about 1."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


class Discriminator(nn.Module):
    """A trunk that maps packed samples to features, and a linear head with a class projection
    (Miyato & Koyama 2018, eq. 4)."""

    def __init__(self, trunk: nn.Module, features: int, *, num_classes: int | None, pack: int, spectral: bool) -> None:
        super().__init__()
        self.pack = pack
        self.num_classes = num_classes or 0
        self.trunk = trunk
        self.head = linear(features, 1, spectral=spectral)
        self.projection = None
        if num_classes is not None:
            self.projection = (SpectralEmbedding if spectral else ClassEmbedding)(num_classes * pack, features)

    def forward(self, x: Tensor, labels_M: Tensor | None = None) -> Tensor:
        """Return one logit per pack, shape (P,). Labels are needed if and only if the network is
        class-conditional."""
        h_PF = self.trunk(pack_samples(x, self.pack))
        logits_P: Tensor = self.head(h_PF).squeeze(1)
        if self.projection is None:
            return logits_P
        assert labels_M is not None, "a class-conditional discriminator needs labels"
        # Each position in a pack has class vectors of its own.
        position = torch.arange(self.pack, device=labels_M.device) * self.num_classes
        y: Tensor = logits_P + (self.projection(labels_M.unflatten(0, (-1, self.pack)) + position).sum(1) * h_PF).sum(1)
        return y


class LabelledLatent(nn.Module):
    """Appends the class vector to z: (M, width). Without classes it returns z itself."""

    def __init__(self, latent: int, num_classes: int | None, embedding: int = 32) -> None:
        super().__init__()
        self.classes = None if num_classes is None else nn.Embedding(num_classes, embedding)
        self.width = latent if num_classes is None else latent + embedding

    def forward(self, z: Tensor, labels_M: Tensor | None) -> Tensor:
        if self.classes is None:
            return z
        assert labels_M is not None, "a class-conditional generator needs labels"
        return torch.cat([z, self.classes(labels_M).to(z.dtype)], dim=1)


class ImageSelfAttention(nn.Module):
    """Self-attention over a quarter of the keys, scaled by a gain that starts at 0 (Zhang et al.
    2019, SAGAN, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query = SpectralConv2d(channels, inner, 1, bias=False)
        self.key = SpectralConv2d(channels, inner, 1, bias=False)
        self.value = SpectralConv2d(channels, channels // 2, 1, bias=False)
        self.output = SpectralConv2d(channels // 2, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        query_MNC = self.query(x).flatten(2).transpose(1, 2)
        key_MCN = F.max_pool2d(self.key(x), 2).flatten(2)
        value_MCN = F.max_pool2d(self.value(x), 2).flatten(2)
        # Written out, because a gradient penalty needs second derivatives, which fused attention
        # kernels lack.
        attention_MNN = torch.softmax(query_MNC @ key_MCN, dim=-1)
        attended = (value_MCN @ attention_MNN.transpose(1, 2)).unflatten(2, x.shape[2:])
        y: Tensor = x + self.gain * self.output(attended)
        return y


def append_group_std(x: Tensor, group: int) -> Tensor:
    """Append a channel with the mean standard deviation over each `group` consecutive samples
    (Karras et al. 2018, section 3).

    Raises ValueError if the number of samples is not a multiple of `group`.
    """
    if x.shape[0] % group:
        raise ValueError(
            f"a batch of {x.shape[0]} packs does not divide into groups of {group} for the standard deviation; "
            "make the micro-batch a multiple of it"
        )
    variance = x.unflatten(0, (-1, group)).var(dim=1, correction=0)
    std = (variance + 1e-8).sqrt().flatten(1).mean(1).repeat_interleave(group)
    return torch.cat([x, std.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], dim=1)
