"""Denoising diffusion (Ho et al. 2020; Nichol & Dhariwal 2021) as an objective.

Networks and mathematics are in models/diffusion/.
Legend: M samples with values in [-1, 1], T timesteps, S strata of timesteps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch
from models.diffusion.bound import prior_term, vlb_term
from models.diffusion.losses import DiffusionConfig, diffusion_loss, loss_by_timestep, squared_error
from models.diffusion.networks import DiffusionNetworkConfig, build_diffusion_network
from models.diffusion.parameterisation import Denoiser, Prediction, clipped, denoiser, guided, predict, split_variance
from models.diffusion.samplers import Watch, ddim, ddpm, dpm_solver, timesteps
from models.diffusion.schedules import NoiseSchedule, betas
from models.diffusion.unet import UNetConfig
from models.random import derive, integers, normal, sample_keys, uniform
from trainer.core.protocols import SampleSet, Sums
from trainer.objectives.config import ExportFormat
from trainer.objectives.images.base import GenerativeObjective
from trainer.objectives.images.data import ImageData, ImageModelConfig, PointData, ToyConfig, cloud_of, grid_of
from trainer.objectives.images.quality import QualityConfig, check_quality

_BUCKETS = 10
_STRIP = 10


@dataclass(frozen=True, kw_only=True)
class DDPMSampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""

    name: Literal["ddpm"] = "ddpm"
    """Selects this sampler."""
    steps: int | None = None
    """Number of steps. null: all steps of the noise schedule."""


@dataclass(frozen=True, kw_only=True)
class DDIMSampler:
    """DDIM (Song et al. 2021)."""

    name: Literal["ddim"] = "ddim"
    """Selects this sampler."""
    steps: int = 50
    """Number of steps."""
    eta: float = 0.0
    """Noise per step. 0: deterministic. 1: as random as DDPM."""


@dataclass(frozen=True, kw_only=True)
class DPMSolverSampler:
    """DPM-Solver++(2M) (Lu et al. 2022)."""

    name: Literal["dpm_solver"] = "dpm_solver"
    """Selects this sampler."""
    steps: int = 20
    """Number of steps."""


SamplerConfig = DDPMSampler | DDIMSampler | DPMSolverSampler


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(ImageModelConfig):
    """A diffusion model, optionally class-conditional."""

    name: Literal["ddpm"] = "ddpm"
    """Selects this objective."""
    data: ImageConfig | ToyConfig = field(default_factory=ImageConfig)
    """Images, or points of a toy distribution."""
    network: DiffusionNetworkConfig = field(default_factory=UNetConfig)
    """The network: `unet` for images, `mlp` for points."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noise schedule, prediction target and loss."""
    conditional: bool = False
    """Condition the network on the class."""
    label_dropout: float = 0.1
    """Share of samples whose class is withheld in training.
    Classifier-free guidance needs it (Ho & Salimans 2022)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance in sampling. 1: no guidance."""
    sampler: SamplerConfig = field(default_factory=DDIMSampler)
    """The sampler that generates images."""
    bound_timesteps: int = 50
    """Number of strata of timesteps from which evaluation estimates the variational bound.
    0: it does not."""
    quality: QualityConfig | None = None
    """How samples are compared with real data. null: they are not."""

    def __post_init__(self) -> None:
        check_quality(self.quality, self.data)
        if self.conditional and not (isinstance(self.data, ImageConfig) and self.data.classes):
            raise ValueError(
                "conditional is true, but data.classes is not set; "
                "set it to the number of classes, or conditional to false"
            )
        if self.guidance != 1.0 and not self.conditional:
            raise ValueError(f"guidance is {self.guidance} without conditional; use 1, or conditional true")
        if self.sampler.steps and self.sampler.steps > self.diffusion.schedule.steps:
            most = self.diffusion.schedule.steps
            raise ValueError(f"sampler.steps is {self.sampler.steps}, but the schedule has {most}; use at most {most}")

    @property
    def export_format(self) -> ExportFormat | None:
        return "diffusers"


class DDPMObjective(GenerativeObjective):
    """The loss is the weighted squared error of the prediction, at one timestep per sample."""

    def __init__(self, config: DDPMConfig, seed: int):
        super().__init__(config.data, config.quality, config.group, seed)
        self.config = config
        self.classes = self.data.classes if config.conditional else None
        self.schedule = NoiseSchedule(betas(config.diffusion.schedule))
        self.model = build_diffusion_network(
            config.network, self.data.shape, config.diffusion.output_multiple, self.classes
        )
        self.networks: dict[str, nn.Module] = {"model": self.model}

    def _noised(self, batch: Batch, purpose: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, t (M,), noise and x_t of a batch, drawn from the numbers of its samples."""
        if self.schedule.betas_T.device != batch["sample"].device:
            self.schedule = self.schedule.to(batch["sample"].device)
        keys_M = sample_keys(self.seed, batch["sample"], purpose)
        x0 = self.data.values(batch)
        t_M = integers(derive(keys_M, "timestep"), self.schedule.steps)
        noise = normal(derive(keys_M, "noise"), self.data.shape)
        return x0, t_M, noise, self.schedule.diffuse(x0, t_M, noise)

    def _labels(self, batch: Batch) -> Tensor | None:
        """Classes (M,), some of them withheld; None for a network without classes."""
        if self.classes is None:
            return None
        dropped_M = uniform(sample_keys(self.seed, batch["sample"], "label dropout")) < self.config.label_dropout
        return batch["label"].where(~dropped_M, self.classes)

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        x0, t_M, noise, x_t = self._noised(batch, "diffusion")
        output = net(x_t, t_M, self._labels(batch))
        loss_M = diffusion_loss(self.config.diffusion, self.schedule, output, x0, t_M, noise)
        loss = loss_M.sum()
        return loss, {"loss": loss.detach().double(), "samples": t_M.new_tensor(len(t_M), dtype=torch.float64)}

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        x0, t_M, noise, x_t = self._noised(batch, "held-out diffusion")
        labels_M = batch["label"] if self.classes is not None else None
        output = nets["model"](x_t, t_M, labels_M)
        counts_M = batch["mask"]
        loss_M = diffusion_loss(self.config.diffusion, self.schedule, output, x0, t_M, noise)
        mean = split_variance(output, x0)[0]
        error_M = squared_error(self.config.diffusion.prediction, self.schedule, mean, x0, t_M, noise)
        buckets = loss_by_timestep(error_M[counts_M], t_M[counts_M], self.schedule.steps, _BUCKETS)
        sums = {"loss": loss_M[counts_M].sum().double(), "samples": counts_M.sum().double(), "buckets": buckets}
        if self._estimates_bound:
            sums |= self._bound(x0, labels_M, batch["sample"], counts_M)
        return sums

    def _bound(self, x0: Tensor, labels_M: Tensor | None, samples_M: Tensor, counts_M: Tensor) -> Sums:
        """The terms of the variational bound in bits per dimension: prior, decoder and KL.

        Each stratum of timesteps gives one KL term, at a timestep drawn per sample. The estimate is
        unbiased, and the same for every split into batches.
        """
        denoise = self._denoiser(labels_M, 1.0)
        keys_M = sample_keys(self.seed, samples_M, "bound")
        fixed, levels = self.config.diffusion.fixed_variance, self.config.diffusion.levels

        def term(t_M: Tensor, purpose: int) -> Tensor:
            x_t = self.schedule.diffuse(x0, t_M, normal(derive(keys_M, "noise", purpose), self.data.shape))
            term_M = vlb_term(self.schedule, denoise(x_t, t_M), x0, x_t, t_M, fixed=fixed, levels=levels)
            return term_M[counts_M].sum().double()

        strata = self.config.bound_timesteps
        width = (self.schedule.steps - 1) / strata
        shift_MS = uniform(derive(keys_M, "timestep"), (strata,)).double()
        t_MS = (shift_MS + torch.arange(strata, device=x0.device)) * width
        kl_S = torch.stack([term(1 + t_MS[:, stratum].long(), stratum + 1) for stratum in range(strata)])
        kl = kl_S.sum() * width
        prior = prior_term(self.schedule, x0)[counts_M].sum().double()
        return {"bound_prior": prior, "bound_kl": kl, "bound_decoder": term(torch.zeros_like(samples_M), 0)}

    @property
    def _estimates_bound(self) -> bool:
        """Whether evaluation estimates the variational bound, which images alone have."""
        return self.config.bound_timesteps > 0 and isinstance(self.data, ImageData)

    def report(self, sums: Sums) -> dict[str, float]:
        weight = sums["samples"].item()
        figures = {"loss": sums["loss"].item() / weight}
        evaluated = "buckets" in sums  # training measures the loss alone
        if evaluated:
            total, count = sums["buckets"]
            figures["l_simple"] = (total.sum() / count.sum()).item()
            figures |= {f"l_simple/bucket{i}": (total[i] / count[i]).item() for i in range(_BUCKETS) if count[i] > 0}
        if evaluated and self._estimates_bound:
            terms = {name: sums[f"bound_{name}"].item() / weight for name in ("prior", "kl", "decoder")}
            figures["bits_per_dimension"] = sum(terms.values())
            figures |= {f"bound/{name}": value for name, value in terms.items()}
        return figures

    def _denoiser(self, labels_M: Tensor | None, guidance: float) -> Denoiser:
        """The network as the samplers call it, with labels and guidance applied."""
        kind, schedule = self.config.diffusion.prediction, self.schedule
        inner = denoiser(lambda x_t, t_M: self.model(x_t, t_M, labels_M), kind, schedule)
        if labels_M is not None and guidance != 1.0:
            assert self.classes is not None, "labels come with classes"

            def network(x_t: Tensor, t_M: Tensor, labels: Tensor) -> Prediction:
                return predict(kind, schedule, self.model(x_t, t_M, labels), x_t, t_M)

            inner = guided(network, labels_M, self.classes, guidance)
        return clipped(inner, schedule) if isinstance(self.data, ImageData) else inner

    def draw_samples(self, keys_M: Tensor, labels_M: Tensor) -> Tensor:
        """Samples of the given classes, one per key."""
        return self._sampled(keys_M, labels_M)

    @torch.no_grad()
    def _sampled(self, keys_M: Tensor, labels_M: Tensor, watch: Watch | None = None) -> Tensor:
        """Samples, one per key; `watch` sees the estimate of the clean image at each step."""
        self.schedule = self.schedule.to(keys_M.device)
        denoise = self._denoiser(labels_M if self.classes is not None else None, self.config.guidance)
        x = normal(derive(keys_M, "start"), self.data.shape)
        watching = {"watch": watch} if watch else {}

        def noise(t: int) -> Tensor:
            return normal(derive(keys_M, "step", t), self.data.shape)

        match self.config.sampler:
            case DDPMSampler(steps=steps):
                times = timesteps(self.schedule.steps, steps or self.schedule.steps)
                return ddpm(denoise, self.schedule, x, times, noise, self.config.diffusion.fixed_variance, **watching)
            case DDIMSampler(steps=steps, eta=eta):
                return ddim(denoise, self.schedule, x, timesteps(self.schedule.steps, steps), noise, eta, **watching)
            case DPMSolverSampler(steps=steps):
                return dpm_solver(denoise, self.schedule, x, timesteps(self.schedule.steps, steps), **watching)

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """A grid of samples, and a strip of the estimates of the clean image from step to step."""
        seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        keys_M = sample_keys(seed, torch.arange(n, device=generator.device), "sample")
        labels_M = torch.arange(n, device=generator.device) % (self.classes or 1)
        seen: list[Tensor] = []
        x = self._sampled(keys_M, labels_M, watch=lambda t, x0: seen.append(x0[:8]))
        if isinstance(self.data, PointData):
            return SampleSet(images={"samples": cloud_of(x, self.data.mixture)})
        chosen = [seen[round(i * (len(seen) - 1) / (_STRIP - 1))] for i in range(_STRIP)]
        strip = torch.stack(chosen, dim=1).flatten(0, 1)
        return SampleSet(
            images={
                "samples": grid_of(x, columns=self.classes or round(n**0.5)),
                "denoising": grid_of(strip, columns=_STRIP),
            }
        )
