"""Generative adversarial networks (Goodfellow et al. 2014): two networks, two phases.

Networks and mathematics are in models/gan/.
Legend: M samples, P packs of consecutive samples (M = P * pack).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch
from models.gan.batch_norm import fold_batch_statistics
from models.gan.dcgan import DCGANConfig
from models.gan.losses import (
    GanLoss,
    PenaltyConfig,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    jensen_shannon_estimate,
    r1_penalty,
    value,
)
from models.gan.networks import GanNetworkConfig, build_discriminator, build_generator, samples_together
from models.gan.spectral import renew_spectral_norms
from models.random import derive, normal, sample_keys, uniform
from trainer.core.protocols import SampleSet, Sums
from trainer.objectives.images.base import GenerativeObjective
from trainer.objectives.images.data import ImageModelConfig, PointData, ToyConfig, cloud_of, grid_of
from trainer.objectives.images.quality import QualityConfig, check_quality


@dataclass(frozen=True, kw_only=True)
class GanConfig(ImageModelConfig):
    """A generator and a discriminator."""

    name: Literal["gan"] = "gan"
    """Selects this objective."""
    data: ImageConfig | ToyConfig = field(default_factory=ImageConfig)
    """Images, or points of a toy distribution."""
    network: GanNetworkConfig = field(default_factory=DCGANConfig)
    """The pair of networks."""
    loss: GanLoss = "non_saturating"
    """The pair of losses that the networks minimise."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """Gradient penalties on the discriminator."""
    pack: int = 1
    """Number of samples that the discriminator judges together (PacGAN, Lin et al. 2018)."""
    conditional: bool = False
    """Condition both networks on the class."""
    generator_every: int = 1
    """Optimiser steps of the discriminator per step of the generator.
    5 is usual with `wasserstein`."""
    discriminator_rate: float = 1.0
    """Learning rate of the discriminator, divided by run.optimizer.lr.
    Two time scales: Heusel et al. 2017."""
    generator_rate: float = 1.0
    """Learning rate of the generator, divided by run.optimizer.lr."""
    quality: QualityConfig | None = None
    """How samples are compared with real data. null: they are not."""

    def __post_init__(self) -> None:
        check_quality(self.quality, self.data)
        if self.conditional and not (isinstance(self.data, ImageConfig) and self.data.classes):
            raise ValueError(
                "conditional is true, but data.classes is not set; "
                "set it to the number of classes, or conditional to false"
            )
        for name in ("pack", "generator_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        mixes = isinstance(self.network, DCGANConfig) and self.network.discriminator_norm == "batch"
        if self.needs_second_derivatives and mixes:
            raise ValueError(
                "penalty: batch norm in the discriminator would mix its samples; "
                "set network.discriminator_norm to spectral or none"
            )

    @property
    def group(self) -> int:
        return samples_together(self.network, self.pack)

    @property
    def needs_second_derivatives(self) -> bool:
        return max(self.penalty.r1, self.penalty.r2, self.penalty.gradient_penalty) > 0


class GanObjective(GenerativeObjective):
    """The losses are means over packs."""

    phases: tuple[str, ...] = ("discriminator", "generator")
    averaged: tuple[str, ...] = ("generator",)

    def __init__(self, config: GanConfig, seed: int):
        super().__init__(config.data, config.quality, config.group, seed)
        self.config = config
        classes = self.classes = self.data.classes if config.conditional else None
        self.generator = build_generator(config.network, self.data.shape, classes)
        self.discriminator: nn.Module = build_discriminator(config.network, self.data.shape, classes, config.pack)
        self.networks: dict[str, nn.Module] = {"discriminator": self.discriminator, "generator": self.generator}
        self.rates = {"discriminator": config.discriminator_rate, "generator": config.generator_rate}

    def weight(self, phase: str, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["sample"]) / self.config.pack, dtype=torch.float64)

    def is_due(self, phase: str, step: int) -> bool:
        return phase == "discriminator" or (step + 1) % self.config.generator_every == 0

    def _labels(self, batch: Batch) -> Tensor | None:
        return batch["label"] if self.classes is not None else None

    def _latent(self, batch: Batch, phase: str) -> Tensor:
        return normal(sample_keys(self.seed, batch["sample"], "latent", phase), (self.config.network.latent,))

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        if phase == "discriminator":
            return self._discriminator_loss(net, batch, step)
        labels_M = self._labels(batch)
        fake_P = self.discriminator(net(self._latent(batch, phase), labels_M), labels_M)
        real_P = fake_P
        if self.config.loss == "relativistic":
            with torch.no_grad():
                real_P = self.discriminator(self.data.values(batch), labels_M)
        loss = generator_loss(self.config.loss, fake_P, real_P).sum()
        return loss, {"generator_loss": loss.detach().double(), "generator_packs": _count(fake_P)}

    def _discriminator_loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        labels_M = self._labels(batch)
        real = self.data.values(batch)
        with torch.no_grad():
            fake = self.generator(self._latent(batch, "discriminator"), labels_M)
        both_labels = None if labels_M is None else torch.cat([labels_M, labels_M])
        real_P, fake_P = net(torch.cat([real, fake]), both_labels).chunk(2)
        loss = discriminator_loss(self.config.loss, real_P, fake_P).sum()
        sums = {"discriminator_loss": loss.detach().double()} | _verdicts(real_P, fake_P, torch.ones_like(real_P))
        if self.config.needs_second_derivatives and step % self.config.penalty.every == 0:
            penalty = self._penalty(real, fake, labels_M, batch["sample"]).sum()
            loss = loss + self.config.penalty.every * penalty
            sums |= {"penalty": penalty.detach().double(), "penalty_packs": _count(real_P)}
        return loss, sums

    def _penalty(self, real: Tensor, fake: Tensor, labels_M: Tensor | None, samples_M: Tensor) -> Tensor:
        """The gradient penalties, (P,).

        They go through the plain discriminator, because engines take no second derivatives.
        """
        penalty = self.config.penalty
        total_P = real.new_zeros(len(real) // self.config.pack)
        for samples, gamma in ((real, penalty.r1), (fake, penalty.r2)):
            if gamma:
                x = samples.detach().requires_grad_()
                total_P = total_P + r1_penalty(self.discriminator(x, labels_M), x, gamma)
        if penalty.gradient_penalty:
            mix_P = uniform(sample_keys(self.seed, samples_M[:: self.config.pack], "gradient penalty"))

            def judged(x: Tensor) -> Tensor:
                return self._judge(x, labels_M)

            total_P = total_P + gradient_penalty(judged, real, fake, mix_P, penalty.gradient_penalty)
        return total_P

    def _judge(self, x: Tensor, labels_M: Tensor | None) -> Tensor:
        """The discriminator's logit per pack, (P,)."""
        logits_P: Tensor = self.discriminator(x, labels_M)
        return logits_P

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        labels_M = self._labels(batch)
        real_P = nets["discriminator"](self.data.values(batch), labels_M)
        fake_P = nets["discriminator"](nets["generator"](self._latent(batch, "held out"), labels_M), labels_M)
        return _verdicts(real_P, fake_P, batch["mask"].unflatten(0, (-1, self.config.pack)).all(1).float())

    def report(self, sums: Sums) -> dict[str, float]:
        packs = sums["packs"].item()
        mean_value = sums["value"].item() / packs
        figures = {
            "d_real": sums["d_real"].item() / packs,
            "d_fake": sums["d_fake"].item() / packs,
            "value": mean_value,
        }
        # With these losses alone the logit estimates log p_data - log p_generated.
        if self.config.loss in ("minimax", "non_saturating"):
            figures["jensen_shannon_estimate"] = jensen_shannon_estimate(mean_value)
            figures["jensen_shannon_bound"] = math.log(2)
        trained = "discriminator_loss" in sums  # evaluation has no losses
        if trained:
            loss = sums["discriminator_loss"].item() / packs
            figures |= {"loss": loss, "loss/discriminator": loss}
        # The generator is updated, and penalties are taken, in some steps only.
        if "generator_loss" in sums:
            figures["loss/generator"] = (sums["generator_loss"] / sums["generator_packs"]).item()
        if "penalty" in sums:
            figures["gradient_penalty"] = (sums["penalty"] / sums["penalty_packs"]).item()
        return figures

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        for network in self.networks.values():
            fold_batch_statistics(network, add_over_ranks)
            renew_spectral_norms(network)

    @torch.no_grad()
    def draw_samples(self, keys_M: Tensor, labels_M: Tensor) -> Tensor:
        """Samples of the given classes, one per key."""
        z = normal(derive(keys_M, "latent"), (self.config.network.latent,))
        samples: Tensor = self.generator(z, labels_M if self.classes is not None else None)
        return samples

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """A grid of samples; of toy data, a scatter plot of 2,500."""
        device = generator.device
        count = 2500 if isinstance(self.data, PointData) else n
        seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
        keys_M = sample_keys(seed, torch.arange(count, device=device), "sample")
        x = self.draw_samples(keys_M, torch.arange(count, device=device) % (self.classes or 1))
        if isinstance(self.data, PointData):
            return SampleSet(images={"samples": cloud_of(x, self.data.mixture)})
        return SampleSet(images={"samples": grid_of(x, columns=self.classes or round(n**0.5))})


def _count(logits_P: Tensor) -> Tensor:
    return torch.tensor(len(logits_P), dtype=torch.float64, device=logits_P.device)


def _verdicts(real_P: Tensor, fake_P: Tensor, mask_P: Tensor) -> Sums:
    """Sums of D(x), D(G(z)) and V(D, G)."""
    real = real_P.detach().double()
    fake = fake_P.detach().double()
    return {
        "d_real": (real.sigmoid() * mask_P).sum(),
        "d_fake": (fake.sigmoid() * mask_P).sum(),
        "value": (value(real, fake) * mask_P).sum(),
        "packs": mask_P.sum().double(),
    }
