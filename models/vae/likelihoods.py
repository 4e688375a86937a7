"""The likelihoods p(x | z) of a VAE, which score an image under a decoder's output.

Data x are in [0, 1], shape (M, C, ...) for M samples of C channels. A decoder returns
`parameters_per_value` * C channels. Every `log_prob` sums over the dimensions of a sample: shape
(M,), in nats.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import binary_cross_entropy


@dataclass(frozen=True, kw_only=True)
class BernoulliConfig:
    """Independent binary pixels. For pixels between 0 and 1 this is the usual cross-entropy, which
    is not a density."""

    name: Literal["bernoulli"] = "bernoulli"
    """Selects this likelihood."""


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Independent Gaussian pixels."""

    name: Literal["gaussian"] = "gaussian"
    """Selects this likelihood."""
    variance: Literal["fixed", "shared", "per_pixel"] = "shared"
    """`fixed`: `std` itself; `shared`: one learned standard deviation that starts at `std`;
    `per_pixel`: predicted by the decoder."""
    std: float = 0.1
    """Standard deviation of a pixel, in units of x; unused if `per_pixel`."""

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"likelihood.std is {self.std}, which must be above 0; use 0.1, for example")


@dataclass(frozen=True, kw_only=True)
class DiscretisedLogisticConfig:
    """A logistic density integrated over each of `levels` grey values: a probability, so that its
    bits can be compared with a codec's."""

    name: Literal["discretised_logistic"] = "discretised_logistic"
    """Selects this likelihood."""
    levels: int = 256
    """Number of grey values, at 0, 1 / (levels - 1), ..., 1."""

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(
                f"likelihood.levels is {self.levels}, but an image has at least 2 grey values; use 256 for bytes"
            )


LikelihoodConfig = BernoulliConfig | GaussianConfig | DiscretisedLogisticConfig


class Likelihood(nn.Module):
    """Interface of a likelihood, as the VAE uses it."""

    parameters_per_value: int = 1
    discrete: bool = False
    """Whether `log_prob` is a probability, whose bits per dimension are at least 0, rather than a
    density."""

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Compute `log_prob` as a call of the module, because sharded parameters are gathered
        around calls."""
        return self.log_prob(output, x)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | output) in nats, shape (M,)."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """Return the expected image, of the shape of x."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Bernoulli likelihood; the decoder returns logits."""

    discrete = True

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return -binary_cross_entropy(output, x).flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()


class Gaussian(Likelihood):
    """Gaussian likelihood; the decoder returns means, and log standard deviations if
    `per_pixel`."""

    smallest_log_std = -6.0
    """Lower bound of a predicted log standard deviation: below it, a perfectly fitted pixel (a
    black border) would send the density to infinity."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config
        self.parameters_per_value = 2 if config.variance == "per_pixel" else 1
        if config.variance == "shared":
            self.log_std = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the learned standard deviation, if there is one, at `std`."""
        nn.init.constant_(self.log_std, math.log(self.config.std))

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        match self.config.variance:
            case "fixed":
                return output, torch.full_like(output, math.log(self.config.std))
            case "shared":
                return output, self.log_std.expand_as(output)
            case "per_pixel":
                mean, log_std = output.chunk(2, dim=1)
                return mean, self.smallest_log_std + F.softplus(log_std - self.smallest_log_std)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        mean, log_std = self._moments(output)
        standardised = (x - mean) * torch.exp(-log_std)
        return (-0.5 * standardised.square() - log_std - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        return output.chunk(2, dim=1)[0] if self.config.variance == "per_pixel" else output


class DiscretisedLogistic(Likelihood):
    """Discretised logistic likelihood; the decoder returns means and log scales (Kingma et al.
    2016, eq. 17; Salimans et al. 2017, eq. 2)."""

    parameters_per_value = 2
    discrete = True
    smallest_log_scale = -7.0

    def __init__(self, config: DiscretisedLogisticConfig) -> None:
        super().__init__()
        self.levels = config.levels

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = output.chunk(2, dim=1)
        inverse_scale = torch.exp(-log_scale.clamp_min(self.smallest_log_scale))
        half = 0.5 / (self.levels - 1)
        upper = (x - mean + half) * inverse_scale
        lower = (x - mean - half) * inverse_scale
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no cancellation far
        # from the mean. The outermost values include the whole tail.
        first = x < half
        last = x > 1 - half
        log_width = torch.log(-torch.expm1(-2 * half * inverse_scale))
        log_p = (
            F.logsigmoid(upper).masked_fill(last, 0.0)
            + F.logsigmoid(-lower).masked_fill(first, 0.0)
            + log_width.masked_fill(first | last, 0.0)
        )
        return log_p.flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        return output.chunk(2, dim=1)[0].clamp(0.0, 1.0)


def build_likelihood(config: LikelihoodConfig) -> Likelihood:
    """Build the likelihood that `config` names."""
    match config:
        case BernoulliConfig():
            return Bernoulli()
        case GaussianConfig():
            return Gaussian(config)
        case DiscretisedLogisticConfig():
            return DiscretisedLogistic(config)
