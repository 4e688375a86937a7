"""Contrastive objectives: two views of an image (SimCLR), with negatives from the whole global batch.

The loss of a pair depends on all others of the step. So `prepare` embeds all micro-batches without gradients, computes the loss and its
gradient by each embedding once, over all ranks, and gives each micro-batch its part; `loss` embeds it again, and its gradient is that of
<cached gradient, embedding>. Summed over micro-batches and ranks this is exactly the gradient of the loss of the whole batch.

The mathematics is in models/contrastive/. M samples, F features, P width of an embedding.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch, Share
from models.contrastive.augment import AugmentConfig, augment
from models.contrastive.losses import Embedded, PairLoss, clamped, leads_out, nt_xent
from models.contrastive.towers import ConvEncoderConfig, TwoTowers, TwoViews
from models.init import initialise
from models.random import derive, sample_keys
from trainer.core.protocols import Gather, GatherRows, SampleSet, Sums
from trainer.objectives.images.base import ImageObjective
from trainer.objectives.images.data import ImageData, ImageModelConfig, grid_of
from trainer.objectives.images.feature_quality import (
    Parts,
    ProbeConfig,
    class_figures,
    compute_over_split,
    once,
    pair_figures,
)

_NEIGHBOURS_SHOWN = 9


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ImageModelConfig):
    """The base of the objectives that compare pairs."""

    data: ImageConfig = field(default_factory=ImageConfig)
    """Images; labels serve measures alone."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are varied."""
    chunk: int = 4096
    """Candidates whose logits are in memory at a time, for each pair of this rank."""
    quality: ProbeConfig | None = field(default_factory=ProbeConfig)
    """How the features are measured; null: not at all."""


class ContrastiveObjective(ImageObjective):
    """What is the same for all pairs: subclasses say what a pair is, and how its loss depends on all others."""

    config: ContrastiveConfig
    model: TwoViews | TwoTowers
    least_temperature: float

    def __init__(self, config: ContrastiveConfig, seed: int):
        super().__init__(config.data, config.group, seed)
        assert isinstance(self.data, ImageData)
        self.config = config
        self.images = self.data
        self.model = self._network()
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.beside: dict[str, float] = {}
        """Figures of the network as it started and of the pixels: computed once."""

    @abstractmethod
    def _network(self) -> TwoViews | TwoTowers:
        """A new network."""

    @abstractmethod
    def _embed(self, net: nn.Module, batch: Batch, purpose: str) -> Embedded:
        """Both sides of each pair, through `net`; `purpose` is "views" in training, "held-out views" otherwise."""

    @abstractmethod
    def _pair_loss(self, z: Embedded, number_M: Tensor, rows: GatherRows) -> PairLoss:
        """The loss of each pair among those of all ranks, and its gradients."""

    @abstractmethod
    def _pair_figures(self, config: ProbeConfig, held_out: Parts) -> dict[str, float]:
        """Measures of the embeddings "a" and "b" of held-out pairs."""

    @torch.no_grad()
    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        parts = [self._embed(net, batch, "views") for batch in batches]
        whole = Embedded(
            torch.cat([z.a_MP for z in parts]), torch.cat([z.b_MP for z in parts]), parts[0].log_scale, parts[0].bias
        )
        cached = self._pair_loss(whole, torch.cat([batch["sample"] for batch in batches]), rows)
        outward = leads_out(
            whole.log_scale, rows(cached.log_scale_M.sum(0, keepdim=True)).sum(), self.least_temperature
        )
        cached = cached._replace(log_scale_M=cached.log_scale_M * ~outward)
        sizes = [len(batch["sample"]) for batch in batches]
        split = zip(*(each.split(sizes) for each in cached), strict=True)
        return [batch | _keyed(part) for batch, part in zip(batches, split, strict=True)]

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        z, cached = self._embed(net, batch, "views"), PairLoss(*(batch[f"cached/{name}"] for name in PairLoss._fields))
        inner = (
            (cached.a_MP * z.a_MP).sum()
            + (cached.b_MP * z.b_MP).sum()
            + cached.log_scale_M.sum() * z.log_scale.sum()
            + cached.bias_M.sum() * z.bias.sum()
        )
        loss_sum = cached.loss_M.sum()
        with torch.no_grad():
            rest = loss_sum - inner
        # The value is the loss; the gradient is that of the inner product.
        return inner + rest, {"loss": loss_sum.double()} | _count(loss_sum, len(cached.loss_M))

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        """The same loss, with the negatives of this batch alone."""
        there_M = batch["mask"]
        z = self._embed(nets["model"], batch, "held-out views")
        z = z._replace(a_MP=z.a_MP[there_M], b_MP=z.b_MP[there_M])
        if not len(z.a_MP):
            return {"loss": z.bias.sum().double()} | _count(z.bias, 0)
        loss = self._pair_loss(z, batch["sample"][there_M], lambda tensor: tensor).loss_M.sum()
        return {"loss": loss.double()} | _count(loss, len(z.a_MP))

    def report(self, sums: Sums) -> dict[str, float]:
        return {"loss": sums["loss"].item() / sums["samples"].item()}

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        if self.config.quality is None:
            return {}
        config, first = self.config.quality, not self.beside
        start = self._network()
        initialise(start, self.seed)
        start.to(self.device).eval()

        def known(x: Tensor, number_M: Tensor, label_M: Tensor) -> Parts:
            more = (
                {"random": start.features(x.to(self.device)), "pixels": x.flatten(1)}
                if first and self.images.classes
                else {}
            )
            return {"features": self.model.features(x.to(self.device))} | more

        def asked(x: Tensor, number_M: Tensor, label_M: Tensor) -> Parts:
            batch = {"image": (x + 1) * 127.5, "label": label_M, "sample": number_M}
            z = self._embed(
                nets["model"], {name: value.to(self.device) for name, value in batch.items()}, "held-out views"
            )
            return known(x, number_M, label_M) | {"a": z.a_MP, "b": z.b_MP}

        train = compute_over_split(self.images, "train", config.samples, known, share, gather)
        held_out = compute_over_split(self.images, self._apart, config.samples, asked, share, gather)

        def figures() -> dict[str, float]:
            found = (
                class_figures(
                    config, [name for name in ("features", "random", "pixels") if name in train], train, held_out
                )
                if self.images.classes
                else {}
            )
            return found | self._pair_figures(config, held_out)

        found = once(figures, share, gather)
        self.beside |= {name: value for name, value in found.items() if "/" in name}
        return found | self.beside

    @property
    def _apart(self) -> Literal["train", "held_out"]:
        return "held_out" if self.images.config.eval_source or self.images.config.held_out else "train"

    def _features(self, image_NCHW: Tensor) -> Tensor:
        return torch.cat(
            [self.model.features((part.float() / 127.5 - 1).to(self.device)) for part in image_NCHW.split(256)]
        )


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(ContrastiveConfig):
    """Two random views of an image are to be alike, and unlike those of all other images of the global batch (Chen et al. 2020)."""

    name: Literal["simclr"] = "simclr"
    encoder: ConvEncoderConfig = field(default_factory=ConvEncoderConfig)
    """What is kept after training."""
    projection: tuple[int, ...] = (128, 64)
    """Widths of the projection head's layers, of which the last is that of the embeddings."""
    temperature: float = 0.5
    """Of the softmax over the candidates."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.temperature <= 1:
            raise ValueError(
                f"temperature is {self.temperature}; it must be between 0.01 and 1, such as 0.5, or 0.1 with large batches"
            )
        if self.chunk < 1 or not self.projection:
            raise ValueError(
                f"chunk is {self.chunk} and projection {list(self.projection)}; chunk must be at least 1, and projection must name a layer or more"
            )


class SimCLRObjective(ContrastiveObjective):
    """The loss is NT-Xent in nats, the mean of a sample's two views."""

    config: SimCLRConfig
    model: TwoViews
    least_temperature = 0.01

    def _network(self) -> TwoViews:
        return TwoViews(self.config.encoder, self.images.shape, self.config.projection, self.config.temperature)

    def _embed(self, net: nn.Module, batch: Batch, purpose: str) -> Embedded:
        x = self.images.values(batch)
        keys_M = sample_keys(self.seed, batch["sample"], purpose)
        views = [augment(self.config.augment, x, derive(keys_M, "view", number)) for number in range(2)]
        embedded: Embedded = net(*views)
        return embedded

    def _pair_loss(self, z: Embedded, number_M: Tensor, rows: GatherRows) -> PairLoss:
        return nt_xent(z, number_M, clamped(z.log_scale, self.least_temperature), self.config.chunk, rows)

    def _pair_figures(self, config: ProbeConfig, held_out: Parts) -> dict[str, float]:
        return pair_figures(config, held_out["a"], held_out["b"], held_out["number"], "view")

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        """In each row a held-out image, then the training images whose features are nearest."""
        from data.images.held_out import image_set

        asked, _ = image_set(self.images.config, self._apart, min(n, 16))
        known, _ = image_set(self.images.config, "train", 10_000)
        features = [nn.functional.normalize(self._features(each), dim=1) for each in (asked, known)]
        nearest = (features[0] @ features[1].T).topk(min(_NEIGHBOURS_SHOWN, len(known)), dim=1).indices
        rows = torch.cat([asked[:, None], known[nearest.cpu()]], dim=1).flatten(0, 1).float() / 127.5 - 1
        return SampleSet(images={"neighbours": grid_of(rows, columns=1 + nearest.shape[1])})


def _keyed(part: tuple[Tensor, ...]) -> Batch:
    """The fields of a PairLoss as parts of a batch."""
    return {f"cached/{name}": value for name, value in zip(PairLoss._fields, part, strict=True)}


def _count(like: Tensor, samples: int) -> Sums:
    return {"samples": torch.tensor(samples, dtype=torch.float64, device=like.device)}
