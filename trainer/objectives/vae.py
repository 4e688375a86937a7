"""The variational autoencoder (Kingma & Welling 2014) as an objective.

Networks and mathematics are in models/vae/.
Legend: M samples, L latent dimensions, K importance samples, S points of an interpolation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch
from models.random import normal, sample_keys
from models.vae.elbo import LatentStatistics, bits_per_dimension, free_bits, importance_bound, kl_weight
from models.vae.likelihoods import GaussianConfig, LikelihoodConfig
from models.vae.network import VAE, ConvVAEConfig, VAENetworkConfig
from trainer.core.protocols import SampleSet, Sums
from trainer.objectives.images.base import GenerativeObjective
from trainer.objectives.images.data import ImageModelConfig, grid_of
from trainer.objectives.images.quality import QualityConfig, check_quality

_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class VAEConfig(ImageModelConfig):
    """A VAE with a Gaussian posterior and the prior N(0, I)."""

    name: Literal["vae"] = "vae"
    """Selects this objective."""
    data: ImageConfig = field(default_factory=ImageConfig)
    """The images to train on."""
    network: VAENetworkConfig = field(default_factory=ConvVAEConfig)
    """Encoder and decoder."""
    likelihood: LikelihoodConfig = field(default_factory=GaussianConfig)
    """The distribution p(x | z) of an image given its latent code."""
    beta: float = 1.0
    """Weight of the KL term (Higgins et al. 2017). 1: the ELBO."""
    kl_warmup_steps: int = 0
    """Number of steps in which the weight of the KL term rises from 0 to `beta`."""
    free_bits: float = 0.0
    """Nats per latent dimension that cost nothing (Kingma et al. 2016)."""
    free_bits_group: int = 1
    """Number of consecutive samples whose mean KL per dimension is compared with `free_bits`."""
    importance_samples: int = 64
    """Samples per image of the importance-weighted bound in evaluation (Burda et al. 2016)."""
    quality: QualityConfig | None = None
    """How generated images are compared with real ones. null: they are not."""

    def __post_init__(self) -> None:
        check_quality(self.quality, self.data)

    @property
    def group(self) -> int:
        return self.free_bits_group if self.free_bits else 1


class VAEObjective(GenerativeObjective):
    """The loss is the negative ELBO in nats per sample."""

    def __init__(self, config: VAEConfig, seed: int):
        super().__init__(config.data, config.quality, config.group, seed)
        self.config = config
        self.model = VAE(config.network, config.likelihood, self.data.shape)
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.dimensions = math.prod(self.data.shape)

    def _values(self, batch: Batch) -> Tensor:
        """Images in [0, 1], as the likelihoods expect them."""
        return (self.data.values(batch) + 1) / 2

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        keys_M = sample_keys(self.seed, batch["sample"], "posterior")
        elbo = net(self._values(batch), normal(keys_M, (self.model.latent,)))
        kl_M = elbo.kl_ML.sum(1)
        charged_M = kl_M
        if self.config.free_bits:
            charged_M = free_bits(elbo.kl_ML, self.config.free_bits, self.config.free_bits_group)
        weight = kl_weight(step, self.config.beta, self.config.kl_warmup_steps)
        loss = -(elbo.log_likelihood_M - weight * charged_M).sum()
        return loss, {"loss": loss.detach().double()} | _parts(elbo.log_likelihood_M, kl_M, torch.ones_like(kl_M))

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        x = self._values(batch)
        keys_M = sample_keys(self.seed, batch["sample"], "held-out posterior")
        mask_M = batch["mask"].float()
        noise_MKL = normal(keys_M, (self.config.importance_samples + 1, self.model.latent))
        elbo = nets["model"](x, noise_MKL[:, 0])
        kl_M = elbo.kl_ML.sum(1)
        bound_M = importance_bound(self.model.log_weights(x, noise_MKL[:, 1:].transpose(0, 1)))
        sums = _parts(elbo.log_likelihood_M, kl_M, mask_M) | {"importance": (bound_M * mask_M).sum().double()}
        sums["loss"] = sums["kl"] - sums["log_likelihood"]
        counts_M = batch["mask"]
        latent = LatentStatistics.of(elbo.mean_ML[counts_M], elbo.log_var_ML[counts_M])
        return sums | {"kl_L": latent.kl_L, "mean_L": latent.mean_L, "square_L": latent.square_L}

    def report(self, sums: Sums) -> dict[str, float]:
        weight = sums["samples"].item()
        elbo = (sums["log_likelihood"] - sums["kl"]).item() / weight
        figures = {
            "loss": sums["loss"].item() / weight,
            "elbo": elbo,
            "bits_per_dimension": self._bits(elbo),
            "reconstruction": sums["log_likelihood"].item() / weight,
            "kl": sums["kl"].item() / weight,
        }
        evaluated = "importance" in sums  # training has neither the bound nor the latents' statistics
        return figures | self._held_out_figures(sums) if evaluated else figures

    def _held_out_figures(self, sums: Sums) -> dict[str, float]:
        """The importance-weighted bound, and the use of each latent dimension."""
        bound = sums["importance"].item() / sums["samples"].item()
        figures = {f"iwae_{self.config.importance_samples}": bound, "iwae_bits_per_dimension": self._bits(bound)}
        latent = LatentStatistics(
            count=sums["samples"], kl_L=sums["kl_L"], mean_L=sums["mean_L"], square_L=sums["square_L"]
        )
        figures["active_dimensions"] = float((latent.activity() > 0.01).sum())
        for index, (kl, activity) in enumerate(zip(latent.kl().tolist(), latent.activity().tolist(), strict=True)):
            figures |= {f"latent_kl/{index}": kl, f"latent_activity/{index}": activity}
        return figures

    def _bits(self, nats: float) -> float:
        bin_width = 1.0 if self.model.likelihood.discrete else 1 / 255
        return bits_per_dimension(torch.tensor(nats, dtype=torch.float64), self.dimensions, bin_width).item()

    def draw_samples(self, keys_M: Tensor, labels_M: Tensor) -> Tensor:
        """Images in [-1, 1] from the prior, one per key."""
        return self.model.generate(normal(keys_M, (self.model.latent,))) * 2 - 1

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """Prior samples, originals next to reconstructions, and interpolations between images."""
        z_ML = torch.randn(n, self.model.latent, generator=generator, device=generator.device)
        images = {"prior": grid_of(self.model.generate(z_ML) * 2 - 1, columns=round(n**0.5))}
        real = self._real_images(min(n, _SHOWN)).to(generator.device)
        pairs = torch.stack([real, self.model.reconstruct((real + 1) / 2) * 2 - 1], dim=1).flatten(0, 1)
        images["reconstructions"] = grid_of(pairs, columns=2 * max(1, round(len(real) ** 0.5 / 2)))
        if len(real) > 1:
            mean_ML = self.model.encode((real[: len(real) // 2 * 2] + 1) / 2)[0]
            t_S11 = torch.linspace(0, 1, 10, device=generator.device)[:, None, None]
            path_SML = torch.lerp(mean_ML[0::2], mean_ML[1::2], t_S11)[:, :8]
            path = self.model.generate(path_SML.transpose(0, 1).flatten(0, 1)) * 2 - 1
            images["interpolations"] = grid_of(path, columns=10)
        return SampleSet(images=images)

    def _real_images(self, n: int) -> Tensor:
        """The first `n` held-out images, in [-1, 1]; training images where none are held out."""
        from data.images.held_out import image_set

        split: Literal["train", "held_out"] = "held_out" if self.config.data.held_out else "train"
        return image_set(self.config.data, split, n)[0].float() / 127.5 - 1


def _parts(log_likelihood_M: Tensor, kl_M: Tensor, mask_M: Tensor) -> Sums:
    return {
        "log_likelihood": (log_likelihood_M.detach() * mask_M).sum().double(),
        "kl": (kl_M.detach() * mask_M).sum().double(),
        "samples": mask_M.sum().double(),
    }
